//! `coordinator init`.

use std::path::PathBuf;
use std::process::ExitCode;

/// Arguments of `coordinator init`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The job file.
    #[arg(long)]
    config: PathBuf,
}

/// Runs the verb.
pub fn run(args: Args) -> ExitCode {
    tracing::debug!(config = %args.config.display(), "init");
    ExitCode::SUCCESS
}
