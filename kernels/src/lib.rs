//! What tch lacks, behind safe functions: the only room of the project with `unsafe`.
//!
//! `sys/` is the C ABI and its C++; each module here checks what the C side requires, calls it,
//! and turns its status into [`Error`].

/// Gradients with output gradients.
pub mod autograd;
/// Bytes of a CPU tensor, in place.
pub mod bytes;
/// What the machine can do, and what it must do.
pub mod device;
/// Training's work between the matrix products, in as few passes over memory as it takes.
pub mod fused;
/// libtorch's NCCL communicator.
pub mod nccl;
/// Fused optimizer updates and norms.
pub mod optim;
/// Quantised weights.
pub mod quant;
/// Products of a few rows with a large matrix, quantised or not.
pub mod few_rows;
/// Attention of a few new tokens over those that came before.
pub mod cached_attention;

mod ffi;

/// What a kernel call can refuse.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// libtorch raised an exception; this is its message.
    #[error("{op}: {message}")]
    Torch {
        /// The call.
        op: &'static str,
        /// First line of the exception's text.
        message: String,
    },
    /// There is no GPU, or this build has no CUDA.
    #[error("{0}; run on a machine with an NVIDIA GPU, or set train.device to cpu")]
    NoCuda(String),
    /// Attention whose scores would all be held at once.
    #[error("attention has no fused kernel for {shape}: {advice}")]
    UnfusedAttention {
        /// Device, dtype, heads, width, tokens and dropout.
        shape: String,
        /// What helps.
        advice: &'static str,
    },
    /// A tensor that does not meet the call's precondition; nothing was called.
    #[error("{op}: tensor {rule}, got {got}")]
    Precondition {
        /// The call.
        op: &'static str,
        /// What it must be.
        rule: &'static str,
        /// What it is.
        got: String,
    },
}
