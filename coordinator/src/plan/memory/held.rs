//! What a rank holds from its set-up to its end: shards, buffers, the frozen base.

use tunefleet_proto::base_plan::{BasePlan, BaseUnit};
use tunefleet_proto::job::{JobSpec, Offload, Optimizer, Residency};
use tunefleet_proto::shard_plan::ShardPlan;

use super::shape::{Machine, Shape, bytes_of};

/// Gradient buffers at once: one travels while the other is filled.
const REDUCE_LANES: f64 = 2.0;
/// Incoming parts of sums that the TCP communicator has at once, and buffers that it keeps.
const TCP_UNDER_WAY: f64 = 2.0;
const TCP_KEPT: usize = 8;

/// Bytes in the memory of the device where a rank computes.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Held {
    /// The frozen base's shard.
    pub base: f64,
    /// Its gathered units.
    pub base_gathered: f64,
    /// One block of it, dequantised.
    pub scratch: f64,
    /// fp32 weights.
    pub master: f64,
    /// Their copy that is gathered from, where they lie elsewhere.
    pub computed: f64,
    /// Adam's moments.
    pub moments: f64,
    /// Gradient shard, fp32.
    pub gradient: f64,
    /// Gathered units of what is trained.
    pub gathered: f64,
    /// Gradients between a block and the shards, and the embeddings' gradient, with the communicator's
    /// buffers.
    pub reducing: f64,
    /// What sums over copies of the weights keep between steps.
    pub sums: f64,
}

/// What `spec`'s ranks hold.
pub fn held(
    spec: &JobSpec,
    shape: &Shape,
    plan: &ShardPlan,
    base: Option<&BasePlan>,
    residency: &Residency,
) -> Held {
    let train = &spec.train;
    let Machine { on_gpu, .. } = shape.machine;
    let world = f64::from(plan.world);
    let alone = plan.world == 1;
    let offload = if on_gpu { train.offload } else { Offload::None };
    let shard = plan.shard_elements() as f64;
    let units: Vec<u64> = plan.units.iter().map(|unit| unit.elements).collect();
    let embed = units.first().copied().unwrap_or(0) as f64;
    let block = units.iter().skip(1).copied().max().unwrap_or(0) as f64;

    // What an adapter trains is gathered in fp32.
    let kind_bytes = if base.is_some() { 4.0 } else { shape.kind_bytes };
    let is_own = alone && kind_bytes == 4.0 && offload == Offload::None;
    let gathered = kind_bytes * if is_own { 0.0 } else { gathered_elements(&units, residency) };
    let (base_held, base_gathered, scratch) = match base {
        None => (0.0, 0.0, 0.0),
        Some(base) => {
            let units: Vec<u64> = base.units.iter().map(|unit| unit.padded_bytes(plan.world)).collect();
            let all: f64 = units.iter().map(|bytes| *bytes as f64).sum();
            let largest = base.units.iter().map(BaseUnit::quantized_elements).max().unwrap_or(0) as f64;
            let gathered = if alone { 0.0 } else { gathered_elements(&units, residency) };
            (all / world, gathered, shape.product_bytes * largest)
        }
    };

    let wire = bytes_of(train.reduce_precision) as f64;
    let over_tcp = |bytes: f64| if on_gpu { 0.0 } else { bytes };
    let reducing = match alone {
        true => 0.0,
        false => {
            REDUCE_LANES * (wire * block + 4.0 * block / world)
                + 4.0 * embed
                + over_tcp(TCP_UNDER_WAY * wire * block + 4.0 * embed)
        }
    };
    Held {
        base: base_held,
        base_gathered,
        scratch,
        master: if offload == Offload::None { 4.0 * shard } else { 0.0 },
        computed: if offload == Offload::Optimizer { shape.kind_bytes * shard } else { 0.0 },
        moments: if offload == Offload::None { moments(train.optimizer, shard, on_gpu) } else { 0.0 },
        gradient: 4.0 * shard,
        gathered,
        reducing,
        sums: sums(spec, plan, on_gpu),
    }
}

/// Sums over copies are fp32.
const SUMMED_BYTES: f64 = 4.0;

/// Of each block, what of a sum over copies stays until the update, beyond what is kept between steps.
pub fn sums_of_blocks(spec: &JobSpec, plan: &ShardPlan, on_gpu: bool) -> Vec<f64> {
    let copies = f64::from(spec.train.ranks / plan.world.max(1));
    if copies < 2.0 {
        return Vec::new();
    }
    let blocks = plan.units.len().saturating_sub(1);
    let of_unit = |(index, unit): (usize, &tunefleet_proto::shard_plan::Unit)| {
        let shard = unit.shard_elements(plan.world) as f64;
        // The last block's sum is the first one.
        let is_kept = blocks - 1 - index < TCP_KEPT;
        if on_gpu || is_kept { 0.0 } else { SUMMED_BYTES * shard / copies }
    };
    plan.units.iter().skip(1).enumerate().map(of_unit).collect()
}

/// What the TCP communicator has for sums over copies at any time.
fn sums(spec: &JobSpec, plan: &ShardPlan, on_gpu: bool) -> f64 {
    let copies = f64::from(spec.train.ranks / plan.world.max(1));
    if copies < 2.0 || on_gpu {
        return 0.0;
    }
    let mut shards = plan.units.iter().map(|unit| unit.shard_elements(plan.world) as f64);
    let embed = shards.next().unwrap_or(0.0);
    let block = shards.fold(0.0, f64::max);
    let blocks = plan.units.len().saturating_sub(1).min(TCP_KEPT) as f64;
    SUMMED_BYTES * (TCP_UNDER_WAY * block + embed + (blocks * block + embed) / copies)
}

/// Bytes of Adam's moments of `elements`, in the memory that they are computed in.
pub fn moments(optimizer: Optimizer, elements: f64, on_gpu: bool) -> f64 {
    match optimizer {
        Optimizer::AdamW => 8.0 * elements,
        // A byte each, and an fp32 scale for 256 of them.
        Optimizer::AdamW8bit => 2.0 * elements + elements / 32.0,
        // What does not fit a GPU stays in main memory.
        Optimizer::AdamWPaged => {
            if on_gpu {
                0.0
            } else {
                8.0 * elements
            }
        }
    }
}

/// The embeddings, every resident block, and a largest block for each shared slot.
fn gathered_elements(units: &[u64], residency: &Residency) -> f64 {
    let (embed, blocks) = units.split_first().map_or((0, &[][..]), |(embed, rest)| (*embed, rest));
    let kept = |resident: bool| {
        blocks
            .iter()
            .zip(&residency.resident)
            .filter(move |(_, is)| **is == resident)
            .map(|(units, _)| *units)
    };
    let shared = kept(false).max().unwrap_or(0) as f64 * residency.shared_slots as f64;
    embed as f64 + kept(true).map(|elements| elements as f64).sum::<f64>() + shared
}
