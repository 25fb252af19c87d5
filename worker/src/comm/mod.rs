//! Collectives between the ranks of one attempt.
//!
//! Every rank must start the same operations in the same order: one thread per rank starts
//! them, in the order of the block walk. Operations are asynchronous; [`Work::wait`] joins.

/// What a rank says of its collectives when one has hung.
pub mod dump;
/// The groups that a rank belongs to.
pub mod mesh;
/// GPU ranks.
pub mod nccl;
/// The record of collectives.
pub mod recorder;
/// One rank that plays all its peers.
pub mod simulated;
/// Over TCP, for CPUs.
pub mod tcp;
/// Looks for collectives that take too long.
pub mod watchdog;

use std::sync::Arc;
use std::time::Duration;

use tch::{Device, Tensor};
use tunefleet_proto::ids::Rank;

pub use mesh::{Groups, Mesh};

/// What an operation is about, for error messages and the record of collectives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tag {
    /// Unit of the shard plan (0 is the embeddings), or `None` for small control values.
    pub unit: Option<u32>,
    /// What is being done with it, e.g. `"gather"`.
    pub what: &'static str,
}

/// What can go wrong in a collective.
#[derive(Debug, Clone, thiserror::Error)]
pub enum Error {
    /// A peer's connection closed or failed; the peer is probably gone.
    #[error("rank {peer} is gone during {what}: {cause}")]
    PeerGone {
        /// The peer.
        peer: u32,
        /// The operation.
        what: String,
        /// What the connection said.
        cause: String,
    },
    /// Ranks started different operations.
    #[error("ranks are out of step: this rank is at {ours}, rank {peer} at {theirs}")]
    Desynchronised {
        /// The peer.
        peer: u32,
        /// What this rank expected.
        ours: String,
        /// What the peer sent.
        theirs: String,
    },
    /// [`Communicator::abort`] was called.
    #[error("aborted: {0}")]
    Aborted(String),
    /// Tensors that do not fit the operation; checked before anything is sent.
    #[error("{op}: {rule}, got {got}")]
    Tensor {
        /// The operation.
        op: &'static str,
        /// The rule.
        rule: String,
        /// The offending value.
        got: String,
    },
    /// The group could not be formed.
    #[error("joining the group: {0}")]
    Join(String),
    /// The backend failed.
    #[error("{0}")]
    Backend(String),
}

/// A started operation. Tensors given to it must not be touched before [`Work::wait`].
pub trait Work: Send {
    /// Blocks the calling thread (CPU) or orders the current stream after the operation (GPU).
    ///
    /// # Errors
    /// Whatever the operation met.
    fn wait(self: Box<Self>) -> Result<(), Error>;

    /// A view of this operation for other threads; `None` where it ends when [`Work::wait`] does.
    fn completion(&self) -> Option<Arc<dyn Completion>> {
        None
    }
}

/// Whether an operation has ended, for threads that do not wait for it.
pub trait Completion: Send + Sync {
    /// Never blocks. An operation that failed is never complete.
    fn is_complete(&self) -> bool;
}

/// Collectives over one attempt's ranks.
pub trait Communicator: Send + Sync {
    /// This rank and the world.
    fn rank(&self) -> Rank;

    /// In place: `buffer` is `[world * n]`, contiguous, with this rank's `n` elements already in
    /// position; afterwards all of it is filled.
    ///
    /// # Errors
    /// [`Error::Tensor`] before anything is sent.
    fn all_gather(&self, buffer: &Tensor, tag: Tag) -> Result<Box<dyn Work>, Error>;

    /// `output` `[n]` = sum over ranks of their `input` `[world * n]` at this rank's position.
    /// The order of summation is fixed: results are bit-identical from run to run.
    ///
    /// # Errors
    /// [`Error::Tensor`] before anything is sent.
    fn reduce_scatter(&self, input: &Tensor, output: &Tensor, tag: Tag) -> Result<Box<dyn Work>, Error>;

    /// In place sum over ranks; all wait for their operations in the order in which they started them.
    ///
    /// # Errors
    /// [`Error::Tensor`] before anything is sent.
    fn all_reduce(&self, tensor: &Tensor, tag: Tag) -> Result<Box<dyn Work>, Error>;

    /// All ranks arrive before any leaves.
    ///
    /// # Errors
    /// Whatever the operation met.
    fn barrier(&self) -> Result<(), Error>;

    /// From any thread: fails what is under way and all that follows, here, now.
    fn abort(&self, reason: &str);

    /// How long the thread of this rank has stood still for collectives, over all groups that share a record; nothing
    /// where nobody measures it.
    fn waited(&self) -> Duration {
        Duration::ZERO
    }
}

/// Whether any rank has `failed`; all ranks ask. `device` is where the communicator works.
///
/// # Errors
/// Whatever the operation met.
pub fn any_failed(
    comm: &dyn Communicator,
    device: Device,
    failed: bool,
    what: &'static str,
) -> Result<bool, Error> {
    let count = Tensor::from_slice(&[i64::from(failed)]).to_device(device);
    comm.all_reduce(&count, Tag { unit: None, what })?.wait()?;
    Ok(count.int64_value(&[0]) > 0)
}

/// A world of one: nothing to send.
pub struct Solo;

struct Done;

impl Work for Done {
    fn wait(self: Box<Self>) -> Result<(), Error> {
        Ok(())
    }
}

impl Communicator for Solo {
    fn rank(&self) -> Rank {
        Rank::SOLE
    }

    fn all_gather(&self, _buffer: &Tensor, _tag: Tag) -> Result<Box<dyn Work>, Error> {
        Ok(Box::new(Done))
    }

    fn reduce_scatter(&self, input: &Tensor, output: &Tensor, _tag: Tag) -> Result<Box<dyn Work>, Error> {
        output.shallow_clone().copy_(input);
        Ok(Box::new(Done))
    }

    fn all_reduce(&self, _tensor: &Tensor, _tag: Tag) -> Result<Box<dyn Work>, Error> {
        Ok(Box::new(Done))
    }

    fn barrier(&self) -> Result<(), Error> {
        Ok(())
    }

    fn abort(&self, _reason: &str) {}
}
