//! `coordinator store`: the state of a coordinator as a file: is it whole, a copy of it, a copy put back.

use std::io::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Subcommand;
use tunefleet_proto::rpc::finding::Verdict;

use crate::cli::exit;
use crate::control::store::{self, StoreError};

/// Command line of `coordinator store`.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, Subcommand)]
enum What {
    /// Says what is in a state directory.
    Info {
        /// The state directory of a coordinator.
        state: PathBuf,
    },
    /// Checks that a state is whole; a coordinator may be using it.
    Check {
        /// The state directory of a coordinator.
        state: PathBuf,
    },
    /// Copies a state to a file; a coordinator may be using it.
    Backup {
        /// The state directory of a coordinator.
        state: PathBuf,
        /// The file to write, which must not be there.
        to: PathBuf,
    },
    /// Puts a copy in the place of a state that no coordinator is using; the former one stays beside it.
    Restore {
        /// The copy.
        from: PathBuf,
        /// The state directory of a coordinator.
        state: PathBuf,
    },
}

/// Runs the verb.
pub fn run(args: Args) -> ExitCode {
    match act(args.what) {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::from(exit::FAILED)
        }
    }
}

fn act(what: What) -> Result<u8, StoreError> {
    let mut out = std::io::stdout().lock();
    match what {
        What::Info { state } => {
            for (name, value) in store::info(&state)? {
                // A reader that has gone away wants no more.
                let _ = writeln!(out, "{name:<10} {value}");
            }
        }
        What::Check { state } => {
            let findings = store::check(&state)?;
            let well = findings.iter().all(|finding| finding.verdict() == Verdict::Ok);
            for finding in findings {
                let verdict = if finding.verdict() == Verdict::Ok { "ok" } else { "DAMAGED" };
                let _ = writeln!(out, "{verdict:<8} {}: {}", finding.check, finding.detail);
            }
            return Ok(if well { exit::OK } else { exit::FAILED });
        }
        What::Backup { state, to } => store::backup(&state, &to)?,
        What::Restore { from, state } => store::restore(&from, &state)?,
    }
    Ok(exit::OK)
}
