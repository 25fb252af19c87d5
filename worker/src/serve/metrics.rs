//! What `worker serve` shows to Prometheus: all names, labels and help texts.

use std::sync::LazyLock;
use std::sync::atomic::Ordering;
use std::time::Duration;

use prometheus::core::Collector;
use prometheus::process_collector::ProcessCollector;
use prometheus::{
    Error, Gauge, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, Opts, Registry,
    TextEncoder,
};

use super::engine::Gauges;
use super::engine::request::End;

/// A completion in an editor is late after a third of a second.
const SECONDS: [f64; 12] = [0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0, 2.5, 5.0, 15.0, 60.0];

/// What is counted as it happens.
struct Observed {
    registry: Registry,
    requests: IntCounterVec,
    request_seconds: HistogramVec,
    first_token_seconds: Histogram,
    prompt_tokens: IntCounter,
    known_tokens: IntCounter,
    made_tokens: IntCounter,
    guessed_tokens: IntCounter,
    waiting: Gauge,
    running: Gauge,
    cached_tokens: Gauge,
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
        let counter = |name: &str, help: &str| add(&registry, IntCounter::with_opts(Opts::new(name, help))?);
        let gauge = |name: &str, help: &str| add(&registry, Gauge::with_opts(Opts::new(name, help))?);
        let requests = IntCounterVec::new(
            Opts::new("tunefleet_serve_requests_total", "Requests that were answered, by route and status"),
            &["route", "status"],
        )?;
        let request_seconds = HistogramVec::new(
            HistogramOpts::new(
                "tunefleet_serve_request_duration_seconds",
                "How long an answer took; of a stream, until it began",
            )
            .buckets(SECONDS.to_vec()),
            &["route"],
        )?;
        let first_token = HistogramOpts::new(
            "tunefleet_serve_first_token_seconds",
            "From a request's arrival to the first token of its completion",
        );
        let build = Gauge::with_opts(
            Opts::new("tunefleet_serve_build_info", "1, labelled with the version of this server")
                .const_label("version", env!("CARGO_PKG_VERSION")),
        )?;
        add(&registry, build)?.set(1.0);
        registry.register(Box::new(ProcessCollector::for_self()))?;
        Ok(Observed {
            requests: add(&registry, requests)?,
            request_seconds: add(&registry, request_seconds)?,
            first_token_seconds: add(
                &registry,
                Histogram::with_opts(first_token.buckets(SECONDS.to_vec()))?,
            )?,
            prompt_tokens: counter(
                "tunefleet_serve_prompt_tokens_total",
                "Tokens of the prompts of completions that have ended",
            )?,
            known_tokens: counter(
                "tunefleet_serve_reused_prompt_tokens_total",
                "Of these, tokens that an earlier prompt began with, and that were not computed again",
            )?,
            made_tokens: counter("tunefleet_serve_generated_tokens_total", "Tokens that were made")?,
            guessed_tokens: counter(
                "tunefleet_serve_guessed_tokens_total",
                "Of these, tokens that were guessed rightly, and cost no step of their own",
            )?,
            waiting: gauge("tunefleet_serve_waiting_requests", "Requests that wait for a place")?,
            running: gauge("tunefleet_serve_running_completions", "Completions under way")?,
            cached_tokens: gauge("tunefleet_serve_cached_tokens", "Tokens of all contexts in memory")?,
            registry,
        })
    }
}

fn add<T: Collector + Clone + 'static>(registry: &Registry, family: T) -> Result<T, Error> {
    registry.register(Box::new(family.clone()))?;
    Ok(family)
}

/// The page of one scrape, in Prometheus' text format.
///
/// # Errors
/// When it cannot be written.
pub fn page(gauges: &Gauges) -> Result<String, Error> {
    let Some(observed) = OBSERVED.as_ref() else { return Ok(String::new()) };
    observed.waiting.set(gauges.waiting.load(Ordering::Acquire) as f64);
    observed.running.set(gauges.running.load(Ordering::Acquire) as f64);
    observed.cached_tokens.set(gauges.cached_tokens.load(Ordering::Acquire) as f64);
    TextEncoder::new().encode_to_string(&observed.registry.gather())
}

/// A request was answered.
pub fn request(path: &str, status: u16, took: Duration) {
    // What strangers make up is one route.
    let route = match path {
        _ if status == 404 => "other",
        _ if path.starts_with("/models/") => "/models",
        _ => path,
    };
    if let Some(observed) = OBSERVED.as_ref() {
        observed.requests.with_label_values(&[route, &status.to_string()]).inc();
        observed.request_seconds.with_label_values(&[route]).observe(took.as_secs_f64());
    }
}

/// A completion has its first token.
pub fn first_token(since_asked: Duration) {
    if let Some(observed) = OBSERVED.as_ref() {
        observed.first_token_seconds.observe(since_asked.as_secs_f64());
    }
}

/// A completion has ended.
pub fn completed(end: &End) {
    if let Some(observed) = OBSERVED.as_ref() {
        observed.prompt_tokens.inc_by(end.prompt_tokens as u64);
        observed.known_tokens.inc_by(end.known_tokens as u64);
        observed.made_tokens.inc_by(end.made_tokens as u64);
        observed.guessed_tokens.inc_by(end.guessed_tokens as u64);
    }
}
