//! Who is let in: every call passes here first, and what is refused is noted.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Instant;

use http::HeaderMap;
use tonic::body::Body;
use tonic::{Code, Request, Status};
use tower::{Layer, Service};
use tunefleet_proto::rpc::{self, AuditRecord};

use super::access::{Access, Role};
use super::events::unix_ms;
use super::listen::Peer;
use super::plane::Plane;
use super::tls::Certificate;
use super::web;
use crate::{metrics, traces};

/// Calls of one caller: so many at once, and so many a second.
const CALLS: Rate = Rate { burst: 400.0, per_second: 200.0 };
/// Refusals that one address can have noted; others are refused and not noted.
const REFUSALS: Rate = Rate { burst: 30.0, per_second: 0.5 };
/// Callers whose rate is known.
const MAX_CALLERS: usize = 4096;
/// Longest text of a stranger that is noted.
const MAX_NOTED: usize = 300;
/// The one call of workers.
const SESSION: &str = "/tunefleet.v1.Workers/Session";

/// Calls that are known, and what they need.
const NEEDED: [(&str, Role); 15] = [
    ("Watch", Role::Viewer),
    ("List", Role::Viewer),
    ("Status", Role::Viewer),
    ("Logs", Role::Viewer),
    ("ListWorkers", Role::Viewer),
    ("Version", Role::Viewer),
    ("Submit", Role::User),
    ("Cancel", Role::User),
    ("Suspend", Role::User),
    ("Resume", Role::User),
    ("Doctor", Role::User),
    ("Drain", Role::Admin),
    ("Undrain", Role::Admin),
    ("Audit", Role::Admin),
    ("Session", Role::Worker),
];

/// The name of a call in metrics; what strangers make up is one.
fn method(path: &str) -> &'static str {
    let call = path.rsplit('/').next().unwrap_or_default();
    NEEDED.iter().find(|(known, _)| *known == call).map_or("other", |(known, _)| known)
}

/// What a call needs. A call that is not listed needs all.
fn needed(path: &str) -> Role {
    let Some(call) = path.strip_prefix("/tunefleet.v1.Control/") else {
        return if path == SESSION { Role::Worker } else { Role::Admin };
    };
    let known = NEEDED.iter().filter(|(_, role)| *role != Role::Worker).find(|(known, _)| *known == call);
    known.map_or(Role::Admin, |(_, role)| *role)
}

/// Who calls, and by what right.
#[derive(Debug, Clone)]
pub struct Caller {
    /// Its name in the audit.
    pub name: String,
    /// Where it calls from.
    pub peer: SocketAddr,
    proof: Proof,
}

#[derive(Debug, Clone)]
enum Proof {
    /// A program on this machine, where no tokens are asked for.
    Near,
    /// A token with this SHA-256.
    Token(String),
    Certificate(Arc<Certificate>),
}

impl Caller {
    /// Whether it may be the worker of this name.
    ///
    /// # Errors
    /// When its certificate is for another.
    pub fn may_be(&self, worker: &str) -> Result<(), Status> {
        match &self.proof {
            Proof::Certificate(shown) if !shown.names.iter().any(|name| name == worker) => {
                let names = shown.names.join(", ");
                Err(Status::permission_denied(format!("worker {worker} shows a certificate for {names}")))
            }
            _ => Ok(()),
        }
    }
}

/// The one at the door.
#[derive(Clone)]
pub struct Guard(Arc<Inner>);

struct Inner {
    plane: Plane,
    access: Access,
    /// Workers show certificates, and tokens are not enough for them.
    asks_for_certificates: bool,
    calls: Mutex<Limits>,
    refusals: Mutex<Limits>,
}

impl Guard {
    /// A guard with these rules, who notes in `plane`.
    pub fn new(plane: Plane, access: Access, asks_for_certificates: bool) -> Self {
        let limits = |rate| Mutex::new(Limits { rate, of: HashMap::new() });
        Guard(Arc::new(Inner {
            plane,
            access,
            asks_for_certificates,
            calls: limits(CALLS),
            refusals: limits(REFUSALS),
        }))
    }

    /// Notes that somebody was not let in, unless that address is noted too often.
    pub fn refused(&self, peer: SocketAddr, action: &str, why: &str) {
        self.note("nobody", peer, action, "", why);
    }

    /// Notes that a caller did what is not allowed.
    pub fn noted(&self, caller: &Caller, action: &str, target: &str, why: &str) {
        self.note(&caller.name, caller.peer, action, target, why);
    }

    fn note(&self, actor: &str, peer: SocketAddr, action: &str, target: &str, why: &str) {
        tracing::info!("refused: {action} {target} of {actor} from {peer}: {why}");
        if !take(&self.0.refusals, &peer.ip().to_string()) {
            return;
        }
        let short = |text: &str| text.chars().take(MAX_NOTED).collect();
        self.0.plane.note(AuditRecord {
            unix_ms: unix_ms(),
            actor: actor.to_owned(),
            peer: peer.to_string(),
            action: short(action),
            target: short(target),
            refused: short(why),
        });
    }

    /// Whether what a caller has shown is still good, for calls that last.
    ///
    /// # Errors
    /// When it is not.
    pub fn admits_still(&self, caller: &Caller) -> Result<(), Status> {
        let is_good = match &caller.proof {
            Proof::Near => !self.0.access.asks_for_tokens(),
            Proof::Token(sha256) => self.0.access.by_token(sha256).is_some(),
            Proof::Certificate(certificate) => return self.check(certificate),
        };
        if is_good {
            Ok(())
        } else {
            Err(Status::unauthenticated("what this call has shown is no longer valid here"))
        }
    }

    fn check(&self, certificate: &Certificate) -> Result<(), Status> {
        if self.0.access.is_revoked(&certificate.sha256) {
            return Err(Status::unauthenticated("the certificate is revoked"));
        }
        if certificate.ends < std::time::SystemTime::now() {
            return Err(Status::unauthenticated("the certificate has ended"));
        }
        Ok(())
    }

    /// Who calls, where it may.
    fn admit(&self, peer: &Peer, headers: &HeaderMap, path: &str) -> Result<Caller, (String, Status)> {
        let needed = needed(path);
        let nobody = |status| ("nobody".to_owned(), status);
        let (name, role, proof) = if self.0.asks_for_certificates && needed == Role::Worker {
            let certificate = peer.certificate.clone().ok_or_else(|| {
                nobody(Status::unauthenticated("workers must show a certificate: pass --cert and --key"))
            })?;
            self.check(&certificate).map_err(nobody)?;
            let name = certificate.names.first().cloned().unwrap_or_default();
            (name, Role::Worker, Proof::Certificate(certificate))
        } else {
            self.by_token(peer, rpc::shown_in(headers)).map_err(nobody)?
        };
        if !role.covers(needed) {
            let status = Status::permission_denied(format!(
                "{name} has the role {}, and this needs {}",
                role.name(),
                needed.name()
            ));
            return Err((name, status));
        }
        // A worker has one session, and all of them come at once when a coordinator is back.
        if needed != Role::Worker && !take(&self.0.calls, &format!("{name} {}", peer.address.ip())) {
            let status = Status::resource_exhausted(format!(
                "more than {} calls a second: wait a moment",
                CALLS.per_second
            ));
            return Err((name, status));
        }
        Ok(Caller { name, peer: peer.address, proof })
    }

    /// Whether anybody must show a token.
    pub fn asks_for_tokens(&self) -> bool {
        self.0.access.asks_for_tokens()
    }

    /// Whose token that is, if it may look at jobs.
    ///
    /// # Errors
    /// When it may not.
    pub fn viewer(&self, token: &str) -> Result<String, Status> {
        match self.0.access.by_token(&tunefleet_proto::digest_hex(token.as_bytes())) {
            Some((name, role)) if role.covers(Role::Viewer) => Ok(name),
            Some((name, role)) => Err(Status::permission_denied(format!(
                "{name} has the role {}, and this needs {}",
                role.name(),
                Role::Viewer.name()
            ))),
            None => Err(Status::unauthenticated("this token is not, or no longer, valid here")),
        }
    }

    /// Who looks at the page, where it may.
    fn admit_browser<B>(&self, peer: &Peer, request: &http::Request<B>) -> Result<Option<Caller>, Status> {
        let Ok(needed) = web::needed(request.uri().path()) else {
            return Err(Status::not_found("there is no such page"));
        };
        let Some(needed) = needed else { return Ok(None) };
        let headers = request.headers();
        let token = rpc::shown_in(headers).or_else(|| web::token(headers));
        let (name, role, proof) = self.by_token(peer, token)?;
        let authority = request.uri().authority().map(http::uri::Authority::as_str);
        if matches!(proof, Proof::Near) && !web::host_is_local(headers, authority) {
            return Err(Status::permission_denied(
                "no token is asked for here, so the page answers only to this machine's own names: open it at \
                 http://127.0.0.1, or make a token by `coordinator tokens create NAME --role viewer`",
            ));
        }
        if !role.covers(needed) {
            return Err(Status::permission_denied(format!("{name} has the role {}", role.name())));
        }
        if !take(&self.0.calls, &format!("{name} {}", peer.address.ip())) {
            return Err(Status::resource_exhausted("too many calls: wait a moment"));
        }
        Ok(Some(Caller { name, peer: peer.address, proof }))
    }

    fn by_token(&self, peer: &Peer, token: Option<&str>) -> Result<(String, Role, Proof), Status> {
        let access = &self.0.access;
        let Some(token) = token else {
            return if !access.asks_for_tokens() && peer.address.ip().is_loopback() {
                Ok(("anybody".to_owned(), Role::Admin, Proof::Near))
            } else {
                Err(Status::unauthenticated("no bearer token: pass one by --token-file or TUNEFLEET_TOKEN"))
            };
        };
        let sha256 = tunefleet_proto::digest_hex(token.as_bytes());
        match access.by_token(&sha256) {
            Some((name, role)) => Ok((name, role, Proof::Token(sha256))),
            None if !access.asks_for_tokens() && peer.address.ip().is_loopback() => {
                Ok(("anybody".to_owned(), Role::Admin, Proof::Near))
            }
            None => Err(Status::unauthenticated("this token is not, or no longer, valid here")),
        }
    }
}

/// What a caller has done lately.
struct Limits {
    rate: Rate,
    of: HashMap<String, (f64, Instant)>,
}

#[derive(Clone, Copy)]
struct Rate {
    burst: f64,
    per_second: f64,
}

/// Whether `who` may do it once more now.
fn take(limits: &Mutex<Limits>, who: &str) -> bool {
    let mut limits = limits.lock().unwrap_or_else(PoisonError::into_inner);
    let (rate, now) = (limits.rate, Instant::now());
    if limits.of.len() >= MAX_CALLERS && !limits.of.contains_key(who) {
        let is_full =
            |left: f64, since: &Instant| left + since.elapsed().as_secs_f64() * rate.per_second >= rate.burst;
        limits.of.retain(|_, (left, since)| !is_full(*left, since));
        if limits.of.len() >= MAX_CALLERS {
            limits.of.clear();
        }
    }
    let (left, since) = limits.of.entry(who.to_owned()).or_insert((rate.burst, now));
    *left = (*left + now.duration_since(*since).as_secs_f64() * rate.per_second).min(rate.burst);
    *since = now;
    let may = *left >= 1.0;
    if may {
        *left -= 1.0;
    }
    may
}

/// Who calls, as the guard has found.
///
/// # Errors
/// When it has not been asked.
pub fn caller<T>(request: &Request<T>) -> Result<Caller, Status> {
    let caller = request.extensions().get::<Caller>().cloned();
    caller.ok_or_else(|| Status::internal("a call that has passed nobody: this is a bug, please report it"))
}

impl<S> Layer<S> for Guard {
    type Service = Guarded<S>;

    fn layer(&self, inner: S) -> Guarded<S> {
        Guarded { inner, guard: self.clone() }
    }
}

type Answer<E> = Pin<Box<dyn Future<Output = Result<http::Response<Body>, E>> + Send>>;

/// A service behind a guard.
#[derive(Clone)]
pub struct Guarded<S> {
    inner: S,
    guard: Guard,
}

impl<S> Service<http::Request<Body>> for Guarded<S>
where
    S: Service<http::Request<Body>, Response = http::Response<Body>> + Clone + Send + 'static,
    S::Future: Send,
    S::Error: Send,
{
    type Response = http::Response<Body>;
    type Error = S::Error;
    type Future = Answer<S::Error>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, mut request: http::Request<Body>) -> Self::Future {
        let path = request.uri().path().to_owned();
        let action = path.rsplit('/').next().unwrap_or_default().to_lowercase();
        let Some(peer) = request.extensions().get::<Peer>().cloned() else {
            let status = Status::internal("a connection without a peer: this is a bug, please report it");
            return Box::pin(std::future::ready(Ok(status.into_http())));
        };
        if !is_call(request.headers()) {
            return self.page(&peer, request);
        }
        let caller = match self.guard.admit(&peer, request.headers(), &path) {
            Ok(caller) => caller,
            Err((name, status)) => {
                self.guard.note(&name, peer.address, &action, "", status.message());
                return Box::pin(std::future::ready(Ok(status.into_http())));
            }
        };
        request.extensions_mut().insert(caller.clone());
        // The one that is ready answers; its clone will be asked next.
        let ready = self.inner.clone();
        let mut inner = std::mem::replace(&mut self.inner, ready);
        let guard = self.guard.clone();
        let (method, began) = (method(&path), Instant::now());
        Box::pin(async move {
            let response = inner.call(request).await?;
            let code = Status::from_header_map(response.headers()).map_or(Code::Ok, |status| status.code());
            let (code, took) = (format!("{code:?}"), began.elapsed());
            metrics::called(method, &code, took);
            traces::called(method, &code, took);
            if let Some(why) = malformed(response.headers()) {
                guard.noted(&caller, &action, "", &why);
            }
            Ok(response)
        })
    }
}

impl<S> Guarded<S>
where
    S: Service<http::Request<Body>, Response = http::Response<Body>> + Clone + Send + 'static,
    S::Future: Send,
    S::Error: Send,
{
    /// What a browser asks for.
    fn page(&mut self, peer: &Peer, mut request: http::Request<Body>) -> Answer<S::Error> {
        match self.guard.admit_browser(peer, &request) {
            Ok(None) => {}
            Ok(Some(caller)) => drop(request.extensions_mut().insert(caller)),
            Err(status) => {
                // A browser that has yet to log in, or looks for an icon, is nobody's attempt.
                let shown = rpc::shown_in(request.headers()).or_else(|| web::token(request.headers()));
                if shown.is_some() || status.code() == Code::PermissionDenied {
                    self.guard.refused(peer.address, "page", status.message());
                }
                return Box::pin(std::future::ready(Ok(web::refusal(&status).map(Body::new))));
            }
        }
        let ready = self.inner.clone();
        let mut inner = std::mem::replace(&mut self.inner, ready);
        let began = Instant::now();
        Box::pin(async move {
            let response = inner.call(request).await?;
            metrics::called("page", response.status().as_str(), began.elapsed());
            Ok(response)
        })
    }
}

/// Whether this is a call of gRPC, and no browser's.
fn is_call(headers: &HeaderMap) -> bool {
    let kind = headers.get(http::header::CONTENT_TYPE).map(http::HeaderValue::as_bytes);
    kind.is_some_and(|kind| kind.starts_with(b"application/grpc"))
}

/// What was wrong with a message that never reached its handler.
fn malformed(headers: &HeaderMap) -> Option<String> {
    let status = Status::from_header_map(headers)?;
    match (status.code(), status.message()) {
        (Code::Unimplemented, "") => Some("there is no such call".to_owned()),
        (_, message) => is_malformed(&status).then(|| message.to_owned()),
    }
}

/// Whether this is the transport's word on a message that is too large, or is none.
pub fn is_malformed(status: &Status) -> bool {
    match status.code() {
        Code::OutOfRange | Code::Unimplemented => true,
        Code::Internal => status.message().contains("decode") || status.message().contains("compress"),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_call_needs_a_role_and_one_that_is_not_known_needs_the_highest() {
        let of = |call: &str| needed(&format!("/tunefleet.v1.Control/{call}"));
        assert_eq!(of("List"), Role::Viewer);
        assert_eq!(of("Submit"), Role::User);
        assert_eq!(of("Drain"), Role::Admin);
        assert_eq!(of("SomethingNew"), Role::Admin);
        assert_eq!(needed(SESSION), Role::Worker);
        assert_eq!(needed("/tunefleet.v1.Workers/Other"), Role::Admin);
        assert_eq!(needed("/"), Role::Admin);
    }

    #[test]
    fn a_caller_has_a_burst_and_others_have_their_own() {
        let limits = Mutex::new(Limits { rate: Rate { burst: 3.0, per_second: 0.001 }, of: HashMap::new() });
        let taken = |who: &str| (0..5).filter(|_| take(&limits, who)).count();
        assert_eq!(taken("a"), 3);
        assert_eq!(taken("b"), 3);
        assert_eq!(taken("a"), 0);
        for number in 0..2 * MAX_CALLERS {
            take(&limits, &number.to_string());
        }
        assert!(limits.lock().unwrap().of.len() <= MAX_CALLERS);
    }
}
