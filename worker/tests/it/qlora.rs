//! Adapters over frozen bases against transformers, peft and bitsandbytes: the rules are those of
//! `parity`, the fixture format stands in `tests/parity/README.md`.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use tch::{Device, Kind, Tensor};
use tunefleet_proto::adapter::LoraConfig;
use tunefleet_proto::base_plan::{BasePlan, PartDtype, QuantKind, Quantization};
use tunefleet_proto::job::{Optimizer, Precision};
use tunefleet_proto::shard_plan::ShardPlan;
use tunefleet_worker::base::{Base, cache};
use tunefleet_worker::checkpoint::hugging_face;
use tunefleet_worker::comm::{Communicator, Solo};
use tunefleet_worker::model::numerics::Numerics;
use tunefleet_worker::train::adapter::{Frozen, Wiring};
use tunefleet_worker::train::rng::Seeds;
use tunefleet_worker::train::units;
use tunefleet_worker::train::walk::{Batch, Walk, WalkOptions};

use crate::common::*;

const RECOMPUTE: WalkOptions = WalkOptions { recompute: true, poison: false };
const KEEP: WalkOptions = WalkOptions { recompute: false, poison: false };

/// One variant of a fixture: a model, an adapter on it, and how its base is held.
struct Case {
    model: PathBuf,
    adapter: PathBuf,
    quantization: Quantization,
    name: String,
}

fn cases() -> Vec<Case> {
    let Some(dir) = fixtures_of("make_qlora_fixtures.py", "qlora") else { return Vec::new() };
    let index: serde_json::Value =
        serde_json::from_str(&std::fs::read_to_string(dir.join("index.json")).unwrap()).unwrap();
    let mut cases = Vec::new();
    for model in index["models"].as_array().unwrap() {
        let model = dir.join(model["directory"].as_str().unwrap());
        for variant in index["variants"].as_array().unwrap() {
            let adapter = model.join(variant["directory"].as_str().unwrap());
            let name = adapter.strip_prefix(&dir).unwrap().display().to_string();
            let quantization = quantization(variant["base"].as_str().unwrap());
            cases.push(Case { model: model.clone(), adapter, quantization, name });
        }
    }
    assert!(!cases.is_empty());
    cases
}

pub fn quantization(name: &str) -> Quantization {
    let kind = match name.split('-').next() {
        Some("nf4") => QuantKind::Nf4,
        Some("fp4") => QuantKind::Fp4,
        Some("int8") => QuantKind::Int8,
        _ => QuantKind::None,
    };
    let four_bit = matches!(kind, QuantKind::Nf4 | QuantKind::Fp4);
    Quantization { kind, block: 64, double: four_bit && name.ends_with("-double") }
}

/// A walk over `model` with the adapter in `adapter`, as `comm`'s rank.
pub fn adapter_walk<'a>(
    model: &Path,
    adapter: &Path,
    quantization: Quantization,
    precision: Precision,
    comm: &'a dyn Communicator,
    options: WalkOptions,
    device: Device,
) -> Walk<'a> {
    tunefleet_kernels::device::set_deterministic(true).unwrap();
    let config = hugging_face::read_config(model).unwrap();
    let text = std::fs::read_to_string(adapter.join("adapter_config.json")).unwrap();
    let lora = LoraConfig::from_peft_json(&text).unwrap();
    let adapter_plan = lora.plan(&config).unwrap();
    let rank = comm.rank();
    let plan = ShardPlan::of_adapter(&adapter_plan, &config, rank.world);
    let numerics = Numerics::new(device, precision);
    let plain = if precision == Precision::Fp32 { PartDtype::F32 } else { PartDtype::Bf16 };
    let base_plan = BasePlan::new(&config, quantization, plain);
    let cache_dir = tempfile::tempdir().unwrap();
    let shared = adapter.join(format!("base-{}", rank.world));
    let entry = if rank.world == 1 { cache_dir.path() } else { &shared };
    let opened = cache::open(entry, model, &config, &base_plan, comm, device).unwrap();
    let base = Base::new(base_plan, opened.shards, rank.world, numerics, !options.recompute, options.poison);
    let wiring = Wiring::new(&lora, &adapter_plan, &config, &plan);
    let shards = units::shards(&plan, rank.rank, numerics, Optimizer::AdamW).unwrap();
    let weights = tensors(&adapter.join("adapter_model.safetensors"));
    for (unit, shard) in plan.units.iter().zip(&shards) {
        for piece in unit.pieces(rank.rank, rank.world) {
            let values = weights[&piece.slot.hf_name].to_kind(Kind::Float).reshape([-1]);
            let len = (piece.range.end - piece.range.start) as i64;
            let own = values.narrow(0, piece.range.start as i64, len);
            shard.master.narrow(0, piece.shard_offset as i64, len).copy_(&own);
        }
    }
    let walk = Walk::new(config, plan, shards, numerics, comm, Seeds::new(3), options);
    walk.over(Frozen { base: base.unwrap(), wiring })
}

fn walk_of(case: &Case, precision: Precision, options: WalkOptions) -> Walk<'static> {
    let Case { model, adapter, quantization, .. } = case;
    adapter_walk(model, adapter, *quantization, precision, &Solo, options, Device::Cpu)
}

#[test]
fn fp32_loss_logits_and_every_adapter_gradient_equal_peft_and_bitsandbytes() {
    for case in cases() {
        let fixture = tensors(&case.adapter.join("fixture.safetensors"));
        let batch = batch(&fixture);
        for options in [RECOMPUTE, KEEP] {
            let mut walk = walk_of(&case, Precision::Fp32, options);
            let logits = walk.logits(&batch.tokens_bt).unwrap();
            let difference = largest_difference(&logits, &fixture["logits"]);
            assert!(difference <= 1e-5, "{}: logits differ by {difference}", case.name);

            let (loss, grads) = loss_and_grads(&mut walk, &batch);
            let peer = fixture["loss"].double_value(&[0]);
            assert!((loss - peer).abs() <= 1e-6 * peer, "{}: loss {loss}, peer {peer}", case.name);
            let theirs = fixture.keys().filter(|name| name.starts_with("grad.")).count();
            assert_eq!(grads.len(), theirs, "{}: trained tensors", case.name);
            let all = grads.values().map(|g| norm(g).powi(2)).sum::<f64>().sqrt();
            for (name, ours) in &grads {
                let peer = &fixture[&format!("grad.{name}")];
                let (error, limit) = (distance(ours, peer), 1e-5 * norm(peer) + 1e-8 * all);
                assert!(error <= limit, "{}: {name}: {error:.2e} > {limit:.2e}", case.name);
            }
        }
    }
}

#[test]
fn bf16_adapter_gradients_are_at_most_half_again_as_far_from_fp64_as_the_peers() {
    for case in cases() {
        let fixture = tensors(&case.adapter.join("bf16.safetensors"));
        let batches = fixture["ids"].size()[0];
        for options in [RECOMPUTE, KEEP] {
            let mut walk = walk_of(&case, Precision::Bf16, options);
            let mut squares = HashMap::<String, f64>::new();
            for k in 0..batches {
                let of_batch = |name: &str| fixture[name].get(k);
                let batch = Batch { tokens_bt: of_batch("ids"), targets_bt: of_batch("targets") };
                for (name, ours) in loss_and_grads(&mut walk, &batch).1 {
                    let error = distance(&ours, &of_batch(&format!("fp64.grad.{name}")));
                    *squares.entry(name).or_default() += error.powi(2);
                }
            }
            for (name, square) in squares {
                let ours = square.sqrt();
                let reference = &fixture[&format!("fp64.grad.{name}")];
                // What a Trainer with bf16 does, and so what the original did.
                let peers = distance(&fixture[&format!("autocast.grad.{name}")], reference);
                println!("{}: {name}: {:.2} of the peer's error", case.name, ours / peers);
                assert!(ours <= 1.5 * peers, "{}: {name}: {ours:.2e} against {peers:.2e}", case.name);
            }
        }
    }
}
