//! The memory of one rank, item by item, as the block walk of the worker allocates it.
//!
//! Each file mirrors a file of the worker and says which; a change there is a change here. What libtorch
//! does inside one operation is counted where it allocates tensors. `tests/tests/it/plan_measure.rs` compares
//! the sum with what an allocator counted.

mod block;
mod head;
mod held;
mod host;
mod rule_of_thumb;
mod shape;
mod walk;

use serde::Serialize;
use tunefleet_proto::job::{JobSpec, Residency};
use tunefleet_proto::model::ModelConfig;
use tunefleet_proto::shard_plan::ShardPlan;

use block::BlockPass;
use held::Held;
pub use host::Host;
pub use rule_of_thumb::rule_of_thumb;
pub use shape::{Machine, Shape, bytes_of};
use walk::{Live, Surroundings};

/// Program, libraries, allocator; a CUDA context with its kernels takes more. Measured, rounded up.
const ALLOWANCE_CPU: u64 = 400 << 20;
const ALLOWANCE_CUDA: u64 = 3 << 29;
/// Bytes that a checkpoint has of each fp32 element: its weight and both moments.
pub const CHECKPOINT_BYTES: u64 = 12;

/// One item.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Item {
    /// What it holds.
    pub what: &'static str,
    /// Its size.
    pub bytes: u64,
}

/// What one rank needs; every rank of the first copy of the weights needs the same, the others no more.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Needs {
    /// When it needs most.
    pub when: &'static str,
    /// By item, at that moment, in the memory of the device where it computes.
    pub items: Vec<Item>,
    /// Sum of the items.
    pub needed_bytes: u64,
    /// What of it are tensors: all but the allowance.
    pub tensor_bytes: u64,
    /// Main memory of a GPU rank.
    pub host: Option<Host>,
}

/// What a rank of `spec` needs on `machine`.
///
/// # Errors
/// An adapter's settings that do not fit the model.
pub fn of_rank(
    spec: &JobSpec,
    config: &ModelConfig,
    plan: &ShardPlan,
    machine: Machine,
) -> Result<Needs, tunefleet_proto::adapter::Error> {
    let train = &spec.train;
    let shape = Shape::new(spec, config, machine);
    let adapter = spec.adapter_plan(config)?;
    let pairs_dropout = spec.adapter.as_ref().map_or(0.0, |adapter| adapter.lora.dropout);
    let adapter = adapter.as_ref().map(|plan| (plan, pairs_dropout));
    let base = spec.base_plan(config);
    let residency = Residency::of(train, plan.units.len().saturating_sub(1));

    let held = held::held(spec, &shape, plan, base.as_ref(), &residency);
    let passes = passes(&shape, config, adapter);
    let (embed, layout) = (config.embed_parameters(), config.embed_layout());
    let trains = |at: usize| {
        adapter.is_none_or(|(plan, _)| embed.get(at).is_some_and(|own| plan.saved_embed.contains(own)))
    };
    let trains_embeddings = trains(layout.tokens) || layout.positions.is_some_and(trains);
    let has_elements = plan.units.iter().skip(1).position(|unit| unit.elements > 0);
    let around = Surroundings {
        loss: head::loss(&shape, trains(layout.head)),
        lowest: if trains_embeddings { 0 } else { has_elements.unwrap_or(passes.len()) },
        trains_embeddings,
        sum_of_block: held::sums_of_blocks(spec, plan, machine.on_gpu),
    };
    let peak = walk::peak(&shape, &residency, &passes, &around);

    let scratch = head::scratch(&shape);
    // Tokens and targets, int64, of all micro-batches of a step.
    let batches = 16.0 * shape.tokens * f64::from(train.accumulate_micro_batches) + shape.turns(config);
    let mut step = Moment { when: peak.when, live: peak.live, batches, staged: 0.0 };
    let mut moments = Vec::new();
    let shard = plan.shard_elements() as f64;
    if !machine.on_gpu && train.checkpoints_async {
        let staged = CHECKPOINT_BYTES as f64 * shard;
        if train.saves_on_the_way() {
            step.staged = staged;
        }
        moments.push(Moment { when: "a checkpoint", live: Live::default(), batches: 0.0, staged });
    }
    moments.push(step);
    let largest = moments.into_iter().max_by(|a, b| a.bytes().total_cmp(&b.bytes())).unwrap_or(step);

    let items = items(&held, scratch, &largest, spec, machine);
    let needed_bytes = items.iter().fold(0u64, |sum, item| sum.saturating_add(item.bytes));
    let allowance = allowance(machine);
    let host = machine.on_gpu.then(|| Host::new(spec, plan, batches));
    Ok(Needs { when: largest.when, items, needed_bytes, tensor_bytes: needed_bytes - allowance, host })
}

/// Every block's pass; without an adapter all blocks are alike.
fn passes(
    shape: &Shape,
    config: &ModelConfig,
    adapter: Option<(&tunefleet_proto::adapter::AdapterPlan, f64)>,
) -> Vec<BlockPass> {
    if adapter.is_none() {
        return vec![block::pass(shape, config, 0, None); config.layers as usize];
    }
    (0..config.layers).map(|block| block::pass(shape, config, block, adapter)).collect()
}

/// A moment of a run.
#[derive(Debug, Clone, Copy)]
struct Moment {
    when: &'static str,
    live: Live,
    batches: f64,
    staged: f64,
}

impl Moment {
    fn bytes(&self) -> f64 {
        self.live.bytes() + self.batches + self.staged
    }
}

fn items(held: &Held, scratch: f64, moment: &Moment, spec: &JobSpec, machine: Machine) -> Vec<Item> {
    use tunefleet_proto::job::Optimizer;
    let moments = match spec.train.optimizer {
        Optimizer::AdamW => "Adam moments, fp32",
        Optimizer::AdamW8bit => "Adam moments, 8 bits",
        Optimizer::AdamWPaged => "Adam moments, paged",
    };
    let Live { inputs, graphs, passing, sums } = moment.live;
    let items = [
        ("frozen base", held.base),
        ("frozen base, gathered", held.base_gathered),
        ("frozen base, one block dequantised", held.scratch),
        ("master weights, fp32", held.master),
        ("weights to gather from", held.computed),
        (moments, held.moments),
        ("gradient shard, fp32", held.gradient),
        ("gathered weights", held.gathered),
        ("gradients being reduced", held.reducing),
        ("sums over copies of the weights", held.sums + sums),
        ("gradients of logits", scratch),
        ("tokens and targets", moment.batches),
        ("block inputs", inputs),
        ("activations kept for the backward pass", graphs),
        (at_the_peak(moment.when), passing),
        ("copy of the state for a checkpoint", moment.staged),
        ("program and libraries (allowance)", allowance(machine) as f64),
    ];
    let items = items.into_iter().map(|(what, bytes)| Item { what, bytes: bytes as u64 });
    items.filter(|item| item.bytes > 0).collect()
}

/// The line of what a moment itself takes.
fn at_the_peak(when: &'static str) -> &'static str {
    match when {
        "the loss" => "the loss and its gradient",
        "the forward pass" => "a block's forward pass",
        other => other,
    }
}

fn allowance(machine: Machine) -> u64 {
    if machine.on_gpu { ALLOWANCE_CUDA } else { ALLOWANCE_CPU }
}

#[cfg(test)]
mod tests;
