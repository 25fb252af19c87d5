//! All files of all sources into segments; reading and compressing overlap.

use std::collections::BTreeMap;
use std::sync::mpsc::{Receiver, sync_channel};
use std::thread;

use tunefleet_proto::dataset::{Repository, Segment};
use tunefleet_proto::job::{CollectSpec, ContentKind};

use super::Error;
use super::inputs::Ready;
use super::sides::{self, Sides};
use crate::dataset;
use crate::dataset::split::Split;
use crate::dataset::staging::Staging;
use crate::dataset::writer::{self, Row, Writer};
use crate::progress::Progress;
use crate::repos::duplicates::Duplicates;
use crate::repos::files::{self, File};
use crate::repos::filter::{Counts, FileFilter};
use crate::tables;

/// Windows of files between the threads that read and the one that writes.
const WINDOWS_IN_FLIGHT: usize = 2;

/// What the manifest says of the files.
pub struct Written {
    /// Sources in their order.
    pub repositories: Vec<Repository>,
    /// Segments of the training split.
    pub train: Vec<Segment>,
    /// Segments of the validation split.
    pub validation: Vec<Segment>,
    /// Files dropped, by reason.
    pub dropped: BTreeMap<String, u64>,
    /// Keys, passwords and addresses, by kind.
    pub found: BTreeMap<String, u64>,
}

/// Writes all files into `staging`.
pub fn all(
    spec: &CollectSpec,
    ready: &[Ready],
    filter: &FileFilter,
    staging: &Staging,
    progress: &dyn Progress,
) -> Result<Written, Error> {
    let mut split = sides::split(spec);
    loop {
        let (segments, repositories, counts) = once(spec, ready, filter, split, staging, progress)?;
        if let Some(mended) = segments.mended {
            // Only where there are a handful of files: reading them twice costs nothing.
            split = mended;
            staging.clear()?;
            continue;
        }
        if let Some(first) = &counts.first_invalid {
            progress.note(&format!(
                "note: conversations that break a rule are left out, of which the first is {first}"
            ));
        }
        let (dropped, found) = counts.into_manifest();
        let (train, validation) = (segments.train, segments.validation);
        return Ok(Written { repositories, train, validation, dropped, found });
    }
}

/// Files of one source on their way to the writer, each with its key.
struct Batch<'a> {
    repo_id: &'a str,
    commit: &'a str,
    files: Vec<(u64, File)>,
}

type Once = (writer::Written, Vec<Repository>, Counts);

fn once(
    spec: &CollectSpec,
    ready: &[Ready],
    filter: &FileFilter,
    split: Split,
    staging: &Staging,
    progress: &dyn Progress,
) -> Result<Once, Error> {
    let mut sides = Sides::new(spec, split, ready, filter)?;
    let mut repositories: Vec<Repository> = ready.iter().map(entry).collect();
    let pinned: Vec<_> = repositories.iter().map(|r| (r.repo_id.clone(), r.commit.clone())).collect();
    let mut counts = Counts::default();
    let mut duplicates = Duplicates::new(spec.duplicates, spec.near_duplicate_similarity);
    let writer = Writer::new(staging.dir(), spec.format, split);
    let written = thread::scope(|scope| {
        let (sender, receiver) = sync_channel(WINDOWS_IN_FLIGHT);
        let writing = scope.spawn(move || write_batches(writer, receiver));
        let mut read_all = || {
            for ((ready, (repo_id, commit)), repository) in ready.iter().zip(&pinned).zip(&mut repositories) {
                let task = progress.task(repo_id);
                sides.enter(ready)?;
                let held_out = matches!(ready, Ready::Table(table) if table.held_out);
                repository.licenses = read(spec, ready, filter, &mut duplicates, &mut counts, |window| {
                    repository.files += window.len() as u64;
                    repository.bytes += window.iter().map(|file| file.content.len() as u64).sum::<u64>();
                    task.position(repository.files);
                    let files = window.into_iter().map(|file| {
                        let key = sides.key(repo_id, &file);
                        (if held_out { Split::HELD_OUT } else { key }, file)
                    });
                    // The writer hangs up when it fails; its error is taken below.
                    sender.send(Batch { repo_id, commit, files: files.collect() }).is_ok()
                })?;
            }
            Ok::<_, Error>(())
        };
        let read = read_all();
        drop(sender);
        let written = writing.join().map_err(|_| Error::Panicked)?;
        read?;
        Ok::<_, Error>(written?)
    })?;
    Ok((written, repositories, counts))
}

/// Reads the files that will be kept, with nothing written or counted.
pub fn read_all(
    spec: &CollectSpec,
    ready: &[Ready],
    filter: &FileFilter,
    mut take: impl FnMut(&str, &[File]) -> bool,
) -> Result<(), Error> {
    let mut duplicates = Duplicates::new(spec.duplicates, spec.near_duplicate_similarity);
    let mut counts = Counts::default();
    for ready in ready {
        let repo_id = entry(ready).repo_id;
        read(spec, ready, filter, &mut duplicates, &mut counts, |window| take(&repo_id, &window))?;
    }
    Ok(())
}

/// Hands on the files of one source; the licences that it is under.
fn read(
    spec: &CollectSpec,
    ready: &Ready,
    filter: &FileFilter,
    duplicates: &mut Duplicates,
    counts: &mut Counts,
    take: impl FnMut(Vec<File>) -> bool,
) -> Result<Vec<String>, Error> {
    match ready {
        Ready::Repository(pinned) => Ok(files::read(pinned, filter, duplicates, counts, take)?),
        Ready::Table(table) => {
            match spec.kind {
                ContentKind::Code => tables::read(table, filter, duplicates, counts, take)?,
                ContentKind::Chat => {
                    let invalid = spec.invalid_conversations;
                    tables::read_conversations(table, filter, invalid, duplicates, counts, take)?;
                }
            }
            Ok(Vec::new())
        }
    }
}

/// A source in the manifest, before its files have been counted.
fn entry(ready: &Ready) -> Repository {
    let (repo_id, location, commit) = match ready {
        Ready::Repository(pinned) => (&pinned.repo_id, &pinned.location, pinned.commit_hex()),
        Ready::Table(table) => (&table.name, &table.location, table.state.clone()),
    };
    Repository {
        repo_id: repo_id.clone(),
        location: location.clone(),
        commit,
        licenses: Vec::new(),
        files: 0,
        bytes: 0,
    }
}

fn write_batches(
    mut writer: Writer,
    batches: Receiver<Batch<'_>>,
) -> Result<writer::Written, dataset::Error> {
    for batch in batches {
        for (key, file) in &batch.files {
            let row = Row {
                repo_id: file.repo_id.as_deref().unwrap_or(batch.repo_id),
                file_path: &file.path,
                content: &file.content,
                commit: batch.commit,
                size_bytes: file.size_bytes,
            };
            writer.push(*key, row)?;
        }
    }
    writer.finish()
}
