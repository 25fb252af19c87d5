//! Rows in one SQLite file: `state.db` in the state directory, in WAL mode with `synchronous=FULL`, so that what
//! was committed survives a power cut. One process has the directory, one of its threads writes.

use std::fs::{File, TryLockError};
use std::io::{Read, Seek, Write as _};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use prost::Message;
use rusqlite::{Connection, OpenFlags, OptionalExtension, Transaction, params};
use tunefleet_proto::ids::{Attempt, JobId};
use tunefleet_proto::rpc::job_event::Body;
use tunefleet_proto::rpc::{AuditRecord, FailureKind, JobEvent, JobState};

use super::{AttemptRow, History, JobRow, Loaded, Store, StoreError, WorkerRow, Write};
use crate::control::placement::WorkerName;

/// The file inside the state directory.
pub const FILE: &str = "state.db";
const LOCK_FILE: &str = "lock";
/// "tnfl": tells the file from other databases.
const APPLICATION_ID: i32 = 0x746e_666c;
/// Each brings the schema from the version of its place to the next.
const MIGRATIONS: [&str; 1] = [include_str!("schema-1.sql")];
/// Logged steps of a job are kept up to so many events; what else happened is kept for good.
const MAX_EVENTS: i64 = 200_000;
/// Events between two looks at whether there are too many.
const PRUNE_EVERY: u64 = 1000;

/// Writes.
pub struct Sqlite {
    connection: Connection,
    path: PathBuf,
    /// Held as long as the store is open.
    _lock: File,
}

/// Reads, over a connection of its own.
pub struct Reader {
    connection: Mutex<Connection>,
    path: PathBuf,
}

/// Opens the state in `dir`, which is made where it is not there.
///
/// # Errors
/// See [`StoreError`].
pub fn open(dir: &Path) -> Result<(Sqlite, Reader), StoreError> {
    let io = |what| move |cause| StoreError::Io { what, dir: dir.to_owned(), cause };
    std::fs::create_dir_all(dir).map_err(io("making the state directory"))?;
    let lock = lock(dir)?;
    let path = dir.join(FILE);
    let mut connection = connect(&path, OpenFlags::default())?;
    identify(&connection, &path)?;
    let at = |cause| StoreError::sqlite(&path, cause);
    connection.pragma_update(None, "journal_mode", "WAL").map_err(at)?;
    connection.pragma_update(None, "synchronous", "FULL").map_err(at)?;
    migrate(&mut connection, &path)?;
    let reader = connect(&path, OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX)?;
    let reader = Reader { connection: Mutex::new(reader), path: path.clone() };
    Ok((Sqlite { connection, path, _lock: lock }, reader))
}

/// One coordinator for each state directory.
pub(super) fn lock(dir: &Path) -> Result<File, StoreError> {
    let io = |cause| StoreError::Io { what: "locking the state directory", dir: dir.to_owned(), cause };
    let path = dir.join(LOCK_FILE);
    let mut file =
        File::options().create(true).truncate(false).read(true).write(true).open(path).map_err(io)?;
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => {
            let mut owner = String::new();
            let _ = file.read_to_string(&mut owner);
            return Err(StoreError::Taken { dir: dir.to_owned(), owner: owner.trim().to_owned() });
        }
        Err(TryLockError::Error(cause)) => return Err(io(cause)),
    }
    file.set_len(0).and_then(|()| file.rewind()).map_err(io)?;
    write!(file, "{}", std::process::id()).map_err(io)?;
    Ok(file)
}

pub(super) fn connect(path: &Path, flags: OpenFlags) -> Result<Connection, StoreError> {
    let at = |cause| StoreError::sqlite(path, cause);
    let connection = Connection::open_with_flags(path, flags).map_err(at)?;
    connection.busy_timeout(std::time::Duration::from_secs(5)).map_err(at)?;
    Ok(connection)
}

/// The version of the state in this file, 0 for a file that was just made; refuses what is somebody else's or newer.
pub(super) fn identify(connection: &Connection, path: &Path) -> Result<usize, StoreError> {
    let at = |cause| StoreError::sqlite(path, cause);
    let number = |sql: &str| connection.query_row(sql, [], |row| row.get::<_, i64>(0)).map_err(at);
    let version = usize::try_from(number("PRAGMA user_version")?).unwrap_or(usize::MAX);
    let application = number("PRAGMA application_id")?;
    let is_empty = number("SELECT count(*) FROM sqlite_schema")? == 0;
    let is_new = version == 0 && application == 0 && is_empty;
    if !is_new && application != i64::from(APPLICATION_ID) {
        return Err(StoreError::Foreign(path.to_owned()));
    }
    if version > MIGRATIONS.len() {
        return Err(StoreError::Newer { path: path.to_owned(), found: version, known: MIGRATIONS.len() });
    }
    Ok(version)
}

/// Brings an older file up to date, after a copy of it was made.
fn migrate(connection: &mut Connection, path: &Path) -> Result<(), StoreError> {
    let at = |cause| StoreError::sqlite(path, cause);
    let version = identify(connection, path)?;
    if version > 0 && version < MIGRATIONS.len() {
        let copy = path.with_file_name(format!("state-v{version}.db"));
        copy_to(connection, path, &copy)?;
    }
    for (index, step) in MIGRATIONS.iter().enumerate().skip(version) {
        let transaction = connection.transaction().map_err(at)?;
        transaction.execute_batch(step).map_err(at)?;
        transaction.pragma_update(None, "application_id", APPLICATION_ID).map_err(at)?;
        transaction.pragma_update(None, "user_version", index as i64 + 1).map_err(at)?;
        transaction.commit().map_err(at)?;
    }
    Ok(())
}

/// A consistent copy of an open database, whatever is being written.
pub(super) fn copy_to(connection: &Connection, from: &Path, to: &Path) -> Result<(), StoreError> {
    let mut copy = Connection::open(to).map_err(|cause| StoreError::sqlite(to, cause))?;
    let backup = rusqlite::backup::Backup::new(connection, &mut copy);
    let pages = 1024;
    let done =
        backup.and_then(|backup| backup.run_to_completion(pages, std::time::Duration::from_millis(5), None));
    done.map_err(|cause| StoreError::sqlite(from, cause))
}

impl Store for Sqlite {
    fn load(&mut self) -> Result<Loaded, StoreError> {
        let at = |cause| StoreError::sqlite(&self.path, cause);
        let transaction = self.connection.transaction().map_err(at)?;
        let loaded = load(&transaction).map_err(at)?;
        transaction.commit().map_err(at)?;
        Ok(loaded)
    }

    fn commit(&mut self, writes: &[Write]) -> Result<(), StoreError> {
        let at = |cause| StoreError::sqlite(&self.path, cause);
        let transaction = self.connection.transaction().map_err(at)?;
        for write in writes {
            apply(&transaction, write).map_err(at)?;
        }
        transaction.commit().map_err(at)
    }
}

fn load(transaction: &Transaction<'_>) -> rusqlite::Result<Loaded> {
    transaction.execute("UPDATE identity SET generation = generation + 1", [])?;
    let (cluster, generation): (String, i64) =
        transaction.query_row("SELECT cluster, generation FROM identity", [], |row| {
            Ok((row.get(0)?, row.get(1)?))
        })?;
    let mut jobs = transaction.prepare(
        "SELECT name, state, submitted_unix_ms, request, spec_json, record_json FROM jobs ORDER BY name",
    )?;
    let jobs = jobs.query_map([], |row| {
        Ok(JobRow {
            id: JobId(row.get(0)?),
            state: job_state(&row.get::<_, String>(1)?),
            submitted_unix_ms: row.get::<_, i64>(2)? as u64,
            request: row.get(3)?,
            spec_json: row.get(4)?,
            record_json: row.get(5)?,
        })
    })?;
    let mut attempts = transaction.prepare(
        "SELECT job, attempt, began_unix_ms, ended_unix_ms, state, step, cause, kind FROM attempts \
         ORDER BY job, attempt",
    )?;
    let attempts = attempts.query_map([], |row| {
        Ok(AttemptRow {
            job: JobId(row.get(0)?),
            attempt: Attempt(row.get(1)?),
            began_unix_ms: row.get::<_, i64>(2)? as u64,
            ended_unix_ms: row.get::<_, i64>(3)? as u64,
            state: job_state(&row.get::<_, String>(4)?),
            step: row.get::<_, i64>(5)? as u64,
            cause: row.get(6)?,
            kind: failure_kind(&row.get::<_, String>(7)?),
        })
    })?;
    let mut workers = transaction.prepare(
        "SELECT name, journal, acknowledged, draining, register, seen_unix_ms FROM workers ORDER BY name",
    )?;
    let workers = workers.query_map([], |row| {
        Ok(WorkerRow {
            name: WorkerName::from(row.get::<_, String>(0)?.as_str()),
            journal: row.get(1)?,
            acknowledged: row.get::<_, i64>(2)? as u64,
            draining: row.get(3)?,
            register: row.get(4)?,
            seen_unix_ms: row.get::<_, i64>(5)? as u64,
        })
    })?;
    Ok(Loaded {
        cluster,
        generation: generation as u64,
        jobs: jobs.collect::<Result<_, _>>()?,
        attempts: attempts.collect::<Result<_, _>>()?,
        workers: workers.collect::<Result<_, _>>()?,
    })
}

fn apply(transaction: &Transaction<'_>, write: &Write) -> rusqlite::Result<()> {
    match write {
        Write::Job(row) => {
            let sql = "INSERT INTO jobs (name, state, submitted_unix_ms, request, spec_json, record_json) \
                       VALUES (?1, ?2, ?3, ?4, ?5, ?6) ON CONFLICT (name) DO UPDATE SET state = ?2, \
                       submitted_unix_ms = ?3, request = ?4, spec_json = ?5, record_json = ?6";
            transaction.prepare_cached(sql)?.execute(params![
                row.id.0,
                row.state.name(),
                row.submitted_unix_ms as i64,
                row.request,
                row.spec_json,
                row.record_json
            ])?;
        }
        Write::Attempt(row) => {
            let sql = "INSERT OR REPLACE INTO attempts (job, attempt, began_unix_ms, ended_unix_ms, state, step, \
                       cause, kind) VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8)";
            transaction.prepare_cached(sql)?.execute(params![
                row.job.0,
                row.attempt.0,
                row.began_unix_ms as i64,
                row.ended_unix_ms as i64,
                row.state.name(),
                row.step as i64,
                row.cause,
                row.kind.name()
            ])?;
        }
        Write::Event(event) => {
            // A gap would go unnoticed until somebody looks for what is missing.
            let sql = "INSERT INTO events (job, sequence, unix_ms, attempt, kind, event) \
                       SELECT ?1, ?2, ?3, ?4, ?5, ?6 WHERE ?2 = \
                       1 + coalesce((SELECT max(sequence) FROM events WHERE job = ?1), 0)";
            let added = transaction.prepare_cached(sql)?.execute(params![
                event.job,
                event.sequence as i64,
                event.unix_ms as i64,
                event.attempt,
                kind_of(event),
                event.encode_to_vec()
            ])?;
            if added == 0 {
                return Err(rusqlite::Error::StatementChangedRows(0));
            }
            if event.sequence.is_multiple_of(PRUNE_EVERY) {
                prune(transaction, event)?;
            }
        }
        Write::Worker(row) => {
            let sql = "INSERT OR REPLACE INTO workers (name, journal, acknowledged, draining, register, seen_unix_ms) \
                       VALUES (?1, ?2, ?3, ?4, ?5, ?6)";
            transaction.prepare_cached(sql)?.execute(params![
                row.name.to_string(),
                row.journal,
                row.acknowledged as i64,
                row.draining,
                row.register,
                row.seen_unix_ms as i64
            ])?;
        }
        Write::Audit(record) => {
            let sql = "INSERT INTO audit (unix_ms, actor, peer, action, target, refused) VALUES (?1, ?2, ?3, ?4, ?5, ?6)";
            transaction.prepare_cached(sql)?.execute(params![
                record.unix_ms as i64,
                record.actor,
                record.peer,
                record.action,
                record.target,
                record.refused
            ])?;
        }
        Write::Forget(job) => {
            for sql in [
                "DELETE FROM jobs WHERE name = ?1",
                "DELETE FROM attempts WHERE job = ?1",
                "DELETE FROM events WHERE job = ?1",
            ] {
                transaction.prepare_cached(sql)?.execute(params![job.0])?;
            }
        }
        Write::ForgetAudit { before_unix_ms } => {
            let sql = "DELETE FROM audit WHERE unix_ms < ?1";
            transaction.prepare_cached(sql)?.execute(params![*before_unix_ms as i64])?;
        }
    }
    Ok(())
}

/// Forgets the oldest logged steps of a job that has very many; `metrics.jsonl` has them all.
fn prune(transaction: &Transaction<'_>, event: &JobEvent) -> rusqlite::Result<()> {
    let sql = "DELETE FROM events WHERE job = ?1 AND sequence <= ?2 AND kind IN ('step', 'section')";
    let oldest = (event.sequence as i64).saturating_sub(MAX_EVENTS);
    transaction.prepare_cached(sql)?.execute(params![event.job, oldest])?;
    Ok(())
}

/// What an event tells, for those who look with SQL.
pub(super) fn kind_of(event: &JobEvent) -> &'static str {
    match &event.body {
        Some(Body::State(_)) => "state",
        Some(Body::Stage(_)) => "stage",
        Some(Body::Note(_)) => "note",
        Some(Body::Step(_)) => "step",
        Some(Body::Evaluated(_)) => "evaluated",
        Some(Body::Saved(_)) => "saved",
        Some(Body::Section(_)) => "section",
        Some(Body::Waiting(_)) => "waiting",
        Some(Body::RankEnded(_)) => "rank_ended",
        Some(Body::AttemptEnded(_)) => "attempt_ended",
        Some(Body::Worker(_)) => "worker",
        None => "unknown",
    }
}

fn job_state(name: &str) -> JobState {
    JobState::ALL.into_iter().find(|state| state.name() == name).unwrap_or(JobState::Unspecified)
}

fn failure_kind(name: &str) -> FailureKind {
    (0..)
        .map_while(|number| FailureKind::try_from(number).ok())
        .find(|kind| kind.name() == name)
        .unwrap_or_default()
}

impl History for Reader {
    fn events(&self, job: &JobId, after: u64, limit: usize) -> Result<Vec<JobEvent>, StoreError> {
        let at = |cause| StoreError::sqlite(&self.path, cause);
        let connection = self.connection.lock().unwrap_or_else(PoisonError::into_inner);
        let read = || -> rusqlite::Result<Vec<Vec<u8>>> {
            let sql = "SELECT event FROM events WHERE job = ?1 AND sequence > ?2 ORDER BY sequence LIMIT ?3";
            let mut statement = connection.prepare_cached(sql)?;
            let limit = i64::try_from(limit).unwrap_or(i64::MAX);
            let rows = statement.query_map(params![job.0, after as i64, limit], |row| row.get(0))?;
            rows.collect()
        };
        let encoded = read().map_err(at)?;
        let decode = |bytes: Vec<u8>| JobEvent::decode(bytes.as_slice());
        encoded.into_iter().map(decode).collect::<Result<_, _>>().map_err(|cause| StoreError::Event {
            path: self.path.clone(),
            job: job.clone(),
            cause,
        })
    }

    fn audit(&self, since_unix_ms: u64, limit: usize) -> Result<Vec<AuditRecord>, StoreError> {
        let at = |cause| StoreError::sqlite(&self.path, cause);
        let connection = self.connection.lock().unwrap_or_else(PoisonError::into_inner);
        let read = || -> rusqlite::Result<Vec<AuditRecord>> {
            let sql = "SELECT unix_ms, actor, peer, action, target, refused FROM (SELECT rowid AS n, * FROM audit \
                       WHERE unix_ms >= ?1 ORDER BY rowid DESC LIMIT ?2) ORDER BY n";
            let mut statement = connection.prepare_cached(sql)?;
            let limit = i64::try_from(limit).unwrap_or(i64::MAX);
            let rows = statement.query_map(params![since_unix_ms as i64, limit], |row| {
                Ok(AuditRecord {
                    unix_ms: row.get::<_, i64>(0)? as u64,
                    actor: row.get(1)?,
                    peer: row.get(2)?,
                    action: row.get(3)?,
                    target: row.get(4)?,
                    refused: row.get(5)?,
                })
            })?;
            rows.collect()
        };
        read().map_err(at)
    }
}

/// The newest event of a job that tells a state, if there is one; `None` inside when it cannot be read.
pub(super) fn told_state(connection: &Connection, job: &str) -> rusqlite::Result<Option<Option<JobEvent>>> {
    let sql = "SELECT event FROM events WHERE job = ?1 AND kind = 'state' ORDER BY sequence DESC LIMIT 1";
    let bytes: Option<Vec<u8>> = connection.query_row(sql, [job], |row| row.get(0)).optional()?;
    Ok(bytes.map(|bytes| JobEvent::decode(bytes.as_slice()).ok()))
}
