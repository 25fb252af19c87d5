//! What the sources of a job are at this moment: organisations are looked up, revisions pinned, files brought here.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;

use tunefleet_proto::job::{CollectSpec, RepositorySpec, SourceSpec};

use super::{Error, SourceError};
use crate::progress::{Progress, Task};
use crate::repos::credentials::AccessToken;
use crate::repos::fetch::{self, Fetching, Head, Pinned, Source};
use crate::repos::organization;
use crate::tables::{Located, Table};

/// One source.
pub enum Input {
    /// A repository.
    Repository(Source),
    /// A dataset that others made.
    Table(Table),
}

impl Input {
    /// What it is called while it is worked on.
    pub fn label(&self) -> &str {
        match self {
            Input::Repository(source) => &source.location.repo_id,
            Input::Table(table) => &table.name,
        }
    }

    /// Where it is, without credentials.
    pub fn location(&self) -> &str {
        match self {
            Input::Repository(source) => &source.location.shown,
            Input::Table(table) => table.location(),
        }
    }
}

/// What a source was when it was asked.
pub enum State {
    /// Its commit.
    Repository(Head),
    /// The hub's commit, or a digest of the contents.
    Table(String),
}

impl State {
    /// As the manifest has it.
    pub fn commit(&self) -> String {
        match self {
            State::Repository(head) => head.commit_hex(),
            State::Table(state) => state.clone(),
        }
    }
}

/// A source whose files are on this machine.
pub enum Ready {
    /// A repository.
    Repository(Pinned),
    /// A dataset that others made.
    Table(Located),
}

/// The sources of a job, with the repositories of organisations in their places.
pub fn expand(spec: &CollectSpec, progress: &dyn Progress) -> Result<Vec<Input>, Error> {
    let mut repositories: Vec<RepositorySpec> = Vec::new();
    // By the number of repositories before it.
    let mut tables: Vec<(usize, Table)> = Vec::new();
    let mut tokens: Vec<(usize, AccessToken)> = Vec::new();
    for source in &spec.sources {
        match source {
            SourceSpec::Repository(repository) => repositories.push(repository.clone()),
            SourceSpec::Table { dataset } => tables.push((repositories.len(), Table::new(dataset))),
            SourceSpec::Organization { github } => {
                let token = AccessToken::for_url(&github.api, true, |name| std::env::var(name).ok());
                let found = organization::list(github, token.as_ref(), progress)
                    .map_err(crate::repos::Error::from)?;
                for repository in found {
                    // One that is listed by itself as well is collected there.
                    let is_same = |other: &RepositorySpec| {
                        let plain = |location: &str| location.trim_end_matches(".git").to_owned();
                        plain(&other.location) == plain(&repository.location)
                    };
                    if !repositories.iter().any(is_same) {
                        tokens.extend(token.clone().map(|token| (repositories.len(), token)));
                        repositories.push(repository);
                    }
                }
            }
        }
    }
    let mut sources = fetch::sources(&repositories)?;
    for (number, token) in tokens {
        if let Some(source) = sources.get_mut(number) {
            source.token = Some(token);
        }
    }
    let mut inputs: Vec<Input> = sources.into_iter().map(Input::Repository).collect();
    for (number, table) in tables.into_iter().rev() {
        inputs.insert(number.min(inputs.len()), Input::Table(table));
    }
    Ok(inputs)
}

/// Says which local work trees have more than what is collected.
pub fn note_uncommitted_work(inputs: &[Input], progress: &dyn Progress) {
    for input in inputs {
        if let Input::Repository(source) = input
            && source.revision.is_none()
            && source.has_uncommitted_work()
        {
            let place = &source.location.shown;
            progress.note(&format!(
                "note: {place} has uncommitted work, which is not collected; commit it first"
            ));
        }
    }
}

/// Asks every source what it is now.
pub fn states(inputs: &[Input], spec: &CollectSpec, how: &Fetching<'_>) -> Result<Vec<State>, Error> {
    each_input(inputs, spec, |input, _| match input {
        Input::Repository(source) => Ok(State::Repository(source.resolve(how)?)),
        Input::Table(table) => Ok(State::Table(table.state()?)),
    })
}

/// Brings the files of every source to this machine.
pub fn fetch(
    inputs: &[Input],
    states: &[State],
    spec: &CollectSpec,
    how: &Fetching<'_>,
) -> Result<Vec<Ready>, Error> {
    each_input(inputs, spec, |input, number| {
        let task: Arc<dyn Task> = Arc::from(how.progress.task(input.label()));
        match (input, states.get(number)) {
            (Input::Repository(source), Some(State::Repository(head))) => {
                Ok(Ready::Repository(source.fetch(head, how, task)?))
            }
            (Input::Repository(source), _) => {
                Ok(Ready::Repository(source.fetch(&source.resolve(how)?, how, task)?))
            }
            (Input::Table(table), _) => Ok(Ready::Table(table.locate()?)),
        }
    })
}

/// Runs `work` for every source, at most `parallel_fetches` at a time (libgit2 blocks its thread), and reports
/// all that fail, not only the first.
fn each_input<T: Send>(
    inputs: &[Input],
    spec: &CollectSpec,
    work: impl Fn(&Input, usize) -> Result<T, SourceError> + Sync,
) -> Result<Vec<T>, Error> {
    let next = AtomicUsize::new(0);
    let results = Mutex::new(BTreeMap::new());
    let threads = (spec.parallel_fetches.max(1) as usize).min(inputs.len());
    thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                loop {
                    let index = next.fetch_add(1, Ordering::Relaxed);
                    let Some(input) = inputs.get(index) else { return };
                    let result = work(input, index);
                    results.lock().unwrap_or_else(std::sync::PoisonError::into_inner).insert(index, result);
                }
            });
        }
    });
    let results = results.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
    let mut done = Vec::with_capacity(inputs.len());
    let mut failed = Vec::new();
    for result in results.into_values() {
        match result {
            Ok(value) => done.push(value),
            Err(error) => failed.push(error),
        }
    }
    match failed.is_empty() {
        true => Ok(done),
        false => Err(Error::Sources(failed)),
    }
}
