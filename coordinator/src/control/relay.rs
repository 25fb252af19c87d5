//! Questions that workers answer in pieces: who asked gets what comes, and no more once he is gone.

use std::collections::BTreeMap;

use tokio::sync::mpsc;
use tonic::Status;
use tunefleet_proto::rpc::{LogChunk, LogLines};

use super::placement::WorkerName;

/// Pieces that wait for one who reads slowly, before he is cut off.
pub const WINDOW: usize = 1024;

/// A stream of whole lines, to one who asked.
pub type Lines = mpsc::Sender<Result<LogLines, Status>>;

/// The open questions.
#[derive(Default)]
pub struct Relay {
    requests: u64,
    open: BTreeMap<u64, Open>,
}

struct Open {
    lines: Lines,
    /// Workers that have not told their last.
    waiting: Vec<WorkerName>,
    /// Which worker shows which file: on a shared file system several have it.
    shown_by: BTreeMap<String, WorkerName>,
    heard: bool,
}

impl Relay {
    /// Opens a question to these workers; its number.
    pub fn open(&mut self, lines: Lines, workers: Vec<WorkerName>) -> u64 {
        self.requests += 1;
        let open = Open { lines, waiting: workers, shown_by: BTreeMap::new(), heard: false };
        self.open.insert(self.requests, open);
        self.requests
    }

    /// Takes a piece; `true` when nobody wants more of that question.
    pub fn take(&mut self, worker: &WorkerName, chunk: LogChunk) -> bool {
        let request = chunk.request;
        let Some(open) = self.open.get_mut(&request) else { return true };
        if let Some(lines) = chunk.lines {
            let shown_by = open.shown_by.entry(lines.path.clone()).or_insert_with(|| worker.clone());
            if shown_by == worker {
                open.heard = true;
                let told = open.lines.try_send(Ok(LogLines { worker: worker.to_string(), ..lines }));
                if told.is_err() {
                    // Gone, or too slow: a log is no reason to hold anything up.
                    self.open.remove(&request);
                    return true;
                }
            }
        }
        if chunk.last {
            self.done(request, worker, &chunk.error);
        }
        !self.open.contains_key(&request)
    }

    /// Nothing more comes from a worker.
    pub fn left(&mut self, worker: &WorkerName) {
        let requests: Vec<u64> = self.open.keys().copied().collect();
        for request in requests {
            self.done(request, worker, "");
        }
    }

    /// Questions whose asker is gone.
    pub fn forsaken(&mut self) -> Vec<u64> {
        let gone: Vec<u64> = self
            .open
            .iter()
            .filter(|(_, open)| open.lines.is_closed())
            .map(|(request, _)| *request)
            .collect();
        for request in &gone {
            self.open.remove(request);
        }
        gone
    }

    fn done(&mut self, request: u64, worker: &WorkerName, error: &str) {
        let Some(open) = self.open.get_mut(&request) else { return };
        open.waiting.retain(|waiting| waiting != worker);
        if open.waiting.is_empty() {
            if !open.heard {
                let cause =
                    if error.is_empty() { "no worker that is connected has such logs" } else { error };
                let _ = open.lines.try_send(Err(Status::not_found(cause)));
            }
            self.open.remove(&request);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chunk(request: u64, path: &str, line: &str) -> LogChunk {
        let lines = LogLines { path: path.to_owned(), lines: vec![line.to_owned()], ..LogLines::default() };
        LogChunk { request, lines: Some(lines), ..LogChunk::default() }
    }

    fn last(request: u64) -> LogChunk {
        LogChunk { request, last: true, ..LogChunk::default() }
    }

    #[test]
    fn a_file_that_two_workers_see_is_shown_once_and_the_stream_ends_with_the_last_of_them() {
        let (mut relay, (a, b)) = (Relay::default(), (WorkerName::from("a"), WorkerName::from("b")));
        let (sender, mut lines) = mpsc::channel(WINDOW);
        let request = relay.open(sender, vec![a.clone(), b.clone()]);
        assert!(!relay.take(&a, chunk(request, "/shared", "1")));
        assert!(!relay.take(&b, chunk(request, "/shared", "1")));
        assert!(!relay.take(&b, chunk(request, "/own", "2")));
        assert!(!relay.take(&a, last(request)));
        relay.left(&b);
        let mut shown = Vec::new();
        while let Some(line) = lines.blocking_recv() {
            let line = line.unwrap();
            shown.push((line.worker, line.path));
        }
        let pair = |worker: &str, path: &str| (worker.to_owned(), path.to_owned());
        assert_eq!(shown, [pair("a", "/shared"), pair("b", "/own")]);
    }

    #[test]
    fn who_reads_nothing_is_cut_off_and_who_is_gone_is_forgotten() {
        let (mut relay, a) = (Relay::default(), WorkerName::from("a"));
        let (sender, _lines) = mpsc::channel(1);
        let request = relay.open(sender, vec![a.clone()]);
        assert!(!relay.take(&a, chunk(request, "/f", "1")));
        assert!(relay.take(&a, chunk(request, "/f", "2")), "he is too slow");
        let (sender, lines) = mpsc::channel(1);
        let request = relay.open(sender, vec![a]);
        drop(lines);
        assert_eq!(relay.forsaken(), [request]);
    }
}
