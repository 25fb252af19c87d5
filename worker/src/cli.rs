//! Verbs and exit codes of `worker`. A verb is a module with `Args` and `run(Args)`, one variant
//! of [`Verb`] and one arm of [`run`].

use std::io::IsTerminal;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use tunefleet_worker::data::train_tokenizer;
use tunefleet_worker::{adapter, checkpoint, daemon, export, generate, init_model, measure, rank};

/// Trains, evaluates and serves code-completion models.
#[derive(Debug, Parser)]
#[command(name = "worker", version, about, propagate_version = true)]
struct Cli {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Owns this machine's slots: dials a coordinator and runs the ranks that it places here.
    Daemon(daemon::Args),
    /// Learns a vocabulary.
    Tokenizer(train_tokenizer::Args),
    /// Writes a model with random weights in Hugging Face layout.
    InitModel(init_model::Args),
    /// Says whether checkpoints are sound.
    Checkpoint(checkpoint::verb::Args),
    /// Writes a checkpoint as a Hugging Face model.
    Export(export::Args),
    /// Reads, scales, combines, merges and compares LoRA adapters.
    Adapter(adapter::cli::Args),
    /// Completes a prompt, or fills in its `<FILL_ME>`.
    Generate(generate::Args),
    /// Measures steps and checkpoints of a job's rank on this machine; asked by `coordinator plan --measure`.
    Measure(measure::Args),
    /// One rank of one attempt; started by the daemon.
    #[command(hide = true)]
    Rank(rank::Args),
}

/// Why a verb failed, and the exit code that tells it to scripts.
struct Failure {
    exit_code: u8,
    message: String,
}

impl<E: std::error::Error> From<E> for Failure {
    fn from(error: E) -> Self {
        Failure { exit_code: 1, message: error.to_string() }
    }
}

/// Parses the command line, runs the verb, prints an error in one place.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    start_log();
    match run(cli.verb) {
        Ok(()) => ExitCode::SUCCESS,
        Err(Failure { exit_code, message }) => {
            eprintln!("error: {message}");
            ExitCode::from(exit_code)
        }
    }
}

fn run(verb: Verb) -> Result<(), Failure> {
    match verb {
        Verb::Daemon(args) => Ok(daemon::run(args)?),
        Verb::Tokenizer(args) => Ok(train_tokenizer::run(args)?),
        Verb::InitModel(args) => Ok(init_model::run(args)?),
        Verb::Checkpoint(args) => Ok(checkpoint::verb::run(args)?),
        Verb::Export(args) => Ok(export::run(args)?),
        Verb::Adapter(args) => Ok(adapter::cli::run(args)?),
        Verb::Generate(args) => Ok(generate::run(args)?),
        Verb::Measure(args) => Ok(measure::run(args)?),
        Verb::Rank(args) => Ok(rank::run(args)?),
    }
}

/// Log lines go to stderr; `RUST_LOG` filters them.
fn start_log() {
    let filter = tracing_subscriber::EnvFilter::try_from_default_env()
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info"));
    let colour = std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none();
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_ansi(colour).init();
}
