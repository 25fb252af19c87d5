//! A rank's record of collectives as a JSON file, and the few lines of it that are told at once.

use std::fs;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use serde::Serialize;
use tunefleet_proto::ids::{Attempt, Rank};
use tunefleet_proto::rpc;

use super::recorder::{Collective, Record, Snapshot, State};

/// Directory of the dumps inside a job's output.
const HANGS_DIR: &str = "hangs";
/// How long a rank waits for its dump to be written before it tells where it is: a disk that hangs may be
/// the very reason.
const WRITE_LIMIT: Duration = Duration::from_secs(1);

/// Writes and tells one rank's record.
pub struct Reporter {
    record: Arc<Record>,
    rank: Rank,
    path: PathBuf,
    /// Two threads may be asked at once, for one file.
    writing: Arc<Mutex<()>>,
}

/// What is in the file.
#[derive(Serialize)]
struct Dump {
    rank: u32,
    world: u32,
    /// Section of the training loop.
    section: &'static str,
    unix_ms: u64,
    last_started: Option<Line>,
    last_finished: Option<Line>,
    oldest_unfinished: Option<Line>,
    /// Oldest first.
    collectives: Vec<Line>,
}

#[derive(Serialize)]
struct Line {
    sequence: u64,
    operation: &'static str,
    about: String,
    bytes: u64,
    /// `started`, `idle` (nobody waits for its second part), `finished` or `failed`.
    state: &'static str,
    started_unix_ms: u64,
    /// From its start to its end, or until now.
    seconds: f64,
}

impl Reporter {
    /// Writes to `<output>/hangs/attempt-A/rank-R.json`.
    pub fn new(record: Arc<Record>, rank: Rank, output: &Path, attempt: Attempt) -> Self {
        let dir = output.join(HANGS_DIR).join(format!("attempt-{}", attempt.0));
        let path = dir.join(format!("rank-{}.json", rank.rank));
        Reporter { record, rank, path, writing: Arc::default() }
    }

    /// The record.
    pub fn record(&self) -> &Arc<Record> {
        &self.record
    }

    /// Writes the record, wholly or not at all, and tells where this rank is.
    pub fn report(&self, section: &'static str) -> rpc::Collectives {
        let snapshot = self.record.snapshot();
        let dump_path = match self.write(section, &snapshot) {
            Ok(()) => self.path.display().to_string(),
            Err(error) => {
                tracing::error!("{}: {error}: the record of collectives is lost", self.path.display());
                String::new()
            }
        };
        let told = |collective: Option<Collective>| {
            collective.map(|collective| rpc::Collective {
                sequence: collective.sequence,
                operation: collective.operation.name().to_owned(),
                about: self.record.about(collective.tag),
                bytes: collective.bytes,
                seconds: collective.since.elapsed().as_secs_f64(),
            })
        };
        rpc::Collectives {
            last_started: told(snapshot.last_started),
            last_finished: told(snapshot.last_finished),
            oldest_unfinished: told(snapshot.oldest_unfinished),
            section: section.to_owned(),
            dump_path,
        }
    }

    fn write(&self, section: &'static str, snapshot: &Snapshot) -> io::Result<()> {
        let line = |collective: &Collective| self.line(collective);
        let dump = Dump {
            rank: self.rank.rank,
            world: self.rank.world,
            section,
            unix_ms: self.record.unix_ms(Instant::now()),
            last_started: snapshot.last_started.as_ref().map(line),
            last_finished: snapshot.last_finished.as_ref().map(line),
            oldest_unfinished: snapshot.oldest_unfinished.as_ref().map(line),
            collectives: snapshot.collectives.iter().map(line).collect(),
        };
        let text = serde_json::to_vec_pretty(&dump)?;
        let (path, writing) = (self.path.clone(), Arc::clone(&self.writing));
        let (tell, told) = mpsc::channel();
        let body = move || {
            let _one_writer = writing.lock().unwrap_or_else(PoisonError::into_inner);
            // Nobody listens any more when it took too long.
            let _ = tell.send(place(&path, &text));
        };
        thread::Builder::new().name("dump".to_owned()).spawn(body)?;
        let late = || io::Error::new(ErrorKind::TimedOut, format!("not written within {WRITE_LIMIT:?}"));
        told.recv_timeout(WRITE_LIMIT).unwrap_or_else(|_| Err(late()))
    }

    fn line(&self, collective: &Collective) -> Line {
        let (state, took) = match collective.state {
            State::Started => ("started", collective.started.elapsed()),
            State::Idle => ("idle", collective.started.elapsed()),
            State::Finished(took) => ("finished", took),
            State::Failed(took) => ("failed", took),
        };
        Line {
            sequence: collective.sequence,
            operation: collective.operation.name(),
            about: self.record.about(collective.tag),
            bytes: collective.bytes,
            state,
            started_unix_ms: self.record.unix_ms(collective.started),
            seconds: took.as_secs_f64(),
        }
    }
}

/// Writes beside `path` and renames: a file of that name is whole.
fn place(path: &Path, text: &[u8]) -> io::Result<()> {
    if let Some(dir) = path.parent() {
        fs::create_dir_all(dir)?;
    }
    let incomplete = path.with_extension("json.incomplete");
    fs::write(&incomplete, text)?;
    fs::rename(&incomplete, path)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::comm::recorder::Recorded;
    use crate::comm::recorder::tests::{Device, tensor};
    use crate::comm::{Communicator, Tag};

    const RANK: Rank = Rank { rank: 1, world: 2 };

    fn reporter(output: &Path) -> (Recorded<Device>, Reporter) {
        let record = Arc::new(Record::new(vec!["embed".to_owned(), "block.0".to_owned()]));
        let reporter = Reporter::new(record.clone(), RANK, output, Attempt(3));
        (Recorded::new(Device::default(), record), reporter)
    }

    #[test]
    fn a_dump_tells_what_ended_and_what_did_not() {
        let dir = tempfile::tempdir().unwrap();
        let (comm, reporter) = reporter(dir.path());
        comm.all_reduce(&tensor(), Tag { unit: None, what: "target count" }).unwrap().wait().unwrap();
        comm.all_gather(&tensor(), Tag { unit: Some(1), what: "gather" }).unwrap().wait().unwrap();
        let told = reporter.report("step");
        let path = dir.path().join("hangs/attempt-3/rank-1.json");
        assert_eq!(told.dump_path, path.display().to_string());
        let stalled = told.oldest_unfinished.unwrap();
        assert_eq!((stalled.sequence, stalled.about.as_str()), (2, "gather of block.0"));
        assert_eq!(told.last_finished.unwrap().about, "target count");

        let dump: serde_json::Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        assert_eq!((&dump["rank"], &dump["world"], &dump["section"]), (&1.into(), &2.into(), &"step".into()));
        let states: Vec<_> = dump["collectives"].as_array().unwrap().iter().map(|c| &c["state"]).collect();
        assert_eq!(states, ["finished", "started"]);
        assert_eq!(dump["oldest_unfinished"]["operation"], "all-gather");
        assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 1, "nothing half-written is left");
    }

    #[test]
    fn a_dump_that_cannot_be_written_does_not_keep_the_rank_from_telling() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("hangs"), "a file where a directory should be").unwrap();
        let (comm, reporter) = reporter(dir.path());
        comm.barrier().unwrap();
        let told = reporter.report("step");
        assert_eq!((told.dump_path.as_str(), told.last_started.unwrap().sequence), ("", 1));
    }
}
