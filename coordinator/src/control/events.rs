//! The events of one job: the newest in memory, older ones where they are kept, and followed by any number
//! of watchers at their own pace.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use tokio::sync::watch;
use tunefleet_proto::ids::JobId;
use tunefleet_proto::rpc::JobEvent;

use super::store::{History, StoreError};

/// Events of one job that are held in memory.
const HELD: usize = 256;
/// Events that are read at once from where they are kept.
const PAGE: usize = 512;

/// A job's events, oldest first.
pub struct EventLog {
    job: JobId,
    history: Arc<dyn History>,
    newest: Mutex<VecDeque<JobEvent>>,
    /// Number of the newest event, and whether there will be more.
    grown: watch::Sender<(u64, bool)>,
}

impl EventLog {
    /// The events of `job` up to number `sequence` are in `history`.
    pub fn new(job: JobId, history: Arc<dyn History>, sequence: u64, open: bool) -> Self {
        EventLog { job, history, newest: Mutex::default(), grown: watch::Sender::new((sequence, open)) }
    }

    /// Adds an event, which is kept already.
    pub fn push(&self, event: JobEvent) {
        let sequence = event.sequence;
        let mut newest = self.held();
        newest.push_back(event);
        if newest.len() > HELD {
            newest.pop_front();
        }
        drop(newest);
        self.grown.send_modify(|(newest, _)| *newest = sequence);
    }

    /// Number of the newest event.
    pub fn newest(&self) -> u64 {
        self.grown.borrow().0
    }

    /// There will be more, or no more.
    pub fn set_open(&self, open: bool) {
        self.grown.send_modify(|grown| grown.1 = open);
    }

    /// Some events after `sequence`, in order; none when there are none yet.
    fn after(&self, sequence: u64) -> Result<Vec<JobEvent>, StoreError> {
        let newest = self.held();
        if let Some(first) = newest.front().map(|event| event.sequence)
            && first <= sequence + 1
        {
            return Ok(newest.iter().skip((sequence + 1 - first) as usize).cloned().collect());
        }
        drop(newest);
        self.history.events(&self.job, sequence, PAGE)
    }

    /// Waits for events after `sequence`, or with `only_past` only looks; empty when there will be no more.
    ///
    /// # Errors
    /// When they cannot be read.
    pub async fn next_after(
        self: &Arc<Self>,
        sequence: u64,
        only_past: bool,
    ) -> Result<Vec<JobEvent>, StoreError> {
        let mut grown = self.grown.subscribe();
        loop {
            let (newest, open) = *grown.borrow_and_update();
            if newest > sequence {
                let log = Arc::clone(self);
                let read = tokio::task::spawn_blocking(move || log.after(sequence)).await;
                let events = read.map_err(|error| StoreError::Reader(error.to_string()))??;
                if !events.is_empty() {
                    return Ok(events);
                }
            }
            if !open || only_past || grown.changed().await.is_err() {
                return Ok(Vec::new());
            }
        }
    }

    fn held(&self) -> MutexGuard<'_, VecDeque<JobEvent>> {
        self.newest.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Milliseconds since 1970.
pub(super) fn unix_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_millis() as u64
}
