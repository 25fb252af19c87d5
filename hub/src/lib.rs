//! The Hugging Face hub: directories to it, as one commit, and files from it, into the cache that all its tools share.
//!
//! The protocol is that of the `huggingface_hub` package (`hf_api.py`, `_commit_api.py`, `lfs.py`): the hub says
//! of each file whether it belongs into the commit or into Git LFS's store; what the store lacks is sent to it,
//! whole or in parts; the commit names the files. Files are streamed from the disk, nothing is sent that the
//! hub has, and so a push that was interrupted is gone on with by pushing again.

#![forbid(unsafe_code)]
#![cfg_attr(test, allow(clippy::unwrap_used))]

/// The command line of a push.
pub mod cli;
/// Where to, and as whom.
pub mod target;
/// Files of a repository, into the cache.
pub mod download;
/// Which of them are a model.
pub mod model;
/// Requests that are tried again.
mod client;
/// The hub's requests and answers.
mod api;
/// What is pushed.
mod files;
/// Large files to the hub's store.
mod store;
/// How far a push is.
mod progress;

use std::path::{Path, PathBuf};

use api::{Hub, UploadMode};
use files::LocalFile;
use progress::Progress;
pub use target::{RepoId, RepoKind, Target, Token};

/// Tries of the commit: each looks first whether the one before reached the hub after all.
const COMMIT_TRIES: u32 = 4;

/// What a push can meet.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A setting that cannot be used.
    #[error("{0}")]
    Setting(String),
    /// A file that cannot be read.
    #[error("{path}: {source}", path = path.display())]
    Io {
        /// Which file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// Something in the directory that cannot be pushed.
    #[error("{path}: {rule}", path = path.display())]
    File {
        /// Which file.
        path: PathBuf,
        /// What is wrong, and what to do.
        rule: String,
    },
    /// The hub could not be reached, or a connection broke, as often as it was tried.
    #[error("{what}: {cause}, {tries} times; what was sent is kept: push again to go on")]
    Connection {
        /// What was being done, and where.
        what: String,
        /// The client's words.
        cause: String,
        /// How often.
        tries: u32,
    },
    /// The hub's certificate is of nobody who is trusted.
    #[error(
        "{what}: {cause}: add what signed it to this machine's certificates, or name it in SSL_CERT_FILE"
    )]
    Untrusted {
        /// What was being done, and where.
        what: String,
        /// The TLS library's words.
        cause: String,
    },
    /// The hub said no.
    #[error("{what}: the hub answered {status}{message}{hint}")]
    Refused {
        /// What was being done, and where.
        what: String,
        /// HTTP status.
        status: u16,
        /// The hub's own words, if any.
        message: String,
        /// What to do.
        hint: String,
    },
    /// An answer that breaks the protocol.
    #[error("{what}: {rule}; is this the address of a Hugging Face hub?")]
    Answer {
        /// What was being done, and where.
        what: String,
        /// What is wrong with it.
        rule: String,
    },
}

impl Error {
    fn io(path: &Path) -> impl FnOnce(std::io::Error) -> Error {
        let path = path.to_owned();
        move |source| Error::Io { path, source }
    }

    fn file(path: &Path, rule: impl Into<String>) -> Error {
        Error::File { path: path.to_owned(), rule: rule.into() }
    }

    /// Whether the request may have been carried out although it failed.
    fn is_passing(&self) -> bool {
        match self {
            Error::Connection { .. } => true,
            Error::Refused { status, .. } => client::is_passing(*status),
            _ => false,
        }
    }
}

/// What a push did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pushed {
    /// The repository, for people.
    pub url: String,
    /// The commit that was made; none where the hub had every file as it is.
    pub commit: Option<String>,
    /// Bytes that went to the store.
    pub sent_bytes: u64,
}

/// Pushes the files in `dir` to `target`, whose repository and branch are made where they are absent. Files of
/// other names that are in the repository stay there.
///
/// # Errors
/// A directory that holds anything but files; whatever the hub refuses, after several tries where trying again
/// can help.
pub fn push(dir: &Path, target: &Target) -> Result<Pushed, Error> {
    let hub = Hub::new(target)?;
    let mut files = files::list(dir)?;
    hub.ensure_repository()?;
    hub.ensure_branch()?;

    let mut tries = 1;
    let mut sent_bytes = 0;
    let commit = loop {
        let modes = hub.upload_modes(&files)?;
        let stored = |index: &usize| {
            let mode = &modes[*index];
            mode.mode == UploadMode::Store && !mode.should_ignore
        };
        let large: Vec<usize> = (0..files.len()).filter(stored).collect();
        hash(&mut files, &large)?;
        let large: Vec<&LocalFile> = large.iter().map(|&index| &files[index]).collect();
        sent_bytes += store::send(&hub, &large)?;

        let mut changed = Vec::new();
        for (file, mode) in files.iter().zip(&modes) {
            if mode.should_ignore {
                tracing::warn!("{} is left out: the repository's .gitignore names it", file.name);
            } else if mode.oid.as_deref() != Some(file.object_id(mode.mode)?.as_str()) {
                changed.push((file, mode.mode));
            }
        }
        if changed.is_empty() {
            break None;
        }
        match hub.commit(&changed) {
            Ok(commit) => break Some(commit),
            Err(error) if error.is_passing() && tries < COMMIT_TRIES => {
                tracing::warn!("{error}; looking whether the commit was made");
                std::thread::sleep(client::back_off(tries));
                tries += 1;
            }
            Err(error) => return Err(error),
        }
    };
    Ok(Pushed { url: hub.repository_url(), commit, sent_bytes })
}

/// Digests of those files that lack one.
fn hash(files: &mut [LocalFile], indices: &[usize]) -> Result<(), Error> {
    let bytes = |index: &usize| if files[*index].sha256.is_none() { files[*index].bytes } else { 0 };
    let progress = Progress::new("hashing", indices.iter().map(bytes).sum());
    for &index in indices {
        files[index].hash(&progress)?;
    }
    Ok(())
}
