//! Model shapes, read from a Hugging Face `config.json`: one decoder with switches.
//!
//! Torch-free, so that the coordinator can count, plan and shard. A family is one `match` arm
//! in [`ModelConfig::from_json`] and one in [`ModelConfig::to_json`]; everything else follows
//! from the switches.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

/// A decoder-only transformer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ModelConfig {
    /// Decides names and layouts of weights.
    pub family: Family,
    /// Rows of the token embedding.
    pub vocab_size: u64,
    /// Width of the residual stream (D).
    pub hidden_size: u64,
    /// Number of transformer blocks.
    pub layers: u64,
    /// Query heads.
    pub heads: u64,
    /// Key-value heads; 1 is multi-query attention.
    pub kv_heads: u64,
    /// Width of the MLP's inner layer.
    pub intermediate_size: u64,
    /// Longest sequence the model has positions for.
    pub max_positions: u64,
    /// MLP activation.
    pub activation: Activation,
    /// Epsilon of the norms.
    pub norm_epsilon: f64,
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
}

/// Architecture families.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Family {
    /// StarCoder and its kin: learned positions, LayerNorm, fused QKV with one KV head, biases.
    GptBigCode,
}

/// MLP activations, named as in transformers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Activation {
    /// Exact form, by erf.
    Gelu,
    /// Tanh approximation.
    GeluPytorchTanh,
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

/// What a `config.json` can do wrong.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Not an object.
    #[error("config.json is not a JSON object: {0}")]
    Json(String),
    /// A family that is not supported.
    #[error("model_type {0:?} is not supported; supported: gpt_bigcode")]
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

/// Names that [`ModelConfig::preset`] knows, small to large.
pub const PRESETS: [&str; 6] =
    ["tiny", "demo", "starcoderbase-1b", "starcoderbase-3b", "starcoderbase-7b", "starcoder"];

/// Largest vocabulary that a config may state. With the limits below, products stay inside u64 and
/// plans inside memory.
const MAX_VOCABULARY: u64 = 1 << 24;
/// Largest width, head count or number of positions.
const MAX_DIMENSION: u64 = 1 << 20;
/// Most blocks.
const MAX_LAYERS: u64 = 4096;

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

impl ModelConfig {
    /// A named shape. The StarCoder shapes are the published ones.
    ///
    /// # Errors
    /// [`Error::Preset`] for an unknown name.
    pub fn preset(name: &str) -> Result<Self, Error> {
        let starcoder = |layers, hidden_size, heads, activation| ModelConfig {
            family: Family::GptBigCode,
            vocab_size: 49_152,
            hidden_size,
            layers,
            heads,
            kv_heads: 1,
            intermediate_size: 4 * hidden_size,
            max_positions: 8192,
            activation,
            norm_epsilon: 1e-5,
            tied_head: true,
            dropout: Dropout { attention: 0.1, embedding: 0.1, residual: 0.1 },
            initializer_range: 0.02,
            bos_token_id: Some(0),
            eos_token_id: Some(0),
        };
        let no_dropout = Dropout { attention: 0.0, embedding: 0.0, residual: 0.0 };
        Ok(match name {
            "tiny" => ModelConfig {
                vocab_size: 1024,
                max_positions: 256,
                dropout: no_dropout,
                ..starcoder(2, 64, 4, Activation::GeluPytorchTanh)
            },
            "demo" => ModelConfig {
                vocab_size: 4096,
                max_positions: 1024,
                dropout: no_dropout,
                ..starcoder(6, 256, 8, Activation::GeluPytorchTanh)
            },
            "starcoderbase-1b" => starcoder(24, 2048, 16, Activation::GeluPytorchTanh),
            "starcoderbase-3b" => starcoder(36, 2816, 22, Activation::GeluPytorchTanh),
            "starcoderbase-7b" => starcoder(42, 4096, 32, Activation::GeluPytorchTanh),
            "starcoder" => starcoder(40, 6144, 48, Activation::Gelu),
            other => return Err(Error::Preset(other.to_owned())),
        })
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
        match map.get("model_type").and_then(Value::as_str) {
            Some("gpt_bigcode") => Self::gpt_bigcode(&map),
            Some(other) => Err(Error::Family(other.to_owned())),
            None => Err(Error::Missing("model_type")),
        }
    }

    fn gpt_bigcode(map: &Map<String, Value>) -> Result<Self, Error> {
        let hidden_size = size(map, "n_embd", None)?;
        let heads = size(map, "n_head", None)?;
        let multi_query = map.get("multi_query").and_then(Value::as_bool).unwrap_or(true);
        if !multi_query {
            // Its fused QKV has another layout (q, k, v interleaved by head): refused, not guessed.
            return Err(invalid("multi_query", "false", "only multi-query attention is supported so far"));
        }
        if map.get("scale_attn_weights").and_then(Value::as_bool) == Some(false) {
            return Err(invalid("scale_attn_weights", "false", "only scaled attention is supported"));
        }
        let activation = match map.get("activation_function").and_then(Value::as_str) {
            Some("gelu") => Activation::Gelu,
            Some("gelu_pytorch_tanh") | None => Activation::GeluPytorchTanh,
            Some(other) => {
                return Err(invalid("activation_function", other, "must be gelu or gelu_pytorch_tanh"));
            }
        };
        let config = ModelConfig {
            family: Family::GptBigCode,
            vocab_size: limited(map, "vocab_size", None, MAX_VOCABULARY)?,
            hidden_size,
            layers: limited(map, "n_layer", None, MAX_LAYERS)?,
            heads,
            kv_heads: 1,
            intermediate_size: size(map, "n_inner", Some(4 * hidden_size))?,
            max_positions: size(map, "n_positions", Some(1024))?,
            activation,
            norm_epsilon: number(map, "layer_norm_epsilon", 1e-5)?,
            tied_head: map.get("tie_word_embeddings").and_then(Value::as_bool).unwrap_or(true),
            dropout: Dropout {
                attention: probability(map, "attn_pdrop")?,
                embedding: probability(map, "embd_pdrop")?,
                residual: probability(map, "resid_pdrop")?,
            },
            initializer_range: number(map, "initializer_range", 0.02)?,
            bos_token_id: token(map, "bos_token_id"),
            eos_token_id: token(map, "eos_token_id"),
        };
        if hidden_size % heads != 0 {
            return Err(invalid(
                "n_embd",
                &hidden_size.to_string(),
                &format!("must be a multiple of n_head ({heads})"),
            ));
        }
        Ok(config)
    }

    /// The `config.json` that transformers reads. `dtype` is its `torch_dtype`.
    pub fn to_json(&self, dtype: &str) -> Value {
        match self.family {
            Family::GptBigCode => json!({
                "architectures": ["GPTBigCodeForCausalLM"],
                "model_type": "gpt_bigcode",
                "activation_function": self.activation.hf_name(),
                "attn_pdrop": self.dropout.attention,
                "embd_pdrop": self.dropout.embedding,
                "resid_pdrop": self.dropout.residual,
                "attention_softmax_in_fp32": true,
                "scale_attention_softmax_in_fp32": true,
                "scale_attn_weights": true,
                "bos_token_id": self.bos_token_id,
                "eos_token_id": self.eos_token_id,
                "initializer_range": self.initializer_range,
                "layer_norm_epsilon": self.norm_epsilon,
                "multi_query": self.kv_heads == 1,
                "n_embd": self.hidden_size,
                "n_head": self.heads,
                "n_inner": self.intermediate_size,
                "n_layer": self.layers,
                "n_positions": self.max_positions,
                "vocab_size": self.vocab_size,
                "tie_word_embeddings": self.tied_head,
                "use_cache": true,
                "torch_dtype": dtype,
            }),
        }
    }

    /// Width of one head (H).
    pub fn head_dim(&self) -> u64 {
        self.hidden_size / self.heads
    }

    /// Parameters outside the blocks: embeddings, final norm, and the head where it is not tied.
    pub fn embed_parameters(&self) -> Vec<Parameter> {
        let d = self.hidden_size;
        let mut out = vec![
            matrix("wte.weight", "transformer.wte.weight", [self.vocab_size, d]),
            matrix("wpe.weight", "transformer.wpe.weight", [self.max_positions, d]),
        ];
        if !self.tied_head {
            out.push(matrix("lm_head.weight", "lm_head.weight", [self.vocab_size, d]));
        }
        out.push(vector("ln_f.weight", "transformer.ln_f.weight", d));
        out.push(vector("ln_f.bias", "transformer.ln_f.bias", d));
        out
    }

    /// Parameters of one block. Matrices come first, so that a shard splits into at most two
    /// runs: one that decays and one that does not.
    pub fn block_parameters(&self, block: u64) -> Vec<Parameter> {
        let d = self.hidden_size;
        let qkv = d + 2 * self.kv_heads * self.head_dim();
        let inner = self.intermediate_size;
        let hf = |name: &str| format!("transformer.h.{block}.{name}");
        [("attn.c_attn.weight", [qkv, d]), ("attn.c_proj.weight", [d, d])]
            .into_iter()
            .chain([("mlp.c_fc.weight", [inner, d]), ("mlp.c_proj.weight", [d, inner])])
            .map(|(name, shape)| matrix(name, &hf(name), shape))
            .chain(
                [
                    ("ln_1.weight", d),
                    ("ln_1.bias", d),
                    ("attn.c_attn.bias", qkv),
                    ("attn.c_proj.bias", d),
                    ("ln_2.weight", d),
                    ("ln_2.bias", d),
                    ("mlp.c_fc.bias", inner),
                    ("mlp.c_proj.bias", d),
                ]
                .into_iter()
                .map(|(name, len)| vector(name, &hf(name), len)),
            )
            .collect()
    }

    /// All parameters, each tied one once.
    pub fn parameter_count(&self) -> u64 {
        let sum = |list: Vec<Parameter>| list.iter().map(Parameter::elements).sum::<u64>();
        sum(self.embed_parameters()) + self.layers * sum(self.block_parameters(0))
    }
}

impl Activation {
    /// Name in transformers.
    pub fn hf_name(self) -> &'static str {
        match self {
            Activation::Gelu => "gelu",
            Activation::GeluPytorchTanh => "gelu_pytorch_tanh",
        }
    }
}

fn matrix(name: &str, hf_name: &str, shape: [u64; 2]) -> Parameter {
    Parameter { name: name.into(), hf_name: hf_name.into(), shape: shape.to_vec(), decays: true }
}

fn vector(name: &str, hf_name: &str, len: u64) -> Parameter {
    Parameter { name: name.into(), hf_name: hf_name.into(), shape: vec![len], decays: false }
}

fn invalid(key: &'static str, value: &str, rule: &str) -> Error {
    Error::Value { key, value: value.to_owned(), rule: rule.to_owned() }
}

fn size(map: &Map<String, Value>, key: &'static str, default: Option<u64>) -> Result<u64, Error> {
    limited(map, key, default, MAX_DIMENSION)
}

fn limited(
    map: &Map<String, Value>,
    key: &'static str,
    default: Option<u64>,
    most: u64,
) -> Result<u64, Error> {
    match (map.get(key), default) {
        (None | Some(Value::Null), Some(default)) => Ok(default),
        (None | Some(Value::Null), None) => Err(Error::Missing(key)),
        (Some(value), _) => match value.as_u64() {
            Some(n) if (1..=most).contains(&n) => Ok(n),
            _ => Err(invalid(key, &value.to_string(), &format!("must be a whole number from 1 to {most}"))),
        },
    }
}

fn number(map: &Map<String, Value>, key: &'static str, default: f64) -> Result<f64, Error> {
    match map.get(key) {
        None | Some(Value::Null) => Ok(default),
        Some(value) => match value.as_f64() {
            Some(x) if x.is_finite() && x > 0.0 => Ok(x),
            _ => Err(invalid(key, &value.to_string(), "must be a positive number")),
        },
    }
}

fn probability(map: &Map<String, Value>, key: &'static str) -> Result<f64, Error> {
    match map.get(key) {
        // transformers' own default for GPTBigCode.
        None | Some(Value::Null) => Ok(0.1),
        Some(value) => match value.as_f64() {
            Some(p) if (0.0..1.0).contains(&p) => Ok(p),
            _ => Err(invalid(key, &value.to_string(), "must be from 0 to below 1")),
        },
    }
}

fn token(map: &Map<String, Value>, key: &str) -> Option<u64> {
    map.get(key).and_then(Value::as_u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn starcoder_shapes_have_their_published_parameter_counts() {
        let count = |name| ModelConfig::preset(name).unwrap().parameter_count();
        assert_eq!(count("starcoder"), 15_517_456_384);
        assert_eq!(count("starcoderbase-1b"), 1_137_207_296);
    }

    #[test]
    fn every_preset_survives_its_own_json() {
        for name in PRESETS {
            let config = ModelConfig::preset(name).unwrap();
            let text = config.to_json("bfloat16").to_string();
            assert_eq!(ModelConfig::from_json(&text).unwrap(), config, "{name}");
        }
    }

    #[test]
    fn bad_configs_are_refused_by_key_and_rule() {
        let cases = [
            ("[]", "not a JSON object"),
            (r#"{"model_type":"mamba"}"#, "\"mamba\" is not supported"),
            (r#"{"model_type":"gpt_bigcode","n_head":4}"#, "lacks n_embd"),
            (r#"{"model_type":"gpt_bigcode","n_embd":-3,"n_head":4}"#, "n_embd = -3"),
            (
                r#"{"model_type":"gpt_bigcode","n_embd":30,"n_head":4,"n_layer":1,"vocab_size":9}"#,
                "must be a multiple of n_head (4)",
            ),
            (
                r#"{"model_type":"gpt_bigcode","n_embd":32,"n_head":4,"activation_function":"relu"}"#,
                "must be gelu or gelu_pytorch_tanh",
            ),
        ];
        for (text, expected) in cases {
            let message = ModelConfig::from_json(text).unwrap_err().to_string();
            assert!(message.contains(expected), "{text}: {message}");
        }
    }
}
