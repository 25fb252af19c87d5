//! Which files of a commit were changed since a day, by the commits that lead to it.

use std::collections::HashSet;

use git2::{DiffOptions, Oid, Repository, Sort};

use super::Error;
use super::fetch::Pinned;

/// Paths that commits of `since` (seconds since 1970) or later have changed. A merge changes nothing by itself: what it
/// brings together was changed by other commits.
pub fn changed_since(pinned: &Pinned, since: i64) -> Result<HashSet<Vec<u8>>, Error> {
    let Some(commit) = pinned.commit else { return Ok(HashSet::new()) };
    let unreadable = |oid: Oid| move |e: git2::Error| pinned.unreadable(b"", oid, &e);
    let repo = Repository::open(&pinned.git_dir).map_err(unreadable(commit))?;
    let mut walk = repo.revwalk().map_err(unreadable(commit))?;
    walk.set_sorting(Sort::TIME).map_err(unreadable(commit))?;
    walk.push(commit).map_err(unreadable(commit))?;
    let mut changed = HashSet::new();
    for oid in walk {
        let oid = oid.map_err(unreadable(commit))?;
        let found = repo.find_commit(oid).map_err(unreadable(oid))?;
        // Clocks differ: a later commit may stand behind an earlier one, so all are looked at.
        if found.time().seconds() < since || found.parent_count() > 1 {
            continue;
        }
        let tree = found.tree().map_err(unreadable(oid))?;
        let before = match found.parent_count() {
            0 => None,
            _ => Some(found.parent(0).and_then(|parent| parent.tree()).map_err(unreadable(oid))?),
        };
        let mut options = DiffOptions::new();
        options.skip_binary_check(true).include_typechange(true);
        let diff = repo.diff_tree_to_tree(before.as_ref(), Some(&tree), Some(&mut options));
        for delta in diff.map_err(unreadable(oid))?.deltas() {
            if let Some(path) = delta.new_file().path_bytes() {
                changed.insert(path.to_vec());
            }
        }
    }
    Ok(changed)
}
