//! A rank's fp32 state, and the gathered weights that the walk computes with.
//!
//! A unit's gathered buffer holds its parameters end to end (see `proto::shard_plan`), so that
//! gathering needs no copy: each parameter is a view. Blocks share a fixed set of buffers
//! ("slots"); block `i` uses slot `i % slots`. With two slots, one is computed with while the
//! other fills; with one per block, all stay resident.

use tch::{Kind, Tensor};
use tunefleet_proto::shard_plan::{ShardPlan, Unit};

use crate::comm::{Communicator, Error, Tag, Work};
use crate::model::numerics::Numerics;

/// Index of the embeddings' unit in a plan; block `i` is unit `i + 1`.
pub const EMBED: usize = 0;

/// This rank's elements of one unit, all fp32 and of one length.
pub struct Shard {
    /// Master weights.
    pub master: Tensor,
    /// First moment of AdamW.
    pub exp_avg: Tensor,
    /// Second moment of AdamW.
    pub exp_avg_sq: Tensor,
    /// Gradient of the current step.
    pub grad: Tensor,
}

impl Shard {
    /// All zero.
    pub fn zeros(unit: &Unit, world: u32, numerics: Numerics) -> Self {
        let zeros = || Tensor::zeros([unit.shard_elements(world) as i64], (Kind::Float, numerics.device));
        Shard { master: zeros(), exp_avg: zeros(), exp_avg_sq: zeros(), grad: zeros() }
    }
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

/// The gathered weights of all units.
pub struct Gathered {
    embed: Slot,
    blocks: Vec<Slot>,
    /// Fill a buffer with NaN before it is gathered into: a test that nothing stale is read.
    poison: bool,
}

struct Slot {
    buffer: Tensor,
    /// Unit whose current weights the buffer holds or is being filled with.
    holds: Option<usize>,
    pending: Option<Box<dyn Work>>,
}

impl Gathered {
    /// Buffers for `plan`, with `slots` for the blocks.
    pub fn new(plan: &ShardPlan, shards: &[Shard], numerics: Numerics, slots: usize, poison: bool) -> Self {
        let slot = |unit: usize, elements: u64| Slot {
            // Alone and in fp32 the master weights are the gathered weights.
            buffer: if plan.world == 1 && numerics.kind == Kind::Float {
                shards[unit].master.shallow_clone()
            } else {
                Tensor::zeros([elements as i64], (numerics.kind, numerics.device))
            },
            holds: None,
            pending: None,
        };
        let blocks = plan.units.len() - 1;
        let slots = if plan.world == 1 { blocks } else { slots.min(blocks) };
        Gathered {
            embed: slot(EMBED, plan.units[EMBED].elements),
            blocks: (1..=slots).map(|unit| slot(unit, plan.units[unit].elements)).collect(),
            poison: poison && plan.world > 1,
        }
    }

    /// Starts to fill `unit`'s buffer, unless it is current already.
    ///
    /// # Errors
    /// Whatever the communicator refuses.
    pub fn start(&mut self, unit: usize, shard: &Shard, comm: &dyn Communicator) -> Result<(), Error> {
        let poison = self.poison;
        let slot = self.slot(unit);
        if slot.holds == Some(unit) {
            return Ok(());
        }
        if let Some(work) = slot.pending.take() {
            work.wait()?;
        }
        if poison {
            let _ = slot.buffer.fill_(f64::NAN);
        }
        let len = shard.master.size()[0];
        let own = slot.buffer.narrow(0, i64::from(comm.rank().rank) * len, len);
        if own.data_ptr() != shard.master.data_ptr() {
            own.shallow_clone().copy_(&shard.master);
        }
        let tag = Tag { unit: Some(unit as u32), what: "gather" };
        slot.pending = Some(comm.all_gather(&slot.buffer, tag)?);
        slot.holds = Some(unit);
        Ok(())
    }

    /// The parameters of `unit`, once [`Gathered::start`] has filled its buffer.
    ///
    /// # Errors
    /// Whatever the gather met.
    pub fn wait(&mut self, unit: usize, plan: &Unit) -> Result<Vec<Tensor>, Error> {
        let slot = self.slot(unit);
        debug_assert_eq!(slot.holds, Some(unit), "waiting for a gather that was not started");
        if let Some(work) = slot.pending.take() {
            work.wait()?;
        }
        Ok(views(plan, &slot.buffer))
    }

    /// The weights have changed: everything must be gathered anew.
    pub fn invalidate(&mut self) {
        self.embed.holds = None;
        for slot in &mut self.blocks {
            slot.holds = None;
        }
    }

    fn slot(&mut self, unit: usize) -> &mut Slot {
        if unit == EMBED {
            return &mut self.embed;
        }
        let index = (unit - 1) % self.blocks.len();
        &mut self.blocks[index]
    }
}
