//! How far a push is: a line on stderr every few seconds.

use std::io::Write;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Between two lines.
const INTERVAL: Duration = Duration::from_secs(5);

/// Bytes that are through, of those that have to be.
#[derive(Debug)]
pub(super) struct Progress {
    what: &'static str,
    total_bytes: u64,
    done_bytes: AtomicU64,
    begun: Instant,
    shown: Mutex<Instant>,
}

impl Progress {
    pub(super) fn new(what: &'static str, total_bytes: u64) -> Self {
        let now = Instant::now();
        Progress { what, total_bytes, done_bytes: AtomicU64::new(0), begun: now, shown: Mutex::new(now) }
    }

    /// More bytes are through.
    pub(super) fn add(&self, bytes: u64) {
        let done_bytes = self.done_bytes.fetch_add(bytes, Ordering::Relaxed) + bytes;
        let mut shown = self.shown.lock().unwrap_or_else(PoisonError::into_inner);
        if shown.elapsed() >= INTERVAL {
            *shown = Instant::now();
            let line = line(self.what, done_bytes, self.total_bytes, self.begun.elapsed());
            // Nobody may be reading.
            let _ = writeln!(std::io::stderr(), "{line}");
        }
    }

    /// Bytes that have to go again.
    pub(super) fn take_back(&self, bytes: u64) {
        self.done_bytes.fetch_sub(bytes, Ordering::Relaxed);
    }
}

fn line(what: &str, done_bytes: u64, total_bytes: u64, elapsed: Duration) -> String {
    let gigabytes = |bytes: u64| bytes as f64 / 1e9;
    format!(
        "{what}: {:.2} of {:.2} GB, {:.1} MB/s",
        gigabytes(done_bytes),
        gigabytes(total_bytes),
        done_bytes as f64 / 1e6 / elapsed.as_secs_f64().max(1e-3),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_says_how_much_of_how_much_and_how_fast() {
        let line = line("sending", 1_250_000_000, 31_030_000_000, Duration::from_secs(10));
        assert_eq!(line, "sending: 1.25 of 31.03 GB, 125.0 MB/s");
    }
}
