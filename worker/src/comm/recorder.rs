//! The record of collectives: what this rank started last and what of it has ended. It is always
//! on, so that a hang can be told after it has happened: an operation costs three short locks, and the
//! record itself never grows.
//!
//! All ranks start the same operations in the same order, whatever groups of ranks they go to.
//! So one number, counted over all communicators of a rank, means the same operation everywhere:
//! the rank whose last number is lowest is the one that the others wait for.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use tch::Tensor;
use tunefleet_proto::ids::Rank;

use super::{Communicator, Completion, Error, Tag, Work};

/// Collectives that are remembered.
pub const CAPACITY: usize = 512;

/// What a collective does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operation {
    /// See [`Communicator::all_gather`].
    AllGather,
    /// See [`Communicator::reduce_scatter`].
    ReduceScatter,
    /// See [`Communicator::all_reduce`].
    AllReduce,
    /// See [`Communicator::barrier`].
    Barrier,
}

/// How far a collective is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// Under way.
    Started,
    /// Its first part may be done; the rest is done while this rank waits for it, which it does not yet.
    Idle,
    /// Ended well, so long after its start. On a GPU this is noticed when somebody looks.
    Finished(Duration),
    /// Refused, or failed while this rank waited for it.
    Failed(Duration),
}

/// One remembered collective.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Collective {
    /// How many had been started when it was, itself included.
    pub sequence: u64,
    /// What it does.
    pub operation: Operation,
    /// What it is about.
    pub tag: Tag,
    /// Size of the largest tensor that it was given.
    pub bytes: u64,
    /// When it was started, on this rank.
    pub started: Instant,
    /// Since when it depends on the other ranks alone: its start, or when this rank began to wait.
    pub since: Instant,
    /// How far it is.
    pub state: State,
}

/// What a record holds at one moment.
#[derive(Debug, Clone)]
pub struct Snapshot {
    /// The last collectives, oldest first; at most [`CAPACITY`].
    pub collectives: Vec<Collective>,
    /// The newest of them.
    pub last_started: Option<Collective>,
    /// The newest that ended well.
    pub last_finished: Option<Collective>,
    /// The oldest that is under way.
    pub oldest_unfinished: Option<Collective>,
}

/// One rank's record.
pub struct Record {
    units: Vec<String>,
    began: Instant,
    began_unix: Duration,
    ring: Mutex<Ring>,
    /// How long this rank's thread stood still for collectives.
    waited_nanos: AtomicU64,
}

struct Ring {
    /// Number `n` lies at `(n - 1) % CAPACITY`.
    slots: Vec<Slot>,
    started: u64,
    last_finished: Option<Collective>,
}

struct Slot {
    collective: Collective,
    /// Kept while it is under way.
    completion: Option<Arc<dyn Completion>>,
}

impl Operation {
    /// E.g. `all-gather`.
    pub fn name(self) -> &'static str {
        match self {
            Operation::AllGather => "all-gather",
            Operation::ReduceScatter => "reduce-scatter",
            Operation::AllReduce => "all-reduce",
            Operation::Barrier => "barrier",
        }
    }
}

impl Record {
    /// An empty record. `units` are the names of the shard plan's units, in their order.
    pub fn new(units: Vec<String>) -> Self {
        let ring = Ring { slots: Vec::with_capacity(CAPACITY), started: 0, last_finished: None };
        let began_unix = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let waited_nanos = AtomicU64::new(0);
        Record { units, began: Instant::now(), began_unix, ring: Mutex::new(ring), waited_nanos }
    }

    /// What is remembered now.
    pub fn snapshot(&self) -> Snapshot {
        self.look();
        let ring = self.ring();
        let mut collectives: Vec<Collective> = ring.slots.iter().map(|slot| slot.collective).collect();
        collectives.sort_unstable_by_key(|collective| collective.sequence);
        let oldest_unfinished = collectives.iter().find(|c| c.state == State::Started).copied();
        Snapshot {
            last_started: collectives.last().copied(),
            last_finished: ring.last_finished,
            oldest_unfinished,
            collectives,
        }
    }

    /// The oldest that is under way.
    pub fn oldest_unfinished(&self) -> Option<Collective> {
        self.look();
        let ring = self.ring();
        let unfinished = ring.slots.iter().map(|slot| &slot.collective).filter(|c| c.state == State::Started);
        unfinished.min_by_key(|collective| collective.sequence).copied()
    }

    /// What a collective is about, in words: `gather of block.7`, `target count`.
    pub fn about(&self, tag: Tag) -> String {
        let Some(unit) = tag.unit else { return tag.what.to_owned() };
        match self.units.get(unit as usize) {
            Some(name) => format!("{} of {name}", tag.what),
            None => format!("{} of unit {unit}", tag.what),
        }
    }

    /// Milliseconds since 1970 at an instant, to set ranks side by side.
    pub fn unix_ms(&self, at: Instant) -> u64 {
        (self.began_unix + at.saturating_duration_since(self.began)).as_millis() as u64
    }

    /// Lets go of the operations under way, before the group that they belong to goes.
    pub fn forget_work(&self) {
        let views: Vec<_> = self.ring().slots.iter_mut().map(|slot| slot.completion.take()).collect();
        drop(views);
    }

    fn start(&self, operation: Operation, tag: Tag, bytes: u64) -> u64 {
        let mut ring = self.ring();
        ring.started += 1;
        let sequence = ring.started;
        let (now, state) = (Instant::now(), State::Started);
        let collective = Collective { sequence, operation, tag, bytes, started: now, since: now, state };
        let slot = Slot { collective, completion: None };
        let overwritten = match ring.slots.get_mut(index(sequence)) {
            Some(oldest) => Some(std::mem::replace(oldest, slot)),
            None => {
                ring.slots.push(slot);
                None
            }
        };
        drop(ring);
        // Outside the lock: it may be the last holder of its operation.
        drop(overwritten);
        sequence
    }

    /// An operation has begun; without `completion` nobody but its waiter can see its end.
    fn begun(&self, sequence: u64, completion: Option<Arc<dyn Completion>>) {
        if let Some(slot) = self.ring().of(sequence) {
            if completion.is_none() {
                slot.collective.state = State::Idle;
            }
            slot.completion = completion;
        }
    }

    fn waited_for(&self, sequence: u64) {
        if let Some(slot) = self.ring().of(sequence) {
            slot.collective.state = State::Started;
            slot.collective.since = Instant::now();
        }
    }

    fn end(&self, sequence: u64, well: bool) {
        let mut ring = self.ring();
        let Some(slot) = ring.of(sequence).filter(|slot| slot.collective.state == State::Started) else {
            return;
        };
        let took = slot.collective.started.elapsed();
        slot.collective.state = if well { State::Finished(took) } else { State::Failed(took) };
        let (ended, completion) = (slot.collective, slot.completion.take());
        if well && ring.last_finished.is_none_or(|last| last.sequence < sequence) {
            ring.last_finished = Some(ended);
        }
        drop(ring);
        drop(completion);
    }

    /// Notes which operations have ended without anybody's having waited for it.
    fn look(&self) {
        let under_way: Vec<(u64, Arc<dyn Completion>)> = {
            let ring = self.ring();
            let watched = ring
                .slots
                .iter()
                .filter_map(|slot| Some((slot.collective.sequence, Arc::clone(slot.completion.as_ref()?))));
            watched.collect()
        };
        // Outside the lock: a device that hangs must not hold up the thread that starts operations.
        for (sequence, completion) in under_way {
            if completion.is_complete() {
                self.end(sequence, true);
            }
        }
    }

    fn stood_still(&self, since: Instant) {
        self.waited_nanos.fetch_add(since.elapsed().as_nanos() as u64, Ordering::Relaxed);
    }

    fn ring(&self) -> MutexGuard<'_, Ring> {
        // No critical section leaves the ring half-changed.
        self.ring.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Ring {
    /// The slot of a collective, unless later ones have taken its place.
    fn of(&mut self, sequence: u64) -> Option<&mut Slot> {
        self.slots.get_mut(index(sequence)).filter(|slot| slot.collective.sequence == sequence)
    }
}

fn index(sequence: u64) -> usize {
    (sequence.saturating_sub(1) % CAPACITY as u64) as usize
}

/// A communicator whose collectives are remembered. Several may share a record.
pub struct Recorded<C> {
    inner: C,
    record: Arc<Record>,
}

impl<C: Communicator> Recorded<C> {
    /// `inner`, remembered in `record`.
    pub fn new(inner: C, record: Arc<Record>) -> Self {
        Recorded { inner, record }
    }

    fn start(
        &self,
        operation: Operation,
        tag: Tag,
        tensor: &Tensor,
        begin: impl FnOnce() -> Result<Box<dyn Work>, Error>,
    ) -> Result<Box<dyn Work>, Error> {
        let bytes = (tensor.numel() * tensor.kind().elt_size_in_bytes()) as u64;
        // Before it begins: it may block there.
        let sequence = self.record.start(operation, tag, bytes);
        let inner = begin().inspect_err(|_| self.record.end(sequence, false))?;
        let completion = inner.completion();
        self.record.begun(sequence, completion.clone());
        Ok(Box::new(RecordedWork { inner, record: Arc::clone(&self.record), sequence, completion }))
    }
}

struct RecordedWork {
    inner: Box<dyn Work>,
    record: Arc<Record>,
    sequence: u64,
    completion: Option<Arc<dyn Completion>>,
}

impl Work for RecordedWork {
    fn wait(self: Box<Self>) -> Result<(), Error> {
        let RecordedWork { inner, record, sequence, completion } = *self;
        if completion.is_none() {
            record.waited_for(sequence);
        }
        let began = Instant::now();
        let outcome = inner.wait();
        record.stood_still(began);
        // On a GPU the host has only been told to go on: who looks at the record later finds the end.
        if outcome.is_err() || completion.is_none_or(|completion| completion.is_complete()) {
            record.end(sequence, outcome.is_ok());
        }
        outcome
    }

    fn completion(&self) -> Option<Arc<dyn Completion>> {
        self.completion.clone()
    }
}

impl<C: Communicator> Communicator for Recorded<C> {
    fn rank(&self) -> Rank {
        self.inner.rank()
    }

    fn all_gather(&self, buffer: &Tensor, tag: Tag) -> Result<Box<dyn Work>, Error> {
        self.start(Operation::AllGather, tag, buffer, || self.inner.all_gather(buffer, tag))
    }

    fn reduce_scatter(&self, input: &Tensor, output: &Tensor, tag: Tag) -> Result<Box<dyn Work>, Error> {
        self.start(Operation::ReduceScatter, tag, input, || self.inner.reduce_scatter(input, output, tag))
    }

    fn all_reduce(&self, tensor: &Tensor, tag: Tag) -> Result<Box<dyn Work>, Error> {
        self.start(Operation::AllReduce, tag, tensor, || self.inner.all_reduce(tensor, tag))
    }

    fn barrier(&self) -> Result<(), Error> {
        let sequence = self.record.start(Operation::Barrier, Tag { unit: None, what: "barrier" }, 0);
        let began = Instant::now();
        let outcome = self.inner.barrier();
        self.record.stood_still(began);
        self.record.end(sequence, outcome.is_ok());
        outcome
    }

    fn abort(&self, reason: &str) {
        self.inner.abort(reason);
    }

    fn waited(&self) -> Duration {
        Duration::from_nanos(self.record.waited_nanos.load(Ordering::Relaxed))
    }
}

#[cfg(test)]
#[path = "recorder_tests.rs"]
pub(super) mod tests;
