//! Verbs and exit codes of `coordinator`. A verb is a module with `Args` and
//! `run(Args) -> ExitCode`, one variant of [`Verb`] and one arm of [`run`].

use std::ffi::OsString;
use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{CommandFactory, Parser, Subcommand};

use tunefleet_proto::flags_file;

use crate::{
    audit, certs, collect, compare, convert, dataset, doctor, events, init, jobs, launch, logs, plan, serve,
    store_verb, tokens, validate, version, workers,
};

/// Collects code, plans and runs training jobs, and shows how they do.
#[derive(Debug, Parser)]
#[command(name = "coordinator", version, about, propagate_version = true, after_help = EXIT_CODES)]
struct Cli {
    #[command(subcommand)]
    verb: Verb,
}

/// The verb that has a file of flags.
const SERVE: &str = "serve";

/// Below the verbs of `--help`. A test holds it to [`exit`].
const EXIT_CODES: &str = "Exit codes:
  0    all is well
  1    the job or command failed
  2    the command line makes no sense
  3    the job does not fit the machines there are (of doctor: 1 a warning, 2 critical, 3 not known)
  4    there is no such job
  5    the coordinator cannot be reached, or refuses the token
  78   the job file is wrong
  130  interrupted by the user
  143  told to stop by the system, with a checkpoint saved";

/// In the order of a job's life.
#[derive(Debug, Subcommand)]
enum Verb {
    /// Writes a commented job file for your repositories and this machine.
    Init(init::Args),
    /// Writes a job file that says what an accelerate or DeepSpeed config and train.py's arguments say.
    Convert(convert::Args),
    /// Collects repositories into a dataset.
    Collect(collect::Args),
    /// Shows what is in a dataset and checks that it is whole.
    Dataset(dataset::inspect::Args),
    /// Checks a job file and reports everything that is wrong with it.
    Validate(validate::Args),
    /// Counts parameters, memory and steps of a job before anything runs.
    Plan(plan::Args),
    /// Runs a job file's missing stages, up to an exported model.
    Launch(launch::Args),
    /// Runs the control plane for jobs and workers of many machines.
    Serve(serve::Args),
    /// Checks, copies and restores the state of a control plane.
    Store(store_verb::Args),
    /// Shows all jobs of a coordinator.
    List(jobs::ListArgs),
    /// Shows one job.
    Status(jobs::StatusArgs),
    /// Shows what happened to a job.
    Events(events::Args),
    /// Prints the logs of a job's ranks.
    Logs(logs::Args),
    /// Stops a job, with a checkpoint where it trains.
    Cancel(jobs::CancelArgs),
    /// Stops a job with a checkpoint, until it is resumed.
    Suspend(jobs::SuspendArgs),
    /// Starts a job again from its newest checkpoint.
    Resume(jobs::ResumeArgs),
    /// Writes a report that holds runs beside each other: curves, costs, evaluations, completions.
    Compare(compare::Args),
    /// Shows the workers of a coordinator.
    Workers(workers::ListArgs),
    /// Places nothing more on a worker.
    Drain(workers::DrainArgs),
    /// Lets a worker have ranks again.
    Undrain(workers::UndrainArgs),
    /// Looks at a coordinator, its workers and the network between them: are they fit to train?
    Doctor(doctor::Args),
    /// Makes, shows and revokes the tokens of a coordinator's users.
    Tokens(tokens::Args),
    /// Makes, shows and revokes the certificates of a coordinator and its workers.
    Certs(certs::Args),
    /// Shows who asked a coordinator for what, and what was refused.
    Audit(audit::Args),
    /// Shows the version of this program and of a coordinator.
    Version(version::Args),
    /// Prints a script that completes verbs and flags in a shell.
    Completions {
        /// Which shell.
        shell: clap_complete::Shell,
    },
    /// Writes manual pages, one for each verb.
    Man {
        /// Where to, e.g. /usr/local/share/man/man1.
        dir: PathBuf,
    },
}

/// Exit codes; clap's own usage errors exit with 2.
pub mod exit {
    /// All is well.
    pub const OK: u8 = 0;
    /// The job or command failed.
    pub const FAILED: u8 = 1;
    /// The command line makes no sense.
    pub const USAGE: u8 = 2;
    /// The job does not fit the machines there are.
    pub const NO_CAPACITY: u8 = 3;
    /// There is no such job.
    pub const NOT_FOUND: u8 = 4;
    /// The coordinator cannot be reached, or refuses the token.
    pub const UNREACHABLE: u8 = 5;
    /// The job file is wrong.
    pub const BAD_CONFIG: u8 = 78;
    /// Interrupted by the user.
    pub const INTERRUPTED: u8 = 130;
    /// Told to stop by the system, with a checkpoint saved.
    pub const PREEMPTED: u8 = 143;
}

/// Parses the command line and runs the verb.
pub fn main() -> ExitCode {
    start_log();
    match arguments(std::env::args_os().collect()) {
        Ok(arguments) => run(Cli::parse_from(arguments).verb),
        Err(error) => {
            eprintln!("{error}");
            ExitCode::from(exit::BAD_CONFIG)
        }
    }
}

/// What was typed, with the flags of the file of `serve`.
fn arguments(typed: Vec<OsString>) -> Result<Vec<OsString>, flags_file::Error> {
    if typed.get(1).is_none_or(|verb| verb != SERVE) {
        return Ok(typed);
    }
    let command = Cli::command();
    match command.find_subcommand(SERVE) {
        Some(verb) => flags_file::complete(verb, typed),
        None => Ok(typed),
    }
}

/// Checks a file of the flags of `serve`, as far as that can be done without serving.
///
/// # Errors
/// All that is wrong in it.
pub fn check_serve(config: &Path) -> Result<(), String> {
    let typed = vec!["coordinator".into(), SERVE.into(), "--config".into(), config.into()];
    let at = |error: &dyn std::fmt::Display| format!("{}: {error}", config.display());
    let arguments = arguments(typed).map_err(|error| error.to_string())?;
    let cli = Cli::try_parse_from(arguments).map_err(|error| at(&error))?;
    match &cli.verb {
        Verb::Serve(args) => serve::check(args).map_err(|failure| at(&failure.message)),
        _ => Ok(()),
    }
}

fn run(verb: Verb) -> ExitCode {
    match verb {
        Verb::Init(args) => init::run(args),
        Verb::Convert(args) => convert::run(args),
        Verb::Collect(args) => collect::run(args),
        Verb::Dataset(args) => dataset::inspect::run(args),
        Verb::Validate(args) => validate::run(args),
        Verb::Plan(args) => plan::run(args),
        Verb::Launch(args) => launch::run(args),
        Verb::Serve(args) => serve::run(args),
        Verb::Store(args) => store_verb::run(args),
        Verb::List(args) => jobs::list(args),
        Verb::Status(args) => jobs::status(args),
        Verb::Logs(args) => logs::run(args),
        Verb::Cancel(args) => jobs::cancel(args),
        Verb::Suspend(args) => jobs::suspend(args),
        Verb::Resume(args) => jobs::resume(args),
        Verb::Events(args) => events::run(args),
        Verb::Compare(args) => compare::run(args),
        Verb::Workers(args) => workers::list(args),
        Verb::Drain(args) => workers::drain(args),
        Verb::Undrain(args) => workers::undrain(args),
        Verb::Doctor(args) => doctor::run(args),
        Verb::Tokens(args) => tokens::run(args),
        Verb::Certs(args) => certs::run(args),
        Verb::Audit(args) => audit::run(args),
        Verb::Version(args) => version::run(args),
        Verb::Completions { shell } => {
            clap_complete::generate(shell, &mut Cli::command(), "coordinator", &mut std::io::stdout());
            ExitCode::SUCCESS
        }
        Verb::Man { dir } => {
            let written =
                std::fs::create_dir_all(&dir).and_then(|()| clap_mangen::generate_to(Cli::command(), &dir));
            match written {
                Ok(()) => ExitCode::SUCCESS,
                Err(error) => {
                    eprintln!("error: {}: {error}", dir.display());
                    ExitCode::from(exit::FAILED)
                }
            }
        }
    }
}

/// Log lines go to stderr; `RUST_LOG` filters them.
fn start_log() {
    let filter = tracing_subscriber::EnvFilter::try_from_default_env()
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("warn"));
    let colour = std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none();
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_ansi(colour).init();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn help_lists_every_exit_code() {
        let listed: Vec<u8> = EXIT_CODES
            .lines()
            .skip(1)
            .map(|line| line.split_whitespace().next().unwrap().parse().unwrap())
            .collect();
        let all = [
            exit::OK,
            exit::FAILED,
            exit::USAGE,
            exit::NO_CAPACITY,
            exit::NOT_FOUND,
            exit::UNREACHABLE,
            exit::BAD_CONFIG,
            exit::INTERRUPTED,
            exit::PREEMPTED,
        ];
        assert_eq!(listed, all);
        assert!(Cli::command().render_help().to_string().contains(EXIT_CODES));
    }

    #[test]
    fn no_verb_has_flags_that_contradict_each_other() {
        Cli::command().debug_assert();
    }
}
