//! What happens when an attempt fails, and how urgent the job is.

use super::Resolver;
use crate::job::file::{JobFile, RestartFile};
use crate::job::spec::RestartSpec;

const DAY: f64 = 86_400.0;
const WEEK: f64 = 7.0 * DAY;
const MAX_DEADLINE: u64 = 100_000_000;

impl Resolver<'_> {
    /// Priority, and the deadline in seconds.
    pub(super) fn urgency(&mut self, file: &JobFile) -> (u8, Option<u64>) {
        let priority = self.within("priority", &file.priority, 0..=100, 50);
        let deadline = file
            .deadline_seconds
            .given()
            .map(|_| self.within("deadline_seconds", &file.deadline_seconds, 1..=MAX_DEADLINE, MAX_DEADLINE));
        (u8::try_from(priority).unwrap_or(100), deadline)
    }

    pub(super) fn restart(&mut self, file: &RestartFile) -> RestartSpec {
        let default = RestartSpec::default();
        let spec = RestartSpec {
            max_restarts: self.within(
                "restart.max_restarts",
                &file.max_restarts,
                0..=1000,
                default.max_restarts,
            ),
            backoff_seconds: self.within(
                "restart.backoff_seconds",
                &file.backoff_seconds,
                0.0..=DAY,
                default.backoff_seconds,
            ),
            max_backoff_seconds: self.within(
                "restart.max_backoff_seconds",
                &file.max_backoff_seconds,
                0.0..=DAY,
                default.max_backoff_seconds,
            ),
            max_attempts_without_progress: self.within(
                "restart.max_attempts_without_progress",
                &file.max_attempts_without_progress,
                1..=1000,
                default.max_attempts_without_progress,
            ),
            max_failures_per_worker: self.within(
                "restart.max_failures_per_worker",
                &file.max_failures_per_worker,
                1..=1000,
                default.max_failures_per_worker,
            ),
            stop_grace_seconds: self.within(
                "restart.stop_grace_seconds",
                &file.stop_grace_seconds,
                0..=DAY as u64,
                default.stop_grace_seconds,
            ),
            hang_after_seconds: self.within(
                "restart.hang_after_seconds",
                &file.hang_after_seconds,
                0.1..=DAY,
                default.hang_after_seconds,
            ),
            first_hang_after_seconds: self.within(
                "restart.first_hang_after_seconds",
                &file.first_hang_after_seconds,
                0.1..=WEEK,
                default.first_hang_after_seconds,
            ),
        };
        if let (Some(at), true) =
            (file.max_backoff_seconds.given(), spec.max_backoff_seconds < spec.backoff_seconds)
        {
            let message = format!(
                "restart.max_backoff_seconds is {}, less than restart.backoff_seconds, which is {}",
                spec.max_backoff_seconds, spec.backoff_seconds
            );
            self.sink.report(&at.place, message);
        }
        spec
    }
}
