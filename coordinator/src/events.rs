//! `coordinator events`: what happened to a job, from its submission on.

use std::io::Write;
use std::process::ExitCode;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};
use tunefleet_proto::rpc::job_event::Body;
use tunefleet_proto::rpc::stage_changed::What;
use tunefleet_proto::rpc::{Failure, JobEvent, WatchRequest};

use crate::cli::exit;
use crate::connect::{self, Connect, Failure as Failed};

/// Command line of `coordinator events`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Name of the job.
    job: String,
    #[command(flatten)]
    connect: Connect,
    /// Goes on with what happens, until the job has ended.
    #[arg(short, long)]
    follow: bool,
    /// Leaves out what is older, e.g. `90s`, `10m`, `2h`, `3d`.
    #[arg(long, value_name = "AGE", value_parser = age)]
    since: Option<Duration>,
    /// Leaves out logged steps and sections.
    #[arg(long)]
    brief: bool,
    /// One JSON object a line.
    #[arg(long)]
    json: bool,
}

/// Runs the verb.
pub fn run(args: Args) -> ExitCode {
    connect::block_on(async {
        let request =
            WatchRequest { job: args.job.clone(), only_past: !args.follow, ..WatchRequest::default() };
        let mut events = args.connect.client().await?.watch(request).await?.into_inner();
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let since = args.since.map_or(0, |age| now.saturating_sub(age).as_millis() as u64);
        let mut out = std::io::stdout().lock();
        while let Some(event) = events.message().await? {
            let is_detail = matches!(event.body, Some(Body::Step(_) | Body::Section(_)));
            if event.unix_ms < since || (args.brief && is_detail) {
                continue;
            }
            let line = if args.json { to_json(&event).to_string() } else { to_line(&event) };
            if writeln!(out, "{line}").is_err() {
                // A reader that has gone away wants no more.
                break;
            }
        }
        Ok::<u8, Failed>(exit::OK)
    })
}

/// `90s`, `10m`, `2h`, `3d`.
pub fn age(text: &str) -> Result<Duration, String> {
    let unit = text.chars().last().ok_or("is empty")?;
    let seconds = match unit {
        's' => 1,
        'm' => 60,
        'h' => 3600,
        'd' => 86_400,
        _ => return Err("must end in s, m, h or d".to_owned()),
    };
    let number: u64 = text[..text.len() - 1].parse().map_err(|error| format!("{error}"))?;
    Ok(Duration::from_secs(number.saturating_mul(seconds)))
}

/// `2026-11-25 07:40:12`, in UTC.
pub fn time(unix_ms: u64) -> String {
    let (days, seconds) = (unix_ms / 86_400_000, unix_ms / 1000 % 86_400);
    // Days since 1970 to a date: Howard Hinnant's `civil_from_days`, for dates after 1970.
    let shifted = days + 719_468;
    let (era, of_era) = (shifted / 146_097, shifted % 146_097);
    let year_of_era = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month = (5 * of_year + 2) / 153;
    let day = of_year - (153 * month + 2) / 5 + 1;
    let month = if month < 10 { month + 3 } else { month - 9 };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    let (hour, minute, second) = (seconds / 3600, seconds / 60 % 60, seconds % 60);
    format!("{year:04}-{month:02}-{day:02} {hour:02}:{minute:02}:{second:02}")
}

fn to_line(event: &JobEvent) -> String {
    format!("{}  a{}  {}", time(event.unix_ms), event.attempt, said(event))
}

fn said(event: &JobEvent) -> String {
    match &event.body {
        Some(Body::State(changed)) => match &changed.failure {
            Some(failure) => format!("{}: {}", changed.state().name(), blamed(failure)),
            None => changed.state().name().to_owned(),
        },
        Some(Body::Stage(changed)) => {
            let what = match changed.what() {
                What::Started => "started".to_owned(),
                What::Cached => "cached".to_owned(),
                What::Done => format!("done in {:.1} s", changed.seconds),
                What::Unspecified => String::new(),
            };
            format!("stage {} {what}", changed.stage().name())
        }
        Some(Body::Note(text)) => text.clone(),
        Some(Body::Step(step)) => format!("step {} loss {:.4}", step.step, step.loss),
        Some(Body::Evaluated(evaluated)) => {
            format!("step {} eval loss {:.4}", evaluated.step, evaluated.loss)
        }
        Some(Body::Saved(saved)) => format!("step {} saved {}", saved.step, saved.path),
        Some(Body::Section(name)) => format!("section {name}"),
        Some(Body::Waiting(waiting)) => {
            format!("waits for {} slots, {} of {} are free", waiting.needed, waiting.free, waiting.total)
        }
        Some(Body::RankEnded(ended)) => {
            format!("rank {} on worker {}: {}", ended.rank, ended.worker, ended.how)
        }
        Some(Body::AttemptEnded(ended)) => {
            let failure = ended.failure.clone().unwrap_or_default();
            format!("attempt ended: {}; {}", blamed(&failure), ended.decision)
        }
        Some(Body::Worker(seen)) => format!("worker {}: {}", seen.worker, seen.detail),
        None => "something that this version does not know".to_owned(),
    }
}

/// The cause, and who is to blame.
pub fn blamed(failure: &Failure) -> String {
    match failure.rank {
        Some(rank) => format!("rank {rank} on worker {}: {}", failure.worker, failure.cause),
        None => failure.cause.clone(),
    }
}

/// An event as JSON.
pub fn to_json(event: &JobEvent) -> Value {
    let (kind, more) = match &event.body {
        Some(Body::State(changed)) => (
            "state",
            json!({ "state": changed.state().name(), "failure": changed.failure.as_ref().map(failure) }),
        ),
        Some(Body::Stage(changed)) => (
            "stage",
            json!({ "stage": changed.stage().name(), "what": changed.what().as_str_name(), "output": changed.output,
                    "seconds": changed.seconds }),
        ),
        Some(Body::Step(step)) => (
            "step",
            json!({ "step": step.step, "loss": step.loss, "grad_norm": step.grad_norm,
                    "learning_rate": step.learning_rate, "tokens": step.tokens,
                    "tokens_per_second": step.tokens_per_second, "step_seconds": step.step_seconds }),
        ),
        Some(Body::Evaluated(evaluated)) => {
            ("evaluated", json!({ "step": evaluated.step, "loss": evaluated.loss }))
        }
        Some(Body::Saved(saved)) => ("saved", json!({ "step": saved.step, "path": saved.path })),
        Some(Body::AttemptEnded(ended)) => (
            "attempt_ended",
            json!({ "failure": ended.failure.as_ref().map(failure), "restarts": ended.restarts,
                    "restart_delay_ms": ended.restart_delay_ms, "restarts_left": ended.restarts_left,
                    "counted": ended.counted, "decision": ended.decision }),
        ),
        Some(Body::RankEnded(ended)) => (
            "rank_ended",
            json!({ "rank": ended.rank, "worker": ended.worker, "how": ended.how,
                    "aborted_by_peer": ended.aborted_by_peer }),
        ),
        Some(Body::Worker(seen)) => {
            ("worker", json!({ "worker": seen.worker, "state": seen.state().name(), "detail": seen.detail }))
        }
        Some(Body::Note(text)) => ("note", json!({ "text": text })),
        Some(Body::Section(name)) => ("section", json!({ "section": name })),
        Some(Body::Waiting(waiting)) => {
            ("waiting", json!({ "needed": waiting.needed, "free": waiting.free, "total": waiting.total }))
        }
        None => ("unknown", json!({})),
    };
    let mut line = json!({
        "sequence": event.sequence, "unix_ms": event.unix_ms, "job": event.job, "attempt": event.attempt, "kind": kind,
        "said": said(event),
    });
    if let (Some(line), Value::Object(more)) = (line.as_object_mut(), more) {
        line.extend(more);
    }
    line
}

/// A failure as JSON.
pub fn failure(failure: &Failure) -> Value {
    json!({
        "kind": failure.kind().name(), "stage": failure.stage().name(), "cause": failure.cause, "rank": failure.rank,
        "worker": failure.worker, "exit": failure.exit, "log_path": failure.log_path,
        "last_lines": failure.last_lines, "aborted_ranks": failure.aborted_ranks,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_dates_and_ages_have_units() {
        assert_eq!(time(0), "1970-01-01 00:00:00");
        assert_eq!(time(951_827_696_000), "2000-02-29 12:34:56");
        assert_eq!(time(1_795_592_412_000), "2026-11-25 07:40:12");
        assert_eq!(age("90s"), Ok(Duration::from_secs(90)));
        assert_eq!(age("3d"), Ok(Duration::from_secs(259_200)));
        for wrong in ["", "m", "10", "1.5h", "-3s", "\u{e9}"] {
            assert!(age(wrong).is_err(), "{wrong:?}");
        }
    }
}
