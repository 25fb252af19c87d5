//! How verbs reach a coordinator, and what they exit with when they do not.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Status};
use tunefleet_proto::rpc::{self, ControlClient, TOKEN_VARIABLE, Token};

use crate::cli::exit;

/// Where the coordinator is. Shared by all verbs that ask one.
#[derive(Debug, Clone, clap::Args)]
pub struct Connect {
    /// The coordinator's address.
    #[arg(long, value_name = "URL", env = "TUNEFLEET_COORDINATOR", default_value = "http://127.0.0.1:7070")]
    pub coordinator: String,
    /// File that holds the coordinator's token; else it is taken from TUNEFLEET_TOKEN.
    #[arg(long, value_name = "FILE")]
    pub token_file: Option<PathBuf>,
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
            _ => exit::FAILED,
        };
        Failure::new(exit_code, status.message())
    }
}

impl Connect {
    /// A client of that coordinator.
    pub async fn client(&self) -> Result<ControlClient, Failure> {
        let token = token(self.token_file.as_deref())?;
        Ok(rpc::control_client(channel(&self.coordinator).await?, token))
    }
}

/// A channel to `url`.
pub async fn channel(url: &str) -> Result<Channel, Failure> {
    let unreachable = |cause: &dyn std::fmt::Display| {
        let hint = "is a `coordinator serve` running there?";
        Failure::new(exit::UNREACHABLE, format!("no coordinator at {url}: {cause}; {hint}"))
    };
    if !url.starts_with("http://") {
        return Err(Failure::new(
            exit::USAGE,
            format!("coordinator {url}: the address must be http://host:port"),
        ));
    }
    let endpoint = Endpoint::from_shared(url.to_owned()).map_err(|error| unreachable(&error))?;
    endpoint
        .connect_timeout(Duration::from_secs(5))
        .http2_keep_alive_interval(Duration::from_secs(10))
        .keep_alive_timeout(Duration::from_secs(10))
        .connect()
        .await
        .map_err(|error| unreachable(&error))
}

/// The token in a file, or else in the environment.
pub fn token(file: Option<&std::path::Path>) -> Result<Option<Token>, Failure> {
    let text = match file {
        Some(path) => {
            let at = |error| Failure::new(exit::USAGE, format!("--token-file {}: {error}", path.display()));
            Some(std::fs::read_to_string(path).map_err(at)?)
        }
        None => std::env::var(TOKEN_VARIABLE).ok(),
    };
    text.map(|text| Token::new(text.trim_end()).map_err(|error| Failure::new(exit::USAGE, error.to_string())))
        .transpose()
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
