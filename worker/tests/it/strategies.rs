//! What sharding strategy, residency, gather depth and offload must not change: the result.

use std::path::PathBuf;
use std::sync::Mutex;

use crate::comm_processes::{self, RankProcess};
use crate::common::{KEEP, RECOMPUTE, SOLO, walk};
use crate::engine::{assert_bit_equal, assert_close, on_mesh, run, train, train_range, train_spec};
use tch::{Device, Kind, Tensor};
use tunefleet_proto::ids::Rank;
use tunefleet_proto::job::{Offload, Optimizer, Precision, Recompute, TrainSpec};
use tunefleet_proto::model::ModelConfig;
use tunefleet_proto::shard_plan::ShardPlan;
use tunefleet_worker::checkpoint::{hugging_face, model_dir};
use tunefleet_worker::comm::{Communicator, Error, Mesh, Tag, Work};
use tunefleet_worker::model::numerics::Numerics;
use tunefleet_worker::train::rng::Seeds;
use tunefleet_worker::train::units;
use tunefleet_worker::train::walk::{Batch, Walk, WalkOptions};

/// Five blocks, so that residency and gather depth have something to choose from.
fn deep_model() -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model");
    let config = ModelConfig { layers: 5, ..ModelConfig::preset("tiny").unwrap() };
    tch::manual_seed(5);
    model_dir::write(&path, &config, Precision::Fp32, None, |parameter, sink| {
        let values = Tensor::randn([parameter.elements() as i64], (Kind::Float, Device::Cpu)) * 0.02;
        let norm = parameter.name.contains("ln_") && parameter.name.ends_with("weight");
        let values = if norm { values + 1.0 } else { values };
        sink(&Vec::<f32>::try_from(values).unwrap())
    })
    .unwrap();
    (dir, path)
}

const ONE: &str = "accumulate_micro_batches: 1";

/// 20 steps of 4 sequences a micro-batch, over so many ranks.
fn spec(ranks: u32, keys: &str) -> TrainSpec {
    let micro_batch = 4 / ranks.min(4);
    let keys = format!(
        "ranks: {ranks}, device: cpu, precision: fp32, steps: 20, micro_batch_sequences: {micro_batch}, \
         learning_rate: 1e-3, schedule: constant, warmup_steps: 0, \
         weight_decay: 0.05, betas: [0.9, 0.95], seed: 3, {keys}"
    );
    train_spec(&keys)
}

fn trained(spec: &TrainSpec, precision: Precision) -> (Vec<f64>, Vec<Tensor>) {
    let (_dir, model) = deep_model();
    run(&model, spec, WalkOptions::of(spec), precision)
}

#[test]
fn every_strategy_trains_the_model_of_one_rank() {
    let one = trained(&spec(1, ONE), Precision::Fp32);
    for (ranks, strategy) in [
        (2, "strategy: full_shard"),
        (2, "strategy: shard_grad_op"),
        (2, "strategy: no_shard"),
        (4, "strategy: no_shard"),
        (4, "strategy: hybrid_shard, shard_ranks: 2"),
        (4, "strategy: shard_grad_op"),
    ] {
        assert_close(&one, &trained(&spec(ranks, &format!("{ONE}, {strategy}")), Precision::Fp32));
    }
}

#[test]
fn a_sum_over_three_copies_is_right_where_nothing_divides() {
    let keys = "micro_batch_sequences: 2, accumulate_micro_batches: 3";
    let of = |ranks: u32, keys: &str| {
        train_spec(&format!(
            "ranks: {ranks}, device: cpu, precision: fp32, steps: 5, learning_rate: 1e-3, warmup_steps: 0, {keys}"
        ))
    };
    let one = trained(&of(1, keys), Precision::Fp32);
    let three = of(3, "micro_batch_sequences: 2, accumulate_micro_batches: 1, strategy: no_shard");
    assert_close(&one, &trained(&three, Precision::Fp32));
}

#[test]
fn strategies_repeat_bit_for_bit() {
    for strategy in ["strategy: no_shard", "strategy: hybrid_shard, shard_ranks: 2"] {
        let of = spec(4, &format!("{ONE}, {strategy}"));
        assert_bit_equal(&trained(&of, Precision::Bf16), &trained(&of, Precision::Bf16));
    }
}

#[test]
fn what_stays_gathered_and_what_is_recomputed_changes_nothing() {
    let plain = trained(&spec(2, "accumulate_micro_batches: 2"), Precision::Bf16);
    for keys in [
        "recompute: none",
        "recompute: every 2",
        "recompute: every 3",
        "resident_blocks: 1",
        "resident_blocks: 3",
        "gather_ahead: 2",
        "gather_ahead: 3, resident_blocks: 1",
        "strategy: shard_grad_op, recompute: every 2",
        "offload: optimizer",
        "offload: all",
    ] {
        let other = trained(&spec(2, &format!("accumulate_micro_batches: 2, {keys}")), Precision::Bf16);
        assert_bit_equal(&plain, &other);
    }
}

#[test]
fn offloaded_weights_of_one_rank_train_the_same_model() {
    for precision in [Precision::Fp32, Precision::Bf16] {
        let plain = trained(&spec(1, ONE), precision);
        for offload in [Offload::Optimizer, Offload::All] {
            let spec = TrainSpec { offload, ..spec(1, ONE) };
            assert_bit_equal(&plain, &trained(&spec, precision));
        }
    }
}

#[test]
fn gradients_that_travel_in_16_bits_train_nearly_the_same_model() {
    let wide = trained(&spec(2, ONE), Precision::Fp32);
    let narrow = trained(&spec(2, &format!("{ONE}, reduce_precision: bf16")), Precision::Fp32);
    assert_ne!(wide.0, narrow.0, "nothing was rounded");
    for (a, b) in wide.0.iter().zip(&narrow.0) {
        assert!((a - b).abs() < 2e-3 * a, "{a} and {b}");
    }
}

/// The two ranks are processes: masks are drawn from one generator of a process, which threads would share.
#[test]
fn recomputing_blocks_with_dropout_on_two_ranks_changes_nothing() {
    const WORLD: u32 = 2;
    if let Some(rank) = comm_processes::own_rank() {
        return train_with_dropout(&comm_processes::join(rank, WORLD));
    }
    let test = "strategies::recomputing_blocks_with_dropout_on_two_ranks_changes_nothing";
    let mut ranks = RankProcess::start_all(test, WORLD);
    for rank in &mut ranks {
        assert_eq!(rank.line(), "the same");
    }
}

/// One of two ranks: says whether dropout masks are those of the rank and the position alone.
fn train_with_dropout(world: &dyn Communicator) {
    let (_dir, model) = deep_model();
    let spec = TrainSpec { steps: 5, ..spec(2, "accumulate_micro_batches: 2") };
    let trained = |mesh, options, precision, probability| {
        let mut walk = walk(&model, precision, mesh, options, |config| {
            let dropout = &mut config.dropout;
            (dropout.attention, dropout.embedding, dropout.residual) =
                (probability, probability, probability);
        });
        let losses = train(&mut walk, &spec);
        (losses, walk.shards().iter().map(|s| s.master.copy()).collect::<Vec<_>>())
    };
    let every_other = WalkOptions { recompute: Recompute::Every(2), ..RECOMPUTE };
    for mesh in [Mesh::sharded(world), Mesh::replicated(world)] {
        for precision in [Precision::Fp32, Precision::Bf16] {
            let kept = trained(mesh, KEEP, precision, 0.1);
            assert_bit_equal(&kept, &trained(mesh, RECOMPUTE, precision, 0.1));
            assert_bit_equal(&kept, &trained(mesh, every_other, precision, 0.1));
        }
    }
    let of = |mesh, probability| trained(mesh, RECOMPUTE, Precision::Fp32, probability).0;
    let [sharded, replicated] = [Mesh::sharded(world), Mesh::replicated(world)].map(|mesh| of(mesh, 0.1));
    for (a, b) in sharded.iter().zip(&replicated) {
        assert!((a - b).abs() <= 1e-6 * a, "a mask depends on the strategy: losses {a} and {b}");
    }
    assert_ne!(sharded, of(Mesh::sharded(world), 0.0), "dropout had no effect");
    comm_processes::say("the same");
}

/// Unit and purpose of an operation.
type Entry = (Option<u32>, &'static str);

/// Notes what is started, and passes it on.
struct Noting<'a> {
    inner: &'a dyn Communicator,
    notes: Mutex<Vec<Entry>>,
}

impl Communicator for Noting<'_> {
    fn rank(&self) -> Rank {
        self.inner.rank()
    }

    fn all_gather(&self, buffer: &Tensor, tag: Tag) -> Result<Box<dyn Work>, Error> {
        self.notes.lock().unwrap().push((tag.unit, tag.what));
        self.inner.all_gather(buffer, tag)
    }

    fn reduce_scatter(&self, input: &Tensor, output: &Tensor, tag: Tag) -> Result<Box<dyn Work>, Error> {
        self.notes.lock().unwrap().push((tag.unit, tag.what));
        self.inner.reduce_scatter(input, output, tag)
    }

    fn all_reduce(&self, tensor: &Tensor, tag: Tag) -> Result<Box<dyn Work>, Error> {
        self.inner.all_reduce(tensor, tag)
    }

    fn barrier(&self) -> Result<(), Error> {
        self.inner.barrier()
    }

    fn abort(&self, reason: &str) {
        self.inner.abort(reason);
    }
}

/// What a rank of two starts in one step of so many micro-batches over five blocks.
fn started(micro_batches: u32, options: WalkOptions) -> Vec<Entry> {
    let (_dir, model) = deep_model();
    let keys = format!("steps: 1, accumulate_micro_batches: {micro_batches}, warmup_steps: 0, ranks: 2");
    let spec = train_spec(&keys);
    let mut notes = on_mesh(2, 2, |mesh| {
        let noting = Noting { inner: mesh.world, notes: Mutex::default() };
        let mut walk = walk(&model, Precision::Bf16, Mesh::sharded(&noting), options, |_| ());
        train(&mut walk, &spec);
        drop(walk);
        noting.notes.into_inner().unwrap()
    });
    assert_eq!(notes[0], notes[1], "ranks start the same operations in the same order");
    notes.remove(0)
}

#[test]
fn a_gather_is_started_before_the_reduction_that_it_must_not_wait_behind() {
    let gather = |unit| (Some(unit), "gather");
    let reduce = |unit| (Some(unit), "reduce");
    let wanted = [
        gather(0),
        gather(1),
        gather(2),
        gather(3),
        gather(4),
        gather(5),
        // The last two are still there.
        reduce(5),
        gather(3),
        reduce(4),
        gather(2),
        reduce(3),
        gather(1),
        reduce(2),
        reduce(1),
        reduce(0),
    ];
    assert_eq!(started(1, RECOMPUTE), wanted);
}

#[test]
fn a_resident_block_is_gathered_once_a_step() {
    let gathers = |options, unit| {
        started(2, options).into_iter().filter(|entry| *entry == (Some(unit), "gather")).count()
    };
    // Forward and backward of two micro-batches, but that it is still there for the second one.
    assert_eq!(gathers(RECOMPUTE, 1), 3);
    let first_two = WalkOptions { resident_blocks: 2, ..RECOMPUTE };
    assert_eq!([1, 2, 3].map(|unit| gathers(first_two, unit)), [1, 1, 3]);
    for options in [KEEP, WalkOptions { resident_blocks: u32::MAX, ..RECOMPUTE }] {
        for unit in 0..=5 {
            // Unless its activations are kept, the last block takes turns with nobody.
            assert_eq!(gathers(options, unit), 1, "unit {unit} of {options:?}");
        }
    }
}

#[test]
fn a_cpu_that_multiplies_16_bits_slowly_computes_on_their_values_in_fp32() {
    let (_dir, model) = deep_model();
    let spec = spec(1, ONE);
    let losses = [Kind::BFloat16, Kind::Float].map(|product_kind| {
        let config = hugging_face::read_config(&model).unwrap();
        let plan = ShardPlan::new(&config, 1);
        let numerics = Numerics { device: Device::Cpu, kind: Kind::BFloat16, product_kind };
        let shards =
            units::shards(&plan, 0, numerics, Optimizer::AdamW, Offload::None, numerics.kind).unwrap();
        hugging_face::load(&model, &plan, SOLO, &shards).unwrap();
        let mut walk = Walk::new(config, plan, shards, numerics, SOLO, Seeds::new(3), RECOMPUTE);
        let mut losses = train_range(&mut walk, &spec, 1..=3);
        let tokens_bt = Tensor::arange(40, (Kind::Int64, Device::Cpu)).view([2, 20]);
        let batch = Batch::new(tokens_bt.shallow_clone(), &tokens_bt + 1);
        losses.push(walk.evaluate(&batch).unwrap().double_value(&[]) / 40.0);
        losses
    });
    for (a, b) in losses[0].iter().zip(&losses[1]) {
        assert!((a - b).abs() < 3e-3 * a, "{a} and {b}");
    }
}
