//! Verbs and exit codes of `worker`. A verb is a module with `Args` and `run(Args)`, one variant
//! of [`Verb`] and one arm of [`run`].

use std::ffi::OsString;
use std::io::{IsTerminal, Write as _};
use std::process::ExitCode;

use clap::{CommandFactory, Parser, Subcommand};
use tunefleet_proto::findings::Findings;
use tunefleet_proto::flags_file;
use tunefleet_worker::data::train_tokenizer;
use tunefleet_worker::{
    adapter, chat, checkpoint, daemon, evaluate, export, generate, init_model, measure, rank, serve,
};

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
    /// Checks a file of the flags of `daemon` or `serve` and reports everything that is wrong with it.
    Validate {
        /// A file of the daemon's flags.
        #[arg(long, value_name = "FILE", required_unless_present = "serve", conflicts_with = "serve")]
        config: Option<std::path::PathBuf>,
        /// A file of the flags of `worker serve`.
        #[arg(long, value_name = "FILE")]
        serve: Option<std::path::PathBuf>,
    },
    /// Looks at this machine: is it fit to train?
    Doctor {
        /// Directory of a daemon's journal, whose disk is looked at.
        #[arg(long, value_name = "DIR", default_value = ".")]
        state_dir: std::path::PathBuf,
    },
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
    /// Says what a model does with tasks, and with held-out files of a dataset.
    Evaluate(evaluate::Args),
    /// Completes a prompt, or fills in its `<FILL_ME>`.
    Generate(generate::Args),
    /// Puts a chat template, and the control tokens that it needs, beside a model.
    InitChat(chat::model::Args),
    /// Talks in the terminal.
    Chat(chat::verb::Args),
    /// Serves completions to editors, and answers to chats, over HTTP.
    Serve(serve::Args),
    /// Measures steps and checkpoints of a job's rank on this machine; asked by `coordinator plan --measure`.
    Measure(measure::Args),
    /// Prints a script that completes verbs and flags in a shell.
    Completions {
        /// Which shell.
        shell: clap_complete::Shell,
    },
    /// Writes manual pages, one for each verb.
    Man {
        /// Where to, e.g. /usr/local/share/man/man1.
        dir: std::path::PathBuf,
    },
    /// One rank of one attempt; started by the daemon.
    #[command(hide = true)]
    Rank(rank::Args),
}

/// The verbs that have a file of flags.
const DAEMON: &str = "daemon";
const SERVE: &str = "serve";
/// Exit code of a file that is wrong (EX_CONFIG).
const BAD_CONFIG: u8 = 78;

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
    start_log();
    let outcome = match arguments(std::env::args_os().collect()) {
        Ok(arguments) => run(Cli::parse_from(arguments).verb),
        Err(failure) => Err(failure),
    };
    match outcome {
        Ok(code) => code,
        Err(Failure { exit_code, message }) => {
            eprintln!("error: {message}");
            ExitCode::from(exit_code)
        }
    }
}

fn run(verb: Verb) -> Result<ExitCode, Failure> {
    match verb {
        Verb::Daemon(args) => Ok(daemon::run(args)?),
        Verb::Validate { config, serve } => {
            let (verb, file) = if serve.is_some() { (SERVE, serve) } else { (DAEMON, config) };
            validate(verb, file.unwrap_or_default())
        }
        Verb::Doctor { state_dir } => return doctor(state_dir),
        Verb::Tokenizer(args) => Ok(train_tokenizer::run(args)?),
        Verb::InitModel(args) => Ok(init_model::run(args)?),
        Verb::Checkpoint(args) => Ok(checkpoint::verb::run(args)?),
        Verb::Export(args) => Ok(export::run(args)?),
        Verb::Adapter(args) => Ok(adapter::cli::run(args)?),
        Verb::Evaluate(args) => Ok(evaluate::run(args)?),
        Verb::Generate(args) => Ok(generate::run(args)?),
        Verb::InitChat(args) => Ok(chat::model::run(args)?),
        Verb::Chat(args) => Ok(chat::verb::run(args)?),
        Verb::Serve(args) => Ok(serve::run(args)?),
        Verb::Measure(args) => Ok(measure::run(args)?),
        Verb::Completions { shell } => {
            clap_complete::generate(shell, &mut Cli::command(), "worker", &mut std::io::stdout());
            Ok(())
        }
        Verb::Man { dir } => {
            Ok(std::fs::create_dir_all(&dir).and_then(|()| clap_mangen::generate_to(Cli::command(), &dir))?)
        }
        Verb::Rank(args) => Ok(rank::run(args)?),
    }?;
    Ok(ExitCode::SUCCESS)
}

/// What was typed, with the flags of the file of `daemon` or `serve`.
fn arguments(typed: Vec<OsString>) -> Result<Vec<OsString>, Failure> {
    let has_file = |verb: &&str| typed.get(1).is_some_and(|typed| typed == verb);
    let Some(verb) = [DAEMON, SERVE].into_iter().find(has_file) else { return Ok(typed) };
    let command = Cli::command();
    let Some(verb) = command.find_subcommand(verb) else { return Ok(typed) };
    flags_file::complete(verb, typed)
        .map_err(|error| Failure { exit_code: BAD_CONFIG, message: error.to_string() })
}

/// Prints what is found; the exit code is that of the worst (0 well, 1 a warning, 2 critical, 3 unknown).
fn doctor(state_dir: std::path::PathBuf) -> Result<ExitCode, Failure> {
    let found = daemon::examine_here(state_dir)?;
    // A reader that has gone away wants no more.
    let _ = write!(std::io::stdout(), "{}", Findings(&found));
    Ok(ExitCode::from(Findings(&found).exit_code()))
}

/// Checks a file of flags as far as that can be done without running with it.
fn validate(verb: &str, config: std::path::PathBuf) -> Result<(), Failure> {
    let bad = |message: String| Failure { exit_code: BAD_CONFIG, message };
    let name = config.display().to_string();
    let typed = vec!["worker".into(), verb.into(), "--config".into(), config.into_os_string()];
    let cli = Cli::try_parse_from(arguments(typed)?).map_err(|error| bad(format!("{name}: {error}")))?;
    match cli.verb {
        Verb::Daemon(args) => daemon::check(&args).map_err(|error| bad(format!("{name}: {error}")))?,
        Verb::Serve(args) => serve::check(&args).map_err(|error| bad(format!("{name}: {error}")))?,
        _ => {}
    }
    // A reader that has gone away wants no more.
    let _ = writeln!(std::io::stdout(), "ok");
    Ok(())
}

/// Log lines go to stderr; `RUST_LOG` filters them.
fn start_log() {
    let filter = tracing_subscriber::EnvFilter::try_from_default_env()
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info"));
    let colour = std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none();
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_ansi(colour).init();
}
