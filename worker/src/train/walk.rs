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
//! With an adapter the same walk goes over a frozen base: a block is dequantised into one scratch when
//! it is gathered, and only what is trained has gradients.
//!
//! Nothing in here waits for the device on the host.

use tch::{Kind, Tensor};
use tunefleet_proto::model::ModelConfig;
use tunefleet_proto::shard_plan::{ShardPlan, Slot};

use super::Error;
use super::adapter::Frozen;
use super::reduce::Reducer;
use super::rng::Seeds;
use super::units::{self, EMBED, Gathered, Shard};
use crate::comm::{Communicator, Tag};
use crate::model::block::{self, BlockParams, BlockShape};
use crate::model::embed;
use crate::model::head::{self, HeadParams};
use crate::model::numerics::Numerics;

/// Tokens and shifted targets of one forward pass, on the device.
pub struct Batch {
    /// `[B, T]`, int64.
    pub tokens_bt: Tensor,
    /// `[B, T]`, int64; [`head::IGNORED`] does not count.
    pub targets_bt: Tensor,
}

/// Choices of a walk that do not change its result.
#[derive(Debug, Clone, Copy)]
pub struct WalkOptions {
    /// Recompute blocks in the backward pass instead of keeping their activations.
    pub recompute: bool,
    /// Fill gather buffers with NaN before use: a test switch.
    pub poison: bool,
}

/// Where in the run a micro-batch stands; decides its dropout masks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MicroPosition {
    /// 1-based step.
    pub step: u64,
    /// 0-based micro-batch of the step.
    pub micro: u32,
}

/// A model's shards on one rank, and the way through its blocks.
pub struct Walk<'a> {
    config: ModelConfig,
    plan: ShardPlan,
    numerics: Numerics,
    comm: &'a dyn Communicator,
    options: WalkOptions,
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

/// A block's tensors in the dtype of products.
struct BlockWeights {
    /// Empty where all weights are trained.
    base: Vec<Tensor>,
    trained: Vec<Tensor>,
}

/// The head's gradients, of what is trained.
struct HeadGrads<'t> {
    norm_weight: Option<&'t Tensor>,
    norm_bias: Option<&'t Tensor>,
    weight_vd: Option<&'t Tensor>,
}

/// A block whose forward pass ran with grad.
struct Kept {
    x: Tensor,
    trained: Vec<Tensor>,
    y: Tensor,
}

impl<'a> Walk<'a> {
    /// A walk over `shards`, one per unit of `plan`.
    pub fn new(
        config: ModelConfig,
        plan: ShardPlan,
        shards: Vec<Shard>,
        numerics: Numerics,
        comm: &'a dyn Communicator,
        seeds: Seeds,
        options: WalkOptions,
    ) -> Self {
        // Without recompute the graphs refer to the gathered weights until the backward pass.
        let slots = if options.recompute { 2 } else { plan.units.len() };
        let sizes: Vec<u64> = plan.units.iter().map(|unit| unit.elements).collect();
        let masters: Vec<&Tensor> = shards.iter().map(|shard| &shard.master).collect();
        let computed = (numerics.kind, numerics.device);
        let gathered = Gathered::new(&sizes, &masters, plan.world, computed, slots, options.poison);
        let reducer = Reducer::new(&plan, numerics);
        let embed_grad = if plan.world == 1 {
            shards[EMBED].grad.shallow_clone()
        } else {
            Tensor::zeros([plan.units[EMBED].elements as i64], (Kind::Float, numerics.device))
        };
        let head_scratch = head::Scratch::default();
        Walk {
            config,
            plan,
            numerics,
            comm,
            options,
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
        let sizes: Vec<u64> = self.plan.units.iter().map(|unit| unit.elements).collect();
        let masters: Vec<&Tensor> = self.shards.iter().map(|shard| &shard.master).collect();
        let wide = (Kind::Float, self.numerics.device);
        let (world, WalkOptions { recompute, poison }) = (self.plan.world, self.options);
        let slots = if recompute { 2 } else { self.plan.units.len() };
        let gathered = Gathered::new(&sizes, &masters, world, wide, slots, poison);
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

    /// The communicator of the walk's collectives.
    pub fn comm(&self) -> &'a dyn Communicator {
        self.comm
    }

    /// The shards' weights have changed.
    pub fn invalidate(&mut self) {
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
        let embed_params = self.gathered_embed()?;
        let (mut x, embed_mask) = tch::no_grad(|| self.embed(&embed_params, batch, position));

        let mut inputs: Vec<Tensor> = Vec::with_capacity(blocks);
        let mut kept: Vec<Option<Kept>> = Vec::with_capacity(blocks);
        for i in 0..blocks {
            let weights = self.gathered_block(i, i + 1)?;
            self.seed(position, i + 1);
            // The last block's backward pass comes next: recomputing it would be for nothing.
            if i < lowest || self.options.recompute && i + 1 < blocks {
                inputs.push(x.shallow_clone());
                kept.push(None);
                x = tch::no_grad(|| self.forward_block(&shape, i, &weights, &x, true));
            } else {
                let run = self.forward_with_grad(&shape, i, &weights, &x);
                x = run.y.detach().to_kind(self.numerics.kind);
                inputs.push(run.x.shallow_clone());
                kept.push(Some(run));
            }
        }

        let (loss, mut dx) = self.loss_and_dx(&embed_params, &x, batch, scale)?;

        for i in (lowest..blocks).rev() {
            let run = match kept[i].take() {
                Some(run) => {
                    // Its graph reads the frozen weights again, in the scratch where they were.
                    if let Some(frozen) = &mut self.frozen {
                        frozen.base.block(i, self.comm)?;
                    }
                    run
                }
                None => {
                    let weights = self.gathered_block(i, i.wrapping_sub(1))?;
                    self.seed(position, i + 1);
                    self.forward_with_grad(&shape, i, &weights, &inputs[i])
                }
            };
            let mut leaves = vec![run.x.shallow_clone()];
            leaves.extend(run.trained.iter().map(Tensor::shallow_clone));
            // Nobody asks for the gradient of the lowest block's input, unless the embeddings do.
            let asked = usize::from(i == lowest && !self.trains_embeddings());
            let mut grads = tunefleet_kernels::autograd::grad(&run.y, &dx, &leaves[asked..])?;
            if asked == 0 {
                dx = grads.remove(0);
            }
            inputs.truncate(i);
            let unit = i + 1;
            self.reducer.start(
                unit,
                &self.plan.units[unit],
                &grads,
                &self.shards[unit],
                position.micro == 0,
                self.comm,
            )?;
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
        self.reducer.finish()?;
        if self.plan.world > 1 && self.plan.units[EMBED].elements > 0 {
            let tag = Tag { unit: Some(EMBED as u32), what: "reduce" };
            self.comm.reduce_scatter(&self.embed_grad, &self.shards[EMBED].grad, tag)?.wait()?;
        }
        Ok(())
    }

    /// Sum of the loss over counted targets (fp64 scalar on the device), without dropout or grad.
    ///
    /// # Errors
    /// Whatever a collective meets.
    pub fn evaluate(&mut self, batch: &Batch) -> Result<Tensor, Error> {
        let (h_btd, embed_params) = self.forward(&batch.tokens_bt)?;
        let width = self.config.hidden_size as i64;
        Ok(tch::no_grad(|| {
            let head = self.head(&embed_params);
            head::loss_sum(
                self.numerics,
                head.weight_vd,
                &h_btd.reshape([-1, width]),
                &batch.targets_bt.reshape([-1]),
            )
        }))
    }

    /// Logits in fp32, `[B, T, V]`, without dropout or grad.
    ///
    /// # Errors
    /// Whatever a collective meets.
    pub fn logits(&mut self, tokens_bt: &Tensor) -> Result<Tensor, Error> {
        let (h_btd, embed_params) = self.forward(tokens_bt)?;
        Ok(tch::no_grad(|| head::logits(self.numerics, self.head(&embed_params).weight_vd, &h_btd)))
    }

    /// Normed states of the last block, and the embeddings' parameters.
    fn forward(&mut self, tokens_bt: &Tensor) -> Result<(Tensor, Vec<Tensor>), Error> {
        let shape = BlockShape::new(&self.config, false);
        let embed_params = self.gathered_embed()?;
        let mut x = tch::no_grad(|| embed::forward(&embed_params[0], &embed_params[1], tokens_bt, 0));
        for i in 0..self.plan.units.len() - 1 {
            let weights = self.gathered_block(i, i + 1)?;
            x = tch::no_grad(|| self.forward_block(&shape, i, &weights, &x, false));
        }
        let h = tch::no_grad(|| head::norm(&self.head(&embed_params), &x, self.config.norm_epsilon));
        Ok((h, embed_params))
    }

    /// The embeddings' parameters, of whatever origin.
    fn gathered_embed(&mut self) -> Result<Vec<Tensor>, Error> {
        let trained = self.gather_now(EMBED)?;
        Ok(match &mut self.frozen {
            None => trained,
            Some(frozen) => {
                let trained: Vec<Tensor> = trained.iter().map(|t| t.to_kind(self.numerics.kind)).collect();
                frozen.wiring.embed(&frozen.base.embed(self.comm)?, &trained)
            }
        })
    }

    /// Block `i`'s weights; the gather of block `next` starts behind it (if there is one).
    fn gathered_block(&mut self, i: usize, next: usize) -> Result<BlockWeights, Error> {
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
            Some(frozen) => tch::no_grad(|| frozen.base.block(i, self.comm))?,
        };
        if next < self.plan.units.len() - 1 {
            self.gathered.start(next + 1, &self.shards[next + 1].master, self.comm)?;
            if let Some(frozen) = &mut self.frozen {
                frozen.base.start(next + 1, self.comm)?;
            }
        }
        Ok(BlockWeights { base, trained })
    }

    fn gather_now(&mut self, unit: usize) -> Result<Vec<Tensor>, Error> {
        tch::no_grad(|| self.gathered.start(unit, &self.shards[unit].master, self.comm))?;
        Ok(units::views(&self.plan.units[unit], self.gathered.wait(unit)?))
    }

    /// Embeddings and their dropout mask.
    fn embed(&self, params: &[Tensor], batch: &Batch, position: MicroPosition) -> (Tensor, Option<Tensor>) {
        let x = embed::forward(&params[0], &params[1], &batch.tokens_bt, 0);
        let dropout = self.config.dropout.embedding;
        if dropout == 0.0 {
            return (x, None);
        }
        self.seed(position, EMBED);
        let (x, mask) = x.native_dropout(dropout, true);
        (x, Some(mask))
    }

    fn embed_backward(&self, dx: Tensor, mask: Option<Tensor>, batch: &Batch) {
        let dx = match mask {
            Some(mask) => {
                let scale = 1.0 / (1.0 - self.config.dropout.embedding);
                Tensor::native_dropout_backward(&dx, &mask, scale)
            }
            None => dx,
        };
        let grads = self.embed_grads();
        embed::backward(&dx, &batch.tokens_bt, grads[0].as_ref(), grads[1].as_ref());
    }

    fn forward_with_grad(&self, shape: &BlockShape, i: usize, weights: &BlockWeights, x: &Tensor) -> Kept {
        let leaf = |t: &Tensor| t.detach().set_requires_grad(true);
        let x = leaf(&x.to_kind(self.numerics.product_kind));
        let trained: Vec<Tensor> = weights.trained.iter().map(leaf).collect();
        let y = block::forward(shape, &self.block_params(i, &weights.base, &trained, true), &x, None);
        Kept { x, trained, y }
    }

    /// The residual stream behind a block, without grad.
    fn forward_block(
        &self,
        shape: &BlockShape,
        i: usize,
        weights: &BlockWeights,
        x: &Tensor,
        training: bool,
    ) -> Tensor {
        let x = x.to_kind(self.numerics.product_kind);
        let params = self.block_params(i, &weights.base, &weights.trained, training);
        block::forward(shape, &params, &x, None).to_kind(self.numerics.kind)
    }

    fn block_params<'t>(
        &self,
        i: usize,
        base: &'t [Tensor],
        trained: &'t [Tensor],
        training: bool,
    ) -> BlockParams<'t> {
        match &self.frozen {
            None => BlockParams::plain(trained),
            Some(Frozen { wiring, .. }) => BlockParams::new(&wiring.block(i, base, trained), |weight| {
                wiring.adapted(i, weight, trained, training)
            }),
        }
    }

    /// The first block that holds something trained, or that what is trained below lies behind.
    fn lowest_trained_block(&self) -> usize {
        if self.trains_embeddings() {
            return 0;
        }
        let blocks = &self.plan.units[1..];
        blocks.iter().position(|unit| unit.elements > 0).unwrap_or(blocks.len())
    }

    fn trains_embeddings(&self) -> bool {
        self.frozen.as_ref().is_none_or(|frozen| frozen.wiring.trains_embeddings())
    }

    fn loss_and_dx(
        &mut self,
        embed_params: &[Tensor],
        x: &Tensor,
        batch: &Batch,
        scale: &Tensor,
    ) -> Result<(Tensor, Tensor), Error> {
        let leaf = |t: &Tensor| t.detach().set_requires_grad(true);
        let head = self.head(embed_params);
        let wide = |t: &Tensor| leaf(&t.to_kind(self.numerics.product_kind));
        let (x, norm_weight, norm_bias) = (wide(x), wide(head.norm_weight), wide(head.norm_bias));
        let with_leaves =
            HeadParams { norm_weight: &norm_weight, norm_bias: &norm_bias, weight_vd: head.weight_vd };
        let h_btd = head::norm(&with_leaves, &x, self.config.norm_epsilon);
        let grads = self.embed_grads();
        let dhead = self.head_grads(&grads);
        let mut scratch = std::mem::take(&mut self.head_scratch);
        let (loss, dh_nd) = tch::no_grad(|| {
            head::loss_sum_and_grads(
                self.numerics,
                head.weight_vd,
                &h_btd.detach().reshape([-1, self.config.hidden_size as i64]),
                &batch.targets_bt.reshape([-1]),
                scale,
                dhead.weight_vd,
                &mut scratch,
            )
        });
        let dh_btd = dh_nd.view_as(&h_btd);
        let mut dnorm = tunefleet_kernels::autograd::grad(&h_btd, &dh_btd, &[x, norm_weight, norm_bias])?;
        let dx = dnorm.remove(0);
        tch::no_grad(|| {
            for (into, grad) in [dhead.norm_weight, dhead.norm_bias].into_iter().zip(&dnorm) {
                if let Some(into) = into {
                    let _ = into.shallow_clone().g_add_(grad);
                }
            }
        });
        self.head_scratch = scratch;
        Ok((loss, dx))
    }

    /// Of each of the embeddings' parameters the gradient so far, where it is trained.
    fn embed_grads(&self) -> Vec<Option<Tensor>> {
        let grads = units::views(&self.plan.units[EMBED], &self.embed_grad);
        match &self.frozen {
            None => grads.into_iter().map(Some).collect(),
            Some(frozen) => frozen.wiring.embed_grads(&grads),
        }
    }

    /// The head among the embeddings' tensors, see `ModelConfig::embed_parameters`.
    fn head<'t>(&self, embed: &'t [Tensor]) -> HeadParams<'t> {
        let [weight_vd, norm_weight, norm_bias] = self.head_indices(embed.len()).map(|i| &embed[i]);
        HeadParams { norm_weight, norm_bias, weight_vd }
    }

    fn head_grads<'t>(&self, embed: &'t [Option<Tensor>]) -> HeadGrads<'t> {
        let [weight_vd, norm_weight, norm_bias] = self.head_indices(embed.len()).map(|i| embed[i].as_ref());
        HeadGrads { norm_weight, norm_bias, weight_vd }
    }

    /// Where the output embedding and the final norm stand.
    fn head_indices(&self, parameters: usize) -> [usize; 3] {
        [if self.config.tied_head { 0 } else { 2 }, parameters - 2, parameters - 1]
    }

    /// Dropout masks are a function of the seed and the position alone: recomputing a block, or
    /// resuming a run, draws the same ones.
    fn seed(&self, position: MicroPosition, unit: usize) {
        let dropout = self.config.dropout;
        let of_pairs = self.frozen.as_ref().map_or(0.0, |frozen| frozen.wiring.dropout());
        if dropout.attention + dropout.embedding + dropout.residual + of_pairs > 0.0 {
            tch::manual_seed(self.seeds.at(position, self.comm.rank().rank, unit));
        }
    }
}
