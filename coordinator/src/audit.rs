//! `coordinator audit`: who asked a coordinator for what, and what was refused.

use std::io::Write;
use std::process::ExitCode;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};
use tunefleet_proto::rpc::{AuditRecord, AuditRequest};

use crate::cli::exit;
use crate::connect::{self, Connect, Failure};
use crate::events::{age, time};

/// Command line of `coordinator audit`.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    connect: Connect,
    /// Leaves out what is older, e.g. `90s`, `10m`, `2h`, `3d`.
    #[arg(long, value_name = "AGE", value_parser = age)]
    since: Option<Duration>,
    /// Only what was refused.
    #[arg(long)]
    refused: bool,
    /// One JSON object a line.
    #[arg(long)]
    json: bool,
}

/// Runs the verb.
pub fn run(args: Args) -> ExitCode {
    connect::block_on(async {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let since_unix_ms = args.since.map_or(0, |age| now.saturating_sub(age).as_millis() as u64);
        let mut client = args.connect.client().await?;
        let mut records = client.audit(AuditRequest { since_unix_ms }).await?.into_inner();
        let mut out = std::io::stdout().lock();
        while let Some(record) = records.message().await? {
            if args.refused && record.refused.is_empty() {
                continue;
            }
            let line = if args.json { to_json(&record).to_string() } else { to_line(&record) };
            if writeln!(out, "{line}").is_err() {
                // A reader that has gone away wants no more.
                break;
            }
        }
        Ok::<u8, Failure>(exit::OK)
    })
}

fn to_line(record: &AuditRecord) -> String {
    let outcome = match record.refused.as_str() {
        "" => "done".to_owned(),
        why => format!("refused: {}", shown(why)),
    };
    format!(
        "{}  {} from {}  {} {}  {outcome}",
        time(record.unix_ms),
        shown(&record.actor),
        shown(&record.peer),
        shown(&record.action),
        shown(&record.target)
    )
}

/// What callers chose themselves must not steer the terminal, nor look like another record.
fn shown(text: &str) -> String {
    let mut safe = String::with_capacity(text.len());
    for character in text.chars() {
        if character.is_control() {
            safe.extend(character.escape_default());
        } else {
            safe.push(character);
        }
    }
    safe
}

fn to_json(record: &AuditRecord) -> Value {
    json!({
        "unix_ms": record.unix_ms, "actor": record.actor, "peer": record.peer, "action": record.action,
        "target": record.target, "refused": record.refused,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(target: &str, refused: &str) -> AuditRecord {
        AuditRecord {
            unix_ms: 1_795_592_412_000,
            actor: "nobody".to_owned(),
            peer: "10.0.0.7:4242".to_owned(),
            action: "cancel".to_owned(),
            target: target.to_owned(),
            refused: refused.to_owned(),
        }
    }

    #[test]
    fn a_record_says_who_asked_for_what_and_whether_it_was_done() {
        let line = to_line(&record("job-1", ""));
        assert_eq!(line, "2026-11-25 07:40:12  nobody from 10.0.0.7:4242  cancel job-1  done");
        assert!(to_line(&record("job-1", "no valid token")).ends_with("refused: no valid token"));
    }

    #[test]
    fn what_a_caller_chose_neither_steers_the_terminal_nor_begins_a_line() {
        let line = to_line(&record("job\u{1b}[2J\nadmin", "x\ry"));
        assert!(!line.chars().any(char::is_control), "{line:?}");
        assert!(line.contains("job\\u{1b}[2J\\nadmin"), "{line}");
    }
}
