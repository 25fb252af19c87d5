//! What `worker daemon` shows to Prometheus: names, help texts and the page.

use axum::Router;
use axum::routing::get;
use metrics::{Unit, counter, describe_counter, describe_gauge, gauge};
use metrics_exporter_prometheus::PrometheusBuilder;
use tokio::net::TcpListener;
use tunefleet_proto::rpc::StepDone;

const BUILD_INFO: &str = "tunefleet_worker_build_info";
const SLOTS: &str = "tunefleet_worker_slots";
const RANKS: &str = "tunefleet_worker_ranks";
const RANK_EXITS_TOTAL: &str = "tunefleet_worker_rank_exits_total";
const RANK_STEP: &str = "tunefleet_rank_step";
const RANK_STEP_SECONDS: &str = "tunefleet_rank_step_duration_seconds";
const RANK_LOSS: &str = "tunefleet_rank_loss";
const RANK_SECTION: &str = "tunefleet_rank_section_info";

/// Installs the process-wide recorder and serves it at `/metrics` of `listener`, in the background.
///
/// # Errors
/// When this process already has a recorder.
pub fn serve(listener: TcpListener) -> Result<(), metrics::SetRecorderError<impl Sized>> {
    let recorder = PrometheusBuilder::new().build_recorder();
    let page = recorder.handle();
    metrics::set_global_recorder(recorder)?;
    describe();
    let router = Router::new().route("/metrics", get(move || std::future::ready(page.render())));
    tokio::spawn(async move { axum::serve(listener, router).await });
    Ok(())
}

fn describe() {
    describe_gauge!(BUILD_INFO, "1, labelled with the version of this worker");
    describe_gauge!(SLOTS, "Ranks that this worker has room for");
    describe_gauge!(RANKS, "Rank processes that run now");
    describe_counter!(RANK_EXITS_TOTAL, "Rank processes that have exited, by result");
    describe_gauge!(RANK_STEP, "Optimizer updates done, as the rank last reported");
    describe_gauge!(RANK_STEP_SECONDS, Unit::Seconds, "Mean duration of a step since the last report");
    describe_gauge!(RANK_LOSS, "Loss of the last reported step, over all ranks");
    describe_gauge!(RANK_SECTION, "1 for the section of the training loop that the rank is in");
}

/// What does not change.
pub fn start(slots: u32) {
    gauge!(BUILD_INFO, "version" => env!("CARGO_PKG_VERSION")).set(1.0);
    gauge!(SLOTS).set(f64::from(slots));
}

/// Ranks that run now.
pub fn ranks(running: usize) {
    gauge!(RANKS).set(running as f64);
}

/// A rank has exited.
pub fn rank_exited(clean: bool) {
    counter!(RANK_EXITS_TOTAL, "result" => if clean { "clean" } else { "failed" }).increment(1);
}

/// A rank reported a step.
pub fn step(job: &str, rank: u32, report: &StepDone) {
    let labels = [("job", job.to_owned()), ("rank", rank.to_string())];
    gauge!(RANK_STEP, &labels).set(report.step as f64);
    gauge!(RANK_STEP_SECONDS, &labels).set(report.step_seconds);
    gauge!(RANK_LOSS, &labels).set(report.loss);
}

/// A rank went from one section to another.
pub fn section(job: &str, rank: u32, from: &str, to: &str) {
    for (section, value) in [(from, 0.0), (to, 1.0)] {
        if !section.is_empty() {
            let labels =
                [("job", job.to_owned()), ("rank", rank.to_string()), ("section", section.to_owned())];
            gauge!(RANK_SECTION, &labels).set(value);
        }
    }
}
