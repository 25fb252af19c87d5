//! Held-out files of a dataset: the loss of whole files, and holes that the model fills in, judged by what stood there.
//!
//! files -> some of them, the same each time -> those that were not trained on (`contamination`) -> loss; holes (`holes`)
//! -> completions -> exact match and similarity (`exam`), by kind, language (`languages`) and repository

/// What is left out of a file.
pub mod holes;
/// Files that were trained on.
mod contamination;
/// Languages of files.
mod languages;
/// What is asked of every model alike, and what one answers.
mod exam;

use std::path::{Path, PathBuf};

use super::Error;
use super::report::{self, ReportArgs};
use super::subject::{Subject, SubjectArgs};
use crate::generate::prompt::InfillOrder;

pub use exam::Exam;

/// Command line of `worker evaluate repo`.
#[derive(Debug, clap::Args)]
pub struct RepoArgs {
    #[command(flatten)]
    subject: SubjectArgs,
    #[command(flatten)]
    report: ReportArgs,
    /// What is asked.
    #[command(flatten)]
    pub questions: Questions,
}

/// What is asked of a model.
#[derive(Debug, Clone, clap::Args)]
pub struct Questions {
    /// A dataset, whose held-out files are what is evaluated on.
    #[arg(long, value_name = "DIR")]
    pub dataset: PathBuf,
    /// Other datasets that the model was trained on: files that stand there are left out, as those of the training split
    /// of --dataset are.
    #[arg(long, value_name = "DIR")]
    pub trained_on: Vec<PathBuf>,
    /// Files whose loss is computed, at most; 0 leaves the loss out.
    #[arg(long, default_value_t = 500)]
    pub files: usize,
    /// Holes of each kind, at most; 0 leaves them out.
    #[arg(long, default_value_t = 100)]
    pub holes: usize,
    /// How prompts are laid out.
    #[arg(long, value_enum, default_value = "spm")]
    pub order: InfillOrder,
    /// Tokens of a completion, at most.
    #[arg(long, default_value_t = 128, value_parser = clap::value_parser!(u32).range(1..))]
    pub max_new_tokens: u32,
    /// Tokens of a window of a file, and of a prompt; 2048, or what the model has positions for, when absent.
    #[arg(long, value_parser = clap::value_parser!(u32).range(8..))]
    pub window_tokens: Option<u32>,
    /// Seed of the choice of files and holes.
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
}

impl Questions {
    /// The losses of the held-out rows of `dataset`, and nothing else.
    pub fn of_files(dataset: &Path, files: usize, window_tokens: Option<u32>) -> Self {
        Questions {
            dataset: dataset.to_owned(),
            trained_on: Vec::new(),
            files,
            holes: 0,
            order: InfillOrder::Spm,
            max_new_tokens: 1,
            window_tokens,
            seed: 0,
        }
    }
}

/// Runs the verb.
///
/// # Errors
/// See [`Error`].
pub fn run(args: &RepoArgs) -> Result<(), Error> {
    let exam = Exam::open(&args.questions)?;
    let subject = Subject::load(&args.subject)?;
    let evaluation = exam.hold(&args.questions, &subject, &args.report.out)?;
    report::finish(&args.report, &evaluation)
}
