//! The session to the coordinator. It is dialled again when it breaks: ranks go on meanwhile,
//! since a coordinator that cannot be seen is no reason to stop them.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc::UnboundedReceiver;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Status};
use tunefleet_proto::rpc::{
    self, CoordinatorMessage, Heartbeat, Register, Token, WorkerMessage, coordinator_message, worker_message,
};

use super::Error;
use super::node::Node;
use super::ranks::Ranks;

const FIRST_RETRY: Duration = Duration::from_millis(100);
const LAST_RETRY: Duration = Duration::from_secs(5);
/// Messages under way to the coordinator before ranks' reports have to wait in the outbox.
const WINDOW: usize = 256;
/// Slowest heartbeat that a coordinator can ask for, and the one before it has asked.
const MAX_HEARTBEAT: Duration = Duration::from_secs(60);

/// Where to dial.
pub(super) fn endpoint(url: &str) -> Result<Endpoint, Error> {
    let bad = |cause: String| Error::Url { url: url.to_owned(), cause };
    if !url.starts_with("http://") {
        // Without TLS, https would be dialled in plain text, token and all.
        return Err(bad("only http is spoken".to_owned()));
    }
    let endpoint = Endpoint::from_shared(url.to_owned()).map_err(|error| bad(error.to_string()))?;
    if endpoint.uri().host().is_none() {
        return Err(bad("no host".to_owned()));
    }
    Ok(endpoint
        .connect_timeout(Duration::from_secs(5))
        .http2_keep_alive_interval(Duration::from_secs(10))
        .keep_alive_timeout(Duration::from_secs(10))
        .keep_alive_while_idle(true))
}

/// Keeps a session up until the coordinator refuses this worker.
pub(super) async fn run(
    endpoint: Endpoint,
    token: Option<Token>,
    node: Node,
    metrics_url: String,
    ranks: Arc<Ranks>,
    mut outbox: UnboundedReceiver<WorkerMessage>,
) -> Result<(), Error> {
    let mut retry = FIRST_RETRY;
    let mut unsent = None;
    loop {
        let outcome = match endpoint.connect().await {
            Ok(channel) => {
                let hello = register(&node, &metrics_url, &ranks);
                session(channel, token.clone(), hello, &ranks, &mut outbox, &mut unsent, &mut retry).await
            }
            Err(error) => Err(Status::unavailable(error.to_string())),
        };
        let status = match outcome {
            Ok(()) => Status::unavailable("the coordinator closed the session"),
            Err(status) => status,
        };
        match status.code() {
            Code::Unauthenticated
            | Code::PermissionDenied
            | Code::AlreadyExists
            | Code::InvalidArgument
            | Code::Unimplemented => return Err(Error::Refused(status.message().to_owned())),
            _ => tracing::warn!("no session to {}: {}; again in {retry:?}", endpoint.uri(), status.message()),
        }
        tokio::time::sleep(retry).await;
        retry = (retry * 2).min(LAST_RETRY);
    }
}

fn register(node: &Node, metrics_url: &str, ranks: &Ranks) -> Register {
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
        ..Register::default()
    }
}

async fn session(
    channel: Channel,
    token: Option<Token>,
    hello: Register,
    ranks: &Arc<Ranks>,
    outbox: &mut UnboundedReceiver<WorkerMessage>,
    unsent: &mut Option<WorkerMessage>,
    retry: &mut Duration,
) -> Result<(), Status> {
    let (up, messages) = tokio::sync::mpsc::channel(WINDOW);
    let closed = || Status::unavailable("the session broke");
    up.send(message(worker_message::Body::Register(hello))).await.map_err(|_| closed())?;
    let mut client = rpc::workers_client(channel, token);
    let mut down = client.session(ReceiverStream::new(messages)).await?.into_inner();
    let mut heartbeat = tokio::time::interval(MAX_HEARTBEAT);
    let mut sequence = 0;
    loop {
        if let Some(message) = unsent.take()
            && let Err(failed) = up.send(message).await
        {
            *unsent = Some(failed.0);
            return Err(closed());
        }
        tokio::select! {
            command = down.message() => match command? {
                None => return Ok(()),
                Some(CoordinatorMessage { body: Some(coordinator_message::Body::Registered(settings)) }) => {
                    *retry = FIRST_RETRY;
                    let period = Duration::from_millis(settings.heartbeat_interval_ms.max(10));
                    heartbeat = tokio::time::interval(period.min(MAX_HEARTBEAT));
                    heartbeat.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
                }
                Some(CoordinatorMessage { body: Some(command) }) => ranks.obey(command),
                Some(CoordinatorMessage { body: None }) => {}
            },
            message = outbox.recv() => match message {
                Some(message) => *unsent = Some(message),
                // The daemon is ending.
                None => return Ok(()),
            },
            _ = heartbeat.tick() => {
                sequence += 1;
                let beat = worker_message::Body::Heartbeat(Heartbeat { sequence, ..Heartbeat::default() });
                up.send(message(beat)).await.map_err(|_| closed())?;
            }
        }
    }
}

fn message(body: worker_message::Body) -> WorkerMessage {
    WorkerMessage { body: Some(body), ..WorkerMessage::default() }
}
