//! The kept files of a commit, read in parallel and handed on in tree order.

use std::sync::Mutex;

use git2::{ObjectType, Oid, Repository};
use rayon::prelude::*;

use super::Error;
use super::fetch::Pinned;
use super::filter::{DropReason, Drops, FileFilter};
use super::tree::Walk;

/// Files are read in windows of at most this many files and, but for a single larger file, bytes: enough to
/// keep all cores busy, and the bound on memory.
const WINDOW_FILES: usize = 1024;
const WINDOW_BYTES: usize = 32 << 20;

/// A file that is kept.
#[derive(Debug)]
pub struct File {
    /// Path inside the repository.
    pub path: String,
    /// Its text.
    pub content: String,
    /// Size of the blob; for notebooks not the size of `content`.
    pub size_bytes: u64,
}

struct Candidate {
    path: String,
    oid: Oid,
    size: usize,
}

/// Reads the files of `pinned` that pass `filter`, window by window, until `take` says that it wants no more.
pub fn read(
    pinned: &Pinned,
    filter: &FileFilter,
    drops: &mut Drops,
    mut take: impl FnMut(Vec<File>) -> bool,
) -> Result<(), Error> {
    let Some(commit) = pinned.commit else { return Ok(()) };
    let open = || Repository::open(&pinned.git_dir).map_err(|e| pinned.unreadable(b"", commit, &e));
    let repo = open()?;
    let odb = repo.odb().map_err(|e| pinned.unreadable(b"", commit, &e))?;
    let handles = Handles { open, idle: Mutex::new(Vec::new()) };

    let mut window = Vec::new();
    let mut window_bytes = 0;
    let mut walk = Walk::new(&repo, pinned, commit)?;
    loop {
        let entry = walk.next().transpose()?;
        let full = window.len() == WINDOW_FILES || window_bytes >= WINDOW_BYTES;
        if (entry.is_none() || full) && !window.is_empty() {
            let files = read_window(std::mem::take(&mut window), pinned, filter, &handles, drops)?;
            window_bytes = 0;
            if !take(files) {
                return Ok(());
            }
        }
        let Some(entry) = entry else { return Ok(()) };
        let path = match filter.path(entry.path, entry.kind) {
            Ok(path) => path,
            Err(reason) => {
                drops.add(reason);
                continue;
            }
        };
        // The header alone: a file that is too large is never loaded.
        let (size, _) =
            odb.read_header(entry.oid).map_err(|e| pinned.unreadable(path.as_bytes(), entry.oid, &e))?;
        match filter.size(&path, size) {
            Ok(()) => {
                window_bytes += size;
                window.push(Candidate { path, oid: entry.oid, size });
            }
            Err(reason) => drops.add(reason),
        }
    }
}

fn read_window<F>(
    window: Vec<Candidate>,
    pinned: &Pinned,
    filter: &FileFilter,
    handles: &Handles<F>,
    drops: &mut Drops,
) -> Result<Vec<File>, Error>
where
    F: Fn() -> Result<Repository, Error> + Sync,
{
    let outcomes: Vec<Result<Result<File, DropReason>, Error>> = window
        .into_par_iter()
        .map(|candidate| {
            let Candidate { path, oid, size } = candidate;
            let content = handles.with(|repo| {
                let unreadable = |e: &git2::Error| pinned.unreadable(path.as_bytes(), oid, e);
                let odb = repo.odb().map_err(|e| unreadable(&e))?;
                let blob = odb.read(oid).map_err(|e| unreadable(&e))?;
                match blob.kind() {
                    ObjectType::Blob => Ok(filter.content(&path, blob.data())),
                    _ => Err(unreadable(&git2::Error::from_str("it is listed as a file but is no blob"))),
                }
            })?;
            Ok(content.map(|content| File { path, content, size_bytes: size as u64 }))
        })
        .collect();
    let mut files = Vec::with_capacity(outcomes.len());
    for outcome in outcomes {
        match outcome? {
            Ok(file) => files.push(file),
            Err(reason) => drops.add(reason),
        }
    }
    Ok(files)
}

/// Open handles of one repository. A handle serves one thread at a time, because libgit2 inflates objects
/// under the lock of its object store.
struct Handles<F> {
    open: F,
    idle: Mutex<Vec<Repository>>,
}

impl<F: Fn() -> Result<Repository, Error>> Handles<F> {
    fn with<T>(&self, read: impl FnOnce(&Repository) -> Result<T, Error>) -> Result<T, Error> {
        let idle = || self.idle.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let taken = idle().pop();
        let repo = match taken {
            Some(repo) => repo,
            None => (self.open)()?,
        };
        let result = read(&repo);
        idle().push(repo);
        result
    }
}
