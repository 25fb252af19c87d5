//! The session to the daemon: events go up, a start, a stop or an abort comes down.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::time::{Duration, Instant};

use hyper_util::rt::TokioIo;
use nix::sys::signal::{Signal, raise};
use tokio::net::UnixStream;
use tokio::signal::unix::{SignalKind, signal};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;
use tonic::transport::Endpoint;
use tunefleet_proto::rpc::rank_done::Outcome as Told;
use tunefleet_proto::rpc::{
    Assignment, Beat, Collectives, DaemonMessage, Evaluated, Finished, RankDone, RankEvent, RankFailed,
    Ready, Saved, StartRanks, StepDone, Token, daemon_message, rank_event, ranks_client,
};

use super::Error;
use super::spool::Spool;
use crate::comm::Groups;
use crate::comm::dump::Reporter;
use crate::comm::recorder::Collective;
use crate::comm::watchdog::{Alarm, Watchdog};
use crate::daemon::leave_last_words;
use crate::train::{Event, Host, Outcome};

/// How long the main thread has to end by itself once the rank was aborted.
const ABORT_GRACE: Duration = Duration::from_secs(1);
/// How long a rank whose collective has stalled waits to be aborted before it ends by itself: its
/// daemon or the coordinator may be out of reach for a while.
const ANSWER_GRACE: Duration = Duration::from_secs(120);
/// How long the last events may take to reach the daemon.
const FLUSH_LIMIT: Duration = Duration::from_secs(2);

/// How long a rank trains on without a daemon. Then it saves a checkpoint and stops: nobody would know of it.
const ALONE_LIMIT: Duration = Duration::from_secs(30 * 60);
const FIRST_RETRY: Duration = Duration::from_millis(50);
const LAST_RETRY: Duration = Duration::from_secs(2);
/// How often the daemon is told how far this rank is.
const BEAT: Duration = Duration::from_secs(1);
/// Events under way to the daemon.
const WINDOW: usize = 64;

/// A live session and the assignment that it began with.
pub(super) struct Session {
    /// What this rank is to do.
    pub assignment: Assignment,
    /// The daemon, as a task sees it.
    pub host: Daemon,
    start: mpsc::Receiver<StartRanks>,
}

/// Forwards a task's events, and tells it when to stop.
pub(super) struct Daemon {
    spool: Arc<Spool>,
    shared: Arc<Shared>,
    attempt: Option<u32>,
}

/// What both threads see.
struct Shared {
    stop_requested: AtomicBool,
    closing: AtomicBool,
    /// Set once: why the rank has to end.
    abort: Mutex<Option<Ending>>,
    groups: Mutex<Option<Groups>>,
    reporter: Mutex<Option<Arc<Reporter>>>,
    progress: Mutex<Progress>,
}

/// How far this rank is, and since when.
#[derive(Clone, Copy)]
struct Progress {
    step: u64,
    /// Section of the training loop; empty before the first.
    section: &'static str,
    since: Instant,
}

/// Why a rank has to end.
#[derive(Debug, Clone)]
struct Ending {
    reason: String,
    /// Another rank is to blame.
    by_peer: bool,
}

/// Tells the daemon of a collective that has stalled. It keeps neither session nor groups alive.
struct Stalled {
    spool: Arc<Spool>,
    shared: Arc<Shared>,
    reporter: Arc<Reporter>,
}

impl Session {
    /// Dials the daemon and waits for the assignment.
    pub fn open(socket: PathBuf, token: Token) -> Result<Self, Error> {
        let (assignment_sender, assignment) = mpsc::channel();
        let (start_sender, start) = mpsc::channel();
        let (spool, shared) = (Arc::new(Spool::default()), Arc::new(Shared::new()));
        let error_at = {
            let socket = socket.clone();
            move |cause: String| Error::Session { socket, cause }
        };
        let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
            Ok(runtime) => runtime,
            Err(error) => return Err(error_at(error.to_string())),
        };
        let start_sender = Mutex::new(Some(start_sender));
        let link = Link {
            socket,
            token,
            spool: Arc::clone(&spool),
            shared: Arc::clone(&shared),
            start: start_sender,
        };
        let work = move || runtime.block_on(link.run(assignment_sender));
        if let Err(error) = std::thread::Builder::new().name("session".to_owned()).spawn(work) {
            return Err(error_at(error.to_string()));
        }
        match assignment.recv() {
            Ok(Ok(assignment)) => {
                let attempt = assignment.task.as_ref().map(|task| task.attempt);
                Ok(Session { assignment, host: Daemon { spool, shared, attempt }, start })
            }
            Ok(Err(cause)) => Err(error_at(cause)),
            Err(_) => Err(error_at("its thread ended".to_owned())),
        }
    }

    /// Tells that this rank listens at `address`, and waits until all its peers do.
    pub fn wait_for_start(&self, address: String) -> Result<StartRanks, Error> {
        self.host.send(rank_event::Body::Ready(Ready { address }));
        self.start.recv().map_err(|_| self.host.shared.aborted())
    }

    /// From now on an abort of this rank aborts its groups, and where it is among its collectives is
    /// told when the daemon asks, or when one takes longer than `timeout`.
    pub fn watch_over(
        &self,
        groups: Groups,
        reporter: Reporter,
        timeout: Duration,
    ) -> Result<Watchdog, Error> {
        let Daemon { spool, shared, .. } = &self.host;
        let reporter = Arc::new(reporter);
        *lock(&shared.groups) = Some(groups);
        *lock(&shared.reporter) = Some(Arc::clone(&reporter));
        let record = Arc::clone(reporter.record());
        let alarm = Stalled { spool: Arc::clone(spool), shared: Arc::clone(shared), reporter };
        Watchdog::start(record, timeout, ANSWER_GRACE, alarm).map_err(Error::Watchdog)
    }

    /// `error` with who is to blame for it, as far as this rank can know.
    pub fn blame(&self, error: Error) -> Error {
        if !error.is_consequence() {
            return error;
        }
        let told = lock(&self.host.shared.abort).is_some();
        if told { self.host.shared.aborted() } else { Error::AbortedByPeer(error.to_string()) }
    }

    /// Tells how the task went, and waits until the daemon has heard it.
    pub fn close(self, result: &Result<Outcome, Error>) {
        let outcome = match result {
            Ok(Outcome::Finished) => Told::Finished(Finished {}),
            Ok(Outcome::Stopped(step)) => Told::StoppedAtStep(*step),
            Err(error) => Told::Failed(RankFailed {
                message: error.to_string(),
                consequence: error.is_consequence(),
                kind: error.kind().into(),
            }),
        };
        let Session { host, assignment, .. } = self;
        let done = rank_event::Body::Done(RankDone { outcome: Some(outcome) });
        let reporter = lock(&host.shared.reporter).take();
        let groups = lock(&host.shared.groups).take();
        if let Some(reporter) = reporter {
            reporter.record().forget_work();
        }
        // The groups go here and not as the process exits: peers get this rank's farewell, and
        // NCCL its shutdown.
        match result {
            Ok(_) => {
                drop(groups);
                host.shared.closing.store(true, Ordering::Release);
                host.send(done);
            }
            Err(error) => {
                // The cause is told before peers feel the consequence, and whatever becomes of groups
                // that are left in the middle of an operation.
                host.shared.closing.store(true, Ordering::Release);
                host.send(done);
                if let Some(groups) = groups {
                    groups.abort(&error.to_string());
                }
            }
        }
        host.spool.close();
        let untold = host.spool.wait_until_taken(FLUSH_LIMIT);
        let path = &assignment.last_words_path;
        if !untold.is_empty()
            && !path.is_empty()
            && let Err(error) = leave_last_words(Path::new(path), &untold)
        {
            tracing::error!("{path}: {error}; {} events are lost", untold.len());
        }
    }
}

impl Daemon {
    fn send(&self, body: rank_event::Body) {
        self.spool.tell(body);
    }
}

impl Host for Daemon {
    fn report(&self, event: Event) {
        self.send(match event {
            Event::Section(name) => {
                self.shared.progressed(|progress| progress.section = name);
                rank_event::Body::Section(name.to_owned())
            }
            Event::Note(text) => rank_event::Body::Note(text),
            Event::Step(report) => rank_event::Body::Step(StepDone {
                step: report.step,
                loss: report.loss,
                grad_norm: report.grad_norm,
                learning_rate: report.learning_rate,
                tokens: report.tokens,
                tokens_per_second: report.tokens_per_second,
                step_seconds: report.step_seconds,
                peak_memory_bytes: report.peak_memory_bytes,
                data_wait_seconds: report.data_wait_seconds,
                collective_wait_seconds: report.collective_wait_seconds,
            }),
            Event::Evaluated { step, loss } => rank_event::Body::Evaluated(Evaluated { step, loss }),
            Event::Saved { step, path, pause_seconds } => {
                rank_event::Body::Saved(Saved { step, path: path.display().to_string(), pause_seconds })
            }
        });
    }

    fn progress(&self, step: u64) {
        self.shared.progressed(|progress| progress.step = step);
    }

    fn attempt(&self) -> Option<u32> {
        self.attempt
    }

    fn stop_requested(&self) -> bool {
        self.shared.stop_requested.load(Ordering::Acquire)
    }
}

impl Alarm for Stalled {
    fn stalled(&mut self, collective: &Collective) {
        let report = self.reporter.report(lock(&self.shared.progress).section);
        let about = self.reporter.record().about(collective.tag);
        tracing::error!("{about} (#{}) has not ended in time: see {}", collective.sequence, report.dump_path);
        self.spool.tell_once(rank_event::Body::Stalled(report));
    }

    fn unanswered(&mut self, collective: &Collective) {
        let (about, sequence) = (self.reporter.record().about(collective.tag), collective.sequence);
        let seconds = collective.started.elapsed().as_secs();
        if let Some(groups) = lock(&self.shared.groups).clone() {
            groups.abort(&format!("{about} (#{sequence}) has taken {seconds} s, and nobody asked why"));
        }
    }
}

impl Shared {
    fn new() -> Self {
        Shared {
            stop_requested: AtomicBool::new(false),
            closing: AtomicBool::new(false),
            abort: Mutex::default(),
            groups: Mutex::default(),
            reporter: Mutex::default(),
            progress: Mutex::new(Progress { step: 0, section: "", since: Instant::now() }),
        }
    }

    fn progressed(&self, change: impl FnOnce(&mut Progress)) {
        let mut progress = lock(&self.progress);
        change(&mut progress);
        progress.since = Instant::now();
    }

    fn beat(&self) -> rank_event::Body {
        let Progress { step, section, since } = *lock(&self.progress);
        rank_event::Body::Beat(Beat {
            step,
            section: section.to_owned(),
            seconds: since.elapsed().as_secs_f64(),
        })
    }

    /// Why this rank has to end, as an error.
    fn aborted(&self) -> Error {
        match lock(&self.abort).clone() {
            Some(Ending { reason, by_peer: true }) => Error::AbortedByPeer(reason),
            Some(Ending { reason, by_peer: false }) => Error::Aborted(reason),
            None => Error::Aborted("the daemon is gone".to_owned()),
        }
    }

    /// The session is over. Unless the task is done, this process has no business any more.
    async fn end(&self, ending: Ending, start: Option<mpsc::Sender<StartRanks>>) {
        if self.closing.load(Ordering::Acquire) {
            return;
        }
        let cause = ending.reason.clone();
        *lock(&self.abort) = Some(ending);
        drop(start);
        if let Some(groups) = lock(&self.groups).clone() {
            // On a thread of its own: an abort that hangs must not keep this process alive.
            std::thread::spawn(move || groups.abort(&cause));
        }
        tokio::time::sleep(ABORT_GRACE).await;
        // Exit handlers of libraries may wait for threads that are stuck: they are not asked.
        eprintln!("error: {}", self.aborted());
        let _ = raise(Signal::SIGKILL);
    }

    /// Where this rank is among its collectives. Before it has met its peers there are none.
    fn collectives(&self) -> Collectives {
        let reporter = lock(&self.reporter).clone();
        let section = lock(&self.progress).section;
        match reporter {
            Some(reporter) => reporter.report(section),
            None => Collectives { section: section.to_owned(), ..Collectives::default() },
        }
    }
}

type Inbound = Streaming<DaemonMessage>;

/// The session's thread: one connection after another, as daemons come and go.
struct Link {
    socket: PathBuf,
    token: Token,
    spool: Arc<Spool>,
    shared: Arc<Shared>,
    /// To the main thread, until it may not start any more.
    start: Mutex<Option<mpsc::Sender<StartRanks>>>,
}

impl Link {
    async fn run(self, assignment: mpsc::Sender<Result<Assignment, String>>) {
        self.stop_on_sigterm();
        let (mut known, mut alone_since, mut retry) = (None, Instant::now(), FIRST_RETRY);
        loop {
            match self.connect().await {
                Ok((first, inbound)) => {
                    if known.is_none() {
                        known = Some(first.ends_with_daemon);
                        let _ = assignment.send(Ok(first));
                    }
                    retry = FIRST_RETRY;
                    self.listen(inbound).await;
                    alone_since = Instant::now();
                }
                Err(cause) if known.is_none() => {
                    let _ = assignment.send(Err(cause));
                    return;
                }
                Err(_) => {}
            }
            if self.shared.closing.load(Ordering::Acquire) {
                return;
            }
            if known == Some(true) {
                self.end(Ending { reason: "the daemon is gone".to_owned(), by_peer: false });
            } else if alone_since.elapsed() > ALONE_LIMIT
                && !self.shared.stop_requested.swap(true, Ordering::AcqRel)
            {
                let seconds = ALONE_LIMIT.as_secs();
                tracing::error!("no daemon for {seconds} s: a checkpoint is saved, and then this rank ends");
                // Before it has met its peers there is nothing to save.
                drop(lock(&self.start).take());
            }
            tokio::time::sleep(retry).await;
            retry = (retry * 2).min(LAST_RETRY);
        }
    }

    /// Ends this rank, once; what it still tells goes to the daemon meanwhile.
    fn end(&self, ending: Ending) {
        let start = lock(&self.start).take();
        if lock(&self.shared.abort).is_none() {
            let shared = Arc::clone(&self.shared);
            tokio::spawn(async move { shared.end(ending, start).await });
        }
    }

    /// SIGTERM to this process alone stops the task, with all its ranks, at the next step and with a checkpoint.
    fn stop_on_sigterm(&self) {
        let shared = Arc::clone(&self.shared);
        match signal(SignalKind::terminate()) {
            Ok(mut terminate) => drop(tokio::spawn(async move {
                while terminate.recv().await.is_some() {
                    tracing::warn!("SIGTERM: stopping after this step, with a checkpoint");
                    shared.stop_requested.store(true, Ordering::Release);
                }
            })),
            Err(error) => tracing::warn!("handling SIGTERM: {error}"),
        }
    }

    async fn connect(&self) -> Result<(Assignment, Inbound), String> {
        let path = self.socket.clone();
        let connector = tower::service_fn(move |_| {
            let path = path.clone();
            async move { UnixStream::connect(path).await.map(TokioIo::new) }
        });
        // The address is not used: the connector knows where to go.
        let endpoint = Endpoint::from_static("http://daemon");
        let channel = endpoint.connect_with_connector(connector).await.map_err(|e| chain(&e))?;
        let mut client: ranks_client::RanksClient<_> =
            tunefleet_proto::rpc::ranks_client(channel, self.token.clone());
        let (sender, events) = tokio::sync::mpsc::channel(WINDOW);
        tokio::spawn(pump(Arc::clone(&self.spool), Arc::clone(&self.shared), sender));
        let response = client.session(ReceiverStream::new(events)).await.map_err(|e| chain(&e))?;
        let mut inbound = response.into_inner();
        match inbound.message().await {
            Ok(Some(DaemonMessage { body: Some(daemon_message::Body::Assignment(assignment)) })) => {
                Ok((assignment, inbound))
            }
            Ok(_) => Err("the daemon sent no assignment".to_owned()),
            Err(status) => Err(chain(&status)),
        }
    }

    /// Handles commands until the daemon is gone.
    async fn listen(&self, mut inbound: Inbound) {
        while let Ok(Some(message)) = inbound.message().await {
            match message.body {
                Some(daemon_message::Body::Start(peers)) => {
                    if let Some(start) = &*lock(&self.start) {
                        let _ = start.send(peers);
                    }
                }
                Some(daemon_message::Body::StopAtCheckpoint(_)) => {
                    self.shared.stop_requested.store(true, Ordering::Release);
                }
                Some(daemon_message::Body::ReportCollectives(_)) => {
                    // On this thread, so that it is told while the main thread is stuck.
                    self.spool.tell_once(rank_event::Body::Collectives(self.shared.collectives()));
                }
                Some(daemon_message::Body::Acknowledged(ack)) => self.spool.taken(ack.through),
                Some(daemon_message::Body::Abort(abort)) => {
                    self.end(Ending { reason: abort.reason, by_peer: abort.by_peer });
                }
                // Sent once, before; or by a newer daemon.
                Some(daemon_message::Body::Assignment(_)) | None => {}
            }
        }
    }
}

/// Sends what there is to tell over one connection, all that no daemon has taken yet first.
async fn pump(spool: Arc<Spool>, shared: Arc<Shared>, sender: tokio::sync::mpsc::Sender<RankEvent>) {
    let (mut sent, mut beat) = (0, tokio::time::interval(BEAT));
    spool.forget_once();
    loop {
        let (events, more) = spool.next(sent);
        for event in events {
            sent = sent.max(event.sequence);
            if sender.send(event).await.is_err() {
                return;
            }
        }
        if !more {
            return;
        }
        tokio::select! {
            () = spool.grown.notified() => {}
            () = sender.closed() => return,
            _ = beat.tick() => {
                let event = RankEvent { body: Some(shared.beat()), sequence: 0 };
                if sender.send(event).await.is_err() {
                    return;
                }
            }
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// An error with its causes: a transport's own message is only "transport error".
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(inner) = cause {
        text = format!("{text}: {inner}");
        cause = inner.source();
    }
    text
}
