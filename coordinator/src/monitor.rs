//! What machines ask a coordinator over plain HTTP: `/metrics` and `/sd/targets` for Prometheus, `/healthz` and
//! `/readyz` for whoever restarts it. Nothing here names a secret, and nothing can be changed here.

use std::net::SocketAddr;
use std::time::Duration;

use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use serde::Serialize;
use tunefleet_proto::rpc::Stage;

use crate::control::{self, Figures, Plane, ServeError};
use crate::metrics;

/// Prometheus' own content type for its text format.
const TEXT_FORMAT: &str = "text/plain; version=0.0.4; charset=utf-8";
/// How long the control plane may take to answer before it counts as not ready.
const READY_LIMIT: Duration = Duration::from_secs(2);

/// Serves these pages at `address` in the background; their URL.
///
/// # Errors
/// When it cannot listen there.
pub async fn serve(address: SocketAddr, plane: Plane) -> Result<String, ServeError> {
    let listener = control::bind(address).await?;
    let address = listener.local_addr().unwrap_or(address);
    let router = Router::new()
        .route("/metrics", get(page))
        .route("/sd/targets", get(targets))
        .route("/healthz", get(healthy))
        .route("/readyz", get(ready))
        .with_state(plane);
    tokio::spawn(async move { axum::serve(listener, router).await });
    Ok(format!("http://{address}/metrics"))
}

async fn page(State(plane): State<Plane>) -> Response {
    let figures = match plane.figures().await {
        Ok(figures) => figures,
        Err(status) => return (StatusCode::SERVICE_UNAVAILABLE, status.message().to_owned()).into_response(),
    };
    // It looks at file systems, which may be slow.
    match tokio::task::spawn_blocking(move || metrics::page(&figures)).await {
        Ok(Ok(page)) => ([(header::CONTENT_TYPE, TEXT_FORMAT)], page).into_response(),
        Ok(Err(error)) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response(),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response(),
    }
}

/// This process answers. What its jobs do is no reason to restart it, nor is a disk that is full.
async fn healthy() -> &'static str {
    "ok\n"
}

/// The control plane takes jobs.
async fn ready(State(plane): State<Plane>) -> Response {
    match tokio::time::timeout(READY_LIMIT, plane.figures()).await {
        Ok(Ok(_)) => "ok\n".into_response(),
        Ok(Err(status)) => (StatusCode::SERVICE_UNAVAILABLE, status.message().to_owned()).into_response(),
        Err(_) => (StatusCode::SERVICE_UNAVAILABLE, "the control plane is held up\n").into_response(),
    }
}

/// A group of targets, as Prometheus' HTTP service discovery reads it.
#[derive(Debug, PartialEq, Eq, Serialize)]
struct Target {
    targets: Vec<String>,
    labels: Labels,
}

#[derive(Debug, PartialEq, Eq, Serialize)]
struct Labels {
    #[serde(rename = "__metrics_path__")]
    path: String,
    #[serde(rename = "__scheme__")]
    scheme: String,
    /// `worker` or `server`.
    #[serde(rename = "tunefleet_role")]
    role: &'static str,
    /// Absent of a completion server.
    #[serde(skip_serializing_if = "Option::is_none")]
    worker: Option<String>,
    /// Absent of a worker; Prometheus' own `job` stays what it is.
    #[serde(rename = "tunefleet_job", skip_serializing_if = "Option::is_none")]
    job: Option<String>,
}

async fn targets(State(plane): State<Plane>) -> Response {
    match plane.figures().await {
        Ok(figures) => Json(discovered(&figures)).into_response(),
        Err(status) => (StatusCode::SERVICE_UNAVAILABLE, status.message().to_owned()).into_response(),
    }
}

/// Every worker, and every completion server of a job.
fn discovered(figures: &Figures) -> Vec<Target> {
    let workers = figures.workers.iter().filter_map(|worker| {
        let url = &worker.registered.as_ref()?.metrics_url;
        target(url, "worker", Some(&worker.name), None)
    });
    let servers = figures.jobs.iter().filter(|job| job.status.stage() == Stage::Serve).filter_map(|job| {
        let url = format!("http://{}/metrics", job.serve_listen.as_deref()?);
        target(&url, "server", None, Some(&job.status.job))
    });
    workers.chain(servers).collect()
}

fn target(url: &str, role: &'static str, worker: Option<&str>, job: Option<&str>) -> Option<Target> {
    let url: http::Uri = url.parse().ok()?;
    let labels = Labels {
        path: url.path().to_owned(),
        scheme: url.scheme_str().unwrap_or("http").to_owned(),
        role,
        worker: worker.map(str::to_owned),
        job: job.map(str::to_owned),
    };
    Some(Target { targets: vec![url.authority()?.to_string()], labels })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_target_is_what_prometheus_reads() {
        let found = target("http://10.0.0.7:9101/metrics", "worker", Some("w1"), None);
        assert_eq!(
            serde_json::to_value(found).unwrap(),
            serde_json::json!({"targets": ["10.0.0.7:9101"], "labels": {
                "__metrics_path__": "/metrics", "__scheme__": "http", "tunefleet_role": "worker", "worker": "w1",
            }})
        );
        assert_eq!(target("", "worker", Some("w1"), None), None);
    }
}
