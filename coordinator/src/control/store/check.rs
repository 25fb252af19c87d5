//! Whether a state is whole, and copies of it. A running coordinator is not disturbed.

use std::path::Path;

use rusqlite::{Connection, OpenFlags, OptionalExtension};
use tunefleet_proto::rpc::finding::Verdict;
use tunefleet_proto::rpc::job_event::Body;
use tunefleet_proto::rpc::{Finding, JobState};

use super::{StoreError, sqlite};

/// Shown at most of one kind of damage.
const SHOWN: usize = 5;

/// Looks at the whole state in `dir`: the file, the numbers of events, and that what is said of a job is what its
/// events tell.
///
/// # Errors
/// When it cannot be read at all.
pub fn check(dir: &Path) -> Result<Vec<Finding>, StoreError> {
    let path = dir.join(sqlite::FILE);
    let connection = read_only(&path)?;
    let at = |cause| StoreError::sqlite(&path, cause);
    let mut findings = Vec::new();
    let said: Vec<String> = column(&connection, "PRAGMA integrity_check(10)").map_err(at)?;
    let is_whole = said == ["ok"];
    findings.push(finding(
        "state file",
        is_whole,
        if is_whole { "whole".to_owned() } else { said.join("; ") },
    ));
    let sql = "SELECT job || ': ' || count(*) || ' events up to number ' || max(sequence) FROM events \
               GROUP BY job HAVING max(sequence) <> count(*) AND max(sequence) <= 200000";
    let gaps: Vec<String> = column(&connection, sql).map_err(at)?;
    findings.push(finding("events", gaps.is_empty(), described(&gaps, "numbered without a gap")));
    let wrong = not_as_told(&connection).map_err(at)?;
    findings.push(finding("jobs", wrong.is_empty(), described(&wrong, "as their events tell")));
    Ok(findings)
}

/// Jobs whose row says something else than their events.
fn not_as_told(connection: &Connection) -> rusqlite::Result<Vec<String>> {
    let mut jobs = connection.prepare("SELECT name, state FROM jobs ORDER BY name")?;
    let rows = jobs.query_map([], |row| Ok((row.get::<_, String>(0)?, row.get::<_, String>(1)?)))?;
    let mut wrong = Vec::new();
    for row in rows {
        let (job, state) = row?;
        let told = match sqlite::told_state(connection, &job)? {
            None => Some(JobState::Queued),
            Some(event) => match event.and_then(|event| event.body) {
                Some(Body::State(changed)) => Some(changed.state()),
                _ => None,
            },
        };
        match told {
            None => wrong.push(format!("{job}: the event that tells its state cannot be read")),
            Some(told) if told.name() != state => {
                wrong.push(format!("{job} is {state} and its events say {}", told.name()));
            }
            Some(_) => {}
        }
    }
    Ok(wrong)
}

/// Copies the state in `dir` to the file `to`, consistent though a coordinator may be writing.
///
/// # Errors
/// When either cannot be read or written; an existing file is not replaced.
pub fn backup(dir: &Path, to: &Path) -> Result<(), StoreError> {
    if to.exists() {
        let cause = std::io::ErrorKind::AlreadyExists.into();
        return Err(StoreError::Io { what: "writing the copy", dir: to.to_owned(), cause });
    }
    let path = dir.join(sqlite::FILE);
    sqlite::copy_to(&read_only(&path)?, &path, to)
}

/// Puts the copy `from` in the place of the state in `dir`, which no coordinator may be using. The former state
/// stays beside it; at no moment is there none.
///
/// # Errors
/// When the copy is damaged or something else, or the directory is in use.
pub fn restore(from: &Path, dir: &Path) -> Result<(), StoreError> {
    let copy = read_only(from)?;
    let at = |cause| StoreError::sqlite(from, cause);
    let said: Vec<String> = column(&copy, "PRAGMA integrity_check(1)").map_err(at)?;
    if said != ["ok"] {
        return Err(StoreError::Damaged { path: from.to_owned(), cause: said.join("; ") });
    }
    if sqlite::identify(&copy, from)? == 0 {
        return Err(StoreError::Foreign(from.to_owned()));
    }
    let io = |cause| StoreError::Io { what: "restoring", dir: dir.to_owned(), cause };
    std::fs::create_dir_all(dir).map_err(io)?;
    let _lock = sqlite::lock(dir)?;
    let (path, begun) = (dir.join(sqlite::FILE), dir.join("state.db.begun"));
    let _ = std::fs::remove_file(&begun);
    sqlite::copy_to(&copy, from, &begun)?;
    let restored = Connection::open(&begun).map_err(at)?;
    // Workers obey no start of the coordinator that is older than one they have obeyed.
    restored.execute("UPDATE identity SET generation = generation + 1000000", []).map_err(at)?;
    drop(restored);
    std::fs::File::open(&begun).and_then(|file| file.sync_all()).map_err(io)?;
    if path.exists() {
        // With what its log still holds.
        let replaced = dir.join(format!("state-{}.replaced.db", crate::control::events::unix_ms()));
        sqlite::copy_to(&read_only(&path)?, &path, &replaced)?;
    }
    std::fs::rename(&begun, &path).map_err(io)?;
    for suffix in ["-wal", "-shm"] {
        match std::fs::remove_file(dir.join(format!("{}{suffix}", sqlite::FILE))) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(io(error)),
            _ => {}
        }
    }
    Ok(())
}

/// What is in the state: a name and a number for each kind of row.
///
/// # Errors
/// When it cannot be read.
pub fn info(dir: &Path) -> Result<Vec<(String, String)>, StoreError> {
    let path = dir.join(sqlite::FILE);
    let connection = read_only(&path)?;
    let at = |cause| StoreError::sqlite(&path, cause);
    let one = |sql: &str| -> Result<String, StoreError> {
        let value: Option<String> = connection.query_row(sql, [], |row| row.get(0)).optional().map_err(at)?;
        Ok(value.unwrap_or_default())
    };
    let mut lines = vec![
        ("cluster".to_owned(), one("SELECT cluster FROM identity")?),
        ("starts".to_owned(), one("SELECT CAST(generation AS TEXT) FROM identity")?),
    ];
    for table in ["jobs", "attempts", "events", "workers", "audit"] {
        let count = one(&format!("SELECT CAST(count(*) AS TEXT) FROM {table}"))?;
        lines.push((table.to_owned(), count));
    }
    Ok(lines)
}

fn read_only(path: &Path) -> Result<Connection, StoreError> {
    sqlite::connect(path, OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX)
}

fn column(connection: &Connection, sql: &str) -> rusqlite::Result<Vec<String>> {
    let mut statement = connection.prepare(sql)?;
    let rows = statement.query_map([], |row| row.get(0))?;
    rows.collect()
}

fn described(wrong: &[String], well: &str) -> String {
    match wrong {
        [] => well.to_owned(),
        _ => {
            let more = wrong.len().saturating_sub(SHOWN);
            let more = if more > 0 { format!(" and {more} more") } else { String::new() };
            format!(
                "{}{more}: restore a backup with `coordinator store restore`",
                wrong[..wrong.len().min(SHOWN)].join("; ")
            )
        }
    }
}

fn finding(check: &str, is_well: bool, detail: String) -> Finding {
    let verdict = if is_well { Verdict::Ok } else { Verdict::Critical };
    Finding { place: "coordinator".to_owned(), check: check.to_owned(), verdict: verdict.into(), detail }
}
