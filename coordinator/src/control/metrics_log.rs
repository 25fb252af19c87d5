//! `<output>/metrics.jsonl`: one JSON object for each logged value of a job. Numbers are written
//! so that reading them back gives the same bits. The same values go to TensorBoard's files.

use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};

use serde_json::json;
use tunefleet_proto::ids::Attempt;
use tunefleet_proto::rpc::JobEvent;
use tunefleet_proto::rpc::job_event::Body;

use super::event_file::EventFile;

/// File name inside the job's output directory.
pub const FILE: &str = "metrics.jsonl";

/// An open log. Each line is written at once and whole, so that a kill loses none.
pub struct MetricsLog {
    file: File,
    output: PathBuf,
    /// Of the attempt that logged last.
    events: Option<EventFile>,
}

impl MetricsLog {
    /// Opens the log of `output` for appending.
    ///
    /// # Errors
    /// When the file cannot be made.
    pub fn open(output: &Path) -> std::io::Result<Self> {
        std::fs::create_dir_all(output)?;
        let file = OpenOptions::new().create(true).append(true).open(output.join(FILE))?;
        Ok(MetricsLog { file, output: output.to_owned(), events: None })
    }

    /// Appends the values of an event; one without values adds no line.
    ///
    /// # Errors
    /// When the line cannot be written.
    pub fn append(&mut self, event: &JobEvent) -> std::io::Result<()> {
        let JobEvent { attempt, unix_ms, sequence, .. } = event;
        let line = match &event.body {
            Some(Body::Step(step)) => json!({
                "kind": "step", "attempt": attempt, "event": sequence, "unix_ms": unix_ms, "step": step.step,
                "loss": step.loss, "grad_norm": step.grad_norm, "learning_rate": step.learning_rate,
                "tokens": step.tokens, "tokens_per_second": step.tokens_per_second,
                "step_seconds": step.step_seconds, "peak_memory_bytes": step.peak_memory_bytes,
                "data_wait_seconds": step.data_wait_seconds,
                "collective_wait_seconds": step.collective_wait_seconds,
            }),
            Some(Body::Evaluated(eval)) => json!({
                "kind": "eval", "attempt": attempt, "event": sequence, "unix_ms": unix_ms, "step": eval.step,
                "loss": eval.loss,
            }),
            Some(Body::Saved(saved)) => json!({
                "kind": "save", "attempt": attempt, "event": sequence, "unix_ms": unix_ms, "step": saved.step,
                "path": saved.path, "pause_seconds": saved.pause_seconds,
            }),
            _ => return Ok(()),
        };
        self.file.write_all(format!("{line}\n").as_bytes())?;
        let events = match self.events.take().filter(|events| events.attempt == *attempt) {
            Some(events) => events,
            None => EventFile::open(&self.output, *attempt)?,
        };
        self.events.insert(events).append(event)
    }
}

/// Number of the newest event in the log of `output`, of this attempt and later ones: events that were kept after it
/// are not in the log, where their coordinator ended in between.
///
/// # Errors
/// When the file is there and cannot be read.
pub fn newest_event(output: &Path, first_attempt: Attempt) -> std::io::Result<u64> {
    #[derive(serde::Deserialize)]
    struct Line {
        attempt: u32,
        #[serde(default)]
        event: u64,
    }
    let file = match File::open(output.join(FILE)) {
        Ok(file) => file,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(0),
        Err(error) => return Err(error),
    };
    let mut newest = 0;
    for line in BufReader::new(file).split(b'\n') {
        // A line that was cut off is none.
        let Ok(line) = serde_json::from_slice::<Line>(&line?) else { continue };
        if line.attempt >= first_attempt.0 {
            newest = line.event.max(newest);
        }
    }
    Ok(newest)
}

#[cfg(test)]
mod tests {
    use super::*;
    use tunefleet_proto::rpc::{Evaluated, StepDone};

    #[test]
    fn losses_read_back_bit_for_bit() {
        let dir = tempfile::tempdir().unwrap();
        let losses = [0.1 + 0.2, 10.0f64.ln(), 1.0 / 3.0, 5e-324, f64::from(3.7f32)];
        let mut log = MetricsLog::open(dir.path()).unwrap();
        let event = |attempt, sequence, body| JobEvent {
            attempt,
            sequence,
            unix_ms: 7,
            body: Some(body),
            ..JobEvent::default()
        };
        for (step, loss) in losses.into_iter().enumerate() {
            let step = StepDone { step: step as u64, loss, ..StepDone::default() };
            log.append(&event(1, step.step + 10, Body::Step(step))).unwrap();
        }
        log.append(&event(2, 20, Body::Evaluated(Evaluated { step: 5, loss: 2.5 }))).unwrap();
        log.append(&event(2, 21, Body::Note("no values".to_owned()))).unwrap();
        assert_eq!(newest_event(dir.path(), Attempt(1)).unwrap(), 20);
        assert_eq!(newest_event(dir.path(), Attempt(3)).unwrap(), 0, "of another state");
        let text = std::fs::read_to_string(dir.path().join(FILE)).unwrap();
        let lines: Vec<serde_json::Value> = text.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
        assert_eq!(lines.len(), 6);
        for (line, loss) in lines.iter().zip(losses) {
            assert_eq!(line["loss"].as_f64().unwrap().to_bits(), loss.to_bits());
        }
        assert_eq!((&lines[5]["kind"], &lines[5]["attempt"]), (&"eval".into(), &2.into()));
    }
}
