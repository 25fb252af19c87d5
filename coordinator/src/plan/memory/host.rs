//! Main memory of GPU ranks: what is offloaded, what is staged for a checkpoint, what is pinned.

use serde::Serialize;
use tunefleet_proto::job::{JobSpec, Offload, Optimizer};
use tunefleet_proto::shard_plan::ShardPlan;

use super::held;
use super::{CHECKPOINT_BYTES, Item};

/// Ranks of one machine, where the machines are not known: GPUs come in eights.
const RANKS_OF_A_MACHINE: u32 = 8;
/// A process with libtorch's CUDA libraries; assumed, not measured.
const ALLOWANCE: u64 = 2 << 30;

/// Main memory of a GPU rank, and of the ranks that share a machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Host {
    /// By item.
    pub items: Vec<Item>,
    /// Sum of the items of a rank that writes checkpoints.
    pub rank_bytes: u64,
    /// Ranks of one machine.
    pub ranks: u32,
    /// All of them together.
    pub machine_bytes: u64,
}

impl Host {
    /// Of a rank of `spec`; `batches` are the bytes of a step's tokens and targets.
    pub fn new(spec: &JobSpec, plan: &ShardPlan, batches: f64) -> Self {
        let train = &spec.train;
        let shard = plan.shard_elements() as f64;
        let units = plan.units.iter().map(|unit| unit.shard_elements(plan.world) as f64);
        let unit = units.fold(0.0, f64::max);
        let offloaded = train.offload != Offload::None;
        let on = |yes: bool, bytes: f64| if yes { bytes as u64 } else { 0 };
        let paged = !offloaded && train.optimizer == Optimizer::AdamWPaged;
        let staged = on(train.checkpoints_async, CHECKPOINT_BYTES as f64 * shard);
        let item = |what, bytes| Item { what, bytes };
        let items = vec![
            item("copy of the state for a checkpoint, pinned", staged),
            item("master weights, fp32, pinned", on(offloaded, 4.0 * shard)),
            item("Adam moments", on(offloaded, held::moments(train.optimizer, shard, false))),
            item("Adam moments, paged (at most)", on(paged, 8.0 * shard)),
            item("gradients of one unit on their way", on(offloaded, 4.0 * unit)),
            // Where nothing is staged, one unit at a time is brought over to be written.
            item("one unit being written", on(!train.checkpoints_async, CHECKPOINT_BYTES as f64 * unit)),
            item("tokens and targets, pinned", batches as u64),
            item("program and libraries (assumed)", ALLOWANCE),
        ];
        let items: Vec<Item> = items.into_iter().filter(|item| item.bytes > 0).collect();
        let rank_bytes = items.iter().fold(0u64, |sum, item| sum.saturating_add(item.bytes));
        let elsewhere = spec.workers.coordinator.is_some();
        let ranks = if elsewhere { train.ranks.min(RANKS_OF_A_MACHINE) } else { train.ranks };
        // One copy of the weights is written.
        let writing = ranks.min(train.shard_ranks);
        let others = rank_bytes.saturating_sub(staged).saturating_mul(ranks.saturating_sub(writing).into());
        let machine_bytes = rank_bytes.saturating_mul(writing.into()).saturating_add(others);
        Host { items, rank_bytes, ranks, machine_bytes }
    }
}
