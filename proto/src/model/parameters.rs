//! The parameters that follow from a config's switches: names, shapes and order, which is that of shards, checkpoints
//! and the worker's blocks.

use super::{Mlp, ModelConfig, Norm, Positions, Qkv};

/// One parameter tensor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Parameter {
    /// Name inside its unit, e.g. `attn.c_attn.weight`.
    pub name: String,
    /// Full name in Hugging Face files, e.g. `transformer.h.3.attn.c_attn.weight`.
    pub hf_name: String,
    /// Shape; linears are `[out, in]`.
    pub shape: Vec<u64>,
    /// Whether weight decay applies: matrices yes, biases and norms no.
    pub decays: bool,
}

impl Parameter {
    /// Number of elements.
    pub fn elements(&self) -> u64 {
        self.shape.iter().product()
    }
}

/// What a linear of a block is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LinearRole {
    /// Queries, keys and values.
    Qkv,
    /// Queries.
    Query,
    /// Keys.
    Key,
    /// Values.
    Value,
    /// Out of attention.
    AttentionOut,
    /// What the inner layer is multiplied by, before its activation.
    Gate,
    /// Into the inner layer.
    MlpIn,
    /// Out of it.
    MlpOut,
}

/// A linear of a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LinearShape {
    /// What it is for.
    pub role: LinearRole,
    /// Name inside the block, e.g. `attn.c_attn`.
    pub name: &'static str,
    /// Width of its output.
    pub out_features: u64,
    /// Width of its input.
    pub in_features: u64,
    /// Whether it adds a bias.
    pub bias: bool,
}

impl LinearRole {
    /// Whether it ends in the residual stream.
    pub fn is_into_residual(self) -> bool {
        matches!(self, LinearRole::AttentionOut | LinearRole::MlpOut)
    }

    fn is_of_mlp(self) -> bool {
        matches!(self, LinearRole::Gate | LinearRole::MlpIn | LinearRole::MlpOut)
    }
}

/// Where the parameters outside the blocks stand in [`ModelConfig::embed_parameters`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EmbedLayout {
    /// Token embedding, `[V, D]`.
    pub tokens: usize,
    /// Position embedding, `[P, D]`, where positions are learned.
    pub positions: Option<usize>,
    /// Output head, `[V, D]`: the token embedding where they are tied.
    pub head: usize,
    /// Weight of the final norm, `[D]`.
    pub norm_weight: usize,
    /// Its bias, where it has one.
    pub norm_bias: Option<usize>,
}

impl ModelConfig {
    /// Where the parameters outside the blocks stand.
    pub fn embed_layout(&self) -> EmbedLayout {
        let positions = (self.positions == Positions::Learned).then_some(1);
        let tables = 1 + usize::from(positions.is_some());
        let norm_weight = tables + usize::from(!self.tied_head);
        EmbedLayout {
            tokens: 0,
            positions,
            head: if self.tied_head { 0 } else { tables },
            norm_weight,
            norm_bias: (self.norm == Norm::LayerNorm).then_some(norm_weight + 1),
        }
    }

    /// Parameters outside the blocks: embeddings, the head where it is not tied, and the final norm.
    pub fn embed_parameters(&self) -> Vec<Parameter> {
        let (names, d) = (self.family.names(), self.hidden_size);
        let full = |name: &str| format!("{}{name}", names.prefix);
        let tokens = format!("{}.weight", names.token_embedding);
        let mut out = vec![matrix(&tokens, full(&tokens), [self.vocab_size, d])];
        if self.positions == Positions::Learned {
            let positions = format!("{}.weight", names.position_embedding);
            out.push(matrix(&positions, full(&positions), [self.max_positions, d]));
        }
        if !self.tied_head {
            out.push(matrix("lm_head.weight", "lm_head.weight".to_owned(), [self.vocab_size, d]));
        }
        out.extend(self.norm_parameters(names.final_norm, d, full));
        out
    }

    /// The linears of a block, in order.
    pub fn linears(&self) -> Vec<LinearShape> {
        use LinearRole::{AttentionOut, Gate, Key, MlpIn, MlpOut, Query, Value};
        let names = self.family.names();
        let (d, q, kv, inner) =
            (self.hidden_size, self.attention_width(), self.kv_width(), self.intermediate_size);
        let widths = match self.qkv {
            Qkv::Fused | Qkv::FusedByHead => vec![(LinearRole::Qkv, q + 2 * kv)],
            Qkv::Split => vec![(Query, q), (Key, kv), (Value, kv)],
        };
        let mut out: Vec<LinearShape> = widths
            .into_iter()
            .zip(names.qkv)
            .map(|((role, out_features), name)| LinearShape {
                role,
                name,
                out_features,
                in_features: d,
                bias: self.biases.qkv,
            })
            .collect();
        out.push(LinearShape {
            role: AttentionOut,
            name: names.attention_out,
            out_features: d,
            in_features: q,
            bias: self.biases.attention_out,
        });
        let into = match self.mlp {
            Mlp::Plain => vec![MlpIn],
            Mlp::Gated => vec![Gate, MlpIn],
        };
        let bias = self.biases.mlp;
        out.extend(into.into_iter().zip(names.mlp_in).map(|(role, name)| LinearShape {
            role,
            name,
            out_features: inner,
            in_features: d,
            bias,
        }));
        out.push(LinearShape {
            role: MlpOut,
            name: names.mlp_out,
            out_features: d,
            in_features: inner,
            bias,
        });
        out
    }

    /// Parameters of one block. Matrices come first, in the order of [`linears`](Self::linears), so that a shard splits
    /// into at most two runs: one that decays and one that does not. Then the norm before attention, biases of
    /// attention, the norm before the MLP, biases of the MLP.
    pub fn block_parameters(&self, block: u64) -> Vec<Parameter> {
        let (names, d) = (self.family.names(), self.hidden_size);
        let full = |name: &str| format!("{}{}.{block}.{name}", names.prefix, names.blocks);
        let linears = self.linears();
        let weight = |linear: &LinearShape| {
            let name = format!("{}.weight", linear.name);
            matrix(&name, full(&name), [linear.out_features, linear.in_features])
        };
        let biases = |of_mlp: bool| {
            let own = move |linear: &&LinearShape| linear.bias && linear.role.is_of_mlp() == of_mlp;
            linears.iter().filter(own).map(move |linear| {
                let name = format!("{}.bias", linear.name);
                vector(&name, full(&name), linear.out_features)
            })
        };
        let mut out: Vec<Parameter> = linears.iter().map(weight).collect();
        let [norm_1, norm_2] = names.norms;
        out.extend(self.norm_parameters(norm_1, d, full));
        out.extend(biases(false));
        out.extend(self.norm_parameters(norm_2, d, full));
        out.extend(biases(true));
        out
    }

    fn norm_parameters(&self, name: &str, width: u64, full: impl Fn(&str) -> String) -> Vec<Parameter> {
        let parts = match self.norm {
            Norm::LayerNorm => &["weight", "bias"][..],
            Norm::RmsNorm => &["weight"],
        };
        let parameter = |part: &&str| {
            let name = format!("{name}.{part}");
            vector(&name, full(&name), width)
        };
        parts.iter().map(parameter).collect()
    }

    /// All parameters, each tied one once.
    pub fn parameter_count(&self) -> u64 {
        let sum = |list: Vec<Parameter>| list.iter().map(Parameter::elements).sum::<u64>();
        sum(self.embed_parameters()) + self.layers * sum(self.block_parameters(0))
    }
}

fn matrix(name: &str, hf_name: String, shape: [u64; 2]) -> Parameter {
    Parameter { name: name.into(), hf_name, shape: shape.to_vec(), decays: true }
}

fn vector(name: &str, hf_name: String, len: u64) -> Parameter {
    Parameter { name: name.into(), hf_name, shape: vec![len], decays: false }
}
