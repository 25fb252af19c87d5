//! From a location to a pinned commit in a local object store.
//!
//! A local path is opened in place. A remote is fetched, one revision at depth 1, into a bare repository
//! under the cache directory; when its head is the one already there, only the list of refs travels. A remote that is
//! silent or breaks off is asked again.

use std::cell::RefCell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use git2::{
    AutotagOption, Direction, ErrorClass, ErrorCode, FetchOptions, Oid, ProxyOptions, Remote,
    RemoteCallbacks, Repository, RepositoryInitOptions, StatusOptions,
};
use tunefleet_proto::job::RepositorySpec;

use super::Error;
use super::credentials::{AccessToken, Credentials};
use super::location::{Location, Place};
use super::patience::{Pulse, patiently};
use crate::progress::{Progress, Task};

/// Where the fetched commit is kept in the cached repository.
const PINNED_REF: &str = "refs/collect/pinned";

/// One source of a job.
#[derive(Debug, Clone)]
pub struct Source {
    /// Where it is.
    pub location: Location,
    /// Branch, tag or commit; the head when absent.
    pub revision: Option<String>,
    /// Who asks, where the server is one that a token is for.
    pub token: Option<AccessToken>,
}

/// How sources are fetched.
#[derive(Clone, Copy)]
pub struct Fetching<'a> {
    /// Where remotes are kept.
    pub cache_dir: &'a Path,
    /// With all commits that led to the pinned one.
    pub with_history: bool,
    /// A remote that is silent for so long is asked again.
    pub patience: Duration,
    /// Where trouble that passes is told.
    pub progress: &'a dyn Progress,
}

/// What a source's revision is at this moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Head {
    /// The commit; `None` in a repository without commits.
    pub commit: Option<Oid>,
    /// What to ask a remote for: a ref, or the commit itself.
    wanted: String,
}

impl Head {
    /// The commit in 40 hex digits, zeros for a repository without commits.
    pub fn commit_hex(&self) -> String {
        commit_hex(self.commit)
    }
}

fn commit_hex(commit: Option<Oid>) -> String {
    commit.map_or_else(|| "0".repeat(40), |commit| commit.to_string())
}

/// A commit whose objects are on this machine.
#[derive(Debug, Clone)]
pub struct Pinned {
    /// `org/name` or the name of the directory.
    pub repo_id: String,
    /// Where it came from, without credentials.
    pub location: String,
    /// The repository that holds the objects.
    pub git_dir: PathBuf,
    /// The commit; `None` in a repository without commits.
    pub commit: Option<Oid>,
}

impl Pinned {
    /// The commit in 40 hex digits, zeros for a repository without commits.
    pub fn commit_hex(&self) -> String {
        commit_hex(self.commit)
    }

    /// The error for an object of this commit.
    pub fn unreadable(&self, path: &[u8], oid: Oid, cause: &git2::Error) -> Error {
        Error::Object {
            repo_id: self.repo_id.clone(),
            path: String::from_utf8_lossy(path).into_owned(),
            oid,
            git_dir: self.git_dir.clone(),
            detail: cause.message().to_owned(),
        }
    }
}

/// Parses the sources of a job and gives each its own `repo_id`.
pub fn sources(specs: &[RepositorySpec]) -> Result<Vec<Source>, Error> {
    let mut sources: Vec<Source> = Vec::with_capacity(specs.len());
    for spec in specs {
        let mut location = Location::parse(&spec.location)?;
        if sources.iter().any(|s| s.location.shown == location.shown && s.revision == spec.revision) {
            return Err(Error::Duplicate { location: location.shown });
        }
        let taken = |id: &str| sources.iter().any(|s| s.location.repo_id == id);
        if taken(&location.repo_id) {
            let numbered = (2u32..).map(|n| format!("{}~{n}", location.repo_id)).find(|id| !taken(id));
            location.repo_id = numbered.unwrap_or_default();
        }
        let variable = |name: &str| std::env::var(name).ok();
        let token = match location.place() {
            Place::Remote(url) => AccessToken::for_url(url, false, variable),
            Place::Local(_) => None,
        };
        sources.push(Source { location, revision: spec.revision.clone(), token });
    }
    Ok(sources)
}

impl Source {
    /// Asks where the revision stands now: the local head, or the remote's list of refs.
    pub fn resolve(&self, how: &Fetching<'_>) -> Result<Head, Error> {
        match self.location.place() {
            Place::Local(path) => self.resolve_local(&open_local(path)?),
            Place::Remote(url) => {
                let (source, url) = (self.clone(), url.clone());
                self.patiently(how, move |_| source.resolve_remote(&url))
            }
        }
    }

    /// Brings the objects of `head` to this machine.
    pub fn fetch(&self, head: &Head, how: &Fetching<'_>, task: Arc<dyn Task>) -> Result<Pinned, Error> {
        let (git_dir, commit) = match self.location.place() {
            Place::Local(path) => (open_local(path)?.path().to_owned(), head.commit),
            Place::Remote(url) => {
                let git_dir = self.cached_at(how);
                let commit = match head.commit {
                    Some(commit) => {
                        let (source, url, head, git_dir) =
                            (self.clone(), url.clone(), head.clone(), git_dir.clone());
                        let with_history = how.with_history;
                        Some(self.patiently(how, move |pulse| {
                            let fetching = Remotely { url: &url, with_history, pulse, task: task.as_ref() };
                            source.fetch_remote(&fetching, &head, commit, &git_dir)
                        })?)
                    }
                    None => None,
                };
                (git_dir, commit)
            }
        };
        Ok(Pinned {
            repo_id: self.location.repo_id.clone(),
            location: self.location.shown.clone(),
            git_dir,
            commit,
        })
    }

    fn patiently<T: Send + 'static>(
        &self,
        how: &Fetching<'_>,
        work: impl Fn(&Pulse) -> Result<T, Error> + Send + Sync + 'static,
    ) -> Result<T, Error> {
        let told = |error: &Error, wait: Duration| {
            how.progress.note(&format!("note: {error}; trying again in {} s", wait.as_secs()));
        };
        patiently(&self.location.shown, how.patience, told, work)
    }

    /// Whether a local work tree has changes that the collected commit lacks.
    pub fn has_uncommitted_work(&self) -> bool {
        let Place::Local(path) = self.location.place() else { return false };
        let Ok(repo) = Repository::open(path) else { return false };
        let mut options = StatusOptions::new();
        options.include_untracked(true).recurse_untracked_dirs(false).exclude_submodules(true);
        // The path may be that of the object store alone, whatever git makes of its parent.
        let has_work_tree = !repo.is_bare() && repo.path() != path;
        has_work_tree && repo.statuses(Some(&mut options)).is_ok_and(|statuses| !statuses.is_empty())
    }

    /// One directory per location and revision, so that fetches in parallel never share one.
    fn cached_at(&self, how: &Fetching<'_>) -> PathBuf {
        let depth = if how.with_history { "\nhistory" } else { "" };
        let key = format!("{}\n{}{depth}", self.location.shown, self.revision.as_deref().unwrap_or_default());
        let digest = tunefleet_proto::digest_hex(key.as_bytes());
        let safe = |c: char| if c.is_ascii_alphanumeric() || matches!(c, '.' | '-') { c } else { '_' };
        let name: String = self.location.repo_id.chars().map(safe).take(100).collect();
        how.cache_dir.join(format!("{name}-{}.git", digest.get(..12).unwrap_or_default()))
    }

    fn unknown_revision(&self) -> Error {
        Error::Revision {
            location: self.location.shown.clone(),
            revision: self.revision.clone().unwrap_or_else(|| "HEAD".to_owned()),
        }
    }

    fn resolve_local(&self, repo: &Repository) -> Result<Head, Error> {
        if self.revision.is_none() && repo.head().is_err_and(|e| e.code() == ErrorCode::UnbornBranch) {
            return Ok(Head { commit: None, wanted: String::new() });
        }
        let wanted = self.revision.clone().unwrap_or_else(|| "HEAD".to_owned());
        let commit = repo
            .revparse_single(&wanted)
            .and_then(|object| object.peel_to_commit())
            .map_err(|_| self.unknown_revision())?;
        Ok(Head { commit: Some(commit.id()), wanted })
    }

    fn resolve_remote(&self, url: &str) -> Result<Head, Error> {
        // A full commit id names itself.
        if let Some(revision) = self.revision.as_deref().filter(|r| r.len() == 40)
            && let Ok(commit) = Oid::from_str(revision)
        {
            return Ok(Head { commit: Some(commit), wanted: revision.to_owned() });
        }
        let mut remote = Remote::create_detached(url).map_err(|e| self.remote_error(&e))?;
        let credentials = RefCell::new(Credentials::new(self.token.clone()));
        let connection = remote
            .connect_auth(Direction::Fetch, Some(callbacks(&credentials, None)), Some(proxy()))
            .map_err(|e| self.remote_error(&e))?;
        let mut refs = Vec::new();
        for head in connection.list().map_err(|e| self.remote_error(&e))? {
            // `name()` panics on a ref that is not UTF-8, which a hostile remote may send.
            if let Ok(name) = catch_unwind(AssertUnwindSafe(|| head.name().to_owned())) {
                refs.push((name, head.oid()));
            }
        }
        let find = |name: &str| refs.iter().find(|(known, _)| known == name).map(|(_, oid)| *oid);
        let candidates = match self.revision.as_deref() {
            None if refs.is_empty() => return Ok(Head { commit: None, wanted: String::new() }),
            None => vec!["HEAD".to_owned()],
            Some(revision) if revision.starts_with("refs/") => vec![revision.to_owned()],
            // Git's own order of precedence.
            Some(revision) => vec![format!("refs/tags/{revision}"), format!("refs/heads/{revision}")],
        };
        for wanted in candidates {
            // An annotated tag is listed a second time with the commit that it points to.
            if let Some(oid) = find(&format!("{wanted}^{{}}")).or_else(|| find(&wanted)) {
                return Ok(Head { commit: Some(oid), wanted });
            }
        }
        Err(self.unknown_revision())
    }

    fn fetch_remote(
        &self,
        fetching: &Remotely<'_>,
        head: &Head,
        commit: Oid,
        git_dir: &Path,
    ) -> Result<Oid, Error> {
        let url = fetching.url;
        let cache_error =
            |e: git2::Error| Error::Cache { path: git_dir.to_owned(), detail: e.message().to_owned() };
        let repo = Repository::open_bare(git_dir)
            .or_else(|_| {
                let mut options = RepositoryInitOptions::new();
                options.bare(true).mkpath(true).external_template(false);
                Repository::init_opts(git_dir, &options)
            })
            .map_err(cache_error)?;
        let pinned = || repo.find_reference(PINNED_REF).and_then(|r| r.peel_to_commit()).map(|c| c.id());
        if pinned().is_ok_and(|have| have == commit) {
            return Ok(commit);
        }
        // Anonymous: nothing of the URL is written to the cached repository's config.
        let mut remote = repo.remote_anonymous(url).map_err(|e| self.remote_error(&e))?;
        let mut fetch = |refspec: &str, depth: i32| {
            let credentials = RefCell::new(Credentials::new(self.token.clone()));
            let mut options = FetchOptions::new();
            options
                .remote_callbacks(callbacks(&credentials, Some(fetching)))
                .proxy_options(proxy())
                .download_tags(AutotagOption::None)
                .update_fetchhead(false)
                .depth(depth);
            remote.fetch(&[refspec], Some(&mut options), None)
        };
        // libgit2 has no shallow fetch between directories of one machine.
        let depth = if fetching.with_history || url.starts_with("file://") { 0 } else { 1 };
        let by_id = head.wanted == commit.to_string();
        match fetch(&format!("+{}:{PINNED_REF}", head.wanted), depth) {
            Ok(()) => pinned().map_err(|_| self.unknown_revision()),
            // Not every server hands out a commit by its id: take all branches and look there.
            Err(_) if by_id => {
                fetch("+refs/*:refs/collect/all/*", 0).map_err(|e| self.remote_error(&e))?;
                repo.find_commit(commit).map_err(|_| self.unknown_revision())?;
                repo.reference(PINNED_REF, commit, true, "").map_err(cache_error)?;
                Ok(commit)
            }
            Err(e) => Err(self.remote_error(&e)),
        }
    }

    fn remote_error(&self, error: &git2::Error) -> Error {
        let location = self.location.shown.clone();
        let detail = self.location.redact(error.message());
        let says = |text: &str| detail.to_lowercase().contains(text);
        match (error.code(), error.class()) {
            (ErrorCode::Auth, _) => Error::Auth { location, detail },
            _ if says("401") || says("403") || says("authenticat") => Error::Auth { location, detail },
            (ErrorCode::Certificate, _) | (_, ErrorClass::Ssl) => Error::HostUntrusted { location, detail },
            (ErrorCode::NotFound, _) => Error::NotFound { location, detail },
            _ if says("404")
                || says("not found")
                || says("does not exist")
                || says("failed to resolve path") =>
            {
                Error::NotFound { location, detail }
            }
            _ => Error::Unreachable { location, detail },
        }
    }
}

fn open_local(path: &Path) -> Result<Repository, Error> {
    Repository::open(path).map_err(|e| match e.code() {
        ErrorCode::Owner => Error::Owner { path: path.to_owned() },
        _ if !path.exists() => Error::Missing { path: path.to_owned() },
        _ => Error::NotARepository { path: path.to_owned(), detail: e.message().to_owned() },
    })
}

/// One try to fetch.
struct Remotely<'a> {
    url: &'a str,
    with_history: bool,
    pulse: &'a Pulse,
    task: &'a dyn Task,
}

fn callbacks<'a>(
    credentials: &'a RefCell<Credentials>,
    fetching: Option<&'a Remotely<'a>>,
) -> RemoteCallbacks<'a> {
    let mut callbacks = RemoteCallbacks::new();
    callbacks.credentials(|url, user, allowed| credentials.borrow_mut().next(url, user, allowed));
    if let Some(Remotely { task, pulse, .. }) = fetching {
        callbacks.transfer_progress(|stats| {
            task.length(stats.total_objects() as u64);
            task.position(stats.received_objects() as u64);
            pulse.beat()
        });
        // A server that counts and compresses says so.
        callbacks.sideband_progress(|_| pulse.beat());
    }
    callbacks
}

fn proxy() -> ProxyOptions<'static> {
    let mut options = ProxyOptions::new();
    options.auto();
    options
}
