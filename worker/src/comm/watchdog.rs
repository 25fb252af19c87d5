//! Looks for a collective that takes longer than it may. It tells, and ends nothing itself: which
//! rank is to blame is known only where all ranks' records meet.
//!
//! What counts is the time since a rank started the collective: on a GPU, since the host enqueued it. Where
//! the end cannot be seen without waiting, it is the time of the wait.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread;
use std::time::Duration;

use super::recorder::{Collective, Record};

/// Looks per time limit, within bounds: often enough to be on time, seldom enough to cost nothing.
const LOOKS: u32 = 20;
const SHORTEST_LOOK: Duration = Duration::from_millis(50);
const LONGEST_LOOK: Duration = Duration::from_secs(1);

/// A thread that watches over a record until this is dropped.
pub struct Watchdog {
    _running: Sender<()>,
}

/// What a watchdog does about a collective that takes too long.
pub trait Alarm: Send {
    /// It is told, once.
    fn stalled(&mut self, collective: &Collective);

    /// Nothing came of it for `grace`: nobody who hears of it is left.
    fn unanswered(&mut self, collective: &Collective);
}

impl Watchdog {
    /// Watches over `record`: a collective may take `limit`; after an alarm, `grace` passes before it
    /// counts as unanswered.
    ///
    /// # Errors
    /// When no thread can be started.
    pub fn start(
        record: Arc<Record>,
        limit: Duration,
        grace: Duration,
        alarm: impl Alarm + 'static,
    ) -> std::io::Result<Self> {
        let (running, dropped) = channel();
        let body = move || watch(&record, limit, grace, alarm, &dropped);
        thread::Builder::new().name("watchdog".to_owned()).spawn(body)?;
        Ok(Watchdog { _running: running })
    }
}

fn watch(record: &Record, limit: Duration, grace: Duration, mut alarm: impl Alarm, dropped: &Receiver<()>) {
    let pause = (limit / LOOKS).clamp(SHORTEST_LOOK, LONGEST_LOOK);
    let passed = |time| matches!(dropped.recv_timeout(time), Err(RecvTimeoutError::Timeout));
    while passed(pause) {
        let late = record.oldest_unfinished().filter(|oldest| oldest.since.elapsed() > limit);
        let Some(collective) = late else { continue };
        alarm.stalled(&collective);
        if passed(grace) {
            alarm.unanswered(&collective);
        }
        return;
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;
    use std::time::Instant;

    use super::*;
    use crate::comm::recorder::Recorded;
    use crate::comm::recorder::tests::{Device, tensor};
    use crate::comm::{Communicator, Tag};

    const TAG: Tag = Tag { unit: None, what: "test" };
    const LIMIT: Duration = Duration::from_millis(200);

    struct Told(mpsc::Sender<(&'static str, u64)>);

    impl Alarm for Told {
        fn stalled(&mut self, collective: &Collective) {
            self.0.send(("stalled", collective.sequence)).unwrap();
        }
        fn unanswered(&mut self, collective: &Collective) {
            self.0.send(("unanswered", collective.sequence)).unwrap();
        }
    }

    fn watched() -> (Recorded<Device>, Watchdog, mpsc::Receiver<(&'static str, u64)>) {
        let record = Arc::new(Record::new(Vec::new()));
        let (tell, told) = mpsc::channel();
        let watchdog = Watchdog::start(record.clone(), LIMIT, LIMIT, Told(tell)).unwrap();
        (Recorded::new(Device::default(), record), watchdog, told)
    }

    #[test]
    fn an_operation_that_does_not_end_is_told_and_then_that_nobody_answers() {
        let (comm, _watchdog, told) = watched();
        comm.barrier().unwrap();
        let began = Instant::now();
        comm.all_gather(&tensor(), TAG).unwrap().wait().unwrap();
        assert_eq!(told.recv().unwrap(), ("stalled", 2));
        assert!(began.elapsed() >= LIMIT, "{:?}", began.elapsed());
        assert_eq!(told.recv().unwrap(), ("unanswered", 2));
        assert!(told.recv().is_err(), "told once");
    }

    #[test]
    fn a_watchdog_that_is_dropped_tells_nothing() {
        let (comm, watchdog, told) = watched();
        comm.all_gather(&tensor(), TAG).unwrap().wait().unwrap();
        drop(watchdog);
        // The other end goes with the thread.
        assert!(told.recv().is_err());
    }
}
