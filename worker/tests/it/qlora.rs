//! Adapters over frozen bases against transformers, peft and bitsandbytes: the rules are those of
//! `parity`, the fixture format stands in `tests/parity/README.md`.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use tch::{Device, Kind, Tensor};
use tunefleet_proto::adapter::LoraConfig;
use tunefleet_proto::base_plan::{BasePlan, PartDtype, QuantKind, Quantization};
use tunefleet_proto::job::{Offload, Optimizer, Precision, Recompute};
use tunefleet_proto::shard_plan::ShardPlan;
use tunefleet_worker::base::{Base, cache, encode};
use tunefleet_worker::checkpoint::hugging_face;
use tunefleet_worker::comm::{Mesh, Solo};
use tunefleet_worker::generate::adapters::Adapter;
use tunefleet_worker::generate::decoder::{Decoder, Piece};
use tunefleet_worker::model::numerics::Numerics;
use tunefleet_worker::train::adapter::{self, Frozen, Wiring};
use tunefleet_worker::train::gradients::{self, Expected};
use tunefleet_worker::train::optimizer;
use tunefleet_worker::train::rng::Seeds;
use tunefleet_worker::train::units;
use tunefleet_worker::train::walk::{Batch, MicroPosition, Walk, WalkOptions};

use crate::common::*;
use crate::engine;

/// One variant of a fixture: a model, an adapter on it, and how its base is held.
pub struct Case {
    pub model: PathBuf,
    pub adapter: PathBuf,
    pub quantization: Quantization,
    pub name: String,
}

pub fn cases() -> Vec<Case> {
    let Some(dir) = fixtures_of("make_qlora_fixtures.py", "qlora") else { return Vec::new() };
    let index: serde_json::Value =
        serde_json::from_str(&std::fs::read_to_string(dir.join("index.json")).unwrap()).unwrap();
    cases_of(&dir, &index["models"], &index)
}

/// The variants of `index` of each of these models in `dir`.
pub fn cases_of(dir: &Path, models: &serde_json::Value, index: &serde_json::Value) -> Vec<Case> {
    let mut cases = Vec::new();
    for model in models.as_array().unwrap() {
        // A model may have variants of its own.
        let variants = model.get("variants").unwrap_or_else(|| &index["variants"]);
        let model = dir.join(model["directory"].as_str().unwrap());
        for variant in variants.as_array().unwrap() {
            let adapter = model.join(variant["directory"].as_str().unwrap());
            let name = adapter.strip_prefix(dir).unwrap().display().to_string();
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

/// A walk over `model` with the adapter in `adapter`, as a rank of `mesh`.
pub fn adapter_walk<'a>(
    model: &Path,
    adapter: &Path,
    quantization: Quantization,
    precision: Precision,
    mesh: Mesh<'a>,
    options: WalkOptions,
    device: Device,
) -> Walk<'a> {
    tunefleet_kernels::device::set_deterministic(true).unwrap();
    let config = hugging_face::read_config(model).unwrap();
    let text = std::fs::read_to_string(adapter.join("adapter_config.json")).unwrap();
    let lora = LoraConfig::from_peft_json(&text).unwrap();
    let adapter_plan = lora.plan(&config).unwrap();
    let rank = mesh.shards.rank();
    let plan = ShardPlan::of_adapter(&adapter_plan, &config, rank.world);
    let numerics = Numerics::new(device, precision);
    let plain = if precision == Precision::Fp32 { PartDtype::F32 } else { PartDtype::Bf16 };
    let base_plan = BasePlan::new(&config, quantization, plain);
    let cache_dir = tempfile::tempdir().unwrap();
    let opened = cache::open(cache_dir.path(), model, &config, &base_plan, mesh, device).unwrap();
    let residency = options.residency(rank.world, config.layers as usize);
    let base = Base::new(base_plan, opened.shards, rank.world, numerics, &residency, options.poison);
    let wiring = Wiring::new(&lora, &adapter_plan, &config, &plan, device);
    let shards =
        units::shards(&plan, rank.rank, numerics, Optimizer::AdamW, Offload::None, Kind::Float).unwrap();
    let weights = tensors(&adapter.join("adapter_model.safetensors"));
    for (unit, shard) in plan.units.iter().zip(&shards) {
        for piece in unit.pieces(rank.rank, rank.world) {
            let values = weights[&piece.slot.hf_name].to_kind(Kind::Float).reshape([-1]);
            let len = (piece.range.end - piece.range.start) as i64;
            let own = values.narrow(0, piece.range.start as i64, len);
            shard.master.narrow(0, piece.shard_offset as i64, len).copy_(&own);
        }
    }
    let walk = Walk::new(config, plan, shards, numerics, mesh, Seeds::new(3), options);
    walk.over(Frozen { base: base.unwrap(), wiring })
}

fn walk_of(case: &Case, precision: Precision, options: WalkOptions) -> Walk<'static> {
    let Case { model, adapter, quantization, .. } = case;
    adapter_walk(model, adapter, *quantization, precision, SOLO, options, Device::Cpu)
}

#[test]
fn fp32_loss_logits_and_every_adapter_gradient_equal_peft_and_bitsandbytes() {
    cases().iter().for_each(assert_equal_in_fp32);
}

/// Loss, logits and every gradient of an adapter against its fixture.
pub fn assert_equal_in_fp32(case: &Case) {
    let fixture = tensors(&case.adapter.join("fixture.safetensors"));
    let batch = batch(&fixture);
    for options in [RECOMPUTE, KEEP] {
        let mut walk = walk_of(case, Precision::Fp32, options);
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

#[test]
fn bf16_adapter_gradients_are_at_most_half_again_as_far_from_fp64_as_the_peers() {
    cases().iter().for_each(assert_close_in_bf16);
}

/// Every gradient of an adapter in bf16, beside the peer's.
pub fn assert_close_in_bf16(case: &Case) {
    let fixture = tensors(&case.adapter.join("bf16.safetensors"));
    let batches = fixture["ids"].size()[0];
    for options in [RECOMPUTE, KEEP] {
        let mut walk = walk_of(case, Precision::Bf16, options);
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
            // What a Trainer with bf16 does, and so what the original did.
            let peers = distance(&fixture[&format!("autocast.grad.{name}")], reference);
            println!("{}: {name}: {:.2} of the peer's error", case.name, ours / peers);
            assert!(ours <= 1.5 * peers, "{}: {name}: {ours:.2e} against {peers:.2e}", case.name);
        }
    }
}

/// Loss curves of 100 steps of three seeds: how far bf16 strays from fp32, beside how far the peer's does.
#[test]
fn a_bf16_loss_curve_strays_at_most_a_fifth_farther_from_fp32_than_the_peers() {
    let Some(dir) = fixtures_of("qlora_curves.py", "qlora-curves") else { return };
    let index: serde_json::Value =
        serde_json::from_str(&std::fs::read_to_string(dir.join("index.json")).unwrap()).unwrap();
    let model = dir.join(index["model"].as_str().unwrap());
    let base = quantization(index["base"].as_str().unwrap());
    let (mut own, mut peers) = (0f64, 0f64);
    for seed in index["seeds"].as_array().unwrap() {
        let adapter = dir.join(seed["directory"].as_str().unwrap());
        let file = tensors(&adapter.join("curves.safetensors"));
        let [fp32, bf16] = [Precision::Fp32, Precision::Bf16].map(|precision| {
            let mut walk = adapter_walk(&model, &adapter, base, precision, SOLO, RECOMPUTE, Device::Cpu);
            curve(&mut walk, &file)
        });
        let theirs = |name: &str| Vec::<f64>::try_from(&file[name]).unwrap();
        let reference = theirs("fp32.loss");
        let apart =
            |curve: &[f64]| curve.iter().zip(&reference).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
        // Over 100 steps rounding of fp32 grows, and stays far below that of bf16.
        assert!(apart(&fp32) <= 1e-3, "fp32 curves differ by {}", apart(&fp32));
        println!("bf16 {:.2e}, peer {:.2e}", apart(&bf16), apart(&theirs("autocast.loss")));
        own = own.max(apart(&bf16));
        peers = peers.max(apart(&theirs("autocast.loss")));
    }
    assert!(own <= 1.2 * peers, "{own} against {peers}");
}

/// The loss before each step, with the optimizer of the fixture.
fn curve(walk: &mut Walk<'_>, file: &HashMap<String, Tensor>) -> Vec<f64> {
    let spec = tunefleet_proto::job::TrainSpec {
        weight_decay: 0.01,
        betas: (0.9, 0.999),
        max_grad_norm: 0.0,
        ..engine::spec(1, 1, 1)
    };
    let steps = file["ids"].size()[0];
    let step = |step: i64| {
        let of_step = |name: &str| file[name].get(step);
        let batch = Batch::new(of_step("ids"), of_step("targets"));
        let targets = batch.targets_bt.ne(-100).sum(Kind::Double);
        let scale = targets.reciprocal().to_kind(Kind::Float);
        walk.begin_step().unwrap();
        let position = MicroPosition { step: step as u64 + 1, micro: 0, of: 1 };
        let loss = walk.train_micro_batch(&batch, position, &scale).unwrap();
        walk.finish_step().unwrap();
        optimizer::update(walk, &spec, step as u64 + 1, 1e-3, &loss, &targets).unwrap().read().loss
    };
    (0..steps).map(step).collect()
}

const LORA: &str = r#"{"r": 8, "lora_alpha": 16, "target_modules": ["c_attn", "c_proj", "c_fc"],
    "lora_dropout": DROPOUT, "use_dora": DORA, "modules_to_save": ["ln_f", "ln_2"]}"#;

/// A run of an adapter from its beginning: losses and trained tensors, as `engine` compares them.
pub struct Trained<'a> {
    pub model: &'a Path,
    pub lora: String,
    pub base: &'a str,
    pub spec: tunefleet_proto::job::TrainSpec,
    pub options: WalkOptions,
    pub precision: Precision,
    pub device: Device,
}

impl Trained<'_> {
    pub fn run(&self) -> (Vec<f64>, Vec<Tensor>) {
        self.run_over(engine::rows)
    }

    /// On other sequences.
    pub fn run_over(
        &self,
        rows: impl Fn(std::ops::Range<u64>) -> (Batch, f64) + Sync,
    ) -> (Vec<f64>, Vec<Tensor>) {
        let lora = LoraConfig::from_peft_json(&self.lora).unwrap();
        let config = hugging_face::read_config(self.model).unwrap();
        let adapter_plan = lora.plan(&config).unwrap();
        let quantization = quantization(self.base);
        let cache_dir = tempfile::tempdir().unwrap();
        let results = engine::on_ranks(self.spec.ranks, |comm| {
            let mesh = Mesh::sharded(comm);
            tunefleet_kernels::device::set_deterministic(true).unwrap();
            let rank = comm.rank();
            let plan = ShardPlan::of_adapter(&adapter_plan, &config, rank.world);
            let numerics = Numerics::new(self.device, self.precision);
            let plain = if self.precision == Precision::Fp32 { PartDtype::F32 } else { PartDtype::Bf16 };
            let base_plan = BasePlan::new(&config, quantization, plain);
            let dir = cache_dir.path();
            let opened = cache::open(dir, self.model, &config, &base_plan, mesh, self.device).unwrap();
            let residency = self.options.residency(rank.world, config.layers as usize);
            let poison = self.options.poison;
            let mut base =
                Base::new(base_plan, opened.shards, rank.world, numerics, &residency, poison).unwrap();
            let shards =
                units::shards(&plan, rank.rank, numerics, self.spec.optimizer, Offload::None, Kind::Float)
                    .unwrap();
            tch::no_grad(|| adapter::init(&shards, &plan, (&config, &lora.token_rows), &mut base, comm, 3))
                .unwrap();
            let wiring = Wiring::new(&lora, &adapter_plan, &config, &plan, self.device);
            let walk = Walk::new(config.clone(), plan, shards, numerics, mesh, Seeds::new(3), self.options);
            let mut walk = walk.over(Frozen { base, wiring });
            let losses = engine::train_over(&mut walk, &self.spec, 1..=self.spec.steps, &rows);
            (losses, walk.shards().iter().map(|s| s.master.to_device(Device::Cpu)).collect::<Vec<_>>())
        });
        let losses = results[0].0.clone();
        let plan = ShardPlan::of_adapter(&adapter_plan, &config, self.spec.ranks);
        let mut weights = Vec::new();
        for (index, unit) in plan.units.iter().enumerate() {
            let shards: Vec<&Tensor> = results.iter().map(|(_, masters)| &masters[index]).collect();
            weights.extend(units::views(unit, &Tensor::cat(&shards, 0)));
        }
        (losses, weights)
    }
}

pub fn trained(model: &Path, ranks: u32, micro_batch: u32) -> Trained<'_> {
    Trained {
        model,
        lora: LORA.replace("DROPOUT", "0.0").replace("DORA", "false"),
        base: "nf4-64-double",
        spec: engine::spec(ranks, micro_batch, 1),
        options: RECOMPUTE,
        precision: Precision::Fp32,
        device: Device::Cpu,
    }
}

#[test]
fn one_two_and_four_ranks_train_the_same_adapter() {
    let (_dir, model) = engine::model();
    for base in ["nf4-64-double", "int8", "plain"] {
        let one = Trained { base, ..trained(&model, 1, 4) }.run();
        assert!(one.0[19] < one.0[0], "the loss does not fall: {:?}", one.0);
        for (ranks, micro_batch) in [(2, 2), (4, 1)] {
            engine::assert_close(&one, &Trained { base, ..trained(&model, ranks, micro_batch) }.run());
        }
    }
}

/// Units of different lengths share gather and reduce buffers, whose padding nobody may see.
#[test]
fn ranks_agree_where_every_block_trains_something_else() {
    let dir = tempfile::tempdir().unwrap();
    let model = dir.path().join("model");
    tunefleet_worker::init_model::init("demo", None, 5, Precision::Fp32, &model).unwrap();
    let lora = r#"{"r": 5, "lora_alpha": 10, "modules_to_save": ["h.4.ln_1"], "target_modules":
        "transformer\\.h\\.(1\\.attn\\.c_attn|2\\..*c_proj|3\\.mlp\\.c_fc|4\\.attn\\.c_proj)"}"#;
    let run = |ranks, micro_batch| {
        let spec =
            tunefleet_proto::job::TrainSpec { max_grad_norm: 0.05, ..engine::spec(ranks, micro_batch, 2) };
        Trained { lora: lora.to_owned(), spec, ..trained(&model, ranks, micro_batch) }.run()
    };
    engine::assert_close(&run(1, 3), &run(3, 1));
}

#[test]
fn a_model_merged_into_the_dequantised_base_has_the_loss_of_training() {
    for case in cases().iter().filter(|case| case.quantization.kind != QuantKind::None) {
        let fixture = tensors(&case.adapter.join("fixture.safetensors"));
        let batch = batch(&fixture);
        let mut walk = walk_of(case, Precision::Fp32, RECOMPUTE);
        let trained = walk.evaluate(&batch).unwrap().double_value(&[]);
        let numerics = Numerics::new(Device::Cpu, Precision::Fp32);
        let dequantized = |weight: &Tensor| {
            let out = encode::round_trip(weight, case.quantization, Kind::Float);
            Ok(out.map_err(tunefleet_worker::checkpoint::Error::from)?)
        };
        let load = |base| Decoder::load_merged(&case.model, &case.adapter, false, base, numerics).unwrap();
        let loss = |model: &Decoder| {
            model.loss_sum(&batch.tokens_bt, &batch.targets_bt, None).unwrap().double_value(&[])
        };
        let merged = loss(&load(Some(&dequantized)));
        assert!((merged - trained).abs() <= 1e-6 * trained, "{}: {merged} and {trained}", case.name);
        let original = loss(&load(None));
        assert!((original - trained).abs() > 1e-6 * trained, "{}: quantisation costs nothing", case.name);
    }
}

#[test]
fn an_adapter_beside_a_base_that_is_served_quantised_completes_as_merged_into_what_it_was_trained_on() {
    let cases = cases();
    let served =
        cases.iter().filter(|case| case.quantization.kind != QuantKind::None && is_served_as_merged(case));
    assert!(served.count() >= 3 || cases.is_empty());
}

/// Completes beside a quantised base as merged into what that is dequantised to; false where it trains more than pairs,
/// which is refused.
pub fn is_served_as_merged(case: &Case) -> bool {
    let numerics = Numerics::new(Device::Cpu, Precision::Fp32);
    let base = Decoder::load_quantized(&case.model, case.quantization, numerics).unwrap();
    let Ok(adapter) = Adapter::load(&case.adapter, 1.0, base.config(), numerics) else { return false };
    let dequantized = |weight: &Tensor| {
        let out = encode::round_trip(weight, case.quantization, Kind::Float);
        Ok(out.map_err(tunefleet_worker::checkpoint::Error::from)?)
    };
    let merged =
        Decoder::load_merged(&case.model, &case.adapter, false, Some(&dequantized), numerics).unwrap();
    // One token at a time, all at once, and so many that the linears are dequantised for them.
    let tokens: Vec<u32> = (0..40).map(|n| n * 7 % 50).collect();
    for pieces in [vec![1; 40], vec![20, 20], vec![40]] {
        let (mut beside, mut whole) = (base.context(40), merged.context(40));
        let mut first = 0;
        for count in pieces {
            let shown = &tokens[first..first + count];
            first += count;
            let of = |decoder: &Decoder, context, adapter| {
                decoder.step(&mut [Piece { context, tokens: shown, logits: 1, adapter }])
            };
            let ours = of(&base, &mut beside, Some(&adapter));
            let apart = largest_difference(&ours, &of(&merged, &mut whole, None));
            assert!(apart <= 1e-4, "{}: after {first} tokens {apart:.1e} apart", case.name);
        }
    }
    let ids: Vec<i64> = tokens.iter().map(|token| i64::from(*token)).collect();
    let row = |values: &[i64]| Tensor::from_slice(values).unsqueeze(0);
    let loss = |decoder: &Decoder, adapter| {
        decoder.loss_sum(&row(&ids[..39]), &row(&ids[1..]), adapter).unwrap().double_value(&[])
    };
    let (beside, whole) = (loss(&base, Some(&adapter)), loss(&merged, None));
    assert!((beside - whole).abs() <= 1e-5 * whole, "{}: losses {beside} and {whole}", case.name);
    true
}

#[test]
fn recomputing_blocks_under_an_adapter_changes_nothing_with_or_without_dropout() {
    let (_dir, model) = engine::model();
    for (dropout, dora) in [("0.0", "false"), ("0.1", "false"), ("0.1", "true")] {
        for ranks in [1, 2] {
            // Ranks are threads here, and masks are drawn from one generator of the process.
            if ranks == 2 && dropout != "0.0" {
                continue;
            }
            let lora = LORA.replace("DROPOUT", dropout).replace("DORA", dora);
            let [on, off] = [RECOMPUTE, KEEP].map(|options| {
                let precision = Precision::Bf16;
                Trained { lora: lora.clone(), options, precision, ..trained(&model, ranks, 2) }.run()
            });
            engine::assert_bit_equal(&on, &off);
        }
    }
}

#[test]
fn poisoned_buffers_of_a_frozen_base_change_nothing() {
    let (_dir, model) = engine::model();
    for recompute in [Recompute::All, Recompute::None] {
        let [clean, poisoned] = [false, true].map(|poison| {
            let options = WalkOptions { recompute, poison, ..RECOMPUTE };
            Trained { options, precision: Precision::Bf16, ..trained(&model, 2, 1) }.run()
        });
        engine::assert_bit_equal(&clean, &poisoned);
    }
}

#[test]
fn moments_of_8_bits_train_about_as_well_and_survive_a_checkpoint() {
    let (_dir, model) = engine::model();
    let full = trained(&model, 1, 4).run();
    let spec = tunefleet_proto::job::TrainSpec { optimizer: Optimizer::AdamW8bit, ..engine::spec(1, 4, 1) };
    let eight = Trained { spec, ..trained(&model, 1, 4) }.run();
    let (last, reference) = (eight.0[19], full.0[19]);
    assert!((last - reference).abs() <= 0.02 * reference, "{last} against {reference}");
    assert_ne!(eight.0, full.0);

    // What a checkpoint holds is fp32: codes come back as they were.
    let runs = [
        units::Run { begin: 0, end: 700, decays: true },
        units::Run { begin: 704, end: 1500, decays: false },
    ];
    let zeros = || {
        tunefleet_worker::train::moments::Moments::zeros(1500, &runs, Device::Cpu, Optimizer::AdamW8bit)
            .unwrap()
    };
    let moments = zeros();
    let normal = Tensor::randn([1500], (Kind::Float, Device::Cpu));
    let random = [normal.shallow_clone(), normal.square()];
    moments.restore(&random).unwrap();
    let held = moments.to_fp32().unwrap();
    assert!(largest_difference(&held[0].narrow(0, 0, 700), &random[0].narrow(0, 0, 700)) < 0.1);
    let again = zeros();
    again.restore(&held).unwrap();
    assert_eq!(again.to_fp32().unwrap(), held);
}

#[test]
fn a_trained_tensor_that_no_gradient_reaches_is_named() {
    let plan = ShardPlan::of_adapter(
        &LoraConfig::from_peft_json(r#"{"r": 2, "target_modules": ["c_fc"]}"#)
            .unwrap()
            .plan(&tunefleet_proto::model::ModelConfig::preset("tiny").unwrap())
            .unwrap(),
        &tunefleet_proto::model::ModelConfig::preset("tiny").unwrap(),
        1,
    );
    let numerics = Numerics::new(Device::Cpu, Precision::Fp32);
    let shards = units::shards(&plan, 0, numerics, Optimizer::AdamW, Offload::None, Kind::Float).unwrap();
    let check = |expected| gradients::check(&plan, &shards, &Solo, 1, expected).map_err(|e| e.to_string());
    for shard in &shards {
        let _ = shard.grad.shallow_clone().fill_(1.0);
    }
    check(Expected::MovingAll).unwrap();
    let a_of_block_1 = &units::views(&plan.units[2], &shards[2].grad)[0];
    let _ = a_of_block_1.shallow_clone().zero_();
    check(Expected::MovingB).unwrap();
    let zero = check(Expected::MovingAll).unwrap_err();
    assert!(zero.contains("transformer.h.1.mlp.c_fc.lora_A.weight is zero throughout"), "{zero}");
    let _ = a_of_block_1.shallow_clone().fill_(f64::NAN);
    assert!(check(Expected::MovingB).unwrap_err().contains("is not finite"));
}

#[test]
fn a_damaged_or_foreign_quantised_base_is_built_anew() {
    let (dir, model) = engine::model();
    let config = hugging_face::read_config(&model).unwrap();
    let plan = BasePlan::new(&config, quantization("nf4-64-double"), PartDtype::Bf16);
    let cache_dir = dir.path().join("base");
    let open = || cache::open(&cache_dir, &model, &config, &plan, SOLO, Device::Cpu).unwrap();
    let first = open();
    assert_eq!(first.built.as_deref(), Some("there was none"));
    assert_eq!(open().built, None, "the second time it is there");

    let entry = cache_dir.join("nf4-64-double-bf16-cpu");
    let file = entry.join("block.1.bin");
    let mut bytes = std::fs::read(&file).unwrap();
    bytes[100] ^= 1;
    std::fs::write(&file, &bytes).unwrap();
    let rebuilt = open();
    assert!(rebuilt.built.as_deref().unwrap().contains("block.1.bin has changed"), "{:?}", rebuilt.built);
    for (a, b) in rebuilt.shards.iter().zip(&first.shards) {
        assert_eq!(a, b);
    }
    std::fs::write(entry.join("manifest.json"), "{").unwrap();
    assert!(open().built.unwrap().contains("manifest.json"));
    std::fs::remove_file(&file).unwrap();
    assert!(open().built.unwrap().contains("block.1.bin"));

    // Another model in the same place.
    std::fs::remove_dir_all(&model).unwrap();
    tunefleet_worker::init_model::init("tiny", None, 6, Precision::Fp32, &model).unwrap();
    let other = open();
    assert_eq!(other.built.as_deref(), Some("the model's files have changed since"));
    assert_ne!(other.base_sha256, first.base_sha256);
}

#[test]
fn a_base_weight_that_is_not_finite_is_refused_by_name() {
    let (dir, model) = engine::model();
    let path = model.join("model.safetensors");
    let mut bytes = std::fs::read(&path).unwrap();
    let end = bytes.len();
    bytes[end - 4..].copy_from_slice(&f32::INFINITY.to_le_bytes());
    std::fs::write(&path, bytes).unwrap();
    let config = hugging_face::read_config(&model).unwrap();
    for base in ["nf4-64", "plain"] {
        let plan = BasePlan::new(&config, quantization(base), PartDtype::Bf16);
        let opened = cache::open(&dir.path().join("base"), &model, &config, &plan, SOLO, Device::Cpu);
        let message = opened.err().unwrap().to_string();
        assert!(
            message.contains("tensor transformer.h.1.mlp.c_proj.bias: holds a value that is not finite"),
            "{message}"
        );
        assert!(!dir.path().join("base/nf4-64-bf16-cpu").exists());
    }
}
