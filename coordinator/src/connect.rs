//! How verbs reach a coordinator, and what they exit with when they do not.

use std::process::ExitCode;

use tonic::{Code, Status};
use tunefleet_proto::dial::{Credentials, DialError, chain};
use tunefleet_proto::rpc::{self, ControlClient};

use crate::cli::exit;

/// Where the coordinator is. Shared by all verbs that ask one.
#[derive(Debug, Clone, clap::Args)]
pub struct Connect {
    /// The coordinator's address.
    #[arg(long, value_name = "URL", env = "TUNEFLEET_COORDINATOR", default_value = "http://127.0.0.1:7070")]
    pub coordinator: String,
    #[command(flatten)]
    pub credentials: Credentials,
}

/// Why a verb ends early, and the exit code that tells it to scripts.
#[derive(Debug)]
pub struct Failure {
    /// See [`exit`].
    pub exit_code: u8,
    /// For people.
    pub message: String,
}

impl Failure {
    /// A failure with this exit code.
    pub fn new(exit_code: u8, message: impl Into<String>) -> Self {
        Failure { exit_code, message: message.into() }
    }
}

impl From<Status> for Failure {
    fn from(status: Status) -> Self {
        let exit_code = match status.code() {
            Code::NotFound => exit::NOT_FOUND,
            Code::Unavailable | Code::Unauthenticated | Code::PermissionDenied => exit::UNREACHABLE,
            Code::ResourceExhausted => exit::NO_CAPACITY,
            // Not the coordinator's word, but that of the way to it.
            _ if std::error::Error::source(&status).is_some() => exit::UNREACHABLE,
            _ => exit::FAILED,
        };
        Failure::new(exit_code, explained(&status))
    }
}

impl From<DialError> for Failure {
    fn from(error: DialError) -> Self {
        Failure::new(exit::USAGE, error.to_string())
    }
}

/// What a coordinator, or the way to it, has said.
fn explained(status: &Status) -> String {
    let message = status.message();
    match std::error::Error::source(status).map(chain) {
        Some(cause) if cause.starts_with(message) => cause,
        Some(cause) => format!("{message}: {cause}"),
        None => message.to_owned(),
    }
}

impl Connect {
    /// A client of that coordinator.
    pub async fn client(&self) -> Result<ControlClient, Failure> {
        client(&self.coordinator, &self.credentials).await
    }
}

/// A client of the coordinator at `url`.
pub async fn client(url: &str, credentials: &Credentials) -> Result<ControlClient, Failure> {
    let (endpoint, token) = credentials.endpoint(url)?;
    let channel = endpoint.connect().await.map_err(|error| {
        let cause = chain(&error);
        let hint = match cause.contains("certificate") {
            true => "name the authority that signed it by --ca FILE",
            false => "is a `coordinator serve` running there?",
        };
        Failure::new(exit::UNREACHABLE, format!("no coordinator at {url}: {cause}; {hint}"))
    })?;
    Ok(rpc::control_client(channel, token))
}

/// Runs a verb to its end and prints its error.
pub fn block_on(verb: impl Future<Output = Result<u8, Failure>>) -> ExitCode {
    let outcome = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => {
            let outcome = runtime.block_on(verb);
            // Blocking work that nobody waits for any more must not keep the program alive.
            runtime.shutdown_background();
            outcome
        }
        Err(error) => Err(Failure::new(exit::FAILED, format!("starting the runtime: {error}"))),
    };
    match outcome {
        Ok(code) => ExitCode::from(code),
        Err(Failure { exit_code, message }) => {
            // Faults of a job file begin with their place.
            let prefix = if exit_code == exit::BAD_CONFIG { "" } else { "error: " };
            eprintln!("{prefix}{message}");
            ExitCode::from(exit_code)
        }
    }
}
