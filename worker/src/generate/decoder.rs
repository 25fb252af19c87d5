//! A whole model on one device, for completing text token by token.

use std::path::Path;

use tch::Tensor;
use tunefleet_proto::model::ModelConfig;
use tunefleet_proto::shard_plan::ShardPlan;

use crate::adapter;
use crate::adapter::merge::{self, Dequantized};
use crate::checkpoint::{Error, hugging_face};
use crate::model::block::{self, BlockParams, BlockShape, KvCache, Sight};
use crate::model::embed::{self, Positions};
use crate::model::head::{self, HeadParams};
use crate::model::numerics::Numerics;
use crate::train::units;

/// Weights, shape and how to compute.
pub struct Decoder {
    config: ModelConfig,
    numerics: Numerics,
    shape: BlockShape,
    embed: Vec<Tensor>,
    /// Output embedding in the dtype of products.
    head_vd: Tensor,
    blocks: Vec<Vec<Tensor>>,
}

/// What one sequence has been shown so far.
pub struct Context {
    caches: Vec<KvCache>,
    tokens: i64,
}

impl Decoder {
    /// Loads a Hugging Face model directory.
    ///
    /// # Errors
    /// Whatever its files break.
    pub fn load(dir: &Path, numerics: Numerics) -> Result<Self, Error> {
        let config = hugging_face::read_config(dir)?;
        let plan = ShardPlan::new(&config, 1);
        let buffers = hugging_face::load_weights(dir, &plan, numerics)?;
        Ok(Self::new(config, &plan, &buffers, numerics))
    }

    /// As [`load`](Self::load), with an adapter merged in fp32, into the base's weights or into what
    /// `dequantized` makes of its linears.
    ///
    /// # Errors
    /// Whatever the files break; without `any_base`, a base that is not the adapter's.
    pub fn load_merged(
        dir: &Path,
        adapter: &Path,
        any_base: bool,
        dequantized: Option<&Dequantized<'_>>,
        numerics: Numerics,
    ) -> Result<Self, adapter::Error> {
        let config = hugging_face::read_config(dir)?;
        let plan = ShardPlan::new(&config, 1);
        let buffers = merge::load_weights(dir, &config, adapter, any_base, dequantized, &plan, numerics)?;
        Ok(Self::new(config, &plan, &buffers, numerics))
    }

    fn new(config: ModelConfig, plan: &ShardPlan, buffers: &[Tensor], numerics: Numerics) -> Self {
        let mut views = plan.units.iter().zip(buffers).map(|(unit, buffer)| units::views(unit, buffer));
        let embed = views.next().unwrap_or_default();
        // Widened once: a token's products are too small to pay for it each time.
        let head_vd = if config.tied_head { &embed[0] } else { &embed[2] }.to_kind(numerics.product_kind);
        let blocks = views.map(|views| numerics.for_products(views)).collect();
        Decoder { shape: BlockShape::new(&config, false), config, numerics, embed, head_vd, blocks }
    }

    /// The model's shape.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// An empty context with room for `max_tokens`.
    pub fn context(&self, max_tokens: usize) -> Context {
        let cache = |_| KvCache::new(&self.config, self.numerics, 1, max_tokens as i64);
        Context { caches: (0..self.blocks.len()).map(cache).collect(), tokens: 0 }
    }

    /// Sum of the loss over counted targets, fp64 scalar on the device, of whole sequences `[B, T]`.
    ///
    /// # Errors
    /// A target outside the vocabulary.
    pub fn loss_sum(
        &self,
        tokens_bt: &Tensor,
        targets_bt: &Tensor,
    ) -> Result<Tensor, tunefleet_kernels::Error> {
        tch::no_grad(|| {
            let x = embed::forward(&self.embed[0], &self.embed[1], tokens_bt, Positions::From(0));
            let mut x = x.to_kind(self.numerics.product_kind);
            for params in &self.blocks {
                x = block::forward(&self.shape, &BlockParams::plain(params), &x, Sight::Row);
            }
            let h = head::norm(&self.head(), &x.to_kind(self.numerics.kind), self.config.norm_epsilon);
            let h_nd = h.reshape([-1, self.config.hidden_size as i64]);
            head::loss_sum(self.numerics, &self.head_vd, &h_nd, &targets_bt.reshape([-1]))
        })
    }

    fn head(&self) -> HeadParams<'_> {
        let norms = self.embed.len() - 2;
        HeadParams {
            norm_weight: &self.embed[norms],
            norm_bias: &self.embed[norms + 1],
            weight_vd: &self.head_vd,
        }
    }

    /// Shows `tokens` (the whole prompt first, then one at a time); the next token's logits, fp32
    /// `[V]` on the CPU.
    pub fn next_logits(&self, context: &mut Context, tokens: &[u32]) -> Tensor {
        tch::no_grad(|| {
            let ids: Vec<i64> = tokens.iter().map(|&t| i64::from(t)).collect();
            let tokens_bt = Tensor::from_slice(&ids).unsqueeze(0).to_device(self.numerics.device);
            let positions = Positions::From(context.tokens);
            let x = embed::forward(&self.embed[0], &self.embed[1], &tokens_bt, positions);
            let mut x = x.to_kind(self.numerics.product_kind);
            for (params, cache) in self.blocks.iter().zip(&mut context.caches) {
                let params = BlockParams::plain(params);
                x = block::forward(&self.shape, &params, &x, Sight::Cached(cache, context.tokens));
            }
            context.tokens += ids.len() as i64;
            let head = self.head();
            let last = x.narrow(1, ids.len() as i64 - 1, 1).to_kind(self.numerics.kind);
            let h = head::norm(&head, &last, self.config.norm_epsilon);
            head::logits(self.numerics, head.weight_vd, &h).view([-1]).to_device(tch::Device::Cpu)
        })
    }
}
