//! `coordinator collect`: from sources to a dataset. `launch` calls [`collect`] as its first stage.

use std::path::Path;
use std::time::Duration;

use tunefleet_proto::dataset::{MANIFEST_VERSION, Manifest};
use tunefleet_proto::job::{CollectSpec, SourceSpec};

use crate::dataset::staging::Staging;
use crate::dataset::{self, manifest};
use crate::progress::{self, Progress};
use crate::repos::fetch::Fetching;
use crate::repos::filter::FileFilter;
use crate::repos::location::Location;
use crate::{repos, tables};

/// What the sources are at this moment, and their files on this machine.
mod inputs;
/// Which side of the split a file is on.
mod sides;
/// All files of all sources into segments.
mod write;
/// The command line.
mod verb;

use inputs::Input;
pub use verb::{Args, run};

/// Rises when the same commits and settings would give another dataset.
const COLLECT_VERSION: u32 = 4;
/// Settings that change nothing of what is collected.
const OF_NO_CONSEQUENCE: [&str; 2] = ["parallel_fetches", "fetch_timeout_seconds"];

/// A dataset that was not collected.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Every source that failed, in their order.
    #[error("{}", .0.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n"))]
    Sources(Vec<SourceError>),
    /// The dataset cannot be written.
    #[error(transparent)]
    Dataset(#[from] dataset::Error),
    /// A thread died.
    #[error("a collecting thread panicked; this is a bug, please report it with the lines above")]
    Panicked,
}

/// A source that failed.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// A repository, or those of an organisation.
    #[error(transparent)]
    Repository(#[from] repos::Error),
    /// A dataset that others made.
    #[error(transparent)]
    Table(#[from] tables::Error),
}

impl SourceError {
    /// Whether the cause is that something is not there.
    pub fn is_not_found(&self) -> bool {
        match self {
            SourceError::Repository(error) => error.is_not_found(),
            SourceError::Table(error) => error.is_not_found(),
        }
    }

    /// Whether the cause is the network or a lack of rights.
    pub fn is_unreachable(&self) -> bool {
        match self {
            SourceError::Repository(error) => error.is_unreachable(),
            SourceError::Table(error) => matches!(error, tables::Error::Hub(_)),
        }
    }
}

impl From<SourceError> for Error {
    fn from(error: SourceError) -> Self {
        Self::Sources(vec![error])
    }
}

impl From<repos::Error> for Error {
    fn from(error: repos::Error) -> Self {
        SourceError::from(error).into()
    }
}

impl From<tables::Error> for Error {
    fn from(error: tables::Error) -> Self {
        SourceError::from(error).into()
    }
}

/// Collects the sources of `spec` into the dataset directory `out_dir`, which is replaced as a whole. Remote
/// repositories are kept under `cache_dir`. If the dataset that is there came from the same commits and
/// settings, it stays and nothing is fetched or written.
///
/// # Errors
/// See [`Error`]; the dataset that was there stays.
pub fn collect(
    spec: &CollectSpec,
    cache_dir: &Path,
    out_dir: &Path,
    progress: &dyn Progress,
) -> Result<Manifest, Error> {
    let how = fetching(spec, cache_dir, progress);
    let filter = FileFilter::new(spec)?;
    let inputs = inputs::expand(spec, progress)?;
    inputs::note_uncommitted_work(&inputs, progress);
    let states = inputs::states(&inputs, spec, &how)?;
    let settings = settings(spec)?;
    if let Some(manifest) = unchanged(&settings, &inputs, &states, out_dir) {
        return Ok(manifest);
    }
    let staging = Staging::begin(out_dir)?;
    let ready = inputs::fetch(&inputs, &states, spec, &how)?;
    // As git itself reads: packs were verified when they came here, and what zlib inflates bears a checksum.
    git2::opts::strict_hash_verification(false);
    let written = write::all(spec, &ready, &filter, &staging, progress)?;
    let manifest = Manifest {
        version: MANIFEST_VERSION,
        written_by: written_by(),
        settings,
        repositories: written.repositories,
        train: written.train,
        validation: written.validation,
        dropped: written.dropped,
        found: written.found,
    };
    manifest::write(staging.dir(), &manifest)?;
    staging.publish()?;
    Ok(manifest)
}

/// A digest of everything that the dataset will follow from: the settings, the commits that the sources stand
/// at now, and this program's way of collecting.
///
/// # Errors
/// Sources that cannot be asked.
pub fn input_digest(spec: &CollectSpec) -> Result<String, Error> {
    let progress = progress::on_stderr();
    let how = fetching(spec, Path::new(""), progress.as_ref());
    let inputs = inputs::expand(spec, progress.as_ref())?;
    let states = inputs::states(&inputs, spec, &how)?;
    let names: Vec<_> = inputs.iter().map(Input::location).collect();
    let commits: Vec<_> = states.iter().map(inputs::State::commit).collect();
    let digested = serde_json::json!([settings(spec)?, names, commits, written_by(), MANIFEST_VERSION]);
    Ok(tunefleet_proto::digest_hex(digested.to_string().as_bytes()))
}

/// Whether `manifest` was collected with the settings of `spec`, from whatever commits.
///
/// # Errors
/// Sources that cannot be understood.
pub fn was_asked_for(spec: &CollectSpec, manifest: &Manifest) -> Result<bool, Error> {
    Ok(manifest.settings == settings(spec)?)
}

fn fetching<'a>(spec: &CollectSpec, cache_dir: &'a Path, progress: &'a dyn Progress) -> Fetching<'a> {
    Fetching {
        cache_dir,
        with_history: sides::needs_history(spec),
        patience: Duration::from_secs(spec.fetch_timeout_seconds),
        progress,
    }
}

fn written_by() -> String {
    format!("tunefleet-coordinator {} (collect {COLLECT_VERSION})", env!("CARGO_PKG_VERSION"))
}

/// The spec as the manifest has it: without credentials, without what does not change the dataset, and with digests of
/// the evaluation files.
fn settings(spec: &CollectSpec) -> Result<serde_json::Value, Error> {
    let mut spec = spec.clone();
    for source in &mut spec.sources {
        if let SourceSpec::Repository(repository) = source {
            repository.location = Location::parse(&repository.location)?.shown;
        }
    }
    let mut settings = serde_json::to_value(&spec).unwrap_or_default();
    if let Some(fields) = settings.as_object_mut() {
        for name in OF_NO_CONSEQUENCE {
            fields.remove(name);
        }
        let digests = spec.decontaminate.iter().map(|path| {
            let bytes = std::fs::read(path).map_err(|source| {
                repos::Error::from(repos::contamination::Error::Io { path: path.clone(), source })
            })?;
            Ok(serde_json::json!({ "file": path, "sha256": tunefleet_proto::digest_hex(&bytes) }))
        });
        let digests: Vec<_> = digests.collect::<Result<_, repos::Error>>()?;
        fields.insert("decontaminate".to_owned(), digests.into());
    }
    Ok(settings)
}

/// The dataset in `out_dir`, if collecting again would give the same.
fn unchanged(
    settings: &serde_json::Value,
    inputs: &[Input],
    states: &[inputs::State],
    out_dir: &Path,
) -> Option<Manifest> {
    let manifest = manifest::read(out_dir).ok()?;
    let were = manifest.repositories.iter().map(|r| (r.location.clone(), r.commit.clone()));
    let are = inputs.iter().zip(states).map(|(input, state)| (input.location().to_owned(), state.commit()));
    let is_complete =
        manifest.train.iter().chain(&manifest.validation).all(|segment| {
            out_dir.join(&segment.file).metadata().is_ok_and(|meta| meta.len() == segment.bytes)
        });
    let is_same = manifest.version == MANIFEST_VERSION
        && manifest.written_by == written_by()
        && manifest.settings == *settings
        && were.eq(are);
    (is_complete && is_same).then_some(manifest)
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use tunefleet_proto::job::DuplicateMode;

    use super::*;
    use crate::progress::Task;

    /// Does something to a repository when its `nth` task begins.
    struct Disturbing {
        repository: PathBuf,
        nth: usize,
        seen: AtomicUsize,
        how: fn(&Path),
    }

    struct NoTask;

    impl Task for NoTask {
        fn length(&self, _total: u64) {}
        fn position(&self, _done: u64) {}
    }

    impl Progress for Disturbing {
        fn task(&self, label: &str) -> Box<dyn Task> {
            if self.repository.ends_with(label) && self.seen.fetch_add(1, Ordering::Relaxed) + 1 == self.nth {
                (self.how)(&self.repository);
            }
            Box::new(NoTask)
        }

        fn note(&self, _text: &str) {}
    }

    fn repository(dir: &Path) {
        git2::Repository::init(dir).unwrap();
        for file in 0..20 {
            std::fs::write(dir.join(format!("{file}.py")), format!("x = {file}\n")).unwrap();
        }
        commit(dir);
    }

    fn commit(dir: &Path) {
        let repository = git2::Repository::open(dir).unwrap();
        let mut index = repository.index().unwrap();
        index.add_all(["*"], git2::IndexAddOption::DEFAULT, None).unwrap();
        let tree = repository.find_tree(index.write_tree().unwrap()).unwrap();
        let author = git2::Signature::now("Test", "test@example.invalid").unwrap();
        let parent = repository.head().ok().map(|head| head.peel_to_commit().unwrap());
        let parents: Vec<_> = parent.iter().collect();
        repository.commit(Some("HEAD"), &author, &author, "Go on", &tree, &parents).unwrap();
    }

    #[test]
    fn a_repository_that_moves_on_midway_is_collected_as_it_was_when_it_was_looked_at() {
        for nth in [1, 2] {
            let dir = tempfile::tempdir().unwrap();
            let path = |name: &str| dir.path().canonicalize().unwrap().join(name);
            repository(&path("moves"));
            let head = || git2::Repository::open(path("moves")).unwrap().head().unwrap().target().unwrap();
            let before = head();
            let how = |dir: &Path| {
                std::fs::write(dir.join("later.py"), "later = 1\n").unwrap();
                commit(dir);
            };
            let moving = Disturbing { repository: path("moves"), nth, seen: AtomicUsize::new(0), how };
            let mut spec = CollectSpec::of(vec![SourceSpec::repository(path("moves").display().to_string())]);
            spec.duplicates = DuplicateMode::Keep;
            let manifest = collect(&spec, &path("cache"), &path("out"), &moving).unwrap();
            assert_ne!(head(), before);
            let [repository] = &manifest.repositories[..] else { panic!("{manifest:?}") };
            assert_eq!((repository.commit.clone(), repository.files), (before.to_string(), 20));
        }
    }

    #[test]
    fn a_repository_that_vanishes_midway_is_named_and_the_earlier_dataset_stays() {
        // Between looking and fetching, and between fetching and reading.
        for nth in [1, 2] {
            let dir = tempfile::tempdir().unwrap();
            let path = |name: &str| dir.path().canonicalize().unwrap().join(name);
            repository(&path("stays"));
            repository(&path("vanishes"));
            let source = |name| SourceSpec::repository(path(name).display().to_string());
            let mut spec = CollectSpec::of(vec![source("stays")]);
            spec.validation_fraction = 0.1;
            spec.duplicates = DuplicateMode::Keep;
            let how = |dir: &Path| std::fs::remove_dir_all(dir).unwrap();
            let vanishing = Disturbing { repository: path("vanishes"), nth, seen: AtomicUsize::new(0), how };
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
