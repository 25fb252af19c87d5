//! What two Tunefleet processes must agree on: on the wire (gRPC) and on disk
//! (job file, dataset, checkpoint). No IO beyond encode, decode and the files that are named on a command line, no torch.
//!
//! The modules stand in the order in which data flows through the product.
#![forbid(unsafe_code)]

/// The checkpoint directory and its manifest.
pub mod checkpoint;
/// The dataset directory: segments and their manifest.
pub mod dataset;
/// Conversations, of which a dataset may consist.
pub mod chat;
/// Identity and position: job, attempt, rank, step.
pub mod ids;
/// The job file: what the user wrote, and the [`job::JobSpec`] that follows from it.
pub mod job;
/// Model shapes, read from a Hugging Face `config.json`.
pub mod model;
/// LoRA adapters: settings, targets, PEFT's file format.
pub mod adapter;
/// How the frozen base of an adapter lies in memory and on disk.
pub mod base_plan;
/// What `worker measure` is asked and answers.
pub mod measure;
/// What a model did with tasks, and what follows from it.
pub mod evaluation;
/// gRPC messages, clients and servers.
pub mod rpc;
/// What was looked at, for people and for scripts.
pub mod findings;
/// How a coordinator is dialled: TLS, tokens.
pub mod dial;
/// The flags of a daemon from a file.
pub mod flags_file;
/// systemd's notifications.
pub mod service_manager;
/// Who holds which elements of which parameter.
pub mod shard_plan;

use sha2::{Digest, Sha256};

/// SHA-256 of `bytes` in lower-case hex.
pub fn digest_hex(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

/// Lower-case hex.
pub fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write;
    let mut out = String::with_capacity(bytes.len() * 2);
    for byte in bytes {
        let _ = write!(out, "{byte:02x}");
    }
    out
}
