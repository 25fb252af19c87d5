//! The `worker` program's library: tokens, batches, blocks, shards, checkpoint, completion.
//!
//! The modules stand in the order in which data flows through a rank; the last ones are the
//! processes that host it.
#![forbid(unsafe_code)]

/// The decoder: plain functions of tensors.
pub mod model;
/// Collectives between ranks.
pub mod comm;
/// Dataset segments -> documents -> tokens -> sequences.
pub mod data;
/// Conversations -> tokens, by a template.
pub mod chat;
/// The frozen, quantised base of an adapter.
pub mod base;
/// The training loop of one rank.
pub mod train;
/// What live tensors take.
pub mod memory;
/// `measure`: a step, an evaluation and a checkpoint of one rank, on this machine.
pub mod measure;
/// Weights on disk: safetensors, checkpoints, Hugging Face directories.
pub mod checkpoint;
/// `adapter`: LoRA adapters read, written, mixed and merged.
pub mod adapter;
/// `init-model`: random weights.
pub mod init_model;
/// `export`: checkpoint to Hugging Face directory.
pub mod export;
/// `generate`: completions from a model directory.
pub mod generate;
/// `worker serve`: completions for editors.
pub mod serve;
mod watchdog;
/// `worker evaluate`: what a model does with tasks.
pub mod evaluate;
/// The node daemon: owns slots, runs ranks as child processes.
pub mod daemon;
/// The process of one rank: session to its daemon, task.
pub mod rank;
/// Faults on demand, in debug builds, for tests.
pub mod fault;
/// What the daemon shows to Prometheus.
pub mod metrics;
