//! Model shapes, read from a Hugging Face `config.json`: one decoder with switches.
//!
//! Torch-free, so that the coordinator can count, plan and shard. A family is one file in `families/` and one row of its
//! table: which keys its `config.json` has, and what its weights are called. Everything else follows from the switches.

/// Values of a `config.json`.
mod keys;
/// Rotary positions.
pub mod rope;
/// What each family's `config.json` and weights are called.
mod families;
/// Published shapes by name.
mod presets;
/// The parameters that follow from the switches.
mod parameters;

use serde::{Deserialize, Serialize};
use serde_json::Value;

pub use families::{Family, Names};
pub use parameters::{EmbedLayout, LinearRole, LinearShape, Parameter};
pub use presets::PRESETS;
pub use rope::Rope;

/// Key of a `config.json` for [`ModelConfig::added_tokens`]; transformers passes over it.
const ADDED_TOKENS: &str = "tunefleet_added_tokens";
/// Most control tokens that are added to a model.
const MAX_ADDED_TOKENS: usize = 4096;

/// A decoder-only transformer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ModelConfig {
    /// Decides names of weights and of the keys in `config.json`.
    pub family: Family,
    /// Rows of the token embedding.
    pub vocab_size: u64,
    /// Width of the residual stream (D).
    pub hidden_size: u64,
    /// Number of transformer blocks.
    pub layers: u64,
    /// Query heads.
    pub heads: u64,
    /// Key-value heads: 1 is multi-query attention, as many as query heads multi-head attention.
    pub kv_heads: u64,
    /// Width of a head where it is not the model's width over the number of heads.
    pub own_head_dim: Option<u64>,
    /// Width of the MLP's inner layer.
    pub intermediate_size: u64,
    /// Longest sequence the model has positions for.
    pub max_positions: u64,
    /// How a token knows where it stands.
    pub positions: Positions,
    /// Norm before attention, before the MLP and behind the last block.
    pub norm: Norm,
    /// Epsilon of the norms.
    pub norm_epsilon: f64,
    /// How queries, keys and values are projected.
    pub qkv: Qkv,
    /// Which linears add a bias.
    pub biases: Biases,
    /// Tokens that see few tokens before them.
    pub window: Option<Window>,
    /// Shape of the MLP.
    pub mlp: Mlp,
    /// MLP activation.
    pub activation: Activation,
    /// Whether the output head is the token embedding.
    pub tied_head: bool,
    /// Dropout probabilities, active in training.
    pub dropout: Dropout,
    /// Standard deviation of fresh weights.
    pub initializer_range: f64,
    /// Token that begins a text.
    pub bos_token_id: Option<u64>,
    /// Token that ends a text.
    pub eos_token_id: Option<u64>,
    /// Rows of the token embedding that this program has added for control tokens, and that nobody has trained.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub added_tokens: Vec<u64>,
}

/// How a token knows where it stands.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Positions {
    /// A learned vector for each position is added to the token's.
    Learned,
    /// Queries and keys are rotated.
    Rotary(Rope),
}

/// Norms.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Norm {
    /// Mean and variance, with a bias (Ba et al. 2016).
    LayerNorm,
    /// Root of the mean square, without a bias (Zhang and Sennrich 2019).
    RmsNorm,
}

/// How queries, keys and values are projected.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Qkv {
    /// One linear: all queries, then keys, then values.
    Fused,
    /// One linear: of each head its query, key and value.
    FusedByHead,
    /// Three linears.
    Split,
}

/// Which linears add a bias.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Biases {
    /// Into queries, keys and values.
    pub qkv: bool,
    /// Out of attention.
    pub attention_out: bool,
    /// Of the MLP.
    pub mlp: bool,
}

/// A token sees itself and those before it, `tokens` in all (Beltagy et al. 2020).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Window {
    /// Its width.
    pub tokens: u64,
    /// The first block that has it; those behind it do as well.
    pub first_block: u64,
}

/// Shape of the MLP.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Mlp {
    /// `out(act(in(x)))`.
    Plain,
    /// `out(act(gate(x)) * in(x))` (Shazeer 2020).
    Gated,
}

/// MLP activations, named as in transformers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Activation {
    /// Exact form, by erf.
    Gelu,
    /// Tanh approximation.
    GeluPytorchTanh,
    /// `x * sigmoid(x)`.
    Silu,
}

/// Dropout probabilities.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Dropout {
    /// On attention weights.
    pub attention: f64,
    /// On the sum of embeddings.
    pub embedding: f64,
    /// On both outputs of a block before they join the residual stream.
    pub residual: f64,
}

impl Dropout {
    /// None.
    pub const NONE: Dropout = Dropout { attention: 0.0, embedding: 0.0, residual: 0.0 };
}

/// What a `config.json` can do wrong.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Not an object.
    #[error("config.json is not a JSON object: {0}")]
    Json(String),
    /// A family that is not supported.
    #[error("config.json: model_type {0:?} is not supported; supported: {supported}", supported = families::supported())]
    Family(String),
    /// A key that must be there.
    #[error("config.json lacks {0}")]
    Missing(&'static str),
    /// A key with a value that cannot be used.
    #[error("config.json: {key} = {value}: {rule}")]
    Value {
        /// Which key.
        key: &'static str,
        /// What it holds.
        value: String,
        /// What it must be.
        rule: String,
    },
    /// A preset that does not exist.
    #[error("unknown preset {0:?}; presets: {presets}", presets = PRESETS.join(", "))]
    Preset(String),
}

impl ModelConfig {
    /// A named shape. Those with a model's name are the published ones.
    ///
    /// # Errors
    /// [`Error::Preset`] for an unknown name.
    pub fn preset(name: &str) -> Result<Self, Error> {
        presets::preset(name)
    }

    /// Reads a Hugging Face `config.json`.
    ///
    /// # Errors
    /// Names the key and the rule; an unknown family by its name.
    pub fn from_json(text: &str) -> Result<Self, Error> {
        let value: Value = serde_json::from_str(text).map_err(|e| Error::Json(e.to_string()))?;
        let Value::Object(map) = value else {
            return Err(Error::Json("expected an object".to_owned()));
        };
        families::read(keys::Keys::new(&map))
    }

    /// The `config.json` that transformers reads. `dtype` is its `torch_dtype`.
    pub fn to_json(&self, dtype: &str) -> Value {
        families::write(self, dtype)
    }

    /// Width of one head (C).
    pub fn head_dim(&self) -> u64 {
        self.own_head_dim.unwrap_or(self.hidden_size / self.heads)
    }

    /// Width of all query heads together.
    pub fn attention_width(&self) -> u64 {
        self.heads * self.head_dim()
    }

    /// Width of all key heads together, and of all value heads.
    pub fn kv_width(&self) -> u64 {
        self.kv_heads * self.head_dim()
    }

    /// The window of a block, where it has one.
    pub fn window_of(&self, block: u64) -> Option<u64> {
        self.window.filter(|window| block >= window.first_block).map(|window| window.tokens)
    }
}

impl Activation {
    /// Name in transformers.
    pub fn hf_name(self) -> &'static str {
        match self {
            Activation::Gelu => "gelu",
            Activation::GeluPytorchTanh => "gelu_pytorch_tanh",
            Activation::Silu => "silu",
        }
    }

    /// By its name in transformers.
    fn of(name: &str) -> Option<Self> {
        [Activation::Gelu, Activation::GeluPytorchTanh, Activation::Silu]
            .into_iter()
            .find(|activation| activation.hf_name() == name)
    }
}

#[cfg(test)]
mod tests;
