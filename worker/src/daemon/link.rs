//! The session to the coordinator. It is dialled again when it breaks: ranks go on meanwhile,
//! since a coordinator that cannot be seen is no reason to stop them.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::sync::mpsc::UnboundedReceiver;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;
use tonic::{Code, Status};
use tunefleet_proto::dial::{Credentials, chain};
use tunefleet_proto::rpc::{
    self, CoordinatorMessage, Heartbeat, Register, Registered, Token, WorkerMessage, coordinator_message,
    worker_message,
};

use super::Error;
use super::node::Node;
use super::ranks::Ranks;

const FIRST_RETRY: Duration = Duration::from_millis(100);
const LAST_RETRY: Duration = Duration::from_secs(5);
/// Messages under way to the coordinator before ranks' reports have to wait in the outbox.
const WINDOW: usize = 256;
/// How long the coordinator may take to answer a registration.
const REGISTER_LIMIT: Duration = Duration::from_secs(10);
/// Slowest heartbeat that a coordinator can ask for.
const MAX_HEARTBEAT: Duration = Duration::from_secs(60);

/// The coordinator, and what is shown to it.
pub(super) struct Coordinator {
    pub url: String,
    pub credentials: Credentials,
}

impl Coordinator {
    /// Files of credentials are read anew: they may have been replaced.
    async fn dial(&self) -> Result<(Channel, Option<Token>), Status> {
        let (endpoint, token) =
            self.credentials.endpoint(&self.url).map_err(|error| Status::unavailable(error.to_string()))?;
        let channel = endpoint.connect().await.map_err(|error| Status::unavailable(chain(&error)))?;
        Ok((channel, token))
    }
}

/// Keeps a session up until the coordinator refuses this worker.
pub(super) async fn run(
    coordinator: Coordinator,
    node: Node,
    metrics_url: String,
    ranks: Arc<Ranks>,
    mut once: UnboundedReceiver<worker_message::Body>,
) -> Result<(), Error> {
    let mut retry = FIRST_RETRY;
    loop {
        let outcome = match coordinator.dial().await {
            Ok(dialled) => {
                let hello = register(&node, &metrics_url, &ranks);
                session(dialled, hello, &ranks, &mut once, &mut retry).await
            }
            Err(status) => Err(status),
        };
        ranks.is_connected.store(false, Ordering::Release);
        let status = match outcome {
            Ok(()) => Status::unavailable("the coordinator closed the session"),
            Err(status) => status,
        };
        match status.code() {
            Code::Unauthenticated
            | Code::PermissionDenied
            | Code::AlreadyExists
            | Code::InvalidArgument
            | Code::Unimplemented
                if ranks.tasks().is_empty() =>
            {
                return Err(Error::Refused(status.message().to_owned()));
            }
            _ => {
                let why = std::error::Error::source(&status).map(|cause| format!(": {}", chain(cause)));
                let (url, why) = (&coordinator.url, why.unwrap_or_default());
                tracing::warn!("no session to {url}: {}{why}; again in {retry:?}", status.message());
            }
        }
        tokio::time::sleep(retry).await;
        retry = (retry * 2).min(LAST_RETRY);
    }
}

fn register(node: &Node, metrics_url: &str, ranks: &Ranks) -> Register {
    let identity = ranks.journal().identity().clone();
    Register {
        name: node.name.clone(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        slots: node.slots,
        gpus: node.gpus,
        cores: node.cores,
        memory_bytes: node.memory_bytes,
        advertise_address: node.address.to_string(),
        metrics_url: metrics_url.to_owned(),
        running: ranks.tasks(),
        incarnation: node.incarnation.clone(),
        journal: identity.journal,
        protocol: rpc::PROTOCOL,
        ranks: ranks.held(),
        devices: node.devices.clone(),
        generation: identity.generation,
        cluster: identity.cluster,
    }
}

/// What a session is, once the coordinator has said so.
struct Session {
    epoch: u64,
    /// Number of the last kept message that was sent over it.
    sent: u64,
    /// A coordinator that acknowledges nothing: what was sent is forgotten.
    is_old: bool,
}

async fn session(
    (channel, token): (Channel, Option<Token>),
    hello: Register,
    ranks: &Arc<Ranks>,
    once: &mut UnboundedReceiver<worker_message::Body>,
    retry: &mut Duration,
) -> Result<(), Status> {
    let (up, messages) = tokio::sync::mpsc::channel(WINDOW);
    let closed = || Status::unavailable("the session broke");
    let hello =
        WorkerMessage { body: Some(worker_message::Body::Register(hello)), ..WorkerMessage::default() };
    up.send(hello).await.map_err(|_| closed())?;
    let mut client = rpc::workers_client(channel, token);
    let mut down = client.session(ReceiverStream::new(messages)).await?.into_inner();
    let first = tokio::time::timeout(REGISTER_LIMIT, down.message()).await;
    let first = first.map_err(|_| Status::deadline_exceeded("the coordinator does not answer"))??;
    let Some(coordinator_message::Body::Registered(settings)) = first.and_then(|message| message.body) else {
        return Err(closed());
    };
    let mut session = registered(&settings, ranks)?;
    *retry = FIRST_RETRY;
    ranks.is_connected.store(true, Ordering::Release);
    let period = Duration::from_millis(settings.heartbeat_interval_ms.max(10));
    let mut heartbeat = tokio::time::interval(period.min(MAX_HEARTBEAT));
    heartbeat.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut sequence = 0;
    loop {
        for mut message in ranks.kept_after(session.sent, WINDOW) {
            session.sent = message.sequence;
            message.epoch = session.epoch;
            if session.is_old {
                message.sequence = 0;
            }
            up.send(message).await.map_err(|_| closed())?;
        }
        if session.is_old {
            ranks.acknowledged(session.sent);
        }
        let body = tokio::select! {
            command = down.message() => {
                match command? {
                    None => return Ok(()),
                    Some(CoordinatorMessage { body: Some(command) }) => ranks.obey(command),
                    Some(CoordinatorMessage { body: None }) => {}
                }
                continue;
            },
            // More to send, above.
            () = ranks.grown.notified() => continue,
            body = once.recv() => match body {
                Some(body) => body,
                // The daemon is ending.
                None => return Ok(()),
            },
            _ = heartbeat.tick() => {
                sequence += 1;
                worker_message::Body::Heartbeat(Heartbeat { sequence, ranks: ranks.beats() })
            }
        };
        let message = WorkerMessage { body: Some(body), epoch: session.epoch, sequence: 0 };
        up.send(message).await.map_err(|_| closed())?;
    }
}

/// What the coordinator's first message means.
fn registered(settings: &Registered, ranks: &Arc<Ranks>) -> Result<Session, Status> {
    let Registered { epoch, acknowledged, cluster, generation, .. } = settings;
    let is_old = *epoch == 0;
    if !is_old {
        let obeyed = ranks.journal().obey(cluster, *generation);
        match obeyed {
            Ok(true) => {}
            Ok(false) => {
                return Err(Status::unavailable(format!(
                    "generation {generation} of the coordinator is not obeyed: there was a later one"
                )));
            }
            Err(error) => tracing::error!("{error}"),
        }
        ranks.acknowledged(*acknowledged);
    }
    Ok(Session { epoch: *epoch, sent: *acknowledged, is_old })
}
