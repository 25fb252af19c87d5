//! Throughput between two reports, without the time spent on evaluation and saving.

use std::time::{Duration, Instant};

use tunefleet_proto::job::JobSpec;

use super::StepReport;
use super::optimizer::StepValues;

pub(super) struct Meter {
    since: Instant,
    paused: Duration,
    /// Step and sequences at the last report, or at the start.
    last: (u64, u64),
    /// For collectives, until then.
    waited: Duration,
}

/// What a rank has waited for.
pub(super) struct Waited {
    /// Since the last report.
    pub for_data: Duration,
    /// Since the rank began.
    pub for_collectives: Duration,
}

impl Meter {
    pub(super) fn start(at: (u64, u64), waited: Duration) -> Self {
        Meter { since: Instant::now(), paused: Duration::ZERO, last: at, waited }
    }

    /// Runs something that is not training.
    pub(super) fn pause<T>(&mut self, work: impl FnOnce() -> T) -> T {
        let started = Instant::now();
        let out = work();
        self.paused += started.elapsed();
        out
    }

    pub(super) fn report(
        &mut self,
        spec: &JobSpec,
        (step, sequences): (u64, u64),
        learning_rate: f64,
        values: StepValues,
        waited: Waited,
    ) -> StepReport {
        let (last_step, last_sequences) = self.last;
        let seconds = (self.since.elapsed().saturating_sub(self.paused)).as_secs_f64().max(1e-9);
        let sequence_tokens = u64::from(spec.data.sequence_tokens);
        let tokens_per_second = ((sequences - last_sequences) * sequence_tokens) as f64 / seconds;
        let steps = (step - last_step).max(1) as f64;
        let for_collectives = waited.for_collectives.saturating_sub(self.waited);
        self.since = Instant::now();
        self.paused = Duration::ZERO;
        self.last = (step, sequences);
        self.waited = waited.for_collectives;
        StepReport {
            step,
            loss: values.loss,
            grad_norm: values.grad_norm,
            learning_rate,
            tokens: sequences * sequence_tokens,
            tokens_per_second,
            step_seconds: seconds / steps,
            peak_memory_bytes: 0,
            data_wait_seconds: waited.for_data.as_secs_f64() / steps,
            collective_wait_seconds: for_collectives.as_secs_f64() / steps,
        }
    }
}
