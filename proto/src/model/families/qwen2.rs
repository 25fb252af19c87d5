//! Qwen2, Qwen2.5 and Qwen2.5-Coder: `Qwen2ForCausalLM` of transformers.

use serde_json::{Map, Value, json};

use super::super::keys::{Keys, invalid};
use super::super::{Biases, Error, ModelConfig, Window};
use super::{Family, llama, object};

pub fn read(keys: Keys<'_>) -> Result<ModelConfig, Error> {
    let config = llama::read(keys)?;
    let window = read_window(keys, config.layers)?;
    Ok(ModelConfig {
        family: Family::Qwen2,
        own_head_dim: None,
        biases: Biases { qkv: true, attention_out: false, mlp: false },
        window,
        ..config
    })
}

/// From `layer_types`, else from `max_window_layers` on.
fn read_window(keys: Keys<'_>, layers: u64) -> Result<Option<Window>, Error> {
    let first_block = match keys.get("layer_types") {
        None => keys.get("max_window_layers").and_then(Value::as_u64).unwrap_or(28),
        Some(types) => first_window(types, layers)?,
    };
    if !keys.switch("use_sliding_window", false)? || first_block >= layers {
        return Ok(None);
    }
    let tokens = keys.size("sliding_window", Some(4096))?;
    Ok(Some(Window { tokens, first_block }))
}

/// The first block with a window; those behind it must have one as well.
fn first_window(types: &Value, layers: u64) -> Result<u64, Error> {
    let refuse = |rule: &str| Err(invalid("layer_types", types, rule));
    let Some(list) = types.as_array().filter(|list| list.len() as u64 == layers) else {
        return refuse(&format!("must name a type for each of {layers} layers"));
    };
    let mut first = None;
    for (block, kind) in (0..).zip(list) {
        match (kind.as_str(), first) {
            (Some("full_attention"), None) => {}
            (Some("sliding_attention"), _) => first = first.or(Some(block)),
            (Some("full_attention"), Some(_)) => {
                return refuse("full_attention behind sliding_attention is not supported");
            }
            _ => return refuse("must hold full_attention and sliding_attention"),
        }
    }
    Ok(first.unwrap_or(layers))
}

pub fn write(config: &ModelConfig) -> Map<String, Value> {
    let mut map = llama::shape(config);
    map.extend(object(json!({
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "use_sliding_window": config.window.is_some(),
        "sliding_window": config.window.map(|window| window.tokens),
        "max_window_layers": config.window.map_or(config.layers, |window| window.first_block),
    })));
    map
}
