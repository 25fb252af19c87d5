//! What goes wrong with a dataset on disk.

use std::io;
use std::path::{Path, PathBuf};

/// A dataset that cannot be written or read.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file system refused.
    #[error("{}: {source}{hint}", .path.display())]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// Why.
        source: io::Error,
        /// What to do, where that is known.
        hint: &'static str,
    },
    /// The place for the dataset is taken by something else.
    #[error(
        "{} is not a dataset that may be replaced: {detail}; choose another place or move that away",
        .path.display()
    )]
    NotOurs {
        /// The place.
        path: PathBuf,
        /// What was found.
        detail: String,
    },
    /// Two runs write to one place.
    #[error("another run is writing {}; wait for it or choose another place", .path.display())]
    Busy {
        /// The place.
        path: PathBuf,
    },
    /// There is no dataset.
    #[error("{} holds no dataset (no {}); run `coordinator collect` first", .path.display(), tunefleet_proto::dataset::MANIFEST_FILE)]
    Absent {
        /// The place.
        path: PathBuf,
    },
    /// The manifest cannot be understood.
    #[error("{}: {detail}; collect the dataset again", .path.display())]
    Manifest {
        /// The manifest.
        path: PathBuf,
        /// What is wrong.
        detail: String,
    },
    /// A newer program wrote it.
    #[error("{}: manifest version {found}, this program reads up to {known}; use a newer program", .path.display())]
    Newer {
        /// The manifest.
        path: PathBuf,
        /// Its version.
        found: u64,
        /// The newest version known here.
        known: u32,
    },
    /// A segment is not what the manifest says.
    #[error("segment {}: {detail}; the dataset is damaged, collect it again", .path.display())]
    Segment {
        /// The segment.
        path: PathBuf,
        /// What differs.
        detail: String,
    },
    /// A tokenizer that cannot be used.
    #[error("{}: {detail}; give a tokenizer.json, or a directory that holds one", .path.display())]
    Tokenizer {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        detail: String,
    },
    /// The hub refused, or cannot be reached.
    #[error(transparent)]
    Hub(#[from] tunefleet_hub::Error),
    /// Rows cannot be encoded.
    #[error("cannot encode a segment: {0}")]
    Encode(String),
}

impl Error {
    /// For `map_err` on file operations.
    pub fn io(path: &Path) -> impl FnOnce(io::Error) -> Self + '_ {
        move |source| {
            let hint = match source.kind() {
                io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
                    "; free some space and run again, what was there before is unchanged"
                }
                io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => {
                    "; choose a place that you may write to"
                }
                _ => "",
            };
            Self::Io { path: path.to_owned(), source, hint }
        }
    }

    /// For errors of the Arrow writer, which wrap those of the file.
    pub fn arrow(path: &Path, error: arrow::error::ArrowError) -> Self {
        match error {
            arrow::error::ArrowError::IoError(_, source) => Self::io(path)(source),
            other => Self::Encode(other.to_string()),
        }
    }

    /// For errors of the Parquet writer, which wrap those of the file.
    pub fn parquet(path: &Path, error: parquet::errors::ParquetError) -> Self {
        match error {
            parquet::errors::ParquetError::External(inner) => match inner.downcast::<io::Error>() {
                Ok(source) => Self::io(path)(*source),
                Err(other) => Self::Encode(other.to_string()),
            },
            other => Self::Encode(other.to_string()),
        }
    }
}
