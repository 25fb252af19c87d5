//! A whole model on one device, for completing text token by token.

use std::path::Path;

use tch::{Device, Kind, Tensor};
use tunefleet_kernels::quant;
use tunefleet_proto::base_plan::{BasePlan, PartDtype, Quantization};
use tunefleet_proto::model::ModelConfig;
use tunefleet_proto::shard_plan::ShardPlan;

use super::adapters::Adapter;
use crate::adapter;
use crate::adapter::merge::{self, Dequantized};
use crate::base::{self, cache};
use crate::checkpoint::{Error, hugging_face};
use crate::model::attention::{KvCache, Run, Sight};
use crate::model::block::{self, BlockLayout, BlockParams, BlockShape};
use crate::model::embed::{self, Positions};
use crate::model::head::{self, HeadParams};
use crate::model::linear::{Pair, Served};
use crate::model::matrix::Matrix;
use crate::model::numerics::{self, Numerics};
use crate::model::rotary::{Rotary, Turns};
use crate::train::units;

/// Weights, shape and how to compute.
pub struct Decoder {
    config: ModelConfig,
    numerics: Numerics,
    shape: BlockShape,
    layout: BlockLayout,
    rotary: Option<Rotary>,
    embed: Vec<Tensor>,
    /// Output embedding in the dtype of products.
    head_vd: Tensor,
    blocks: Vec<Block>,
}

/// A block's weights, in the dtype of products but for what is quantised.
struct Block {
    linears: Vec<Matrix>,
    /// Norms and biases, in the order of the model.
    others: Vec<Tensor>,
}

/// What a model directory can break, or a kernel refuse.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The directory's files.
    #[error(transparent)]
    Files(#[from] Error),
    /// Quantising.
    #[error(transparent)]
    Kernel(#[from] tunefleet_kernels::Error),
}

/// What one sequence has been shown so far.
#[derive(Debug)]
pub struct Context {
    caches: Vec<KvCache>,
    tokens: usize,
    max_tokens: usize,
}

/// New tokens of one sequence.
pub struct Piece<'a> {
    /// What came before them; they are added to it.
    pub context: &'a mut Context,
    /// The tokens.
    pub tokens: &'a [u32],
    /// So many of the last ones give logits of what follows them.
    pub logits: usize,
    /// What is added to the model for them.
    pub adapter: Option<&'a Adapter>,
}

impl Context {
    /// Tokens that it has been shown.
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// Tokens that the model has positions for.
    pub fn max_tokens(&self) -> usize {
        self.max_tokens
    }

    /// Forgets all but the first `tokens`.
    pub fn truncate(&mut self, tokens: usize) {
        self.tokens = self.tokens.min(tokens);
    }
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

    /// As [`load`](Self::load), with the linears of the blocks quantised as they are read: nobody holds the whole model.
    ///
    /// # Errors
    /// Whatever the files break.
    pub fn load_quantized(
        dir: &Path,
        quantization: Quantization,
        numerics: Numerics,
    ) -> Result<Self, LoadError> {
        let config = hugging_face::read_config(dir)?;
        let plain = if numerics.kind == Kind::Float { PartDtype::F32 } else { PartDtype::Bf16 };
        let plan = BasePlan::new(&config, quantization, plain);
        let units = cache::whole(dir, &config, &plan, numerics.device)?;
        let code8 = quant::dynamic_code(true, numerics.device)?;
        let (mut embed, mut blocks) = (Vec::new(), Vec::new());
        for (at, (layout, unit)) in plan.units.iter().zip(&units).enumerate() {
            let mut block = Block { linears: Vec::new(), others: Vec::new() };
            for tensor in &layout.tensors {
                match base::plain(tensor, unit) {
                    Some(values) => block.others.push(values),
                    None => block.linears.push(Matrix::Quantized {
                        tensor: tensor.clone(),
                        quantization,
                        unit: unit.shallow_clone(),
                        code8: code8.shallow_clone(),
                    }),
                }
            }
            if at == 0 {
                embed = block.others;
            } else {
                block.others = numerics.for_products(block.others);
                blocks.push(block);
            }
        }
        Ok(Self::of(config, embed, blocks, numerics))
    }

    fn new(config: ModelConfig, plan: &ShardPlan, buffers: &[Tensor], numerics: Numerics) -> Self {
        let mut views = plan.units.iter().zip(buffers).map(|(unit, buffer)| units::views(unit, buffer));
        let embed = views.next().unwrap_or_default();
        let linears = config.linears().len();
        let block = |views| {
            let mut params = numerics.for_products(views);
            let others = params.split_off(linears.min(params.len()));
            Block { linears: params.into_iter().map(Matrix::Dense).collect(), others }
        };
        let blocks = views.map(block).collect();
        Self::of(config, embed, blocks, numerics)
    }

    fn of(config: ModelConfig, embed: Vec<Tensor>, blocks: Vec<Block>, numerics: Numerics) -> Self {
        // Widened once: a token's products are too small to pay for it each time.
        let head_vd = embed[config.embed_layout().head].to_kind(numerics.product_kind);
        let (shape, layout) = (BlockShape::new(&config, false), BlockLayout::new(&config));
        let rotary = Rotary::new(&config, numerics.device);
        Decoder { shape, layout, rotary, config, numerics, embed, head_vd, blocks }
    }

    /// The model's shape.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Where it computes.
    pub fn device(&self) -> Device {
        self.numerics.device
    }

    /// An empty context with room for `tokens`; more is made as it is needed.
    pub fn context(&self, tokens: usize) -> Context {
        let cache = |_| KvCache::new(&self.config, self.numerics, tokens as i64);
        let caches = (0..self.blocks.len()).map(cache).collect();
        Context { caches, tokens: 0, max_tokens: self.config.max_positions as usize }
    }

    /// Sum of the loss over counted targets, fp64 scalar on the device, of whole sequences `[B, T]`, with what `adapter`
    /// adds to the model.
    ///
    /// # Errors
    /// A target outside the vocabulary.
    pub fn loss_sum(
        &self,
        tokens_bt: &Tensor,
        targets_bt: &Tensor,
        adapter: Option<&Adapter>,
    ) -> Result<Tensor, tunefleet_kernels::Error> {
        let rows = tokens_bt.numel() as i64;
        tch::no_grad(|| {
            let tables = adapter
                .and_then(Adapter::rows)
                .map(|rows| rows.tables(&self.embed[self.config.embed_layout().tokens], &self.head_vd));
            let (tokens_vd, head_vd) = match &tables {
                Some((tokens_vd, head_vd)) => (tokens_vd, head_vd),
                None => (&self.embed[self.config.embed_layout().tokens], &self.head_vd),
            };
            let rows_btd = Tensor::embedding(tokens_vd, tokens_bt, -1, false, false);
            let (mut x, turns) = self.embedded(rows_btd, tokens_bt, Positions::From(0));
            for (at, block) in self.blocks.iter().enumerate() {
                let pair = |linear| adapter.and_then(|adapter| adapter.pair(at, linear));
                let runs = |linear| pair(linear).map(|pair| (0, rows, pair)).into_iter().collect();
                let params = block.params(&self.layout, runs);
                x = block::forward(&self.shape.of_block(at), &params, &x, turns.as_ref(), Sight::Row);
            }
            let h = self.final_norm(&x.to_kind(self.numerics.kind));
            let h_nd = h.reshape([-1, self.config.hidden_size as i64]);
            head::loss_sum(self.numerics, head_vd, &h_nd, &targets_bt.reshape([-1]))
        })
    }

    fn final_norm(&self, x: &Tensor) -> Tensor {
        let head = HeadParams::of(&self.config.embed_layout(), &self.embed);
        numerics::norm(&head.norm, x, self.config.norm_epsilon)
    }

    /// The residual stream before the first block, in the dtype of products, of rows of the token embedding, and the
    /// tokens' turns.
    fn embedded(
        &self,
        rows_btd: Tensor,
        tokens_bt: &Tensor,
        positions: Positions<'_>,
    ) -> (Tensor, Option<Turns>) {
        let learned = self.config.embed_layout().positions.map(|at| &self.embed[at]);
        let x = embed::placed(rows_btd, learned, positions);
        let turns = self.rotary.as_ref().map(|rotary| rotary.turns(tokens_bt, positions));
        (x.to_kind(self.numerics.product_kind), turns)
    }

    /// Shows `tokens`; the next token's logits, fp32 `[V]` on the CPU.
    pub fn next_logits(&self, context: &mut Context, tokens: &[u32]) -> Tensor {
        self.step(&mut [Piece { context, tokens, logits: 1, adapter: None }]).view([-1])
    }

    /// Shows new tokens of several sequences at once: the weights are read once for all. Gives the logits that are
    /// wanted, piece after piece, fp32 `[R, V]` on the CPU.
    ///
    /// # Panics
    /// Where libtorch fails, as every operation of tch does.
    pub fn step(&self, pieces: &mut [Piece<'_>]) -> Tensor {
        tch::no_grad(|| self.shown(pieces))
    }

    fn shown(&self, pieces: &mut [Piece<'_>]) -> Tensor {
        let Numerics { device, kind, product_kind } = self.numerics;
        let (mut ids, mut positions, mut wanted, mut spans) =
            (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        for piece in &*pieces {
            let first = ids.len() as i64;
            ids.extend(piece.tokens.iter().map(|token| i64::from(*token)));
            positions
                .extend((piece.context.tokens..).take(piece.tokens.len()).map(|position| position as i64));
            wanted.extend(ids.len() as i64 - piece.logits.min(piece.tokens.len()) as i64..ids.len() as i64);
            spans.push((first, piece.tokens.len() as i64));
        }
        let row = |values: &[i64]| Tensor::from_slice(values).to_device(device);
        let (tokens_1n, positions_1n) = (row(&ids).unsqueeze(0), row(&positions).unsqueeze(0));
        let table = &self.embed[self.config.embed_layout().tokens];
        let mut rows_1nd = Tensor::embedding(table, &tokens_1n, -1, false, false);
        for (piece, (first, _)) in pieces.iter().zip(&spans) {
            let Some(rows) = piece.adapter.and_then(Adapter::rows) else { continue };
            let (places, own) = rows.of(piece.tokens);
            if !places.is_empty() {
                let places: Vec<i64> = places.iter().map(|at| first + at).collect();
                let own_1md = rows.tokens_nd().index_select(0, &row(&own)).unsqueeze(0);
                rows_1nd = rows_1nd.index_copy(1, &row(&places), &own_1md);
            }
        }
        let (mut x, turns) = self.embedded(rows_1nd, &tokens_1n, Positions::Each(&positions_1n));
        let adapters: Vec<_> = pieces.iter().map(|piece| piece.adapter).collect();
        for (at, block) in self.blocks.iter().enumerate() {
            let params = block.params(&self.layout, |linear| {
                let pairs = adapters.iter().zip(&spans).filter_map(|(adapter, (first, count))| {
                    Some((*first, *count, adapter.as_ref()?.pair(at, linear)?))
                });
                pairs.collect()
            });
            let mut runs: Vec<Run<'_>> = pieces
                .iter_mut()
                .filter_map(|piece| {
                    let (cached_tokens, tokens) = (piece.context.tokens as i64, piece.tokens.len() as i64);
                    Some(Run { cache: piece.context.caches.get_mut(at)?, cached_tokens, tokens })
                })
                .collect();
            let shape = self.shape.of_block(at);
            x = block::forward(&shape, &params, &x, turns.as_ref(), Sight::Cached(&mut runs));
        }
        for piece in &mut *pieces {
            piece.context.tokens += piece.tokens.len();
        }
        if wanted.is_empty() {
            return Tensor::zeros([0, self.config.vocab_size as i64], (Kind::Float, tch::Device::Cpu));
        }
        let last = x.index_select(1, &row(&wanted)).squeeze_dim(0).to_kind(kind);
        let h = self.final_norm(&last).to_kind(product_kind);
        let logits_rv = Matrix::Dense(self.head_vd.shallow_clone())
            .times(&h, None)
            .to_kind(Kind::Float)
            .to_device(tch::Device::Cpu);
        let mut first = 0;
        for piece in &*pieces {
            let count = piece.logits.min(piece.tokens.len()) as i64;
            if let Some(rows) = piece.adapter.and_then(Adapter::rows).filter(|_| count > 0) {
                rows.relogit(&logits_rv.narrow(0, first, count), &h.narrow(0, first, count));
            }
            first += count;
        }
        logits_rv
    }
}

impl Block {
    /// The block with `pairs` beside its linears.
    fn params<'a>(
        &'a self,
        layout: &BlockLayout,
        pairs: impl Fn(usize) -> Vec<(i64, i64, Pair<'a>)>,
    ) -> BlockParams<'a> {
        layout.served(&self.others, |at, bias| Served { matrix: &self.linears[at], bias, runs: pairs(at) })
    }
}
