//! One block: its weights, and its forward pass with and without grad.

use tch::Tensor;
use tunefleet_proto::shard_plan::Slot;

use super::{MicroPosition, Walk};
use crate::model::attention::Sight;
use crate::model::block::{self, BlockParams, BlockShape};
use crate::model::rotary::Turns;
use crate::train::Error;
use crate::train::adapter::Frozen;
use crate::train::units;

/// A block's tensors in the dtype of products.
pub(super) struct BlockWeights {
    /// Empty where all weights are trained.
    base: Vec<Tensor>,
    trained: Vec<Tensor>,
}

/// A block whose forward pass ran with grad.
pub(super) struct Kept {
    pub x: Tensor,
    pub trained: Vec<Tensor>,
    pub y: Tensor,
}

/// Which way the walk goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Direction {
    Forward,
    Backward,
}

impl Walk<'_> {
    /// Block `i`'s weights; the gathers of the blocks ahead start behind it.
    pub(super) fn gathered_block(&mut self, i: usize, direction: Direction) -> Result<BlockWeights, Error> {
        crate::fault::point(crate::fault::Phase::Gather);
        let trained = self.gather_now(i + 1)?;
        let trained = match &self.frozen {
            None => self.numerics.for_products(trained),
            Some(_) => {
                let kind = self.numerics.product_kind;
                let narrow = |(slot, tensor): (&Slot, Tensor)| match slot.is_magnitude() {
                    true => tensor,
                    false => tensor.to_kind(kind),
                };
                self.plan.units[i + 1].parameters.iter().zip(trained).map(narrow).collect()
            }
        };
        let base = match &mut self.frozen {
            None => Vec::new(),
            Some(frozen) => tch::no_grad(|| frozen.base.block(i, self.mesh.shards))?,
        };
        self.start_gathers(i, direction)?;
        Ok(BlockWeights { base, trained })
    }

    /// Starts the gathers of the blocks that come after `i`.
    pub(super) fn start_gathers(&mut self, i: usize, direction: Direction) -> Result<(), Error> {
        let blocks = self.plan.units.len() - 1;
        for ahead in 1..=self.residency.ahead {
            let next = match direction {
                Direction::Forward => Some(i + ahead).filter(|next| *next < blocks),
                Direction::Backward => i.checked_sub(ahead),
            };
            let Some(next) = next else { break };
            let source = self.shards[next + 1].source();
            tch::no_grad(|| self.gathered.start(next + 1, source, self.mesh.shards))?;
            if let Some(frozen) = &mut self.frozen {
                frozen.base.start(next + 1, self.mesh.shards)?;
            }
        }
        Ok(())
    }

    pub(super) fn gather_now(&mut self, unit: usize) -> Result<Vec<Tensor>, Error> {
        tch::no_grad(|| self.gathered.start(unit, self.shards[unit].source(), self.mesh.shards))?;
        Ok(units::views(&self.plan.units[unit], self.gathered.wait(unit)?))
    }

    pub(super) fn forward_with_grad(
        &self,
        shape: &BlockShape,
        i: usize,
        weights: &BlockWeights,
        x: &Tensor,
        (turns, sight): (Option<&Turns>, Sight<'_>),
    ) -> Kept {
        let leaf = |t: &Tensor| t.detach().set_requires_grad(true);
        let x = leaf(&x.to_kind(self.numerics.product_kind));
        let trained: Vec<Tensor> = weights.trained.iter().map(leaf).collect();
        let y = block::forward(shape, &self.block_params(i, &weights.base, &trained, true), &x, turns, sight);
        Kept { x, trained, y }
    }

    /// The residual stream behind a block, without grad.
    pub(super) fn forward_block(
        &self,
        shape: &BlockShape,
        i: usize,
        weights: &BlockWeights,
        x: &Tensor,
        (turns, sight): (Option<&Turns>, Sight<'_>),
        training: bool,
    ) -> Tensor {
        let x = x.to_kind(self.numerics.product_kind);
        let params = self.block_params(i, &weights.base, &weights.trained, training);
        block::forward(shape, &params, &x, turns, sight).to_kind(self.numerics.kind)
    }

    fn block_params<'t>(
        &self,
        i: usize,
        base: &'t [Tensor],
        trained: &'t [Tensor],
        training: bool,
    ) -> BlockParams<'t> {
        match &self.frozen {
            None => self.layout.plain(trained),
            Some(Frozen { wiring, .. }) => {
                let adapted = |weight| wiring.adapted(i, weight, trained, training);
                self.layout.trained(&wiring.block(i, base, trained), adapted)
            }
        }
    }

    /// The first block that holds something trained, or that what is trained below lies behind.
    pub(super) fn lowest_trained_block(&self) -> usize {
        if self.trains_embeddings() {
            return 0;
        }
        let blocks = &self.plan.units[1..];
        blocks.iter().position(|unit| unit.elements > 0).unwrap_or(blocks.len())
    }

    pub(super) fn trains_embeddings(&self) -> bool {
        self.frozen.as_ref().is_none_or(|frozen| frozen.wiring.trains_embeddings())
    }

    /// Dropout masks are a function of the seed and the position alone: recomputing a block, or
    /// resuming a run, draws the same ones.
    pub(super) fn seed(&self, position: MicroPosition, unit: usize) -> i64 {
        let dropout = self.config.dropout;
        let of_pairs = self.frozen.as_ref().map_or(0.0, |frozen| frozen.wiring.dropout());
        if dropout.attention + dropout.embedding + dropout.residual + of_pairs == 0.0 {
            return 0;
        }
        let seed = self.seeds.at(position, self.mesh.world.rank().rank, unit);
        tch::manual_seed(seed);
        seed
    }
}
