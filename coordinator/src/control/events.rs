//! The events of one job: kept, numbered, and followed by any number of watchers at their own pace.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use tokio::sync::watch;
use tunefleet_proto::ids::{Attempt, JobId};
use tunefleet_proto::rpc::JobEvent;
use tunefleet_proto::rpc::job_event::Body;

/// Events kept of one job; older ones are forgotten.
const KEPT: usize = 50_000;

/// A job's events, oldest first.
pub struct EventLog {
    events: Mutex<VecDeque<JobEvent>>,
    /// Number of events so far, and whether there will be more.
    grown: watch::Sender<(u64, bool)>,
}

impl EventLog {
    /// No events yet.
    pub fn new() -> Self {
        EventLog { events: Mutex::default(), grown: watch::Sender::new((0, true)) }
    }

    /// Adds an event; `last` when the attempt has ended.
    pub fn push(&self, job: &JobId, attempt: Attempt, body: Body, last: bool) {
        let mut events = self.events();
        let sequence = self.grown.borrow().0 + 1;
        events.push_back(JobEvent {
            sequence,
            unix_ms: unix_ms(),
            job: job.0.clone(),
            attempt: attempt.0,
            body: Some(body),
        });
        if events.len() > KEPT {
            events.pop_front();
        }
        drop(events);
        self.grown.send_replace((sequence, !last));
    }

    /// A new attempt of the job: there will be more.
    pub fn reopen(&self) {
        self.grown.send_modify(|(_, open)| *open = true);
    }

    /// The first kept event after `sequence`.
    fn after(&self, sequence: u64) -> Option<JobEvent> {
        let events = self.events();
        let first = events.front()?.sequence;
        events.get((sequence + 1).saturating_sub(first) as usize).cloned()
    }

    /// Waits for the first kept event after `sequence`; `None` when there will be no more.
    pub async fn next_after(&self, sequence: u64) -> Option<JobEvent> {
        let mut grown = self.grown.subscribe();
        loop {
            let (_, open) = *grown.borrow_and_update();
            match self.after(sequence) {
                Some(event) => return Some(event),
                None if !open => return None,
                None => grown.changed().await.ok()?,
            }
        }
    }

    fn events(&self) -> MutexGuard<'_, VecDeque<JobEvent>> {
        self.events.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Milliseconds since 1970.
pub(super) fn unix_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_millis() as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_late_watcher_sees_every_kept_event_once_and_then_the_end() {
        let log = EventLog::new();
        let job = JobId("j".to_owned());
        let total = KEPT + 10;
        for n in 1..=total {
            log.push(&job, Attempt(1), Body::Note(n.to_string()), n == total);
        }
        let mut seen = Vec::new();
        let mut sequence = 0;
        while let Some(event) = log.next_after(sequence).await {
            sequence = event.sequence;
            seen.push(event.body);
        }
        assert_eq!(seen.len(), KEPT);
        assert_eq!(seen.first(), Some(&Some(Body::Note("11".to_owned()))));
        assert_eq!(seen.last(), Some(&Some(Body::Note(total.to_string()))));
    }

    #[tokio::test]
    async fn a_watcher_waits_for_what_has_not_happened_yet() {
        let log = std::sync::Arc::new(EventLog::new());
        let watcher = tokio::spawn({
            let log = log.clone();
            async move { log.next_after(0).await }
        });
        log.push(&JobId("j".to_owned()), Attempt(1), Body::Note("now".to_owned()), false);
        assert_eq!(watcher.await.unwrap().unwrap().sequence, 1);
    }
}
