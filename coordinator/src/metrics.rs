//! What `coordinator` shows to Prometheus: all names, labels and help texts.
//!
//! What is true of jobs and workers is read from the control plane at each scrape, so that nothing of a job stays
//! behind when it is no longer shown. Durations that only their ends tell are observed as they come.

use std::path::Path;
use std::sync::LazyLock;
use std::time::Duration;

use prometheus::core::Collector;
use prometheus::process_collector::ProcessCollector;
use prometheus::{
    CounterVec, Error, GaugeVec, Histogram, HistogramOpts, HistogramVec, IntCounterVec, Opts, Registry,
    TextEncoder,
};
use tunefleet_proto::rpc::{FailureKind, JobState, Stage, WorkerState};

use crate::control::{Figures, JobFigures, Lost};

/// From a moment to an hour.
const SECONDS: [f64; 12] = [0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 900.0, 3600.0];
/// From a write to memory to a disk that stands still.
const SHORT_SECONDS: [f64; 12] = [1e-4, 2.5e-4, 1e-3, 2.5e-3, 0.01, 0.025, 0.1, 0.25, 1.0, 2.5, 10.0, 60.0];

/// What is counted as it happens.
struct Observed {
    registry: Registry,
    checkpoint_pause: Histogram,
    failure_detection: Histogram,
    restart: Histogram,
    commit: Histogram,
    rpcs: IntCounterVec,
    rpc_seconds: HistogramVec,
}

static OBSERVED: LazyLock<Option<Observed>> = LazyLock::new(|| match Observed::new() {
    Ok(observed) => Some(observed),
    Err(error) => {
        tracing::error!("metrics are not counted: {error}: this is a bug, please report it");
        None
    }
});

impl Observed {
    fn new() -> Result<Self, Error> {
        let registry = Registry::new();
        let histogram = |name: &str, help: &str, buckets: &[f64]| {
            let histogram = Histogram::with_opts(HistogramOpts::new(name, help).buckets(buckets.to_vec()))?;
            registry.register(Box::new(histogram.clone()))?;
            Ok::<_, Error>(histogram)
        };
        let checkpoint_pause = histogram(
            "tunefleet_checkpoint_pause_seconds",
            "How long training stood still for a checkpoint",
            &SECONDS,
        )?;
        let failure_detection = histogram(
            "tunefleet_failure_detection_seconds",
            "From the last sign of progress of an attempt that failed to its end",
            &SECONDS,
        )?;
        let restart = histogram(
            "tunefleet_restart_duration_seconds",
            "From the end of an attempt that failed to the first reported step of the next",
            &SECONDS,
        )?;
        let commit = histogram(
            "tunefleet_store_commit_duration_seconds",
            "How long it took until a change was on disk",
            &SHORT_SECONDS,
        )?;
        let rpcs = IntCounterVec::new(
            Opts::new("tunefleet_rpc_server_handled_total", "Calls, by how they were answered"),
            &["method", "code"],
        )?;
        let rpc_seconds = HistogramVec::new(
            HistogramOpts::new(
                "tunefleet_rpc_server_duration_seconds",
                "How long a call took until its answer began",
            )
            .buckets(SHORT_SECONDS.to_vec()),
            &["method"],
        )?;
        registry.register(Box::new(rpcs.clone()))?;
        registry.register(Box::new(rpc_seconds.clone()))?;
        registry.register(Box::new(ProcessCollector::for_self()))?;
        Ok(Observed { registry, checkpoint_pause, failure_detection, restart, commit, rpcs, rpc_seconds })
    }
}

/// Training stood still for a checkpoint.
pub fn checkpoint_paused(seconds: f64) {
    if let Some(observed) = OBSERVED.as_ref() {
        observed.checkpoint_pause.observe(seconds);
    }
}

/// An attempt has failed, so long after it last went on.
pub fn failure_detected(seconds: f64) {
    if let Some(observed) = OBSERVED.as_ref() {
        observed.failure_detection.observe(seconds);
    }
}

/// A job makes steps again, so long after its last attempt failed.
pub fn restarted(seconds: f64) {
    if let Some(observed) = OBSERVED.as_ref() {
        observed.restart.observe(seconds);
    }
}

/// A change is on disk.
pub fn committed(took: Duration) {
    if let Some(observed) = OBSERVED.as_ref() {
        observed.commit.observe(took.as_secs_f64());
    }
}

/// A call was answered. `method` and `code` are among few.
pub fn called(method: &str, code: &str, took: Duration) {
    if let Some(observed) = OBSERVED.as_ref() {
        observed.rpcs.with_label_values(&[method, code]).inc();
        observed.rpc_seconds.with_label_values(&[method]).observe(took.as_secs_f64());
    }
}

/// The page of one scrape, in Prometheus' text format. Reads the sizes of a few files.
///
/// # Errors
/// When two metrics have one name.
pub fn page(figures: &Figures) -> Result<String, Error> {
    let page = Page { registry: Registry::new() };
    let build =
        page.gauge("tunefleet_build_info", "1, labelled with the version of this coordinator", &["version"])?;
    build.with_label_values(&[env!("CARGO_PKG_VERSION")]).set(1.0);
    fleet(&page, figures)?;
    jobs(&page, figures)?;
    time(&page, figures)?;
    training(&page, figures)?;
    checkpoints(&page, figures)?;
    let mut families = page.registry.gather();
    families.extend(OBSERVED.iter().flat_map(|observed| observed.registry.gather()));
    TextEncoder::new().encode_to_string(&families)
}

/// One scrape.
struct Page {
    registry: Registry,
}

impl Page {
    fn gauge(&self, name: &str, help: &str, labels: &[&str]) -> Result<GaugeVec, Error> {
        self.add(GaugeVec::new(Opts::new(name, help), labels)?)
    }

    fn counter(&self, name: &str, help: &str, labels: &[&str]) -> Result<CounterVec, Error> {
        self.add(CounterVec::new(Opts::new(name, help), labels)?)
    }

    fn add<T: Collector + Clone + 'static>(&self, family: T) -> Result<T, Error> {
        self.registry.register(Box::new(family.clone()))?;
        Ok(family)
    }

    /// A value of each job that has one.
    fn of_jobs(
        &self,
        figures: &Figures,
        name: &str,
        help: &str,
        value: impl Fn(&JobFigures) -> Option<f64>,
    ) -> Result<(), Error> {
        let family = self.gauge(name, help, &["job"])?;
        for job in &figures.jobs {
            if let Some(value) = value(job) {
                family.with_label_values(&[&job.status.job]).set(value);
            }
        }
        Ok(())
    }
}

fn fleet(page: &Page, figures: &Figures) -> Result<(), Error> {
    let states = page.gauge("tunefleet_jobs", "Jobs by state", &["state"])?;
    for (state, count) in JobState::ALL.into_iter().zip(figures.states) {
        states.with_label_values(&[state.name()]).set(f64::from(count));
    }
    let depth = page.gauge("tunefleet_queue_depth", "Jobs that wait for slots", &[])?;
    let waiting = figures.jobs.iter().filter(|job| job.is_waiting).count();
    depth.with_label_values::<&str>(&[]).set(waiting as f64);

    let workers = page.gauge("tunefleet_workers", "Workers by state", &["state"])?;
    for state in WorkerState::ALL {
        let count = figures.workers.iter().filter(|worker| worker.state() == state).count();
        workers.with_label_values(&[state.name()]).set(count as f64);
    }
    let age = page.gauge(
        "tunefleet_worker_heartbeat_age_seconds",
        "Since a worker was last heard of",
        &["worker"],
    )?;
    let slots = page.gauge("tunefleet_worker_slots", "Ranks that a worker has room for", &["worker"])?;
    let used = page.gauge("tunefleet_worker_used_slots", "Of these, those that are taken", &["worker"])?;
    for worker in &figures.workers {
        let label = [worker.name.as_str()];
        age.with_label_values(&label).set(worker.silent_ms as f64 / 1000.0);
        let all = worker.registered.as_ref().map_or(0, |register| register.slots);
        slots.with_label_values(&label).set(f64::from(all));
        used.with_label_values(&label).set(f64::from(worker.used_slots));
    }
    Ok(())
}

fn jobs(page: &Page, figures: &Figures) -> Result<(), Error> {
    let info = page.gauge(
        "tunefleet_job_info",
        "1, labelled with what a job trains: full, lora or qlora",
        &["job", "method"],
    )?;
    let state = page.gauge("tunefleet_job_state", "1 for the state that a job is in", &["job", "state"])?;
    let stage = page.gauge("tunefleet_job_stage", "1 for the stage that a job is at", &["job", "stage"])?;
    let attempts = page.counter(
        "tunefleet_job_attempts_total",
        "Attempts that have ended, by how: completed, stopped, cancelled, or the kind of failure",
        &["job", "cause"],
    )?;
    for JobFigures { status, .. } in &figures.jobs {
        info.with_label_values(&[status.job.as_str(), &status.method]).set(1.0);
        state.with_label_values(&[status.job.as_str(), status.state().name()]).set(1.0);
        if status.stage() != Stage::Unspecified {
            stage.with_label_values(&[status.job.as_str(), status.stage().name()]).set(1.0);
        }
        for attempt in status.attempts.iter().filter(|attempt| attempt.ended_unix_ms > 0) {
            let cause = match (attempt.kind(), attempt.state()) {
                (FailureKind::Unspecified, state) if state != JobState::Failed => state.name(),
                (kind, _) => kind.name(),
            };
            attempts.with_label_values(&[status.job.as_str(), cause]).inc();
        }
    }
    page.of_jobs(figures, "tunefleet_job_attempt", "Number of a job's newest attempt", |job| {
        Some(f64::from(job.status.attempt))
    })
}

fn time(page: &Page, figures: &Figures) -> Result<(), Error> {
    page.of_jobs(
        figures,
        "tunefleet_job_goodput_ratio",
        "Time of training that went into steps that count, as a share of all",
        |job| Some(job.account.goodput()),
    )?;
    let productive = page.counter(
        "tunefleet_job_productive_seconds_total",
        "Time that went into steps that count",
        &["job"],
    )?;
    let lost = page.counter(
        "tunefleet_job_lost_seconds_total",
        "Time of training that was lost, by cause: start, restart, rework, hang, queue, and pause (evaluation and \
         checkpoints)",
        &["job", "cause"],
    )?;
    for job in &figures.jobs {
        let name = job.status.job.as_str();
        productive.with_label_values(&[name]).inc_by(job.account.productive_seconds());
        for cause in Lost::ALL {
            lost.with_label_values(&[name, cause.name()]).inc_by(job.account.lost_seconds(cause));
        }
    }
    page.of_jobs(
        figures,
        "tunefleet_job_eta_seconds",
        "Until the last step, at the present pace; absent when nobody knows",
        |job| Some(job.status.remaining_seconds).filter(|&seconds| seconds > 0.0),
    )?;
    page.of_jobs(
        figures,
        "tunefleet_job_last_progress_timestamp_seconds",
        "When a job last told that it went on: a step, a stage, an evaluation, a checkpoint",
        |job| Some(job.progress_unix_ms as f64 / 1000.0),
    )
}

fn training(page: &Page, figures: &Figures) -> Result<(), Error> {
    page.of_jobs(figures, "tunefleet_job_step", "Optimizer updates done", |job| {
        Some(job.status.step as f64)
    })?;
    page.of_jobs(figures, "tunefleet_job_steps_target", "Optimizer updates asked for", |job| {
        Some(job.status.steps as f64)
    })?;
    page.of_jobs(
        figures,
        "tunefleet_job_loss",
        "Mean training loss per target token of the last logged step",
        |job| job.last_step.map(|step| step.loss),
    )?;
    page.of_jobs(
        figures,
        "tunefleet_job_eval_loss",
        "Mean loss per target token of the last evaluation",
        |job| job.eval_loss,
    )?;
    page.of_jobs(figures, "tunefleet_job_grad_norm", "Global gradient norm before clipping", |job| {
        job.last_step.map(|step| step.grad_norm)
    })?;
    page.of_jobs(figures, "tunefleet_job_learning_rate", "Learning rate of the last logged step", |job| {
        job.last_step.map(|step| step.learning_rate)
    })?;
    let tokens = page.counter(
        "tunefleet_job_tokens_total",
        "Input tokens that the training has consumed; an attempt that begins at a checkpoint begins with its count",
        &["job"],
    )?;
    for job in &figures.jobs {
        if let Some(step) = job.last_step {
            tokens.with_label_values(&[&job.status.job]).inc_by(step.tokens as f64);
        }
    }
    page.of_jobs(
        figures,
        "tunefleet_job_tokens_per_second",
        "Input tokens per second over all ranks, as last logged",
        |job| job.last_step.map(|step| step.tokens_per_second),
    )?;
    page.of_jobs(
        figures,
        "tunefleet_job_step_duration_seconds",
        "Mean duration of a step, as last logged",
        |job| job.last_step.map(|step| step.step_seconds),
    )?;
    let flops = |job: &JobFigures| Some(job.last_step?.tokens_per_second * job.model_flops_per_token?);
    page.of_jobs(
        figures,
        "tunefleet_job_model_flops_per_second",
        "Floating-point operations that the model needs, per second over all ranks; what is computed again is not counted",
        flops,
    )?;
    page.of_jobs(
        figures,
        "tunefleet_job_model_flops_utilization_ratio",
        "These as a share of what all its GPUs can do in bf16; absent where one of them is not known",
        |job| Some(flops(job)? / job.peak_flops?),
    )
}

fn checkpoints(page: &Page, figures: &Figures) -> Result<(), Error> {
    let saved = |job: &JobFigures| (job.saved_unix_ms > 0).then_some(job.saved_unix_ms as f64 / 1000.0);
    page.of_jobs(
        figures,
        "tunefleet_checkpoint_step",
        "Optimizer updates in the newest checkpoint",
        |job| saved(job).map(|_| job.saved_step as f64),
    )?;
    page.of_jobs(
        figures,
        "tunefleet_checkpoint_last_success_timestamp_seconds",
        "When the newest checkpoint came",
        saved,
    )?;
    page.of_jobs(
        figures,
        "tunefleet_checkpoint_interval_seconds",
        "Between two checkpoints at the present pace; absent where only the end is saved",
        |job| {
            let seconds = job.checkpoint_every_steps as f64 * job.step_seconds;
            Some(seconds).filter(|&seconds| seconds > 0.0)
        },
    )?;
    page.of_jobs(figures, "tunefleet_checkpoint_bytes", "Size of the newest checkpoint", |job| {
        files_bytes(job.checkpoint_dir.as_deref()?)
    })?;
    page.of_jobs(
        figures,
        "tunefleet_job_output_free_bytes",
        "Free bytes of the file system that a job writes to, where the coordinator sees it",
        |job| free_bytes(&job.output),
    )
}

/// Size of the files of a directory.
fn files_bytes(dir: &Path) -> Option<f64> {
    let entries = std::fs::read_dir(dir).ok()?;
    let sizes = entries.flatten().filter_map(|entry| entry.metadata().ok()).map(|metadata| metadata.len());
    Some(sizes.sum::<u64>() as f64)
}

fn free_bytes(dir: &Path) -> Option<f64> {
    let stat = nix::sys::statvfs::statvfs(dir).ok()?;
    Some(stat.blocks_available() as f64 * stat.fragment_size() as f64)
}
