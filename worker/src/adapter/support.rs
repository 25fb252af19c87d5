//! Small adapters for the tests of this folder.

use std::collections::BTreeMap;

use tch::{Device, Kind, Tensor};
use tunefleet_proto::adapter::{LoraConfig, Targets};
use tunefleet_proto::model::ModelConfig;

use super::files::Adapter;

pub fn model() -> ModelConfig {
    ModelConfig { vocab_size: 50, max_positions: 16, ..ModelConfig::preset("tiny").unwrap() }
}

pub fn config(rank: u64, alpha: f64, targets: &[&str]) -> LoraConfig {
    LoraConfig {
        rank,
        alpha,
        dropout: 0.0,
        rslora: false,
        dora: false,
        targets: Targets::Suffixes(targets.iter().map(|&t| t.to_owned()).collect()),
        modules_to_save: Vec::new(),
        rank_pattern: BTreeMap::new(),
        alpha_pattern: BTreeMap::new(),
        token_rows: Vec::new(),
        untied_tokens: None,
        base_model: Some("tiny".to_owned()),
    }
}

/// Random values for everything that `config` trains on [`model`].
pub fn adapter(config: LoraConfig) -> Adapter {
    let model = model();
    let plan = config.plan(&model).unwrap();
    let blocks = (0..model.layers).flat_map(|block| plan.block_parameters(block));
    let random = |shape: Vec<u64>| {
        let shape: Vec<i64> = shape.iter().map(|&n| n as i64).collect();
        Tensor::randn(&shape[..], (Kind::Float, Device::Cpu)) * 0.1
    };
    let tensors = plan.embed_parameters().into_iter().chain(blocks).map(|p| (p.hf_name, random(p.shape)));
    Adapter { tensors: tensors.collect(), config, metadata: BTreeMap::new() }
}

/// Whole differences by module, in fp64.
pub fn deltas(adapter: &Adapter) -> BTreeMap<String, Tensor> {
    let pairs = adapter.pairs().unwrap().into_iter();
    pairs.map(|(module, pair)| (module, pair.rows(&(0..pair.shape().0)))).collect()
}

pub fn norm(tensor: &Tensor) -> f64 {
    tensor.to_kind(Kind::Double).square().sum(Kind::Double).sqrt().double_value(&[])
}

/// Norm of `a - b` over the norm of `b`.
pub fn relative(a: &Tensor, b: &Tensor) -> f64 {
    norm(&(a.to_kind(Kind::Double) - b.to_kind(Kind::Double))) / norm(b)
}
