//! gRPC: the generated messages, clients and servers, with message-size limits and bearer tokens.

use tonic::metadata::{Ascii, MetadataValue};
use tonic::service::Interceptor;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::Channel;
use tonic::{Request, Status};

/// Generated from `proto/tunefleet.proto`, which documents every message.
#[allow(missing_docs, clippy::all, clippy::pedantic)]
mod generated {
    tonic::include_proto!("tunefleet.v1");
}

pub use generated::*;

/// Largest message either side takes: a job file and the shard plan of a large model fit in it.
pub const MAX_MESSAGE_BYTES: usize = 16 * 1024 * 1024;
/// Largest message that a coordinator takes of a user: the settings of a job with ten thousand repositories fit in it.
pub const MAX_REQUEST_BYTES: usize = 4 * 1024 * 1024;
/// Version of what daemons and the coordinator say to each other: it grows when one side must know
/// what the other can do.
///
/// 1: every message is said once. 2: reports and exits are numbered and acknowledged, sessions have epochs.
pub const PROTOCOL: u32 = 2;
/// The oldest version that is still understood.
pub const OLDEST_PROTOCOL: u32 = 1;
/// Environment variable that carries the control plane's token to programs that dial it.
pub const TOKEN_VARIABLE: &str = "TUNEFLEET_TOKEN";

const HEADER: &str = "authorization";
const SCHEME: &str = "Bearer ";

/// A secret that a caller shows with every call. Its `Debug` form does not show it.
#[derive(Clone)]
pub struct Token {
    header: MetadataValue<Ascii>,
    sha256: String,
}

/// A token that does not fit an HTTP header.
#[derive(Debug, thiserror::Error)]
#[error("a token must be 1 to 512 printable ASCII characters, with no space")]
pub struct BadToken;

impl Token {
    /// A token of this text.
    ///
    /// # Errors
    /// [`BadToken`] when it is empty, too long, or not printable ASCII.
    pub fn new(text: &str) -> Result<Self, BadToken> {
        let printable = text.bytes().all(|byte| byte.is_ascii_graphic());
        if text.is_empty() || text.len() > 512 || !printable {
            return Err(BadToken);
        }
        let mut header = MetadataValue::try_from(format!("{SCHEME}{text}")).map_err(|_| BadToken)?;
        header.set_sensitive(true);
        Ok(Token { header, sha256: crate::digest_hex(text.as_bytes()) })
    }

    /// Whether the request shows this token. Digests are compared, so that the time it takes
    /// tells nothing about the token.
    pub fn shown_by<T>(&self, request: &Request<T>) -> bool {
        shown(request.metadata()).is_some_and(|text| crate::digest_hex(text.as_bytes()) == self.sha256)
    }

    /// SHA-256 of the token, in hex.
    pub fn sha256(&self) -> &str {
        &self.sha256
    }
}

impl std::fmt::Debug for Token {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Token(..)")
    }
}

/// The bearer token that a request shows.
pub fn shown(metadata: &tonic::metadata::MetadataMap) -> Option<&str> {
    bearer(metadata.get(HEADER)?.to_str().ok()?)
}

/// The bearer token that the headers of a call show.
pub fn shown_in(headers: &http::HeaderMap) -> Option<&str> {
    bearer(headers.get(HEADER)?.to_str().ok()?)
}

fn bearer(value: &str) -> Option<&str> {
    value.strip_prefix(SCHEME)
}

/// Client side: shows a token with every call; without one, shows nothing.
#[derive(Debug, Clone)]
pub struct ShowToken(pub Option<Token>);

impl Interceptor for ShowToken {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        if let Some(token) = &self.0 {
            request.metadata_mut().insert(HEADER, token.header.clone());
        }
        Ok(request)
    }
}

/// A channel that shows a token.
pub type TokenChannel = InterceptedService<Channel, ShowToken>;
/// Client of the job service.
pub type ControlClient = control_client::ControlClient<TokenChannel>;
/// Client of the worker service.
pub type WorkersClient = workers_client::WorkersClient<TokenChannel>;
/// Client of a daemon's rank service.
pub type RanksClient = ranks_client::RanksClient<TokenChannel>;

/// A client of the job service over `channel`.
pub fn control_client(channel: Channel, token: Option<Token>) -> ControlClient {
    control_client::ControlClient::with_interceptor(channel, ShowToken(token))
        .max_decoding_message_size(MAX_MESSAGE_BYTES)
        .max_encoding_message_size(MAX_MESSAGE_BYTES)
}

/// A client of the worker service over `channel`.
pub fn workers_client(channel: Channel, token: Option<Token>) -> WorkersClient {
    workers_client::WorkersClient::with_interceptor(channel, ShowToken(token))
        .max_decoding_message_size(MAX_MESSAGE_BYTES)
        .max_encoding_message_size(MAX_MESSAGE_BYTES)
}

/// A client of a daemon's rank service over `channel`.
pub fn ranks_client(channel: Channel, token: Token) -> RanksClient {
    ranks_client::RanksClient::with_interceptor(channel, ShowToken(Some(token)))
        .max_decoding_message_size(MAX_MESSAGE_BYTES)
        .max_encoding_message_size(MAX_MESSAGE_BYTES)
}

/// The server of the job service.
pub fn control_server<S: control_server::Control>(service: S) -> control_server::ControlServer<S> {
    control_server::ControlServer::new(service)
        .max_decoding_message_size(MAX_REQUEST_BYTES)
        .max_encoding_message_size(MAX_MESSAGE_BYTES)
}

/// The server of the worker service.
pub fn workers_server<S: workers_server::Workers>(service: S) -> workers_server::WorkersServer<S> {
    workers_server::WorkersServer::new(service)
        .max_decoding_message_size(MAX_MESSAGE_BYTES)
        .max_encoding_message_size(MAX_MESSAGE_BYTES)
}

/// The server of a daemon's rank service; each rank has its own token, which the service checks.
pub fn ranks_server<S: ranks_server::Ranks>(service: S) -> ranks_server::RanksServer<S> {
    ranks_server::RanksServer::new(service)
        .max_decoding_message_size(MAX_MESSAGE_BYTES)
        .max_encoding_message_size(MAX_MESSAGE_BYTES)
}

impl Stage {
    /// All stages, in order.
    pub const ALL: [Stage; 7] = [
        Stage::Collect,
        Stage::Tokenizer,
        Stage::InitModel,
        Stage::Train,
        Stage::Export,
        Stage::Evaluate,
        Stage::Serve,
    ];

    /// The one after it.
    pub fn next(self) -> Option<Stage> {
        Stage::ALL.into_iter().skip_while(|stage| *stage != self).nth(1)
    }

    /// Whether all ranks of the job work on it; on the others, one does.
    pub fn has_all_ranks(self) -> bool {
        matches!(self, Stage::Train | Stage::Evaluate)
    }

    /// Name on screen and in files.
    pub fn name(self) -> &'static str {
        match self {
            Stage::Unspecified => "none",
            Stage::Collect => "collect",
            Stage::Tokenizer => "tokenizer",
            Stage::InitModel => "init-model",
            Stage::Train => "train",
            Stage::Export => "export",
            Stage::Evaluate => "evaluate",
            Stage::Serve => "serve",
        }
    }
}

impl JobState {
    /// All states that a job can be in.
    pub const ALL: [JobState; 9] = [
        JobState::Queued,
        JobState::Running,
        JobState::Stopping,
        JobState::Suspended,
        JobState::Restarting,
        JobState::Completed,
        JobState::Failed,
        JobState::Cancelled,
        JobState::Stopped,
    ];

    /// Name on screen, in files and metrics.
    pub fn name(self) -> &'static str {
        match self {
            JobState::Unspecified => "none",
            JobState::Queued => "queued",
            JobState::Running => "running",
            JobState::Stopping => "stopping",
            JobState::Completed => "completed",
            JobState::Failed => "failed",
            JobState::Cancelled => "cancelled",
            JobState::Stopped => "stopped",
            JobState::Suspended => "suspended",
            JobState::Restarting => "restarting",
        }
    }

    /// Whether a job leaves this state only by a new attempt.
    pub fn is_end(self) -> bool {
        matches!(self, JobState::Completed | JobState::Failed | JobState::Cancelled | JobState::Stopped)
    }
}

impl WorkerState {
    /// All states that a worker can be in.
    pub const ALL: [WorkerState; 5] = [
        WorkerState::Ready,
        WorkerState::Draining,
        WorkerState::Suspect,
        WorkerState::Lost,
        WorkerState::Excluded,
    ];

    /// Name on screen and in metrics.
    pub fn name(self) -> &'static str {
        match self {
            WorkerState::Unspecified => "unknown",
            WorkerState::Ready => "ready",
            WorkerState::Draining => "draining",
            WorkerState::Suspect => "suspect",
            WorkerState::Lost => "lost",
            WorkerState::Excluded => "excluded",
        }
    }
}

impl FailureKind {
    /// Name in metrics, events and JSON.
    pub fn name(self) -> &'static str {
        match self {
            FailureKind::Unspecified => "unknown",
            FailureKind::Configuration => "configuration",
            FailureKind::OutOfMemory => "out_of_memory",
            FailureKind::HostOutOfMemory => "host_out_of_memory",
            FailureKind::DiskFull => "disk_full",
            FailureKind::NotFinite => "not_finite",
            FailureKind::Signal => "signal",
            FailureKind::Exit => "exit",
            FailureKind::Hang => "hang",
            FailureKind::WorkerLost => "worker_lost",
            FailureKind::Start => "start",
            FailureKind::Preempted => "preempted",
            FailureKind::Deadline => "deadline",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_same_token_is_recognised() {
        let right = Token::new("right").unwrap();
        let shows = |token: &str| ShowToken(Some(Token::new(token).unwrap())).call(Request::new(())).unwrap();
        assert!(right.shown_by(&shows("right")));
        for request in [shows("wrong"), shows("right2"), Request::new(())] {
            assert!(!right.shown_by(&request));
        }
    }

    #[test]
    fn a_token_that_does_not_fit_a_header_is_refused_and_none_is_ever_printed() {
        for text in ["", "two words", "line\nbreak", "h\u{e9}", &"x".repeat(513)] {
            assert!(Token::new(text).is_err(), "{text:?}");
        }
        assert_eq!(format!("{:?}", Token::new("secret").unwrap()), "Token(..)");
    }
}
