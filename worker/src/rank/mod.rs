//! One rank of one attempt: a session to its daemon, and the task that it was assigned.
//!
//! The main thread runs the task; a second thread runs the session, so that a stop or an abort
//! arrives while the main thread is deep in a step.

mod group;
mod session;
mod spool;
mod task;

use std::any::Any;
use std::io::Read;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;

use tunefleet_proto::rpc::{BadToken, FailureKind, Token};

use crate::{checkpoint, train};
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
    /// Another rank is to blame.
    #[error("aborted by peer: {0}")]
    AbortedByPeer(String),
    /// Nobody would notice a hang.
    #[error("starting the thread that watches over collectives: {0}")]
    Watchdog(#[source] std::io::Error),
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
    /// No template could be put beside the model.
    #[error(transparent)]
    Chat(#[from] crate::chat::Error),
    /// The model could not be fetched.
    #[error("fetching the model: {0}")]
    Hub(#[from] tunefleet_hub::Error),
    /// What was fetched has no place.
    #[error(transparent)]
    Files(#[from] checkpoint::Error),
    /// What was trained could not leave.
    #[error(transparent)]
    Export(#[from] crate::export::ExportError),
    /// The completion server could not start, or not go on.
    #[error(transparent)]
    Serve(#[from] crate::serve::Error),
    /// What was asked of the model could not be.
    #[error(transparent)]
    Evaluate(#[from] crate::evaluate::Error),
    /// Training failed.
    #[error(transparent)]
    Train(#[from] crate::train::Error),
    /// libtorch, out of memory above all: tch raises its failures as panics.
    #[error("{0}")]
    Panicked(String),
}

impl Error {
    /// Whether another rank, or whoever stops this one, is to blame.
    fn is_consequence(&self) -> bool {
        use crate::comm::Error::{Aborted, PeerGone};
        match self {
            Error::Aborted(_) | Error::AbortedByPeer(_) => true,
            Error::Join(cause)
            | Error::Train(
                train::Error::Comm(cause) | train::Error::Checkpoint(checkpoint::Error::Comm(cause)),
            ) => {
                matches!(cause, PeerGone { .. } | Aborted(_))
            }
            Error::Evaluate(crate::evaluate::Error::Comm(cause)) => {
                matches!(cause, PeerGone { .. } | Aborted(_))
            }
            Error::Train(train::Error::Checkpoint(checkpoint::Error::Elsewhere(_))) => true,
            _ => false,
        }
    }
}

impl Error {
    /// What kind of thing went wrong, as far as this rank can know.
    fn kind(&self) -> FailureKind {
        use crate::evaluate::Error as Asking;
        use crate::serve::Error as Failure;
        let words = self.to_string();
        let is_configuration = matches!(
            self,
            Error::Assignment(_)
                | Error::Tokenizer(_)
                | Error::InitModel(_)
                | Error::Hub(tunefleet_hub::Error::Setting(_) | tunefleet_hub::Error::Refused { .. })
                | Error::Files(_)
                | Error::Serve(Failure::Setting(_) | Failure::Adapter(_) | Failure::Tokens { .. })
                | Error::Evaluate(
                    Asking::Setting(_) | Asking::Tasks(_) | Asking::Python(_) | Asking::Adapter(_)
                )
                | Error::Train(
                    train::Error::Mismatch(_) | train::Error::Gradient { .. } | train::Error::Data(_)
                )
        );
        if words.starts_with("out of memory") {
            FailureKind::OutOfMemory
        } else if words.contains("No space left on device") {
            FailureKind::DiskFull
        } else if matches!(self, Error::Train(train::Error::NonFinite { .. })) {
            FailureKind::NotFinite
        } else if is_configuration {
            FailureKind::Configuration
        } else {
            FailureKind::Exit
        }
    }
}

/// Runs the assignment and reports how it went.
///
/// # Errors
/// See [`Error`].
pub fn run(args: Args) -> Result<(), Error> {
    // With its keeper gone, nobody would know how this process ends.
    nix::sys::prctl::set_pdeathsig(nix::sys::signal::Signal::SIGKILL)
        .map_err(|error| Error::Stdin(error.into()))?;
    let mut text = String::new();
    std::io::stdin().take(MAX_TOKEN_BYTES).read_to_string(&mut text).map_err(Error::Stdin)?;
    let session = Session::open(args.socket, Token::new(text.trim_end())?)?;
    let result = catch_unwind(AssertUnwindSafe(|| task::run(&session)))
        .unwrap_or_else(|panic| Err(Error::Panicked(message_of(panic.as_ref()))))
        .map_err(|error| session.blame(error));
    session.close(&result);
    result.map(|_| ())
}

/// What a panic said; of one of libtorch's errors, the first line: its C++ stack follows.
pub(crate) fn message_of(panic: &(dyn Any + Send)) -> String {
    let said = panic.downcast_ref::<String>().map(String::as_str);
    let said = said.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("a panic without a message");
    // tch unwraps: the message stands in the debug form of its error.
    let text = said.strip_prefix("called `Result::unwrap()` on an `Err` value: Torch(\"").unwrap_or(said);
    let text = text.split("\\n").next().unwrap_or(text);
    let text = text.split('\n').next().unwrap_or(text);
    if text.contains("out of memory") || text.contains("can't allocate memory") {
        return format!(
            "out of memory: {text}; lower train.micro_batch_sequences or data.sequence_tokens, set train.recompute, or use \
             more ranks: coordinator plan shows what a rank needs"
        );
    }
    text.to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_of_libtorch_is_told_in_its_own_words_with_what_to_do() {
        // More than any machine has: libtorch's allocator refuses.
        let allocate = || tch::Tensor::zeros([1 << 50], (tch::Kind::Float, tch::Device::Cpu));
        let panic = catch_unwind(AssertUnwindSafe(allocate)).err().unwrap();
        let message = message_of(panic.as_ref());
        assert!(message.starts_with("out of memory: "), "{message}");
        assert!(message.contains("can't allocate memory"), "{message}");
        assert!(message.contains("train.micro_batch_sequences"), "{message}");
        assert!(!message.contains("frame #"), "{message}");
    }
}
