//! Small models of any family: random weights in the format that everyone reads.

use std::path::Path;

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use serde_json::{Map, Value, json};
use tunefleet_proto::model::{Dropout, ModelConfig};

/// The published shape of that name, made small.
pub fn small(preset: &str) -> ModelConfig {
    ModelConfig {
        layers: 2,
        hidden_size: 64,
        heads: 4,
        kv_heads: 2,
        intermediate_size: 160,
        vocab_size: 512,
        max_positions: 256,
        dropout: Dropout::NONE,
        ..ModelConfig::preset(preset).expect("a published shape")
    }
}

/// Writes `config.json` and `model.safetensors`, fp32.
pub fn write(dir: &Path, config: &ModelConfig) {
    std::fs::create_dir_all(dir).expect("a directory");
    let blocks = (0..config.layers).flat_map(|block| config.block_parameters(block));
    let mut random = StdRng::seed_from_u64(3);
    let (mut header, mut data) = (Map::new(), Vec::new());
    for parameter in config.embed_parameters().into_iter().chain(blocks) {
        let begin = data.len();
        let is_norm = !parameter.decays && parameter.name.ends_with(".weight");
        for _ in 0..parameter.elements() {
            let value = random.random_range(-0.1f32..0.1) + if is_norm { 1.0 } else { 0.0 };
            data.extend(value.to_le_bytes());
        }
        let entry = json!({"dtype": "F32", "shape": parameter.shape, "data_offsets": [begin, data.len()]});
        header.insert(parameter.hf_name, entry);
    }
    let header = Value::Object(header).to_string();
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.into_bytes());
    bytes.extend(data);
    std::fs::write(dir.join("model.safetensors"), bytes).expect("weights are written");
    std::fs::write(dir.join("config.json"), config.to_json("float32").to_string())
        .expect("a config is written");
}
