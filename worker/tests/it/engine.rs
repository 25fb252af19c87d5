//! What must not change the result: the number of ranks, recomputation, accumulation, memory
//! that is used again. Ranks are threads here, joined by the TCP communicator on loopback.

use std::net::{IpAddr, Ipv4Addr};
use std::ops::{Range, RangeInclusive};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use crate::common::*;
use tch::{Kind, Tensor};
use tunefleet_proto::ids::{Attempt, JobId, Rank};
use tunefleet_proto::job::{Precision, Recompute, TrainSpec};
use tunefleet_worker::comm::tcp::TcpListener;
use tunefleet_worker::comm::tcp::subgroup::{self, Credentials};
use tunefleet_worker::comm::{Communicator, Mesh, Solo, Tag, mesh};
use tunefleet_worker::model::documents::Documents;
use tunefleet_worker::train::optimizer;
use tunefleet_worker::train::units;
use tunefleet_worker::train::walk::{Batch, MicroPosition, Walk, WalkOptions};

const STEPS: u64 = 20;
const SEQUENCE_TOKENS: i64 = 24;
pub const LEARNING_RATE: f64 = 1e-3;

/// A small model with random weights, biases included.
pub fn model() -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model");
    tunefleet_worker::init_model::init("tiny", None, 5, Precision::Fp32, &path).unwrap();
    (dir, path)
}

pub fn spec(ranks: u32, micro_batch: u32, accumulate: u32) -> TrainSpec {
    let keys = format!(
        "ranks: {ranks}, device: cpu, precision: fp32, steps: {STEPS}, micro_batch_sequences: {micro_batch}, \
         accumulate_micro_batches: {accumulate}, learning_rate: {LEARNING_RATE}, schedule: constant, \
         warmup_steps: 0, weight_decay: 0.05, betas: [0.9, 0.95], seed: 3"
    );
    train_spec(&keys)
}

/// `train` of a job file with these keys.
pub fn train_spec(keys: &str) -> TrainSpec {
    let text = format!("dataset: d\nmodel: {{path: m}}\ntrain: {{{keys}}}\n");
    let root = Path::new("/");
    tunefleet_proto::job::load(&root.join("job.yaml"), &text, &[], root).unwrap().train
}

/// Sequence `index` of an endless stream: ragged, in that its tail may not count.
fn sequence(index: u64) -> (Vec<i64>, Vec<i64>) {
    let token = |i: i64| (index as i64 * 7919 + i * i * 31 + i * 17) % 1024;
    let tokens: Vec<i64> = (0..SEQUENCE_TOKENS).map(token).collect();
    let counted = SEQUENCE_TOKENS - 1 - (index as i64 * 5) % 11;
    let targets = (0..SEQUENCE_TOKENS).map(|i| if i < counted { token(i + 1) } else { -100 }).collect();
    (tokens, targets)
}

pub fn rows(range: Range<u64>) -> (Batch, f64) {
    let (mut tokens, mut targets) = (Vec::new(), Vec::new());
    for index in range {
        let (more_tokens, more_targets) = sequence(index);
        tokens.extend(more_tokens);
        targets.extend(more_targets);
    }
    batch_of(&tokens, &targets, SEQUENCE_TOKENS)
}

/// A batch of sequences that lie end to end, and how many of its targets count.
pub fn batch_of(tokens: &[i64], targets: &[i64], sequence_tokens: i64) -> (Batch, f64) {
    let counted = targets.iter().filter(|&&t| t != -100).count() as f64;
    let tensor = |values: &[i64]| Tensor::from_slice(values).view([-1, sequence_tokens]);
    (Batch::new(tensor(tokens), tensor(targets)), counted)
}

/// Losses of all steps.
pub fn train(walk: &mut Walk<'_>, spec: &TrainSpec) -> Vec<f64> {
    train_range(walk, spec, 1..=spec.steps)
}

/// Losses of these steps.
pub fn train_range(walk: &mut Walk<'_>, spec: &TrainSpec, steps: RangeInclusive<u64>) -> Vec<f64> {
    train_over(walk, spec, steps, rows)
}

/// [`train_range`] on other sequences: `rows` makes a batch of those with these indices, and counts its
/// targets.
pub fn train_over(
    walk: &mut Walk<'_>,
    spec: &TrainSpec,
    steps: RangeInclusive<u64>,
    rows: impl Fn(Range<u64>) -> (Batch, f64),
) -> Vec<f64> {
    let rank = walk.mesh().world.rank();
    let device = walk.numerics().device;
    let micro_batch = u64::from(spec.micro_batch_sequences);
    let per_step = micro_batch * u64::from(spec.accumulate_micro_batches) * u64::from(rank.world);
    let mut losses = Vec::new();
    for step in steps {
        let mut micro_batches = Vec::new();
        let mut counted = 0.0;
        for micro in 0..u64::from(spec.accumulate_micro_batches) {
            let first =
                (step - 1) * per_step + (micro * u64::from(rank.world) + u64::from(rank.rank)) * micro_batch;
            let (batch, count) = rows(first..first + micro_batch);
            counted += count;
            let there = |t: &Tensor| t.to_device(device);
            micro_batches.push(Batch::new(there(&batch.tokens_bt), there(&batch.targets_bt)));
        }
        let targets = Tensor::from(counted).to_device(device);
        walk.mesh().world.all_reduce(&targets, Tag { unit: None, what: "count" }).unwrap().wait().unwrap();
        let scale = targets.reciprocal().to_kind(Kind::Float);
        walk.begin_step().unwrap();
        let mut loss = Tensor::zeros([], (Kind::Double, device));
        for (micro, batch) in micro_batches.iter().enumerate() {
            let position = MicroPosition { step, micro: micro as u32, of: spec.accumulate_micro_batches };
            loss += walk.train_micro_batch(batch, position, &scale).unwrap();
        }
        walk.finish_step().unwrap();
        let status = optimizer::update(walk, spec, step, spec.learning_rate, &loss, &targets).unwrap();
        losses.push(status.read().loss);
    }
    losses
}

/// Trains `model` over as many threads as `spec` has ranks: losses (equal on all ranks) and the weights, by
/// unit, which are the same in all copies.
pub fn run(
    model: &Path,
    spec: &TrainSpec,
    options: WalkOptions,
    precision: Precision,
) -> (Vec<f64>, Vec<Tensor>) {
    run_over(model, spec, options, precision, rows)
}

/// [`run`] on other sequences, as [`train_over`] has them.
pub fn run_over(
    model: &Path,
    spec: &TrainSpec,
    options: WalkOptions,
    precision: Precision,
    rows: impl Fn(Range<u64>) -> (Batch, f64) + Sync,
) -> (Vec<f64>, Vec<Tensor>) {
    let shard_ranks = spec.shard_ranks;
    let results = on_mesh(spec.ranks, shard_ranks, |mesh| {
        let mut walk = walk_with(model, precision, mesh, options, spec.offload, |_| ());
        let losses = train_over(&mut walk, spec, 1..=spec.steps, &rows);
        let masters: Vec<Tensor> = walk.shards().iter().map(|s| s.master.copy()).collect();
        (losses, masters)
    });
    let losses = results[0].0.clone();
    for (other, _) in &results {
        assert_eq!(other, &losses, "ranks disagree about the loss");
    }
    let (first, others) = results.split_at(shard_ranks as usize);
    for copy in others.chunks(shard_ranks as usize) {
        for (a, b) in first.iter().zip(copy).flat_map(|(a, b)| a.1.iter().zip(&b.1)) {
            assert!(a.equal(b), "copies differ by {}", largest_difference(a, b));
        }
    }
    let results = first;
    let plan = tunefleet_proto::shard_plan::ShardPlan::new(
        &tunefleet_worker::checkpoint::hugging_face::read_config(model).unwrap(),
        shard_ranks,
    );
    let mut weights = Vec::new();
    for (index, unit) in plan.units.iter().enumerate() {
        let shards: Vec<&Tensor> = results.iter().map(|(_, masters)| &masters[index]).collect();
        weights.extend(units::views(unit, &Tensor::cat(&shards, 0)));
    }
    (losses, weights)
}

/// [`on_ranks`], with the groups in which `shard_ranks` share a copy of the weights.
pub fn on_mesh<T: Send>(ranks: u32, shard_ranks: u32, body: impl Fn(Mesh<'_>) -> T + Sync) -> Vec<T> {
    on_ranks(ranks, |world| {
        if shard_ranks == 1 {
            return body(Mesh::replicated(world));
        }
        if shard_ranks == ranks {
            return body(Mesh::sharded(world));
        }
        let (shards, replicas) = mesh::neighbours(world.rank(), shard_ranks);
        let job = JobId("engine-test".to_owned());
        let credentials = Credentials { secret: [7; 32], job, attempt: Attempt(1) };
        let deadline = Instant::now() + Duration::from_secs(30);
        let ip = IpAddr::V4(Ipv4Addr::LOCALHOST);
        let join = |members: &[u32]| subgroup::join(world, members, ip, &credentials, deadline).unwrap();
        let (shards, replicas) = (join(&shards), join(&replicas));
        body(Mesh { world, shards: &shards, replicas: Some(&replicas) })
    })
}

pub fn on_ranks<T: Send>(world: u32, body: impl Fn(&dyn Communicator) -> T + Sync) -> Vec<T> {
    if world == 1 {
        return vec![body(&Solo)];
    }
    let loopback = IpAddr::V4(Ipv4Addr::LOCALHOST);
    let listeners: Vec<TcpListener> = (0..world).map(|_| TcpListener::bind(loopback).unwrap()).collect();
    let peers: Vec<_> = listeners.iter().map(TcpListener::addr).collect();
    let deadline = Instant::now() + Duration::from_secs(30);
    thread::scope(|scope| {
        let (peers, body) = (&peers, &body);
        let ranks: Vec<_> = listeners
            .into_iter()
            .enumerate()
            .map(|(rank, listener)| {
                scope.spawn(move || {
                    let rank = Rank { rank: rank as u32, world };
                    let job = JobId("engine-test".to_owned());
                    let comm = listener.join(rank, peers, &[7; 32], &job, Attempt(1), deadline).unwrap();
                    body(&comm)
                })
            })
            .collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
    })
}

pub fn assert_bit_equal(a: &(Vec<f64>, Vec<Tensor>), b: &(Vec<f64>, Vec<Tensor>)) {
    assert_eq!(a.0, b.0, "losses differ");
    for (x, y) in a.1.iter().zip(&b.1) {
        assert!(x.equal(y), "weights differ by {}", largest_difference(x, y));
    }
}

pub fn assert_close(a: &(Vec<f64>, Vec<Tensor>), b: &(Vec<f64>, Vec<Tensor>)) {
    for (step, (x, y)) in a.0.iter().zip(&b.0).enumerate() {
        assert!((x - y).abs() <= 1e-6 * x.abs(), "step {}: losses {x} and {y}", step + 1);
    }
    for (x, y) in a.1.iter().zip(&b.1) {
        let difference = largest_difference(x, y);
        assert!(difference <= 0.1 * LEARNING_RATE, "weights differ by {difference}");
    }
}

#[test]
fn one_two_and_four_ranks_train_the_same_model() {
    let (_dir, model) = model();
    let one = run(&model, &spec(1, 4, 1), RECOMPUTE, Precision::Fp32);
    assert!(one.0[19] < one.0[0], "the loss does not fall: {:?}", one.0);
    for (ranks, micro_batch) in [(2, 2), (4, 1)] {
        let more = run(&model, &spec(ranks, micro_batch, 1), RECOMPUTE, Precision::Fp32);
        assert_close(&one, &more);
    }
}

#[test]
fn documents_that_share_a_row_train_as_if_each_had_its_own() {
    const END: u32 = 0;
    let (_dir, model) = model();
    let token = |at: u32| 1 + (at * 7919 + at * at * 31) % 1023;
    // Lengths of the documents of each row, ends included; the last ones are cut.
    let lengths = [vec![5, 11, 8], vec![24], vec![1, 2, 3, 18]];
    let mut at = 0;
    let rows = lengths.map(|lengths| {
        lengths
            .into_iter()
            .map(|tokens| {
                let mut document: Vec<u32> = (0..tokens).map(|i| token(at + i)).collect();
                at += tokens;
                document[tokens as usize - 1] = END;
                document
            })
            .collect::<Vec<_>>()
    });
    let batch = |rows: &[Vec<u32>], documents| {
        let target = |row: &[u32], i: usize| match row.get(i + 1) {
            Some(next) if row[i] != END => i64::from(*next),
            _ => -100,
        };
        let tokens: Vec<i64> = rows.iter().flatten().map(|t| i64::from(*t)).collect();
        let targets: Vec<i64> = rows.iter().flat_map(|row| (0..row.len()).map(|i| target(row, i))).collect();
        let (batch, _) = batch_of(&tokens, &targets, rows[0].len() as i64);
        Batch { documents, ..batch }
    };
    let packed: Vec<Vec<u32>> = rows.iter().map(|row| row.concat()).collect();
    let lengths: Vec<Vec<u32>> =
        rows.iter().map(|row| row.iter().map(|document| document.len() as u32).collect()).collect();
    let documents = Documents::new(lengths.iter().map(Vec::as_slice), tch::Device::Cpu);
    let alone: Vec<Batch> =
        rows.iter().flatten().filter(|d| d.len() > 1).map(|d| batch(std::slice::from_ref(d), None)).collect();
    let mut walk = walk(&model, Precision::Fp32, SOLO, RECOMPUTE, |_| ());
    let (expected, expected_grads) = loss_and_grads_of_all(&mut walk, &alone);
    let mut of = |documents| loss_and_grads(&mut walk, &batch(&packed, documents));
    let (mixed, _) = of(None);
    let (loss, grads) = of(Some(documents));
    assert!((loss - expected).abs() <= 1e-6 * expected, "{loss} and {expected}");
    assert!(
        (mixed - expected).abs() > 1e-4 * expected,
        "documents that see each other learn the same: {mixed}"
    );
    let all = expected_grads.values().map(|g| norm(g).powi(2)).sum::<f64>().sqrt();
    for (name, expected) in &expected_grads {
        let (error, limit) = (distance(&grads[name], expected), 1e-5 * norm(expected) + 1e-7 * all);
        assert!(error <= limit, "{name}: {error:.2e} > {limit:.2e}");
    }
}

#[test]
fn two_runs_on_as_many_ranks_are_bit_identical() {
    let (_dir, model) = model();
    for precision in [Precision::Fp32, Precision::Bf16] {
        let runs = [(); 2].map(|()| run(&model, &spec(2, 2, 1), RECOMPUTE, precision));
        assert_bit_equal(&runs[0], &runs[1]);
    }
}

#[test]
fn recomputing_blocks_changes_nothing() {
    let (_dir, model) = model();
    for ranks in [1, 2] {
        let [on, off] = [RECOMPUTE, KEEP].map(|o| run(&model, &spec(ranks, 2, 2), o, Precision::Bf16));
        assert_bit_equal(&on, &off);
    }
}

#[test]
fn recomputing_blocks_with_dropout_changes_nothing() {
    let (_dir, model) = model();
    let spec = spec(1, 2, 2);
    let [on, off, again] = [RECOMPUTE, KEEP, RECOMPUTE].map(|options| {
        let mut walk = walk(&model, Precision::Fp32, SOLO, options, |config| {
            let dropout = &mut config.dropout;
            (dropout.attention, dropout.embedding, dropout.residual) = (0.1, 0.1, 0.1);
        });
        let losses = train(&mut walk, &spec);
        (losses, walk.shards().iter().map(|s| s.master.copy()).collect::<Vec<_>>())
    });
    assert_bit_equal(&on, &off);
    assert_bit_equal(&on, &again);
    let without = run(&model, &spec, RECOMPUTE, Precision::Fp32);
    assert_ne!(on.0, without.0, "dropout had no effect");
}

#[test]
fn accumulating_ragged_micro_batches_equals_one_larger_batch() {
    let (_dir, model) = model();
    let whole = run(&model, &spec(1, 2, 1), RECOMPUTE, Precision::Fp32);
    let halves = run(&model, &spec(1, 1, 2), RECOMPUTE, Precision::Fp32);
    assert_close(&whole, &halves);
}

#[test]
fn poisoned_gather_buffers_change_nothing() {
    let (_dir, model) = model();
    for recompute in [Recompute::All, Recompute::Every(2), Recompute::None] {
        let [clean, poisoned] = [false, true].map(|poison| {
            run(&model, &spec(2, 1, 2), WalkOptions { recompute, poison, ..RECOMPUTE }, Precision::Bf16)
        });
        assert_bit_equal(&clean, &poisoned);
    }
}

#[test]
fn a_loss_that_is_not_finite_updates_no_rank() {
    let (_dir, model) = model();
    let spec = spec(2, 1, 1);
    on_ranks(2, |comm| {
        let mut walk = walk(&model, Precision::Fp32, Mesh::sharded(comm), RECOMPUTE, |_| ());
        let before: Vec<Tensor> = walk.shards().iter().map(|s| s.master.copy()).collect();
        // One rank's gradient alone is broken.
        let rank = comm.rank().rank;
        let (batch, counted) = rows(0..1);
        let scale = if rank == 1 { f64::NAN } else { 1.0 / counted };
        walk.begin_step().unwrap();
        let scale = Tensor::from(scale).to_kind(Kind::Float);
        let position = MicroPosition { step: 1, micro: 0, of: 1 };
        let loss = walk.train_micro_batch(&batch, position, &scale).unwrap();
        walk.finish_step().unwrap();
        let targets = Tensor::from(2.0 * counted);
        let status = optimizer::update(&mut walk, &spec, 1, 1e-3, &loss, &targets).unwrap();
        assert!(status.read().nonfinite);
        for (shard, before) in walk.shards().iter().zip(&before) {
            assert!(shard.master.equal(before), "rank {rank} was updated");
        }
    });
}
