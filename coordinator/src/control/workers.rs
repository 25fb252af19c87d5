//! What the fleet knows of a worker: what it told of itself, its session, when it was last heard of.

use std::time::Duration;

use tunefleet_proto::rpc::{Register, WorkerState};

use super::placement::{Room, WorkerName};
use super::settings::{Now, Settings};
use super::store::WorkerRow;

/// Number of a session: what an older one still says is ignored. The upper half is the generation of the
/// coordinator, so that no number comes twice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Epoch(pub u64);

/// One worker.
#[derive(Debug, Clone)]
pub struct Worker {
    /// What it told of itself.
    pub register: Register,
    /// What it said up to this number of its journal has been dealt with.
    pub acknowledged: u64,
    /// As `acknowledged`, when it was last told.
    pub told: u64,
    /// Whether something numbered was heard over the present session.
    pub has_spoken: bool,
    /// A person wants nothing placed here.
    pub draining: bool,
    /// The daemon has said that it is about to end.
    pub leaving: bool,
    /// Absent while it is not connected.
    pub session: Option<Epoch>,
    last_heard: Duration,
    seen_unix_ms: u64,
    /// The state that its jobs were last told of.
    pub shown: WorkerState,
    /// Whether its ranks count as gone.
    pub given_up: bool,
}

impl Worker {
    /// One that has just registered. `known` is what was known of it before.
    pub fn joined(register: Register, known: Option<&Worker>, session: Epoch, now: Now) -> Self {
        let same = known.filter(|known| known.has_journal_of(&register));
        Worker {
            acknowledged: same.map_or(0, |known| known.acknowledged),
            told: same.map_or(0, |known| known.acknowledged),
            has_spoken: false,
            draining: known.is_some_and(|known| known.draining),
            leaving: false,
            session: Some(session),
            last_heard: now.uptime,
            seen_unix_ms: now.unix_ms,
            shown: known.map_or(WorkerState::Ready, |known| known.shown),
            given_up: false,
            register,
        }
    }

    /// One that was kept; it has time to come back.
    pub fn restore(row: &WorkerRow, register: Register, now: Now) -> Self {
        Worker {
            register,
            acknowledged: row.acknowledged,
            told: row.acknowledged,
            has_spoken: false,
            draining: row.draining,
            leaving: false,
            session: None,
            last_heard: now.uptime,
            seen_unix_ms: row.seen_unix_ms,
            shown: WorkerState::Ready,
            given_up: false,
        }
    }

    /// What is kept of it.
    pub fn row(&self, name: &WorkerName) -> WorkerRow {
        WorkerRow {
            name: name.clone(),
            journal: self.register.journal.clone(),
            acknowledged: self.acknowledged,
            draining: self.draining,
            register: prost::Message::encode_to_vec(&self.register),
            seen_unix_ms: self.seen_unix_ms,
        }
    }

    /// Whether `register` comes from a daemon that knows this one's ranks: it has its journal or, where
    /// it keeps none, is the same process.
    pub fn has_journal_of(&self, register: &Register) -> bool {
        let known = &self.register;
        match (known.journal.is_empty(), register.journal.is_empty()) {
            (false, false) => known.journal == register.journal,
            (true, true) => known.incarnation == register.incarnation,
            _ => false,
        }
    }

    /// Notes that it said something.
    pub fn heard(&mut self, now: Now) {
        self.last_heard = now.uptime;
        self.seen_unix_ms = now.unix_ms;
    }

    /// How long it has been silent.
    pub fn silence(&self, now: Now) -> Duration {
        now.uptime.saturating_sub(self.last_heard)
    }

    /// How it is.
    pub fn state(&self, settings: &Settings, now: Now) -> WorkerState {
        match self.silence(now) {
            silence if silence >= settings.lost_after => WorkerState::Lost,
            silence if silence >= settings.suspect_after => WorkerState::Suspect,
            _ if self.draining || self.leaving => WorkerState::Draining,
            _ => WorkerState::Ready,
        }
    }

    /// What new ranks find here, of which `used` slots are taken; `None` where nothing may be placed.
    pub fn room(&self, used: u32, settings: &Settings, now: Now) -> Option<Room> {
        if self.session.is_none() || self.state(settings, now) != WorkerState::Ready {
            return None;
        }
        let total = self.register.slots;
        Some(Room { free: total.saturating_sub(used), total, has_gpu: self.register.gpus > 0 })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn register(journal: &str, incarnation: &str) -> Register {
        Register {
            name: "w".to_owned(),
            slots: 2,
            journal: journal.to_owned(),
            incarnation: incarnation.to_owned(),
            ..Register::default()
        }
    }

    fn at(seconds: u64) -> Now {
        Now { unix_ms: 1000 * seconds, uptime: Duration::from_secs(seconds) }
    }

    #[test]
    fn silence_makes_a_worker_suspect_and_then_lost_and_nothing_is_placed_there() {
        let settings = Settings::default();
        let mut worker = Worker::joined(register("j", "1"), None, Epoch(1), at(0));
        for (seconds, state) in [
            (4, WorkerState::Ready),
            (5, WorkerState::Suspect),
            (14, WorkerState::Suspect),
            (15, WorkerState::Lost),
        ] {
            assert_eq!(worker.state(&settings, at(seconds)), state, "after {seconds} s");
            assert_eq!(worker.room(0, &settings, at(seconds)).is_some(), state == WorkerState::Ready);
        }
        worker.heard(at(15));
        assert_eq!(worker.room(1, &settings, at(16)).map(|room| room.free), Some(1));
        worker.draining = true;
        assert_eq!(worker.room(0, &settings, at(16)), None);
    }

    #[test]
    fn what_a_journal_has_told_counts_only_for_that_journal() {
        let mut known = Worker::joined(register("j", "1"), None, Epoch(1), at(0));
        known.acknowledged = 7;
        let again = |journal: &str, incarnation: &str| {
            Worker::joined(register(journal, incarnation), Some(&known), Epoch(2), at(1)).acknowledged
        };
        assert_eq!(again("j", "2"), 7, "a daemon that was restarted");
        assert_eq!(again("k", "2"), 0, "another journal");
        assert_eq!(again("", "1"), 0, "no journal any more");
        let old = Worker::joined(register("", "1"), None, Epoch(1), at(0));
        assert!(old.has_journal_of(&register("", "1")));
        assert!(!old.has_journal_of(&register("", "2")), "its ranks went with it");
    }
}
