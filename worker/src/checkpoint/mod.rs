//! Weights on disk: safetensors and PyTorch files, checkpoints of a run, Hugging Face model directories.
//!
//! A rank reads only its own slices and writes only its own shards; nobody ever holds the model.

/// Elements of files to fp32.
mod floats;
/// safetensors files, read by slices and written as a stream.
pub mod safetensors;
/// Files of `torch.save`, read by slices.
pub mod torch_zip;
/// Shards from a Hugging Face model directory.
pub mod hugging_face;
/// A Hugging Face model directory, written.
pub mod model_dir;
/// What a base model is, as one digest of its values.
pub mod base_digest;
/// A directory gets its name whole.
pub mod place;
/// An old attempt finishes no checkpoint.
pub mod fence;
/// One checkpoint, written by all ranks.
pub mod save;
/// Which checkpoints stay.
pub mod retain;
/// The newest sound checkpoint, onto any number of ranks.
pub mod load;
/// `checkpoint verify`.
pub mod verb;

use std::path::{Path, PathBuf};

/// What reading or writing weights can meet.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file system refused.
    #[error("{path}: {source}", path = path.display())]
    Io {
        /// Which file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A file that is not what it must be.
    #[error("{path}: {rule}", path = path.display())]
    Format {
        /// Which file.
        path: PathBuf,
        /// What is wrong, and what to do.
        rule: String,
    },
    /// A tensor that is absent or has another shape or dtype.
    #[error("{path}: tensor {tensor}: {rule}", path = path.display())]
    Tensor {
        /// Which file or directory.
        path: PathBuf,
        /// Full name.
        tensor: String,
        /// What is wrong.
        rule: String,
    },
    /// There is nothing to resume from.
    #[error("{path}: no sound checkpoint to resume from{detail}", path = path.display())]
    NoCheckpoint {
        /// Where was looked.
        path: PathBuf,
        /// What was found instead.
        detail: String,
    },
    /// A save that failed on some rank; the previous checkpoint is untouched.
    #[error("saving step {step}: {cause}; earlier checkpoints are untouched")]
    Save {
        /// Updates done.
        step: u64,
        /// This rank's cause, or that another rank failed.
        cause: String,
    },
    /// Another rank met an error, which it tells itself.
    #[error("{0}")]
    Elsewhere(String),
    /// A collective failed.
    #[error(transparent)]
    Comm(#[from] crate::comm::Error),
    /// A kernel refused.
    #[error(transparent)]
    Kernel(#[from] tunefleet_kernels::Error),
}

impl Error {
    /// Adds the path that `source` lacks.
    pub(crate) fn io(path: &Path) -> impl FnOnce(std::io::Error) -> Error {
        let path = path.to_owned();
        move |source| Error::Io { path, source }
    }

    pub(crate) fn format(path: &Path, rule: impl Into<String>) -> Error {
        Error::Format { path: path.to_owned(), rule: rule.into() }
    }

    pub(crate) fn tensor(path: &Path, tensor: &str, rule: impl Into<String>) -> Error {
        Error::Tensor { path: path.to_owned(), tensor: tensor.to_owned(), rule: rule.into() }
    }
}
