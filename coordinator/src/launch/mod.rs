//! `coordinator launch`: a job file from repositories to an exported model, in one command.
//!
//! Without a coordinator to talk to, [`embedded`] starts one in this process, with a local worker
//! as its child. From there on both cases are the same: the job is submitted and watched over gRPC.

mod attend;
mod embedded;
pub mod screen;
mod summary;

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use tunefleet_proto::dial::Credentials;
use tunefleet_proto::job::JobSpec;
use tunefleet_proto::rpc::{Continuation, SubmitRequest};

use crate::cli::exit;
use crate::connect::{self, Failure};
use crate::hardware::Hardware;
use crate::job_file::{self, JobArgs};
use crate::plan::{self, Place};
use attend::{Attendance, Owner};
use embedded::Embedded;
pub use embedded::find_worker;

/// Command line of `coordinator launch`.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    job: JobArgs,
    /// Continue unfinished training from its newest checkpoint.
    #[arg(long, conflicts_with = "fresh")]
    resume: bool,
    /// Discard the checkpoints of an earlier attempt.
    #[arg(long)]
    fresh: bool,
    /// Submit, print the job's name and leave; needs a running coordinator.
    #[arg(long)]
    detach: bool,
    /// A running coordinator to submit to, instead of one inside this process.
    #[arg(long, value_name = "URL", env = "TUNEFLEET_COORDINATOR")]
    coordinator: Option<String>,
    #[command(flatten)]
    credentials: Credentials,
    /// The `worker` program; else the one beside this program, else the one on PATH.
    #[arg(long, value_name = "FILE")]
    worker_bin: Option<PathBuf>,
}

/// Runs the verb.
pub fn run(args: Args) -> ExitCode {
    connect::block_on(launch(args))
}

async fn launch(args: Args) -> Result<u8, Failure> {
    let bad_config = |error: job_file::Error| Failure::new(exit::BAD_CONFIG, error.to_string());
    let mut spec = args.job.load().map_err(bad_config)?;
    let remote = args.coordinator.clone().or_else(|| spec.workers.coordinator.clone());
    if remote.is_none() {
        // The model's files are on this machine: what is wrong with them is said before anything runs.
        let config = job_file::model_config(&spec).map_err(bad_config)?;
        let place = Place::of(&spec, &Hardware::find(), None);
        if let Some(chosen) = plan::choose(&mut spec, &config, &place)? {
            eprintln!("memory: {chosen}");
        }
    }
    let continuation = match (args.resume, args.fresh) {
        (true, _) => Continuation::Resume,
        (_, true) => Continuation::Fresh,
        _ => Continuation::Unspecified,
    };
    let spec_json =
        serde_json::to_string(&spec).map_err(|error| Failure::new(exit::FAILED, error.to_string()))?;
    let request = tunefleet_proto::hex(&rand::random::<[u8; 16]>());
    let submit = SubmitRequest { spec_json, continuation: continuation.into(), request };
    match remote {
        Some(url) => attached(&args, &url, &spec, submit).await,
        None if args.detach => {
            let hint = "--detach needs a running coordinator: pass --coordinator URL";
            Err(Failure::new(exit::USAGE, hint))
        }
        None => alone(&args, &spec, submit).await,
    }
}

/// On a coordinator that was there before and stays.
async fn attached(args: &Args, url: &str, spec: &JobSpec, submit: SubmitRequest) -> Result<u8, Failure> {
    let mut client = connect::client(url, &args.credentials).await?;
    let submitted = match client.submit(submit.clone()).await {
        // Whether it has arrived is not known: the same request again is one job in any case.
        Err(status) if status.code() == tonic::Code::Unavailable => client.submit(submit).await?,
        submitted => submitted?,
    };
    let submitted = submitted.into_inner();
    if args.detach {
        let _ = writeln!(std::io::stdout(), "{}", submitted.job);
        return Ok(exit::OK);
    }
    let owner = Owner::Remote { url: url.to_owned() };
    Attendance::new(client, submitted, spec, &args.job, owner).until_end().await
}

/// With a coordinator and a worker of its own, which end with it.
async fn alone(args: &Args, spec: &JobSpec, submit: SubmitRequest) -> Result<u8, Failure> {
    let mut embedded = Embedded::start(spec, args.worker_bin.as_deref()).await?;
    let mut client = embedded.client().await?;
    let outcome = match client.submit(submit).await {
        Ok(submitted) => {
            let submitted = submitted.into_inner();
            let attendance = Attendance::new(client, submitted, spec, &args.job, Owner::Embedded);
            tokio::select! {
                outcome = attendance.until_end() => outcome,
                failure = embedded.worker_ended() => Err(failure),
            }
        }
        Err(status) => Err(status.into()),
    };
    embedded.stop().await;
    outcome
}
