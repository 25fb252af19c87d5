//! A rank's fp32 state of what is trained, and gathered buffers that the walk computes with.
//!
//! A unit's gathered buffer holds its tensors end to end (see `proto::shard_plan` and
//! `proto::base_plan`), so that gathering needs no copy: each tensor is a view. Blocks share a fixed
//! set of buffers ("slots"): with two, one is computed with while the other fills. Resident blocks have
//! one of their own, and stay gathered until the weights change (see `proto::job::Residency`).

use tch::{Device, Kind, Tensor};
use tunefleet_proto::ids::Rank;
use tunefleet_proto::job::{Offload, Optimizer, Residency};
use tunefleet_proto::shard_plan::{ShardPlan, Unit};

use super::moments::Moments;
use crate::comm::{Communicator, Error, Tag, Work};
use crate::model::numerics::Numerics;

/// Index of the embeddings' unit in a plan; block `i` is unit `i + 1`.
pub const EMBED: usize = 0;

/// This rank's elements of one unit, all of one length.
pub struct Shard {
    /// Master weights, fp32; in main memory where they are offloaded.
    pub master: Tensor,
    /// Their copy in the dtype of the computation on its device, from which is gathered: where the master
    /// weights alone are offloaded.
    pub computed: Option<Tensor>,
    /// Moments of AdamW.
    pub moments: Moments,
    /// Gradient of the current step, fp32.
    pub grad: Tensor,
}

impl Shard {
    /// What is gathered from.
    pub fn source(&self) -> &Tensor {
        self.computed.as_ref().unwrap_or(&self.master)
    }

    /// The master weights have changed.
    pub fn refresh(&self) {
        if let Some(computed) = &self.computed {
            computed.shallow_clone().copy_(&self.master);
        }
    }
}

/// A stretch of a shard whose parameters all decay, or all do not.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run {
    /// First element.
    pub begin: i64,
    /// Past the last element.
    pub end: i64,
    /// Whether weight decay applies.
    pub decays: bool,
}

/// This rank's shards of `plan`, all zero; blocks are gathered in `gathered_kind`.
///
/// # Errors
/// Where memory of the optimizer's kind is not to be had.
pub fn shards(
    plan: &ShardPlan,
    rank: u32,
    numerics: Numerics,
    optimizer: Optimizer,
    offload: Offload,
    gathered_kind: Kind,
) -> Result<Vec<Shard>, tunefleet_kernels::Error> {
    let rank = Rank { rank, world: plan.world };
    let held = if offload == Offload::None { numerics.device } else { Device::Cpu };
    let shard = |unit: &Unit| {
        let len = unit.shard_elements(rank.world) as i64;
        let zeros = |kind, device| Tensor::zeros([len], (kind, device));
        let moments = Moments::zeros(len, &runs(unit, rank), held, optimizer)?;
        let master = zeros(Kind::Float, held);
        // From pinned memory a gather's copy is only queued.
        let pinned = held != numerics.device && len > 0;
        let master = if pinned { master.pin_memory(numerics.device) } else { master };
        let computed = (offload == Offload::Optimizer).then(|| zeros(gathered_kind, numerics.device));
        Ok(Shard { master, computed, moments, grad: zeros(Kind::Float, numerics.device) })
    };
    plan.units.iter().map(shard).collect()
}

/// The runs of a rank's shard of `unit`, neighbours joined: at most two where what decays comes first.
pub fn runs(unit: &Unit, rank: Rank) -> Vec<Run> {
    let mut runs: Vec<Run> = Vec::new();
    for piece in unit.pieces(rank.rank, rank.world) {
        let begin = piece.shard_offset as i64;
        let end = begin + (piece.range.end - piece.range.start) as i64;
        match runs.last_mut() {
            // The padding between two neighbours is zero and stays zero.
            Some(last) if last.decays == piece.slot.decays => last.end = end,
            _ => runs.push(Run { begin, end, decays: piece.slot.decays }),
        }
    }
    runs
}

/// A unit's parameters as views of its gathered (or gradient) buffer, in plan order.
pub fn views(unit: &Unit, buffer: &Tensor) -> Vec<Tensor> {
    unit.parameters
        .iter()
        .map(|slot| {
            let shape: Vec<i64> = slot.shape.iter().map(|&n| n as i64).collect();
            buffer.narrow(0, slot.offset as i64, slot.elements() as i64).view(shape.as_slice())
        })
        .collect()
}

/// Buffers that are gathered from all ranks' shards, unit by unit.
pub struct Gathered {
    embed: Slot,
    slots: Vec<Slot>,
    /// Of each block, its slot.
    slot_of: Vec<usize>,
    /// What a buffer is filled with before it is gathered into: a test that nothing stale is read.
    poison: Option<f64>,
}

struct Slot {
    buffer: Tensor,
    /// Unit whose current content the buffer holds or is being filled with.
    holds: Option<usize>,
    pending: Option<Box<dyn Work>>,
}

impl Gathered {
    /// Buffers of `elements` (one entry per unit, [`EMBED`] first) in `kind`. Alone, and where it has that
    /// dtype and device, a shard is its own gathered buffer.
    pub fn new(
        elements: &[u64],
        shards: &[&Tensor],
        world: u32,
        (kind, device): (Kind, Device),
        residency: &Residency,
        poison: bool,
    ) -> Self {
        let alone =
            |unit: usize| shards.get(unit).filter(|s| world == 1 && s.kind() == kind && s.device() == device);
        let slot = |buffer: Tensor| Slot { buffer, holds: None, pending: None };
        let own = |unit: usize, elements: u64| match alone(unit) {
            Some(shard) => slot(shard.shallow_clone()),
            None => slot(Tensor::zeros([elements as i64], (kind, device))),
        };
        let (embed, blocks) = elements.split_first().map_or((0, &[][..]), |(embed, rest)| (*embed, rest));
        // Shared slots have room for the largest block.
        let taking_turns = || blocks.iter().zip(&residency.resident).filter(|(_, resident)| !**resident);
        let largest = taking_turns().map(|(elements, _)| *elements).max().unwrap_or(0);
        let shared = residency.shared_slots.min(taking_turns().count());
        let mut slots: Vec<Slot> =
            (0..shared).map(|_| slot(Tensor::zeros([largest as i64], (kind, device)))).collect();
        let mut turn = 0;
        let mut slot_of = Vec::with_capacity(blocks.len());
        for (block, elements) in blocks.iter().enumerate() {
            if residency.resident.get(block).copied().unwrap_or(true) {
                slot_of.push(slots.len());
                slots.push(own(block + 1, *elements));
            } else {
                slot_of.push(turn % shared);
                turn += 1;
            }
        }
        // All bits set are no number in any of the dtypes.
        let poison_value = if kind == Kind::Uint8 { 255.0 } else { f64::NAN };
        Gathered {
            embed: own(EMBED, embed),
            slots,
            slot_of,
            poison: (poison && world > 1).then_some(poison_value),
        }
    }

    /// Starts to fill `unit`'s buffer from this rank's `shard` and its peers', unless it is current.
    ///
    /// # Errors
    /// Whatever the communicator refuses.
    pub fn start(&mut self, unit: usize, shard: &Tensor, comm: &dyn Communicator) -> Result<(), Error> {
        let poison = self.poison;
        let slot = self.slot(unit);
        if slot.holds == Some(unit) {
            return Ok(());
        }
        if let Some(work) = slot.pending.take() {
            work.wait()?;
        }
        slot.holds = Some(unit);
        let rank = comm.rank();
        let len = shard.size()[0];
        if len == 0 {
            return Ok(());
        }
        let buffer = slot.buffer.narrow(0, 0, len * i64::from(rank.world));
        if let Some(poison) = poison {
            let _ = buffer.shallow_clone().fill_(poison);
        }
        let own = buffer.narrow(0, i64::from(rank.rank) * len, len);
        if own.data_ptr() != shard.data_ptr() {
            // From pinned memory the copy is only queued.
            let there = shard.to_device_(own.device(), shard.kind(), true, false);
            own.shallow_clone().copy_(&there);
        }
        slot.pending = Some(comm.all_gather(&buffer, Tag { unit: Some(unit as u32), what: "gather" })?);
        Ok(())
    }

    /// The buffer of `unit`, once [`Gathered::start`] has filled it.
    ///
    /// # Errors
    /// Whatever the gather met.
    pub fn wait(&mut self, unit: usize) -> Result<&Tensor, Error> {
        let slot = self.slot(unit);
        debug_assert_eq!(slot.holds, Some(unit), "waiting for a gather that was not started");
        if let Some(work) = slot.pending.take() {
            work.wait()?;
        }
        Ok(&slot.buffer)
    }

    /// What the shards hold has changed: everything must be gathered anew.
    pub fn invalidate(&mut self) {
        self.embed.holds = None;
        for slot in &mut self.slots {
            slot.holds = None;
        }
    }

    fn slot(&mut self, unit: usize) -> &mut Slot {
        if unit == EMBED {
            return &mut self.embed;
        }
        &mut self.slots[self.slot_of[unit - 1]]
    }
}
