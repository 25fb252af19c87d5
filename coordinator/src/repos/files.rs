//! The kept files of a commit, read in parallel and handed on in tree order.

use std::sync::Mutex;

use git2::{ErrorCode, ObjectType, Oid, Repository};
use rayon::prelude::*;

use super::attributes::Marks;
use super::duplicates::{Duplicates, Sketch, Sketcher};
use super::fetch::Pinned;
use super::filter::{Counts, DropReason, FileFilter, is_notebook};
use super::secrets::Found;
use super::tree::Walk;
use super::{Error, licenses};

/// Files are read in windows of at most this many files and, but for a single larger file, bytes: enough to
/// keep all cores busy, and the bound on memory.
pub(crate) const WINDOW_FILES: usize = 1024;
pub(crate) const WINDOW_BYTES: usize = 32 << 20;
/// After so much text a repository is opened anew: what libgit2 has mapped of its packs is let go.
const REOPEN_BYTES: usize = 256 << 20;

/// A file that is kept.
#[derive(Debug)]
pub struct File {
    /// The repository, where it is not the one that is read.
    pub repo_id: Option<String>,
    /// Path inside the repository.
    pub path: String,
    /// Its text.
    pub content: String,
    /// Size of the blob; for notebooks not the size of `content`.
    pub size_bytes: u64,
}

struct Candidate {
    path: String,
    marks: Marks,
    oid: Oid,
    size: usize,
}

/// Reads the files of `pinned` that pass `filter`, window by window, until `take` says that it wants no more. Gives
/// back the licences that the repository is under.
pub fn read(
    pinned: &Pinned,
    filter: &FileFilter,
    duplicates: &mut Duplicates,
    counts: &mut Counts,
    mut take: impl FnMut(Vec<File>) -> bool,
) -> Result<Vec<String>, Error> {
    let Some(commit) = pinned.commit else { return Ok(Vec::new()) };
    let open = || Repository::open(&pinned.git_dir).map_err(|e| pinned.unreadable(b"", commit, &e));
    let mut repo = open()?;
    let handles = Handles { open, idle: Mutex::new(Vec::new()) };

    let is_partial = is_partial(&repo);
    let found_licenses = licenses_of(&repo, commit).map_err(|e| pinned.unreadable(b"", commit, &e))?;
    let mut walk = Walk::new(&repo, pinned, commit)?;
    if !filter.licenses.takes_repository(&found_licenses) {
        while walk.next(&repo)?.is_some() {
            counts.drop_file(DropReason::License);
        }
        return Ok(found_licenses);
    }

    let mut window = Vec::new();
    let (mut window_bytes, mut read_bytes) = (0, 0);
    loop {
        let entry = walk.next(&repo)?;
        let full = window.len() == WINDOW_FILES || window_bytes >= WINDOW_BYTES;
        if (entry.is_none() || full) && !window.is_empty() {
            let read =
                read_window(std::mem::take(&mut window), pinned, filter, duplicates.sketcher(), &handles)?;
            let files = first_ones(read, duplicates, counts);
            read_bytes += std::mem::take(&mut window_bytes);
            if !take(files) {
                return Ok(found_licenses);
            }
            if read_bytes >= REOPEN_BYTES {
                read_bytes = 0;
                handles.close();
                repo = open()?;
            }
        }
        let Some(entry) = entry else { return Ok(found_licenses) };
        let path = match filter.path(entry.path, entry.kind, entry.marks) {
            Ok(path) => path,
            Err(reason) => {
                counts.drop_file(reason);
                continue;
            }
        };
        // The header alone: a file that is too large is never loaded.
        let header = repo.odb().and_then(|odb| odb.read_header(entry.oid));
        let size = match header {
            Ok((size, _)) => size,
            Err(error) if error.code() == ErrorCode::NotFound && is_partial => {
                counts.drop_file(DropReason::NotFetched);
                continue;
            }
            Err(error) => return Err(pinned.unreadable(path.as_bytes(), entry.oid, &error)),
        };
        match filter.size(&path, size) {
            Ok(()) if !duplicates.is_new_blob(entry.oid, is_notebook(&path)) => {
                counts.drop_file(DropReason::Duplicate)
            }
            Ok(()) => {
                window_bytes += size;
                window.push(Candidate { path, marks: entry.marks, oid: entry.oid, size });
            }
            Err(reason) => counts.drop_file(reason),
        }
    }
}

/// A file that passed the filters, and what is remembered of it; or why it did not pass. And what was found in it.
pub(crate) type Read = (Result<(File, Option<Sketch>), DropReason>, Found);

fn read_window<F>(
    window: Vec<Candidate>,
    pinned: &Pinned,
    filter: &FileFilter,
    sketcher: Option<Sketcher>,
    handles: &Handles<F>,
) -> Result<Vec<Read>, Error>
where
    F: Fn() -> Result<Repository, Error> + Sync,
{
    window
        .into_par_iter()
        .map(|candidate| {
            let Candidate { path, marks, oid, size } = candidate;
            let mut found = Found::new();
            let content = handles.with(|repo| {
                let unreadable = |e: &git2::Error| pinned.unreadable(path.as_bytes(), oid, e);
                let odb = repo.odb().map_err(|e| unreadable(&e))?;
                let blob = odb.read(oid).map_err(|e| unreadable(&e))?;
                match blob.kind() {
                    ObjectType::Blob => Ok(filter.content(&path, marks, blob.data(), &mut found)),
                    _ => Err(unreadable(&git2::Error::from_str("it is listed as a file but is no blob"))),
                }
            })?;
            let file = content.map(|content| {
                let sketch = sketcher.and_then(|sketcher| sketcher.sketch(&content));
                (File { repo_id: None, path, content, size_bytes: size as u64 }, sketch)
            });
            Ok((file, found))
        })
        .collect()
}

/// Whether the repository was cloned with a filter, so that git would fetch what is missing when it is asked for.
fn is_partial(repo: &Repository) -> bool {
    let packs = std::fs::read_dir(repo.commondir().join("objects/pack"));
    let mut names = packs.into_iter().flatten().flatten().map(|entry| entry.file_name());
    names.any(|name| name.as_encoded_bytes().ends_with(b".promisor"))
}

/// Licences whose texts stand in the top directory, by their identifiers.
fn licenses_of(repo: &Repository, commit: Oid) -> Result<Vec<String>, git2::Error> {
    let tree = repo.find_commit(commit)?.tree()?;
    let mut found = Vec::new();
    for entry in &tree {
        let is_wanted =
            entry.kind() == Some(ObjectType::Blob) && entry.name().is_ok_and(licenses::is_license_file);
        // A text that cannot be read is met again by the walk, which says so.
        let Some(blob) = is_wanted.then(|| repo.find_blob(entry.id()).ok()).flatten() else { continue };
        if blob.size() <= licenses::MAX_TEXT_BYTES {
            found.extend(licenses::identify(&String::from_utf8_lossy(blob.content())));
        }
    }
    found.sort();
    found.dedup();
    Ok(found)
}

/// The files of which none before says nearly the same, in their order.
pub(crate) fn first_ones(read: Vec<Read>, duplicates: &mut Duplicates, counts: &mut Counts) -> Vec<File> {
    let mut files = Vec::with_capacity(read.len());
    for (outcome, found) in read {
        match outcome {
            Ok((file, sketch)) if duplicates.is_new_text(sketch.as_ref()) => files.push(file),
            Ok(_) => {
                counts.drop_file(DropReason::NearDuplicate);
                continue;
            }
            Err(reason) => counts.drop_file(reason),
        }
        counts.find(&found);
    }
    files
}

/// Open handles of one repository. A handle serves one thread at a time, because libgit2 inflates objects
/// under the lock of its object store.
struct Handles<F> {
    open: F,
    idle: Mutex<Vec<Repository>>,
}

impl<F: Fn() -> Result<Repository, Error>> Handles<F> {
    fn close(&self) {
        self.idle.lock().unwrap_or_else(std::sync::PoisonError::into_inner).clear();
    }

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
