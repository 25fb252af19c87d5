//! Work with a server that may hang, and that is tried again where that can help.
//!
//! libgit2 waits for a silent server for ever and cannot be told not to. So each try has a thread of its own, which is
//! left to itself when it shows no sign of life for too long; should the server speak after all, it ends there.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{RecvTimeoutError, sync_channel};
use std::thread;
use std::time::{Duration, Instant};

use super::Error;

/// Tries, and the wait before the second; it doubles before each further one.
const TRIES: u32 = 4;
const FIRST_WAIT: Duration = Duration::from_secs(1);
/// How often a try is looked after.
const LOOK_EVERY: Duration = Duration::from_millis(200);

/// A sign of life.
#[derive(Debug, Clone, Default)]
pub struct Pulse {
    beats: Arc<AtomicU64>,
    is_given_up: Arc<AtomicBool>,
}

impl Pulse {
    /// Something arrived; whether it is still wanted.
    pub fn beat(&self) -> bool {
        self.beats.fetch_add(1, Ordering::Relaxed);
        !self.is_given_up.load(Ordering::Relaxed)
    }
}

/// Does `work` until it succeeds, fails for good, or has been tried often enough. `told` hears of each try that failed.
///
/// # Errors
/// Of the last try; [`Error::Stalled`] where it was silent for `patience`.
pub fn patiently<T: Send + 'static>(
    location: &str,
    patience: Duration,
    told: impl Fn(&Error, Duration),
    work: impl Fn(&Pulse) -> Result<T, Error> + Send + Sync + 'static,
) -> Result<T, Error> {
    let work = Arc::new(work);
    let mut wait = FIRST_WAIT;
    for number in 1.. {
        match one_try(location, patience, Arc::clone(&work)) {
            Err(error) if number < TRIES && error.is_passing() => {
                told(&error, wait);
                thread::sleep(wait);
                wait *= 2;
            }
            outcome => return outcome,
        }
    }
    Err(stalled(location, patience))
}

fn one_try<T: Send + 'static>(
    location: &str,
    patience: Duration,
    work: Arc<impl Fn(&Pulse) -> Result<T, Error> + Send + Sync + 'static>,
) -> Result<T, Error> {
    let pulse = Pulse::default();
    let (sender, receiver) = sync_channel(1);
    let own = pulse.clone();
    thread::spawn(move || {
        // Nobody may be waiting any more.
        let _ = sender.send(work(&own));
    });
    let (mut beats, mut since) = (0, Instant::now());
    loop {
        match receiver.recv_timeout(LOOK_EVERY.min(patience)) {
            Ok(outcome) => return outcome,
            Err(RecvTimeoutError::Disconnected) => {
                return Err(Error::Unreachable {
                    location: location.to_owned(),
                    detail: "the thread that fetched it panicked".to_owned(),
                });
            }
            Err(RecvTimeoutError::Timeout) => {}
        }
        let now = pulse.beats.load(Ordering::Relaxed);
        if now != beats {
            (beats, since) = (now, Instant::now());
        } else if since.elapsed() >= patience {
            pulse.is_given_up.store(true, Ordering::Relaxed);
            return Err(stalled(location, patience));
        }
    }
}

fn stalled(location: &str, patience: Duration) -> Error {
    Error::Stalled { location: location.to_owned(), seconds: patience.as_secs() }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicU32;

    use super::*;

    const SHORT: Duration = Duration::from_millis(500);

    fn unreachable() -> Error {
        Error::Unreachable { location: "x".to_owned(), detail: "reset".to_owned() }
    }

    #[test]
    fn what_passes_is_tried_again_and_what_does_not_is_not() {
        let tries = Arc::new(AtomicU32::new(0));
        let count = Arc::clone(&tries);
        let outcome = patiently(
            "x",
            SHORT,
            |_, _| {},
            move |_| match count.fetch_add(1, Ordering::Relaxed) {
                0 => Err(unreachable()),
                number => Ok(number),
            },
        );
        assert_eq!(outcome.unwrap(), 1);
        let missing = || Error::NotFound { location: "x".to_owned(), detail: "gone".to_owned() };
        let told = AtomicU32::new(0);
        let told_of = |_: &Error, _| {
            told.fetch_add(1, Ordering::Relaxed);
        };
        let outcome: Result<(), Error> = patiently("x", SHORT, told_of, move |_| Err(missing()));
        assert!(matches!(outcome, Err(Error::NotFound { .. })));
        assert_eq!(told.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn a_silent_try_is_left_to_itself_and_a_slow_one_with_signs_of_life_is_not() {
        let outcome = one_try(
            "x",
            SHORT,
            Arc::new(|pulse: &Pulse| {
                thread::sleep(10 * SHORT);
                pulse.beat();
                Ok(())
            }),
        );
        assert!(matches!(outcome, Err(Error::Stalled { .. })));
        let outcome = one_try(
            "x",
            SHORT,
            Arc::new(|pulse: &Pulse| {
                for _ in 0..10 {
                    thread::sleep(SHORT / 4);
                    assert!(pulse.beat());
                }
                Ok(7)
            }),
        );
        assert_eq!(outcome.unwrap(), 7);
    }
}
