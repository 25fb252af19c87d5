//! Bodies in, answers and errors out.

use std::convert::Infallible;

use axum::body::Bytes;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::sse::{Event as SseEvent, Sse};
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use tokio_stream::wrappers::UnboundedReceiverStream;

use crate::serve::engine::Refused;
use crate::serve::engine::request::Failure;
use crate::serve::server::Error;

/// Whose errors a route has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dialect {
    /// `{"error", "error_type"}`
    Native,
    /// `{"error": {"message", ...}}`, and `detail`, which llm-ls reads.
    OpenAi,
    /// `{"error"}`
    Plain,
}

impl Dialect {
    /// By route.
    pub fn of(path: &str) -> Self {
        match path {
            path if path.starts_with("/v1/") => Dialect::OpenAi,
            "/infill" | "/lora-adapters" | "/api/generate" => Dialect::Plain,
            _ => Dialect::Native,
        }
    }
}

/// Why a request is not answered.
#[derive(Debug)]
pub struct Refusal {
    status: StatusCode,
    kind: &'static str,
    message: String,
}

impl Refusal {
    pub fn new(status: StatusCode, kind: &'static str, message: String) -> Self {
        Refusal { status, kind, message }
    }

    /// A body that is not what the route takes.
    pub fn body(message: String) -> Self {
        Refusal::new(StatusCode::UNPROCESSABLE_ENTITY, "validation", message)
    }

    pub fn in_dialect(self, dialect: Dialect) -> Response {
        let Refusal { mut status, kind, message } = self;
        if dialect == Dialect::OpenAi && status == StatusCode::UNPROCESSABLE_ENTITY {
            status = StatusCode::BAD_REQUEST;
        }
        let body = error_body(dialect, kind, &message);
        let mut response = json_response(status, &body);
        if status == StatusCode::TOO_MANY_REQUESTS {
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from_static("1"));
        }
        response
    }
}

/// What a client of `dialect` reads of an error.
pub fn error_body(dialect: Dialect, kind: &str, message: &str) -> Value {
    match dialect {
        Dialect::Native => json!({ "error": message, "error_type": kind }),
        Dialect::OpenAi => json!({
            "error": { "message": message, "type": kind, "param": null, "code": null },
            "detail": [{ "loc": ["body"], "msg": message, "type": kind }],
        }),
        Dialect::Plain => json!({ "error": message }),
    }
}

impl From<Error> for Refusal {
    fn from(error: Error) -> Self {
        let (status, kind) = match &error {
            Error::Invalid(_) | Error::Adapter(_) => (StatusCode::UNPROCESSABLE_ENTITY, "validation"),
            Error::Unknown { .. } => (StatusCode::NOT_FOUND, "not_found"),
            Error::Refused(Refused::Busy) => (StatusCode::TOO_MANY_REQUESTS, "overloaded"),
            Error::Refused(Refused::Ending) | Error::Failed(Failure::Ending) => {
                (StatusCode::SERVICE_UNAVAILABLE, "unhealthy")
            }
            Error::Failed(Failure::TimedOut) => (StatusCode::REQUEST_TIMEOUT, "timeout"),
            Error::Failed(Failure::AdapterGone) => (StatusCode::NOT_FOUND, "not_found"),
            Error::Failed(Failure::Model(_)) => (StatusCode::FAILED_DEPENDENCY, "generation"),
        };
        Refusal::new(status, kind, error.to_string())
    }
}

/// A body as what the route takes; unknown fields are passed over.
pub fn parse<T: DeserializeOwned>(body: &Bytes) -> Result<T, Refusal> {
    serde_json::from_slice(body)
        .map_err(|error| Refusal::body(format!("the body is not understood: {error}")))
}

/// An answer in JSON.
pub fn json_response(status: StatusCode, body: &impl Serialize) -> Response {
    let bytes = serde_json::to_vec(body).unwrap_or_default();
    (status, [(header::CONTENT_TYPE, "application/json")], bytes).into_response()
}

/// What a route has made: JSON with status 200, or its refusal in the route's dialect.
pub fn answer(dialect: Dialect, outcome: Result<impl Serialize, Refusal>) -> Response {
    match outcome {
        Ok(body) => json_response(StatusCode::OK, &body),
        Err(refusal) => refusal.in_dialect(dialect),
    }
}

/// The sending end of a stream of server-sent events. When the client goes, what it is made from is dropped.
pub type Lines = tokio::sync::mpsc::UnboundedSender<Result<SseEvent, Infallible>>;

/// A stream of what `make` sends.
pub fn stream<F, Made>(make: F) -> Response
where
    F: FnOnce(Lines) -> Made,
    Made: Future<Output = ()> + Send + 'static,
{
    let (sender, receiver) = tokio::sync::mpsc::unbounded_channel();
    let (gone, made) = (sender.clone(), make(sender));
    // Who goes away is noticed at once, not with the next token.
    tokio::spawn(async move {
        tokio::select! { () = made => {}, () = gone.closed() => {} }
    });
    let mut response = Sse::new(UnboundedReceiverStream::new(receiver)).into_response();
    // Proxies shall not gather what is to be seen at once.
    response.headers_mut().insert("x-accel-buffering", HeaderValue::from_static("no"));
    response
}

/// Sends an object as an event; false when nobody listens.
pub fn send(lines: &Lines, body: &impl Serialize) -> bool {
    let data = serde_json::to_string(body).unwrap_or_default();
    lines.send(Ok(SseEvent::default().data(data))).is_ok()
}

/// Sends the mark that ends OpenAI's streams.
pub fn send_done(lines: &Lines) {
    let _ = lines.send(Ok(SseEvent::default().data("[DONE]")));
}
