//! One rank of one attempt: a session to its daemon, and the task that it was assigned.
//!
//! The main thread runs the task; a second thread runs the session, so that a stop or an abort
//! arrives while the main thread is deep in a step.

mod group;
mod session;
mod task;

use std::io::Read;
use std::path::PathBuf;

use tunefleet_proto::rpc::{BadToken, Token};

use session::Session;

/// Longest token that is read from stdin.
const MAX_TOKEN_BYTES: u64 = 1024;

/// Command line of `worker rank`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Unix socket of the daemon. The rank's token comes on stdin.
    #[arg(long)]
    socket: PathBuf,
}

/// What can end a rank badly.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Nothing usable on stdin.
    #[error("reading this rank's token from stdin: {0}")]
    Stdin(#[source] std::io::Error),
    /// Something else on stdin.
    #[error("the token on stdin is not one: {0}")]
    Token(#[from] BadToken),
    /// The daemon is not there, or does not know this rank.
    #[error("session to the daemon at {socket}: {cause}")]
    Session {
        /// The socket.
        socket: PathBuf,
        /// What went wrong.
        cause: String,
    },
    /// The daemon told this rank to stop, or is gone.
    #[error("aborted: {0}")]
    Aborted(String),
    /// The assignment makes no sense.
    #[error("assignment: {0}")]
    Assignment(String),
    /// The group could not be formed.
    #[error("joining the group: {0}")]
    Join(#[source] crate::comm::Error),
    /// No tokenizer was learnt.
    #[error(transparent)]
    Tokenizer(#[from] crate::data::tokenizer::Error),
    /// No model was made.
    #[error(transparent)]
    InitModel(#[from] crate::init_model::InitError),
    /// Training failed.
    #[error(transparent)]
    Train(#[from] crate::train::Error),
}

impl Error {
    /// Whether another rank, or whoever stops this one, is to blame.
    fn is_consequence(&self) -> bool {
        use crate::comm::Error::{Aborted, PeerGone};
        match self {
            Error::Aborted(_) => true,
            Error::Join(cause) | Error::Train(crate::train::Error::Comm(cause)) => {
                matches!(cause, PeerGone { .. } | Aborted(_))
            }
            _ => false,
        }
    }
}

/// Runs the assignment and reports how it went.
///
/// # Errors
/// See [`Error`].
pub fn run(args: Args) -> Result<(), Error> {
    let mut text = String::new();
    std::io::stdin().take(MAX_TOKEN_BYTES).read_to_string(&mut text).map_err(Error::Stdin)?;
    let session = Session::open(args.socket, Token::new(text.trim_end())?)?;
    let result = task::run(&session);
    session.close(&result);
    result.map(|_| ())
}
