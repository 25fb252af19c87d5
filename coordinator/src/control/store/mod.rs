//! What the control plane keeps over its own end: jobs, attempts, events, workers, who asked for what.
//!
//! Events are the truth: what stands in the other tables of a job follows from them, and is written in
//! the same transaction. A change is on disk before anything that follows from it leaves the process.

mod check;
mod memory;
mod sqlite;

#[cfg(test)]
pub use memory::Memory;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use tunefleet_proto::ids::{Attempt, JobId};
use tunefleet_proto::rpc::{AuditRecord, FailureKind, JobEvent, JobState};

use super::placement::WorkerName;

/// A job as it is now.
#[derive(Debug, Clone, PartialEq)]
pub struct JobRow {
    /// Its name.
    pub id: JobId,
    /// As people see it.
    pub state: JobState,
    /// When it was first submitted.
    pub submitted_unix_ms: u64,
    /// `SubmitRequest.request` of the last submission; empty when there was none.
    pub request: String,
    /// `tunefleet_proto::job::JobSpec`.
    pub spec_json: String,
    /// What the control plane needs to go on with it; only the control plane reads it.
    pub record_json: String,
}

/// One attempt of a job.
#[derive(Debug, Clone, PartialEq)]
pub struct AttemptRow {
    /// Whose.
    pub job: JobId,
    /// Which.
    pub attempt: Attempt,
    /// When it began.
    pub began_unix_ms: u64,
    /// When it ended; 0 while it lives.
    pub ended_unix_ms: u64,
    /// How it stands or ended.
    pub state: JobState,
    /// Updates done at its end.
    pub step: u64,
    /// How it ended, in a line; empty while it lives.
    pub cause: String,
    /// What kind of failure that was.
    pub kind: FailureKind,
}

/// A worker that was seen once.
#[derive(Debug, Clone, PartialEq)]
pub struct WorkerRow {
    /// Its name.
    pub name: WorkerName,
    /// Of its journal, as it registered last.
    pub journal: String,
    /// What it said up to this number of that journal is on disk.
    pub acknowledged: u64,
    /// A person wants nothing placed there.
    pub draining: bool,
    /// `tunefleet_proto::rpc::Register`, encoded.
    pub register: Vec<u8>,
    /// When it was last heard of, roughly.
    pub seen_unix_ms: u64,
}

/// One change. All changes of a commit are made, or none.
#[derive(Debug, Clone, PartialEq)]
pub enum Write {
    /// Adds or replaces.
    Job(JobRow),
    /// Adds or replaces.
    Attempt(AttemptRow),
    /// Appends; numbered from 1 within a job, without a gap.
    Event(JobEvent),
    /// Adds or replaces.
    Worker(WorkerRow),
    /// Appends.
    Audit(AuditRecord),
    /// A job, its attempts and its events are not kept any more.
    Forget(JobId),
    /// Nor are records of the audit from before this time.
    ForgetAudit {
        /// In milliseconds since 1970.
        before_unix_ms: u64,
    },
}

/// What a store holds when it is opened.
#[derive(Debug, Clone, Default)]
pub struct Loaded {
    /// Made once with the store.
    pub cluster: String,
    /// Counts the openings.
    pub generation: u64,
    /// All jobs.
    pub jobs: Vec<JobRow>,
    /// All attempts, in order within a job.
    pub attempts: Vec<AttemptRow>,
    /// All workers.
    pub workers: Vec<WorkerRow>,
}

/// Keeps rows. One thread owns it.
pub trait Store: Send {
    /// All that the fleet goes on with.
    ///
    /// # Errors
    /// See [`StoreError`].
    fn load(&mut self) -> Result<Loaded, StoreError>;
    /// Makes all changes, or none; they are on disk when it returns.
    ///
    /// # Errors
    /// See [`StoreError`].
    fn commit(&mut self, writes: &[Write]) -> Result<(), StoreError>;
    /// Whether a commit may take longer than a moment.
    fn waits_for_a_disk(&self) -> bool {
        true
    }
}

/// Reads what is only appended to, from any thread.
pub trait History: Send + Sync {
    /// The first `limit` events of `job` after number `after`, in order.
    ///
    /// # Errors
    /// See [`StoreError`].
    fn events(&self, job: &JobId, after: u64, limit: usize) -> Result<Vec<JobEvent>, StoreError>;
    /// The last `limit` records since then, in order.
    ///
    /// # Errors
    /// See [`StoreError`].
    fn audit(&self, since_unix_ms: u64, limit: usize) -> Result<Vec<AuditRecord>, StoreError>;
}

/// Why the state cannot be read or written.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// An operation on the directory.
    #[error("{what} {dir}: {cause}")]
    Io {
        /// What was being done.
        what: &'static str,
        /// To which directory.
        dir: PathBuf,
        /// What the system said.
        #[source]
        cause: std::io::Error,
    },
    /// Another process has it.
    #[error(
        "{dir} is in use by process {owner}: a state directory belongs to one coordinator; stop that one, or pass another \
         --state"
    )]
    Taken {
        /// The directory.
        dir: PathBuf,
        /// The process that wrote its number there.
        owner: String,
    },
    /// Something else's database.
    #[error("{0} is not a coordinator's state: pass another --state")]
    Foreign(PathBuf),
    /// A later version wrote it.
    #[error(
        "{path} has version {found}, and this coordinator knows versions up to {known}: install the version that wrote \
         it, or restore the copy state-v{known}.db beside it"
    )]
    Newer {
        /// The file.
        path: PathBuf,
        /// Its version.
        found: usize,
        /// The latest that is known.
        known: usize,
    },
    /// The disk has no more room.
    #[error("{path}: the disk is full: make room, it goes on by itself")]
    Full {
        /// The file.
        path: PathBuf,
    },
    /// What is there is not what was written.
    #[error("{path} is damaged ({cause}): restore a backup with `coordinator store restore`")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What was found.
        cause: String,
    },
    /// Anything else that SQLite says.
    #[error("{path}: {cause}")]
    Sqlite {
        /// The file.
        path: PathBuf,
        /// What it says.
        cause: rusqlite::Error,
    },
    /// An event of another version, or not one.
    #[error("{path}: an event of job {job} cannot be read: {cause}")]
    Event {
        /// The file.
        path: PathBuf,
        /// Whose event.
        job: JobId,
        /// What the parser said.
        cause: prost::DecodeError,
    },
    /// A thread failed.
    #[error("reading the state: {0}")]
    Reader(String),
}

impl StoreError {
    fn sqlite(path: &Path, cause: rusqlite::Error) -> Self {
        let path = path.to_owned();
        match cause.sqlite_error_code() {
            Some(rusqlite::ErrorCode::DiskFull) => StoreError::Full { path },
            Some(rusqlite::ErrorCode::DatabaseCorrupt | rusqlite::ErrorCode::NotADatabase) => {
                StoreError::Damaged { path, cause: cause.to_string() }
            }
            _ => StoreError::Sqlite { path, cause },
        }
    }
}

pub use check::{backup, check, info, restore};

/// What writes a store, and what reads it.
pub type Opened = (Box<dyn Store>, Arc<dyn History>);

/// A store that ends with this process.
pub fn memory() -> Opened {
    let memory = memory::Memory::default();
    (Box::new(memory.clone()), Arc::new(memory))
}

/// Opens the state in `dir`, which is made where it is not there.
///
/// # Errors
/// See [`StoreError`].
pub fn open(dir: &Path) -> Result<Opened, StoreError> {
    let (store, reader) = sqlite::open(dir)?;
    Ok((Box::new(store), Arc::new(reader)))
}

#[cfg(test)]
#[path = "tests.rs"]
mod tests;
