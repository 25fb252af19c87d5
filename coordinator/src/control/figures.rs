//! Jobs and workers at one moment, in numbers: what metrics are made of.

use std::path::PathBuf;

use tunefleet_proto::ids::JobId;
use tunefleet_proto::rpc::{JobState, JobStatus, StepDone, WorkerStatus};

use super::entry::Entry;
use super::goodput::Account;

/// All of a control plane.
#[derive(Debug, Clone)]
pub struct Figures {
    /// Jobs in each of [`JobState::ALL`].
    pub states: [u32; JobState::ALL.len()],
    /// Jobs that have not ended long ago.
    pub jobs: Vec<JobFigures>,
    /// Workers that were heard of not long ago.
    pub workers: Vec<WorkerStatus>,
}

/// One job.
#[derive(Debug, Clone)]
pub struct JobFigures {
    /// As people see it.
    pub status: JobStatus,
    /// Whether it waits for slots.
    pub is_waiting: bool,
    /// The last step that was told of.
    pub last_step: Option<StepDone>,
    /// Loss of the last evaluation.
    pub eval_loss: Option<f64>,
    /// Mean duration of a step, when the last one was told of.
    pub step_seconds: f64,
    /// Where the time of its training went.
    pub account: Account,
    /// When anything last went on.
    pub progress_unix_ms: u64,
    /// Updates in the newest checkpoint, and when it came; 0 before the first.
    pub saved_step: u64,
    /// See `saved_step`.
    pub saved_unix_ms: u64,
    /// Updates between checkpoints; 0 where only the end is saved.
    pub checkpoint_every_steps: u64,
    /// The newest checkpoint, where this control plane has seen it come.
    pub checkpoint_dir: Option<PathBuf>,
    /// Where it serves completions, when it does.
    pub serve_listen: Option<String>,
    /// Where it writes.
    pub output: PathBuf,
    /// Floating-point operations that the model needs for a token.
    pub model_flops_per_token: Option<f64>,
    /// What all its GPUs can do in a second, where all of them are known.
    pub peak_flops: Option<f64>,
}

impl JobFigures {
    /// Those of a job that has GPUs of so many FLOP/s.
    pub fn new(id: &JobId, entry: &Entry, peak_flops: Option<f64>) -> Self {
        let record = &entry.record;
        JobFigures {
            status: entry.status(id),
            is_waiting: entry.is_active() && entry.record.job.waiting().is_some(),
            last_step: entry.last_step,
            eval_loss: entry.eval_loss,
            step_seconds: record.step_seconds,
            account: record.account.clone(),
            progress_unix_ms: record.progress_unix_ms,
            saved_step: record.saved_step,
            saved_unix_ms: record.saved_unix_ms,
            checkpoint_every_steps: entry.spec.train.checkpoint_every_steps,
            checkpoint_dir: entry.saved_path.clone(),
            serve_listen: entry.spec.serve.as_ref().map(|serve| serve.listen.to_string()),
            output: entry.spec.output.clone(),
            model_flops_per_token: None,
            peak_flops,
        }
    }
}
