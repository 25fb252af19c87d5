//! Llama and what has its shape, Code Llama and DeepSeek-Coder among them: `LlamaForCausalLM` of transformers.

use serde_json::{Map, Value, json};

use super::super::keys::{Keys, invalid};
use super::super::{Activation, Biases, Dropout, Error, Mlp, ModelConfig, Norm, Positions, Qkv, Rope};
use super::{Family, Names, object};

pub const NAMES: Names = Names {
    prefix: "model.",
    token_embedding: "embed_tokens",
    position_embedding: "",
    final_norm: "norm",
    blocks: "layers",
    norms: ["input_layernorm", "post_attention_layernorm"],
    qkv: &["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    attention_out: "self_attn.o_proj",
    mlp_in: &["mlp.gate_proj", "mlp.up_proj"],
    mlp_out: "mlp.down_proj",
};

/// Base of the wavelengths where the config names none.
const DEFAULT_THETA: f64 = 10_000.0;

pub fn read(keys: Keys<'_>) -> Result<ModelConfig, Error> {
    let hidden_size = keys.size("hidden_size", None)?;
    let heads = keys.size("num_attention_heads", None)?;
    let max_positions = keys.size("max_position_embeddings", Some(2048))?;
    let name = keys.text("hidden_act").unwrap_or("silu");
    if name != Activation::Silu.hf_name() {
        return Err(invalid("hidden_act", &json!(name), "must be silu"));
    }
    let attention_bias = keys.switch("attention_bias", false)?;
    let own_head_dim = keys.get("head_dim").map(|_| keys.size("head_dim", None)).transpose()?;
    Ok(ModelConfig {
        family: Family::Llama,
        vocab_size: keys.vocabulary()?,
        hidden_size,
        layers: keys.layers("num_hidden_layers")?,
        heads,
        kv_heads: keys.size("num_key_value_heads", Some(heads))?,
        own_head_dim: own_head_dim.filter(|own| own.checked_mul(heads) != Some(hidden_size)),
        intermediate_size: keys.size("intermediate_size", None)?,
        max_positions,
        positions: Positions::Rotary(Rope::read(keys, DEFAULT_THETA, max_positions)?),
        norm: Norm::RmsNorm,
        norm_epsilon: keys.positive("rms_norm_eps", Some(1e-6))?,
        qkv: Qkv::Split,
        biases: Biases {
            qkv: attention_bias,
            attention_out: attention_bias,
            mlp: keys.switch("mlp_bias", false)?,
        },
        window: None,
        mlp: Mlp::Gated,
        activation: Activation::Silu,
        tied_head: keys.switch("tie_word_embeddings", false)?,
        dropout: Dropout { attention: keys.probability("attention_dropout", 0.0)?, ..Dropout::NONE },
        initializer_range: keys.positive("initializer_range", Some(0.02))?,
        bos_token_id: keys.token("bos_token_id"),
        eos_token_id: keys.token("eos_token_id"),
        added_tokens: Vec::new(),
    })
}

pub fn write(config: &ModelConfig) -> Map<String, Value> {
    let mut map = shape(config);
    map.extend(object(json!({
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": config.biases.qkv,
        "mlp_bias": config.biases.mlp,
        "head_dim": config.head_dim(),
    })));
    map
}

/// The keys that models of this shape share.
pub fn shape(config: &ModelConfig) -> Map<String, Value> {
    let mut map = object(json!({
        "hidden_act": config.activation.hf_name(),
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": config.max_positions,
        "num_attention_heads": config.heads,
        "num_hidden_layers": config.layers,
        "num_key_value_heads": config.kv_heads,
        "rms_norm_eps": config.norm_epsilon,
        "attention_dropout": config.dropout.attention,
    }));
    if let Positions::Rotary(rope) = &config.positions {
        rope.write(&mut map);
    }
    map
}
