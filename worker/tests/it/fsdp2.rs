//! Whole loss curves beside those of PyTorch FSDP2 over gloo, for every strategy: the same initial
//! weights, the same sequences. Format and rules stand in `tests/parity/README.md`.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ops::Range;
use std::path::PathBuf;

use serde::Deserialize;
use tch::Tensor;
use tunefleet_proto::job::{Precision, Strategy, TrainSpec};
use tunefleet_proto::shard_plan::{ShardPlan, Slot};
use tunefleet_worker::checkpoint::hugging_face;
use tunefleet_worker::train::walk::{Batch, WalkOptions};

use crate::common::{RECOMPUTE, largest_difference, python, root, run_python, tensors};
use crate::engine::{batch_of, run_over, train_spec};

/// `index.json`.
#[derive(Deserialize)]
struct Index {
    decays: BTreeSet<String>,
    adamw: AdamW,
    max_grad_norm: f64,
    steps: u64,
    sequences: u64,
    accumulate: u64,
    curves: Vec<Curve>,
}

#[derive(Deserialize)]
struct AdamW {
    lr: f64,
    betas: (f64, f64),
    eps: f64,
    weight_decay: f64,
}

/// One run of the peer.
#[derive(Deserialize)]
struct Curve {
    seed: u32,
    precision: Precision,
    strategy: Strategy,
    ranks: u32,
    file: String,
}

/// Losses of all steps, and the weights at the end by their names.
struct Run {
    losses: Vec<f64>,
    weights: HashMap<String, Tensor>,
}

/// What the peer has trained.
struct Peer {
    dir: PathBuf,
    index: Index,
}

impl Peer {
    fn open(name: &str, options: &[&str]) -> Option<Peer> {
        let python = python()?;
        let dir = root().join(format!("target/parity-{name}"));
        let program = ["tests/parity/fsdp2_curves.py", dir.to_str().unwrap()];
        run_python(&python, &[&program, options].concat());
        let index = std::fs::read_to_string(dir.join("index.json")).unwrap();
        Some(Peer { index: serde_json::from_str(&index).unwrap(), dir })
    }

    fn seeds(&self) -> BTreeSet<u32> {
        self.index.curves.iter().map(|curve| curve.seed).collect()
    }

    /// Every strategy on every number of ranks that there are curves of.
    fn settings(&self, precision: Precision) -> Vec<(Strategy, u32)> {
        let mut settings: Vec<_> =
            self.curves(precision).map(|curve| (curve.strategy, curve.ranks)).collect();
        settings.sort_by_key(|&(strategy, ranks)| (ranks, strategy as u8));
        settings.dedup();
        settings
    }

    fn curves(&self, precision: Precision) -> impl Iterator<Item = &Curve> {
        self.index.curves.iter().filter(move |curve| curve.precision == precision)
    }

    fn model(&self, seed: u32) -> PathBuf {
        self.dir.join(format!("seed-{seed}/model"))
    }

    fn read(&self, curve: &Curve) -> Run {
        let mut weights = tensors(&self.dir.join(&curve.file));
        let norms = Vec::<f64>::try_from(weights.remove("grad_norm").unwrap()).unwrap();
        assert!(norms.iter().any(|&norm| norm > self.index.max_grad_norm), "nothing was clipped: {norms:?}");
        let losses = Vec::try_from(weights.remove("loss").unwrap()).unwrap();
        Run { losses, weights }
    }

    fn slots(&self, seed: u32) -> Vec<Slot> {
        let plan = ShardPlan::new(&hugging_face::read_config(&self.model(seed)).unwrap(), 1);
        plan.units.into_iter().flat_map(|unit| unit.parameters).collect()
    }

    fn spec(&self, strategy: Strategy, ranks: u32) -> TrainSpec {
        let Index { adamw, max_grad_norm, steps, sequences, accumulate, .. } = &self.index;
        let AdamW { lr, betas: (beta1, beta2), eps, weight_decay } = adamw;
        let micro_batch = sequences / accumulate / u64::from(ranks);
        let strategy = match strategy {
            Strategy::FullShard => "full_shard",
            Strategy::ShardGradOp => "shard_grad_op",
            Strategy::HybridShard => "hybrid_shard, shard_ranks: 2",
            Strategy::NoShard => "no_shard",
        };
        train_spec(&format!(
            "ranks: {ranks}, strategy: {strategy}, device: cpu, precision: fp32, steps: {steps}, \
             micro_batch_sequences: {micro_batch}, accumulate_micro_batches: {accumulate}, \
             learning_rate: {lr}, schedule: constant, warmup_steps: 0, betas: [{beta1}, {beta2}], \
             epsilon: {eps}, weight_decay: {weight_decay}, max_grad_norm: {max_grad_norm}"
        ))
    }

    /// The same in our own engine.
    fn train(&self, seed: u32, strategy: Strategy, ranks: u32, precision: Precision) -> Run {
        let sequences = tensors(&self.dir.join(format!("seed-{seed}/sequences.safetensors")));
        let sequence_tokens = sequences["ids"].size()[2];
        let flat = |name: &str| Vec::<i64>::try_from(sequences[name].reshape([-1])).unwrap();
        let (tokens, targets) = (flat("ids"), flat("targets"));
        let rows = |range: Range<u64>| -> (Batch, f64) {
            let at = |index: u64| index as usize * sequence_tokens as usize;
            let range = at(range.start)..at(range.end);
            batch_of(&tokens[range.clone()], &targets[range], sequence_tokens)
        };
        let spec = self.spec(strategy, ranks);
        let options = if ranks == 1 { RECOMPUTE } else { WalkOptions::of(&spec) };
        let (losses, weights) = run_over(&self.model(seed), &spec, options, precision, rows);
        let names = self.slots(seed).into_iter().map(|slot| slot.hf_name);
        Run { losses, weights: names.zip(weights).collect() }
    }

    /// Curves of one rank in fp32, by seed.
    fn train_alone(&self) -> BTreeMap<u32, Run> {
        let run = |seed| (seed, self.train(seed, Strategy::FullShard, 1, Precision::Fp32));
        self.seeds().into_iter().map(run).collect()
    }

    /// Compares the curves in fp32, and the weights where they end.
    fn compare_fp32(&self) {
        let alone = self.train_alone();
        let mut first: BTreeMap<u32, Run> = BTreeMap::new();
        for curve in self.curves(Precision::Fp32) {
            let Curve { seed, strategy, ranks, .. } = *curve;
            let peers = self.read(curve);
            let ours = self.train(seed, strategy, ranks, Precision::Fp32);
            let name = format!("seed {seed}, {strategy:?}, {ranks} ranks");
            println!("{name}: losses by, weights by learning rates");
            if let Some(first) = first.get(&seed) {
                println!("  the peer from its first: {}", Distance::of(&peers, first, self.index.adamw.lr));
            } else {
                first.insert(seed, self.read(curve));
            }
            let (start, end) = (ours.losses[0], *ours.losses.last().unwrap());
            assert!(end < 0.95 * start, "{name}: the loss does not fall: {start} to {end}");
            for (whose, other) in [("the peer", &peers), ("one rank", &alone[&seed])] {
                let distance = Distance::of(&ours, other, self.index.adamw.lr);
                println!("  ours from {whose}: {distance}");
                assert!(distance.losses <= 1e-6, "{name}: losses from {whose}: {distance}");
                assert!(distance.weights <= 0.1, "{name}: weights from {whose}: {distance}");
            }
        }
    }

    /// Compares how far the curves in bf16 stray from fp32 with how far the peer's do.
    fn compare_bf16(&self) {
        let alone = self.train_alone();
        for (strategy, ranks) in self.settings(Precision::Bf16) {
            let ours = alone.iter().map(|(&seed, fp32)| {
                largest_apart(&self.train(seed, strategy, ranks, Precision::Bf16).losses, &fp32.losses)
            });
            let ours: Vec<f64> = ours.collect();
            let peers = self.peers_apart(strategy, ranks);
            let shown =
                |seeds: &[f64]| seeds.iter().map(|x| format!("{x:.2e}")).collect::<Vec<_>>().join(", ");
            println!("{strategy:?}, {ranks} ranks: ours by {}, the peer by {}", shown(&ours), shown(&peers));
            let [own, peer] = [&ours, &peers].map(|seeds| seeds.iter().copied().fold(0.0, f64::max));
            assert!(own <= 1.2 * peer, "{strategy:?}, {ranks} ranks: {own:.2e} against {peer:.2e}");
        }
    }

    /// How far the peer's bf16 curve of each seed strays from its own in fp32.
    fn peers_apart(&self, strategy: Strategy, ranks: u32) -> Vec<f64> {
        let of_setting = |curve: &&Curve| (curve.strategy, curve.ranks) == (strategy, ranks);
        let apart = self.curves(Precision::Bf16).filter(of_setting).map(|bf16| {
            let alike = |fp32: &&Curve| {
                (fp32.seed, fp32.strategy, fp32.ranks) == (bf16.seed, bf16.strategy, bf16.ranks)
            };
            let fp32 = self.curves(Precision::Fp32).find(alike).unwrap();
            largest_apart(&self.read(bf16).losses, &self.read(fp32).losses)
        });
        let apart: Vec<f64> = apart.collect();
        assert_eq!(apart.len(), self.seeds().len());
        apart
    }
}

fn largest_apart(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max)
}

/// How far two runs are apart.
struct Distance {
    /// The largest of a step, relative.
    losses: f64,
    /// The largest of an element, in learning rates.
    weights: f64,
}

impl Distance {
    fn of(a: &Run, b: &Run, learning_rate: f64) -> Distance {
        assert_eq!(a.losses.len(), b.losses.len());
        let relative = a.losses.iter().zip(&b.losses).map(|(a, b)| (a - b).abs() / b.abs());
        assert_eq!(a.weights.len(), b.weights.len());
        let weights = a.weights.iter().map(|(name, weight)| largest_difference(weight, &b.weights[name]));
        Distance {
            losses: relative.fold(0.0, f64::max),
            weights: weights.fold(0.0, f64::max) / learning_rate,
        }
    }
}

impl std::fmt::Display for Distance {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:.1e}, {:.3}", self.losses, self.weights)
    }
}

#[test]
fn fp32_losses_and_weights_of_every_strategy_equal_fsdp2s() {
    let Some(peer) = Peer::open("fsdp2", &[]) else { return };
    peer.compare_fp32();
}

#[test]
fn a_bf16_curve_strays_at_most_a_fifth_farther_from_fp32_than_fsdp2s() {
    let Some(peer) = Peer::open("fsdp2", &[]) else { return };
    peer.compare_bf16();
}

#[test]
fn weight_decay_applies_to_the_parameters_that_the_trainer_names() {
    let Some(peer) = Peer::open("fsdp2", &[]) else { return };
    let (decays, rest): (Vec<_>, Vec<_>) = peer.slots(0).into_iter().partition(|slot| slot.decays);
    let names = |slots: Vec<Slot>| slots.into_iter().map(|slot| slot.hf_name).collect::<BTreeSet<_>>();
    assert_eq!(names(decays), peer.index.decays);
    assert!(!rest.is_empty());
}

/// The same from every seed, with every strategy of the peer.
mod long {
    use super::Peer;

    /// `None` as well where a sample will do: the tests above compare one.
    fn peer() -> Option<Peer> {
        let sample = std::env::var("TUNEFLEET_LONG_SAMPLE").is_ok_and(|sample| !sample.is_empty());
        if sample {
            println!("left out of a sample of the long tests");
            return None;
        }
        Peer::open("fsdp2-all", &["--all"])
    }

    #[test]
    fn every_curve_in_fp32_equals_fsdp2s_from_every_seed() {
        let Some(peer) = peer() else { return };
        peer.compare_fp32();
    }

    #[test]
    fn every_curve_in_bf16_strays_at_most_a_fifth_farther_from_fp32_than_fsdp2s() {
        let Some(peer) = peer() else { return };
        peer.compare_bf16();
    }
}
