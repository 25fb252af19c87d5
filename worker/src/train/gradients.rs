//! A check that gradients reach all of an adapter's tensors: frameworks have trained two of two hundred
//! without a word.

use tch::{Device, Kind, Tensor};
use tunefleet_proto::ids::Rank;
use tunefleet_proto::shard_plan::ShardPlan;

use super::Error;
use super::units::Shard;
use crate::comm::{Communicator, Tag};

/// Which steps are looked at: the first, and the first after `B` has moved.
#[derive(Debug, Clone, Copy, Default)]
pub struct Checks {
    first: bool,
    all: bool,
    moved: bool,
}

impl Checks {
    /// Those of a run that begins here, or goes on after `B` has `moved`.
    pub fn new(moved: bool) -> Self {
        Checks { moved, ..Checks::default() }
    }

    /// Whether the next step will be looked at.
    pub fn are_due(&self) -> bool {
        !self.first || self.moved && !self.all
    }

    /// What this step's gradients must be, where it is looked at.
    pub fn due(&mut self) -> Option<Expected> {
        let first = !std::mem::replace(&mut self.first, true);
        if self.moved && !self.all {
            self.all = true;
            return Some(Expected::MovingAll);
        }
        first.then_some(Expected::MovingB)
    }

    /// An update was made. Warm-up begins with a rate of 0, which moves nothing.
    pub fn updated(&mut self, learning_rate: f64) {
        self.moved |= learning_rate > 0.0;
    }
}

/// What a look at the gradients expects.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Expected {
    /// `B` begins at zero, so `A`'s gradient is zero as well; `B`'s is not.
    MovingB,
    /// `B` has moved: every pair's gradients are not zero.
    MovingAll,
}

/// Looks at the gradients that the shards hold, tensor by tensor: all finite, and none zero that must
/// not be. Waits for the device: for the first steps only. Collective.
///
/// # Errors
/// [`Error::Gradient`] with the first tensor that is not as it must be.
pub fn check(
    plan: &ShardPlan,
    shards: &[Shard],
    comm: &dyn Communicator,
    step: u64,
    expected: Expected,
) -> Result<(), Error> {
    let Rank { rank, world } = comm.rank();
    let mut sums = Vec::new();
    let mut slots = Vec::new();
    for (unit, shard) in plan.units.iter().zip(shards) {
        let pieces = unit.pieces(rank, world);
        for slot in &unit.parameters {
            let own = pieces.iter().find(|piece| piece.slot.name == slot.name);
            let sum = match own {
                None => Tensor::zeros([], (Kind::Double, shard.grad.device())),
                Some(piece) => {
                    let len = (piece.range.end - piece.range.start) as i64;
                    shard
                        .grad
                        .narrow(0, piece.shard_offset as i64, len)
                        .to_kind(Kind::Double)
                        .square()
                        .sum(None)
                }
            };
            sums.push(sum);
            slots.push(slot);
        }
    }
    if sums.is_empty() {
        return Ok(());
    }
    let sums = Tensor::stack(&sums, 0);
    comm.all_reduce(&sums, Tag { unit: None, what: "gradient check" })?.wait()?;
    let sums = Vec::<f64>::try_from(sums.to_device(Device::Cpu)).unwrap_or_default();
    for (slot, sum) in slots.iter().zip(sums) {
        let must_move = slot.name.ends_with(".lora_B.weight")
            || expected == Expected::MovingAll && slot.name.ends_with(".lora_A.weight");
        let fault = match () {
            () if !sum.is_finite() => "is not finite",
            () if must_move && sum == 0.0 => "is zero throughout: nothing would be learnt there",
            () => continue,
        };
        return Err(Error::Gradient { step, tensor: slot.hf_name.clone(), fault });
    }
    Ok(())
}
