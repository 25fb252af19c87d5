//! `coordinator serve`: the control plane as a program of its own.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use tokio::signal::unix::{SignalKind, signal};

use tunefleet_proto::dial::Credentials;
use tunefleet_proto::service_manager;

use crate::cli::exit;
use crate::connect::{self, Failure};
use crate::control::store::{self, StoreError};
use crate::control::{Access, AccessError, Door, Plane, ServeError, Server, Settings, StartError, TlsFiles};
use crate::{monitor, traces};

/// Command line of `coordinator serve`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// YAML file with these flags, e.g. `suspect_after: 10`; the command line wins over the environment, and that
    /// over the file.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Address to listen on; port 0 takes any free one.
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:7070")]
    listen: SocketAddr,
    /// File with a token that may do all, beside those of `coordinator tokens`. TUNEFLEET_TOKEN does the same.
    #[arg(long, value_name = "FILE")]
    token_file: Option<PathBuf>,
    /// Certificate of this coordinator (PEM), and those between it and its authority: speak TLS. It is read again
    /// when it changes.
    #[arg(long, value_name = "FILE", requires = "tls_key")]
    tls_cert: Option<PathBuf>,
    /// The private key (PEM) of that certificate.
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    tls_key: Option<PathBuf>,
    /// Who may have signed the certificates of workers (PEM): each must show one for its name.
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    client_ca: Option<PathBuf>,
    /// Listen on other than a loopback address without TLS: who can listen in sees tokens and logs.
    #[arg(long, env = "TUNEFLEET_INSECURE")]
    insecure: bool,
    /// Where Prometheus' metrics and service discovery are served, and the health of this process: /metrics,
    /// /sd/targets, /healthz, /readyz. Plain HTTP, which asks for no token.
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:0")]
    metrics: SocketAddr,
    /// Seconds after which jobs that have ended, and workers that are gone, leave the metrics.
    #[arg(long, value_name = "SECONDS", default_value_t = 3600)]
    metrics_keep: u64,
    /// Where spans of jobs and calls go: a collector of OpenTelemetry that speaks OTLP over gRPC, e.g.
    /// http://127.0.0.1:4317. Default: none are sent.
    #[arg(long, value_name = "URL", env = "OTEL_EXPORTER_OTLP_ENDPOINT")]
    otlp_endpoint: Option<String>,
    /// Directory of the coordinator's state: jobs, events, workers. Only one coordinator may use it.
    /// Default: $STATE_DIRECTORY, else $XDG_STATE_HOME/tunefleet/coordinator, else
    /// ~/.local/state/tunefleet/coordinator.
    #[arg(long, value_name = "DIR", env = "TUNEFLEET_STATE")]
    state: Option<PathBuf>,
    /// Seconds of silence after which a worker is suspect.
    #[arg(long, value_name = "SECONDS", default_value_t = 5.0)]
    suspect_after: f64,
    /// Seconds of silence after which a worker is lost: nothing is placed there, and its ranks are left alone.
    #[arg(long, value_name = "SECONDS", default_value_t = 15.0)]
    lost_after: f64,
    /// Seconds of silence after which the ranks of a worker count as gone, and their jobs go on elsewhere. A worker
    /// that is only cut off trains on until then.
    #[arg(long, value_name = "SECONDS", default_value_t = 300.0)]
    give_up_after: f64,
    /// Days after which jobs that have ended, and records of the audit, are forgotten; what jobs made stays.
    #[arg(long, value_name = "DAYS", default_value_t = 90, value_parser = clap::value_parser!(u32).range(1..=36500))]
    keep_ended_days: u32,
}

impl From<StartError> for Failure {
    fn from(error: StartError) -> Self {
        Failure::new(exit::FAILED, error.to_string())
    }
}

impl From<StoreError> for Failure {
    fn from(error: StoreError) -> Self {
        Failure::new(exit::FAILED, error.to_string())
    }
}

impl From<AccessError> for Failure {
    fn from(error: AccessError) -> Self {
        Failure::new(exit::FAILED, error.to_string())
    }
}

impl From<ServeError> for Failure {
    fn from(error: ServeError) -> Self {
        Failure::new(exit::FAILED, error.to_string())
    }
}

/// Runs the verb.
pub fn run(args: Args) -> ExitCode {
    connect::block_on(serve(args))
}

async fn serve(args: Args) -> Result<u8, Failure> {
    let settings = settings(&args)?;
    let dir = state_dir(args.state.clone())?;
    let (store, history) = store::open(&dir)?;
    let server = Server::bind(args.listen, door(&args, &dir)?).await?;
    if let Some(endpoint) = &args.otlp_endpoint {
        let bad = |error| Failure::new(exit::USAGE, format!("--otlp-endpoint {endpoint}: {error}"));
        traces::export_to(endpoint).map_err(bad)?;
    }
    let plane = Plane::start(store, history, settings)?;
    let metrics_url = monitor::serve(args.metrics, plane.clone()).await?;
    eprintln!(
        "coordinator listens on {}, metrics on {metrics_url}, state in {}",
        server.url(),
        dir.display()
    );
    let stop = |kind| signal(kind).map_err(|error| Failure::new(exit::FAILED, error.to_string()));
    let mut terminate = stop(SignalKind::terminate())?;
    let mut interrupt = stop(SignalKind::interrupt())?;
    service_manager::ready(&format!("listens on {}", server.url()));
    tokio::select! {
        served = server.serve(plane) => served?,
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
        () = live() => {}
    }
    service_manager::stopping();
    let _ = tokio::task::spawn_blocking(traces::flush).await;
    Ok(0)
}

/// Gives systemd's watchdog its signs of life, as long as this runtime gets round to it.
async fn live() {
    let Some(interval) = service_manager::watchdog_interval() else { return std::future::pending().await };
    loop {
        service_manager::alive();
        tokio::time::sleep(interval).await;
    }
}

/// What is wrong with these arguments, where that can be seen without serving.
///
/// # Errors
/// The first fault.
pub fn check(args: &Args) -> Result<(), Failure> {
    settings(args)?;
    let dir = state_dir(args.state.clone())?;
    door(args, &dir)?.check(args.listen)?;
    Ok(())
}

/// Who may reach it, and how.
fn door(args: &Args, dir: &Path) -> Result<Door, Failure> {
    let credentials = Credentials { token_file: args.token_file.clone(), ..Credentials::default() };
    let shared = credentials.token()?.map(|token| token.sha256().to_owned());
    let access = Access::open(Some(dir.to_owned()), shared)?;
    let tls = match (&args.tls_cert, &args.tls_key) {
        (Some(cert), Some(key)) => {
            Some(TlsFiles { cert: cert.clone(), key: key.clone(), client_ca: args.client_ca.clone() })
        }
        _ => None,
    };
    Ok(Door { access, tls, insecure: args.insecure })
}

/// How patient it is with workers, which must make sense in its order.
fn settings(args: &Args) -> Result<Settings, Failure> {
    let seconds = [args.suspect_after, args.lost_after, args.give_up_after];
    let durations = seconds.map(Duration::try_from_secs_f64);
    let [Ok(suspect_after), Ok(lost_after), Ok(give_up_after)] = durations else {
        return Err(Failure::new(
            exit::USAGE,
            "--suspect-after, --lost-after and --give-up-after are seconds",
        ));
    };
    let keep_ended = Duration::from_secs(24 * 3600 * u64::from(args.keep_ended_days));
    let show_ended = Duration::from_secs(args.metrics_keep);
    let settings =
        Settings { suspect_after, lost_after, give_up_after, keep_ended, show_ended, ..Settings::default() };
    let shortest = 2 * settings.heartbeat;
    if suspect_after < shortest || lost_after <= suspect_after || give_up_after <= lost_after {
        let message = format!(
            "--suspect-after {}, --lost-after {} and --give-up-after {}: each must be longer than the one before, and the \
             first at least {} s, since workers speak every {} s",
            args.suspect_after,
            args.lost_after,
            args.give_up_after,
            shortest.as_secs_f64(),
            settings.heartbeat.as_secs_f64()
        );
        return Err(Failure::new(exit::USAGE, message));
    }
    Ok(settings)
}

/// Where the state is kept.
///
/// # Errors
/// When nothing says where.
pub fn state_dir(told: Option<PathBuf>) -> Result<PathBuf, Failure> {
    let of = |variable: &str| std::env::var_os(variable).filter(|value| !value.is_empty()).map(PathBuf::from);
    let home = || of("HOME").map(|home| home.join(".local/state"));
    told.or_else(|| of("STATE_DIRECTORY"))
        .or_else(|| Some(of("XDG_STATE_HOME").or_else(home)?.join("tunefleet/coordinator")))
        .ok_or_else(|| Failure::new(exit::USAGE, "no place for the state: pass --state DIR"))
}
