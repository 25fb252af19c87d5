//! What goes wrong with a repository. Each message names the repository and what to do next.

use std::path::PathBuf;

/// A repository that cannot be collected. No message carries credentials.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The location cannot be understood.
    #[error("source `{location}`: {rule}; give an https, ssh or file URL, `git@host:org/repo` or a path")]
    Location {
        /// What was given, without credentials.
        location: String,
        /// What is wrong with it.
        rule: &'static str,
    },
    /// One repository stands in the list twice.
    #[error("source `{location}` is listed twice at the same revision; remove one of the two")]
    Duplicate {
        /// The location.
        location: String,
    },
    /// There is nothing at a local path.
    #[error("repository {}: no such directory; correct the path or remove the source", .path.display())]
    Missing {
        /// The path.
        path: PathBuf,
    },
    /// A directory that git does not know.
    #[error(
        "{} is not a git repository ({detail}); give the directory that holds `.git`, \
         or run `git init`, add the files and commit",
        .path.display()
    )]
    NotARepository {
        /// The path.
        path: PathBuf,
        /// What libgit2 says.
        detail: String,
    },
    /// Git refuses repositories of other users.
    #[error(
        "repository {path} belongs to another user; if you trust it, run \
         `git config --global --add safe.directory {path}`",
        path = .path.display()
    )]
    Owner {
        /// The path.
        path: PathBuf,
    },
    /// The remote says that there is no such repository.
    #[error("repository {location} was not found ({detail}); correct the location or remove the source")]
    NotFound {
        /// The location.
        location: String,
        /// What the remote or libgit2 says.
        detail: String,
    },
    /// The remote wants proof that there is none of.
    #[error(
        "repository {location} does not exist or needs credentials ({detail}); load a key with `ssh-add`, \
         put an unencrypted one into ~/.ssh, or set up `git config credential.helper`"
    )]
    Auth {
        /// The location.
        location: String,
        /// What the remote or libgit2 says.
        detail: String,
    },
    /// The remote's host key or certificate is not trusted.
    #[error(
        "repository {location}: the host's key or certificate is not trusted ({detail}); \
         connect once with `ssh` to add it to ~/.ssh/known_hosts, or install the certificate authority"
    )]
    HostUntrusted {
        /// The location.
        location: String,
        /// What libgit2 says.
        detail: String,
    },
    /// The network or the remote failed.
    #[error("repository {location} cannot be fetched ({detail}); check the network and run again")]
    Unreachable {
        /// The location.
        location: String,
        /// What libgit2 says.
        detail: String,
    },
    /// The remote is silent.
    #[error("repository {location} sent nothing for {seconds} s; check the network and run again")]
    Stalled {
        /// The location.
        location: String,
        /// How long.
        seconds: u64,
    },
    /// The repositories of an organisation cannot be listed.
    #[error(transparent)]
    Organization(#[from] super::organization::Error),
    /// Evaluation tasks cannot be read.
    #[error(transparent)]
    Contamination(#[from] super::contamination::Error),
    /// The repository has no such branch, tag or commit.
    #[error(
        "repository {location} has no revision `{revision}`; \
         give a branch, a tag or a full commit id that exists there"
    )]
    Revision {
        /// The location.
        location: String,
        /// The revision asked for.
        revision: String,
    },
    /// An object of the pinned commit cannot be read.
    #[error(
        "repository {repo_id}: cannot read `{path}` (object {oid}) from {}: {detail}; the repository changed \
         or is damaged: run `git fsck` there, or delete it if it is a cached copy, and run again",
        .git_dir.display()
    )]
    Object {
        /// The repository.
        repo_id: String,
        /// Path inside it; empty for its top.
        path: String,
        /// The object.
        oid: git2::Oid,
        /// The object store.
        git_dir: PathBuf,
        /// What libgit2 says.
        detail: String,
    },
    /// More entries than any real repository has: a tree that repeats itself.
    #[error("repository {repo_id} has more than {limit} paths; it cannot be collected")]
    TooManyPaths {
        /// The repository.
        repo_id: String,
        /// The limit.
        limit: u64,
    },
    /// The cached copy of a remote cannot be used.
    #[error("cached repository {}: {detail}; delete it and run again", .path.display())]
    Cache {
        /// The cached copy.
        path: PathBuf,
        /// What is wrong.
        detail: String,
    },
}

impl Error {
    /// Whether the cause is that something is not there.
    pub fn is_not_found(&self) -> bool {
        match self {
            Self::Organization(error) => error.is_not_found(),
            Self::Missing { .. }
            | Self::NotARepository { .. }
            | Self::NotFound { .. }
            | Self::Revision { .. } => true,
            _ => false,
        }
    }

    /// Whether the same may succeed a little later.
    pub fn is_passing(&self) -> bool {
        matches!(self, Self::Unreachable { .. } | Self::Stalled { .. })
    }

    /// Whether the cause is the network or a lack of rights.
    pub fn is_unreachable(&self) -> bool {
        match self {
            Self::Organization(error) => error.is_unreachable(),
            Self::Unreachable { .. }
            | Self::Stalled { .. }
            | Self::Auth { .. }
            | Self::HostUntrusted { .. }
            | Self::Owner { .. } => true,
            _ => false,
        }
    }
}
