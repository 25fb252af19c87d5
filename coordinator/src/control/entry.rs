//! One job as the plane keeps it: its live or last attempt, its directory, and what is shown of it.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use tonic::Status;
use tunefleet_proto::ids::{Attempt, JobId};
use tunefleet_proto::job::JobSpec;
use tunefleet_proto::model::ModelConfig;
use tunefleet_proto::rpc::job_event::Body;
use tunefleet_proto::rpc::{Continuation, Failure, JobStatus, Stage, StartTask, TaskId, Waiting};

use super::events::EventLog;
use super::hang::listed;
use super::job::{End, Job};
use super::metrics_log::MetricsLog;
use super::placement::WorkerName;
use super::stage;
use crate::metrics;

/// A job, its live or last attempt, and what is shown of it.
pub(super) struct Entry {
    pub(super) spec: Arc<JobSpec>,
    pub(super) attempt: Attempt,
    pub(super) continuation: Continuation,
    pub(super) job: Job,
    /// Taken at submission: the order in which jobs get slots.
    pub(super) submitted: Instant,
    stage_began: Instant,
    pub(super) slots: Vec<WorkerName>,
    pub(super) cuda: bool,
    pub(super) events: Arc<EventLog>,
    log: MetricsLog,
    /// Keeps other coordinators out of the output directory while the attempt lives.
    lock: Option<File>,
    step: u64,
    loss: f64,
    tokens_per_second: f64,
    pub(super) detail: String,
    pub(super) waiting: Option<Waiting>,
}

impl Entry {
    /// A new attempt, whose output directory is this coordinator's from here on. `known` is the ended
    /// attempt before it: its events go on, and so do its numbers.
    pub(super) fn begin(
        spec: JobSpec,
        continuation: Continuation,
        known: Option<&Entry>,
    ) -> Result<Self, Status> {
        let cannot = |cause: std::io::Error| {
            Status::failed_precondition(format!("output {}: {cause}", spec.output.display()))
        };
        let log = MetricsLog::open(&spec.output).map_err(cannot)?;
        let lock = lock_output(&spec.output)?;
        let attempt = new_attempt(&spec, known.map_or(0, |known| known.attempt.0)).map_err(cannot)?;
        let events = known.map_or_else(|| Arc::new(EventLog::new()), |known| Arc::clone(&known.events));
        events.reopen();
        Ok(Entry {
            job: Job::new(spec.train.ranks, spec.train.steps),
            spec: Arc::new(spec),
            attempt,
            continuation,
            submitted: Instant::now(),
            stage_began: Instant::now(),
            slots: Vec::new(),
            cuda: false,
            events,
            log,
            lock: Some(lock),
            step: 0,
            loss: f64::NAN,
            tokens_per_second: 0.0,
            detail: String::new(),
            waiting: None,
        })
    }

    /// Notes, counts and shows an event.
    pub(super) fn tell(&mut self, id: &JobId, mut body: Body) {
        let mut last = false;
        match &mut body {
            Body::Stage(changed) => {
                let began = std::mem::replace(&mut self.stage_began, Instant::now());
                changed.output = stage::output_dir(&self.spec, changed.stage()).display().to_string();
                changed.seconds = began.elapsed().as_secs_f64();
            }
            Body::State(changed) => {
                last = changed.state().is_end();
                if last {
                    self.lock = None;
                    self.detail = match self.job.end() {
                        Some(End::Failed(failure)) => detail_of(failure),
                        _ => String::new(),
                    };
                }
                metrics::attempt_ended(&id.0, changed.state());
            }
            Body::Step(step) => {
                self.step = step.step;
                self.loss = step.loss;
                self.tokens_per_second = step.tokens_per_second;
                metrics::step(&id.0, step);
            }
            Body::Evaluated(evaluated) => metrics::evaluated(&id.0, evaluated),
            Body::Saved(saved) => metrics::saved(&id.0, saved),
            Body::RankEnded(ended) => {
                tracing::info!("job {id}: rank {} on {}: {}", ended.rank, ended.worker, ended.how);
            }
            Body::Note(_) | Body::Waiting(_) | Body::Section(_) | Body::AttemptEnded(_) | Body::Worker(_) => {
            }
        }
        if let Err(error) = self.log.append(self.attempt, &body) {
            tracing::warn!("job {id}: {}: {error}", super::METRICS_LOG_FILE);
        }
        self.events.push(id, self.attempt, body, last);
    }

    /// Says what the job waits for, when that has changed.
    pub(super) fn wait(&mut self, id: &JobId, waiting: Waiting) {
        let detail = format!("waits for {} slots, {} are free", waiting.needed, waiting.free);
        if self.waiting != Some(waiting) {
            self.tell(id, Body::Waiting(waiting));
            self.waiting = Some(waiting);
            self.detail = detail;
        }
    }

    /// One command for each worker that has ranks of the task.
    pub(super) fn start_task(
        &self,
        task: Option<TaskId>,
        ranks: &[WorkerName],
        resume: bool,
    ) -> Result<Vec<(WorkerName, StartTask)>, String> {
        let is_train = task.as_ref().is_some_and(|task| task.stage() == Stage::Train);
        let spec_json = serde_json::to_string(&*self.spec).map_err(|error| error.to_string())?;
        let shard_plan_json = if is_train { shard_plan(&self.spec)? } else { String::new() };
        let mut of_worker: BTreeMap<&WorkerName, Vec<u32>> = BTreeMap::new();
        for (rank, worker) in ranks.iter().enumerate() {
            of_worker.entry(worker).or_default().push(rank as u32);
        }
        let log_dir = attempt_dir(&self.spec.output, self.attempt).display().to_string();
        let command = |ranks| StartTask {
            task: task.clone(),
            spec_json: spec_json.clone(),
            shard_plan_json: shard_plan_json.clone(),
            world: self.slots.len() as u32,
            ranks,
            resume,
            log_dir: log_dir.clone(),
            cuda: self.cuda,
            threads: if is_train { self.spec.workers.threads_per_rank.unwrap_or(0) } else { 0 },
        };
        Ok(of_worker.into_iter().map(|(worker, ranks)| (worker.clone(), command(ranks))).collect())
    }

    pub(super) fn status(&self, id: &JobId) -> JobStatus {
        JobStatus {
            job: id.0.clone(),
            attempt: self.attempt.0,
            state: self.job.state().into(),
            stage: self.job.stage().into(),
            step: self.step,
            steps: self.spec.train.steps,
            loss: self.loss,
            tokens_per_second: self.tokens_per_second,
            output: self.spec.output.display().to_string(),
            detail: self.detail.clone(),
            ..JobStatus::default()
        }
    }
}

/// A failure in one line: the cause, and which ranks ended only because of it.
fn detail_of(failure: &Failure) -> String {
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

/// The layout of the job's model over its ranks.
fn shard_plan(spec: &JobSpec) -> Result<String, String> {
    let path = spec.model_dir().join("config.json");
    let at = |cause: String| format!("{}: {cause}", path.display());
    let text = std::fs::read_to_string(&path).map_err(|error| at(error.to_string()))?;
    let config = ModelConfig::from_json(&text).map_err(|error| at(error.to_string()))?;
    let plan = spec.shard_plan(&config).map_err(|error| at(error.to_string()))?;
    serde_json::to_string(&plan).map_err(|error| at(error.to_string()))
}

fn attempt_dir(output: &Path, attempt: Attempt) -> std::path::PathBuf {
    output.join("logs").join(format!("attempt-{}", attempt.0))
}

/// The first attempt number after `earlier` that has no logs yet, and a directory for them: numbers
/// go on where an earlier coordinator stopped, and never come twice in one. What the attempt was
/// asked to do is noted there, for people who look later.
fn new_attempt(spec: &JobSpec, earlier: u32) -> std::io::Result<Attempt> {
    let output = &spec.output;
    let logs = output.join("logs");
    std::fs::create_dir_all(&logs)?;
    let mut newest = earlier;
    for entry in std::fs::read_dir(&logs)? {
        let name = entry?.file_name();
        let number = name.to_str().and_then(|name| name.strip_prefix("attempt-")?.parse::<u32>().ok());
        newest = newest.max(number.unwrap_or(0));
    }
    let attempt = Attempt(newest.saturating_add(1));
    let dir = attempt_dir(output, attempt);
    std::fs::create_dir_all(&dir)?;
    std::fs::write(dir.join("job.json"), serde_json::to_vec_pretty(spec)?)?;
    Ok(attempt)
}

/// One live attempt for each output directory, whichever coordinator runs it.
fn lock_output(output: &Path) -> Result<File, Status> {
    let path = output.join(".lock");
    let at = |cause: String| Status::failed_precondition(format!("{}: {cause}", path.display()));
    let file = File::create(&path).map_err(|error| at(error.to_string()))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(std::fs::TryLockError::WouldBlock) => {
            Err(at("another job runs in this directory: wait for it, or set another `output`".to_owned()))
        }
        Err(std::fs::TryLockError::Error(error)) => Err(at(error.to_string())),
    }
}
