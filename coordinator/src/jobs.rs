//! The verbs that ask a running coordinator about its jobs: `list`, `status`, `cancel`, `suspend`, `resume`.

use std::io::Write;
use std::process::ExitCode;

use serde_json::{Value, json};
use tunefleet_proto::rpc::{
    AttemptStatus, CancelRequest, JobState, JobStatus, ListRequest, ResumeRequest, Stage, StatusRequest,
    SuspendRequest,
};

use crate::connect::{self, Connect, Failure};
use crate::events::time;
use crate::launch::screen::{duration, grouped};

/// Seconds that saving a checkpoint may take after `coordinator cancel`, where it says nothing else.
const CANCEL_GRACE_SECONDS: u32 = 600;

/// Command line of `coordinator list`.
#[derive(Debug, clap::Args)]
pub struct ListArgs {
    #[command(flatten)]
    connect: Connect,
    /// One JSON document instead of a table.
    #[arg(long)]
    json: bool,
}

/// Command line of `coordinator status`.
#[derive(Debug, clap::Args)]
pub struct StatusArgs {
    /// Name of the job.
    job: String,
    #[command(flatten)]
    connect: Connect,
    /// One JSON document instead of a table.
    #[arg(long)]
    json: bool,
}

/// Command line of `coordinator cancel`.
#[derive(Debug, clap::Args)]
pub struct CancelArgs {
    /// Name of the job.
    job: String,
    #[command(flatten)]
    connect: Connect,
    /// Seconds that saving a checkpoint may take; 0 stops at once, with none.
    #[arg(long, value_name = "SECONDS", default_value_t = CANCEL_GRACE_SECONDS)]
    grace: u32,
}

/// Command line of `coordinator suspend`.
#[derive(Debug, clap::Args)]
pub struct SuspendArgs {
    /// Name of the job.
    job: String,
    #[command(flatten)]
    connect: Connect,
    /// Seconds that saving a checkpoint may take.
    #[arg(long, value_name = "SECONDS", default_value_t = CANCEL_GRACE_SECONDS)]
    grace: u32,
}

/// Command line of `coordinator resume`.
#[derive(Debug, clap::Args)]
pub struct ResumeArgs {
    /// Name of the job.
    job: String,
    #[command(flatten)]
    connect: Connect,
}

/// Runs `coordinator list`.
pub fn list(args: ListArgs) -> ExitCode {
    connect::block_on(async {
        let jobs = args.connect.client().await?.list(ListRequest {}).await?.into_inner().jobs;
        if args.json {
            return show(&Value::from_iter(jobs.iter().map(to_json)));
        }
        table(&jobs)
    })
}

/// Runs `coordinator status`.
pub fn status(args: StatusArgs) -> ExitCode {
    connect::block_on(async {
        let request = StatusRequest { job: args.job };
        let status = args.connect.client().await?.status(request).await?.into_inner();
        if args.json { show(&to_json(&status)) } else { page(&status) }
    })
}

/// Runs `coordinator cancel`.
pub fn cancel(args: CancelArgs) -> ExitCode {
    connect::block_on(async {
        let request = CancelRequest { job: args.job, grace_ms: u64::from(args.grace) * 1000 };
        let status = args.connect.client().await?.cancel(request).await?.into_inner();
        table(&[status])
    })
}

/// Runs `coordinator suspend`.
pub fn suspend(args: SuspendArgs) -> ExitCode {
    connect::block_on(async {
        let request = SuspendRequest { job: args.job, grace_ms: u64::from(args.grace) * 1000 };
        let status = args.connect.client().await?.suspend(request).await?.into_inner();
        table(&[status])
    })
}

/// Runs `coordinator resume`.
pub fn resume(args: ResumeArgs) -> ExitCode {
    connect::block_on(async {
        let request = ResumeRequest { job: args.job };
        let status = args.connect.client().await?.resume(request).await?.into_inner();
        table(&[status])
    })
}

/// A job as JSON.
pub fn to_json(status: &JobStatus) -> Value {
    json!({
        "job": status.job,
        "attempt": status.attempt,
        "method": status.method,
        "state": status.state().name(),
        "stage": (status.stage() != Stage::Unspecified).then(|| status.stage().name()),
        "step": status.step,
        "steps": status.steps,
        "loss": status.loss,
        "tokens_per_second": status.tokens_per_second,
        "output": status.output,
        "detail": status.detail,
        "priority": status.priority,
        "submitted_unix_ms": status.submitted_unix_ms,
        "remaining_seconds": status.remaining_seconds,
        "goodput_ratio": status.goodput_ratio,
        "workers": status.workers,
        "attempts": status.attempts.iter().map(attempt_json).collect::<Vec<_>>(),
    })
}

fn attempt_json(attempt: &AttemptStatus) -> Value {
    json!({
        "attempt": attempt.attempt,
        "state": attempt.state().name(),
        "began_unix_ms": attempt.began_unix_ms,
        "ended_unix_ms": (attempt.ended_unix_ms > 0).then_some(attempt.ended_unix_ms),
        "step": attempt.step,
        "kind": attempt.kind().name(),
        "cause": attempt.cause,
    })
}

/// All that is known of one job, and what to type next.
fn page(status: &JobStatus) -> Result<u8, Failure> {
    let mut text = format!("{}  {}  attempt {}\n", status.job, status.state().name(), status.attempt);
    let mut line = |name: &str, value: String| {
        if !value.is_empty() {
            text += &format!("  {name:<10} {value}\n");
        }
    };
    line("detail", status.detail.clone());
    line(
        "stage",
        if status.stage() == Stage::Unspecified { String::new() } else { status.stage().name().to_owned() },
    );
    let left = if status.remaining_seconds > 0.0 {
        format!(", {} left", duration(status.remaining_seconds))
    } else {
        String::new()
    };
    line("step", format!("{} of {}{left}", status.step, status.steps));
    line("loss", if status.loss.is_nan() { String::new() } else { format!("{:.4}", status.loss) });
    let rate = status.tokens_per_second;
    line("speed", if rate > 0.0 { format!("{} tokens/s", grouped(rate)) } else { String::new() });
    let goodput = status.goodput_ratio;
    line("goodput", if goodput > 0.0 { format!("{:.1}%", 100.0 * goodput) } else { String::new() });
    line("workers", status.workers.join(", "));
    line("priority", status.priority.to_string());
    line("submitted", format!("{} UTC", time(status.submitted_unix_ms)));
    line("output", status.output.clone());
    text += "attempts\n";
    for attempt in &status.attempts {
        let end = if attempt.ended_unix_ms == 0 {
            "lives".to_owned()
        } else {
            format!("{}: {}", attempt.state().name(), attempt.cause)
        };
        text += &format!(
            "  a{}  {}  step {}  {end}\n",
            attempt.attempt,
            time(attempt.began_unix_ms),
            attempt.step
        );
    }
    let job = &status.job;
    text += &match status.state() {
        JobState::Failed | JobState::Stopped | JobState::Suspended => {
            format!("next: coordinator logs {job}; coordinator resume {job}\n")
        }
        JobState::Completed | JobState::Cancelled | JobState::Unspecified => String::new(),
        _ => format!("next: coordinator events {job} -f; coordinator cancel {job}\n"),
    };
    // A reader that has gone away wants no more.
    let _ = std::io::stdout().write_all(text.as_bytes());
    Ok(0)
}

fn show(value: &Value) -> Result<u8, Failure> {
    // A reader that has gone away wants no more.
    let _ = writeln!(std::io::stdout(), "{value:#}");
    Ok(0)
}

fn table(jobs: &[JobStatus]) -> Result<u8, Failure> {
    let mut out = std::io::stdout().lock();
    let _ = writeln!(
        out,
        "{:<24} {:>7} {:<10} {:<10} {:>13} {:>9}  DETAIL",
        "JOB", "ATTEMPT", "STATE", "STAGE", "STEP", "LOSS"
    );
    for job in jobs {
        let step = format!("{}/{}", job.step, job.steps);
        let loss = if job.loss.is_nan() { "-".to_owned() } else { format!("{:.4}", job.loss) };
        let stage = if job.stage() == Stage::Unspecified { "-" } else { job.stage().name() };
        let _ = writeln!(
            out,
            "{:<24} {:>7} {:<10} {:<10} {:>13} {:>9}  {}",
            job.job,
            job.attempt,
            job.state().name(),
            stage,
            step,
            loss,
            job.detail
        );
    }
    Ok(0)
}
