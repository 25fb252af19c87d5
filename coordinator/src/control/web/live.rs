//! What browsers follow, as server-sent events.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use axum::extract::{Extension, Path, Query, State};
use axum::http::HeaderMap;
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use serde::Deserialize;
use serde_json::json;
use tokio::sync::mpsc;
use tokio_stream::StreamExt;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;
use tunefleet_proto::rpc::{LogLines, LogsRequest};

use super::pulse::{Rows, change};
use super::{Web, refusal};
use crate::control::guard::Caller;
use crate::control::plane::Message;
use crate::control::streams::{self, Until, WINDOW, Watcher};
use crate::events;

/// A connection that nothing else is said over stays open through proxies.
const KEEP_ALIVE: Duration = Duration::from_secs(15);
/// Lines of a log that are shown at first.
const TAIL_LINES: u32 = 500;

/// All jobs and workers at first, then what changes.
pub async fn fleet(State(web): State<Web>, Extension(who): Extension<Caller>) -> Response {
    let (sender, receiver) = mpsc::channel(WINDOW);
    let mut newest = web.pulse.watch();
    tokio::spawn(async move {
        let mut shown: Option<(Rows, Rows)> = None;
        loop {
            let snapshot = newest.borrow_and_update().as_ref().map(Arc::clone);
            if web.guard.admits_still(&who).is_err() {
                return;
            }
            if let Some(snapshot) = snapshot {
                let before = shown.as_ref();
                let changes = [
                    ("jobs", change(before.map(|(jobs, _)| jobs), &snapshot.jobs)),
                    ("workers", change(before.map(|(_, workers)| workers), &snapshot.workers)),
                ];
                shown = Some((snapshot.jobs.clone(), snapshot.workers.clone()));
                for (name, change) in changes {
                    if let Some(change) = change
                        && sender.send(Event::default().event(name).data(change)).await.is_err()
                    {
                        return;
                    }
                }
            }
            tokio::select! {
                changed = newest.changed() => if changed.is_err() { return },
                () = sender.closed() => return,
            }
        }
    });
    sse(receiver)
}

#[derive(Deserialize)]
pub struct After {
    #[serde(default)]
    after: u64,
}

/// The events of a job after one of them. A browser that lost its connection goes on where it was.
pub async fn events(
    State(web): State<Web>,
    Extension(who): Extension<Caller>,
    Path(job): Path<String>,
    Query(After { after }): Query<After>,
    headers: HeaderMap,
) -> Result<Response, Response> {
    let seen = headers.get("last-event-id").and_then(|id| id.to_str().ok()?.parse().ok());
    let log =
        web.plane.ask(|reply| Message::Events { job, reply }).await.map_err(|status| refusal(&status))?;
    let watcher = Watcher { who, guard: web.guard };
    let mut told = streams::events(log, seen.unwrap_or(after), Until::Left, watcher);
    let (sender, receiver) = mpsc::channel(WINDOW);
    tokio::spawn(async move {
        while let Some(Ok(event)) = told.recv().await {
            let line = Event::default().event("event").id(event.sequence.to_string());
            if sender.send(line.data(events::to_json(&event).to_string())).await.is_err() {
                return;
            }
        }
    });
    Ok(sse(receiver))
}

#[derive(Deserialize)]
pub struct Which {
    #[serde(default)]
    attempt: u32,
    rank: Option<u32>,
}

/// The last lines of logs, then what is written.
pub async fn logs(
    State(web): State<Web>,
    Extension(who): Extension<Caller>,
    Path(job): Path<String>,
    Query(Which { attempt, rank }): Query<Which>,
) -> Response {
    let what =
        LogsRequest { job, attempt, rank, follow: true, tail_lines: TAIL_LINES, ..LogsRequest::default() };
    let watcher = Watcher { who, guard: web.guard.clone() };
    let (sender, receiver) = mpsc::channel(WINDOW);
    tokio::spawn(async move {
        let fault = |status: &Status| {
            Event::default().event("fault").data(json!({ "error": status.message() }).to_string())
        };
        match streams::logs(&web.plane, what, watcher).await {
            Err(status) => drop(sender.send(fault(&status)).await),
            Ok(mut told) => {
                while let Some(lines) = told.recv().await {
                    let event = lines.as_ref().map_or_else(fault, line);
                    if sender.send(event).await.is_err() {
                        return;
                    }
                }
                let _ = sender.send(Event::default().event("over").data("{}")).await;
            }
        }
    });
    sse(receiver)
}

fn line(told: &LogLines) -> Event {
    let data = json!({ "worker": told.worker, "rank": told.rank, "stage": told.stage().name(), "lines": told.lines });
    Event::default().event("lines").data(data.to_string())
}

fn sse(receiver: mpsc::Receiver<Event>) -> Response {
    let stream = ReceiverStream::new(receiver).map(Ok::<_, Infallible>);
    Sse::new(stream).keep_alive(KeepAlive::new().interval(KEEP_ALIVE)).into_response()
}
