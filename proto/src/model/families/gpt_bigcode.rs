//! StarCoder, its smaller siblings and SantaCoder: `GPTBigCodeForCausalLM` of transformers.

use serde_json::{Map, Value, json};

use super::super::keys::{Keys, MAX_DIMENSION, invalid};
use super::super::{Activation, Biases, Dropout, Error, Mlp, ModelConfig, Norm, Positions, Qkv};
use super::{Family, Names, object};

pub const NAMES: Names = Names {
    prefix: "transformer.",
    token_embedding: "wte",
    position_embedding: "wpe",
    final_norm: "ln_f",
    blocks: "h",
    norms: ["ln_1", "ln_2"],
    qkv: &["attn.c_attn"],
    attention_out: "attn.c_proj",
    mlp_in: &["mlp.c_fc"],
    mlp_out: "mlp.c_proj",
};

/// With one key-value head the fused projection holds all queries, then the key, then the value; with as many as query
/// heads, each head's three beside each other.
pub fn read(keys: Keys<'_>) -> Result<ModelConfig, Error> {
    let hidden_size = keys.size("n_embd", None)?;
    let heads = keys.size("n_head", None)?;
    let multi_query = keys.switch("multi_query", true)?;
    for (key, wanted, rule) in [
        ("scale_attn_weights", true, "only scaled attention is supported"),
        ("add_cross_attention", false, "only decoders without cross attention are supported"),
    ] {
        let found = keys.switch(key, wanted)?;
        if found != wanted {
            return Err(invalid(key, &json!(found), rule));
        }
    }
    let name = keys.text("activation_function").unwrap_or("gelu_pytorch_tanh");
    let activation = match Activation::of(name) {
        Some(activation @ (Activation::Gelu | Activation::GeluPytorchTanh)) => activation,
        _ => return Err(invalid("activation_function", &json!(name), "must be gelu or gelu_pytorch_tanh")),
    };
    let intermediate_size = keys.size("n_inner", Some(4 * hidden_size))?;
    if intermediate_size > MAX_DIMENSION {
        let rule = format!("four times it, which n_inner is by default, must be at most {MAX_DIMENSION}");
        return Err(invalid("n_embd", &json!(hidden_size), &rule));
    }
    Ok(ModelConfig {
        family: Family::GptBigCode,
        vocab_size: keys.vocabulary()?,
        hidden_size,
        layers: keys.layers("n_layer")?,
        heads,
        kv_heads: if multi_query { 1 } else { heads },
        own_head_dim: None,
        intermediate_size,
        max_positions: keys.size("n_positions", Some(1024))?,
        positions: Positions::Learned,
        norm: Norm::LayerNorm,
        norm_epsilon: keys.positive("layer_norm_epsilon", Some(1e-5))?,
        qkv: if multi_query { Qkv::Fused } else { Qkv::FusedByHead },
        biases: Biases { qkv: true, attention_out: true, mlp: true },
        window: None,
        mlp: Mlp::Plain,
        activation,
        tied_head: keys.switch("tie_word_embeddings", true)?,
        dropout: Dropout {
            attention: keys.probability("attn_pdrop", 0.1)?,
            embedding: keys.probability("embd_pdrop", 0.1)?,
            residual: keys.probability("resid_pdrop", 0.1)?,
        },
        initializer_range: keys.positive("initializer_range", Some(0.02))?,
        bos_token_id: keys.token("bos_token_id"),
        eos_token_id: keys.token("eos_token_id"),
        added_tokens: Vec::new(),
    })
}

pub fn write(config: &ModelConfig) -> Map<String, Value> {
    object(json!({
        "architectures": ["GPTBigCodeForCausalLM"],
        "model_type": "gpt_bigcode",
        "activation_function": config.activation.hf_name(),
        "attn_pdrop": config.dropout.attention,
        "embd_pdrop": config.dropout.embedding,
        "resid_pdrop": config.dropout.residual,
        "attention_softmax_in_fp32": true,
        "scale_attention_softmax_in_fp32": true,
        "scale_attn_weights": true,
        "layer_norm_epsilon": config.norm_epsilon,
        "multi_query": config.qkv == Qkv::Fused,
        "n_embd": config.hidden_size,
        "n_head": config.heads,
        "n_inner": config.intermediate_size,
        "n_layer": config.layers,
        "n_positions": config.max_positions,
    }))
}
