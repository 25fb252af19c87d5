//! The node daemon: owns slots, dials the coordinator, runs ranks as child processes.
//!
//! `link` speaks to the coordinator, `ranks` knows the rank processes and carries out commands,
//! `socket` is where ranks connect, `process` starts, watches and kills them, `node` is what is
//! known of the machine.

mod link;
mod node;
mod process;
mod ranks;
mod socket;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;

use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tunefleet_proto::rpc::{BadToken, TOKEN_VARIABLE, Token};

use crate::metrics;

/// Command line of `worker daemon`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The coordinator's address, e.g. `http://control:7070`.
    #[arg(long, value_name = "URL")]
    coordinator: String,
    /// File that holds the coordinator's token; else it is taken from TUNEFLEET_TOKEN.
    #[arg(long, value_name = "FILE")]
    token_file: Option<PathBuf>,
    /// Name of this worker, unique on the coordinator; the host name when absent.
    #[arg(long)]
    name: Option<String>,
    /// Ranks that this worker has room for; one per GPU when absent.
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=1024))]
    slots: Option<u32>,
    /// Ranks that this worker has room for when it uses no GPU.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1024))]
    cpu_slots: u32,
    /// Leave GPUs alone.
    #[arg(long)]
    cpu: bool,
    /// Address of this machine that other workers reach; found by dialling the coordinator when absent.
    #[arg(long, value_name = "IP")]
    advertise: Option<std::net::IpAddr>,
    /// Where Prometheus metrics are served.
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:0")]
    metrics: SocketAddr,
    /// Stop when stdin closes: the parent process is gone.
    #[arg(long)]
    exit_with_parent: bool,
}

/// What can end the daemon.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// An operation on a file, socket or process.
    #[error("{what}: {cause}")]
    Io {
        /// What was being done.
        what: String,
        /// What the system said.
        #[source]
        cause: std::io::Error,
    },
    /// Not a token.
    #[error("the coordinator's token: {0}")]
    Token(#[from] BadToken),
    /// The address cannot be used.
    #[error("--coordinator {url}: {cause}; expected http://HOST:PORT")]
    Url {
        /// As given.
        url: String,
        /// What is wrong with it.
        cause: String,
    },
    /// The coordinator does not want this worker.
    #[error("the coordinator refused this worker: {0}")]
    Refused(String),
    /// A second recorder.
    #[error("starting metrics: {0}")]
    Metrics(String),
}

/// Runs until it is told to stop, its parent is gone, or the coordinator refuses it.
///
/// # Errors
/// See [`Error`].
pub fn run(args: Args) -> Result<(), Error> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .map_err(io("starting the runtime"))?;
    runtime.block_on(serve(args))
}

async fn serve(args: Args) -> Result<(), Error> {
    let token = token(args.token_file.as_deref())?;
    let endpoint = link::endpoint(&args.coordinator)?;
    let node = node::Node::inspect(&args)?;
    let listener = TcpListener::bind(args.metrics)
        .await
        .map_err(io(&format!("--metrics {}: choose another port, or 0 for any free one", args.metrics)))?;
    let metrics_url = format!("http://{}/metrics", listener.local_addr().map_err(io("metrics"))?);
    metrics::serve(listener).map_err(|error| Error::Metrics(error.to_string()))?;
    metrics::start(node.slots);
    tracing::info!("worker {}: {} slots, {} GPUs, metrics {metrics_url}", node.name, node.slots, node.gpus);

    let socket = socket::Socket::bind()?;
    let (outbox, messages) = tokio::sync::mpsc::unbounded_channel();
    let ranks = Arc::new(ranks::Ranks::new(&node, socket.path().to_owned(), outbox)?);
    let rank_service = tokio::spawn(socket.serve(Arc::clone(&ranks)));
    let outcome = tokio::select! {
        outcome = link::run(endpoint, token, node, metrics_url, Arc::clone(&ranks), messages) => outcome,
        reason = told_to_stop(args.exit_with_parent) => {
            tracing::info!("{}", reason?);
            Ok(())
        }
    };
    ranks.stop_all().await;
    rank_service.abort();
    outcome
}

fn token(file: Option<&std::path::Path>) -> Result<Option<Token>, Error> {
    let text = match file {
        Some(path) => {
            Some(std::fs::read_to_string(path).map_err(io(&format!("--token-file {}", path.display())))?)
        }
        None => std::env::var(TOKEN_VARIABLE).ok(),
    };
    Ok(text.map(|text| Token::new(text.trim_end())).transpose()?)
}

/// Waits for a signal, or for the parent's end of stdin to close.
async fn told_to_stop(exit_with_parent: bool) -> Result<&'static str, Error> {
    let mut terminate = signal(SignalKind::terminate()).map_err(io("handling SIGTERM"))?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(io("handling SIGINT"))?;
    let (closed, mut parent_gone) = tokio::sync::mpsc::channel::<()>(1);
    if exit_with_parent {
        // A thread of its own: a blocking read would keep the runtime from ending.
        std::thread::spawn(move || {
            let _ = std::io::copy(&mut std::io::stdin(), &mut std::io::sink());
            let _ = closed.blocking_send(());
        });
    }
    Ok(tokio::select! {
        _ = terminate.recv() => "stopping: SIGTERM",
        _ = interrupt.recv() => "stopping: SIGINT",
        Some(()) = parent_gone.recv() => "stopping: the parent process is gone",
    })
}

/// Says what was being done when an IO error came.
fn io(what: &str) -> impl FnOnce(std::io::Error) -> Error {
    let what = what.to_owned();
    move |cause| Error::Io { what, cause }
}
