//! How long a job takes: steps, evaluations, checkpoints, and their sum. From what was measured, or for a
//! known GPU from its data sheet and assumptions that are named; without either nothing is said.

use serde::Serialize;
use tunefleet_proto::base_plan::BaseUnit;
use tunefleet_proto::job::{JobSpec, Offload, Residency};
use tunefleet_proto::model::ModelConfig;
use tunefleet_proto::shard_plan::ShardPlan;

use super::flops::Flops;
use super::gpus::GpuModel;
use super::memory::{CHECKPOINT_BYTES, bytes_of};
use super::traffic::{self, BlockSeconds, Traffic};

/// Share of a GPU's peak that matrix products of training reach; assumed.
pub const EFFICIENCY: f64 = 0.5;
/// Assumed: what pinned memory and a GPU exchange over PCIe, what a CPU's memory gives an update, and what a
/// rank's machine writes to its disk, bytes a second.
const PINNED_BYTES_PER_SECOND: f64 = 12e9;
const HOST_BYTES_PER_SECOND: f64 = 20e9;
pub const DISK_BYTES_PER_SECOND: f64 = 1e9;
/// What AdamW reads and writes of each element: weight, gradient and both moments; all but the gradient.
const UPDATE_BYTES: f64 = 28.0;

/// Seconds of the parts of a job.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Times {
    /// What they follow from, in words.
    pub basis: String,
    /// Whether it was measured, or else assumed.
    pub measured: bool,
    /// One step.
    pub step_seconds: f64,
    /// Of it, all micro-batches, without waiting for peers where that is known apart.
    pub compute_seconds: f64,
    /// Of it, gradients to their end and the update.
    pub update_seconds: f64,
    /// Traffic of a step.
    pub gather_seconds: f64,
    /// Traffic of a step.
    pub reduce_seconds: f64,
    /// What of the traffic nothing hides.
    pub exposed_seconds: f64,
    /// One evaluation.
    pub evaluation_seconds: f64,
    /// How many there are.
    pub evaluations: u64,
    /// How long training stands still for one checkpoint.
    pub pause_seconds: f64,
    /// How long one is written.
    pub write_seconds: f64,
    /// How many there are at most.
    pub checkpoints: u64,
    /// The whole training.
    pub training_seconds: f64,
    /// Over all ranks, while steps are taken.
    pub tokens_per_second: f64,
    /// FLOPs of the model, nothing computed again, as a share of the GPUs' peak.
    pub model_flops_utilization: Option<f64>,
}

/// The parts, before they are added up.
#[derive(Debug, Clone, PartialEq)]
pub struct Parts {
    /// See [`Times`].
    pub basis: String,
    /// See [`Times`].
    pub measured: bool,
    /// All micro-batches of a step.
    pub compute_seconds: f64,
    /// Gradients to their end and the update.
    pub update_seconds: f64,
    /// Traffic.
    pub traffic: Traffic,
    /// Whether the seconds hold what is exposed of the traffic already.
    pub includes_traffic: bool,
    /// One micro-batch of an evaluation.
    pub evaluation_micro_batch_seconds: f64,
    /// See [`Times`].
    pub pause_seconds: f64,
    /// See [`Times`].
    pub write_seconds: f64,
    /// Of all ranks' GPUs.
    pub peak_flops: Option<f64>,
}

impl Times {
    /// The sum of `parts` over `spec`.
    pub fn new(spec: &JobSpec, config: &ModelConfig, parts: Parts) -> Self {
        let train = &spec.train;
        let exposed = if parts.includes_traffic { 0.0 } else { parts.traffic.exposed_seconds };
        let step_seconds = parts.compute_seconds + parts.update_seconds + exposed;
        let evaluations = times_due(train.eval_every_steps, train.steps);
        let per_round = u64::from(train.micro_batch_sequences) * u64::from(train.ranks);
        let rounds = u64::from(train.eval_sequences).div_ceil(per_round);
        let evaluation_seconds = rounds as f64 * parts.evaluation_micro_batch_seconds;
        let at_best = if train.keep_best { evaluations } else { 0 };
        let every = train.checkpoint_every_steps;
        let checkpoints = (times_due(every, train.steps).max(1)).saturating_add(at_best);
        // One begins when the one before it is written.
        let interval = if every > 0 { every as f64 * step_seconds } else { f64::INFINITY };
        let waits = if train.checkpoints_async { (parts.write_seconds - interval).max(0.0) } else { 0.0 };
        let last_write = if train.checkpoints_async { parts.write_seconds } else { 0.0 };
        let training_seconds = train.steps as f64 * step_seconds
            + evaluations as f64 * evaluation_seconds
            + checkpoints as f64 * (parts.pause_seconds + waits)
            + last_write;
        let tokens = spec.step_sequences() as f64 * f64::from(spec.data.sequence_tokens);
        let flops = Flops::new(spec, config).of_model() * f64::from(train.accumulate_micro_batches);
        let used = flops * f64::from(train.ranks) / step_seconds;
        Times {
            basis: parts.basis,
            measured: parts.measured,
            step_seconds,
            compute_seconds: parts.compute_seconds,
            update_seconds: parts.update_seconds,
            gather_seconds: parts.traffic.gather_seconds,
            reduce_seconds: parts.traffic.reduce_seconds,
            exposed_seconds: parts.traffic.exposed_seconds,
            evaluation_seconds,
            evaluations,
            pause_seconds: parts.pause_seconds,
            write_seconds: parts.write_seconds,
            checkpoints,
            training_seconds,
            tokens_per_second: tokens / step_seconds,
            model_flops_utilization: parts.peak_flops.map(|peak| used / peak),
        }
    }

    /// What the workers of the job cost for that time, in the currency of the price.
    pub fn cost(&self, price_per_hour: f64) -> f64 {
        self.training_seconds / 3600.0 * price_per_hour
    }
}

/// How often something is due in so many steps, the last one always.
fn times_due(every: u64, steps: u64) -> u64 {
    if every == 0 { 0 } else { steps.div_ceil(every) }
}

/// What `spec` takes on GPUs of that kind, by assumption.
pub fn assumed(spec: &JobSpec, config: &ModelConfig, plan: &ShardPlan, gpu: &GpuModel) -> Parts {
    let train = &spec.train;
    let flops = Flops::new(spec, config);
    let rate = gpu.peak_flops * EFFICIENCY;
    let blocks = plan.units.len().saturating_sub(1);
    let residency = Residency::of(train, blocks);
    let again = residency.recomputed.iter().filter(|recomputed| **recomputed).count() as f64;
    let micro_batches = f64::from(train.accumulate_micro_batches);
    let base = spec.base_plan(config);
    // A block is written in 16 bits from what it is held in, forward and backward.
    let dequantised: f64 = base.as_ref().map_or(0.0, |base| {
        let of_unit = |unit: &BaseUnit| {
            let elements = unit.quantized_elements() as f64;
            if elements > 0.0 { unit.bytes as f64 + elements * bytes_of(train.precision) as f64 } else { 0.0 }
        };
        base.units.iter().map(of_unit).sum()
    });
    let dequantising = 2.0 * dequantised / gpu.memory_bytes_per_second;
    let micro_batch = (flops.of_model() + again * flops.block_forward) / rate + dequantising;

    let shard = plan.shard_elements() as f64;
    let on_gpu = UPDATE_BYTES * shard / gpu.memory_bytes_per_second;
    let offloaded = UPDATE_BYTES * shard / HOST_BYTES_PER_SECOND
        + (4.0 + bytes_of(train.precision) as f64) * shard / PINNED_BYTES_PER_SECOND;
    let update_seconds = if train.offload == Offload::None { on_gpu } else { offloaded };

    let block_seconds =
        BlockSeconds { forward: flops.block_forward / rate, backward: flops.block_backward / rate };
    let base_bytes = base.as_ref().and_then(|base| base.units.get(1)).map_or(0.0, |unit| unit.bytes as f64);
    let traffic = traffic::of_step(spec, plan, base_bytes, block_seconds, gpu.link_bytes_per_second);
    let bytes = CHECKPOINT_BYTES as f64 * shard;
    let write_seconds = bytes * f64::from(plan.world) / DISK_BYTES_PER_SECOND;
    let staging = bytes / PINNED_BYTES_PER_SECOND;
    Parts {
        basis: format!(
            "assumed: {} at {:.0}% of {:.0} TFLOP/s, links of {:.0} GB/s, a disk of {:.0} GB/s",
            gpu.name,
            EFFICIENCY * 100.0,
            gpu.peak_flops / 1e12,
            gpu.link_bytes_per_second / 1e9,
            DISK_BYTES_PER_SECOND / 1e9,
        ),
        measured: false,
        compute_seconds: micro_batches * micro_batch,
        update_seconds,
        traffic,
        includes_traffic: false,
        evaluation_micro_batch_seconds: flops.of_evaluation() / rate + dequantising / 2.0,
        pause_seconds: if train.checkpoints_async { staging } else { write_seconds },
        write_seconds,
        peak_flops: Some(gpu.peak_flops * f64::from(train.ranks)),
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use tunefleet_proto::job;

    use super::*;

    fn times(text: &str, gpu: &str) -> Times {
        let text = format!("dataset: d\nmodel: {{init: {{preset: starcoder}}}}\n{text}");
        let spec = job::load(Path::new("/j.yaml"), &text, &[], Path::new("/")).unwrap();
        let config = ModelConfig::preset("starcoder").unwrap();
        let plan = spec.shard_plan(&config).unwrap();
        let parts = assumed(&spec, &config, &plan, &GpuModel::named(gpu).unwrap());
        Times::new(&spec, &config, parts)
    }

    /// By hand: 8 operations a parameter and token at 156 TFLOP/s are 0.80 ms a token, which 1,258 tokens/s
    /// and GPU would be; attention takes 4% of that, and the update of 1.94 billion elements 27 ms a step.
    #[test]
    fn all_weights_of_starcoder_on_eight_a100s_take_what_was_worked_out_by_hand() {
        let times = times("train: {ranks: 8}\n", "A100-80GB");
        assert!((9400.0..9900.0).contains(&times.tokens_per_second), "{times:?}");
        // 6 of 8 operations at half the peak, and the attention that is not computed again.
        let used = times.model_flops_utilization.unwrap();
        assert!((0.35..0.38).contains(&used), "{used}");
        assert!((times.update_seconds - 0.0266).abs() < 0.001, "{times:?}");
        assert!((times.pause_seconds - 1.94).abs() < 0.01, "{times:?}");
        assert!((times.write_seconds - 186.2).abs() < 0.5, "{times:?}");
        // 64 sequences are eight rounds of eight ranks: 2 operations a parameter and token.
        assert_eq!((times.evaluations, times.checkpoints), (20, 4));
        assert!((times.evaluation_seconds - 8.0 * 0.42).abs() < 0.1, "{times:?}");
        let steps = 2000.0 * times.step_seconds
            + 20.0 * times.evaluation_seconds
            + 4.0 * times.pause_seconds
            + times.write_seconds;
        assert!((times.training_seconds - steps).abs() < 1e-6);
        assert!((times.cost(3.6) - steps / 1000.0).abs() < 1e-9);
    }

    #[test]
    fn slow_links_are_exposed_and_offloading_takes_the_update_to_the_cpu() {
        let fast = times("train: {ranks: 8}\n", "A100-80GB");
        let slow = times("train: {ranks: 8}\n", "A100-PCIe");
        assert!(fast.exposed_seconds < 0.03 * fast.step_seconds, "{fast:?}");
        assert!(slow.exposed_seconds > 0.5 * slow.compute_seconds, "{slow:?}");
        let offloaded = times("train: {ranks: 8, offload: optimizer}\n", "A100-80GB");
        assert!(offloaded.update_seconds > 20.0 * fast.update_seconds, "{offloaded:?}");
        // Where a checkpoint is not written when the next one is due, training waits for it.
        let often = times("train: {ranks: 8, checkpoint_every_steps: 10}\n", "A100-80GB");
        assert!(often.training_seconds > 200.0 * often.write_seconds, "{often:?}");
    }
}
