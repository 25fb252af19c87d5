//! The node daemon: owns slots, dials the coordinator, runs ranks as child processes.
//!
//! `link` speaks to the coordinator, `ranks` knows the ranks and carries out commands, `host` is the life of
//! one, `socket` is where they connect, `process` starts and kills them, `journal` and `outbox` are what a daemon
//! leaves to the next, `logs` shows what ranks wrote, `node` is what is known of the machine, `examine` whether it is fit
//! to train, `monitor` what Prometheus and probes see.

mod examine;
mod host;
mod journal;
mod link;
mod logs;
mod monitor;
mod node;
mod outbox;
mod process;
mod ranks;
mod socket;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tunefleet_proto::dial::{Credentials, DialError};
use tunefleet_proto::rpc::{Finding, Leaving, worker_message};
use tunefleet_proto::service_manager;

pub(crate) use journal::leave_last_words;

/// Looks at this machine, as a daemon with this many slots would.
///
/// # Errors
/// Where no runtime can be started.
pub fn examine_here(state: PathBuf) -> Result<Vec<Finding>, Error> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(io("starting the runtime"))?;
    let gpus = node::gpus();
    let subject = examine::Subject { slots: gpus.max(1), gpus, state, is_busy: false };
    Ok(runtime.block_on(examine::findings(subject)))
}

/// How long the last reports of a daemon that ends may take to reach the coordinator.
const FLUSH_LIMIT: Duration = Duration::from_secs(5);
const GIB: f64 = (1u64 << 30) as f64;

/// Command line of `worker daemon`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// YAML file with these flags, e.g. `rank_memory_gib: 60`; the command line wins over the environment, and that
    /// over the file.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// The coordinator's address, e.g. `https://control:7070`.
    #[arg(long, value_name = "URL", env = "TUNEFLEET_COORDINATOR")]
    coordinator: String,
    #[command(flatten)]
    credentials: Credentials,
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
    /// Where Prometheus' metrics are served, and the health of this process: /metrics, /healthz, /readyz.
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:0")]
    metrics: SocketAddr,
    /// Directory of this worker's journal: a daemon that is started again finds its ranks there. Default:
    /// $STATE_DIRECTORY, else $XDG_STATE_HOME/tunefleet/worker-NAME, else ~/.local/state/tunefleet/worker-NAME;
    /// with --exit-with-parent, one that ends with the daemon.
    #[arg(long, value_name = "DIR")]
    state_dir: Option<PathBuf>,
    /// Memory that each rank may take of this machine, in GiB; one that takes more is killed alone, and the
    /// machine goes on. Needs a control group that this user may write. Default: no limit.
    #[arg(long, value_name = "GIB")]
    rank_memory_gib: Option<f64>,
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
    /// What it was told of the coordinator cannot be used.
    #[error(transparent)]
    Dial(#[from] DialError),
    /// The coordinator does not want this worker.
    #[error("the coordinator refused this worker: {0}")]
    Refused(String),
    /// Another process has the state directory.
    #[error("{0} is in use: another daemon runs with it; give this one another --state-dir")]
    StateTaken(PathBuf),
    /// Nowhere to keep a journal.
    #[error("no place for this worker's journal: pass --state-dir DIR")]
    NoState,
    /// Not an amount of memory.
    #[error("--rank-memory-gib must be above 0, got {0}")]
    Memory(f64),
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

/// What is wrong with these arguments, where that can be seen without running.
///
/// # Errors
/// The first fault.
pub fn check(args: &Args) -> Result<(), Error> {
    args.credentials.endpoint(&args.coordinator)?;
    memory_limit(args)?;
    Ok(())
}

async fn serve(args: Args) -> Result<(), Error> {
    check(&args)?;
    let node = node::Node::inspect(&args)?;
    let listener = TcpListener::bind(args.metrics)
        .await
        .map_err(io(&format!("--metrics {}: choose another port, or 0 for any free one", args.metrics)))?;
    let mut metrics_address = listener.local_addr().map_err(io("metrics"))?;
    if metrics_address.ip().is_unspecified() {
        // Where Prometheus finds it on another machine.
        metrics_address.set_ip(node.address);
    }
    let metrics_url = format!("http://{metrics_address}/metrics");
    tracing::info!("worker {}: {} slots, {} GPUs, metrics {metrics_url}", node.name, node.slots, node.gpus);

    let state_dir =
        if args.exit_with_parent { args.state_dir.clone() } else { Some(state_dir(&args, &node.name)?) };
    let journal = journal::Journal::open(state_dir.as_deref())?;
    let socket = socket::Socket::bind(journal.dir())?;
    let (say_once, once) = tokio::sync::mpsc::unbounded_channel();
    let ranks = ranks::Ranks::new(
        &node,
        socket.path().to_owned(),
        journal,
        args.exit_with_parent,
        memory_limit(&args)?,
        say_once,
    )?;
    let ranks = Arc::new(ranks);
    ranks.adopt()?;
    let monitor = tokio::spawn(monitor::serve(listener, Arc::clone(&ranks)));
    let watchdog = tokio::spawn(crate::watchdog::live());
    service_manager::ready(&format!("worker {}: {} slots, {} GPUs", node.name, node.slots, node.gpus));
    let rank_service = tokio::spawn(socket.serve(Arc::clone(&ranks)));
    let coordinator =
        link::Coordinator { url: args.coordinator.clone(), credentials: args.credentials.clone() };
    let link = link::run(coordinator, node, metrics_url, Arc::clone(&ranks), once);
    let outcome = until_told(link, &ranks, args.exit_with_parent).await;
    rank_service.abort();
    monitor.abort();
    watchdog.abort();
    outcome
}

/// Runs the link until something ends the daemon, and ends the ranks as that asks for.
async fn until_told(
    link: impl Future<Output = Result<(), Error>>,
    ranks: &Arc<ranks::Ranks>,
    exit_with_parent: bool,
) -> Result<(), Error> {
    let mut link = std::pin::pin!(link);
    let told = tokio::select! {
        outcome = &mut link => {
            ranks.end_all("the coordinator does not want this worker").await;
            return outcome;
        }
        told = told_to_stop(exit_with_parent) => told?,
    };
    tracing::info!("stopping: {}", told.reason());
    service_manager::stopping();
    // The coordinator is told meanwhile: the link goes on.
    let end = async {
        match told {
            Told::HandOver => return,
            Told::Orphaned => ranks.end_all("the parent process is gone").await,
            Told::Stop(reason) => {
                let leaving = Leaving { reason: reason.to_owned() };
                ranks.say_once(worker_message::Body::Leaving(leaving));
                ranks.leave().await;
            }
        }
        let told = async {
            while !ranks.is_told() {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        let limit = if exit_with_parent { Duration::ZERO } else { FLUSH_LIMIT };
        let _ = tokio::time::timeout(limit, told).await;
    };
    tokio::select! {
        () = end => Ok(()),
        outcome = &mut link => outcome,
    }
}

/// Where the journal is.
fn state_dir(args: &Args, name: &str) -> Result<PathBuf, Error> {
    let of = |variable: &str| std::env::var_os(variable).filter(|value| !value.is_empty()).map(PathBuf::from);
    let home = || of("HOME").map(|home| home.join(".local/state"));
    let own = || Some(of("XDG_STATE_HOME").or_else(home)?.join(format!("tunefleet/worker-{name}")));
    args.state_dir.clone().or_else(|| of("STATE_DIRECTORY")).or_else(own).ok_or(Error::NoState)
}

fn memory_limit(args: &Args) -> Result<Option<u64>, Error> {
    match args.rank_memory_gib {
        Some(gib) if gib.is_finite() && gib > 0.0 => Ok(Some((gib * GIB) as u64)),
        Some(gib) => Err(Error::Memory(gib)),
        None => Ok(None),
    }
}

/// What ends a daemon.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Told {
    /// Its ranks save a checkpoint and stop.
    Stop(&'static str),
    /// Its ranks end with it.
    Orphaned,
    /// Its ranks go on, and wait for the next daemon.
    HandOver,
}

impl Told {
    fn reason(self) -> &'static str {
        match self {
            Told::Stop(reason) => reason,
            Told::Orphaned => "the parent process is gone",
            Told::HandOver => "SIGUSR1: the ranks go on, for the next daemon with this --state-dir",
        }
    }
}

/// Waits for a signal, or for the parent's end of stdin to close.
async fn told_to_stop(exit_with_parent: bool) -> Result<Told, Error> {
    let mut terminate = signal(SignalKind::terminate()).map_err(io("handling SIGTERM"))?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(io("handling SIGINT"))?;
    let mut hand_over = signal(SignalKind::user_defined1()).map_err(io("handling SIGUSR1"))?;
    let (closed, mut parent_gone) = tokio::sync::mpsc::channel::<()>(1);
    if exit_with_parent {
        // A thread of its own: a blocking read would keep the runtime from ending.
        std::thread::spawn(move || {
            let _ = std::io::copy(&mut std::io::stdin(), &mut std::io::sink());
            let _ = closed.blocking_send(());
        });
    }
    Ok(tokio::select! {
        _ = terminate.recv() => Told::Stop("SIGTERM"),
        _ = interrupt.recv() => Told::Stop("SIGINT"),
        _ = hand_over.recv() => Told::HandOver,
        Some(()) = parent_gone.recv() => Told::Orphaned,
    })
}

/// Says what was being done when an IO error came.
fn io(what: &str) -> impl FnOnce(std::io::Error) -> Error + use<> {
    let what = what.to_owned();
    move |cause| Error::Io { what, cause }
}
