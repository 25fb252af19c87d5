//! The engine against transformers: the rules and the fixture format stand in
//! `tests/parity/README.md`.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use crate::common::*;
use tunefleet_kernels::autograd::grad;
use tunefleet_proto::job::Precision;
use tunefleet_worker::generate::complete;
use tunefleet_worker::generate::decoder::Decoder;
use tunefleet_worker::generate::sampling::Sampling;
use tunefleet_worker::model::numerics::{Numerics, attention};
use tunefleet_worker::train::walk::Batch;

pub fn index(dir: &Path, key: &str) -> Vec<serde_json::Value> {
    let text = std::fs::read_to_string(dir.join("index.json")).unwrap();
    let index: serde_json::Value = serde_json::from_str(&text).unwrap();
    let list = index[key].as_array().unwrap().clone();
    assert!(!list.is_empty());
    list
}

fn models() -> Vec<PathBuf> {
    let Some(dir) = fixtures() else { return Vec::new() };
    index(&dir, "models").iter().map(|m| dir.join(m["directory"].as_str().unwrap())).collect()
}

#[test]
fn fp32_logits_loss_and_every_gradient_equal_transformers() {
    models().iter().for_each(|dir| assert_equal_in_fp32(dir));
}

#[test]
fn bf16_gradients_are_at_most_half_again_as_far_from_fp64_as_the_peers() {
    models().iter().for_each(|dir| assert_close_in_bf16(dir));
}

/// Logits, loss and every gradient of the model in `dir` against its fixture.
pub fn assert_equal_in_fp32(dir: &Path) {
    let fixture = tensors(&dir.join("fixture.safetensors"));
    let batch = batch(&fixture);
    for options in [RECOMPUTE, KEEP] {
        let mut walk = walk(dir, Precision::Fp32, SOLO, options, |_| ());
        let logits = walk.logits(&batch.tokens_bt).unwrap();
        let difference = largest_difference(&logits, &fixture["logits"]);
        println!("{}: logits {difference:.1e}", dir.display());
        assert!(difference <= 1e-5, "{}: logits differ by {difference}", dir.display());

        let (loss, grads) = loss_and_grads(&mut walk, &batch);
        let peer = fixture["loss"].double_value(&[0]);
        assert!((loss - peer).abs() <= 1e-6 * peer, "loss {loss}, transformers {peer}");
        let theirs = fixture.keys().filter(|name| name.starts_with("grad.")).count();
        assert_eq!(grads.len(), theirs, "{}: trained tensors", dir.display());
        let all = grads.values().map(|g| norm(g).powi(2)).sum::<f64>().sqrt();
        for (name, ours) in &grads {
            let peer = &fixture[&format!("grad.{name}")];
            let (error, limit) = (distance(ours, peer), 1e-5 * norm(peer) + 1e-8 * all);
            assert!(error <= limit, "{}: {name}: {error:.2e} > {limit:.2e}", dir.display());
        }
    }
}

/// Every gradient of the model in `dir` in bf16, beside the peer's.
pub fn assert_close_in_bf16(dir: &Path) {
    let fixture = tensors(&dir.join("bf16.safetensors"));
    let batches = fixture["ids"].size()[0];
    for options in [RECOMPUTE, KEEP] {
        let mut walk = walk(dir, Precision::Bf16, SOLO, options, |_| ());
        let mut squares = HashMap::<String, f64>::new();
        for k in 0..batches {
            let of_batch = |name: &str| fixture[name].get(k);
            let batch = Batch::new(of_batch("ids"), of_batch("targets"));
            for (name, ours) in loss_and_grads(&mut walk, &batch).1 {
                let error = distance(&ours, &of_batch(&format!("fp64.grad.{name}")));
                *squares.entry(name).or_default() += error.powi(2);
            }
        }
        for (name, square) in squares {
            let ours = square.sqrt();
            let reference = &fixture[&format!("fp64.grad.{name}")];
            let peers = distance(&fixture[&format!("bf16.grad.{name}")], reference);
            println!("{}: {name}: {:.2} of the peer's error", dir.display(), ours / peers);
            assert!(ours <= 1.5 * peers, "{}: {name}: {ours:.2e} against {peers:.2e}", dir.display());
        }
    }
}

#[test]
fn attention_equals_an_eager_reference_forward_and_backward() {
    let Some(dir) = fixtures() else { return };
    for case in index(&dir, "attention") {
        let fixture = tensors(&dir.join(case["file"].as_str().unwrap()));
        let leaf = |name: &str| fixture[name].detach().set_requires_grad(true);
        let (q, k, v) = (leaf("q"), leaf("k"), leaf("v"));
        let out = attention(&q, &k, &v, true, 0.0);
        let grads = grad(&out, &fixture["do"], &[q, k, v]).unwrap();
        let all = ["dq", "dk", "dv"].iter().map(|n| norm(&fixture[*n]).powi(2)).sum::<f64>().sqrt();
        let pairs = [("o", &out), ("dq", &grads[0]), ("dk", &grads[1]), ("dv", &grads[2])];
        for (name, ours) in pairs {
            let (error, limit) = (distance(ours, &fixture[name]), 1e-5 * norm(&fixture[name]) + 1e-6 * all);
            assert!(error <= limit, "{}: {name}: {error:.2e} > {limit:.2e}", case["name"]);
        }
    }
}

#[test]
fn an_export_loads_in_transformers_with_the_same_logits() {
    assert_exports_load(&models());
}

/// All `models`, exported, in one run of transformers.
pub fn assert_exports_load(models: &[PathBuf]) {
    let Some(python) = python().filter(|_| !models.is_empty()) else { return };
    let out = tempfile::tempdir().unwrap();
    let mut arguments = vec!["tests/parity/check_export.py".to_owned()];
    for (at, dir) in models.iter().enumerate() {
        let export = out.path().join(format!("export-{at}"));
        export_of(dir, &export);
        let paths = [export, dir.join("fixture.safetensors")];
        arguments.extend(paths.iter().map(|path| path.to_str().unwrap().to_owned()));
    }
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    println!("{}", run_python(&python, &arguments));
}

/// Through a checkpoint and back: the way every exported model goes.
fn export_of(model: &std::path::Path, out: &std::path::Path) {
    let checkpoints = out.with_extension("checkpoints");
    checkpoint_of(model, &checkpoints);
    tunefleet_worker::export::export(&checkpoints, model, model, out, Precision::Fp32).unwrap();
}

#[test]
fn greedy_tokens_with_the_cache_equal_those_of_transformers() {
    models().iter().for_each(|dir| assert_greedy_tokens_are_equal(dir));
}

/// Greedy tokens of the model in `dir` against those of `generate`, up to a place where two were nearly as good.
pub fn assert_greedy_tokens_are_equal(dir: &Path) {
    let fixture = tensors(&dir.join("fixture.safetensors"));
    let numerics = Numerics::new(tch::Device::Cpu, Precision::Fp32);
    let decoder = Decoder::load(dir, numerics).unwrap();
    let ids = |name: &str| Vec::<i64>::try_from(&fixture[name]).unwrap();
    let prompt: Vec<u32> = ids("prompt").into_iter().map(|id| id as u32).collect();
    let (theirs, margins) = (ids("greedy"), Vec::<f32>::try_from(&fixture["margins"]).unwrap());
    let made = complete(&decoder, &prompt, theirs.len(), &[], Sampling::default());
    assert_eq!(made.len(), theirs.len(), "{}", dir.display());
    for (at, (ours, theirs)) in made.iter().zip(&theirs).enumerate() {
        if i64::from(*ours) != *theirs {
            assert!(margins[at] < 1e-4, "{}: {made:?}, transformers at {at}: {theirs}", dir.display());
            return;
        }
    }
}
