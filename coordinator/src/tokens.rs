//! `coordinator tokens`: who may ask a coordinator for what. A coordinator that runs follows at once.

use std::io::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Subcommand;

use crate::cli::exit;
use crate::connect::{self, Failure};
use crate::control::{Grants, Role};
use crate::events::time;
use crate::serve::state_dir;

/// Command line of `coordinator tokens`.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    what: What,
    /// State directory of the coordinator; default: as for `coordinator serve`.
    #[arg(long, value_name = "DIR", env = "TUNEFLEET_STATE", global = true)]
    state: Option<PathBuf>,
}

#[derive(Debug, Subcommand)]
enum What {
    /// Makes a token and prints it: it is kept nowhere, and cannot be shown again.
    Create {
        /// Whose it is: shown in the audit.
        name: String,
        /// What it may be used for.
        #[arg(long, value_enum)]
        role: Role,
    },
    /// Shows whose tokens there are.
    List,
    /// Ends a token, and every session that lives by it.
    Revoke {
        /// Whose.
        name: String,
    },
}

/// Runs the verb.
pub fn run(args: Args) -> ExitCode {
    connect::block_on(async { act(args) })
}

fn act(args: Args) -> Result<u8, Failure> {
    let state = state_dir(args.state)?;
    let mut out = std::io::stdout().lock();
    // A reader that has gone away wants no more.
    match args.what {
        What::Create { name, role } => {
            let token = Grants::create(&state, &name, role)?;
            let _ = writeln!(out, "{token}");
            let (role, state) = (role.name(), state.display());
            eprintln!(
                "{name} may now call the coordinator of {state} as {role}: put the token into a file for --token-file"
            );
        }
        What::List => {
            for grant in Grants::read(&state)?.tokens {
                let made = time(grant.created_unix_ms);
                let _ = writeln!(out, "{:<24} {:<8} {made}", grant.name, grant.role.name());
            }
        }
        What::Revoke { name } => Grants::revoke(&state, &name)?,
    }
    Ok(exit::OK)
}
