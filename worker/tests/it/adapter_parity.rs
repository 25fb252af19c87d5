//! Adapters against PEFT: the rules and the fixture format stand in `tests/parity/README.md`.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use clap::ValueEnum;
use serde_json::Value;
use tch::{Kind, Tensor};
use tunefleet_proto::job::Precision;
use tunefleet_proto::model::ModelConfig;
use tunefleet_worker::adapter::combine::{self, Combination, Options, Part};
use tunefleet_worker::adapter::files::{self, Adapter};
use tunefleet_worker::adapter::merge::{self, Request};
use tunefleet_worker::adapter::prune::MajoritySign;
use tunefleet_worker::adapter::scale::{self, Into};
use tunefleet_worker::checkpoint::hugging_face;
use tunefleet_worker::checkpoint::safetensors::WriteDtype;
use tunefleet_worker::generate::adapters::Adapter as Beside;
use tunefleet_worker::generate::decoder::{Decoder, Piece};
use tunefleet_worker::model::numerics::Numerics;

use crate::common::*;

/// What PEFT made, and the base that it made it on.
struct Peft {
    python: PathBuf,
    base: PathBuf,
    dir: PathBuf,
    index: Value,
}

impl Peft {
    /// `None` (after saying so) without PEFT, an error in CI.
    fn new() -> Option<Self> {
        let (python, models) = (python()?, fixtures()?);
        let dir = models.with_file_name("parity-adapters");
        let text = |path: &Path| path.to_str().unwrap().to_owned();
        let arguments = ["--out", &text(&dir), "--models", &text(&models)];
        run_python(&python, &[&["tests/parity/make_adapters.py"], &arguments[..]].concat());
        let index: Value =
            serde_json::from_str(&std::fs::read_to_string(dir.join("index.json")).unwrap()).unwrap();
        let base = models.join(index["model"].as_str().unwrap());
        Some(Peft { python, base, dir, index })
    }

    fn names(&self) -> Vec<&str> {
        let names: Vec<&str> =
            self.index["adapters"].as_array().unwrap().iter().map(|name| name.as_str().unwrap()).collect();
        assert!(!names.is_empty());
        names
    }

    fn model(&self) -> ModelConfig {
        hugging_face::read_config(&self.base).unwrap()
    }

    fn read(&self, name: &str) -> Adapter {
        files::read_for(&self.dir.join(name), &self.model()).unwrap().0
    }

    fn reference(&self, name: &str) -> PathBuf {
        self.dir.join(format!("{name}.safetensors"))
    }

    fn merge(&self, adapter: &Path, out: &Path, dtype: Precision) {
        let request = Request { base: &self.base, adapter, out, dtype, any_base: false, dequantized: None };
        merge::merge(&request).unwrap();
    }

    /// Logits of the base with an adapter, as the engine computes them.
    fn logits(&self, adapter: &Path, ids: &Tensor) -> Tensor {
        let out = tempfile::tempdir().unwrap();
        let merged = out.path().join("merged");
        self.merge(adapter, &merged, Precision::Fp32);
        walk(&merged, Precision::Fp32, SOLO, RECOMPUTE, |_| ()).logits(ids).unwrap()
    }
}

fn deltas(adapter: &Adapter) -> BTreeMap<String, Tensor> {
    let pairs = adapter.pairs().unwrap().into_iter();
    pairs.map(|(module, pair)| (module, pair.rows(&(0..pair.shape().0)))).collect()
}

#[test]
fn what_peft_saves_is_read_and_merged_to_the_same_logits() {
    let Some(peft) = Peft::new() else { return };
    for name in peft.names() {
        let fixture = tensors(&peft.reference(name));
        let difference =
            largest_difference(&peft.logits(&peft.dir.join(name), &fixture["ids"]), &fixture["logits"]);
        println!("{name}: logits {difference:.1e}");
        assert!(difference <= 1e-5, "{name}: logits differ by {difference}");
        let (full, half) = (peft.read(name), peft.read(&format!("{name}-bf16")));
        assert_eq!(full.config, half.config, "{name}");
        for (key, tensor) in &full.tensors {
            let rounded = tensor.to_kind(Kind::BFloat16).to_kind(Kind::Float);
            assert_eq!(rounded, half.tensors[key], "{name}: {key}");
        }
    }
}

#[test]
fn merges_equal_pefts_in_fp32_and_are_at_least_as_near_in_bf16() {
    let Some(peft) = Peft::new() else { return };
    for name in peft.names() {
        let out = tempfile::tempdir().unwrap();
        let ours = |dtype| {
            let merged = out.path().join("merged");
            peft.merge(&peft.dir.join(name), &merged, dtype);
            tensors(&merged.join(hugging_face::WEIGHTS_FILE))
        };
        let fp32 = tensors(&peft.dir.join(format!("{name}.merged-fp32.safetensors")));
        let bf16 = tensors(&peft.dir.join(format!("{name}.merged-bf16.safetensors")));
        let (our_fp32, our_bf16) = (ours(Precision::Fp32), ours(Precision::Bf16));
        assert_eq!(our_fp32.len(), fp32.len(), "{name}");
        let (mut our_square, mut peft_square) = (0.0, 0.0);
        for (tensor, reference) in &fp32 {
            let difference = largest_difference(&our_fp32[tensor], reference);
            assert!(difference <= 1e-5, "{name}: {tensor}: differs by {difference}");
            let (our, peers) = (distance(&our_bf16[tensor], reference), distance(&bf16[tensor], reference));
            assert!(our <= peers * (1.0 + 1e-4), "{name}: {tensor}: {our:.3e} against {peers:.3e}");
            our_square += our * our;
            peft_square += peers * peers;
        }
        println!("{name}: bf16 error {:.2} of the peer's", (our_square / peft_square).sqrt());
    }
}

#[test]
fn combinations_equal_pefts() {
    let Some(peft) = Peft::new() else { return };
    for case in peft.index["combinations"].as_array().unwrap() {
        let list = |key: &str| case[key].as_array().unwrap().clone();
        let method = case["combination_type"].as_str().unwrap();
        let options = |peft_compat| Options {
            combination: Combination::from_str(method, false).unwrap(),
            rank: case["svd_rank"].as_u64(),
            density: case["density"].as_f64(),
            majority_sign: match case["majority_sign_method"].as_str() {
                Some(name) => MajoritySign::from_str(name, false).unwrap(),
                None => MajoritySign::Total,
            },
            seed: 0,
            peft_compat,
        };
        let parts: Vec<Part> = list("adapters")
            .iter()
            .zip(list("weights"))
            .map(|(name, weight)| Part {
                name: name.to_string(),
                adapter: peft.read(name.as_str().unwrap()),
                weight: weight.as_f64().unwrap(),
            })
            .collect();
        let reference = tensors(&peft.dir.join(case["file"].as_str().unwrap()));
        let error = |peft_compat| {
            let combined = combine::combine(&parts, options(peft_compat)).unwrap();
            let found = deltas(&combined.adapter);
            assert_eq!(found.len(), reference.len(), "{case}");
            let apart = |(module, delta): (&String, &Tensor)| distance(delta, &reference[module]).powi(2);
            let whole: f64 = reference.values().map(|delta| norm(delta).powi(2)).sum();
            (found.iter().map(apart).sum::<f64>() / whole).sqrt()
        };
        let (compatible, own) = (error(true), error(false));
        println!("{method} {}: {compatible:.1e}, by default {own:.1e}", case["adapters"]);
        assert!(compatible <= 1e-5, "{case}: {compatible:.2e}");
        if case["differs"].as_bool() == Some(true) {
            assert!(own > 1e-2, "{case}: said to differ, but is {own:.2e} apart");
        } else {
            assert!(own <= 1e-5, "{case}: {own:.2e}");
        }
    }
}

#[test]
fn what_is_written_loads_in_peft_with_the_same_logits() {
    let Some(peft) = Peft::new() else { return };
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let mut arguments =
        vec!["tests/parity/check_adapter.py".to_owned(), peft.base.to_str().unwrap().to_owned()];
    for name in peft.names() {
        peft.read(name).write(Path::new(&path(name)), WriteDtype::F32).unwrap();
        arguments.extend([path(name), peft.reference(name).to_str().unwrap().to_owned()]);
    }
    let ids = tensors(&peft.reference("plain"))["ids"].shallow_clone();
    let part = |name: &str, weight| Part { name: name.to_owned(), adapter: peft.read(name), weight };
    let combined = |combination, rank, parts: &[Part]| {
        let majority_sign = MajoritySign::Total;
        let options =
            Options { combination, rank, density: None, majority_sign, seed: 0, peft_compat: false };
        combine::combine(parts, options).unwrap().adapter
    };
    let mixed = [part("patterns", 1.0), part("rslora", -0.5), part("other-rank", 2.0), part("saved", 1.0)];
    let made = [
        ("scaled", scale::scale(peft.read("patterns"), 0.8, Into::Alpha).unwrap()),
        ("baked", scale::scale(peft.read("patterns"), 0.8, Into::B).unwrap()),
        ("cat", combined(Combination::Cat, None, &mixed)),
        ("svd", combined(Combination::Svd, Some(7), &mixed)),
        ("by-name", combined(Combination::Cat, None, &[part("regex", 1.0), part("all-linear", 1.0)])),
    ];
    for (name, adapter) in made {
        adapter.write(Path::new(&path(name)), WriteDtype::F32).unwrap();
        let logits = peft.logits(Path::new(&path(name)), &ids);
        let reference = path(&format!("{name}.safetensors"));
        Tensor::write_safetensors(&[("ids", &ids), ("logits", &logits)], &reference).unwrap();
        arguments.extend([path(name), reference]);
    }
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    print!("{}", run_python(&peft.python, &arguments));
}

#[test]
fn adapters_beside_the_base_share_a_step_and_each_completes_as_if_it_were_merged() {
    let Some(peft) = Peft::new() else { return };
    let numerics = Numerics::new(tch::Device::Cpu, Precision::Fp32);
    let base = Decoder::load(&peft.base, numerics).unwrap();
    let names = ["plain", "patterns", "regex"];
    let load = |name: &str| Beside::load(&peft.dir.join(name), 1.0, base.config(), numerics).unwrap();
    let adapters = names.map(load);
    let shown: [&[u32]; 4] = [&[5, 9, 2, 7], &[3, 3], &[8], &[5, 9, 2, 7, 1]];
    let mut contexts = shown.map(|_| base.context(8));
    let mut pieces: Vec<Piece<'_>> = contexts
        .iter_mut()
        .zip(shown)
        .zip([None, Some(&adapters[0]), Some(&adapters[1]), Some(&adapters[2])])
        .map(|((context, tokens), adapter)| Piece { context, tokens, logits: 1, adapter })
        .collect();
    let together = base.step(&mut pieces);
    let alone = |decoder: &Decoder, tokens: &[u32]| decoder.next_logits(&mut decoder.context(8), tokens);
    assert!(largest_difference(&together.get(0), &alone(&base, shown[0])) <= 1e-4);
    for (at, name) in (1..).zip(names) {
        let merged = Decoder::load_merged(&peft.base, &peft.dir.join(name), false, None, numerics).unwrap();
        let apart = largest_difference(&together.get(at), &alone(&merged, shown[at as usize]));
        let effect = largest_difference(&together.get(at), &alone(&base, shown[at as usize]));
        assert!(
            apart <= 1e-4 && effect > 1e-2,
            "{name}: {apart:.1e} from merged, {effect:.1e} from the base"
        );
    }
    // With half of its weight it is half of the way.
    let half = adapters[0].weighing(0.5);
    let of = |adapter: &Beside| {
        let mut context = base.context(8);
        base.step(&mut [Piece { context: &mut context, tokens: &[7], logits: 1, adapter: Some(adapter) }])
    };
    assert!(largest_difference(&of(&half), &of(&adapters[0])) > 1e-3);
    assert!(largest_difference(&of(&adapters[0].weighing(0.0)).get(0), &alone(&base, &[7])) <= 1e-5);
    for (name, words) in [("dora", "magnitudes (DoRA)"), ("saved", "ln_f")] {
        let error = Beside::load(&peft.dir.join(name), 1.0, base.config(), numerics).unwrap_err().to_string();
        assert!(error.contains(words) && error.contains("worker adapter merge"), "{error}");
    }
}

#[test]
fn an_adapter_merged_at_load_completes_as_the_merged_model_does() {
    let Some(peft) = Peft::new() else { return };
    let out = tempfile::tempdir().unwrap();
    let merged = out.path().join("merged");
    let adapter = peft.dir.join("dora");
    peft.merge(&adapter, &merged, Precision::Fp32);
    for precision in [Precision::Fp32, Precision::Bf16] {
        let numerics = Numerics::new(tch::Device::Cpu, precision);
        let next = |decoder: Decoder| decoder.next_logits(&mut decoder.context(8), &[5, 9, 2, 7]);
        let at_load = next(Decoder::load_merged(&peft.base, &adapter, false, None, numerics).unwrap());
        assert_eq!(at_load, next(Decoder::load(&merged, numerics).unwrap()));
        assert!(largest_difference(&at_load, &next(Decoder::load(&peft.base, numerics).unwrap())) > 1e-3);
    }
}
