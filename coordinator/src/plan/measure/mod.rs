//! `plan --measure`: rank 0 of the job measured on this machine, and from there to the whole model.

mod ask;
mod extrapolate;

use serde::Serialize;
use tunefleet_proto::job::JobSpec;
use tunefleet_proto::measure::{Disk, Measured, Point};
use tunefleet_proto::model::ModelConfig;
use tunefleet_proto::shard_plan::ShardPlan;

use super::gpus::GpuModel;
use super::memory::{CHECKPOINT_BYTES, Machine};
use super::time::Parts;
use super::traffic::{self, BlockSeconds, Traffic};
pub use ask::{Asked, Question, ask};
pub use extrapolate::{Sum, points};

/// How much is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Depth {
    /// Two and four blocks, from which the others follow.
    Quick,
    /// All blocks, and all micro-batches of a step.
    Full,
}

/// What was measured, and what follows for the whole model.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Measurement {
    /// Of each point, what the slowest rank took.
    pub points: Vec<Measured>,
    /// Rates of one rank's part of a checkpoint.
    pub disk: Disk,
    /// Between ranks of this machine, of each of them.
    pub link_bytes_per_second: Option<f64>,
    /// Ranks that were measured at once.
    pub ranks: u32,
    /// Threads of each.
    pub threads: u32,
    /// Most in live tensors, of the whole model.
    pub peak_bytes: u64,
    /// Seconds of the whole model.
    pub step_seconds: f64,
}

impl Measurement {
    /// What `asked` was answered, for the whole model.
    pub fn new(spec: &JobSpec, config: &ModelConfig, asked: Asked) -> Self {
        let sum = Sum::new(spec, config, &asked.points);
        let micro_batches = f64::from(spec.train.accumulate_micro_batches);
        let first = sum.of(|measured| measured.first_micro_batch.median);
        let later = sum.of(|m| m.later_micro_batch.unwrap_or(m.first_micro_batch).median);
        let update = sum.of(|measured| measured.update.median);
        Measurement {
            peak_bytes: sum.of(|measured| measured.peak_bytes as f64) as u64,
            step_seconds: first + (micro_batches - 1.0) * later + update,
            points: asked.points,
            disk: asked.disk,
            link_bytes_per_second: asked.link_bytes_per_second,
            ranks: asked.ranks,
            threads: asked.threads,
        }
    }

    /// Times of `spec`. On a GPU traffic is not simulated: it is added for the links of `gpu`.
    pub fn parts(
        &self,
        spec: &JobSpec,
        config: &ModelConfig,
        plan: &ShardPlan,
        gpu: Option<&GpuModel>,
    ) -> Parts {
        let train = &spec.train;
        let sum = Sum::new(spec, config, &self.points);
        let update_seconds = sum.of(|measured| measured.update.median);
        let on_gpu = self.points.iter().any(|measured| measured.on_gpu);
        let link = match on_gpu {
            true => gpu.map(|gpu| gpu.link_bytes_per_second),
            false => self.link_bytes_per_second,
        };
        let block_seconds = block_seconds(&sum, config);
        let traffic = match link {
            Some(link) => traffic::of_step(spec, plan, base_bytes(spec, config), block_seconds, link),
            None => Traffic::default(),
        };
        let rank_bytes = CHECKPOINT_BYTES as f64 * plan.shard_elements() as f64;
        let write_seconds = rank_bytes / self.disk.write_bytes_per_second;
        let staging = sum.of(|measured| measured.staging.map_or(0.0, |seconds| seconds.median));
        let depths: Vec<String> = self.depths().iter().map(u64::to_string).collect();
        let whole = self.points.iter().any(|measured| measured.point.whole_steps);
        let of =
            if whole { "all".to_owned() } else { format!("{} of {}", depths.join(" and "), config.layers) };
        Parts {
            basis: format!(
                "measured on this machine, {of} blocks, {} ranks at once on {} threads each",
                self.ranks, self.threads
            ),
            measured: true,
            compute_seconds: self.step_seconds - update_seconds,
            update_seconds,
            traffic,
            includes_traffic: !on_gpu,
            evaluation_micro_batch_seconds: sum.of(|measured| measured.evaluation.median),
            pause_seconds: if train.checkpoints_async { staging } else { write_seconds },
            write_seconds,
            peak_flops: gpu.filter(|_| on_gpu).map(|gpu| gpu.peak_flops * f64::from(train.ranks)),
        }
    }

    fn depths(&self) -> Vec<u64> {
        let mut depths: Vec<u64> = self.points.iter().map(|measured| measured.point.layers).collect();
        depths.sort_unstable();
        depths.dedup();
        depths
    }
}

/// One block's share of what was measured.
fn block_seconds(sum: &Sum<'_>, config: &ModelConfig) -> BlockSeconds {
    let blocks = config.layers.max(1) as f64;
    let forward = sum.of(|measured| measured.evaluation.median) / blocks;
    let all = sum.of(|measured| measured.first_micro_batch.median) / blocks;
    BlockSeconds { forward, backward: (all - forward).max(0.0) }
}

fn base_bytes(spec: &JobSpec, config: &ModelConfig) -> f64 {
    let base = spec.base_plan(config);
    base.as_ref().and_then(|base| base.units.get(1)).map_or(0.0, |unit| unit.bytes as f64)
}

/// What `depth` asks for.
pub fn points_of(spec: &JobSpec, config: &ModelConfig, depth: Depth) -> Vec<Point> {
    match depth {
        Depth::Quick => points(spec, config),
        Depth::Full => vec![extrapolate::whole(spec, config)],
    }
}

/// Whether so many ranks at once fit the machine, by what they are predicted to need; else why not.
pub fn misfit(
    spec: &JobSpec,
    config: &ModelConfig,
    points: &[Point],
    ranks: u32,
    machine: Machine,
    memory_bytes: Option<u64>,
) -> Option<String> {
    let available = memory_bytes.filter(|_| !machine.on_gpu)?;
    let of_point = |point: &Point| {
        let (mut spec, mut config) = (spec.clone(), config.clone());
        config.layers = point.layers;
        (spec.train.recompute, spec.train.resident_blocks) = (point.recompute, point.resident_blocks);
        let plan = spec.shard_plan(&config).ok()?;
        Some(super::memory::of_rank(&spec, &config, &plan, machine).ok()?.needed_bytes)
    };
    let needed = points.iter().filter_map(of_point).max()?.saturating_mul(ranks.into());
    (needed > available).then(|| {
        format!(
            "{ranks} ranks at once would take {}, this machine has {}: measure with fewer tokens in a micro-batch, or \
             where the job will run",
            super::print::size(needed),
            super::print::size(available)
        )
    })
}
