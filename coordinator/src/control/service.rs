//! gRPC in front of the plane: checks what comes in, and turns calls into messages.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::time::Duration;

use tokio::net::TcpListener;
use tokio_stream::wrappers::{ReceiverStream, UnboundedReceiverStream};
use tokio_stream::{Stream, StreamExt};
use tonic::service::Routes;
use tonic::{Request, Response, Status, Streaming};
use tunefleet_proto::job::JobSpec;
use tunefleet_proto::rpc::control_server::Control;
use tunefleet_proto::rpc::workers_server::Workers;
use tunefleet_proto::rpc::{
    self, AuditRecord, AuditRequest, CancelRequest, CoordinatorMessage, DoctorRequest, DrainRequest, Finding,
    JobEvent, JobStatus, ListRequest, ListResponse, ListWorkersRequest, ListWorkersResponse, ResumeRequest,
    StatusRequest, SubmitRequest, SubmitResponse, SuspendRequest, UndrainRequest, VersionRequest,
    VersionResponse, WatchRequest, WorkerMessage, WorkerStatus, worker_message,
};

use super::access::Access;
use super::doctor;
use super::guard::{Caller, Guard, caller, is_malformed};
use super::listen;
use super::placement::WorkerName;
use super::plane::{Message, Plane};
use super::streams::{self, Until, Watcher};
use super::tls::{TlsError, TlsFiles};
use super::web::Web;
use super::workers::Epoch;
use crate::job_file;
use crate::plan::{self, Place};

/// How long a new session may take to say who it is.
const REGISTER_LIMIT: Duration = Duration::from_secs(5);
/// Records of the audit that one call returns at most.
const MAX_AUDIT: usize = 10_000;
/// Longest name of a worker.
const MAX_NAME: usize = 100;
/// Most sequences of a micro-batch, and micro-batches of a step.
const MAX_SEQUENCES: u32 = 65_536;
/// Most slots that a worker may claim.
const MAX_SLOTS: u32 = 1024;
/// Calls that one connection may have under way.
const CALLS_PER_CONNECTION: usize = 256;

/// Why the control plane does not listen.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The address is taken, not ours, or not allowed.
    #[error("listening on {address}: {cause}: {hint}")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// What the system said.
        cause: std::io::Error,
        /// What to do.
        hint: &'static str,
    },
    /// Everybody on the network could run programs here, or nobody could.
    #[error(
        "listening on {0} without a token: make one by `coordinator tokens create NAME --role admin`, or listen on \
         127.0.0.1"
    )]
    Open(SocketAddr),
    /// Tokens and logs would be shown to everybody on the network.
    #[error(
        "listening on {0} without TLS: pass --tls-cert and --tls-key (`coordinator certs` makes them), or --insecure on a \
         network that you trust"
    )]
    Plain(SocketAddr),
    /// Certificates.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// The transport failed.
    #[error("serving: {0}")]
    Transport(#[from] tonic::transport::Error),
}

/// Who may reach a control plane, and how.
pub struct Door {
    /// Who may do what.
    pub access: Access,
    /// Speak TLS.
    pub tls: Option<TlsFiles>,
    /// Others on the network may listen in.
    pub insecure: bool,
}

impl Door {
    /// Whether it may be at this address.
    ///
    /// # Errors
    /// Where others on the network could come in, or listen in, or a file of certificates is wrong.
    pub fn check(&self, address: SocketAddr) -> Result<(), ServeError> {
        if !address.ip().is_loopback() {
            if !self.access.asks_for_tokens() {
                return Err(ServeError::Open(address));
            }
            if self.tls.is_none() && !self.insecure {
                return Err(ServeError::Plain(address));
            }
        }
        if let Some(files) = &self.tls {
            files.read()?;
        }
        Ok(())
    }
}

/// A bound control plane.
pub struct Server {
    listener: TcpListener,
    address: SocketAddr,
    door: Door,
}

impl Server {
    /// Binds `address`; port 0 takes any free one.
    ///
    /// # Errors
    /// See [`ServeError`].
    pub async fn bind(address: SocketAddr, door: Door) -> Result<Self, ServeError> {
        door.check(address)?;
        let listener = bind(address).await?;
        let address = listener.local_addr().unwrap_or(address);
        Ok(Server { listener, address, door })
    }

    /// Where it listens.
    pub fn url(&self) -> String {
        let scheme = if self.door.tls.is_some() { "https" } else { "http" };
        format!("{scheme}://{}", self.address)
    }

    /// Serves until the future is dropped.
    ///
    /// # Errors
    /// When the transport fails.
    pub async fn serve(self, plane: Plane) -> Result<(), ServeError> {
        let Door { access, tls, .. } = self.door;
        let state = access.state().map(Path::to_owned);
        let certificate = tls.as_ref().map(|files| files.cert.clone());
        let asks_for_certificates = tls.as_ref().is_some_and(|files| files.client_ca.is_some());
        let guard = Guard::new(plane.clone(), access, asks_for_certificates);
        let tls = tls.map(TlsFiles::follow).transpose()?;
        let connections = listen::connections(self.listener, tls, guard.clone());
        Service { plane, guard, state, certificate }.serve(connections).await
    }
}

/// Binds a listener and says what to do when that fails.
///
/// # Errors
/// [`ServeError::Listen`].
pub async fn bind(address: SocketAddr) -> Result<TcpListener, ServeError> {
    TcpListener::bind(address).await.map_err(|cause| {
        let hint = match cause.kind() {
            std::io::ErrorKind::AddrInUse => {
                "another program listens there: stop it, choose another port, or port 0 for any free one"
            }
            std::io::ErrorKind::PermissionDenied => "choose a port above 1023",
            _ => "choose an address of this machine",
        };
        ServeError::Listen { address, cause, hint }
    })
}

#[derive(Clone)]
struct Service {
    plane: Plane,
    guard: Guard,
    /// Where the state is, and the certificate; absent for a coordinator inside another program.
    state: Option<PathBuf>,
    certificate: Option<PathBuf>,
}

impl Service {
    /// Serves these connections until there will be no more.
    async fn serve(
        self,
        connections: tokio::sync::mpsc::Receiver<std::io::Result<listen::Connection>>,
    ) -> Result<(), ServeError> {
        let web = Web::new(self.plane.clone(), self.guard.clone(), self.certificate.is_some());
        let mut routes =
            Routes::new(rpc::control_server(self.clone())).add_service(rpc::workers_server(self.clone()));
        let router = std::mem::take(routes.axum_router_mut());
        *routes.axum_router_mut() = router.merge(web.router());
        tonic::transport::Server::builder()
            .http2_keepalive_interval(Some(Duration::from_secs(10)))
            .http2_keepalive_timeout(Some(Duration::from_secs(10)))
            .concurrency_limit_per_connection(CALLS_PER_CONNECTION)
            // Browsers come over either version of HTTP.
            .accept_http1(true)
            .layer(self.guard.clone())
            .add_routes(routes)
            .serve_with_incoming(ReceiverStream::new(connections))
            .await?;
        Ok(())
    }

    fn watcher<T>(&self, request: &Request<T>) -> Result<Watcher, Status> {
        Ok(Watcher { who: caller(request)?, guard: self.guard.clone() })
    }

    /// Notes who asked for a change, and what became of it.
    async fn noted<T>(
        &self,
        who: &Caller,
        action: &str,
        target: &str,
        done: Result<T, Status>,
    ) -> Result<T, Status> {
        let record = AuditRecord {
            unix_ms: super::events::unix_ms(),
            actor: who.name.clone(),
            peer: who.peer.to_string(),
            action: action.to_owned(),
            target: target.chars().take(MAX_NAME).collect(),
            refused: done.as_ref().err().map(|status| status.message().to_owned()).unwrap_or_default(),
        };
        self.plane.tell(Message::Audit(record)).await?;
        done
    }
}

type Events<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[tonic::async_trait]
impl Control for Service {
    type WatchStream = Events<JobEvent>;

    async fn submit(&self, request: Request<SubmitRequest>) -> Result<Response<SubmitResponse>, Status> {
        let who = caller(&request)?;
        let request = request.into_inner();
        let continuation = request.continuation();
        let spec: JobSpec = serde_json::from_str(&request.spec_json)
            .map_err(|error| Status::invalid_argument(format!("job spec: {error}")))?;
        let spec = Box::new(within_budget(check(spec)?)?);
        let (job, request) = (spec.name.clone(), request.request);
        let submit = |reply| Message::Submit { spec, continuation, request, reply };
        let attempt = self.noted(&who, "submit", &job, self.plane.ask(submit).await).await?;
        Ok(Response::new(SubmitResponse { job, attempt: attempt.0 }))
    }

    async fn watch(&self, request: Request<WatchRequest>) -> Result<Response<Self::WatchStream>, Status> {
        let watcher = self.watcher(&request)?;
        let WatchRequest { job, from_sequence, only_past } = request.into_inner();
        let log = self.plane.ask(|reply| Message::Events { job, reply }).await?;
        let until = if only_past { Until::Now } else { Until::TheEnd };
        let events = streams::events(log, from_sequence.saturating_sub(1), until, watcher);
        Ok(Response::new(Box::pin(ReceiverStream::new(events))))
    }

    async fn list(&self, _request: Request<ListRequest>) -> Result<Response<ListResponse>, Status> {
        let jobs = self.plane.ask(|reply| Message::List { reply }).await?;
        Ok(Response::new(ListResponse { jobs }))
    }

    async fn status(&self, request: Request<StatusRequest>) -> Result<Response<JobStatus>, Status> {
        let job = request.into_inner().job;
        Ok(Response::new(self.plane.ask(|reply| Message::Status { job, reply }).await?))
    }

    async fn cancel(&self, request: Request<CancelRequest>) -> Result<Response<JobStatus>, Status> {
        let who = caller(&request)?;
        let CancelRequest { job, grace_ms } = request.into_inner();
        let grace = Duration::from_millis(grace_ms);
        let target = job.clone();
        let done = self.plane.ask(|reply| Message::Cancel { job, grace, reply }).await;
        Ok(Response::new(self.noted(&who, "cancel", &target, done).await?))
    }

    async fn suspend(&self, request: Request<SuspendRequest>) -> Result<Response<JobStatus>, Status> {
        let who = caller(&request)?;
        let SuspendRequest { job, grace_ms } = request.into_inner();
        let grace = Duration::from_millis(grace_ms);
        let target = job.clone();
        let done = self.plane.ask(|reply| Message::Suspend { job, grace, reply }).await;
        Ok(Response::new(self.noted(&who, "suspend", &target, done).await?))
    }

    async fn resume(&self, request: Request<ResumeRequest>) -> Result<Response<JobStatus>, Status> {
        let who = caller(&request)?;
        let job = request.into_inner().job;
        let target = job.clone();
        let done = self.plane.ask(|reply| Message::Resume { job, reply }).await;
        Ok(Response::new(self.noted(&who, "resume", &target, done).await?))
    }

    type LogsStream = Events<rpc::LogLines>;

    async fn logs(&self, request: Request<rpc::LogsRequest>) -> Result<Response<Self::LogsStream>, Status> {
        let watcher = self.watcher(&request)?;
        let lines = streams::logs(&self.plane, request.into_inner(), watcher).await?;
        Ok(Response::new(Box::pin(ReceiverStream::new(lines))))
    }

    async fn list_workers(
        &self,
        _request: Request<ListWorkersRequest>,
    ) -> Result<Response<ListWorkersResponse>, Status> {
        let workers = self.plane.ask(|reply| Message::Workers { reply }).await?;
        Ok(Response::new(ListWorkersResponse { workers }))
    }

    async fn drain(&self, request: Request<DrainRequest>) -> Result<Response<WorkerStatus>, Status> {
        let who = caller(&request)?;
        let DrainRequest { worker, preempt } = request.into_inner();
        let target = worker.clone();
        let done = self.plane.ask(|reply| Message::Drain { worker, preempt, reply }).await;
        Ok(Response::new(self.noted(&who, "drain", &target, done).await?))
    }

    async fn undrain(&self, request: Request<UndrainRequest>) -> Result<Response<WorkerStatus>, Status> {
        let who = caller(&request)?;
        let worker = request.into_inner().worker;
        let target = worker.clone();
        let done = self.plane.ask(|reply| Message::Undrain { worker, reply }).await;
        Ok(Response::new(self.noted(&who, "undrain", &target, done).await?))
    }

    type AuditStream = Events<AuditRecord>;

    async fn audit(&self, request: Request<AuditRequest>) -> Result<Response<Self::AuditStream>, Status> {
        let since = request.into_inner().since_unix_ms;
        let history = std::sync::Arc::clone(self.plane.history());
        let read = tokio::task::spawn_blocking(move || history.audit(since, MAX_AUDIT)).await;
        let records = read.map_err(|error| Status::internal(error.to_string()))?;
        let records = records.map_err(|error| Status::internal(error.to_string()))?;
        Ok(Response::new(Box::pin(tokio_stream::iter(records.into_iter().map(Ok)))))
    }

    type DoctorStream = Events<Finding>;

    async fn doctor(&self, _request: Request<DoctorRequest>) -> Result<Response<Self::DoctorStream>, Status> {
        let (sender, findings) = tokio::sync::mpsc::channel(streams::WINDOW);
        tokio::spawn(doctor::examine(
            self.plane.clone(),
            self.state.clone(),
            self.certificate.clone(),
            sender,
        ));
        Ok(Response::new(Box::pin(ReceiverStream::new(findings).map(Ok))))
    }

    async fn version(&self, _request: Request<VersionRequest>) -> Result<Response<VersionResponse>, Status> {
        let cluster = self.plane.ask(|reply| Message::Identity { reply }).await?;
        Ok(Response::new(VersionResponse {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            protocol: rpc::PROTOCOL,
            oldest_protocol: rpc::OLDEST_PROTOCOL,
            cluster,
        }))
    }
}

impl Service {
    /// Passes on what a worker says until its session ends, or its right to one.
    async fn hear(
        self,
        worker: WorkerName,
        epoch: Epoch,
        who: Caller,
        mut messages: Streaming<WorkerMessage>,
    ) {
        loop {
            match messages.message().await {
                Ok(Some(message)) if self.guard.admits_still(&who).is_ok() => {
                    let said = Message::Said { worker: worker.clone(), epoch, message };
                    if self.plane.tell(said).await.is_err() {
                        return;
                    }
                    continue;
                }
                Ok(Some(_)) => {
                    let why = "what it showed is revoked, or has ended";
                    self.guard.noted(&who, "session", &worker.to_string(), why);
                }
                Err(status) if is_malformed(&status) => {
                    self.guard.noted(&who, "session", &worker.to_string(), status.message());
                }
                Ok(None) | Err(_) => {}
            }
            break;
        }
        let _ = self.plane.tell(Message::Left { worker, epoch }).await;
    }
}

/// `spec` with what its memory budget leaves open chosen, unless that was done where it was read.
fn within_budget(mut spec: JobSpec) -> Result<JobSpec, Status> {
    if !spec.train.memory_budget.is_some_and(|budget| budget.is_open()) {
        return Ok(spec);
    }
    let config = job_file::model_config(&spec).map_err(|error| {
        Status::failed_precondition(format!("train.memory_budget_gib needs the shape of the model: {error}"))
    })?;
    let place = Place::unseen(&spec);
    plan::choose(&mut spec, &config, &place)
        .map_err(|failure| Status::resource_exhausted(failure.message))?;
    Ok(spec)
}

/// What a job spec must hold for the control plane itself; the job file's own checks are stricter.
fn check(spec: JobSpec) -> Result<JobSpec, Status> {
    let refuse = |rule: &str| Err(Status::invalid_argument(format!("job {:?}: {rule}", spec.name)));
    let legal = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
    if spec.name.is_empty() || spec.name.len() > MAX_NAME || !spec.name.bytes().all(legal) {
        return refuse("a name is 1 to 100 letters, digits, '-', '_' or '.'");
    }
    if !spec.output.is_absolute() {
        return refuse("`output` must be an absolute path");
    }
    if spec.train.ranks == 0 || spec.train.ranks > MAX_SLOTS {
        return refuse("`train.ranks` must be from 1 to 1024");
    }
    let sequences = (1..=MAX_SEQUENCES).contains(&spec.train.micro_batch_sequences)
        && (1..=MAX_SEQUENCES).contains(&spec.train.accumulate_micro_batches);
    if !sequences {
        return refuse(
            "`train.micro_batch_sequences` and `accumulate_micro_batches` must be from 1 to 65536",
        );
    }
    Ok(spec)
}

#[tonic::async_trait]
impl Workers for Service {
    type SessionStream = Events<CoordinatorMessage>;

    async fn session(
        &self,
        request: Request<Streaming<WorkerMessage>>,
    ) -> Result<Response<Self::SessionStream>, Status> {
        let who = caller(&request)?;
        let mut messages = request.into_inner();
        let first = tokio::time::timeout(REGISTER_LIMIT, messages.message())
            .await
            .map_err(|_| Status::deadline_exceeded("no registration"))??;
        let Some(worker_message::Body::Register(register)) = first.and_then(|message| message.body) else {
            return Err(Status::invalid_argument("a session begins with a registration"));
        };
        if register.name.is_empty() || register.name.len() > MAX_NAME {
            return Err(Status::invalid_argument("a worker's name has 1 to 100 characters"));
        }
        if register.slots == 0 || register.slots > MAX_SLOTS {
            return Err(Status::invalid_argument("a worker has 1 to 1024 slots"));
        }
        if let Err(refused) = who.may_be(&register.name) {
            self.guard.noted(&who, "session", &register.name, refused.message());
            return Err(refused);
        }
        let worker = WorkerName::from(register.name.as_str());
        let (commands, outgoing) = tokio::sync::mpsc::unbounded_channel();
        let register = Box::new(register);
        let epoch = self.plane.ask(|reply| Message::Join { register, commands, reply }).await?;
        tokio::spawn(self.clone().hear(worker, epoch, who, messages));
        Ok(Response::new(Box::pin(UnboundedReceiverStream::new(outgoing).map(Ok))))
    }
}

#[cfg(test)]
#[path = "service_tests.rs"]
mod tests;
#[cfg(test)]
#[path = "transport_tests.rs"]
mod transport_tests;
