//! The paths of a commit, in tree order, without loading file contents.

use git2::{ObjectType, Oid, Repository, Tree};

use super::Error;
use super::attributes::{self, Attributes, Marks};
use super::fetch::Pinned;

/// Far above any real repository; a few small trees that contain each other can claim billions.
const MAX_PATHS: u64 = 20_000_000;
/// `PATH_MAX` of Linux: deeper trees cannot have been made from files.
const MAX_PATH_BYTES: usize = 4096;

/// What an entry is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A regular file.
    File,
    /// A symbolic link.
    Symlink,
    /// The commit of another repository.
    Submodule,
    /// A directory whose path is too long to descend into.
    TooDeep,
}

/// One path of the commit.
#[derive(Debug)]
pub struct Entry {
    /// Path bytes as git has them, with `/` between components.
    pub path: Vec<u8>,
    /// Its object.
    pub oid: Oid,
    /// What it is.
    pub kind: Kind,
    /// What `.gitattributes` says of it.
    pub marks: Marks,
}

/// Depth-first walk; a tree is loaded when it is entered. Nothing of the repository is held between two steps, so that
/// it may be closed and opened again.
pub struct Walk<'a> {
    pinned: &'a Pinned,
    open: Vec<OpenTree>,
    attributes: Attributes,
    paths: u64,
}

struct OpenTree {
    /// What has not been visited.
    entries: std::vec::IntoIter<TreeEntry>,
    /// Path with a trailing slash, empty for the top.
    prefix: Vec<u8>,
    /// Whether there is a `.gitattributes` in it.
    has_attributes: bool,
}

/// An entry as the tree has it.
struct TreeEntry {
    name: Vec<u8>,
    oid: Oid,
    object: Option<ObjectType>,
    mode: i32,
}

impl<'a> Walk<'a> {
    /// A walk over `commit` of `repo`, which `pinned` names.
    pub fn new(repo: &Repository, pinned: &'a Pinned, commit: Oid) -> Result<Self, Error> {
        let tree = repo
            .find_commit(commit)
            .and_then(|commit| commit.tree())
            .map_err(|e| pinned.unreadable(b"", commit, &e))?;
        let mut walk = Self { pinned, open: Vec::new(), attributes: Attributes::default(), paths: 0 };
        walk.enter(repo, &tree, Vec::new());
        Ok(walk)
    }

    /// The next path of the same commit in `repo`; none after the last one.
    pub fn next(&mut self, repo: &Repository) -> Result<Option<Entry>, Error> {
        while let Some(top) = self.open.last_mut() {
            let Some(entry) = top.entries.next() else {
                if top.has_attributes {
                    self.attributes.leave();
                }
                self.open.pop();
                continue;
            };
            self.paths += 1;
            if self.paths > MAX_PATHS {
                return Err(Error::TooManyPaths { repo_id: self.pinned.repo_id.clone(), limit: MAX_PATHS });
            }
            let TreeEntry { name, oid, object, mode } = entry;
            let mut path = top.prefix.clone();
            path.extend_from_slice(&name);
            let kind = match object {
                Some(ObjectType::Commit) => Kind::Submodule,
                Some(ObjectType::Tree) if path.len() < MAX_PATH_BYTES => {
                    let tree = repo.find_tree(oid).map_err(|e| self.pinned.unreadable(&path, oid, &e))?;
                    path.push(b'/');
                    self.enter(repo, &tree, path);
                    continue;
                }
                Some(ObjectType::Tree) => Kind::TooDeep,
                _ if mode & 0o170_000 == 0o120_000 => Kind::Symlink,
                _ => Kind::File,
            };
            let marks = self.attributes.of(&path);
            return Ok(Some(Entry { path, oid, kind, marks }));
        }
        Ok(None)
    }

    fn enter(&mut self, repo: &Repository, tree: &Tree<'_>, prefix: Vec<u8>) {
        let named = tree.get_name(attributes::FILE_NAME);
        let blob = named.and_then(|entry| repo.find_blob(entry.id()).ok());
        let blob = blob.filter(|blob| blob.size() <= attributes::MAX_BYTES);
        if let Some(blob) = &blob {
            self.attributes.enter(&prefix, blob.content());
        }
        let has_attributes = blob.is_some();
        let entry = |entry: git2::TreeEntry<'_>| TreeEntry {
            name: entry.name_bytes().to_vec(),
            oid: entry.id(),
            object: entry.kind(),
            mode: entry.filemode_raw(),
        };
        let entries = tree.iter().map(entry).collect::<Vec<_>>().into_iter();
        self.open.push(OpenTree { entries, prefix, has_attributes });
    }
}
