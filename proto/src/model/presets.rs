//! Published shapes by name, and small ones for trying things: each is what a `config.json` says of it.

use serde_json::{Map, Value, json};

use super::families;
use super::keys::Keys;
use super::{Error, ModelConfig};

/// Names that [`ModelConfig::preset`] knows, small to large in each family.
pub const PRESETS: [&str; 22] = [
    "tiny",
    "demo",
    "starcoderbase-1b",
    "starcoderbase-3b",
    "starcoderbase-7b",
    "starcoder",
    "decicoder-1b",
    "starcoder2-3b",
    "starcoder2-7b",
    "starcoder2-15b",
    "qwen2.5-coder-0.5b",
    "qwen2.5-coder-1.5b",
    "qwen2.5-coder-3b",
    "qwen2.5-coder-7b",
    "qwen2.5-coder-14b",
    "qwen2.5-coder-32b",
    "codellama-7b",
    "codellama-13b",
    "codellama-34b",
    "deepseek-coder-1.3b",
    "deepseek-coder-6.7b",
    "deepseek-coder-33b",
];

/// Layers, width, heads, key-value heads and inner width of models with Llama's keys.
type Shape = (u64, u64, u64, u64, u64);

/// The shape of that name.
pub fn preset(name: &str) -> Result<ModelConfig, Error> {
    let tanh = "gelu_pytorch_tanh";
    let config = match name {
        "tiny" => starcoder((2, 64, 4), tanh, &json!({"vocab_size": 1024, "n_positions": 256})),
        "demo" => starcoder((6, 256, 8), tanh, &json!({"vocab_size": 4096, "n_positions": 1024})),
        "starcoderbase-1b" => starcoder((24, 2048, 16), tanh, &published()),
        "starcoderbase-3b" => starcoder((36, 2816, 22), tanh, &published()),
        "starcoderbase-7b" => starcoder((42, 4096, 32), tanh, &published()),
        "starcoder" => starcoder((40, 6144, 48), "gelu", &published()),
        "decicoder-1b" => llama(
            (20, 2048, 32, 4, 5888),
            &json!({
                "vocab_size": 49_152, "max_position_embeddings": 2048, "rope_theta": 10_000.0,
                "rms_norm_eps": 1e-6, "bos_token_id": 0, "eos_token_id": 0,
            }),
        ),
        "starcoder2-3b" => starcoder2((30, 3072, 24, 2, 12_288), 999_999.442_036_532_5, true),
        "starcoder2-7b" => starcoder2((32, 4608, 36, 4, 18_432), 1e6, true),
        "starcoder2-15b" => starcoder2((40, 6144, 48, 4, 24_576), 1e5, false),
        "qwen2.5-coder-0.5b" => qwen2((24, 896, 14, 2, 4864), 151_936, true),
        "qwen2.5-coder-1.5b" => qwen2((28, 1536, 12, 2, 8960), 151_936, true),
        "qwen2.5-coder-3b" => qwen2((36, 2048, 16, 2, 11_008), 151_936, true),
        "qwen2.5-coder-7b" => qwen2((28, 3584, 28, 4, 18_944), 152_064, false),
        "qwen2.5-coder-14b" => qwen2((48, 5120, 40, 8, 13_824), 152_064, false),
        "qwen2.5-coder-32b" => qwen2((64, 5120, 40, 8, 27_648), 152_064, false),
        "codellama-7b" => codellama((32, 4096, 32, 32, 11_008), 32_016),
        "codellama-13b" => codellama((40, 5120, 40, 40, 13_824), 32_016),
        "codellama-34b" => codellama((48, 8192, 64, 8, 22_016), 32_000),
        "deepseek-coder-1.3b" => deepseek((24, 2048, 16, 16, 5504)),
        "deepseek-coder-6.7b" => deepseek((32, 4096, 32, 32, 11_008)),
        "deepseek-coder-33b" => deepseek((62, 7168, 56, 8, 19_200)),
        other => return Err(Error::Preset(other.to_owned())),
    };
    families::read(Keys::new(&config))
}

/// What the published StarCoders share.
fn published() -> Value {
    json!({
        "vocab_size": 49_152, "n_positions": 8192, "attn_pdrop": 0.1, "embd_pdrop": 0.1, "resid_pdrop": 0.1,
    })
}

fn starcoder((layers, width, heads): (u64, u64, u64), activation: &str, more: &Value) -> Map<String, Value> {
    with(
        &json!({
            "model_type": "gpt_bigcode", "n_layer": layers, "n_embd": width, "n_head": heads,
            "activation_function": activation, "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0,
            "bos_token_id": 0, "eos_token_id": 0,
        }),
        more,
    )
}

fn shaped(
    (layers, width, heads, kv_heads, inner): Shape,
    model_type: &str,
    more: &Value,
) -> Map<String, Value> {
    with(
        &json!({
            "model_type": model_type, "num_hidden_layers": layers, "hidden_size": width,
            "num_attention_heads": heads, "num_key_value_heads": kv_heads, "intermediate_size": inner,
        }),
        more,
    )
}

fn llama(shape: Shape, more: &Value) -> Map<String, Value> {
    shaped(shape, "llama", more)
}

fn starcoder2(shape: Shape, theta: f64, tied: bool) -> Map<String, Value> {
    shaped(
        shape,
        "starcoder2",
        &json!({
            "vocab_size": 49_152, "max_position_embeddings": 16_384, "rope_theta": theta, "sliding_window": 4096,
            "attention_dropout": 0.1, "embedding_dropout": 0.1, "residual_dropout": 0.1,
            "tie_word_embeddings": tied, "bos_token_id": 0, "eos_token_id": 0,
        }),
    )
}

fn qwen2(shape: Shape, vocab_size: u64, tied: bool) -> Map<String, Value> {
    shaped(
        shape,
        "qwen2",
        &json!({
            "vocab_size": vocab_size, "max_position_embeddings": 32_768, "rope_theta": 1e6,
            "rms_norm_eps": 1e-6, "tie_word_embeddings": tied, "bos_token_id": 151_643, "eos_token_id": 151_643,
        }),
    )
}

fn codellama(shape: Shape, vocab_size: u64) -> Map<String, Value> {
    llama(
        shape,
        &json!({
            "vocab_size": vocab_size, "max_position_embeddings": 16_384, "rope_theta": 1e6, "rms_norm_eps": 1e-5,
            "bos_token_id": 1, "eos_token_id": 2,
        }),
    )
}

fn deepseek(shape: Shape) -> Map<String, Value> {
    llama(
        shape,
        &json!({
            "vocab_size": 32_256, "max_position_embeddings": 16_384, "rope_theta": 1e5,
            "rope_scaling": {"type": "linear", "factor": 4.0}, "rms_norm_eps": 1e-6,
            "bos_token_id": 32_013, "eos_token_id": 32_014,
        }),
    )
}

fn with(base: &Value, more: &Value) -> Map<String, Value> {
    let entries = |value: &Value| value.as_object().cloned().unwrap_or_default();
    let mut map = entries(base);
    map.extend(entries(more));
    map
}
