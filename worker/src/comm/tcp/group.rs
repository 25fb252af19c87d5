//! What all links of a rank share: the queues, the first failure, and who waits for what.

use std::net::{Shutdown, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tunefleet_proto::ids::Rank;

use super::link::Transfer;
use super::sum::Sum;
use crate::comm::{Completion, Error, Tag};

/// Shared by the communicator and its threads.
pub struct Group {
    /// This rank and the world.
    pub rank: Rank,
    state: Mutex<State>,
    changed: Condvar,
    /// One per peer, to unblock its threads.
    sockets: Vec<TcpStream>,
}

struct State {
    ended: Option<End>,
    /// Gone when the membership has ended: threads then run out of work.
    queues: Option<Queues>,
}

/// Why a rank's membership ended.
#[derive(Debug, Clone)]
pub enum End {
    /// The communicator was dropped: all is well.
    Left,
    /// Something failed, here or at a peer.
    Failed(Error),
}

/// Where threads find their work.
pub struct Queues {
    /// Operations started so far.
    pub started: u64,
    /// In rank order.
    pub peers: Vec<PeerQueues>,
    /// To the thread that adds up.
    pub sums: Sender<(Arc<Operation>, Sum)>,
}

/// The two directions of a link.
pub struct PeerQueues {
    /// The rank at the other end.
    pub peer: u32,
    /// To its sending thread.
    pub send: Sender<Transfer>,
    /// To its receiving thread.
    pub receive: Sender<Transfer>,
}

/// One started operation.
pub struct Operation {
    /// For messages.
    pub tag: Tag,
    transfers_left: AtomicUsize,
    /// What remains to be computed after the last transfer.
    sum: Mutex<Option<Sum>>,
    /// Written under the group's lock.
    done: AtomicBool,
}

impl Operation {
    /// An operation of so many transfers, at least one.
    pub fn new(tag: Tag, transfers: usize, sum: Option<Sum>) -> Self {
        Operation {
            tag,
            transfers_left: AtomicUsize::new(transfers),
            sum: Mutex::new(sum),
            done: AtomicBool::new(false),
        }
    }
}

impl Completion for Operation {
    fn is_complete(&self) -> bool {
        self.done.load(Ordering::Acquire)
    }
}

impl Group {
    /// A group whose links are about to run.
    pub fn new(rank: Rank, sockets: Vec<TcpStream>, queues: Queues) -> Self {
        let state = Mutex::new(State { ended: None, queues: Some(queues) });
        Group { rank, state, changed: Condvar::new(), sockets }
    }

    /// Starts an operation: `begin` queues its transfers. One at a time, so that all links see the
    /// same order.
    pub fn start(&self, begin: impl FnOnce(&mut Queues) -> Arc<Operation>) -> Result<Arc<Operation>, Error> {
        let mut state = lock(&self.state);
        let State { ended, queues } = &mut *state;
        match (ended, queues) {
            (None, Some(queues)) => Ok(begin(queues)),
            (Some(End::Failed(error)), _) => Err(error.clone()),
            (Some(End::Left), _) | (None, None) => Err(left()),
        }
    }

    /// Why the membership ended, if it did.
    pub fn end(&self) -> Option<End> {
        lock(&self.state).ended.clone()
    }

    /// Ends the membership unless it has ended: the first reason is the one that counts. Waiters
    /// return at once; threads notice within a moment.
    pub fn finish(&self, end: End) {
        let mut state = lock(&self.state);
        if state.ended.is_some() {
            return;
        }
        let failed = matches!(end, End::Failed(_));
        state.ended = Some(end);
        state.queues = None;
        drop(state);
        self.changed.notify_all();
        if failed {
            self.shutdown(Shutdown::Read);
        }
    }

    /// As [`Group::finish`], for an error.
    pub fn fail(&self, error: Error) {
        self.finish(End::Failed(error));
    }

    /// A peer is lost.
    pub fn lose(&self, peer: u32, what: &str, cause: impl ToString) {
        self.fail(Error::PeerGone { peer, what: what.to_owned(), cause: cause.to_string() });
    }

    /// Unblocks every thread in a socket call of that direction.
    pub fn shutdown(&self, how: Shutdown) {
        for socket in &self.sockets {
            // Fails only on a connection that is gone already.
            let _ = socket.shutdown(how);
        }
    }

    /// One transfer of `operation` is done; after the last one it is added up, or complete.
    pub fn transferred(&self, operation: &Arc<Operation>) {
        if operation.transfers_left.fetch_sub(1, Ordering::AcqRel) > 1 {
            return;
        }
        let sum = lock(&operation.sum).take();
        match sum {
            Some(sum) => {
                // Without queues the membership has ended, and waiters know.
                if let Some(queues) = &lock(&self.state).queues {
                    let _ = queues.sums.send((operation.clone(), sum));
                }
            }
            None => self.complete(operation),
        }
    }

    /// All of `operation` is done.
    pub fn complete(&self, operation: &Operation) {
        let state = lock(&self.state);
        operation.done.store(true, Ordering::Release);
        drop(state);
        self.changed.notify_all();
    }

    /// Blocks until `operation` is done or the membership has ended.
    pub fn wait(&self, operation: &Operation) -> Result<(), Error> {
        let done = || operation.is_complete();
        let state = lock(&self.state);
        let waiting = |state: &mut State| !done() && state.ended.is_none();
        let state = self.changed.wait_while(state, waiting).unwrap_or_else(PoisonError::into_inner);
        match &state.ended {
            _ if done() => Ok(()),
            Some(End::Failed(error)) => Err(error.clone()),
            Some(End::Left) | None => Err(left()),
        }
    }

    /// As [`Group::wait`], but not for ever: false when it took longer.
    pub fn wait_timeout(&self, operation: &Operation, timeout: Duration) -> Result<bool, Error> {
        let waiting = |state: &mut State| !operation.is_complete() && state.ended.is_none();
        let waited = self.changed.wait_timeout_while(lock(&self.state), timeout, waiting);
        let (state, result) = waited.unwrap_or_else(PoisonError::into_inner);
        drop(state);
        if result.timed_out() { Ok(false) } else { self.wait(operation).map(|()| true) }
    }

    /// Blocks until the membership has ended, at most so long.
    pub fn wait_for_end(&self, timeout: Duration) {
        let running = |state: &mut State| state.ended.is_none();
        drop(self.changed.wait_timeout_while(lock(&self.state), timeout, running));
    }
}

fn left() -> Error {
    Error::Aborted("this rank has left the group".to_owned())
}

/// A poisoned lock means a panic in a critical section of a few lines, none of which leaves the
/// state half-changed.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
