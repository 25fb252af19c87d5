//! How batches become weights.

use serde::{Deserialize, Serialize};

/// How batches become weights.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TrainSpec {
    /// Number of ranks.
    pub ranks: u32,
    /// Who holds what of weights, gradients and optimizer.
    pub strategy: Strategy,
    /// Ranks that share one copy of weights and optimizer; divides `ranks`.
    pub shard_ranks: u32,
    /// Where ranks compute.
    pub device: DeviceKind,
    /// Dtype of the forward and backward pass; master weights and reductions are fp32.
    pub precision: Precision,
    /// Optimizer updates.
    pub steps: u64,
    /// Sequences of one rank's forward pass.
    pub micro_batch_sequences: u32,
    /// Micro-batches of one step.
    pub accumulate_micro_batches: u32,
    /// Peak learning rate.
    pub learning_rate: f64,
    /// How moments are held.
    pub optimizer: Optimizer,
    /// Shape of the learning rate after warm-up.
    pub schedule: Schedule,
    /// Exponent of [`Schedule::Polynomial`].
    pub schedule_power: f64,
    /// Where the schedule ends; constant ones never get there.
    pub final_learning_rate: f64,
    /// Steps of linear warm-up from 0.
    pub warmup_steps: u64,
    /// Decoupled weight decay; biases and norms are exempt.
    pub weight_decay: f64,
    /// AdamW beta1 and beta2.
    pub betas: (f64, f64),
    /// AdamW epsilon.
    pub epsilon: f64,
    /// Clip at this global norm; 0 turns clipping off.
    pub max_grad_norm: f64,
    /// Replaces all dropout probabilities of the model's config.
    pub dropout: Option<f64>,
    /// Which blocks are computed again in the backward pass instead of keeping their activations.
    pub recompute: Recompute,
    /// Blocks that stay gathered until the update, besides those that keep their activations.
    pub resident_blocks: u32,
    /// Blocks that are gathered ahead of the one that is computed.
    pub gather_ahead: u32,
    /// Dtype in which gradients travel within a copy of the weights.
    pub reduce_precision: Precision,
    /// What of a GPU rank lies in main memory.
    pub offload: Offload,
    /// Memory that a rank may have, where the settings that were not given follow from it.
    pub memory_budget: Option<MemoryBudget>,
    /// Seed of dropout.
    pub seed: u64,
    /// Log every so many steps.
    pub log_every_steps: u64,
    /// Evaluate every so many steps; 0 never, else also after the last.
    pub eval_every_steps: u64,
    /// At most so many sequences of the validation split.
    pub eval_sequences: u32,
    /// Save every so many steps (and at the end); 0 only at the end.
    pub checkpoint_every_steps: u64,
    /// Checkpoints kept.
    pub keep_checkpoints: u32,
    /// Keep the checkpoint with the lowest validation loss as well, and export that one.
    pub keep_best: bool,
    /// Go on training while a checkpoint is written.
    pub checkpoints_async: bool,
    /// End when the validation loss has not fallen for so long.
    pub early_stopping: Option<EarlyStopping>,
    /// A collective that takes longer has hung.
    pub collective_timeout_seconds: u64,
}

impl TrainSpec {
    /// Whether checkpoints are written while training goes on, and not only when it ends.
    pub fn saves_on_the_way(&self) -> bool {
        let every = self.checkpoint_every_steps;
        every > 0 && every < self.steps || self.keep_best && self.eval_every_steps > 0
    }
}

/// Where ranks compute.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DeviceKind {
    /// GPU where the worker has one, else CPU.
    Auto,
    /// CPU.
    Cpu,
    /// GPU or an error.
    Cuda,
}

/// Dtype of the forward and backward pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Precision {
    /// 32-bit.
    Fp32,
    /// 16-bit brain float.
    Bf16,
}

/// How AdamW's moments are held.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Optimizer {
    /// In fp32.
    AdamW,
    /// In 8 bits, block by block.
    AdamW8bit,
    /// In fp32, in memory that a GPU pages from the host.
    AdamWPaged,
}

/// Shape of the learning rate after warm-up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Schedule {
    /// Half a cosine down to the final learning rate.
    Cosine,
    /// Straight down to the final learning rate.
    Linear,
    /// No decay.
    Constant,
    /// Down to the final learning rate as a power of what is left.
    Polynomial,
}

/// Who holds what of weights, gradients and optimizer (names as PyTorch FSDP has them).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Strategy {
    /// A rank holds a shard of all; weights are gathered block by block, in each pass anew.
    FullShard,
    /// The same, but gathered weights stay until the update.
    ShardGradOp,
    /// Sharded within groups of ranks, the same in all groups.
    HybridShard,
    /// Every rank holds all.
    NoShard,
}

/// Which blocks are computed again in the backward pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Recompute {
    /// All.
    All,
    /// The n-th, 2n-th, ...
    Every(u32),
    /// None.
    None,
}

impl Recompute {
    /// Whether block `i` of `blocks` (0-based) is computed again. The last one never is: its backward
    /// pass comes right behind.
    pub fn applies(self, i: usize, blocks: usize) -> bool {
        let chosen = match self {
            Recompute::All => true,
            Recompute::Every(n) => (i + 1).is_multiple_of(n.max(1) as usize),
            Recompute::None => false,
        };
        chosen && i + 1 < blocks
    }
}

/// What of a GPU rank lies in main memory; on CPUs all does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Offload {
    /// Nothing.
    None,
    /// fp32 weights and moments; the update runs on the CPU.
    Optimizer,
    /// The shards from which blocks are gathered as well.
    All,
}

/// A bound on a rank's memory, and what may be chosen to keep it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryBudget {
    /// Bytes of a rank.
    pub bytes: u64,
    /// Whether `recompute` was left open.
    pub recompute: bool,
    /// Whether `resident_blocks` was left open.
    pub resident_blocks: bool,
    /// Whether `offload` was left open.
    pub offload: bool,
}

impl MemoryBudget {
    /// Whether something is still to be chosen.
    pub fn is_open(self) -> bool {
        self.recompute || self.resident_blocks || self.offload
    }
}

/// When the validation loss falls no more (as transformers' `EarlyStoppingCallback`).
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct EarlyStopping {
    /// Evaluations in a row that may bring nothing better.
    pub evaluations: u32,
    /// A loss is better when it is lower by more than this.
    pub min_delta: f64,
}

/// How the gathered weights and activations of a rank's blocks are kept: what follows from strategy,
/// recomputation and residency together. The worker walks by it, and the memory plan counts by it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Residency {
    /// Of each block, whether its gathered weights stay until the update.
    pub resident: Vec<bool>,
    /// Of each block, whether it is computed again in the backward pass.
    pub recomputed: Vec<bool>,
    /// Buffers that the other blocks take turns in.
    pub shared_slots: usize,
    /// Blocks gathered ahead.
    pub ahead: usize,
}

impl Residency {
    /// That of `train` over `blocks` blocks.
    pub fn of(train: &TrainSpec, blocks: usize) -> Self {
        let all = train.strategy == Strategy::ShardGradOp || train.shard_ranks == 1;
        let resident = if all { u32::MAX } else { train.resident_blocks };
        Residency::new(train.recompute, resident, train.gather_ahead, blocks)
    }

    /// Of so many blocks, some computed again, the first `resident_blocks` resident at least.
    pub fn new(recompute: Recompute, resident_blocks: u32, gather_ahead: u32, blocks: usize) -> Self {
        let recomputed: Vec<bool> = (0..blocks).map(|i| recompute.applies(i, blocks)).collect();
        // The graph of a block that is not computed again refers to its gathered weights; the last
        // one's is gone before another takes its place.
        let kept = |i: usize| i + 1 < blocks && !recomputed[i];
        let resident: Vec<bool> = (0..blocks).map(|i| kept(i) || i < resident_blocks as usize).collect();
        let others = resident.iter().filter(|resident| !**resident).count();
        let ahead = (gather_ahead.max(1) as usize).min(blocks);
        Residency { resident, recomputed, shared_slots: others.min(1 + ahead), ahead }
    }
}
