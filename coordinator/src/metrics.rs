//! What `coordinator` shows to Prometheus: names, help texts and the page.

use axum::Router;
use axum::routing::get;
use metrics::{Unit, counter, describe_counter, describe_gauge, gauge};
use metrics_exporter_prometheus::{PrometheusBuilder, PrometheusRecorder};
use tokio::net::TcpListener;
use tunefleet_proto::rpc::{Evaluated, JobState, Saved, StepDone};

const BUILD_INFO: &str = "tunefleet_build_info";
const JOBS: &str = "tunefleet_jobs";
const WORKERS: &str = "tunefleet_workers";
const JOB_ATTEMPTS_TOTAL: &str = "tunefleet_job_attempts_total";
const JOB_ENDS_TOTAL: &str = "tunefleet_job_ends_total";
const JOB_STEP: &str = "tunefleet_job_step";
const JOB_STEPS_TARGET: &str = "tunefleet_job_steps_target";
const JOB_LOSS: &str = "tunefleet_job_loss";
const JOB_EVAL_LOSS: &str = "tunefleet_job_eval_loss";
const JOB_GRAD_NORM: &str = "tunefleet_job_grad_norm";
const JOB_LEARNING_RATE: &str = "tunefleet_job_learning_rate";
const JOB_TOKENS_TOTAL: &str = "tunefleet_job_tokens_total";
const JOB_TOKENS_PER_SECOND: &str = "tunefleet_job_tokens_per_second";
const JOB_STEP_SECONDS: &str = "tunefleet_job_step_duration_seconds";
const CHECKPOINT_STEP: &str = "tunefleet_checkpoint_step";
const CHECKPOINT_PAUSE_SECONDS: &str = "tunefleet_checkpoint_pause_seconds";

/// Installs the process-wide recorder and serves it at `/metrics` of `listener`, in the background.
///
/// # Errors
/// When this process already has a recorder.
pub fn serve(listener: TcpListener) -> Result<(), metrics::SetRecorderError<PrometheusRecorder>> {
    let recorder = PrometheusBuilder::new().build_recorder();
    let page = recorder.handle();
    metrics::set_global_recorder(recorder)?;
    describe();
    gauge!(BUILD_INFO, "version" => env!("CARGO_PKG_VERSION")).set(1.0);
    let router = Router::new().route("/metrics", get(move || std::future::ready(page.render())));
    tokio::spawn(async move { axum::serve(listener, router).await });
    Ok(())
}

fn describe() {
    describe_gauge!(BUILD_INFO, "1, labelled with the version of this coordinator");
    describe_gauge!(JOBS, "Jobs by state");
    describe_gauge!(WORKERS, "Workers that are connected or were a moment ago");
    describe_counter!(JOB_ATTEMPTS_TOTAL, "Attempts begun");
    describe_counter!(JOB_ENDS_TOTAL, "Attempts ended, by the state they ended in");
    describe_gauge!(JOB_STEP, "Optimizer updates done");
    describe_gauge!(JOB_STEPS_TARGET, "Optimizer updates asked for");
    describe_gauge!(JOB_LOSS, "Mean training loss per target token of the last logged step");
    describe_gauge!(JOB_EVAL_LOSS, "Mean loss per target token of the last evaluation");
    describe_gauge!(JOB_GRAD_NORM, "Global gradient norm before clipping");
    describe_gauge!(JOB_LEARNING_RATE, "Learning rate of the last logged step");
    describe_counter!(JOB_TOKENS_TOTAL, "Input tokens consumed");
    describe_gauge!(JOB_TOKENS_PER_SECOND, "Input tokens per second over all ranks");
    describe_gauge!(JOB_STEP_SECONDS, Unit::Seconds, "Mean duration of a step since the last report");
    describe_gauge!(CHECKPOINT_STEP, "Optimizer updates in the newest checkpoint");
    describe_gauge!(CHECKPOINT_PAUSE_SECONDS, Unit::Seconds, "How long training stood still for it");
}

/// Workers that are known.
pub fn workers(count: usize) {
    gauge!(WORKERS).set(count as f64);
}

/// The states that all jobs are in.
pub fn jobs(states: impl Iterator<Item = JobState>) {
    let mut counts = [0u32; JobState::ALL.len()];
    for state in states {
        if let Some(index) = JobState::ALL.iter().position(|known| *known == state) {
            counts[index] += 1;
        }
    }
    for (state, count) in JobState::ALL.into_iter().zip(counts) {
        gauge!(JOBS, "state" => state.name()).set(f64::from(count));
    }
}

/// An attempt begins.
pub fn attempt(job: &str, steps: u64) {
    counter!(JOB_ATTEMPTS_TOTAL, "job" => job.to_owned()).increment(1);
    gauge!(JOB_STEPS_TARGET, "job" => job.to_owned()).set(steps as f64);
}

/// A job's state changed; only ends are counted.
pub fn attempt_ended(job: &str, state: JobState) {
    if state.is_end() {
        counter!(JOB_ENDS_TOTAL, "job" => job.to_owned(), "state" => state.name()).increment(1);
    }
}

/// A step was logged.
pub fn step(job: &str, step: &StepDone) {
    let set = |name: &'static str, value: f64| gauge!(name, "job" => job.to_owned()).set(value);
    set(JOB_STEP, step.step as f64);
    set(JOB_LOSS, step.loss);
    set(JOB_GRAD_NORM, step.grad_norm);
    set(JOB_LEARNING_RATE, step.learning_rate);
    set(JOB_TOKENS_PER_SECOND, step.tokens_per_second);
    set(JOB_STEP_SECONDS, step.step_seconds);
    counter!(JOB_TOKENS_TOTAL, "job" => job.to_owned()).absolute(step.tokens);
}

/// An evaluation is done.
pub fn evaluated(job: &str, evaluated: &Evaluated) {
    gauge!(JOB_EVAL_LOSS, "job" => job.to_owned()).set(evaluated.loss);
}

/// A checkpoint exists.
pub fn saved(job: &str, saved: &Saved) {
    gauge!(CHECKPOINT_STEP, "job" => job.to_owned()).set(saved.step as f64);
    gauge!(CHECKPOINT_PAUSE_SECONDS, "job" => job.to_owned()).set(saved.pause_seconds);
}
