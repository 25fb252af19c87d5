//! One job as the fleet keeps it: its live or last attempt, what is kept of it, and what is shown.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tunefleet_proto::ids::{Attempt, JobId};
use tunefleet_proto::job::JobSpec;
use tunefleet_proto::rpc::job_event::Body;
use tunefleet_proto::rpc::{
    AttemptStatus, Continuation, Failure, FailureKind, JobEvent, JobState, JobStatus, Stage, StepDone,
    Waiting, stage_changed::What,
};

use super::budget::Budget;
use super::goodput::{Account, Lost, Stepped};
use super::hang::listed;
use super::job::{End, Job};
use super::placement::WorkerName;
use super::restart::Restarts;
use super::settings::Now;
use super::stage;
use super::store::{AttemptRow, JobRow};

/// Where a job is between its attempts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Life {
    /// An attempt lives.
    Live,
    /// The next attempt begins then.
    Pausing {
        /// Milliseconds since 1970.
        until_unix_ms: u64,
    },
    /// Until a person resumes it.
    Suspended,
    /// For good, unless a person resumes it.
    Ended(Ended),
}

/// How a job ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Ended {
    /// All stages are done.
    Completed,
    /// The last attempt failed, and no other is worth it.
    Failed,
    /// With nothing saved.
    Cancelled,
    /// With a checkpoint.
    Stopped,
}

/// Why an attempt is being stopped; a later one counts where it is stronger.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Intent {
    /// It is not.
    None,
    /// Its machines are wanted: it goes on elsewhere.
    Preempt,
    /// A person wants it to wait.
    Suspend,
    /// It has taken too long.
    Deadline,
    /// A person wants it to end.
    Stop,
}

/// What is kept of a job besides its spec. Absent fields are those of an older version.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Record {
    pub attempt: Attempt,
    pub continuation: Continuation,
    pub job: Job,
    pub life: Life,
    pub intent: Intent,
    /// When a stop with a checkpoint has taken long enough.
    pub stop_by_unix_ms: Option<u64>,
    pub submitted_unix_ms: u64,
    pub request: String,
    /// Number of the newest event.
    pub sequence: u64,
    pub stage_began_unix_ms: u64,
    /// Where each rank of the running task has its slot.
    pub slots: Vec<WorkerName>,
    pub cuda: bool,
    pub restarts: Restarts,
    pub budget: Budget,
    pub step: u64,
    pub loss: Option<f64>,
    pub tokens_per_second: f64,
    pub step_seconds: f64,
    /// Updates in the newest checkpoint.
    pub saved_step: u64,
    /// As `saved_step` when the attempt began.
    pub saved_before: u64,
    /// The most steps that were ever made.
    pub furthest_step: u64,
    pub detail: String,
    /// Where the time of its training went.
    #[serde(default)]
    pub account: Account,
    /// The last attempt that told of a step.
    #[serde(default)]
    pub stepped_in: u32,
    /// When the newest checkpoint came, and when anything last went on.
    #[serde(default)]
    pub saved_unix_ms: u64,
    #[serde(default)]
    pub progress_unix_ms: u64,
}

/// How far a rank was when it was last heard of.
#[derive(Debug, Clone, PartialEq)]
pub struct Seen {
    pub step: u64,
    pub section: String,
    pub seconds: f64,
    pub at: Duration,
}

/// A job, its live or last attempt, and what is shown of it.
pub struct Entry {
    pub spec: Arc<JobSpec>,
    spec_json: String,
    pub record: Record,
    pub attempts: Vec<AttemptRow>,
    pub waiting: Option<Waiting>,
    /// Progress of the ranks of the running task.
    pub seen: BTreeMap<u32, Seen>,
    /// When ranks that have not told where they are will not do so any more.
    pub answers_until: Option<Duration>,
    /// The last step that was told of, and the loss of the last evaluation, since this control plane began.
    pub last_step: Option<StepDone>,
    pub eval_loss: Option<f64>,
    /// The newest checkpoint, likewise.
    pub saved_path: Option<PathBuf>,
    kept: Option<JobRow>,
}

impl Entry {
    /// A job that was just submitted; its first attempt begins at once.
    pub fn new(
        spec: JobSpec,
        spec_json: String,
        continuation: Continuation,
        attempt: Attempt,
        now: Now,
    ) -> Self {
        let record = Record {
            attempt,
            continuation,
            job: Job::new(spec.train.ranks, spec.train.steps),
            life: Life::Live,
            intent: Intent::None,
            stop_by_unix_ms: None,
            submitted_unix_ms: now.unix_ms,
            request: String::new(),
            sequence: 0,
            stage_began_unix_ms: now.unix_ms,
            slots: Vec::new(),
            cuda: false,
            restarts: Restarts::default(),
            budget: Budget::default(),
            step: 0,
            loss: None,
            tokens_per_second: 0.0,
            step_seconds: 0.0,
            saved_step: 0,
            saved_before: 0,
            furthest_step: 0,
            detail: String::new(),
            account: Account::default(),
            stepped_in: 0,
            saved_unix_ms: 0,
            progress_unix_ms: now.unix_ms,
        };
        Entry::of(spec, spec_json, record, Vec::new())
    }

    fn of(spec: JobSpec, spec_json: String, record: Record, attempts: Vec<AttemptRow>) -> Self {
        Entry {
            spec: Arc::new(spec),
            spec_json,
            record,
            attempts,
            waiting: None,
            seen: BTreeMap::new(),
            answers_until: None,
            last_step: None,
            eval_loss: None,
            saved_path: None,
            kept: None,
        }
    }

    /// A job as it was kept.
    ///
    /// # Errors
    /// When it was kept by a version that this one cannot read.
    pub fn restore(row: JobRow, attempts: Vec<AttemptRow>) -> Result<Self, serde_json::Error> {
        let mut entry = Entry::of(
            serde_json::from_str(&row.spec_json)?,
            row.spec_json.clone(),
            serde_json::from_str(&row.record_json)?,
            attempts,
        );
        entry.kept = Some(row);
        Ok(entry)
    }

    /// The row to write, when it is not the one that was written last.
    pub fn changed(&mut self, id: &JobId) -> Option<JobRow> {
        let row = JobRow {
            id: id.clone(),
            state: self.state(),
            submitted_unix_ms: self.record.submitted_unix_ms,
            request: self.record.request.clone(),
            spec_json: self.spec_json.clone(),
            // Plain data with string keys: this cannot fail.
            record_json: serde_json::to_string(&self.record).unwrap_or_default(),
        };
        if self.kept.as_ref() == Some(&row) {
            return None;
        }
        self.kept = Some(row.clone());
        Some(row)
    }

    /// The spec as it was submitted.
    pub fn spec_json(&self) -> &str {
        &self.spec_json
    }

    /// As people see it.
    pub fn state(&self) -> JobState {
        match self.record.life {
            Life::Live => match self.record.job.state() {
                JobState::Running if self.record.job.waiting().is_some() => JobState::Queued,
                state => state,
            },
            Life::Pausing { .. } => JobState::Restarting,
            Life::Suspended => JobState::Suspended,
            Life::Ended(Ended::Completed) => JobState::Completed,
            Life::Ended(Ended::Failed) => JobState::Failed,
            Life::Ended(Ended::Cancelled) => JobState::Cancelled,
            Life::Ended(Ended::Stopped) => JobState::Stopped,
        }
    }

    /// Whether an attempt lives or another will follow by itself.
    pub fn is_active(&self) -> bool {
        matches!(self.record.life, Life::Live | Life::Pausing { .. })
    }

    /// The next event, with what it changes here.
    pub fn event(&mut self, id: &JobId, mut body: Body, now: Now) -> JobEvent {
        let record = &mut self.record;
        match &mut body {
            Body::Stage(changed) => {
                let began = std::mem::replace(&mut record.stage_began_unix_ms, now.unix_ms);
                changed.output = match (&self.spec.serve, changed.stage()) {
                    (Some(serve), Stage::Serve) => format!("http://{}", serve.listen),
                    _ => stage::output_dir(&self.spec, changed.stage()).display().to_string(),
                };
                changed.seconds = now.unix_ms.saturating_sub(began) as f64 / 1000.0;
                record.progress_unix_ms = now.unix_ms;
                match (changed.stage(), changed.what()) {
                    (Stage::Train, What::Started) => {
                        record.account.lost(Lost::Restart, now);
                        record.account.begin(now);
                    }
                    (Stage::Train, _) => record.account.stop(Lost::Pause, now),
                    _ => {}
                }
            }
            Body::Step(step) => {
                let again = record.furthest_step.min(step.step);
                let is_first = record.stepped_in != record.attempt.0;
                let before = match (is_first, record.furthest_step) {
                    (true, 0) => Lost::Start,
                    (true, _) => Lost::Restart,
                    (false, _) => Lost::Pause,
                };
                let last = if is_first { record.saved_before } else { record.step };
                record.stepped_in = record.attempt.0;
                let stepped = Stepped {
                    new: step.step.saturating_sub(record.furthest_step),
                    again: again.saturating_sub(last),
                    step_seconds: step.step_seconds,
                    before,
                };
                record.account.stepped(stepped, now);
                record.progress_unix_ms = now.unix_ms;
                record.step = step.step;
                record.loss = Some(step.loss).filter(|loss| loss.is_finite());
                record.tokens_per_second = step.tokens_per_second;
                record.step_seconds = step.step_seconds;
                record.furthest_step = record.furthest_step.max(step.step);
                record.budget.stepped(step.step_seconds);
                self.last_step = Some(*step);
            }
            Body::Note(_) | Body::Section(_) => record.progress_unix_ms = now.unix_ms,
            Body::Evaluated(evaluated) => {
                record.progress_unix_ms = now.unix_ms;
                self.eval_loss = Some(evaluated.loss);
            }
            Body::Saved(saved) => {
                record.progress_unix_ms = now.unix_ms;
                record.saved_unix_ms = now.unix_ms;
                self.saved_path = Some(PathBuf::from(&saved.path));
                record.saved_step = record.saved_step.max(saved.step);
            }
            Body::AttemptEnded(ended) => {
                let is_hang =
                    ended.failure.as_ref().is_some_and(|failure| failure.kind() == FailureKind::Hang);
                record.account.lost(if is_hang { Lost::Hang } else { Lost::Restart }, now);
            }
            Body::State(changed) if changed.state().is_end() || changed.state() == JobState::Suspended => {
                record.account.stop(Lost::Restart, now);
            }
            _ => {}
        }
        record.sequence += 1;
        JobEvent {
            sequence: record.sequence,
            unix_ms: now.unix_ms,
            job: id.0.clone(),
            attempt: record.attempt.0,
            body: Some(body),
        }
    }

    /// The row of the live or last attempt.
    pub fn attempt_row(&self, id: &JobId, now: Now) -> AttemptRow {
        let known = self.attempts.last().filter(|row| row.attempt == self.record.attempt);
        let began_unix_ms = known.map_or(now.unix_ms, |row| row.began_unix_ms);
        let (state, cause, kind) = match self.record.job.end() {
            None => (self.record.job.state(), String::new(), FailureKind::Unspecified),
            Some(End::Completed) => (JobState::Completed, "completed".to_owned(), FailureKind::Unspecified),
            Some(End::Cancelled) => (JobState::Cancelled, "cancelled".to_owned(), FailureKind::Unspecified),
            Some(End::Stopped(step)) => {
                let cause = format!("stopped after step {step}, with a checkpoint");
                (JobState::Stopped, cause, FailureKind::Unspecified)
            }
            Some(End::Failed(failure)) => (JobState::Failed, cause_of(failure), failure.kind()),
        };
        AttemptRow {
            job: id.clone(),
            attempt: self.record.attempt,
            began_unix_ms,
            ended_unix_ms: if self.record.job.end().is_some() { now.unix_ms } else { 0 },
            state,
            step: self.record.step,
            cause,
            kind,
        }
    }

    fn attempt_status(&self, row: &AttemptRow) -> AttemptStatus {
        // A row is written when an attempt begins and when it ends.
        let lives = row.ended_unix_ms == 0 && row.attempt == self.record.attempt;
        AttemptStatus {
            attempt: row.attempt.0,
            began_unix_ms: row.began_unix_ms,
            ended_unix_ms: row.ended_unix_ms,
            state: if lives { self.state() } else { row.state }.into(),
            step: if lives { self.record.step } else { row.step },
            cause: row.cause.clone(),
            kind: row.kind.into(),
        }
    }

    /// As it is shown.
    pub fn status(&self, id: &JobId) -> JobStatus {
        let Record { job, step, step_seconds, .. } = &self.record;
        let left = self.spec.train.steps.saturating_sub(*step) as f64;
        let mut workers: Vec<String> = Vec::new();
        for worker in &self.record.slots {
            let name = worker.to_string();
            if !workers.contains(&name) {
                workers.push(name);
            }
        }
        JobStatus {
            job: id.0.clone(),
            attempt: self.record.attempt.0,
            state: self.state().into(),
            stage: job.stage().into(),
            step: *step,
            steps: self.spec.train.steps,
            loss: self.record.loss.unwrap_or(f64::NAN),
            tokens_per_second: self.record.tokens_per_second,
            output: self.spec.output.display().to_string(),
            detail: self.record.detail.clone(),
            priority: i32::from(self.spec.priority),
            submitted_unix_ms: self.record.submitted_unix_ms,
            remaining_seconds: if self.is_active() { left * step_seconds } else { 0.0 },
            attempts: self.attempts.iter().map(|row| self.attempt_status(row)).collect(),
            workers,
            method: self.spec.method().to_owned(),
            goodput_ratio: self.record.account.goodput(),
        }
    }
}

/// A failure in one line: the cause, and which ranks ended only because of it.
pub fn cause_of(failure: &Failure) -> String {
    let cause = match failure.rank {
        Some(rank) if !failure.aborted_ranks.is_empty() && !failure.cause.starts_with("rank") => {
            format!("rank {rank}: {}", failure.cause)
        }
        _ => failure.cause.clone(),
    };
    match failure.aborted_ranks.as_slice() {
        [] => cause,
        aborted => format!("{cause}; {}: aborted by peer", listed(aborted)),
    }
}
