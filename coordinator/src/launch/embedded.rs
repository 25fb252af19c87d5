//! A coordinator inside this process and a worker daemon as its child: they listen on loopback
//! only, share a token that nobody else knows, and leave nothing behind.

use std::fs::OpenOptions;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use tokio::process::{Child, ChildStdin, Command};
use tokio::task::JoinHandle;
use tunefleet_proto::dial::{Credentials, chain};
use tunefleet_proto::job::{DeviceKind, JobSpec};
use tunefleet_proto::rpc::{self, ControlClient, TOKEN_VARIABLE, Token};

use crate::cli::exit;
use crate::connect::Failure;
use crate::control::{Access, Door, Plane, Server, Settings, store};
use crate::monitor;

/// How long the daemon may take to end its ranks and itself.
const STOP_LIMIT: Duration = Duration::from_secs(10);
/// Lines of the daemon's log that are shown when it dies.
const TAIL_LINES: usize = 20;

/// The running pair.
pub struct Embedded {
    url: String,
    token: Token,
    server: JoinHandle<()>,
    worker: Child,
    /// Held open: the daemon ends when it closes. (Waiting for a child closes its own.)
    worker_stdin: Option<ChildStdin>,
    worker_log: PathBuf,
}

impl Embedded {
    /// Starts both.
    pub async fn start(spec: &JobSpec, worker_bin: Option<&Path>) -> Result<Self, Failure> {
        let program = find_worker(worker_bin)?;
        let secret = tunefleet_proto::hex(&rand::random::<[u8; 32]>());
        let token = Token::new(&secret).map_err(|error| Failure::new(exit::FAILED, error.to_string()))?;
        let any_port = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
        let viewer = tunefleet_proto::hex(&rand::random::<[u8; 16]>());
        let access = Access::open(None, Some(token.sha256().to_owned()))?
            .with_viewer(tunefleet_proto::digest_hex(viewer.as_bytes()));
        let server = Server::bind(any_port, Door { access, tls: None, insecure: false }).await?;
        let url = server.url();
        let (store, history) = store::memory();
        let plane = Plane::start(store, history, Settings::default())
            .map_err(|error| Failure::new(exit::FAILED, error.to_string()))?;
        let metrics_url = monitor::serve(any_port, plane.clone()).await?;
        eprintln!("coordinator in this process: {url}, metrics {metrics_url}");
        eprintln!("page: {url}/#token={viewer}");
        let server = tokio::spawn(async move {
            if let Err(error) = server.serve(plane).await {
                tracing::error!("{error}");
            }
        });

        let worker_log = spec.output.join("logs").join("worker.log");
        let log = || {
            std::fs::create_dir_all(spec.output.join("logs"))?;
            OpenOptions::new().create(true).append(true).open(&worker_log)
        };
        let at = |error| Failure::new(exit::FAILED, format!("{}: {error}", worker_log.display()));
        let mut command = Command::new(&program);
        command.args(["daemon", "--exit-with-parent", "--name", "local", "--coordinator", &url]);
        command.args(["--cpu-slots", &spec.train.ranks.to_string()]);
        if let Some(slots) = spec.workers.slots {
            command.args(["--slots", &slots.to_string()]);
        }
        if spec.train.device == DeviceKind::Cpu {
            command.arg("--cpu");
        }
        let mut worker = command
            .env(TOKEN_VARIABLE, &secret)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(log().map_err(at)?)
            // Ctrl-C is for this process alone: it tells the others what to do.
            .process_group(0)
            .kill_on_drop(true)
            .spawn()
            .map_err(|error| {
                Failure::new(exit::FAILED, format!("starting {}: {error}", program.display()))
            })?;
        let worker_stdin = worker.stdin.take();
        Ok(Embedded { url, token, server, worker, worker_stdin, worker_log })
    }

    /// A client of the coordinator in this process, over the same protocol as any other.
    pub async fn client(&self) -> Result<ControlClient, Failure> {
        let (endpoint, _) = Credentials::default().endpoint(&self.url)?;
        let channel = endpoint.connect().await;
        let channel = channel.map_err(|error| Failure::new(exit::UNREACHABLE, chain(&error)))?;
        Ok(rpc::control_client(channel, Some(self.token.clone())))
    }

    /// Waits for the daemon to end, which it should not.
    pub async fn worker_ended(&mut self) -> Failure {
        let how = match self.worker.wait().await {
            Ok(status) => status.to_string(),
            Err(error) => error.to_string(),
        };
        let text = std::fs::read_to_string(&self.worker_log).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        let tail = lines.get(lines.len().saturating_sub(TAIL_LINES)..).unwrap_or_default().join("\n  ");
        let log = self.worker_log.display();
        Failure::new(exit::FAILED, format!("the local worker ended: {how}; last lines of {log}:\n  {tail}"))
    }

    /// Ends the daemon, and with it its ranks, then the coordinator.
    pub async fn stop(mut self) {
        drop(self.worker_stdin.take());
        if tokio::time::timeout(STOP_LIMIT, self.worker.wait()).await.is_err() {
            let _ = self.worker.kill().await;
        }
        self.server.abort();
    }
}

/// The `worker` program: as told, beside this program, or on PATH.
///
/// # Errors
/// Where it is in none of these places.
pub fn find_worker(told: Option<&Path>) -> Result<PathBuf, Failure> {
    if let Some(path) = told {
        return Ok(path.to_owned());
    }
    let beside = std::env::current_exe().ok().and_then(|path| Some(path.parent()?.join("worker")));
    let on_path = std::env::var_os("PATH").unwrap_or_default();
    let candidates = beside.into_iter().chain(std::env::split_paths(&on_path).map(|dir| dir.join("worker")));
    candidates.into_iter().find(|path| path.is_file()).ok_or_else(|| {
        let hint = "build it (`make build`), or name it by --worker-bin";
        Failure::new(exit::USAGE, format!("no `worker` program beside this one or on PATH: {hint}"))
    })
}
