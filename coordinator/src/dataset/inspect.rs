//! `coordinator dataset`: what is in a dataset and whether it is whole, what differs between two, and one to the hub.

use std::io::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;

use tunefleet_hub::RepoId;

use super::{Error, diff, page, push, report};
use crate::cli::exit;

pub use report::summary;

/// Arguments of `coordinator dataset`.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, clap::Subcommand)]
enum Verb {
    /// Reads every row against the manifest and shows totals, languages and what was dropped.
    Inspect {
        /// The dataset.
        dir: PathBuf,
        /// Counts tokens as well, with this `tokenizer.json` or the one in this directory.
        #[arg(long, value_name = "PATH")]
        tokenizer: Option<PathBuf>,
        /// Writes a page with charts and samples, which needs no other file.
        #[arg(long, value_name = "FILE")]
        html: Option<PathBuf>,
        /// Files to show the beginning of, on the page and in JSON.
        #[arg(long, value_name = "N", default_value_t = 5)]
        samples: usize,
        /// Prints JSON.
        #[arg(long)]
        json: bool,
    },
    /// Shows what differs between two datasets: settings, commits, files.
    Diff {
        /// One.
        a: PathBuf,
        /// The other.
        b: PathBuf,
        /// Prints JSON.
        #[arg(long)]
        json: bool,
    },
    /// Pushes a dataset to the Hugging Face hub, where `load_dataset` finds its splits.
    Push {
        /// The dataset.
        dir: PathBuf,
        /// The repository, which is made where it is absent.
        #[arg(id = "push", value_name = "OWNER/NAME")]
        repo: RepoId,
        #[command(flatten)]
        options: tunefleet_hub::cli::PushOptions,
    },
}

/// Runs the verb.
pub fn run(args: Args) -> ExitCode {
    let outcome = match args.verb {
        Verb::Inspect { dir, tokenizer, html, samples, json } => {
            report::read(&dir, tokenizer.as_deref(), samples).and_then(|(manifest, report)| {
                if let Some(file) = html {
                    let title = dir.display().to_string();
                    std::fs::write(&file, page::page(&title, &report)).map_err(Error::io(&file))?;
                }
                Ok(match json {
                    true => serde_json::to_string_pretty(&report).unwrap_or_default() + "\n",
                    false => summary(&manifest) + &report.tables(),
                })
            })
        }
        Verb::Diff { a, b, json } => diff::between(&a, &b).map(|difference| match json {
            true => serde_json::to_string_pretty(&difference).unwrap_or_default() + "\n",
            false => difference.to_string(),
        }),
        Verb::Push { dir, repo, options } => push::push(&dir, repo, &options),
    };
    match outcome {
        Ok(text) => to_stdout(&text),
        Err(error) => {
            eprintln!("error: {error}");
            match error {
                Error::Absent { .. } => ExitCode::from(exit::NOT_FOUND),
                _ => ExitCode::from(exit::FAILED),
            }
        }
    }
}

/// Writes to stdout; a reader that went away (`| head`) is no error.
pub fn to_stdout(text: &str) -> ExitCode {
    match std::io::stdout().lock().write_all(text.as_bytes()) {
        Err(e) if e.kind() != std::io::ErrorKind::BrokenPipe => {
            eprintln!("error: standard output: {e}");
            ExitCode::from(exit::FAILED)
        }
        _ => ExitCode::SUCCESS,
    }
}
