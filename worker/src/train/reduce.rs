//! Gradients on their way to the shards: copied into a flat fp32 buffer, reduce-scattered, added.
//!
//! Two lanes, so that one block's gradients travel while the next block's are computed.

use tch::{Kind, Tensor};
use tunefleet_proto::shard_plan::{ShardPlan, Unit};

use super::units::{self, Shard};
use crate::comm::{Communicator, Error, Tag, Work};
use crate::model::numerics::Numerics;

/// The gradient path of one rank.
pub struct Reducer {
    /// Empty in a world of one, where gradients go straight into the shard.
    lanes: Vec<Lane>,
    next: usize,
}

struct Lane {
    /// `[world * n]`; the padding between parameters is zero.
    input: Tensor,
    /// Where the parameters lie that it held last: of a unit laid out otherwise, the padding differs.
    layout: Vec<(u64, u64)>,
    /// `[n]`, for sums that are added to what a shard holds already.
    output: Tensor,
    pending: Option<Pending>,
}

struct Pending {
    work: Box<dyn Work>,
    /// Where the output must be added, unless it was reduced into the shard directly.
    add_to: Option<Tensor>,
}

impl Reducer {
    /// Buffers for the largest block of `plan`.
    pub fn new(plan: &ShardPlan, numerics: Numerics) -> Self {
        let largest = plan.units.iter().skip(1).map(|u| u.elements).max().unwrap_or(0) as i64;
        let options = (Kind::Float, numerics.device);
        let lane = || Lane {
            input: Tensor::zeros([largest], options),
            layout: Vec::new(),
            output: Tensor::zeros([largest / i64::from(plan.world)], options),
            pending: None,
        };
        Reducer { lanes: if plan.world == 1 { Vec::new() } else { vec![lane(), lane()] }, next: 0 }
    }

    /// Takes one block's gradients, in plan order. `first` of a step replaces what the shard
    /// holds; later ones add.
    ///
    /// # Errors
    /// Whatever the communicator meets.
    pub fn start(
        &mut self,
        index: usize,
        unit: &Unit,
        grads: &[Tensor],
        shard: &Shard,
        first: bool,
        comm: &dyn Communicator,
    ) -> Result<(), Error> {
        if grads.is_empty() {
            return Ok(());
        }
        if self.lanes.is_empty() {
            for (mut into, grad) in units::views(unit, &shard.grad).into_iter().zip(grads) {
                if first {
                    into.copy_(grad);
                } else {
                    let _ = into.g_add_(grad);
                }
            }
            return Ok(());
        }
        let lane = &mut self.lanes[self.next];
        self.next = 1 - self.next;
        lane.join()?;
        let layout: Vec<_> = unit.parameters.iter().map(|slot| (slot.offset, slot.elements())).collect();
        if lane.layout != layout {
            let _ = lane.input.zero_();
            lane.layout = layout;
        }
        for (mut into, grad) in units::views(unit, &lane.input).into_iter().zip(grads) {
            into.copy_(grad);
        }
        let input = lane.input.narrow(0, 0, unit.elements as i64);
        let output =
            if first { shard.grad.shallow_clone() } else { lane.output.narrow(0, 0, shard.grad.size()[0]) };
        let tag = Tag { unit: Some(index as u32), what: "reduce" };
        let work = comm.reduce_scatter(&input, &output, tag)?;
        lane.pending = Some(Pending { work, add_to: (!first).then(|| shard.grad.shallow_clone()) });
        Ok(())
    }

    /// Waits until all gradients have arrived in their shards.
    ///
    /// # Errors
    /// Whatever the communicator meets.
    pub fn finish(&mut self) -> Result<(), Error> {
        // Older first.
        for offset in 0..self.lanes.len() {
            let index = (self.next + offset) % self.lanes.len();
            self.lanes[index].join()?;
        }
        Ok(())
    }
}

impl Lane {
    fn join(&mut self) -> Result<(), Error> {
        let Some(Pending { work, add_to }) = self.pending.take() else {
            return Ok(());
        };
        work.wait()?;
        if let Some(mut shard) = add_to {
            let _ = shard.g_add_(&self.output.narrow(0, 0, shard.size()[0]));
        }
        Ok(())
    }
}
