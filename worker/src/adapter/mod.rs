//! LoRA adapters as files: read and written as PEFT does, scaled, mixed, compared and merged.
//!
//! Nothing here holds a full difference `s B A` of a module longer than it must: norms and truncations use
//! the pairs' low rank, and what needs elements goes by rows.

/// PEFT's adapter directories.
pub mod files;
/// One pair: its difference by rows, its norm.
pub mod delta;
/// What an adapter is, for people and programs.
pub mod inspect;
/// One adapter, weaker or stronger.
pub mod scale;
/// Several adapters as one.
pub mod combine;
/// Adapters on a model that they were not trained on.
pub mod sibling;
/// PEFT's settings of a combined adapter.
mod settings;
/// Sparse and sign-aware sums.
pub mod prune;
/// The nearest pair of a given rank.
pub mod svd;
/// How far two adapters are apart.
pub mod diff;
/// An adapter written into its base.
pub mod merge;
/// What a merge costs.
pub mod loss;
/// `worker adapter merge`.
pub(crate) mod merge_verb;
/// `worker adapter`.
pub mod cli;
#[cfg(test)]
mod support;

use std::path::{Path, PathBuf};

use crate::checkpoint;

/// What reading, writing and mixing adapters can meet.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file that cannot be read or written, or is not what it must be.
    #[error(transparent)]
    Files(#[from] checkpoint::Error),
    /// A config that is not supported, or does not fit the model.
    #[error("{path}: {source}", path = path.display())]
    Config {
        /// The adapter.
        path: PathBuf,
        /// The rule that it breaks.
        source: tunefleet_proto::adapter::Error,
    },
    /// An adapter, or a request, for which there is no answer.
    #[error("{0}")]
    Refused(String),
    /// libtorch could not compute something.
    #[error("{module}: {cause}")]
    Compute {
        /// Which module.
        module: String,
        /// Its own words.
        cause: String,
    },
    /// The base is not the one that the adapter was trained on.
    #[error(
        "{base}: its values have the digest {found}, but the adapter was trained on {name} with the digest \
         {expected}: give that model, or --any-base to merge into this one all the same",
        base = base.display()
    )]
    WrongBase {
        /// The base that was given.
        base: PathBuf,
        /// Its digest.
        found: String,
        /// What the adapter's config calls its base.
        name: String,
        /// The digest in the adapter's weights file.
        expected: String,
    },
}

impl Error {
    fn config(path: &Path) -> impl FnOnce(tunefleet_proto::adapter::Error) -> Error {
        let path = path.to_owned();
        move |source| Error::Config { path, source }
    }

    fn compute(module: &str) -> impl FnOnce(tch::TchError) -> Error {
        let module = module.to_owned();
        // The first line says it; the others are libtorch's stack.
        move |error| Error::Compute {
            module,
            cause: error.to_string().lines().next().unwrap_or_default().to_owned(),
        }
    }
}
