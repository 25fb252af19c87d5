//! What machines ask a daemon over plain HTTP: `/metrics` for Prometheus, `/healthz` and `/readyz` for whoever
//! restarts it.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use tokio::net::TcpListener;

use super::examine::gpus;
use super::ranks::Ranks;
use crate::metrics::{self, Figures, RankFigures};

/// Prometheus' own content type for its text format.
const TEXT_FORMAT: &str = "text/plain; version=0.0.4; charset=utf-8";

/// Serves these pages until the future is dropped.
pub(super) async fn serve(listener: TcpListener, ranks: Arc<Ranks>) -> std::io::Result<()> {
    let router = Router::new()
        .route("/metrics", get(page))
        .route("/healthz", get(async || "ok\n"))
        .route("/readyz", get(ready))
        .with_state(ranks);
    axum::serve(listener, router).await
}

async fn page(State(ranks): State<Arc<Ranks>>) -> Response {
    // A driver may take its time.
    let page = tokio::task::spawn_blocking(move || metrics::page(&figures(&ranks))).await;
    match page {
        Ok(Ok(page)) => ([(header::CONTENT_TYPE, TEXT_FORMAT)], page).into_response(),
        Ok(Err(error)) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response(),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response(),
    }
}

/// The coordinator knows this worker. One that it does not know still looks after its ranks.
async fn ready(State(ranks): State<Arc<Ranks>>) -> Response {
    if ranks.is_connected.load(Ordering::Acquire) {
        "ok\n".into_response()
    } else {
        (StatusCode::SERVICE_UNAVAILABLE, "no session with the coordinator\n").into_response()
    }
}

fn figures(ranks: &Ranks) -> Figures {
    let shown = ranks.shown().into_iter().map(|(key, assignment, last_step, beat)| {
        let device = assignment.cuda_device.and_then(|gpu| ranks.node.devices.get(gpu as usize));
        RankFigures {
            stage: key.task().stage().name(),
            job: key.job,
            rank: key.rank,
            gpu_uuid: device.map(|device| device.uuid.clone()).unwrap_or_default(),
            last_step,
            beat,
        }
    });
    Figures {
        slots: ranks.node.slots,
        is_connected: ranks.is_connected.load(Ordering::Acquire),
        unacknowledged: ranks.unacknowledged(),
        exits: [&ranks.clean_exits, &ranks.failed_exits].map(|count| count.load(Ordering::Relaxed)),
        ranks: shown.collect(),
        gpus: if ranks.node.gpus > 0 { gpus::figures() } else { Vec::new() },
    }
}
