//! `train`: how batches become weights.

use super::super::diagnostic::Sink;
use super::super::read::{Field, FromNode, ManualEntry, entries, join, read, section};
use super::super::spec::{DeviceKind, Offload, Optimizer, Precision, Recompute, Schedule, Strategy};
use super::super::tree::Node;

section! {
    /// How batches become weights.
    TrainFile {
        /// Number of ranks over which weights and optimizer are sharded, 1 to 1024: one per GPU,
        /// or one per two to four cores. Default: 1.
        ranks: u32,
        /// Who holds what: `full_shard` (a rank holds its share of weights, gradients and optimizer; blocks
        /// are gathered as they are needed), `shard_grad_op` (the same, but gathered weights stay until the
        /// update: faster, needs the whole model in 16 bits), `hybrid_shard` (sharded within groups of
        /// `shard_ranks`, such as the GPUs of a node, and the same in all groups), or `no_shard` (every rank
        /// holds all; for models that fit). All train the same model. Default: `full_shard`.
        strategy: Strategy,
        /// Ranks of a group of `hybrid_shard`, a divisor of `ranks`: those of one node, whose links are
        /// fast. Must be given with `hybrid_shard`, and only then.
        shard_ranks: u32,
        /// `auto` (GPU where the worker has one), `cpu`, or `cuda` (an error without a GPU).
        /// Default: `auto`.
        device: DeviceKind,
        /// Dtype of the forward and backward pass, `bf16` or `fp32`. Master weights, optimizer and
        /// reductions are fp32 either way. Default: `bf16`.
        precision: Precision,
        /// Optimizer updates; 0 trains nothing, and `evaluate` asks the model as it is. Default: 2000.
        steps: u64,
        /// Sequences of one rank's forward pass: more use more memory and keep a GPU busier.
        /// Default: 1.
        micro_batch_sequences: u32,
        /// Micro-batches whose gradients are summed in one step. A step learns from
        /// `ranks x micro_batch_sequences x accumulate_micro_batches` sequences. Default: 2.
        accumulate_micro_batches: u32,
        /// Peak learning rate, above 0 to 1. Default: 5e-5, for fine-tuning, and 2e-4 with an `adapter`;
        /// random weights want about 1e-3.
        learning_rate: f64,
        /// `adamw` (fp32 moments), `adamw_8bit` (moments of 8 bits: 2 bytes a trained weight instead of
        /// 8), or `adamw_paged` (fp32 moments that a GPU pages from main memory). Default: `adamw`.
        optimizer: Optimizer,
        /// `cosine`, `linear` or `polynomial` (down to `final_learning_rate` at the last step), or
        /// `constant`. Default: `cosine`.
        schedule: Schedule,
        /// Exponent of `polynomial`, above 0 to 100. Default: 1.
        schedule_power: f64,
        /// Learning rate after the last step, 0 to `learning_rate`. Default: 0; 1e-7 with `polynomial`,
        /// as transformers has it.
        final_learning_rate: f64,
        /// Steps of linear warm-up from 0. Default: 30, or a tenth of `steps` where that is fewer.
        warmup_steps: u64,
        /// Decoupled weight decay, 0 to 1; biases and norms are exempt. Default: 0.01.
        weight_decay: f64,
        /// AdamW's beta1 and beta2, each from 0 to below 1. Default: [0.9, 0.999].
        betas: [f64; 2],
        /// AdamW's epsilon, above 0 to 1. Default: 1e-8.
        epsilon: f64,
        /// Gradients are scaled down to this global norm; 0 turns clipping off. Default: 1.
        max_grad_norm: f64,
        /// Replaces every dropout probability of the model's config, 0 to below 1.
        /// Default: the config's own.
        dropout: f64,
        /// Which blocks are computed again in the backward pass instead of keeping their activations:
        /// `all` (a third more compute, far less memory), `every N` (the N-th, 2N-th, ...: the others stay
        /// gathered as well), or `none`. Default: `all`.
        recompute: Recompute,
        /// Blocks whose gathered weights stay until the update, so that they are gathered once a step and
        /// not twice a micro-batch. Default: 0.
        resident_blocks: u32,
        /// Blocks that are gathered ahead of the one that is computed, 1 to 8. More hides a slow network's
        /// hiccups, at the cost of a gathered block each. Default: 1.
        gather_ahead: u32,
        /// Dtype in which gradients travel within a copy of the weights, `fp32` or `bf16` (half the traffic,
        /// rounded before the sum). Sums over copies, once a step, are fp32. Default: `fp32`.
        reduce_precision: Precision,
        /// What of a GPU rank lies in main memory: `none`, `optimizer` (fp32 weights and moments, 12 bytes a
        /// parameter; the update runs on the CPU), or `all` (also the shards that blocks are gathered from).
        /// On CPUs all does anyway. Default: `none`.
        offload: Offload,
        /// GiB that a rank may need. Of `recompute`, `resident_blocks` and `offload`, those that are not
        /// given are chosen: the fastest that fit. `coordinator plan` shows them. Default: no bound, and
        /// the defaults of these keys.
        memory_budget_gib: f64,
        /// Seed of dropout. Default: 42.
        seed: u64,
        /// Steps between lines of progress. Default: 25.
        log_every_steps: u64,
        /// Steps between evaluations on the held-out files; 0 never. Default: 100; 0 without
        /// held-out files.
        eval_every_steps: u64,
        /// Most held-out sequences of one evaluation. Default: 64.
        eval_sequences: u32,
        /// Steps between checkpoints; 0 only at the end. Default: 500.
        checkpoint_every_steps: u64,
        /// Checkpoints that are kept, 1 to 1000; the oldest goes first. Default: 2.
        keep_checkpoints: u32,
        /// Keep the checkpoint with the lowest validation loss beside the newest ones, and export that one.
        /// Default: true with `early_stopping_evaluations`, else false.
        keep_best: bool,
        /// Train on while a checkpoint is written: training stands still only until a copy of the state is
        /// in main memory (12 bytes a trained parameter, over the ranks). Default: true.
        checkpoints_async: bool,
        /// End training when so many evaluations in a row brought no lower validation loss, 1 to 1000000.
        /// Default: train to the last step.
        early_stopping_evaluations: u32,
        /// A validation loss is lower when it is so by more than this, 0 to 1000. Default: 0.
        early_stopping_min_delta: f64,
        /// A collective operation that takes longer has hung: the job fails, and the report names the rank
        /// that is behind, 1 to 86400. Default: 600.
        collective_timeout_seconds: u64,
    }
}
