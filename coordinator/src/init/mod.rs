//! `coordinator init`: a commented job file for the user's own code and this machine.

mod discover;
mod compose;

use std::fs::OpenOptions;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use tunefleet_proto::job::{self, Diagnostics, JobSpec};

use crate::cli::exit;
use crate::hardware::Hardware;
use crate::plan::size;

/// Arguments of `coordinator init`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Repositories: paths, directories that hold repositories, or URLs.
    #[arg(required = true, value_name = "PATH")]
    sources: Vec<String>,
    /// The job file to write.
    #[arg(long, short, default_value = "job.yaml", value_name = "FILE")]
    output: PathBuf,
    /// Overwrite the job file where it exists.
    #[arg(long)]
    force: bool,
}

/// Why there is no job file.
#[derive(Debug, thiserror::Error)]
enum Error {
    /// Nothing to learn from.
    #[error(transparent)]
    Discover(#[from] discover::Error),
    /// A job file is there already.
    #[error("{0} exists: give --force to overwrite it, or --output for another name")]
    Exists(PathBuf),
    /// The file cannot be written.
    #[error("{path}: {cause}")]
    Write {
        /// The job file.
        path: PathBuf,
        /// What the system said.
        cause: io::Error,
    },
    /// A source that no job file may hold.
    #[error("{0}")]
    Faults(#[from] Diagnostics),
}

/// Writes the job file and says what to type next.
pub fn run(args: Args) -> ExitCode {
    match init(&args, &Hardware::find()) {
        Ok(said) => match io::stdout().write_all(said.as_bytes()) {
            Ok(()) => ExitCode::SUCCESS,
            Err(_) => ExitCode::from(exit::FAILED),
        },
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::from(match error {
                Error::Faults(_) => exit::BAD_CONFIG,
                _ => exit::FAILED,
            })
        }
    }
}

fn init(args: &Args, hardware: &Hardware) -> Result<String, Error> {
    let path = &args.output;
    let failed = |cause| Error::Write { path: path.clone(), cause };
    if path.exists() && !args.force {
        return Err(Error::Exists(path.clone()));
    }
    let cwd = std::env::current_dir().map_err(failed)?;
    let mut sources = Vec::new();
    for source in &args.sources {
        for location in discover::repositories(source, &cwd)? {
            if !sources.contains(&location) {
                sources.push(location);
            }
        }
    }
    let text = compose::job_file(&sources, hardware);
    // Before anything is written: what init writes, launch must take.
    let spec = job::load(path, &text, &[], &cwd)?;
    write(path, &text, args.force).map_err(|cause| match cause.kind() {
        io::ErrorKind::AlreadyExists => Error::Exists(path.clone()),
        _ => failed(cause),
    })?;
    Ok(farewell(path, &sources, hardware, &spec))
}

fn write(path: &Path, text: &str, force: bool) -> io::Result<()> {
    let mut options = OpenOptions::new();
    options.write(true);
    if force {
        options.create(true).truncate(true)
    } else {
        options.create_new(true)
    };
    options.open(path)?.write_all(text.as_bytes())
}

fn farewell(path: &Path, sources: &[String], hardware: &Hardware, spec: &JobSpec) -> String {
    let path = path.display();
    let memory = hardware.memory_bytes.map_or_else(|| "unknown memory".to_owned(), size);
    let repositories = if sources.len() == 1 { "repository" } else { "repositories" };
    format!(
        "wrote {path}: {} {repositories}, for {} cores, {memory} and {} GPUs\n\n\
         next:\n  \
         coordinator plan --config {path}      # parameters, memory, steps\n  \
         coordinator launch --config {path}    # collect, train, export\n  \
         worker generate --model {} --prompt 'def main(): <FILL_ME>'\n",
        sources.len(),
        hardware.cores,
        hardware.gpus.len(),
        spec.export_dir().display(),
    )
}
