//! What a rank has told and its daemon does not have yet. It waits for a daemon that is being restarted, is said
//! again to the next one, and is written down when none comes before the rank ends.

use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tunefleet_proto::rpc::{RankEvent, rank_event};

/// Events that wait at most before those that only inform are left out.
const MANY: usize = 100_000;

/// Events, oldest first.
#[derive(Default)]
pub(super) struct Spool {
    inner: Mutex<Inner>,
    /// Signalled whenever there is more to send.
    pub grown: tokio::sync::Notify,
    /// Signalled whenever the daemon has taken something.
    taken: Condvar,
}

#[derive(Default)]
struct Inner {
    sequence: u64,
    waiting: VecDeque<RankEvent>,
    once: Vec<RankEvent>,
    closed: bool,
}

impl Spool {
    /// Tells something that must not be lost.
    pub fn tell(&self, body: rank_event::Body) {
        let mut inner = self.inner();
        let informs = matches!(body, rank_event::Body::Section(_) | rank_event::Body::Note(_));
        if informs && inner.waiting.len() >= MANY {
            return;
        }
        inner.sequence += 1;
        let sequence = inner.sequence;
        inner.waiting.push_back(RankEvent { body: Some(body), sequence });
        drop(inner);
        self.grown.notify_one();
    }

    /// Tells something to the daemon that listens now, if one does.
    pub fn tell_once(&self, body: rank_event::Body) {
        self.inner().once.push(RankEvent { body: Some(body), sequence: 0 });
        self.grown.notify_one();
    }

    /// There will be nothing more.
    pub fn close(&self) {
        self.inner().closed = true;
        self.grown.notify_one();
    }

    /// What has been told after number `sequence`, and once; and whether there will be more.
    pub fn next(&self, sequence: u64) -> (Vec<RankEvent>, bool) {
        let mut inner = self.inner();
        let first = inner.waiting.partition_point(|event| event.sequence <= sequence);
        let mut events: Vec<RankEvent> = inner.waiting.iter().skip(first).cloned().collect();
        events.append(&mut inner.once);
        (events, !inner.closed)
    }

    /// Nobody listens: what was to be told once is of no use any more.
    pub fn forget_once(&self) {
        self.inner().once.clear();
    }

    /// The daemon has everything up to this number.
    pub fn taken(&self, through: u64) {
        let mut inner = self.inner();
        let gone = inner.waiting.partition_point(|event| event.sequence <= through);
        inner.waiting.drain(..gone);
        drop(inner);
        self.taken.notify_all();
    }

    /// Waits until the daemon has everything; what it has not after `limit`.
    pub fn wait_until_taken(&self, limit: Duration) -> Vec<RankEvent> {
        let inner = self.inner();
        let left = self.taken.wait_timeout_while(inner, limit, |inner| !inner.waiting.is_empty());
        let (inner, _) = left.unwrap_or_else(PoisonError::into_inner);
        inner.waiting.iter().cloned().collect()
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn note(text: &str) -> rank_event::Body {
        rank_event::Body::Note(text.to_owned())
    }

    fn numbers(events: &[RankEvent]) -> Vec<u64> {
        events.iter().map(|event| event.sequence).collect()
    }

    #[test]
    fn what_was_not_taken_is_said_again_and_what_is_said_once_is_not() {
        let spool = Spool::default();
        spool.tell(note("a"));
        spool.tell(note("b"));
        spool.tell_once(note("now"));
        let (events, more) = spool.next(0);
        assert_eq!((numbers(&events), more), (vec![1, 2, 0], true));
        spool.taken(1);
        assert_eq!(numbers(&spool.next(0).0), [2], "to another daemon");
        assert_eq!(numbers(&spool.next(2).0), [0u64; 0], "to the same one");
        spool.close();
        assert!(!spool.next(2).1);
        assert_eq!(numbers(&spool.wait_until_taken(Duration::ZERO)), [2]);
        spool.taken(2);
        assert!(spool.wait_until_taken(Duration::from_secs(60)).is_empty());
    }
}
