//! Spans for OpenTelemetry, where `coordinator serve --otlp-endpoint` names a collector.
//!
//! An attempt of a job is a trace: the attempt itself, below it its stages, what it waited for slots, its evaluations and
//! the pauses for its checkpoints. Its ids follow from cluster, job and attempt, so that a coordinator that is started
//! again goes on with the same trace. Calls are spans of their own. Names follow OpenTelemetry's conventions for RPC.

use std::collections::BTreeMap;
use std::sync::OnceLock;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use opentelemetry::trace::{SpanContext, SpanId, SpanKind, Status, TraceFlags, TraceId, TraceState};
use opentelemetry::{InstrumentationScope, KeyValue};
use opentelemetry_otlp::{ExporterBuildError, SpanExporter, WithExportConfig};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::trace::{
    BatchConfigBuilder, BatchSpanProcessor, SpanData, SpanEvents, SpanLinks, SpanProcessor,
};
use sha2::{Digest, Sha256};
use tunefleet_proto::rpc::job_event::Body;
use tunefleet_proto::rpc::stage_changed::What;
use tunefleet_proto::rpc::{JobEvent, JobState};

/// How long the last spans may take to leave when this program ends.
const FLUSH_LIMIT: Duration = Duration::from_secs(3);

const SEND_EVERY: Duration = Duration::from_secs(1);

static EXPORTER: OnceLock<BatchSpanProcessor> = OnceLock::new();

/// Sends spans to `endpoint` from now on, in the background; a collector that is away costs spans, and nothing else.
///
/// # Errors
/// When the endpoint is no address.
pub fn export_to(endpoint: &str) -> Result<(), ExporterBuildError> {
    let exporter = SpanExporter::builder().with_tonic().with_endpoint(endpoint).build()?;
    // A coordinator that is killed loses what it has not sent.
    let batches = BatchConfigBuilder::default().with_scheduled_delay(SEND_EVERY).build();
    let mut processor = BatchSpanProcessor::builder(exporter).with_batch_config(batches).build();
    let resource = Resource::builder()
        .with_service_name("tunefleet-coordinator")
        .with_attribute(KeyValue::new("service.version", env!("CARGO_PKG_VERSION")))
        .build();
    processor.set_resource(&resource);
    let _ = EXPORTER.set(processor);
    Ok(())
}

/// Whether anybody wants spans.
pub fn are_wanted() -> bool {
    EXPORTER.get().is_some()
}

/// Sends what is left. Waits for it.
pub fn flush() {
    if let Some(exporter) = EXPORTER.get() {
        let _ = exporter.shutdown_with_timeout(FLUSH_LIMIT);
    }
}

/// A call was answered.
pub fn called(method: &'static str, code: &str, took: Duration) {
    let Some(exporter) = EXPORTER.get() else { return };
    let now = SystemTime::now();
    let attributes = vec![
        KeyValue::new("rpc.system.name", "grpc"),
        KeyValue::new("rpc.method", method),
        KeyValue::new("rpc.response.status_code", code.to_owned()),
    ];
    let trace = TraceId::from_bytes(rand::random());
    let span = SpanId::from_bytes(rand::random());
    let name = format!("tunefleet.v1/{method}");
    let mut data = span_data(trace, span, SpanId::INVALID, name, (now - took, now), attributes);
    data.span_kind = SpanKind::Server;
    if code != "Ok" {
        data.status = Status::error(code.to_owned());
    }
    exporter.on_end(data);
}

/// Sends a job's spans.
pub fn export(spans: Vec<Ended>) {
    let Some(exporter) = EXPORTER.get() else { return };
    spans.into_iter().for_each(|span| exporter.on_end(span.into()));
}

/// A span that has ended.
#[derive(Debug, Clone, PartialEq)]
pub struct Ended {
    trace: TraceId,
    span: SpanId,
    parent: SpanId,
    name: String,
    began_unix_ms: u64,
    ended_unix_ms: u64,
    attributes: Vec<(&'static str, String)>,
    error: Option<String>,
}

impl From<Ended> for SpanData {
    fn from(ended: Ended) -> Self {
        let at = |unix_ms: u64| UNIX_EPOCH + Duration::from_millis(unix_ms);
        let attributes = ended.attributes.into_iter().map(|(key, value)| KeyValue::new(key, value)).collect();
        let times = (at(ended.began_unix_ms), at(ended.ended_unix_ms));
        let mut data = span_data(ended.trace, ended.span, ended.parent, ended.name, times, attributes);
        if let Some(error) = ended.error {
            data.status = Status::error(error);
        }
        data
    }
}

fn span_data(
    trace: TraceId,
    span: SpanId,
    parent: SpanId,
    name: String,
    (start_time, end_time): (SystemTime, SystemTime),
    attributes: Vec<KeyValue>,
) -> SpanData {
    SpanData {
        span_context: SpanContext::new(trace, span, TraceFlags::SAMPLED, false, TraceState::default()),
        parent_span_id: parent,
        parent_span_is_remote: false,
        span_kind: SpanKind::Internal,
        name: name.into(),
        start_time,
        end_time,
        attributes,
        dropped_attributes_count: 0,
        events: SpanEvents::default(),
        links: SpanLinks::default(),
        status: Status::Unset,
        instrumentation_scope: InstrumentationScope::builder("tunefleet").build(),
    }
}

/// What is under way of each job, to make spans of its events.
#[derive(Debug)]
pub struct Tracer {
    cluster: String,
    jobs: BTreeMap<String, Open>,
}

#[derive(Debug, Default)]
struct Open {
    attempt: u32,
    began_unix_ms: u64,
    /// Name and beginning.
    stage: Option<(&'static str, u64)>,
    waits_since_unix_ms: Option<u64>,
    evaluates_since_unix_ms: Option<u64>,
}

impl Tracer {
    /// Nothing is under way on `cluster`.
    pub fn new(cluster: &str) -> Self {
        Tracer { cluster: cluster.to_owned(), jobs: BTreeMap::new() }
    }

    /// What has ended with this event.
    pub fn take(&mut self, event: &JobEvent) -> Vec<Ended> {
        let mut ended = Vec::new();
        let now = event.unix_ms;
        let ids = Ids { cluster: &self.cluster, event };
        let open = self.jobs.entry(event.job.clone()).or_default();
        if open.attempt != event.attempt {
            *open = Open { attempt: event.attempt, began_unix_ms: now, ..Open::default() };
        }
        if !matches!(event.body, Some(Body::Waiting(_)))
            && let Some(since) = open.waits_since_unix_ms.take()
        {
            ended.push(ids.child("wait for slots", since, now));
        }
        match &event.body {
            Some(Body::Waiting(_)) => drop(open.waits_since_unix_ms.get_or_insert(now)),
            Some(Body::Stage(changed)) => {
                let name = changed.stage().name();
                match changed.what() {
                    What::Started => open.stage = Some((name, now)),
                    What::Cached | What::Unspecified => {}
                    What::Done => ended.extend(ids.stage(open.stage.take(), None)),
                }
            }
            Some(Body::Section(section)) if section == "evaluate" => open.evaluates_since_unix_ms = Some(now),
            Some(Body::Evaluated(evaluated)) => {
                if let Some(since) = open.evaluates_since_unix_ms.take() {
                    let mut span = ids.child("evaluate", since, now);
                    span.attributes.push(("tunefleet.step", evaluated.step.to_string()));
                    span.attributes.push(("tunefleet.loss", evaluated.loss.to_string()));
                    ended.push(span);
                }
            }
            Some(Body::Saved(saved)) => {
                let pause_ms = (saved.pause_seconds * 1000.0) as u64;
                let mut span = ids.child("checkpoint", now.saturating_sub(pause_ms), now);
                span.attributes.push(("tunefleet.step", saved.step.to_string()));
                span.attributes.push(("tunefleet.path", saved.path.clone()));
                ended.push(span);
            }
            Some(Body::AttemptEnded(outcome)) => {
                let failure = outcome.failure.clone().unwrap_or_default();
                ended.extend(ids.stage(open.stage.take(), Some(&failure.cause)));
                let mut span = ids.attempt(open.began_unix_ms, Some(&failure.cause));
                span.attributes.push(("tunefleet.cause", failure.kind().name().to_owned()));
                span.attributes.push(("tunefleet.decision", outcome.decision.clone()));
                ended.push(span);
                // Its last words were these: what follows belongs to no attempt.
                open.began_unix_ms = 0;
            }
            Some(Body::State(changed))
                if changed.state().is_end() || changed.state() == JobState::Suspended =>
            {
                let cause = changed.failure.as_ref().map(|failure| failure.cause.as_str());
                ended.extend(ids.stage(open.stage.take(), cause));
                if open.began_unix_ms > 0 {
                    let mut span = ids.attempt(open.began_unix_ms, cause);
                    span.attributes.push(("tunefleet.state", changed.state().name().to_owned()));
                    ended.push(span);
                }
                self.jobs.remove(&event.job);
            }
            _ => {}
        }
        ended
    }
}

/// Names of what an event is about.
struct Ids<'a> {
    cluster: &'a str,
    event: &'a JobEvent,
}

impl Ids<'_> {
    fn digest(&self, what: &str) -> [u8; 32] {
        let JobEvent { job, attempt, .. } = self.event;
        Sha256::digest(format!("{}\n{job}\n{attempt}\n{what}", self.cluster)).into()
    }

    fn trace(&self) -> TraceId {
        let mut bytes = [0; 16];
        bytes.copy_from_slice(&self.digest("trace")[..16]);
        TraceId::from_bytes(bytes)
    }

    fn span(&self, what: &str) -> SpanId {
        let mut bytes = [0; 8];
        bytes.copy_from_slice(&self.digest(what)[..8]);
        SpanId::from_bytes(bytes)
    }

    fn ended(&self, name: String, span: SpanId, parent: SpanId, (began, ended): (u64, u64)) -> Ended {
        Ended {
            trace: self.trace(),
            span,
            parent,
            name,
            began_unix_ms: began,
            ended_unix_ms: ended,
            attributes: vec![
                ("tunefleet.job", self.event.job.clone()),
                ("tunefleet.attempt", self.event.attempt.to_string()),
            ],
            error: None,
        }
    }

    fn attempt(&self, began: u64, error: Option<&str>) -> Ended {
        let name = format!("attempt {}", self.event.attempt);
        let span = self.ended(name, self.span("attempt"), SpanId::INVALID, (began, self.event.unix_ms));
        Ended { error: error.map(str::to_owned), ..span }
    }

    fn child(&self, name: &str, began: u64, ended: u64) -> Ended {
        let span = self.span(&format!("{name} {began}"));
        self.ended(name.to_owned(), span, self.span("attempt"), (began, ended))
    }

    fn stage(&self, stage: Option<(&'static str, u64)>, error: Option<&str>) -> Option<Ended> {
        let (name, began) = stage?;
        let span = self.child(name, began, self.event.unix_ms);
        Some(Ended { error: error.map(str::to_owned), ..span })
    }
}

#[cfg(test)]
mod tests {
    use tunefleet_proto::rpc::{
        AttemptEnded, Failure, FailureKind, Saved, Stage, StageChanged, StateChanged, Waiting,
    };

    use super::*;

    fn stage(stage: Stage, what: What) -> Body {
        Body::Stage(StageChanged { stage: stage.into(), what: what.into(), ..StageChanged::default() })
    }

    #[test]
    fn an_attempt_is_a_trace_of_what_it_did_and_what_it_waited_for() {
        let failure = Failure {
            cause: "ended by signal 9".to_owned(),
            kind: FailureKind::Signal.into(),
            ..Failure::default()
        };
        let state =
            |state: JobState| Body::State(StateChanged { state: state.into(), ..StateChanged::default() });
        let events = [
            (1, 0, stage(Stage::Train, What::Started)),
            (1, 10, Body::Waiting(Waiting::default())),
            (1, 15, Body::Waiting(Waiting { free: 1, ..Waiting::default() })),
            (1, 40, Body::Section("step".to_owned())),
            (1, 90, Body::Saved(Saved { step: 5, path: "p".to_owned(), pause_seconds: 0.02 })),
            (
                1,
                100,
                Body::AttemptEnded(AttemptEnded {
                    failure: Some(failure),
                    restarts: true,
                    ..AttemptEnded::default()
                }),
            ),
            (1, 100, state(JobState::Restarting)),
            (2, 200, stage(Stage::Train, What::Started)),
            (2, 300, stage(Stage::Train, What::Done)),
            (2, 310, state(JobState::Completed)),
        ];
        let mut tracer = Tracer::new("cluster");
        let spans: Vec<Ended> = events
            .into_iter()
            .flat_map(|(attempt, unix_ms, body)| {
                tracer.take(&JobEvent {
                    job: "j".to_owned(),
                    attempt,
                    unix_ms: 1000 + unix_ms,
                    body: Some(body),
                    ..JobEvent::default()
                })
            })
            .collect();
        let told: Vec<_> = spans
            .iter()
            .map(|span| {
                (
                    span.name.as_str(),
                    span.began_unix_ms - 1000,
                    span.ended_unix_ms - 1000,
                    span.error.is_some(),
                )
            })
            .collect();
        assert_eq!(
            told,
            [
                ("wait for slots", 10, 40, false),
                ("checkpoint", 70, 90, false),
                ("train", 0, 100, true),
                ("attempt 1", 0, 100, true),
                ("train", 200, 300, false),
                ("attempt 2", 200, 310, false),
            ]
        );
        let root = &spans[3];
        assert!(spans[..3].iter().all(|span| span.parent == root.span && span.trace == root.trace));
        assert_eq!(root.parent, SpanId::INVALID);
        assert_ne!(spans[5].trace, root.trace, "another attempt is another trace");
        assert!(tracer.jobs.is_empty());
    }
}
