//! One transformer block: `x + attention(norm_1(x))`, then `x + mlp(norm_2(x))`.

use tch::Tensor;
use tunefleet_proto::model::{Activation, LinearRole, LinearShape, ModelConfig, Norm as NormKind, Qkv};

use super::attention::{HeadShape, Projected, Sight, attend};
use super::linear::{Adapted, Linear, Projection, Served};
use super::numerics::{activate, gated, norm, residual_dropout};
use super::rotary::Turns;

/// What a block does, apart from its weights.
#[derive(Debug, Clone, Copy)]
pub struct BlockShape {
    heads: HeadShape,
    /// Windows of the blocks from this one on.
    window: Option<(usize, i64)>,
    /// Queries, keys and values of each head lie beside each other in their projection.
    by_head: bool,
    norm_epsilon: f64,
    activation: Activation,
    /// On both outputs of the block; 0 in evaluation.
    residual_dropout: f64,
    /// Which of their elements are dropped follows from it.
    dropout_seed: i64,
}

/// Which tensors a block has, in the order of `ModelConfig::block_parameters`.
#[derive(Debug, Clone)]
pub struct BlockLayout {
    linears: Vec<LinearShape>,
    norm: NormKind,
}

/// A norm's tensors, `[D]`.
#[derive(Debug, Clone, Copy)]
pub struct Norm<'a> {
    /// Scales.
    pub weight: &'a Tensor,
    /// Is added, in layer norm.
    pub bias: Option<&'a Tensor>,
}

/// A block's weights.
pub struct BlockParams<'a> {
    norm_1: Norm<'a>,
    /// One fused projection, or three.
    qkv: Vec<Projection<'a>>,
    attention_out: Projection<'a>,
    norm_2: Norm<'a>,
    gate: Option<Projection<'a>>,
    mlp_in: Projection<'a>,
    mlp_out: Projection<'a>,
}

impl BlockShape {
    /// The shape of `config`'s blocks; dropout only when `training`.
    pub fn new(config: &ModelConfig, training: bool) -> Self {
        let dropout = |p: f64| if training { p } else { 0.0 };
        BlockShape {
            heads: HeadShape {
                heads: config.heads as i64,
                kv_heads: config.kv_heads as i64,
                head_dim: config.head_dim() as i64,
                window: None,
                dropout: dropout(config.dropout.attention),
            },
            window: config.window.map(|window| (window.first_block as usize, window.tokens as i64)),
            by_head: config.qkv == Qkv::FusedByHead,
            norm_epsilon: config.norm_epsilon,
            activation: config.activation,
            residual_dropout: dropout(config.dropout.residual),
            dropout_seed: 0,
        }
    }

    /// That of block `i`.
    pub fn of_block(self, i: usize) -> Self {
        let window = self.window.filter(|(first, _)| i >= *first).map(|(_, tokens)| tokens);
        BlockShape { heads: HeadShape { window, ..self.heads }, ..self }
    }

    /// The same, with dropout of `seed`.
    pub fn seeded(self, seed: i64) -> Self {
        BlockShape { dropout_seed: seed, ..self }
    }
}

impl BlockLayout {
    /// Of `config`'s blocks.
    pub fn new(config: &ModelConfig) -> Self {
        BlockLayout { linears: config.linears(), norm: config.norm }
    }

    /// Linears, whose weights come first.
    pub fn linears(&self) -> usize {
        self.linears.len()
    }

    /// A block in training, of all its tensors; `adapted` tells of each linear, by the index of its weight, what stands
    /// beside it.
    ///
    /// # Panics
    /// With another number of tensors, which is a programming error.
    pub fn trained<'a>(
        &self,
        params: &[&'a Tensor],
        adapted: impl Fn(usize) -> Adapted<'a>,
    ) -> BlockParams<'a> {
        let (weights, others) = params.split_at(self.linears.len().min(params.len()));
        self.params(others.iter().copied(), |at, bias| {
            Projection::Trained(Linear { weight: weights[at], bias, adapted: adapted(at) })
        })
    }

    /// A block with nothing beside its weights.
    ///
    /// # Panics
    /// As [`trained`](Self::trained).
    pub fn plain<'a>(&self, params: &'a [Tensor]) -> BlockParams<'a> {
        self.trained(&params.iter().collect::<Vec<_>>(), |_| Adapted::Trained)
    }

    /// A block of a model that completes text: the linears from `served`, by the index of their weight; `others` are the
    /// tensors behind the weights.
    ///
    /// # Panics
    /// As [`trained`](Self::trained).
    pub fn served<'a>(
        &self,
        others: &'a [Tensor],
        served: impl Fn(usize, Option<&'a Tensor>) -> Served<'a>,
    ) -> BlockParams<'a> {
        self.params(others.iter(), |at, bias| Projection::Served(served(at, bias)))
    }

    /// Norms and biases in their order: norm, attention, norm, MLP.
    fn params<'a>(
        &self,
        mut others: impl Iterator<Item = &'a Tensor>,
        linear: impl Fn(usize, Option<&'a Tensor>) -> Projection<'a>,
    ) -> BlockParams<'a> {
        let norm_1 = self.next_norm(&mut others);
        let mut norm_2 = None;
        let mut projections = Projections::default();
        for (at, shape) in self.linears.iter().enumerate() {
            if matches!(shape.role, LinearRole::Gate | LinearRole::MlpIn) && norm_2.is_none() {
                norm_2 = Some(self.next_norm(&mut others));
            }
            let bias = shape.bias.then(|| next(&mut others));
            projections.put(shape.role, linear(at, bias));
        }
        assert!(others.next().is_none(), "a block has fewer tensors than it was given");
        projections.of_block(norm_1, norm_2.unwrap_or(norm_1))
    }

    fn next_norm<'a>(&self, others: &mut impl Iterator<Item = &'a Tensor>) -> Norm<'a> {
        Norm { weight: next(others), bias: (self.norm == NormKind::LayerNorm).then(|| next(others)) }
    }
}

fn next<'a>(tensors: &mut impl Iterator<Item = &'a Tensor>) -> &'a Tensor {
    tensors.next().unwrap_or_else(|| panic!("a block has more tensors than it was given"))
}

/// Projections by what they are for.
#[derive(Default)]
struct Projections<'a> {
    qkv: Vec<Projection<'a>>,
    attention_out: Option<Projection<'a>>,
    gate: Option<Projection<'a>>,
    mlp_in: Option<Projection<'a>>,
    mlp_out: Option<Projection<'a>>,
}

impl<'a> Projections<'a> {
    fn put(&mut self, role: LinearRole, projection: Projection<'a>) {
        match role {
            LinearRole::Qkv | LinearRole::Query | LinearRole::Key | LinearRole::Value => {
                self.qkv.push(projection);
            }
            LinearRole::AttentionOut => self.attention_out = Some(projection),
            LinearRole::Gate => self.gate = Some(projection),
            LinearRole::MlpIn => self.mlp_in = Some(projection),
            LinearRole::MlpOut => self.mlp_out = Some(projection),
        }
    }

    fn of_block(self, norm_1: Norm<'a>, norm_2: Norm<'a>) -> BlockParams<'a> {
        let Projections { qkv, attention_out, gate, mlp_in, mlp_out } = self;
        let (Some(attention_out), Some(mlp_in), Some(mlp_out)) = (attention_out, mlp_in, mlp_out) else {
            panic!("a block has linears out of attention, and into and out of its MLP");
        };
        BlockParams { norm_1, qkv, attention_out, norm_2, gate, mlp_in, mlp_out }
    }
}

/// The block's output, `[B, T, D]` like its input, in the dtype of input and weights; differentiable. `turns` are those of
/// the tokens, where positions are rotary.
pub fn forward(
    shape: &BlockShape,
    params: &BlockParams<'_>,
    x_btd: &Tensor,
    turns: Option<&Turns>,
    sight: Sight<'_>,
) -> Tensor {
    let p = params;
    let into = |residual: &Tensor, x: &Tensor, stream: i64| {
        residual_dropout(residual, x, shape.residual_dropout, shape.dropout_seed, stream)
    };

    let normed_btd = norm(&p.norm_1, x_btd, shape.norm_epsilon);
    let attended_btf = attend(&shape.heads, &project(shape, p, &normed_btd, turns), sight);
    let x_btd = into(x_btd, &p.attention_out.forward(&attended_btf), 0);

    let normed_btd = norm(&p.norm_2, &x_btd, shape.norm_epsilon);
    let inner_bti = match &p.gate {
        Some(gate) => gated(&gate.forward(&normed_btd), &p.mlp_in.forward(&normed_btd), shape.activation),
        None => {
            let (inner_bti, bias_i) = p.mlp_in.forward_unbiased(&normed_btd);
            activate(&inner_bti, bias_i, shape.activation)
        }
    };
    into(&x_btd, &p.mlp_out.forward(&inner_bti), 1)
}

/// Queries, keys and values, the first two turned.
fn project(
    shape: &BlockShape,
    params: &BlockParams<'_>,
    normed_btd: &Tensor,
    turns: Option<&Turns>,
) -> Projected {
    let [q, k, v] = match params.qkv.as_slice() {
        [q, k, v] => [q, k, v].map(|projection| projection.forward(normed_btd)),
        [fused] if shape.by_head => {
            let HeadShape { heads, head_dim, .. } = shape.heads;
            let qkv_btf = fused.forward(normed_btd);
            let (batch, tokens) = (qkv_btf.size()[0], qkv_btf.size()[1]);
            let of_heads = qkv_btf.view([batch, tokens, heads, 3, head_dim]);
            [0, 1, 2].map(|at| of_heads.select(3, at).reshape([batch, tokens, heads * head_dim]))
        }
        [fused] => return Projected::Fused(fused.forward(normed_btd)),
        more => panic!("a block has one projection into attention or three, got {}", more.len()),
    };
    match turns {
        Some(turns) => Projected::Split([turns.turn(&q), turns.turn(&k), v]),
        None => Projected::Split([q, k, v]),
    }
}
