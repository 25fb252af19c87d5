//! TensorBoard's event files: `<output>/tensorboard/events.out.tfevents.*`, one for each attempt, with the values of
//! `metrics.jsonl`.
//!
//! A file is a row of records (TensorFlow's `TFRecord`): length (u64), masked CRC-32C of the length, an `Event` in protocol
//! buffers, masked CRC-32C of it; all numbers little-endian.

use std::fs::{self, File, OpenOptions};
use std::io::Write as _;
use std::path::Path;

use prost::Message;
use tunefleet_proto::rpc::JobEvent;
use tunefleet_proto::rpc::job_event::Body;

/// Directory inside a job's output.
pub const DIR: &str = "tensorboard";
/// What a file begins with.
const FILE_VERSION: &str = "brain.Event:2";
/// Length and its checksum, and the checksum of the record.
const HEAD_BYTES: usize = 12;
const TAIL_BYTES: usize = 4;
/// `SessionLog.START`: what others logged from this step on was of an attempt that ended.
const SESSION_START: i32 = 1;

/// `tensorflow.Event`, as far as it is used.
#[derive(Clone, PartialEq, Message)]
struct Event {
    #[prost(double, tag = "1")]
    wall_time: f64,
    #[prost(int64, tag = "2")]
    step: i64,
    #[prost(string, optional, tag = "3")]
    file_version: Option<String>,
    #[prost(message, optional, tag = "5")]
    summary: Option<Summary>,
    #[prost(message, optional, tag = "7")]
    session_log: Option<SessionLog>,
}

/// `tensorflow.Summary`.
#[derive(Clone, PartialEq, Message)]
struct Summary {
    #[prost(message, repeated, tag = "1")]
    value: Vec<Value>,
}

/// `tensorflow.Summary.Value`.
#[derive(Clone, PartialEq, Message)]
struct Value {
    #[prost(string, tag = "1")]
    tag: String,
    #[prost(float, optional, tag = "2")]
    simple_value: Option<f32>,
}

/// `tensorflow.SessionLog`.
#[derive(Clone, PartialEq, Message)]
struct SessionLog {
    #[prost(int32, tag = "1")]
    status: i32,
}

/// The file of one attempt.
#[derive(Debug)]
pub struct EventFile {
    /// Whose it is.
    pub attempt: u32,
    file: File,
    /// Whether what others logged later is to be forgotten.
    is_fresh: bool,
}

impl EventFile {
    /// Opens the file of an attempt for appending; a record that was cut off goes.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn open(output: &Path, attempt: u32) -> std::io::Result<Self> {
        let dir = output.join(DIR);
        fs::create_dir_all(&dir)?;
        // TensorBoard reads files in the order of their names, which begin with a time.
        let path = dir.join(format!("events.out.tfevents.{attempt:010}.tunefleet"));
        let known = fs::read(&path).unwrap_or_default();
        let whole = whole_records(&known);
        let file = OpenOptions::new().create(true).append(true).open(&path)?;
        file.set_len(whole as u64)?;
        let mut events = EventFile { attempt, file, is_fresh: whole == 0 };
        if events.is_fresh {
            events.write(&Event { file_version: Some(FILE_VERSION.to_owned()), ..Event::default() })?;
        }
        Ok(events)
    }

    /// Adds the values of an event; one without values adds nothing.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn append(&mut self, event: &JobEvent) -> std::io::Result<()> {
        let (step, values) = match &event.body {
            Some(Body::Step(step)) => (
                step.step,
                vec![
                    ("train/loss", step.loss),
                    ("train/grad_norm", step.grad_norm),
                    ("train/learning_rate", step.learning_rate),
                    ("train/tokens", step.tokens as f64),
                    ("train/tokens_per_second", step.tokens_per_second),
                    ("train/step_seconds", step.step_seconds),
                    ("train/peak_memory_bytes", step.peak_memory_bytes as f64),
                    ("train/data_wait_seconds", step.data_wait_seconds),
                    ("train/collective_wait_seconds", step.collective_wait_seconds),
                ],
            ),
            Some(Body::Evaluated(eval)) => (eval.step, vec![("eval/loss", eval.loss)]),
            Some(Body::Saved(saved)) => (saved.step, vec![("checkpoint/pause_seconds", saved.pause_seconds)]),
            _ => return Ok(()),
        };
        let (wall_time, step) = (event.unix_ms as f64 / 1000.0, i64::try_from(step).unwrap_or(i64::MAX));
        if std::mem::take(&mut self.is_fresh) {
            let session_log = Some(SessionLog { status: SESSION_START });
            self.write(&Event { wall_time, step, session_log, ..Event::default() })?;
        }
        let value = values
            .into_iter()
            .map(|(tag, value)| Value { tag: tag.to_owned(), simple_value: Some(value as f32) });
        let summary = Some(Summary { value: value.collect() });
        self.write(&Event { wall_time, step, summary, ..Event::default() })
    }

    /// Writes a record at once and whole.
    fn write(&mut self, event: &Event) -> std::io::Result<()> {
        let data = event.encode_to_vec();
        let length = (data.len() as u64).to_le_bytes();
        let mut record = Vec::with_capacity(HEAD_BYTES + data.len() + TAIL_BYTES);
        record.extend(length);
        record.extend(masked_crc(&length).to_le_bytes());
        record.extend(&data);
        record.extend(masked_crc(&data).to_le_bytes());
        self.file.write_all(&record)
    }
}

/// A checksum of something that may hold checksums, as TensorFlow stores it.
fn masked_crc(bytes: &[u8]) -> u32 {
    crc32c::crc32c(bytes).rotate_right(15).wrapping_add(0xa282_ead8)
}

/// Bytes of the records at the beginning that are whole and sound.
fn whole_records(bytes: &[u8]) -> usize {
    let mut at = 0;
    while let Some(next) = record_end(bytes, at) {
        at = next;
    }
    at
}

fn record_end(bytes: &[u8], at: usize) -> Option<usize> {
    let rest = bytes.get(at..)?;
    let length: [u8; 8] = rest.get(..8)?.try_into().ok()?;
    let crc = |at: usize| Some(u32::from_le_bytes(rest.get(at..at + TAIL_BYTES)?.try_into().ok()?));
    let data_bytes = usize::try_from(u64::from_le_bytes(length)).ok()?;
    let data_end = HEAD_BYTES.checked_add(data_bytes)?;
    let data = rest.get(HEAD_BYTES..data_end)?;
    let is_sound = crc(8)? == masked_crc(&length) && crc(data_end)? == masked_crc(data);
    is_sound.then_some(at + data_end + TAIL_BYTES)
}

#[cfg(test)]
mod tests {
    use tunefleet_proto::rpc::{Evaluated, StepDone};

    use super::*;

    fn event(step: u64, loss: f64) -> JobEvent {
        let body = Body::Step(StepDone { step, loss, ..StepDone::default() });
        JobEvent { attempt: 1, unix_ms: 1_500, body: Some(body), ..JobEvent::default() }
    }

    fn read(output: &Path) -> Vec<Event> {
        let bytes = fs::read(output.join(DIR).join("events.out.tfevents.0000000001.tunefleet")).unwrap();
        let mut events = Vec::new();
        let mut at = 0;
        while let Some(next) = record_end(&bytes, at) {
            events.push(Event::decode(&bytes[at + HEAD_BYTES..next - TAIL_BYTES]).unwrap());
            at = next;
        }
        assert_eq!(at, bytes.len());
        events
    }

    #[test]
    fn checksums_are_those_of_tensorflow() {
        // RFC 3720, B.4: the CRC-32C of 32 zeros is 0x8a9136aa; masked as TensorFlow's crc32c.h does it.
        assert_eq!(masked_crc(&[0; 32]), 0x8a91_36aa_u32.rotate_right(15).wrapping_add(0xa282_ead8));
    }

    #[test]
    fn values_are_kept_and_a_record_that_was_cut_off_is_written_anew() {
        let dir = tempfile::tempdir().unwrap();
        let mut file = EventFile::open(dir.path(), 1).unwrap();
        file.append(&event(1, 2.5)).unwrap();
        file.append(&event(2, 2.0)).unwrap();
        let path = dir.path().join(DIR).join("events.out.tfevents.0000000001.tunefleet");
        let bytes = fs::metadata(&path).unwrap().len();
        OpenOptions::new().write(true).open(&path).unwrap().set_len(bytes - 3).unwrap();
        let mut file = EventFile::open(dir.path(), 1).unwrap();
        let body = Some(Body::Evaluated(Evaluated { step: 2, loss: 1.5 }));
        file.append(&JobEvent { body, ..event(2, 0.0) }).unwrap();
        let events = read(dir.path());
        assert_eq!(events[0].file_version.as_deref(), Some(FILE_VERSION));
        assert_eq!(events[1].session_log, Some(SessionLog { status: SESSION_START }));
        let values: Vec<_> = events[2..]
            .iter()
            .map(|event| {
                let value = &event.summary.as_ref().unwrap().value[0];
                (event.step, event.wall_time, value.tag.as_str(), value.simple_value.unwrap())
            })
            .collect();
        assert_eq!(values, [(1, 1.5, "train/loss", 2.5), (2, 1.5, "eval/loss", 1.5)]);
    }

    proptest::proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..200)) {
            proptest::prop_assert!(whole_records(&bytes) <= bytes.len());
        }
    }
}
