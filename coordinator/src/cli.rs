//! Verbs and exit codes of `coordinator`. A verb is a module with `Args` and
//! `run(Args) -> ExitCode`, one variant of [`Verb`] and one arm of [`run`].

use std::io::IsTerminal;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::{init, plan, validate};

/// Collects code, plans and runs training jobs, and shows how they do.
#[derive(Debug, Parser)]
#[command(name = "coordinator", version, about, propagate_version = true)]
struct Cli {
    #[command(subcommand)]
    verb: Verb,
}

/// In the order of a job's life.
#[derive(Debug, Subcommand)]
enum Verb {
    /// Writes a commented job file for your repositories and this machine.
    Init(init::Args),
    /// Checks a job file and reports everything that is wrong with it.
    Validate(validate::Args),
    /// Counts parameters, memory and steps of a job before anything runs.
    Plan(plan::Args),
}

/// Exit codes other than 0; clap's own usage errors exit with 2.
pub mod exit {
    /// The job or command failed.
    pub const FAILED: u8 = 1;
    /// The job does not fit the machines there are.
    pub const NO_CAPACITY: u8 = 3;
    /// The job file is wrong.
    pub const BAD_CONFIG: u8 = 78;
}

/// Parses the command line and runs the verb.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    start_log();
    run(cli.verb)
}

fn run(verb: Verb) -> ExitCode {
    match verb {
        Verb::Init(args) => init::run(args),
        Verb::Validate(args) => validate::run(args),
        Verb::Plan(args) => plan::run(args),
    }
}

/// Log lines go to stderr; `RUST_LOG` filters them.
fn start_log() {
    let filter = tracing_subscriber::EnvFilter::try_from_default_env()
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("warn"));
    let colour = std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none();
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_ansi(colour).init();
}
