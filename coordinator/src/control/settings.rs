//! How long the control plane waits for what.

use std::time::Duration;

/// How patient the control plane is with its workers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Settings {
    /// How often a worker tells that it is alive.
    pub heartbeat: Duration,
    /// A worker that is silent for so long is suspect.
    pub suspect_after: Duration,
    /// A worker that is silent for so long is lost: nothing is placed there.
    pub lost_after: Duration,
    /// Ranks of a worker that is silent for so long count as gone, though nobody saw them end.
    pub give_up_after: Duration,
    /// Jobs that have ended, and the audit, are forgotten after so long.
    pub keep_ended: Duration,
    /// Jobs that have ended, and workers that are gone, leave the metrics after so long.
    pub show_ended: Duration,
}

impl Default for Settings {
    fn default() -> Self {
        Settings {
            heartbeat: Duration::from_secs(1),
            suspect_after: Duration::from_secs(5),
            lost_after: Duration::from_secs(15),
            give_up_after: Duration::from_secs(300),
            keep_ended: Duration::from_secs(90 * 24 * 3600),
            show_ended: Duration::from_secs(3600),
        }
    }
}

/// The moment at which something happens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Now {
    /// For what is kept and shown.
    pub unix_ms: u64,
    /// Never goes backwards; counts from anywhere.
    pub uptime: Duration,
}

impl Now {
    /// This very moment, of a process that started at `start`.
    pub fn since(start: tokio::time::Instant) -> Self {
        Now { unix_ms: super::events::unix_ms(), uptime: start.elapsed() }
    }

    /// `delay` later, for what is kept.
    pub fn unix_after(&self, delay: Duration) -> u64 {
        self.unix_ms.saturating_add(delay.as_millis() as u64)
    }
}
