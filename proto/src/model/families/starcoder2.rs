//! StarCoder2: `Starcoder2ForCausalLM` of transformers.

use serde_json::{Map, Value, json};

use super::super::keys::{Keys, invalid};
use super::super::{
    Activation, Biases, Dropout, Error, Mlp, ModelConfig, Norm, Positions, Qkv, Rope, Window,
};
use super::{Family, Names, llama, object};

pub const NAMES: Names = Names { mlp_in: &["mlp.c_fc"], mlp_out: "mlp.c_proj", ..llama::NAMES };

pub fn read(keys: Keys<'_>) -> Result<ModelConfig, Error> {
    let heads = keys.size("num_attention_heads", None)?;
    let max_positions = keys.size("max_position_embeddings", Some(4096))?;
    let name = keys.text("hidden_act").unwrap_or("gelu_pytorch_tanh");
    let activation = match Activation::of(name) {
        Some(activation @ (Activation::Gelu | Activation::GeluPytorchTanh)) => activation,
        _ => return Err(invalid("hidden_act", &json!(name), "must be gelu or gelu_pytorch_tanh")),
    };
    for (key, only) in [("mlp_type", "default"), ("norm_type", "layer_norm")] {
        if let Some(other) = keys.text(key).filter(|found| *found != only) {
            return Err(invalid(key, &json!(other), &format!("must be {only}")));
        }
    }
    let bias = keys.switch("use_bias", true)?;
    let window = keys.get("sliding_window").map(|_| keys.size("sliding_window", None)).transpose()?;
    Ok(ModelConfig {
        family: Family::Starcoder2,
        vocab_size: keys.vocabulary()?,
        hidden_size: keys.size("hidden_size", None)?,
        layers: keys.layers("num_hidden_layers")?,
        heads,
        kv_heads: keys.size("num_key_value_heads", Some(2))?,
        own_head_dim: None,
        intermediate_size: keys.size("intermediate_size", None)?,
        max_positions,
        positions: Positions::Rotary(Rope::read(keys, 10_000.0, max_positions)?),
        norm: Norm::LayerNorm,
        norm_epsilon: keys.positive("norm_epsilon", Some(1e-5))?,
        qkv: Qkv::Split,
        biases: Biases { qkv: bias, attention_out: bias, mlp: bias },
        window: window.map(|tokens| Window { tokens, first_block: 0 }),
        mlp: Mlp::Plain,
        activation,
        tied_head: keys.switch("tie_word_embeddings", true)?,
        dropout: Dropout {
            attention: keys.probability("attention_dropout", 0.0)?,
            embedding: keys.probability("embedding_dropout", 0.0)?,
            residual: keys.probability("residual_dropout", 0.0)?,
        },
        initializer_range: keys.positive("initializer_range", Some(0.018_042))?,
        bos_token_id: keys.token("bos_token_id"),
        eos_token_id: keys.token("eos_token_id"),
        added_tokens: Vec::new(),
    })
}

pub fn write(config: &ModelConfig) -> Map<String, Value> {
    let mut map = llama::shape(config);
    map.remove("rms_norm_eps");
    map.extend(object(json!({
        "architectures": ["Starcoder2ForCausalLM"],
        "model_type": "starcoder2",
        "norm_epsilon": config.norm_epsilon,
        "use_bias": config.biases.mlp,
        "sliding_window": config.window.map(|window| window.tokens),
        "residual_dropout": config.dropout.residual,
        "embedding_dropout": config.dropout.embedding,
    })));
    map
}
