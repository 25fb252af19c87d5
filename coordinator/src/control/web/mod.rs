//! The page for people: jobs, workers, one job with its curves, events and logs. It comes from the address that
//! `coordinator` verbs speak to, behind the same guard; it shows, and changes nothing.
//!
//! `assets` is what a browser loads once, `session` who is logged in, `pulse` all jobs and workers once a second,
//! `curves` the logged values of a job, `live` what browsers follow.

mod assets;
mod curves;
mod live;
mod pulse;
mod session;

use std::sync::Arc;

use axum::Router;
use axum::extract::{DefaultBodyLimit, Path, State};
use axum::http::{HeaderName, HeaderValue, StatusCode, header};
use axum::middleware::map_response;
use axum::response::{IntoResponse, Json, Response};
use axum::routing::{get, post};
use serde_json::{Value, json};
use tonic::{Code, Status};

use super::access::Role;
use super::guard::Guard;
use super::plane::{Message, Plane};
use crate::jobs;

pub use session::{host_is_local, token};

/// Largest body that anybody sends: a token.
const MAX_BODY_BYTES: usize = 4096;
/// Nothing from elsewhere, nothing inline, in no frame.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; \
                      base-uri 'none'; form-action 'self'; frame-ancestors 'none'";

/// What the routes share.
#[derive(Clone)]
pub struct Web {
    plane: Plane,
    guard: Guard,
    pulse: Arc<pulse::Pulse>,
    curves: Arc<curves::Cache>,
    /// Whether the cookie may only travel over TLS.
    is_tls: bool,
}

impl Web {
    /// The page in front of `plane`.
    pub fn new(plane: Plane, guard: Guard, is_tls: bool) -> Self {
        let pulse = Arc::new(pulse::Pulse::start(plane.clone()));
        Web { plane, guard, pulse, curves: Arc::default(), is_tls }
    }

    /// Its routes.
    pub fn router(self) -> Router {
        Router::new()
            .route("/", get(assets::index))
            .route("/assets/{name}", get(assets::asset))
            .route("/login", post(session::login))
            .route("/logout", post(session::logout))
            .route("/api/session", get(session::session))
            .route("/api/fleet", get(live::fleet))
            .route("/api/jobs/{job}", get(job))
            .route("/api/jobs/{job}/curves", get(curves::curves))
            .route("/api/jobs/{job}/events", get(live::events))
            .route("/api/jobs/{job}/logs", get(live::logs))
            .layer(DefaultBodyLimit::max(MAX_BODY_BYTES))
            .layer(map_response(harden))
            .with_state(self)
    }
}

/// What a path of the page needs; `Err` where it is no path of the page.
pub fn needed(path: &str) -> Result<Option<Role>, ()> {
    match path {
        "/" | "/login" | "/logout" => Ok(None),
        _ if path.starts_with("/assets/") => Ok(None),
        _ if path.starts_with("/api/") => Ok(Some(Role::Viewer)),
        _ => Err(()),
    }
}

/// Why not, for a browser.
pub fn refusal(status: &Status) -> Response {
    let code = match status.code() {
        Code::Unauthenticated => StatusCode::UNAUTHORIZED,
        Code::PermissionDenied => StatusCode::FORBIDDEN,
        Code::ResourceExhausted => StatusCode::TOO_MANY_REQUESTS,
        Code::NotFound => StatusCode::NOT_FOUND,
        Code::InvalidArgument => StatusCode::BAD_REQUEST,
        Code::Unavailable => StatusCode::SERVICE_UNAVAILABLE,
        _ => StatusCode::INTERNAL_SERVER_ERROR,
    };
    (code, Json(json!({ "error": status.message() }))).into_response()
}

async fn harden(mut response: Response) -> Response {
    let headers = response.headers_mut();
    for (name, value) in [
        (header::CONTENT_SECURITY_POLICY, POLICY),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::REFERRER_POLICY, "no-referrer"),
        (HeaderName::from_static("cross-origin-resource-policy"), "same-origin"),
    ] {
        headers.insert(name, HeaderValue::from_static(value));
    }
    headers.entry(header::CACHE_CONTROL).or_insert(HeaderValue::from_static("no-store"));
    response
}

async fn job(State(web): State<Web>, Path(job): Path<String>) -> Result<Json<Value>, Response> {
    let status =
        web.plane.ask(|reply| Message::Status { job, reply }).await.map_err(|status| refusal(&status))?;
    Ok(Json(jobs::to_json(&status)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_shows_jobs_needs_a_role_and_other_paths_are_none_of_the_page() {
        assert_eq!(needed("/"), Ok(None));
        assert_eq!(needed("/assets/main.js"), Ok(None));
        assert_eq!(needed("/api/fleet"), Ok(Some(Role::Viewer)));
        assert_eq!(needed("/tunefleet.v1.Control/List"), Err(()));
        assert_eq!(needed("/apis"), Err(()));
    }
}
