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
}

impl Meter {
    pub(super) fn start(step: u64, sequences: u64) -> Self {
        Meter { since: Instant::now(), paused: Duration::ZERO, last: (step, sequences) }
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
        step: u64,
        sequences: u64,
        learning_rate: f64,
        values: StepValues,
    ) -> StepReport {
        let (last_step, last_sequences) = self.last;
        let seconds = (self.since.elapsed().saturating_sub(self.paused)).as_secs_f64().max(1e-9);
        let sequence_tokens = u64::from(spec.data.sequence_tokens);
        let tokens_per_second = ((sequences - last_sequences) * sequence_tokens) as f64 / seconds;
        let step_seconds = seconds / (step - last_step).max(1) as f64;
        self.since = Instant::now();
        self.paused = Duration::ZERO;
        self.last = (step, sequences);
        StepReport {
            step,
            loss: values.loss,
            grad_norm: values.grad_norm,
            learning_rate,
            tokens: sequences * sequence_tokens,
            tokens_per_second,
            step_seconds,
            peak_memory_bytes: 0,
        }
    }
}
