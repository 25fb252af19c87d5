//! What ranks have told and the coordinator has not acknowledged: numbered, on disk, and said again to each new
//! session. A record is a protobuf message behind its length; one that was cut off by a kill is left out.

use std::collections::{BTreeMap, VecDeque};
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

use prost::Message;
use tunefleet_proto::rpc::{TaskId, WorkerMessage, worker_message};

use super::{Error, io};

const FILE: &str = "outbox";
/// Acknowledged bytes that may stand in the file before it is written anew.
const COMPACT_BYTES: u64 = 1 << 20;
/// Bytes that wait at most; beyond it, what only informs is left out.
const MAX_BYTES: u64 = 256 << 20;

/// Which rank of which task.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Key {
    pub job: String,
    pub attempt: u32,
    pub stage: i32,
    pub rank: u32,
}

impl Key {
    pub fn new(task: &TaskId, rank: u32) -> Self {
        Key { job: task.job.clone(), attempt: task.attempt, stage: task.stage, rank }
    }

    pub fn task(&self) -> TaskId {
        TaskId { job: self.job.clone(), attempt: self.attempt, stage: self.stage }
    }

    pub fn is_of(&self, task: &TaskId) -> bool {
        self.job == task.job && self.attempt == task.attempt && self.stage == task.stage
    }
}

/// The messages, oldest first.
pub(super) struct Outbox {
    path: PathBuf,
    file: Option<File>,
    sequence: u64,
    messages: VecDeque<WorkerMessage>,
    waiting_bytes: u64,
    acknowledged_bytes: u64,
}

impl Outbox {
    /// What a former daemon left in `dir`.
    pub fn open(dir: &Path) -> Result<Self, Error> {
        let path = dir.join(FILE);
        let bytes = match std::fs::read(&path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Vec::new(),
            Err(error) => return Err(io(&format!("reading {}", path.display()))(error)),
        };
        let mut outbox = Outbox {
            path,
            file: None,
            sequence: 0,
            messages: VecDeque::new(),
            waiting_bytes: 0,
            acknowledged_bytes: 0,
        };
        let mut rest = bytes.as_slice();
        while !rest.is_empty() {
            let Ok(message) = WorkerMessage::decode_length_delimited(&mut rest) else { break };
            if message.sequence < outbox.sequence {
                break;
            }
            outbox.sequence = message.sequence;
            // A record without a body only says how far the numbers have come.
            if message.body.is_some() {
                outbox.waiting_bytes += message.encoded_len() as u64;
                outbox.messages.push_back(message);
            }
        }
        outbox.rewrite();
        Ok(outbox)
    }

    /// Keeps a message; `false` when there is no room for what only informs.
    pub fn push(&mut self, body: worker_message::Body, informs: bool) -> bool {
        if informs && self.waiting_bytes > MAX_BYTES {
            return false;
        }
        self.sequence += 1;
        let message = WorkerMessage { body: Some(body), epoch: 0, sequence: self.sequence };
        self.waiting_bytes += message.encoded_len() as u64;
        let written =
            self.file.as_mut().map(|file| file.write_all(&message.encode_length_delimited_to_vec()));
        if let Some(Err(error)) = written {
            // It goes on in memory: a full disk must not end a training that does not need it.
            tracing::error!(
                "{}: {error}; what ranks tell would not survive this daemon",
                self.path.display()
            );
            self.file = None;
        }
        self.messages.push_back(message);
        true
    }

    /// The messages after number `sequence`.
    pub fn after(&self, sequence: u64) -> impl Iterator<Item = &WorkerMessage> {
        let first = self.messages.partition_point(|message| message.sequence <= sequence);
        self.messages.iter().skip(first)
    }

    /// Forgets what the coordinator has; those messages.
    pub fn acknowledged(&mut self, through: u64) -> Vec<WorkerMessage> {
        let mut gone = Vec::new();
        while let Some(message) = self.messages.pop_front_if(|message| message.sequence <= through) {
            let bytes = message.encoded_len() as u64;
            self.waiting_bytes = self.waiting_bytes.saturating_sub(bytes);
            self.acknowledged_bytes += bytes;
            gone.push(message);
        }
        if self.acknowledged_bytes > COMPACT_BYTES || (self.messages.is_empty() && !gone.is_empty()) {
            self.rewrite();
        }
        gone
    }

    /// The highest number of each rank's own events in it.
    pub fn heard(&self) -> BTreeMap<Key, u64> {
        let mut heard = BTreeMap::new();
        for message in &self.messages {
            if let Some(worker_message::Body::Report(report)) = &message.body
                && let (Some(task), Some(event)) = (&report.task, &report.event)
            {
                let newest = heard.entry(Key::new(task, report.rank)).or_insert(0);
                *newest = event.sequence.max(*newest);
            }
        }
        heard
    }

    /// Writes the file anew, with what waits.
    fn rewrite(&mut self) {
        self.acknowledged_bytes = 0;
        let begun = self.path.with_extension("begun");
        let write = || -> std::io::Result<File> {
            let mut bytes = Vec::new();
            let base = self.messages.front().map_or(self.sequence, |first| first.sequence.saturating_sub(1));
            let base = WorkerMessage { body: None, epoch: 0, sequence: base };
            for message in std::iter::once(&base).chain(&self.messages) {
                bytes.extend(message.encode_length_delimited_to_vec());
            }
            std::fs::write(&begun, bytes)?;
            std::fs::rename(&begun, &self.path)?;
            OpenOptions::new().append(true).open(&self.path)
        };
        match write() {
            Ok(file) => self.file = Some(file),
            Err(error) => {
                tracing::error!(
                    "{}: {error}; what ranks tell would not survive this daemon",
                    self.path.display()
                );
                self.file = None;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use tunefleet_proto::rpc::{Leaving, RankEvent, RankReport};

    use super::*;

    fn said(text: &str) -> worker_message::Body {
        worker_message::Body::Leaving(Leaving { reason: text.to_owned() })
    }

    fn numbers(outbox: &Outbox) -> Vec<u64> {
        outbox.after(0).map(|message| message.sequence).collect()
    }

    #[test]
    fn what_was_not_acknowledged_is_there_for_the_next_daemon_and_numbers_go_on() {
        let dir = tempfile::tempdir().unwrap();
        let mut outbox = Outbox::open(dir.path()).unwrap();
        for text in ["a", "b", "c"] {
            assert!(outbox.push(said(text), false));
        }
        assert_eq!(outbox.acknowledged(1).len(), 1);
        drop(outbox);
        let mut outbox = Outbox::open(dir.path()).unwrap();
        // Told again: the file was not written anew for one message.
        assert_eq!(numbers(&outbox), [1, 2, 3]);
        outbox.acknowledged(3);
        drop(outbox);
        let mut outbox = Outbox::open(dir.path()).unwrap();
        assert_eq!(numbers(&outbox), [0u64; 0]);
        outbox.push(said("d"), false);
        assert_eq!(numbers(&outbox), [4], "no number comes twice");
    }

    #[test]
    fn the_newest_event_of_each_rank_is_known() {
        let dir = tempfile::tempdir().unwrap();
        let mut outbox = Outbox::open(dir.path()).unwrap();
        let task = TaskId { job: "j".to_owned(), attempt: 1, stage: 4 };
        for (rank, sequence) in [(0, 1), (1, 1), (0, 2)] {
            let event = Some(RankEvent { body: None, sequence });
            outbox.push(
                worker_message::Body::Report(RankReport { task: Some(task.clone()), rank, event }),
                true,
            );
        }
        let heard = outbox.heard();
        assert_eq!((heard[&Key::new(&task, 0)], heard[&Key::new(&task, 1)]), (2, 1));
    }

    proptest! {
        #[test]
        fn a_file_that_is_cut_off_or_scribbled_on_gives_a_beginning_and_no_panic(
            cut in 0usize..400, flip in 0usize..400, bits in any::<u8>(),
        ) {
            let dir = tempfile::tempdir().unwrap();
            let mut outbox = Outbox::open(dir.path()).unwrap();
            for number in 0..20 {
                outbox.push(said(&"x".repeat(number)), false);
            }
            drop(outbox);
            let path = dir.path().join(FILE);
            let mut bytes = std::fs::read(&path).unwrap();
            if let Some(byte) = bytes.get_mut(flip) {
                *byte ^= bits;
            }
            bytes.truncate(cut.max(1));
            std::fs::write(&path, bytes).unwrap();
            let outbox = Outbox::open(dir.path()).unwrap();
            let found = numbers(&outbox);
            prop_assert!(found.windows(2).all(|pair| pair[0] <= pair[1]));
        }
    }
}
