//! What `worker serve` shows to Prometheus.

use std::sync::atomic::Ordering;

use metrics::{counter, describe_counter, describe_gauge, gauge};

use super::engine::Gauges;

const REQUESTS_TOTAL: &str = "tunefleet_serve_requests_total";
const WAITING: &str = "tunefleet_serve_waiting_requests";
const RUNNING: &str = "tunefleet_serve_running_completions";
const CACHED_TOKENS: &str = "tunefleet_serve_cached_tokens";

/// Names and help texts.
pub fn describe() {
    describe_counter!(REQUESTS_TOTAL, "Requests that were answered, by route and status");
    describe_gauge!(WAITING, "Requests that wait for a place");
    describe_gauge!(RUNNING, "Completions under way");
    describe_gauge!(CACHED_TOKENS, "Tokens of all contexts in memory");
}

/// What the engine does now.
pub fn gauges(gauges: &Gauges) {
    gauge!(WAITING).set(gauges.waiting.load(Ordering::Acquire) as f64);
    gauge!(RUNNING).set(gauges.running.load(Ordering::Acquire) as f64);
    gauge!(CACHED_TOKENS).set(gauges.cached_tokens.load(Ordering::Acquire) as f64);
}

/// A request was answered.
pub fn request(path: &str, status: u16) {
    // What strangers make up is one route.
    let route = if status == 404 {
        "other"
    } else if path.starts_with("/models/") {
        "/models"
    } else {
        path
    };
    counter!(REQUESTS_TOTAL, "route" => route.to_owned(), "status" => status.to_string()).increment(1);
}
