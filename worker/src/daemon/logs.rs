//! Logs of ranks, for whoever asks the coordinator: whole lines, as they are written, from any place of a file of
//! any size in bounded memory.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::task::JoinHandle;
use tunefleet_proto::rpc::{LogChunk, LogLines, LogsRequest, ReadLog, Stage, worker_message};

use super::ranks::Ranks;

/// Between two looks at a file that may grow.
const LOOK_AGAIN: Duration = Duration::from_millis(200);
/// Read at once; a line that is longer is cut.
const MAX_BYTES: usize = 64 * 1024;
/// Lines of one message.
const MAX_LINES: usize = 500;
/// Requests at once.
const MAX_REQUESTS: usize = 64;

/// The requests that are being answered.
#[derive(Default)]
pub(super) struct Readers(Mutex<BTreeMap<u64, JoinHandle<()>>>);

impl Readers {
    /// Begins to answer, or ends it.
    pub fn read(&self, ranks: &Arc<Ranks>, asked: ReadLog) {
        let ReadLog { request, what, log_dir } = asked;
        let mut readers = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        readers.retain(|_, reader| !reader.is_finished());
        let Some(what) = what else {
            if let Some(reader) = readers.remove(&request) {
                reader.abort();
            }
            return;
        };
        let ranks = Arc::clone(ranks);
        let say = move |chunk| ranks.say_once(worker_message::Body::Log(chunk));
        if readers.len() >= MAX_REQUESTS {
            let error = format!("{MAX_REQUESTS} requests for logs are being answered");
            return say(LogChunk { request, last: true, error, ..LogChunk::default() });
        }
        readers.insert(request, tokio::spawn(answer(request, what, PathBuf::from(log_dir), say)));
    }
}

/// One log file, and how far it was read.
struct Log {
    path: PathBuf,
    rank: u32,
    stage: Stage,
    offset: u64,
    /// Whether lines are shown by now: those that are too old are not, nor what continues them.
    shows: bool,
}

async fn answer(request: u64, what: LogsRequest, dir: PathBuf, say: impl Fn(LogChunk)) {
    let mut logs: Vec<Log> = Vec::new();
    loop {
        for (path, stage, rank) in found(&dir, what.rank) {
            if logs.iter().all(|log| log.path != path) {
                let offset =
                    if what.tail_lines > 0 { tail_offset(&path, what.tail_lines).unwrap_or(0) } else { 0 };
                logs.push(Log { path, rank, stage, offset, shows: what.since_unix_ms == 0 });
            }
        }
        for log in &mut logs {
            // A file that is gone or cannot be read tells nothing more.
            while let Ok(Some(lines)) = log.next(what.since_unix_ms) {
                say(LogChunk { request, lines: Some(lines), ..LogChunk::default() });
                tokio::task::yield_now().await;
            }
        }
        if !what.follow {
            return say(LogChunk { request, last: true, ..LogChunk::default() });
        }
        tokio::time::sleep(LOOK_AGAIN).await;
    }
}

/// The logs in `dir`: those of ranks in order, then those of the stages of one rank.
fn found(dir: &Path, wanted: Option<u32>) -> Vec<(PathBuf, Stage, u32)> {
    let Ok(entries) = fs::read_dir(dir) else { return Vec::new() };
    let mut found = Vec::new();
    for path in entries.filter_map(|entry| Some(entry.ok()?.path())) {
        let Some(name) = path.file_name().and_then(|name| name.to_str()?.strip_suffix(".log")) else {
            continue;
        };
        let rank = name.strip_prefix("rank-").and_then(|rank| rank.parse().ok());
        let stage = Stage::ALL.into_iter().find_map(|stage| match name.strip_prefix(stage.name())? {
            "" => Some((stage, 0)),
            further => Some((stage, further.strip_prefix('-')?.parse().ok()?)),
        });
        match (rank, stage) {
            (Some(rank), _) if wanted.is_none_or(|wanted| wanted == rank) => {
                found.push((path, Stage::Train, rank))
            }
            (None, Some((stage, rank))) if wanted.is_none() => found.push((path, stage, rank)),
            _ => {}
        }
    }
    found.sort_by_key(|(_, stage, rank)| (*stage, *rank));
    found
}

impl Log {
    /// The next whole lines; none when there are none yet.
    fn next(&mut self, since_unix_ms: u64) -> std::io::Result<Option<LogLines>> {
        let mut file = File::open(&self.path)?;
        if file.metadata()?.len() < self.offset {
            // It was begun anew.
            self.offset = 0;
        }
        file.seek(SeekFrom::Start(self.offset))?;
        let mut bytes = vec![0; MAX_BYTES];
        let mut filled = 0;
        while filled < bytes.len() {
            match file.read(&mut bytes[filled..])? {
                0 => break,
                read => filled += read,
            }
        }
        bytes.truncate(filled);
        let end = match bytes.iter().rposition(|byte| *byte == b'\n') {
            Some(newline) => newline + 1,
            None if filled == MAX_BYTES => filled,
            None => return Ok(None),
        };
        let mut lines = Vec::new();
        let mut taken = 0;
        for line in bytes[..end].split_inclusive(|byte| *byte == b'\n').take(MAX_LINES) {
            taken += line.len() as u64;
            let text = String::from_utf8_lossy(line).trim_end_matches(['\n', '\r']).to_owned();
            if let Some(at) = stamp(&text) {
                self.shows = at >= since_unix_ms;
            }
            if self.shows {
                lines.push(text);
            }
        }
        self.offset += taken;
        let path = self.path.display().to_string();
        Ok(Some(LogLines { worker: String::new(), rank: self.rank, stage: self.stage.into(), path, lines }))
    }
}

/// Where the last `lines` lines of a file begin.
fn tail_offset(path: &Path, lines: u32) -> std::io::Result<u64> {
    let mut file = File::open(path)?;
    let mut end = file.metadata()?.len();
    let mut wanted = u64::from(lines) + 1;
    let mut is_last = true;
    while end > 0 {
        let begin = end.saturating_sub(MAX_BYTES as u64);
        let mut bytes = vec![0; (end - begin) as usize];
        file.seek(SeekFrom::Start(begin))?;
        file.read_exact(&mut bytes)?;
        for (index, byte) in bytes.iter().enumerate().rev() {
            let is_end = std::mem::take(&mut is_last);
            if *byte == b'\n' || is_end {
                wanted -= 1;
                if wanted == 0 {
                    return Ok(begin + index as u64 + 1);
                }
            }
        }
        end = begin;
    }
    Ok(0)
}

/// The time that a line of a log begins with, e.g. `2026-11-25T07:36:32.417208Z`, in milliseconds since 1970.
fn stamp(line: &str) -> Option<u64> {
    let word = line.split(' ').next()?;
    let bytes = word.as_bytes();
    if bytes.len() < 20 || bytes[4] != b'-' || bytes[10] != b'T' || bytes.last() != Some(&b'Z') {
        return None;
    }
    let number = |range: std::ops::Range<usize>| word.get(range)?.parse::<u64>().ok();
    let (year, month, day) = (number(0..4)?, number(5..7)?, number(8..10)?);
    let (hour, minute, second) = (number(11..13)?, number(14..16)?, number(17..19)?);
    let milliseconds = number(20..23).unwrap_or(0);
    if year < 1970 || !(1..=12).contains(&month) || !(1..=31).contains(&day) {
        return None;
    }
    // Howard Hinnant's `days_from_civil`.
    let year = if month <= 2 { year - 1 } else { year };
    let (era, of_era) = (year / 400, year % 400);
    let of_year = (153 * (if month > 2 { month - 3 } else { month + 9 }) + 2) / 5 + day - 1;
    let days = era * 146_097 + of_era * 365 + of_era / 4 - of_era / 100 + of_year;
    let days = days.checked_sub(719_468)?;
    Some(((days * 24 + hour) * 60 + minute) * 60_000 + second * 1000 + milliseconds)
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn log(path: &Path) -> Log {
        Log { path: path.to_owned(), rank: 0, stage: Stage::Train, offset: 0, shows: true }
    }

    fn all(log: &mut Log, since: u64) -> Vec<String> {
        let mut lines = Vec::new();
        while let Some(more) = log.next(since).unwrap() {
            lines.extend(more.lines);
        }
        lines
    }

    #[test]
    fn whole_lines_are_told_once_and_a_file_that_begins_anew_from_its_beginning() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("rank-0.log");
        let mut file = File::create(&path).unwrap();
        write!(file, "one\ntwo\nhal").unwrap();
        let mut log = log(&path);
        assert_eq!(all(&mut log, 0), ["one", "two"]);
        writeln!(file, "f").unwrap();
        assert_eq!(all(&mut log, 0), ["half"]);
        fs::write(&path, "new\n").unwrap();
        assert_eq!(all(&mut log, 0), ["new"]);
        fs::write(&path, format!("{}\nend\n", "x".repeat(2 * MAX_BYTES + 5))).unwrap();
        let lines = all(&mut log, 0);
        assert_eq!((lines.len(), lines.last().map(String::as_str)), (4, Some("end")), "a long line is cut");
    }

    #[test]
    fn old_lines_are_left_out_with_what_continues_them() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("rank-0.log");
        let text = "2026-11-25T07:00:00.000000Z  INFO old\n  of the old one\n2026-11-25T08:00:00.5Z  INFO new\n  of the new\n";
        fs::write(&path, text).unwrap();
        let since = stamp("2026-11-25T07:30:00Z x").unwrap();
        let mut log = Log { shows: false, ..log(&path) };
        assert_eq!(all(&mut log, since), ["2026-11-25T08:00:00.5Z  INFO new", "  of the new"]);
        assert_eq!(stamp("1970-01-02T00:00:01.250Z x"), Some(86_401_250));
        for wrong in ["", "step 3", "2026-13-25T07:00:00Z x", "2026-11-25T07:00Z", "9999999999999999999999Z"]
        {
            assert_eq!(stamp(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn the_last_lines_are_found_from_the_end() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("rank-0.log");
        let lines: Vec<String> = (0..30_000).map(|n| format!("line {n}")).collect();
        fs::write(&path, lines.join("\n") + "\n").unwrap();
        for count in [1, 3, 20_000, 30_000, 40_000] {
            let mut log = Log { offset: tail_offset(&path, count).unwrap(), ..log(&path) };
            let expected = &lines[lines.len().saturating_sub(count as usize)..];
            assert_eq!(all(&mut log, 0), expected, "{count}");
        }
    }

    #[test]
    fn only_logs_are_found() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["rank-1.log", "rank-0.log", "tokenizer.log", "job.json", "rank-x.log", "secret"] {
            fs::write(dir.path().join(name), "").unwrap();
        }
        let names = |rank| -> Vec<String> {
            found(dir.path(), rank)
                .iter()
                .map(|(path, ..)| path.file_name().unwrap().to_str().unwrap().to_owned())
                .collect()
        };
        assert_eq!(names(None), ["tokenizer.log", "rank-0.log", "rank-1.log"]);
        assert_eq!(names(Some(1)), ["rank-1.log"]);
    }
}
