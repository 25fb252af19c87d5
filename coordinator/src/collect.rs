//! `coordinator collect`: from repositories to a dataset. `launch` calls [`collect`] as its first stage.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, sync_channel};
use std::thread;

use tunefleet_proto::dataset::{MANIFEST_VERSION, Manifest, Repository};
use tunefleet_proto::job::CollectSpec;

use crate::dataset::split::Split;
use crate::dataset::staging::Staging;
use crate::dataset::writer::{Row, Writer, Written};
use crate::dataset::{self, manifest};
use crate::progress::Progress;
use crate::repos;
use crate::repos::duplicates::Duplicates;
use crate::repos::fetch::{self, Head, Pinned, Source};
use crate::repos::files::{self, File};
use crate::repos::filter::{Counts, FileFilter};
use crate::repos::secrets::Secrets;

/// The command line.
mod verb;

pub use verb::{Args, run};

/// Rises when the same commits and settings would give another dataset.
const COLLECT_VERSION: u32 = 2;
/// Windows of files between the threads that read and the one that writes.
const WINDOWS_IN_FLIGHT: usize = 2;

/// A dataset that was not collected.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Every repository that failed, in the order of the sources.
    #[error("{}", .0.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n"))]
    Repositories(Vec<repos::Error>),
    /// The dataset cannot be written.
    #[error(transparent)]
    Dataset(#[from] dataset::Error),
    /// A thread died.
    #[error("a collecting thread panicked; this is a bug, please report it with the lines above")]
    Panicked,
}

impl From<repos::Error> for Error {
    fn from(error: repos::Error) -> Self {
        Self::Repositories(vec![error])
    }
}

/// Collects the sources of `spec` into the dataset directory `out_dir`, which is replaced as a whole. Remote
/// repositories are kept under `cache_dir`. If the dataset that is there came from the same commits and
/// settings, it stays and nothing is fetched or written.
pub fn collect(
    spec: &CollectSpec,
    cache_dir: &Path,
    out_dir: &Path,
    progress: &dyn Progress,
) -> Result<Manifest, Error> {
    let sources = fetch::sources(&spec.sources)?;
    note_uncommitted_work(&sources, progress);
    let heads = each_source(&sources, spec, |source, _| source.resolve())?;
    if let Some(manifest) = unchanged(spec, &sources, &heads, out_dir) {
        return Ok(manifest);
    }
    let staging = Staging::begin(out_dir)?;
    let pinned = each_source(&sources, spec, |source, index| {
        let task = progress.task(&source.location.repo_id);
        match heads.get(index) {
            Some(head) => source.fetch(head, cache_dir, task.as_ref()),
            None => source.fetch(&source.resolve()?, cache_dir, task.as_ref()),
        }
    })?;

    let mut split = Split::new(spec.validation_fraction, spec.split_seed);
    let (written, repositories, counts) = loop {
        let (written, repositories, counts) = write_segments(spec, &pinned, split, staging.dir(), progress)?;
        match written.mended {
            // Only where there are a handful of files: reading them twice costs nothing.
            Some(mended) => split = mended,
            None => break (written, repositories, counts),
        }
        staging.clear()?;
    };
    let (dropped, found) = counts.into_manifest();
    let manifest = Manifest {
        version: MANIFEST_VERSION,
        written_by: written_by(),
        settings: settings(spec, &sources),
        repositories,
        train: written.train,
        validation: written.validation,
        dropped,
        found,
    };
    manifest::write(staging.dir(), &manifest)?;
    staging.publish()?;
    Ok(manifest)
}

/// A digest of everything that the dataset will follow from: the settings, the commits that the sources stand
/// at now, and this program's way of collecting.
pub fn input_digest(spec: &CollectSpec) -> Result<String, Error> {
    let sources = fetch::sources(&spec.sources)?;
    let heads = each_source(&sources, spec, |source, _| source.resolve())?;
    let commits: Vec<_> = heads.iter().map(|head| head.commit_hex()).collect();
    let inputs = serde_json::json!([settings(spec, &sources), commits, written_by(), MANIFEST_VERSION]);
    Ok(tunefleet_proto::digest_hex(inputs.to_string().as_bytes()))
}

/// Whether `manifest` was collected with the settings of `spec`, from whatever commits.
pub fn was_asked_for(spec: &CollectSpec, manifest: &Manifest) -> Result<bool, Error> {
    Ok(manifest.settings == settings(spec, &fetch::sources(&spec.sources)?))
}

fn written_by() -> String {
    format!("tunefleet-coordinator {} (collect {COLLECT_VERSION})", env!("CARGO_PKG_VERSION"))
}

/// The spec as the manifest has it: without credentials, and without what does not change the dataset.
fn settings(spec: &CollectSpec, sources: &[Source]) -> serde_json::Value {
    let mut spec = spec.clone();
    for (source_spec, source) in spec.sources.iter_mut().zip(sources) {
        source_spec.location.clone_from(&source.location.shown);
    }
    let mut settings = serde_json::to_value(&spec).unwrap_or_default();
    if let Some(fields) = settings.as_object_mut() {
        fields.remove("parallel_fetches");
    }
    settings
}

/// The dataset in `out_dir`, if collecting again would give the same.
fn unchanged(spec: &CollectSpec, sources: &[Source], heads: &[Head], out_dir: &Path) -> Option<Manifest> {
    let manifest = manifest::read(out_dir).ok()?;
    let commits = manifest.repositories.iter().map(|r| r.commit.as_str());
    let is_complete =
        manifest.train.iter().chain(&manifest.validation).all(|segment| {
            out_dir.join(&segment.file).metadata().is_ok_and(|meta| meta.len() == segment.bytes)
        });
    let is_same = manifest.version == MANIFEST_VERSION
        && manifest.written_by == written_by()
        && manifest.settings == settings(spec, sources)
        && commits.eq(heads.iter().map(Head::commit_hex));
    (is_complete && is_same).then_some(manifest)
}

fn note_uncommitted_work(sources: &[Source], progress: &dyn Progress) {
    for source in sources {
        if source.revision.is_none() && source.has_uncommitted_work() {
            let place = &source.location.shown;
            progress.note(&format!(
                "note: {place} has uncommitted work, which is not collected; commit it first"
            ));
        }
    }
}

/// Runs `work` for every source, at most `parallel_fetches` at a time (libgit2 blocks its thread), and reports
/// all that fail, not only the first.
fn each_source<T: Send>(
    sources: &[Source],
    spec: &CollectSpec,
    work: impl Fn(&Source, usize) -> Result<T, repos::Error> + Sync,
) -> Result<Vec<T>, Error> {
    let next = AtomicUsize::new(0);
    let results = Mutex::new(BTreeMap::new());
    let threads = (spec.parallel_fetches.max(1) as usize).min(sources.len());
    thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                loop {
                    let index = next.fetch_add(1, Ordering::Relaxed);
                    let Some(source) = sources.get(index) else { return };
                    let result = work(source, index);
                    results.lock().unwrap_or_else(std::sync::PoisonError::into_inner).insert(index, result);
                }
            });
        }
    });
    let results = results.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
    let mut done = Vec::with_capacity(sources.len());
    let mut failed = Vec::new();
    for result in results.into_values() {
        match result {
            Ok(value) => done.push(value),
            Err(error) => failed.push(error),
        }
    }
    match failed.is_empty() {
        true => Ok(done),
        false => Err(Error::Repositories(failed)),
    }
}

type Collected = (Written, Vec<Repository>, Counts);

/// Files of one repository on their way to the writer.
struct Batch<'a> {
    repo_id: &'a str,
    commit: &'a str,
    files: Vec<File>,
}

/// Reads all repositories in order and writes their files; reading and compressing overlap.
fn write_segments(
    spec: &CollectSpec,
    pinned: &[Pinned],
    split: Split,
    dir: &Path,
    progress: &dyn Progress,
) -> Result<Collected, Error> {
    let secrets = Secrets::new(spec.secrets, !spec.keep_email_addresses);
    let filter = FileFilter::new(&spec.filters, spec.notebooks, secrets);
    let commits: Vec<_> = pinned.iter().map(Pinned::commit_hex).collect();
    let mut repositories = Vec::with_capacity(pinned.len());
    let mut counts = Counts::default();
    let mut duplicates = Duplicates::new(spec.duplicates, spec.near_duplicate_similarity);
    let writer = Writer::new(dir, spec.format, split);
    let written = thread::scope(|scope| {
        let (sender, receiver) = sync_channel(WINDOWS_IN_FLIGHT);
        let writing = scope.spawn(move || write_batches(writer, receiver));
        let mut read_all = || {
            for (pinned, commit) in pinned.iter().zip(&commits) {
                let task = progress.task(&pinned.repo_id);
                let (mut files, mut bytes) = (0, 0);
                files::read(pinned, &filter, &mut duplicates, &mut counts, |window| {
                    files += window.len() as u64;
                    bytes += window.iter().map(|file| file.content.len() as u64).sum::<u64>();
                    task.position(files);
                    // The writer hangs up when it fails; its error is taken below.
                    sender.send(Batch { repo_id: &pinned.repo_id, commit, files: window }).is_ok()
                })?;
                repositories.push(Repository {
                    repo_id: pinned.repo_id.clone(),
                    location: pinned.location.clone(),
                    commit: commit.clone(),
                    files,
                    bytes,
                });
            }
            Ok::<_, repos::Error>(())
        };
        let read = read_all();
        drop(sender);
        let written = writing.join().map_err(|_| Error::Panicked)?;
        read?;
        Ok::<_, Error>(written?)
    })?;
    Ok((written, repositories, counts))
}

fn write_batches(mut writer: Writer, batches: Receiver<Batch<'_>>) -> Result<Written, dataset::Error> {
    for batch in batches {
        for file in &batch.files {
            writer.push(Row {
                repo_id: batch.repo_id,
                file_path: &file.path,
                content: &file.content,
                commit: batch.commit,
                size_bytes: file.size_bytes,
            })?;
        }
    }
    writer.finish()
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use tunefleet_proto::job::{
        DuplicateMode, NotebookMode, SecretMode, SegmentFormat, SourceSpec, default_filters,
    };

    use super::*;
    use crate::progress::Task;

    /// Removes a repository when its `nth` task begins.
    struct Vanishing {
        repository: PathBuf,
        nth: usize,
        seen: AtomicUsize,
    }

    struct NoTask;

    impl Task for NoTask {
        fn length(&self, _total: u64) {}
        fn position(&self, _done: u64) {}
    }

    impl Progress for Vanishing {
        fn task(&self, label: &str) -> Box<dyn Task> {
            if self.repository.ends_with(label) && self.seen.fetch_add(1, Ordering::Relaxed) + 1 == self.nth {
                std::fs::remove_dir_all(&self.repository).unwrap();
            }
            Box::new(NoTask)
        }

        fn note(&self, _text: &str) {}
    }

    fn repository(dir: &Path) {
        let repository = git2::Repository::init(dir).unwrap();
        for file in 0..20 {
            std::fs::write(dir.join(format!("{file}.py")), format!("x = {file}\n")).unwrap();
        }
        let mut index = repository.index().unwrap();
        index.add_all(["*"], git2::IndexAddOption::DEFAULT, None).unwrap();
        let tree = repository.find_tree(index.write_tree().unwrap()).unwrap();
        let author = git2::Signature::now("Test", "test@example.invalid").unwrap();
        repository.commit(Some("HEAD"), &author, &author, "Begin", &tree, &[]).unwrap();
    }

    #[test]
    fn a_repository_that_vanishes_midway_is_named_and_the_earlier_dataset_stays() {
        // Between looking and fetching, and between fetching and reading.
        for nth in [1, 2] {
            let dir = tempfile::tempdir().unwrap();
            let path = |name: &str| dir.path().canonicalize().unwrap().join(name);
            repository(&path("stays"));
            repository(&path("vanishes"));
            let source = |name| SourceSpec { location: path(name).display().to_string(), revision: None };
            let mut spec = CollectSpec {
                sources: vec![source("stays")],
                filters: default_filters(),
                notebooks: NotebookMode::CodeCells,
                format: SegmentFormat::Arrow,
                validation_fraction: 0.1,
                split_seed: 0,
                parallel_fetches: 2,
                secrets: SecretMode::Redact,
                keep_email_addresses: false,
                duplicates: DuplicateMode::Keep,
                near_duplicate_similarity: 0.7,
            };
            let vanishing = Vanishing { repository: path("vanishes"), nth, seen: AtomicUsize::new(0) };
            let (cache, out) = (path("cache"), path("out"));
            let earlier = collect(&spec, &cache, &out, &vanishing).unwrap();
            spec.sources.push(source("vanishes"));
            let error = collect(&spec, &cache, &out, &vanishing).unwrap_err().to_string();
            assert!(error.contains("vanishes"), "{error}");
            assert_eq!(manifest::read(&out).unwrap(), earlier, "the earlier dataset is gone");
            assert!(!path("vanishes").exists());
        }
    }
}
