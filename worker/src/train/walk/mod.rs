//! The block walk: forward, loss and backward of one micro-batch, block by block, without
//! autograd hooks. The order of blocks is static, so it is written down once:
//!
//! ```text
//! forward, no grad:  for each block: wait gather[i]; start gather[i+1]; keep x_i; x_{i+1} = B_i(x_i)
//! loss:              final norm + chunked cross-entropy -> dx
//! backward:          last block to first: wait gather[i]; start gather[i-1]; recompute B_i(x_i)
//!                    with grad; gradients -> dx and the reducer
//! ```
//!
//! A gather is always started before the reduction that follows it in this order: on one communicator,
//! whose operations run one after the other, no gather waits behind a reduction of its own time.
//!
//! With an adapter the same walk goes over a frozen base: a block is dequantised into one scratch when
//! it is gathered, and only what is trained has gradients.
//!
//! Nothing in here waits for the device on the host.

/// One block: its weights, and its forward pass with and without grad.
mod blocks;
/// What stands before the first block and behind the last.
mod ends;
/// Loss and logits without gradients.
mod evaluate;

use tch::{Kind, Tensor};
use tunefleet_proto::job::{Precision, Recompute, Residency, Strategy, TrainSpec};
use tunefleet_proto::model::ModelConfig;
use tunefleet_proto::shard_plan::ShardPlan;

use super::Error;
use super::adapter::Frozen;
use super::reduce::{Part, Reducer};
use super::rng::Seeds;
use super::units::{EMBED, Gathered, Shard};
use crate::comm::Mesh;
use crate::model::block::{BlockLayout, BlockShape};
use crate::model::documents::Documents;
use crate::model::embed::Positions;
use crate::model::head;
use crate::model::numerics::Numerics;
use crate::model::rotary::{Rotary, Turns};
use blocks::{Direction, Kept};

/// Tokens and shifted targets of one forward pass, on the device.
pub struct Batch {
    /// `[B, T]`, int64.
    pub tokens_bt: Tensor,
    /// `[B, T]`, int64; [`head::IGNORED`] does not count.
    pub targets_bt: Tensor,
    /// Where documents lie that do not see each other; `None` where a row is one.
    pub documents: Option<Documents>,
}

impl Batch {
    /// A batch whose rows are one document each.
    pub fn new(tokens_bt: Tensor, targets_bt: Tensor) -> Self {
        Batch { tokens_bt, targets_bt, documents: None }
    }

    fn positions(&self) -> Positions<'_> {
        self.documents.as_ref().map_or(Positions::From(0), |d| Positions::Each(d.positions_bt()))
    }

    fn turns(&self, rotary: Option<&Rotary>) -> Option<Turns> {
        rotary.map(|rotary| rotary.turns(&self.tokens_bt, self.positions()))
    }
}

/// Choices of a walk that change memory and speed; of these, only the dtype of reductions changes the
/// result.
#[derive(Debug, Clone, Copy)]
pub struct WalkOptions {
    /// Blocks that are computed again in the backward pass.
    pub recompute: Recompute,
    /// Blocks that stay gathered until the update.
    pub resident_blocks: u32,
    /// Blocks that are gathered ahead.
    pub gather_ahead: u32,
    /// Dtype in which gradients travel.
    pub reduce_precision: Precision,
    /// Fill gather buffers with NaN before use: a test switch.
    pub poison: bool,
}

impl WalkOptions {
    /// Those of a job.
    pub fn of(spec: &TrainSpec) -> Self {
        WalkOptions {
            recompute: spec.recompute,
            resident_blocks: match spec.strategy {
                Strategy::ShardGradOp => u32::MAX,
                _ => spec.resident_blocks,
            },
            gather_ahead: spec.gather_ahead,
            reduce_precision: spec.reduce_precision,
            poison: false,
        }
    }

    /// What follows for `blocks` blocks, sharded over `shard_ranks`.
    pub fn residency(&self, shard_ranks: u32, blocks: usize) -> Residency {
        let resident = if shard_ranks == 1 { u32::MAX } else { self.resident_blocks };
        Residency::new(self.recompute, resident, self.gather_ahead, blocks)
    }
}

/// Where in the run a micro-batch stands; decides its dropout masks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MicroPosition {
    /// 1-based step.
    pub step: u64,
    /// 0-based micro-batch of the step.
    pub micro: u32,
    /// Micro-batches of the step.
    pub of: u32,
}

impl MicroPosition {
    fn part(self) -> Part {
        Part { first: self.micro == 0, last: self.micro + 1 == self.of }
    }
}

/// A model's shards on one rank, and the way through its blocks.
pub struct Walk<'a> {
    config: ModelConfig,
    layout: BlockLayout,
    rotary: Option<Rotary>,
    plan: ShardPlan,
    numerics: Numerics,
    mesh: Mesh<'a>,
    residency: Residency,
    poison: bool,
    seeds: Seeds,
    shards: Vec<Shard>,
    gathered: Gathered,
    reducer: Reducer,
    /// Full-size fp32 gradient of the embeddings' unit, reduced once per step.
    embed_grad: Tensor,
    head_scratch: head::Scratch,
    /// What stands beside what is trained; `None` where all weights are.
    frozen: Option<Frozen>,
}

impl<'a> Walk<'a> {
    /// A walk over `shards`, one per unit of `plan`, which is that of `mesh.shards`.
    pub fn new(
        config: ModelConfig,
        plan: ShardPlan,
        shards: Vec<Shard>,
        numerics: Numerics,
        mesh: Mesh<'a>,
        seeds: Seeds,
        options: WalkOptions,
    ) -> Self {
        let residency = options.residency(plan.world, plan.units.len() - 1);
        let (kind, poison) = (numerics.kind, options.poison);
        let gathered = gather_buffers(&plan, &shards, (kind, numerics), &residency, poison);
        let reducer = Reducer::new(&plan, numerics, options.reduce_precision);
        let embed_grad = if plan.world == 1 {
            shards[EMBED].grad.shallow_clone()
        } else {
            Tensor::zeros([plan.units[EMBED].elements as i64], (Kind::Float, numerics.device))
        };
        let head_scratch = head::Scratch::default();
        Walk {
            layout: BlockLayout::new(&config),
            rotary: Rotary::new(&config, numerics.device),
            config,
            plan,
            numerics,
            mesh,
            residency,
            poison,
            seeds,
            shards,
            gathered,
            reducer,
            embed_grad,
            head_scratch,
            frozen: None,
        }
    }

    /// The same walk over a frozen base. What is trained is little: it is gathered in fp32, in which
    /// magnitudes near 1 keep their places.
    pub fn over(self, frozen: Frozen) -> Self {
        let wide = (Kind::Float, self.numerics);
        let gathered = gather_buffers(&self.plan, &self.shards, wide, &self.residency, self.poison);
        Walk { frozen: Some(frozen), gathered, ..self }
    }

    /// The shards, one per unit.
    pub fn shards(&self) -> &[Shard] {
        &self.shards
    }

    /// The plan that the shards follow.
    pub fn plan(&self) -> &ShardPlan {
        &self.plan
    }

    /// Where and in which dtype the walk computes.
    pub fn numerics(&self) -> Numerics {
        self.numerics
    }

    /// The groups of the walk's collectives.
    pub fn mesh(&self) -> Mesh<'a> {
        self.mesh
    }

    /// The shards' weights have changed.
    pub fn invalidate(&mut self) {
        self.shards.iter().for_each(Shard::refresh);
        self.gathered.invalidate();
    }

    /// Prepares the first micro-batch of a step.
    ///
    /// # Errors
    /// Whatever the communicator refuses.
    pub fn begin_step(&mut self) -> Result<(), Error> {
        let _ = self.embed_grad.zero_();
        Ok(())
    }

    /// Forward, loss and backward. Gradients times `scale` (fp32 scalar on the device) are added
    /// to the step's. Returns the sum of the loss over counted targets (fp64 scalar on the device).
    ///
    /// # Errors
    /// Whatever a collective meets.
    pub fn train_micro_batch(
        &mut self,
        batch: &Batch,
        position: MicroPosition,
        scale: &Tensor,
    ) -> Result<Tensor, Error> {
        let shape = BlockShape::new(&self.config, true);
        let blocks = self.plan.units.len() - 1;
        // Below it nothing is trained: no gradient goes there.
        let lowest = self.lowest_trained_block();
        let documents = batch.documents.as_ref();
        let turns = tch::no_grad(|| batch.turns(self.rotary.as_ref()));
        let turns = turns.as_ref();
        let embed_params = self.gathered_embed()?;
        let (mut x, embed_mask) = tch::no_grad(|| self.embed(&embed_params, batch, position));

        let mut inputs: Vec<Tensor> = Vec::with_capacity(blocks);
        let mut kept: Vec<Option<Kept>> = Vec::with_capacity(blocks);
        for i in 0..blocks {
            let weights = self.gathered_block(i, Direction::Forward)?;
            let shape = shape.of_block(i).seeded(self.seed(position, i + 1));
            if i < lowest || self.residency.recomputed[i] {
                inputs.push(x.shallow_clone());
                kept.push(None);
                x = tch::no_grad(|| {
                    self.forward_block(&shape, i, &weights, &x, (turns, documents.into()), true)
                });
            } else {
                let run = self.forward_with_grad(&shape, i, &weights, &x, (turns, documents.into()));
                x = run.y.detach().to_kind(self.numerics.kind);
                inputs.push(run.x.shallow_clone());
                kept.push(Some(run));
            }
        }

        let (loss, mut dx) = self.loss_and_dx(&embed_params, &x, batch, scale)?;

        for i in (lowest..blocks).rev() {
            let run = match kept[i].take() {
                Some(run) => {
                    self.start_gathers(i, Direction::Backward)?;
                    // Its graph reads the frozen weights again, in the scratch where they were.
                    if let Some(frozen) = &mut self.frozen {
                        frozen.base.block(i, self.mesh.shards)?;
                    }
                    run
                }
                None => {
                    let weights = self.gathered_block(i, Direction::Backward)?;
                    let shape = shape.of_block(i).seeded(self.seed(position, i + 1));
                    self.forward_with_grad(&shape, i, &weights, &inputs[i], (turns, documents.into()))
                }
            };
            let mut leaves = vec![run.x.shallow_clone()];
            leaves.extend(run.trained.iter().map(Tensor::shallow_clone));
            // Nobody asks for the gradient of the lowest block's input, unless the embeddings do.
            let asked = usize::from(i == lowest && !self.trains_embeddings());
            crate::fault::point(crate::fault::Phase::Backward);
            let mut grads = tunefleet_kernels::autograd::grad(&run.y, &dx, &leaves[asked..])?;
            if asked == 0 {
                dx = grads.remove(0);
            }
            inputs.truncate(i);
            self.reducer.start(i + 1, &self.plan, &grads, &self.shards[i + 1], position.part(), self.mesh)?;
        }
        if self.trains_embeddings() {
            tch::no_grad(|| self.embed_backward(dx, embed_mask, batch));
        }
        Ok(loss)
    }

    /// Brings the step's gradients into the shards.
    ///
    /// # Errors
    /// Whatever a collective meets.
    pub fn finish_step(&mut self) -> Result<(), Error> {
        let (embed, grad) = (&self.plan.units[EMBED], &self.shards[EMBED].grad);
        self.reducer.reduce_embed(embed, &self.embed_grad, grad, self.mesh)?;
        self.reducer.finish(self.mesh)?;
        Ok(())
    }
}

fn gather_buffers(
    plan: &ShardPlan,
    shards: &[Shard],
    (kind, numerics): (Kind, Numerics),
    residency: &Residency,
    poison: bool,
) -> Gathered {
    let sizes: Vec<u64> = plan.units.iter().map(|unit| unit.elements).collect();
    let sources: Vec<&Tensor> = shards.iter().map(Shard::source).collect();
    Gathered::new(&sizes, &sources, plan.world, (kind, numerics.device), residency, poison)
}
