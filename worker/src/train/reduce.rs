//! Gradients on their way to the shards: copied into a flat buffer, reduce-scattered, added; and where
//! there are several copies of the weights, added up over these.
//!
//! Two lanes, so that one block's gradients travel while the next block's are computed. Sums over copies
//! begin with the last micro-batch, as soon as a shard's own gradient is complete.

use tch::{Kind, Tensor};
use tunefleet_kernels::fused;
use tunefleet_proto::job::Precision;
use tunefleet_proto::shard_plan::{ShardPlan, Unit};

use super::Error;
use super::units::{self, EMBED, Shard};
use crate::comm::{Mesh, Tag, Work};
use crate::model::numerics::Numerics;

/// Where a micro-batch stands in its step.
#[derive(Debug, Clone, Copy)]
pub struct Part {
    /// Its gradients replace what shards hold.
    pub first: bool,
    /// Nothing is added after them.
    pub last: bool,
}

/// The gradient path of one rank.
pub struct Reducer {
    /// Empty where a shard is the whole unit: gradients go straight into it.
    lanes: Vec<Lane>,
    next: usize,
    /// Sums over the copies, of the step's last micro-batch.
    copies: Vec<Box<dyn Work>>,
}

struct Lane {
    /// `[world * n]`; the padding between parameters is zero.
    input: Tensor,
    /// Where the parameters lie that it held last: of a unit laid out otherwise, the padding differs.
    layout: Vec<(u64, u64)>,
    /// `[n]`, fp32, for sums that are added to what a shard holds already.
    output: Tensor,
    pending: Option<Pending>,
}

struct Pending {
    work: Box<dyn Work>,
    unit: usize,
    grad: Tensor,
    part: Part,
}

impl Reducer {
    /// Buffers for the largest block of `plan`.
    pub fn new(plan: &ShardPlan, numerics: Numerics, precision: Precision) -> Self {
        let largest = plan.units.iter().skip(1).map(|u| u.elements).max().unwrap_or(0) as i64;
        let kind = match precision {
            Precision::Fp32 => Kind::Float,
            Precision::Bf16 => Kind::BFloat16,
        };
        let lane = || Lane {
            input: Tensor::zeros([largest], (kind, numerics.device)),
            layout: Vec::new(),
            output: Tensor::zeros([largest / i64::from(plan.world)], (Kind::Float, numerics.device)),
            pending: None,
        };
        let lanes = if plan.world == 1 { Vec::new() } else { vec![lane(), lane()] };
        Reducer { lanes, next: 0, copies: Vec::new() }
    }

    /// Takes the gradients of one block of a micro-batch, in plan order.
    ///
    /// # Errors
    /// Whatever the communicator meets.
    pub fn start(
        &mut self,
        index: usize,
        plan: &ShardPlan,
        grads: &[Tensor],
        shard: &Shard,
        part: Part,
        mesh: Mesh<'_>,
    ) -> Result<(), Error> {
        crate::fault::point(crate::fault::Phase::Reduce);
        if grads.is_empty() {
            return Ok(());
        }
        let unit = &plan.units[index];
        if self.lanes.is_empty() {
            fused::accumulate(&units::views(unit, &shard.grad), grads, part.first)?;
            return self.sum_copies(index, &shard.grad, part, mesh);
        }
        let turn = self.next;
        self.next = 1 - turn;
        self.join(turn, mesh)?;
        let lane = &mut self.lanes[turn];
        let layout: Vec<_> = unit.parameters.iter().map(|slot| (slot.offset, slot.elements())).collect();
        if lane.layout != layout {
            let _ = lane.input.zero_();
            lane.layout = layout;
        }
        fused::accumulate(&units::views(unit, &lane.input), grads, true)?;
        let input = lane.input.narrow(0, 0, unit.elements as i64);
        let grad = shard.grad.shallow_clone();
        let output = if part.first { grad.shallow_clone() } else { lane.output.narrow(0, 0, grad.size()[0]) };
        let tag = Tag { unit: Some(index as u32), what: "reduce" };
        let work = mesh.shards.reduce_scatter(&input, &output, tag)?;
        lane.pending = Some(Pending { work, unit: index, grad, part });
        Ok(())
    }

    /// Reduces the embeddings' gradient, which was added up over the step.
    ///
    /// # Errors
    /// Whatever the communicator meets.
    pub fn reduce_embed(
        &mut self,
        unit: &Unit,
        whole: &Tensor,
        grad: &Tensor,
        mesh: Mesh<'_>,
    ) -> Result<(), Error> {
        if unit.elements == 0 {
            return Ok(());
        }
        if !self.lanes.is_empty() {
            let tag = Tag { unit: Some(EMBED as u32), what: "reduce" };
            mesh.shards.reduce_scatter(whole, grad, tag)?.wait()?;
        }
        self.sum_copies(EMBED, grad, Part { first: true, last: true }, mesh)
    }

    /// Waits until all gradients have arrived in their shards.
    ///
    /// # Errors
    /// Whatever the communicator meets.
    pub fn finish(&mut self, mesh: Mesh<'_>) -> Result<(), Error> {
        // Older first.
        for offset in 0..self.lanes.len() {
            self.join((self.next + offset) % self.lanes.len(), mesh)?;
        }
        for work in self.copies.drain(..) {
            work.wait()?;
        }
        Ok(())
    }

    fn join(&mut self, lane: usize, mesh: Mesh<'_>) -> Result<(), Error> {
        let lane = &mut self.lanes[lane];
        let Some(Pending { work, unit, mut grad, part }) = lane.pending.take() else {
            return Ok(());
        };
        work.wait()?;
        if !part.first {
            let _ = grad.g_add_(&lane.output.narrow(0, 0, grad.size()[0]));
        }
        self.sum_copies(unit, &grad, part, mesh)
    }

    /// Starts the sum of a shard's gradient over the copies, when it is complete: in fp32, once a step.
    fn sum_copies(&mut self, unit: usize, grad: &Tensor, part: Part, mesh: Mesh<'_>) -> Result<(), Error> {
        let Some(replicas) = mesh.replicas.filter(|_| part.last) else { return Ok(()) };
        let tag = Tag { unit: Some(unit as u32), what: "reduce over copies" };
        self.copies.push(replicas.all_reduce(grad, tag)?);
        Ok(())
    }
}
