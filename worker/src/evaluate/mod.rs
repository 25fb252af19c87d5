//! `worker evaluate`: what a model does with tasks, and with held-out files of a dataset.
//!
//! tasks -> completions (`subject`) -> kept (`log`) -> judged, by tests in a sandbox (`python`) or by what stood there
//! (`text`) -> `evaluation.json` and a table (`report`)

/// Task files.
pub mod tasks;
/// The model.
pub mod subject;
/// What is kept as it comes, so that an evaluation that was stopped goes on.
pub mod log;
/// Programs in the sandbox.
pub mod python;
/// How like two texts are, and where a completion is cut.
pub mod text;
/// Tasks that are judged by tests: HumanEval and its infilling sets.
pub mod functional;
/// Held-out files of a dataset: loss, and holes.
pub mod repository;
/// The weight of an adapter that suits best.
pub mod sweep;
/// Several adapters, alone and mixed, on several datasets.
pub mod grid;
/// The evaluations of a job, by its ranks together.
pub mod stage;
/// The table, and what differs from another model's.
pub mod report;
mod progress;

use std::path::PathBuf;

use crate::checkpoint;
use crate::data::{documents, tokenizer};
use crate::generate::decoder::LoadError;
use crate::serve::engine::request::Failure;
use crate::serve::engine::{Refused, StartError};

/// Command line of `worker evaluate`.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, clap::Subcommand)]
enum What {
    /// Functions from their descriptions, judged by tests: HumanEval, as bigcode runs it.
    Humaneval(functional::HumanevalArgs),
    /// Holes in solutions, judged by tests and by what stood there: the human-eval-infilling sets.
    Infilling(functional::InfillingArgs),
    /// Judges completions that something else made: {"task_id", "completion"} in each line.
    Samples(functional::SamplesArgs),
    /// Held-out files of a dataset: loss, and holes judged by what stood there.
    Repo(repository::RepoArgs),
    /// Weights of an adapter, from the base to the whole adapter: what is won and what is forgotten.
    Sweep(sweep::Args),
    /// Several adapters, alone and mixed, on several datasets: what each wins on its own, and what the mix keeps of it.
    Grid(grid::Args),
}

/// What can keep an evaluation from its end.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file of tasks or samples.
    #[error(transparent)]
    Tasks(#[from] tasks::Error),
    /// The model.
    #[error(transparent)]
    Load(#[from] StartError<LoadError>),
    /// Its shape.
    #[error(transparent)]
    Model(#[from] checkpoint::Error),
    /// Its tokenizer.
    #[error(transparent)]
    Tokenizer(#[from] tokenizer::Error),
    /// Its adapter.
    #[error(transparent)]
    Adapter(#[from] crate::adapter::Error),
    /// The dataset.
    #[error(transparent)]
    Dataset(#[from] documents::Error),
    /// The engine takes nothing more.
    #[error(transparent)]
    Refused(#[from] Refused),
    /// The engine gave up.
    #[error(transparent)]
    Failed(#[from] Failure),
    /// No program can be run.
    #[error(transparent)]
    Python(#[from] python::Error),
    /// A program could not be run.
    #[error(transparent)]
    Sandbox(#[from] tunefleet_sandbox::Error),
    /// A setting that breaks a rule.
    #[error("{0}")]
    Setting(String),
    /// A file of the evaluation.
    #[error("{path}: {source}", path = path.display())]
    Io {
        /// Which file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The template of conversations.
    #[error(transparent)]
    Chat(#[from] crate::chat::Error),
    /// Another rank of a job's evaluation.
    #[error(transparent)]
    Comm(#[from] crate::comm::Error),
}

/// Runs the verb: progress on stderr, the table on stdout.
///
/// # Errors
/// See [`Error`].
pub fn run(args: Args) -> Result<(), Error> {
    match args.what {
        What::Humaneval(args) => functional::humaneval(&args),
        What::Infilling(args) => functional::infilling(&args),
        What::Samples(args) => functional::samples(&args),
        What::Repo(args) => repository::run(&args),
        What::Sweep(args) => sweep::run(&args),
        What::Grid(args) => grid::run(&args),
    }
}
