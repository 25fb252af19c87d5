//! Datasets that others made, as sources of files: where their tables are, and their rows.

/// From a source in the job file to table files on this machine.
pub mod locate;
/// Rows of one table file: Parquet, Arrow, JSONL or CSV.
mod rows;
/// Rows as files: filtered in parallel, and handed on in order.
mod files;
/// Rows as conversations.
mod conversations;
/// The shapes that conversations have in datasets.
mod shapes;

use std::path::PathBuf;

pub use conversations::read as read_conversations;
pub use files::read;
pub use locate::{Located, Table};
use tunefleet_proto::chat::Fault;

/// A table that cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file system refused.
    #[error("dataset {}: {source}; correct the path in collect.sources", .path.display())]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// No file is a table that is wanted.
    #[error(
        "dataset {place} holds no table{wanted}; known are .parquet, .arrow, .jsonl, .json and .csv, the last three \
         also as .gz"
    )]
    Nothing {
        /// Where was looked.
        place: String,
        /// Subset and split, where they were given.
        wanted: String,
    },
    /// A table without a column of what is wanted.
    #[error("table {}: there is no column {column} of {what}, but {found}; give the name in data_column", .path.display())]
    Column {
        /// The file.
        path: PathBuf,
        /// What was looked for.
        column: String,
        /// What it must hold.
        what: &'static str,
        /// The columns that there are.
        found: String,
    },
    /// A file that is not what its name says.
    #[error("table {}{}: {detail}; repair the file, or leave it out", .path.display(), .row.map(|row| format!(", row {row}")).unwrap_or_default())]
    Broken {
        /// The file.
        path: PathBuf,
        /// Counted from 1, where that is known.
        row: Option<u64>,
        /// What is wrong.
        detail: String,
    },
    /// A row that is no conversation.
    #[error(
        "table {}, row {row}: {fault}; repair it, leave it out, or write collect.invalid_conversations: drop", .path.display()
    )]
    Conversation {
        /// The file.
        path: PathBuf,
        /// Counted from 1.
        row: u64,
        /// The rule that it breaks.
        fault: Fault,
    },
    /// The hub refused, or cannot be reached.
    #[error(transparent)]
    Hub(#[from] tunefleet_hub::Error),
}

impl Error {
    /// Whether the cause is that something is not there.
    pub fn is_not_found(&self) -> bool {
        match self {
            Error::Io { source, .. } => source.kind() == std::io::ErrorKind::NotFound,
            Error::Nothing { .. } => true,
            _ => false,
        }
    }
}
