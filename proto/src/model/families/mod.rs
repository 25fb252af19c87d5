//! Families of models: one file and one row of [`FAMILIES`] each. `docs/adding-a-model.md` goes through one.

mod decicoder;
mod gpt_bigcode;
mod llama;
mod qwen2;
mod starcoder2;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::keys::{Keys, MAX_DIMENSION, invalid};
use super::{ADDED_TOKENS, Error, MAX_ADDED_TOKENS, ModelConfig, Positions};

/// Architecture families.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Family {
    /// StarCoder and its kin: learned positions, LayerNorm, fused QKV, biases.
    GptBigCode,
    /// Llama, Code Llama, DeepSeek-Coder, DeciCoder: rotary positions, RMSNorm, a gated MLP.
    Llama,
    /// Qwen2 and Qwen2.5-Coder: as Llama, with biases into attention.
    Qwen2,
    /// StarCoder2: rotary positions, LayerNorm, biases, a window.
    Starcoder2,
}

/// What a family's weights are called.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Names {
    /// Before every name but the output head's.
    pub prefix: &'static str,
    /// Token embedding.
    pub token_embedding: &'static str,
    /// Position embedding, where positions are learned.
    pub position_embedding: &'static str,
    /// Norm behind the last block.
    pub final_norm: &'static str,
    /// Before the number of a block.
    pub blocks: &'static str,
    /// Norms of a block, in it.
    pub norms: [&'static str; 2],
    /// Into queries, keys and values: one linear or three.
    pub qkv: &'static [&'static str],
    /// Out of attention.
    pub attention_out: &'static str,
    /// Into the MLP: its gate, where it has one, then the other.
    pub mlp_in: &'static [&'static str],
    /// Out of the MLP.
    pub mlp_out: &'static str,
}

/// One way to write a family's `config.json`.
struct Row {
    /// `model_type`, which decides it.
    model_type: &'static str,
    /// From the keys to the switches.
    read: fn(Keys<'_>) -> Result<ModelConfig, Error>,
}

/// All that can be read.
const FAMILIES: [Row; 5] = [
    Row { model_type: "gpt_bigcode", read: gpt_bigcode::read },
    Row { model_type: "starcoder2", read: starcoder2::read },
    Row { model_type: "qwen2", read: qwen2::read },
    Row { model_type: "llama", read: llama::read },
    Row { model_type: "decicoder", read: decicoder::read },
];

impl Family {
    /// What its weights are called.
    pub fn names(self) -> &'static Names {
        match self {
            Family::GptBigCode => &gpt_bigcode::NAMES,
            Family::Llama | Family::Qwen2 => &llama::NAMES,
            Family::Starcoder2 => &starcoder2::NAMES,
        }
    }
}

/// Values of `model_type` that are supported, for people.
pub fn supported() -> String {
    FAMILIES.map(|row| row.model_type).join(", ")
}

/// The model that `keys` describe.
pub fn read(keys: Keys<'_>) -> Result<ModelConfig, Error> {
    let name = keys.text("model_type").ok_or(Error::Missing("model_type"))?;
    let row = FAMILIES.iter().find(|row| row.model_type == name);
    let row = row.ok_or_else(|| Error::Family(name.to_owned()))?;
    if let Some(value) = keys.get("quantization_config") {
        let rule = "weights must not be quantised; take the model that this one was made from";
        return Err(invalid("quantization_config", value, rule));
    }
    let mut config = (row.read)(keys)?;
    check_heads(&config)?;
    config.added_tokens = added_tokens(keys, config.vocab_size)?;
    Ok(config)
}

fn added_tokens(keys: Keys<'_>, vocab_size: u64) -> Result<Vec<u64>, Error> {
    let Some(value) = keys.get(ADDED_TOKENS) else { return Ok(Vec::new()) };
    let ids: Option<Vec<u64>> = value.as_array().map(|ids| ids.iter().filter_map(Value::as_u64).collect());
    let count = value.as_array().map_or(0, Vec::len);
    match ids {
        Some(ids)
            if ids.len() == count
                && count <= MAX_ADDED_TOKENS
                && ids.is_sorted_by(|a, b| a < b)
                && ids.iter().all(|id| *id < vocab_size) =>
        {
            Ok(ids)
        }
        _ => {
            let rule = format!(
                "must be at most {MAX_ADDED_TOKENS} rows of the embedding, below vocab_size ({vocab_size}), in ascending \
                 order"
            );
            Err(invalid(ADDED_TOKENS, value, &rule))
        }
    }
}

/// Heads that divide what they must, and are together no wider than a model may be.
fn check_heads(config: &ModelConfig) -> Result<(), Error> {
    let ModelConfig { heads, kv_heads, hidden_size, .. } = config;
    if !heads.is_multiple_of(*kv_heads) {
        let rule = format!("must divide the number of query heads ({heads})");
        return Err(invalid("num_key_value_heads", &json!(kv_heads), &rule));
    }
    if config.own_head_dim.is_none() && !hidden_size.is_multiple_of(*heads) {
        let (width, count) = match config.family {
            Family::GptBigCode => ("n_embd", "n_head"),
            _ => ("hidden_size", "num_attention_heads"),
        };
        let rule = format!("must be a multiple of {count} ({heads})");
        return Err(invalid(width, &json!(hidden_size), &rule));
    }
    if config.heads.checked_mul(config.head_dim()).is_none_or(|width| width > MAX_DIMENSION) {
        let rule = format!("times the number of query heads ({heads}) must be at most {MAX_DIMENSION}");
        return Err(invalid("head_dim", &json!(config.head_dim()), &rule));
    }
    if matches!(config.positions, Positions::Rotary(_)) && !config.head_dim().is_multiple_of(2) {
        let rule = "must be even: halves of a head are rotated against each other";
        return Err(invalid("head_dim", &json!(config.head_dim()), rule));
    }
    Ok(())
}

/// The keys of `config`, in the words of its family.
pub fn write(config: &ModelConfig, dtype: &str) -> Value {
    let mut map = match config.family {
        Family::GptBigCode => gpt_bigcode::write(config),
        Family::Llama => llama::write(config),
        Family::Qwen2 => qwen2::write(config),
        Family::Starcoder2 => starcoder2::write(config),
    };
    let common = json!({
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
        "initializer_range": config.initializer_range,
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": config.tied_head,
        "use_cache": true,
        "torch_dtype": dtype,
    });
    map.extend(object(common));
    if !config.added_tokens.is_empty() {
        map.insert(ADDED_TOKENS.to_owned(), json!(config.added_tokens));
    }
    Value::Object(map)
}

/// The entries of a `json!` object.
fn object(value: Value) -> Map<String, Value> {
    match value {
        Value::Object(map) => map,
        _ => Map::new(),
    }
}
