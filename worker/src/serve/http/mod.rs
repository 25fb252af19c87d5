//! The routes, each in the shape that its clients send and read.

/// What every route needs: bodies, answers, errors.
mod exchange;
/// Text Generation Inference and the Hugging Face inference API: `/`, `/generate`, `/models/...`.
mod native;
/// OpenAI: `/v1/completions`, `/v1/chat/completions`, `/v1/models`.
mod openai;
/// llama.cpp and Ollama: `/infill`, `/lora-adapters`, `/api/generate`.
mod others;

use std::sync::Arc;
use std::time::Instant;

use axum::Router;
use axum::body::Body;
use axum::extract::{DefaultBodyLimit, Request, State};
use axum::http::{StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use sha2::{Digest, Sha256};

use super::server::Server;
use exchange::{Dialect, Refusal};

/// Largest body: a prompt of a model's whole window, escaped, several times over.
const MAX_BODY_BYTES: usize = 8 << 20;

/// What routes share.
#[derive(Clone)]
pub struct Shared {
    /// The model.
    pub server: Arc<Server>,
    /// Digests of tokens, one of which a request must bear; none lets everybody in.
    pub tokens: Arc<[[u8; 32]]>,
}

/// All routes.
pub fn router(shared: Shared) -> Router {
    let guarded = Router::new()
        .route("/", post(native::compatible))
        .route("/models/{*name}", post(native::compatible))
        .route("/generate", post(native::generate))
        .route("/generate_stream", post(native::generate_stream))
        .route("/info", get(native::info))
        .route("/tokenize", post(native::tokenize))
        .route("/v1/completions", post(openai::completions))
        .route("/v1/chat/completions", post(openai::chat))
        .route("/v1/models", get(openai::models))
        .route("/v1/load_lora_adapter", post(openai::load_adapter))
        .route("/v1/unload_lora_adapter", post(openai::unload_adapter))
        .route("/infill", post(others::infill))
        .route("/lora-adapters", get(others::adapters).post(others::weigh_adapters))
        .route("/api/generate", post(others::ollama))
        .layer(middleware::from_fn_with_state(shared.clone(), guard));
    Router::new()
        .route("/", get(healthy))
        .route("/health", get(healthy))
        .route("/ping", get(healthy))
        .route("/metrics", get(metrics))
        .merge(guarded)
        .fallback(nothing_here)
        .layer(DefaultBodyLimit::max(MAX_BODY_BYTES))
        .layer(middleware::from_fn(log))
        .with_state(shared)
}

async fn healthy() -> StatusCode {
    StatusCode::OK
}

async fn metrics(State(shared): State<Shared>) -> Response {
    match super::metrics::page(shared.server.engine.gauges()) {
        Ok(page) => {
            ([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], page).into_response()
        }
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response(),
    }
}

async fn nothing_here(request: Request) -> Response {
    let message = format!("there is no {} here", request.uri().path());
    Refusal::new(StatusCode::NOT_FOUND, "not_found", message).in_dialect(Dialect::of(request.uri().path()))
}

/// Lets those in who bear a token.
async fn guard(State(shared): State<Shared>, request: Request<Body>, next: Next) -> Response {
    let borne = request
        .headers()
        .get(header::AUTHORIZATION)
        .and_then(|value| value.to_str().ok())
        .and_then(|value| value.strip_prefix("Bearer "));
    let is_known = shared.tokens.is_empty()
        || borne.is_some_and(|token| {
            let digest: [u8; 32] = Sha256::digest(token.trim().as_bytes()).into();
            // Of digests, a comparison tells nothing that is worth knowing.
            shared.tokens.contains(&digest)
        });
    if is_known {
        return next.run(request).await;
    }
    let message = "a bearer token that this server knows is needed: send `Authorization: Bearer TOKEN`";
    let refusal = Refusal::new(StatusCode::UNAUTHORIZED, "authentication", message.to_owned());
    refusal.in_dialect(Dialect::of(request.uri().path())).into_response()
}

/// One line for each request; never what was asked.
async fn log(request: Request<Body>, next: Next) -> Response {
    let (method, path) = (request.method().clone(), request.uri().path().to_owned());
    let began = Instant::now();
    let response = next.run(request).await;
    let status = response.status().as_u16();
    super::metrics::request(&path, status, began.elapsed());
    tracing::info!(%method, path, status, ms = began.elapsed().as_millis() as u64, "request");
    response
}
