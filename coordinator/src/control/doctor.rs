//! Looks at the coordinator, asks all workers about their machines, and lets each of them dial all others.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use nix::sys::statvfs::statvfs;
use tokio::sync::mpsc;
use tunefleet_proto::rpc::finding::Verdict;
use tunefleet_proto::rpc::{Examine, Examined, Finding, Probe, WorkerState, WorkerStatus};

use super::events::unix_ms;
use super::placement::WorkerName;
use super::plane::{Message, Plane};
use super::store;
use super::tls::{Certificate, certificates};

/// How long workers may take to look at themselves: they start a process that loads libtorch.
const LOOK_LIMIT: Duration = Duration::from_secs(120);
/// How long they may take to dial each other, for each of them.
const DIAL_LIMIT: Duration = Duration::from_secs(15);
/// A coordinator writes its state there.
const STATE_BYTES: u64 = 1 << 30;
/// Clocks this far apart make logs and events hard to bring together, and certificates may not be valid yet.
const CLOCK_WARNING: Duration = Duration::from_secs(1);
const CLOCK_CRITICAL: Duration = Duration::from_secs(60);
const DAY_SECONDS: u64 = 24 * 3600;
const GIB: f64 = (1u64 << 30) as f64;

/// Where answers go; it closes with the last of them.
pub type Answers = mpsc::UnboundedSender<(WorkerName, Examined)>;

/// The questions that are open.
#[derive(Default)]
pub struct Examinations {
    requests: u64,
    open: BTreeMap<u64, (Answers, Vec<WorkerName>)>,
}

impl Examinations {
    /// Opens a question to these workers; its number.
    pub fn open(&mut self, answers: Answers, workers: Vec<WorkerName>) -> u64 {
        // Those whose askers are gone.
        self.open.retain(|_, (answers, _)| !answers.is_closed());
        self.requests += 1;
        if !workers.is_empty() {
            self.open.insert(self.requests, (answers, workers));
        }
        self.requests
    }

    /// Passes an answer on.
    pub fn take(&mut self, worker: &WorkerName, examined: &Examined) {
        if let Some((answers, waiting)) = self.open.get(&examined.request)
            && waiting.contains(worker)
        {
            let _ = answers.send((worker.clone(), examined.clone()));
        }
        self.done(worker, Some(examined.request));
    }

    /// Nothing more comes from a worker.
    pub fn left(&mut self, worker: &WorkerName) {
        self.done(worker, None);
    }

    fn done(&mut self, worker: &WorkerName, request: Option<u64>) {
        for (_, (_, waiting)) in
            self.open.iter_mut().filter(|(open, _)| request.is_none_or(|it| it == **open))
        {
            waiting.retain(|waiting| waiting != worker);
        }
        self.open.retain(|_, (_, waiting)| !waiting.is_empty());
    }
}

/// Looks at everything, and tells what is found as it is found.
pub async fn examine(
    plane: Plane,
    state: Option<PathBuf>,
    certificate: Option<PathBuf>,
    tell: mpsc::Sender<Finding>,
) {
    let own = tokio::task::spawn_blocking(move || {
        let mut found = state.map(|state| of_state(&state)).unwrap_or_default();
        found.extend(certificate.map(|file| of_certificate(&file)));
        found
    });
    for finding in own.await.unwrap_or_default() {
        let _ = tell.send(Finding { place: "coordinator".to_owned(), ..finding }).await;
    }
    let workers = plane.ask(|reply| Message::Workers { reply }).await.unwrap_or_default();
    if workers.is_empty() {
        let detail = "none has ever registered: start `worker daemon --coordinator URL`".to_owned();
        let _ = tell.send(finding("workers", Verdict::Warning, detail)).await;
        return;
    }
    for worker in &workers {
        let _ = tell.send(Finding { place: worker.name.clone(), ..of_worker(worker) }).await;
    }
    let secret = rand::random::<[u8; 32]>().to_vec();
    let question = Examine { secret: secret.clone(), ..Examine::default() };
    let began = unix_ms();
    let peers = ask(&plane, question, LOOK_LIMIT, Some(began), &tell).await;
    if peers.len() > 1 {
        let limit = DIAL_LIMIT * peers.len() as u32;
        let question = Examine { secret, probes: true, peers, ..Examine::default() };
        ask(&plane, question, limit, None, &tell).await;
    }
}

/// Asks all workers and tells their answers; who listens for probes, in the order of names.
async fn ask(
    plane: &Plane,
    question: Examine,
    limit: Duration,
    asked_unix_ms: Option<u64>,
    tell: &mpsc::Sender<Finding>,
) -> Vec<Probe> {
    let (answers, mut received) = mpsc::unbounded_channel();
    let asked = plane.ask(|reply| Message::Examine { question, answers, reply }).await;
    let mut waiting = asked.unwrap_or_default();
    let mut probes = Vec::new();
    let deadline = Instant::now() + limit;
    while !waiting.is_empty() {
        let left = deadline.saturating_duration_since(Instant::now());
        let Ok(Some((worker, examined))) = tokio::time::timeout(left, received.recv()).await else { break };
        waiting.retain(|waiting| *waiting != worker);
        let place = worker.to_string();
        let clock = asked_unix_ms.map(|asked| of_clock(asked, examined.unix_ms, unix_ms()));
        for finding in clock.into_iter().chain(examined.findings) {
            if tell.send(Finding { place: place.clone(), ..finding }).await.is_err() {
                return Vec::new();
            }
        }
        if !examined.probe_address.is_empty() {
            probes.push(Probe { worker: place, address: examined.probe_address });
        }
    }
    for worker in waiting {
        let detail = format!("no answer in {} s: an older version, or it is gone", limit.as_secs());
        let unknown = Finding { place: worker.to_string(), ..finding("answer", Verdict::Unknown, detail) };
        let _ = tell.send(unknown).await;
    }
    probes.sort_by(|a, b| a.worker.cmp(&b.worker));
    probes
}

fn finding(check: &str, verdict: Verdict, detail: String) -> Finding {
    Finding { place: String::new(), check: check.to_owned(), verdict: verdict.into(), detail }
}

fn of_state(state: &Path) -> Vec<Finding> {
    let mut found = store::check(state)
        .unwrap_or_else(|error| vec![finding("state", Verdict::Critical, error.to_string())]);
    found.push(match statvfs(state) {
        Ok(stat) => of_disk(stat.blocks_available().saturating_mul(stat.fragment_size()), state),
        Err(error) => finding("disk", Verdict::Unknown, format!("{}: {error}", state.display())),
    });
    found
}

fn of_disk(free: u64, state: &Path) -> Finding {
    let verdict = match free {
        free if free < STATE_BYTES / 10 => Verdict::Critical,
        free if free < STATE_BYTES => Verdict::Warning,
        _ => Verdict::Ok,
    };
    finding(
        "disk",
        verdict,
        format!("{:.1} GiB free for the state in {}", free as f64 / GIB, state.display()),
    )
}

fn of_certificate(file: &Path) -> Finding {
    let read = certificates(file).map_err(|error| error.to_string());
    let leaf = read.and_then(|chain| match chain.first() {
        Some(first) => Certificate::read(first),
        None => Err("there is none".to_owned()),
    });
    let (verdict, detail) = match leaf {
        Err(error) => (Verdict::Critical, error),
        Ok(certificate) => match certificate.ends.duration_since(SystemTime::now()) {
            Err(_) => (Verdict::Critical, format!("{} has ended", file.display())),
            Ok(left) => {
                let days = left.as_secs() / DAY_SECONDS;
                let verdict = if days < 30 { Verdict::Warning } else { Verdict::Ok };
                (verdict, format!("{} ends in {days} days", file.display()))
            }
        },
    };
    finding("certificate", verdict, detail)
}

fn of_worker(worker: &WorkerStatus) -> Finding {
    let (own, theirs) =
        (env!("CARGO_PKG_VERSION"), worker.registered.as_ref().map(|told| told.version.as_str()));
    let state = worker.state().name();
    let silent = Duration::from_millis(worker.silent_ms).as_secs();
    let (verdict, detail) = match worker.state() {
        WorkerState::Lost => (Verdict::Critical, format!("{state}: not heard of for {silent} s")),
        WorkerState::Suspect => (Verdict::Warning, format!("{state}: not heard of for {silent} s")),
        WorkerState::Excluded | WorkerState::Draining => {
            (Verdict::Warning, format!("{state}: {}", worker.detail))
        }
        _ => match theirs {
            Some(theirs) if theirs != own => {
                (Verdict::Warning, format!("{state}, version {theirs}, and the coordinator is {own}"))
            }
            _ => (Verdict::Ok, state.to_owned()),
        },
    };
    finding("session", verdict, detail)
}

/// The worker's clock against the coordinator's: it was read between the question and its answer.
fn of_clock(asked_unix_ms: u64, theirs_unix_ms: u64, answered_unix_ms: u64) -> Finding {
    let behind = asked_unix_ms.saturating_sub(theirs_unix_ms);
    let ahead = theirs_unix_ms.saturating_sub(answered_unix_ms);
    let apart = Duration::from_millis(behind.max(ahead));
    let verdict = match apart {
        apart if apart > CLOCK_CRITICAL => Verdict::Critical,
        apart if apart > CLOCK_WARNING => Verdict::Warning,
        _ => Verdict::Ok,
    };
    let detail = match (behind, ahead) {
        (0, 0) => "the coordinator's".to_owned(),
        _ => format!(
            "{:.1} s {} the coordinator's: let both follow the same time server",
            apart.as_secs_f64(),
            if behind > ahead { "behind" } else { "ahead of" }
        ),
    };
    finding("clock", verdict, detail)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_is_held_against_the_time_between_question_and_answer() {
        let of = |theirs| of_clock(100_000, theirs, 103_000);
        assert_eq!(of(101_000).verdict(), Verdict::Ok);
        assert_eq!(of(99_500).verdict(), Verdict::Ok);
        assert_eq!(of(90_000).verdict(), Verdict::Warning);
        assert!(of(90_000).detail.contains("10.0 s behind"));
        assert_eq!(of(203_000).verdict(), Verdict::Critical);
    }

    #[test]
    fn an_examination_ends_with_its_last_worker() {
        let (mut open, (a, b)) = (Examinations::default(), (WorkerName::from("a"), WorkerName::from("b")));
        let (sender, mut answers) = mpsc::unbounded_channel();
        let request = open.open(sender, vec![a.clone(), b.clone()]);
        open.take(&a, &Examined { request, ..Examined::default() });
        open.take(&a, &Examined { request, ..Examined::default() });
        open.left(&b);
        assert_eq!(answers.try_recv().map(|(worker, _)| worker), Ok(a));
        assert!(answers.try_recv().is_err(), "one answer of each");
        assert!(answers.is_closed());
    }

    #[test]
    fn a_disk_that_is_nearly_full_is_told() {
        let of = |free| of_disk(free, Path::new("/state")).verdict();
        assert_eq!(
            [of(2 << 30), of(1 << 29), of(1 << 20)],
            [Verdict::Ok, Verdict::Warning, Verdict::Critical]
        );
    }
}
