//! One transformer block of the GPTBigCode family:
//! `x + attention(ln_1(x))`, then `x + mlp(ln_2(x))`.

use tch::{Device, Kind, Tensor};
use tunefleet_kernels::cached_attention;
use tunefleet_proto::model::{Activation, ModelConfig};

use super::documents::Documents;
use super::linear::{Adapted, Linear, Projection, Served};
use super::numerics::{Numerics, attention, gelu, layer_norm, residual_dropout};

/// What a block does, apart from its weights.
#[derive(Debug, Clone, Copy)]
pub struct BlockShape {
    heads: i64,
    kv_heads: i64,
    head_dim: i64,
    hidden: i64,
    norm_epsilon: f64,
    activation: Activation,
    /// On attention weights; 0 in evaluation.
    attention_dropout: f64,
    /// On both outputs of the block; 0 in evaluation.
    residual_dropout: f64,
    /// Which of their elements are dropped follows from it.
    dropout_seed: i64,
}

/// Parameters of a block.
pub const PARAMETERS: usize = 12;
/// The first of them, the weights of linears.
pub const LINEARS: usize = 4;

/// New tokens of one sequence that a kernel attends for without products; more are worth products.
const FEW_TOKENS: i64 = 16;

/// A block's weights.
pub struct BlockParams<'a> {
    c_attn: Projection<'a>,
    c_proj: Projection<'a>,
    c_fc: Projection<'a>,
    mlp_proj: Projection<'a>,
    ln_1_weight: &'a Tensor,
    ln_1_bias: &'a Tensor,
    ln_2_weight: &'a Tensor,
    ln_2_bias: &'a Tensor,
}

/// Keys and values of the tokens that one sequence has been shown: two tensors `[K, S, C]`, longer than what is used.
#[derive(Debug)]
pub struct KvCache {
    k_ksc: Tensor,
    v_ksc: Tensor,
}

/// Some tokens of one sequence in a row of several, and those that came before them.
#[derive(Debug)]
pub struct Run<'a> {
    /// Of the sequence; these tokens are added to it.
    pub cache: &'a mut KvCache,
    /// Tokens of it that count.
    pub cached_tokens: i64,
    /// New tokens.
    pub tokens: i64,
}

/// Which tokens a token sees, besides itself.
pub enum Sight<'a> {
    /// Those before it in its row.
    Row,
    /// Those before it in its document.
    Document(&'a Documents),
    /// Those before it in its sequence: the row holds runs of several, one behind the other.
    Cached(&'a mut [Run<'a>]),
}

impl<'a> From<Option<&'a Documents>> for Sight<'a> {
    fn from(documents: Option<&'a Documents>) -> Self {
        documents.map_or(Sight::Row, Sight::Document)
    }
}

impl BlockShape {
    /// The shape of `config`'s blocks; dropout only when `training`.
    pub fn new(config: &ModelConfig, training: bool) -> Self {
        let dropout = |p: f64| if training { p } else { 0.0 };
        BlockShape {
            heads: config.heads as i64,
            kv_heads: config.kv_heads as i64,
            head_dim: config.head_dim() as i64,
            hidden: config.hidden_size as i64,
            norm_epsilon: config.norm_epsilon,
            activation: config.activation,
            attention_dropout: dropout(config.dropout.attention),
            residual_dropout: dropout(config.dropout.residual),
            dropout_seed: 0,
        }
    }

    /// The same, with dropout of `seed`.
    pub fn seeded(self, seed: i64) -> Self {
        BlockShape { dropout_seed: seed, ..self }
    }
}

impl<'a> BlockParams<'a> {
    /// Names the 12 tensors of a block, in the order of `ModelConfig::block_parameters`; `adapted` tells
    /// of each of the four linears, by the index of its weight, what stands beside it.
    ///
    /// # Panics
    /// With another number of tensors, which is a programming error.
    pub fn new(params: &[&'a Tensor], adapted: impl Fn(usize) -> Adapted<'a>) -> Self {
        let &[
            c_attn_weight,
            c_proj_weight,
            c_fc_weight,
            mlp_proj_weight,
            ln_1_weight,
            ln_1_bias,
            c_attn_bias,
            c_proj_bias,
            ln_2_weight,
            ln_2_bias,
            c_fc_bias,
            mlp_proj_bias,
        ] = params
        else {
            panic!("a block has {PARAMETERS} parameters, got {}", params.len());
        };
        let linear =
            |index, weight, bias| Projection::Trained(Linear { weight, bias, adapted: adapted(index) });
        BlockParams {
            c_attn: linear(0, c_attn_weight, c_attn_bias),
            c_proj: linear(1, c_proj_weight, c_proj_bias),
            c_fc: linear(2, c_fc_weight, c_fc_bias),
            mlp_proj: linear(3, mlp_proj_weight, mlp_proj_bias),
            ln_1_weight,
            ln_1_bias,
            ln_2_weight,
            ln_2_bias,
        }
    }

    /// A block with nothing beside its weights.
    pub fn plain(params: &'a [Tensor]) -> Self {
        BlockParams::new(&params.iter().collect::<Vec<_>>(), |_| Adapted::Trained)
    }

    /// A block of a model that completes text: the linears from `served`, by the index of their weight; `others` are
    /// the parameters behind the weights, in order.
    ///
    /// # Panics
    /// With another number of tensors, which is a programming error.
    pub fn served(others: &'a [Tensor], served: impl Fn(usize, &'a Tensor) -> Served<'a>) -> Self {
        let [
            ln_1_weight,
            ln_1_bias,
            c_attn_bias,
            c_proj_bias,
            ln_2_weight,
            ln_2_bias,
            c_fc_bias,
            mlp_proj_bias,
        ] = others
        else {
            panic!(
                "a block has {} parameters behind its linears, got {}",
                PARAMETERS - LINEARS,
                others.len()
            );
        };
        let linear = |index, bias| Projection::Served(served(index, bias));
        BlockParams {
            c_attn: linear(0, c_attn_bias),
            c_proj: linear(1, c_proj_bias),
            c_fc: linear(2, c_fc_bias),
            mlp_proj: linear(3, mlp_proj_bias),
            ln_1_weight,
            ln_1_bias,
            ln_2_weight,
            ln_2_bias,
        }
    }
}

impl KvCache {
    /// Room for `tokens`; more is made as it is needed.
    pub fn new(config: &ModelConfig, numerics: Numerics, tokens: i64) -> Self {
        let size = [config.kv_heads as i64, tokens, config.head_dim() as i64];
        let zeros = || Tensor::zeros(size, (numerics.product_kind, numerics.device));
        KvCache { k_ksc: zeros(), v_ksc: zeros() }
    }

    fn reserve(&mut self, tokens: i64) {
        let now = self.k_ksc.size()[1];
        if tokens <= now {
            return;
        }
        let more = tokens.max(now + now / 2) - now;
        for cache in [&mut self.k_ksc, &mut self.v_ksc] {
            let mut size = cache.size();
            size[1] = more;
            *cache =
                Tensor::cat(&[&*cache, &Tensor::zeros(size.as_slice(), (cache.kind(), cache.device()))], 1);
        }
    }
}

impl Run<'_> {
    /// What the run's queries `[1, H, T, C]` find among all keys and values of its sequence, the new ones included, for
    /// which there is room.
    fn attention(&mut self, q_1htc: &Tensor, k_1ktc: &Tensor, v_1ktc: &Tensor) -> Tensor {
        let Run { cache, cached_tokens, tokens } = self;
        let (cached, tokens) = (*cached_tokens, *tokens);
        let seen = cached + tokens;
        cache.k_ksc.narrow(1, cached, tokens).copy_(&k_1ktc.squeeze_dim(0));
        cache.v_ksc.narrow(1, cached, tokens).copy_(&v_1ktc.squeeze_dim(0));
        if cached == 0 && tokens > 1 {
            return attention(q_1htc, k_1ktc, v_1ktc, true, 0.0);
        }
        let (k_ksc, v_ksc) = (cache.k_ksc.narrow(1, 0, seen), cache.v_ksc.narrow(1, 0, seen));
        if tokens > 1 && q_1htc.device() == Device::Cpu {
            // Minus infinity for what comes later, 0 for the rest.
            let mask_ts = Tensor::full([tokens, seen], f64::NEG_INFINITY, (q_1htc.kind(), Device::Cpu))
                .triu(cached + 1);
            let (k, v) = (k_ksc.unsqueeze(0), v_ksc.unsqueeze(0));
            return Tensor::scaled_dot_product_attention(
                q_1htc,
                &k,
                &v,
                Some(&mask_ts),
                0.0,
                false,
                None,
                true,
            );
        }
        let (heads, head_dim, kv_heads) = (q_1htc.size()[1], q_1htc.size()[3], k_ksc.size()[0]);
        let group = heads / kv_heads;
        // Query heads that share keys are rows of one product: nothing is repeated for each of them.
        let q_knc = q_1htc.reshape([kv_heads, group * tokens, head_dim]);
        let scores_kns = q_knc.bmm(&k_ksc.transpose(1, 2)) * (1.0 / (head_dim as f64).sqrt());
        let scores_kns = if tokens == 1 {
            scores_kns
        } else {
            let hidden_ts = Tensor::ones([tokens, seen], (Kind::Bool, q_1htc.device())).triu(cached + 1);
            scores_kns.masked_fill(&hidden_ts.repeat([group, 1]), f64::NEG_INFINITY)
        };
        let weights_kns = scores_kns.softmax(-1, Kind::Float).to_kind(v_ksc.kind());
        weights_kns.bmm(&v_ksc).view([1, heads, tokens, head_dim])
    }
}

/// The block's output, `[B, T, D]` like its input, in the dtype of input and weights; differentiable.
pub fn forward(shape: &BlockShape, params: &BlockParams<'_>, x_btd: &Tensor, sight: Sight<'_>) -> Tensor {
    let p = params;
    let into = |residual: &Tensor, x: &Tensor, stream: i64| {
        residual_dropout(residual, x, shape.residual_dropout, shape.dropout_seed, stream)
    };

    let normed_btd = layer_norm(x_btd, p.ln_1_weight, p.ln_1_bias, shape.norm_epsilon);
    let qkv = p.c_attn.forward(&normed_btd);
    let attended_btd = attend(shape, &qkv, sight);
    let x_btd = into(x_btd, &p.c_proj.forward(&attended_btd), 0);

    let normed_btd = layer_norm(&x_btd, p.ln_2_weight, p.ln_2_bias, shape.norm_epsilon);
    let (inner_bti, bias_i) = p.c_fc.forward_unbiased(&normed_btd);
    let inner_bti = gelu(&inner_bti, bias_i, shape.activation);
    into(&x_btd, &p.mlp_proj.forward(&inner_bti), 1)
}

/// Splits the fused projection (all query heads, then keys, then values) and attends.
fn attend(shape: &BlockShape, qkv: &Tensor, sight: Sight<'_>) -> Tensor {
    let (batch, tokens) = (qkv.size()[0], qkv.size()[1]);
    let attended_bhtc = match sight {
        Sight::Row => {
            let [q_bhtc, k_bktc, v_bktc] = split(shape, qkv);
            attention(&q_bhtc, &k_bktc, &v_bktc, true, shape.attention_dropout)
        }
        Sight::Document(documents) => {
            let [q_bhtc, k_bktc, v_bktc] = split(shape, qkv);
            documents.attention(&q_bhtc, &k_bktc, &v_bktc, shape.attention_dropout)
        }
        Sight::Cached(runs) => return attend_cached(shape, qkv, runs),
    };
    attended_bhtc.transpose(1, 2).reshape([batch, tokens, shape.hidden])
}

/// Queries `[B, H, T, C]`, keys and values `[B, K, T, C]`.
fn split(shape: &BlockShape, qkv: &Tensor) -> [Tensor; 3] {
    let (batch, tokens) = (qkv.size()[0], qkv.size()[1]);
    let kv_width = shape.kv_heads * shape.head_dim;
    let heads = |first: i64, width: i64, count: i64| {
        let part = qkv.narrow(2, first, width).contiguous();
        part.view([batch, tokens, count, shape.head_dim]).transpose(1, 2)
    };
    [
        heads(0, shape.hidden, shape.heads),
        heads(shape.hidden, kv_width, shape.kv_heads),
        heads(shape.hidden + kv_width, kv_width, shape.kv_heads),
    ]
}

/// Runs of few tokens in one call where there is a kernel for them, others one by one: `[1, T, D]`.
fn attend_cached(shape: &BlockShape, qkv_1tf: &Tensor, runs: &mut [Run<'_>]) -> Tensor {
    let mut firsts = Vec::with_capacity(runs.len());
    let mut rows = 0;
    for run in &mut *runs {
        run.cache.reserve(run.cached_tokens + run.tokens);
        firsts.push(rows);
        rows += run.tokens;
    }
    let few = runs.iter().zip(&firsts).filter(|(run, _)| run.tokens <= FEW_TOKENS);
    let few: Vec<_> = few
        .map(|(run, first)| cached_attention::Run {
            k_ksc: &run.cache.k_ksc,
            v_ksc: &run.cache.v_ksc,
            cached: run.cached_tokens,
            first: *first,
            tokens: run.tokens,
        })
        .collect();
    let qkv_tf = qkv_1tf.squeeze_dim(0);
    let attended = match few.is_empty() {
        true => None,
        false => cached_attention::attend(&qkv_tf, shape.heads, shape.kv_heads, &few)
            .unwrap_or_else(|error| panic!("{error}")),
    };
    let is_done = |run: &Run<'_>| attended.is_some() && run.tokens <= FEW_TOKENS;
    let out_td = attended.as_ref().map_or_else(
        || Tensor::empty([rows, shape.hidden], (qkv_1tf.kind(), qkv_1tf.device())),
        Tensor::shallow_clone,
    );
    for (run, first) in runs.iter_mut().zip(firsts).filter(|(run, _)| !is_done(run)) {
        let tokens = run.tokens;
        let [q, k, v] = split(shape, &qkv_1tf.narrow(1, first, tokens));
        let attended_1htc = run.attention(&q, &k, &v);
        let attended_td = attended_1htc.transpose(1, 2).reshape([tokens, shape.hidden]);
        out_td.narrow(0, first, tokens).copy_(&attended_td);
    }
    out_td.unsqueeze(0)
}
