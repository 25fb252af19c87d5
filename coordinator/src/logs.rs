//! `coordinator logs`: what the ranks of a job wrote, from whichever workers they ran on.

use std::io::{IsTerminal, Write};
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tonic::Code;
use tunefleet_proto::rpc::{ControlClient, LogLines, LogsRequest, Stage, StatusRequest};

use crate::cli::exit;
use crate::connect::{self, Connect, Failure};
use crate::events::age;

/// Command line of `coordinator logs`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Name of the job.
    job: String,
    #[command(flatten)]
    connect: Connect,
    /// Rank whose log is shown; the logs of all when absent.
    #[arg(long)]
    rank: Option<u32>,
    /// Attempt whose logs are shown; the last when absent.
    #[arg(long)]
    attempt: Option<u32>,
    /// Goes on with what is written, until the attempt has ended.
    #[arg(short, long)]
    follow: bool,
    /// Leaves out what is older, e.g. `90s`, `10m`, `2h`, `3d`.
    #[arg(long, value_name = "AGE", value_parser = age)]
    since: Option<Duration>,
    /// Only so many of the last lines of each log.
    #[arg(long, value_name = "LINES")]
    tail: Option<u32>,
}

/// Runs the verb.
pub fn run(args: Args) -> ExitCode {
    connect::block_on(show(args))
}

async fn show(args: Args) -> Result<u8, Failure> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let request = LogsRequest {
        job: args.job.clone(),
        attempt: args.attempt.unwrap_or(0),
        rank: args.rank,
        since_unix_ms: args.since.map_or(0, |age| now.saturating_sub(age).as_millis() as u64),
        follow: args.follow,
        tail_lines: args.tail.unwrap_or(0),
    };
    let mut client = args.connect.client().await?;
    match stream(&mut client, request).await {
        // Its workers may be gone, and their disk may be here.
        Err(status) if matches!(status.code(), Code::NotFound | Code::Unavailable) => {
            from_disk(&mut client, &args, &status).await
        }
        outcome => Ok(outcome?),
    }
}

async fn stream(client: &mut ControlClient, request: LogsRequest) -> Result<u8, tonic::Status> {
    let mut logs = client.logs(request).await?.into_inner();
    let mut out = std::io::stdout().lock();
    let colour = out.is_terminal() && std::env::var_os("NO_COLOR").is_none();
    while let Some(lines) = logs.message().await? {
        let prefix = prefix(&lines, colour);
        for line in &lines.lines {
            if writeln!(out, "{prefix}{line}").is_err() {
                // A reader that has gone away wants no more.
                return Ok(exit::OK);
            }
        }
    }
    Ok(exit::OK)
}

/// `[worker/rank] `, or the stage of tasks of one rank.
fn prefix(lines: &LogLines, colour: bool) -> String {
    let who = match lines.stage() {
        Stage::Train => lines.rank.to_string(),
        stage if lines.rank > 0 => format!("{}-{}", stage.name(), lines.rank),
        stage => stage.name().to_owned(),
    };
    let text = format!("[{}/{who}] ", lines.worker);
    if colour { format!("\x1b[{}m{text}\x1b[0m", 31 + lines.rank % 6) } else { text }
}

async fn from_disk(client: &mut ControlClient, args: &Args, why: &tonic::Status) -> Result<u8, Failure> {
    let status = client.status(StatusRequest { job: args.job.clone() }).await?.into_inner();
    let attempt = args.attempt.unwrap_or(status.attempt);
    let dir = Path::new(&status.output).join("logs").join(format!("attempt-{attempt}"));
    let missing = |error: &dyn std::fmt::Display| {
        Failure::new(exit::NOT_FOUND, format!("{}; {}: {error}", why.message(), dir.display()))
    };
    let mut files = Vec::new();
    for entry in std::fs::read_dir(&dir).map_err(|error| missing(&error))? {
        files.push(entry.map_err(|error| missing(&error))?.path());
    }
    files.retain(|path| match args.rank {
        Some(rank) => path.ends_with(format!("rank-{rank}.log")),
        None => path.extension().is_some_and(|extension| extension == "log"),
    });
    if files.is_empty() {
        return Err(missing(&"no such log"));
    }
    files.sort();
    let mut out = std::io::stdout().lock();
    for path in files {
        let text = std::fs::read(&path).map_err(|error| missing(&error))?;
        let _ = writeln!(out, "==> {} <==", path.display());
        let _ = out.write_all(&text);
    }
    Ok(exit::OK)
}
