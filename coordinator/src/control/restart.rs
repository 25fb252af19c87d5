//! Whether another attempt is worth it, and when. Pure: a failure and what was before it come in, a decision
//! with its reason comes out.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tunefleet_proto::job::RestartSpec;
use tunefleet_proto::rpc::FailureKind;

use super::placement::WorkerName;

/// Pause after a preemption: the machine is being taken away, and that may take a moment to be known.
const AFTER_PREEMPTION: Duration = Duration::from_secs(1);
/// So many preemptions in a row without a new checkpoint end a job: it never gets far enough to save.
const MAX_PREEMPTIONS_WITHOUT_PROGRESS: u32 = 20;

/// What has been tried so far.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Restarts {
    /// Restarts after failures that count.
    counted: u32,
    /// Counted failures in a row without a new checkpoint.
    without_progress: u32,
    preemptions_without_progress: u32,
    /// Failures of ranks on a worker.
    strikes: BTreeMap<WorkerName, u32>,
    /// Workers with too many of them.
    excluded: BTreeSet<WorkerName>,
}

/// An attempt that has failed.
#[derive(Debug, Clone, Copy)]
pub struct Failed<'a> {
    /// What went wrong.
    pub kind: FailureKind,
    /// Where the rank ran that is to blame.
    pub worker: Option<&'a WorkerName>,
    /// Whether the attempt left a newer checkpoint than it began with.
    pub progressed: bool,
}

/// What follows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Decision {
    /// Whether another attempt begins.
    pub restarts: bool,
    /// After so long.
    pub delay: Duration,
    /// Whether it was a failure of the job.
    pub counted: bool,
    /// Restarts of counted failures that are left.
    pub left: u32,
    /// For people.
    pub words: String,
}

/// Why a failure of this kind would only be repeated.
fn hopeless(kind: FailureKind) -> Option<&'static str> {
    match kind {
        FailureKind::Configuration => Some("not started again: the job cannot run as it is written"),
        FailureKind::OutOfMemory => Some("not started again: it would need as much memory again"),
        FailureKind::HostOutOfMemory => Some("not started again: the machine would run out of memory again"),
        FailureKind::DiskFull => Some("not started again: the disk is full; make room, then resume it"),
        FailureKind::NotFinite => Some("not started again: the same steps would give the same numbers"),
        FailureKind::Deadline => Some("not started again: its time is over"),
        FailureKind::Unspecified
        | FailureKind::Signal
        | FailureKind::Exit
        | FailureKind::Hang
        | FailureKind::WorkerLost
        | FailureKind::Start
        | FailureKind::Preempted => None,
    }
}

/// Whether no attempt follows a failure of this kind, whatever is left.
pub fn is_final(kind: FailureKind) -> bool {
    hopeless(kind).is_some()
}

/// Whether it may be the worker's fault.
fn is_strike(kind: FailureKind) -> bool {
    use FailureKind::{Exit, Hang, Signal, Start, Unspecified, WorkerLost};
    matches!(kind, Unspecified | Signal | Exit | Hang | WorkerLost | Start)
}

impl Restarts {
    /// What failed so far counts no more: it went well for long enough since.
    pub fn forget(&mut self) {
        (self.counted, self.without_progress, self.preemptions_without_progress) = (0, 0, 0);
    }

    /// Takes note of a failure, and says what follows.
    pub fn decide(&mut self, spec: &RestartSpec, failed: &Failed<'_>) -> Decision {
        if let Some(words) = hopeless(failed.kind) {
            return self.end(spec, failed.kind != FailureKind::Deadline, words.to_owned());
        }
        if failed.kind == FailureKind::Preempted {
            return self.preempted(spec, failed.progressed);
        }
        let left_out =
            failed.worker.filter(|_| is_strike(failed.kind)).and_then(|worker| self.strike(spec, worker));
        self.without_progress = if failed.progressed { 0 } else { self.without_progress.saturating_add(1) };
        self.preemptions_without_progress = 0;
        if self.counted >= spec.max_restarts {
            let words = match spec.max_restarts {
                0 => "not started again: restart.max_restarts is 0".to_owned(),
                max => format!("not started again: {max} restarts are used up (restart.max_restarts)"),
            };
            return self.end(spec, true, words);
        }
        if self.without_progress >= spec.max_attempts_without_progress {
            let words = format!(
                "not started again: {} attempts in a row left no new checkpoint; save more often \
                 (train.checkpoint_every_steps), or look at what fails",
                self.without_progress
            );
            return self.end(spec, true, words);
        }
        self.counted += 1;
        let delay = self.delay(spec);
        let mut words = format!(
            "restart {} of {} in {:.0} s",
            self.counted,
            spec.max_restarts,
            delay.as_secs_f64().ceil()
        );
        if let Some(left_out) = left_out {
            words += &format!("; {left_out}");
        }
        let left = spec.max_restarts - self.counted;
        Decision { restarts: true, delay, counted: true, left, words }
    }

    fn preempted(&mut self, spec: &RestartSpec, progressed: bool) -> Decision {
        self.preemptions_without_progress =
            if progressed { 0 } else { self.preemptions_without_progress.saturating_add(1) };
        if self.preemptions_without_progress >= MAX_PREEMPTIONS_WITHOUT_PROGRESS {
            let words = format!(
                "not started again: it was preempted {MAX_PREEMPTIONS_WITHOUT_PROGRESS} times in a row before it could \
                 save a new checkpoint"
            );
            return self.end(spec, false, words);
        }
        let words = "goes on as soon as there are slots; a preemption does not count".to_owned();
        let left = spec.max_restarts.saturating_sub(self.counted);
        Decision { restarts: true, delay: AFTER_PREEMPTION, counted: false, left, words }
    }

    fn end(&self, spec: &RestartSpec, counted: bool, words: String) -> Decision {
        let left = spec.max_restarts.saturating_sub(self.counted);
        Decision { restarts: false, delay: Duration::ZERO, counted, left, words }
    }

    /// Doubles with each failure in a row that left no new checkpoint.
    fn delay(&self, spec: &RestartSpec) -> Duration {
        let doubled =
            spec.backoff_seconds * f64::from(self.without_progress.saturating_sub(1).min(60)).exp2();
        let seconds = doubled.min(spec.max_backoff_seconds);
        Duration::try_from_secs_f64(seconds).unwrap_or_default()
    }

    /// Counts a failure against a worker; in words, when that leaves it out.
    fn strike(&mut self, spec: &RestartSpec, worker: &WorkerName) -> Option<String> {
        let strikes = self.strikes.entry(worker.clone()).or_insert(0);
        *strikes += 1;
        let is_out = *strikes >= spec.max_failures_per_worker && self.excluded.insert(worker.clone());
        is_out.then(|| {
            format!(
                "worker {worker} is left out as long as others have room: {strikes} attempts failed there (coordinator \
                 undrain {worker} lets it in again)"
            )
        })
    }

    /// Workers to be left out where others have room.
    pub fn excluded(&self) -> BTreeSet<WorkerName> {
        self.excluded.clone()
    }

    /// Whether the worker is left out.
    pub fn excludes(&self, worker: &WorkerName) -> bool {
        self.excluded.contains(worker)
    }

    /// Forgets what speaks against a worker.
    pub fn forgive(&mut self, worker: &WorkerName) {
        self.strikes.remove(worker);
        self.excluded.remove(worker);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const KINDS: [FailureKind; 13] = [
        FailureKind::Unspecified,
        FailureKind::Configuration,
        FailureKind::OutOfMemory,
        FailureKind::HostOutOfMemory,
        FailureKind::DiskFull,
        FailureKind::NotFinite,
        FailureKind::Signal,
        FailureKind::Exit,
        FailureKind::Hang,
        FailureKind::WorkerLost,
        FailureKind::Start,
        FailureKind::Preempted,
        FailureKind::Deadline,
    ];

    fn failed(kind: FailureKind, progressed: bool) -> Failed<'static> {
        Failed { kind, worker: None, progressed }
    }

    #[test]
    fn pauses_double_without_progress_and_begin_anew_with_it() {
        let (mut restarts, spec) =
            (Restarts::default(), RestartSpec { max_attempts_without_progress: 9, ..Default::default() });
        let mut pause =
            |progressed| restarts.decide(&spec, &failed(FailureKind::Signal, progressed)).delay.as_secs_f64();
        assert_eq!(
            [pause(false), pause(false), pause(false), pause(true), pause(false)],
            [5.0, 10.0, 20.0, 5.0, 5.0]
        );
    }

    #[test]
    fn three_attempts_without_a_new_checkpoint_end_the_job() {
        let (mut restarts, spec) = (Restarts::default(), RestartSpec::default());
        let mut decide = || restarts.decide(&spec, &failed(FailureKind::Exit, false));
        assert!(decide().restarts && decide().restarts);
        let last = decide();
        assert!(
            !last.restarts && last.words.contains("3 attempts in a row left no new checkpoint"),
            "{last:?}"
        );
    }

    #[test]
    fn preemptions_are_not_counted() {
        let (mut restarts, spec) = (Restarts::default(), RestartSpec::default());
        for _ in 0..MAX_PREEMPTIONS_WITHOUT_PROGRESS - 1 {
            let decision = restarts.decide(&spec, &failed(FailureKind::Preempted, false));
            assert!(decision.restarts && !decision.counted && decision.left == spec.max_restarts);
        }
        assert!(!restarts.decide(&spec, &failed(FailureKind::Preempted, false)).restarts);
    }

    #[test]
    fn two_strikes_leave_a_worker_out_until_it_is_forgiven() {
        let (mut restarts, spec) = (Restarts::default(), RestartSpec::default());
        let worker = WorkerName::from("w3");
        let strike = Failed { kind: FailureKind::Hang, worker: Some(&worker), progressed: true };
        assert!(!restarts.decide(&spec, &strike).words.contains("w3"));
        assert!(restarts.decide(&spec, &strike).words.contains("worker w3 is left out"));
        assert!(restarts.excludes(&worker));
        restarts.forgive(&worker);
        assert!(!restarts.excludes(&worker));
        let preempted = Failed { kind: FailureKind::Preempted, ..strike };
        for _ in 0..5 {
            restarts.decide(&spec, &preempted);
        }
        assert!(!restarts.excludes(&worker), "a preemption does not speak against a worker");
    }

    proptest! {
        #[test]
        fn restarts_are_bounded_and_what_is_hopeless_is_not_tried(
            max_restarts in 0u32..8,
            failures in prop::collection::vec((0..KINDS.len(), any::<bool>()), 1..60),
        ) {
            let spec = RestartSpec { max_restarts, ..RestartSpec::default() };
            let mut restarts = Restarts::default();
            let mut counted = 0;
            for (kind, progressed) in failures {
                let kind = KINDS[kind];
                let decision = restarts.decide(&spec, &failed(kind, progressed));
                prop_assert!(!(is_final(kind) && decision.restarts));
                prop_assert!(decision.delay.as_secs_f64() <= spec.max_backoff_seconds);
                counted += u32::from(decision.restarts && decision.counted);
                prop_assert!(counted <= max_restarts);
                prop_assert!(!decision.words.is_empty());
                let kept: Restarts = serde_json::from_str(&serde_json::to_string(&restarts).unwrap()).unwrap();
                prop_assert_eq!(&kept, &restarts);
            }
        }
    }
}
