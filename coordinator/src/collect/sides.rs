//! Which side of the split a file is on, without leakage: by file (files that are alike stay together), by repository,
//! or by the day of the last change.

use std::collections::HashSet;

use rayon::prelude::*;
use tunefleet_proto::job::{CollectSpec, DuplicateMode, SplitBy, day_start};

use super::Error;
use super::inputs::Ready;
use super::write::read_all;
use crate::dataset::split::Split;
use crate::repos::duplicates::Clusters;
use crate::repos::files::File;
use crate::repos::filter::FileFilter;
use crate::repos::history;

/// Whether commits before the pinned one are looked at.
pub fn needs_history(spec: &CollectSpec) -> bool {
    matches!(spec.split_by, SplitBy::Date(_))
}

/// The split of a job; a file whose key it holds out is in the validation part.
pub fn split(spec: &CollectSpec) -> Split {
    match &spec.split_by {
        SplitBy::File | SplitBy::Repository => Split::new(spec.validation_fraction, spec.split_seed),
        SplitBy::Date(_) => Split::of_marked(),
    }
}

/// Gives files their keys.
pub enum Sides {
    /// Each its own.
    File(Split),
    /// Those that are alike one: keys of all files in their order, and how many were given.
    Clusters { keys: Vec<u64>, given: usize },
    /// Those of a repository one.
    Repository(Split),
    /// Paths of the repository that is read which were changed since a day, as seconds since 1970.
    Date { since: i64, changed: HashSet<Vec<u8>> },
}

impl Sides {
    /// Those of a job. Files that are alike are looked for where all of them are kept and some are held out, by reading
    /// everything once more.
    pub fn new(
        spec: &CollectSpec,
        split: Split,
        ready: &[Ready],
        filter: &FileFilter,
    ) -> Result<Self, Error> {
        match &spec.split_by {
            SplitBy::Repository => Ok(Sides::Repository(split)),
            SplitBy::Date(day) => {
                Ok(Sides::Date { since: day_start(day).unwrap_or(i64::MAX), changed: HashSet::new() })
            }
            SplitBy::File if spec.duplicates == DuplicateMode::DropNear || !split.is_wanted() => {
                Ok(Sides::File(split))
            }
            SplitBy::File => {
                Ok(Sides::Clusters { keys: cluster_keys(spec, split, ready, filter)?, given: 0 })
            }
        }
    }

    /// Goes on to the next source.
    pub fn enter(&mut self, ready: &Ready) -> Result<(), Error> {
        if let (Sides::Date { since, changed }, Ready::Repository(pinned)) = (self, ready) {
            *changed = history::changed_since(pinned, *since)?;
        }
        Ok(())
    }

    /// The key of the next file.
    pub fn key(&mut self, repo_id: &str, file: &File) -> u64 {
        let repo_id = file.repo_id.as_deref().unwrap_or(repo_id);
        match self {
            Sides::File(split) => split.key(repo_id, &file.path),
            Sides::Repository(split) => split.key(repo_id, ""),
            Sides::Clusters { keys, given } => {
                *given += 1;
                keys.get(*given - 1).copied().unwrap_or(u64::MAX)
            }
            // Rows of others' datasets have no history, and are old.
            Sides::Date { changed, .. } => match changed.contains(file.path.as_bytes()) {
                true => 0,
                false => u64::MAX,
            },
        }
    }
}

/// For each file that will be kept, in order, the key of the first file that it is alike to.
fn cluster_keys(
    spec: &CollectSpec,
    split: Split,
    ready: &[Ready],
    filter: &FileFilter,
) -> Result<Vec<u64>, Error> {
    let mut clusters = Clusters::new(spec.near_duplicate_similarity);
    let mut keys = Vec::new();
    read_all(spec, ready, filter, |repo_id, files| {
        let sketcher = clusters.sketcher();
        let sketches: Vec<_> = files.par_iter().map(|file| sketcher.sketch(&file.content)).collect();
        for (file, sketch) in files.iter().zip(&sketches) {
            clusters.add(&file.content, sketch.as_ref());
            keys.push(split.key(file.repo_id.as_deref().unwrap_or(repo_id), &file.path));
        }
        true
    })?;
    let leaders = clusters.leaders();
    Ok(leaders.into_iter().map(|leader| keys.get(leader).copied().unwrap_or(u64::MAX)).collect())
}
