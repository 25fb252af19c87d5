//! The session to the daemon: events go up, a start, a stop or an abort comes down.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::time::Duration;

use hyper_util::rt::TokioIo;
use nix::sys::signal::{Signal, raise};
use tokio::net::UnixStream;
use tokio::sync::mpsc::WeakUnboundedSender;
use tokio_stream::wrappers::UnboundedReceiverStream;
use tonic::Streaming;
use tonic::transport::Endpoint;
use tunefleet_proto::rpc::rank_done::Outcome as Told;
use tunefleet_proto::rpc::{
    Assignment, Collectives, DaemonMessage, Evaluated, Finished, RankDone, RankEvent, RankFailed, Ready,
    Saved, StartRanks, StepDone, Token, daemon_message, rank_event, ranks_client,
};

use super::Error;
use crate::comm::Groups;
use crate::comm::dump::Reporter;
use crate::comm::recorder::Collective;
use crate::comm::watchdog::{Alarm, Watchdog};
use crate::train::{Event, Host, Outcome};

/// How long the main thread has to end by itself once the rank was aborted.
const ABORT_GRACE: Duration = Duration::from_secs(1);
/// How long a rank whose collective has stalled waits to be aborted before it ends by itself: its
/// daemon or the coordinator may be out of reach for a while.
const ANSWER_GRACE: Duration = Duration::from_secs(120);
/// How long the last events may take to reach the daemon.
const FLUSH_LIMIT: Duration = Duration::from_secs(2);

/// A live session and the assignment that it began with.
pub(super) struct Session {
    /// What this rank is to do.
    pub assignment: Assignment,
    /// The daemon, as a task sees it.
    pub host: Daemon,
    start: mpsc::Receiver<StartRanks>,
    ended: mpsc::Receiver<()>,
}

/// Forwards a task's events, and tells it when to stop.
pub(super) struct Daemon {
    outbox: tokio::sync::mpsc::UnboundedSender<RankEvent>,
    shared: Arc<Shared>,
}

/// What both threads see.
#[derive(Default)]
struct Shared {
    stop_requested: AtomicBool,
    closing: AtomicBool,
    /// Set once: why the rank has to end.
    abort: Mutex<Option<Ending>>,
    groups: Mutex<Option<Groups>>,
    reporter: Mutex<Option<Arc<Reporter>>>,
    /// Section of the training loop; empty before the first.
    section: Mutex<&'static str>,
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
    outbox: WeakUnboundedSender<RankEvent>,
    shared: Arc<Shared>,
    reporter: Arc<Reporter>,
}

impl Session {
    /// Dials the daemon and waits for the assignment.
    pub fn open(socket: PathBuf, token: Token) -> Result<Self, Error> {
        let (outbox, events) = tokio::sync::mpsc::unbounded_channel();
        let (assignment_sender, assignment) = mpsc::channel();
        let (start_sender, start) = mpsc::channel();
        let (ended_sender, ended) = mpsc::channel();
        let shared = Arc::new(Shared::default());
        let for_thread = Arc::clone(&shared);
        // Weak: the session ends when the rank has said its last word.
        let answers = outbox.downgrade();
        let error_at = {
            let socket = socket.clone();
            move |cause: String| Error::Session { socket, cause }
        };
        let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
            Ok(runtime) => runtime,
            Err(error) => return Err(error_at(error.to_string())),
        };
        let work = move || {
            runtime.block_on(async {
                match dial(&socket, token, events).await {
                    Ok((first, inbound)) => {
                        let _ = assignment_sender.send(Ok(first));
                        let ending = listen(inbound, &for_thread, &start_sender, &answers).await;
                        for_thread.end(ending, start_sender).await;
                    }
                    Err(cause) => {
                        let _ = assignment_sender.send(Err(cause));
                    }
                }
            });
            let _ = ended_sender.send(());
        };
        if let Err(error) = std::thread::Builder::new().name("session".to_owned()).spawn(work) {
            return Err(error_at(error.to_string()));
        }
        match assignment.recv() {
            Ok(Ok(assignment)) => Ok(Session { assignment, host: Daemon { outbox, shared }, start, ended }),
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
        let Daemon { outbox, shared } = &self.host;
        let reporter = Arc::new(reporter);
        *lock(&shared.groups) = Some(groups);
        *lock(&shared.reporter) = Some(Arc::clone(&reporter));
        let record = Arc::clone(reporter.record());
        let alarm = Stalled { outbox: outbox.downgrade(), shared: Arc::clone(shared), reporter };
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
                ..RankFailed::default()
            }),
        };
        let Session { host, ended, .. } = self;
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
        drop(host);
        let _ = ended.recv_timeout(FLUSH_LIMIT);
    }
}

impl Daemon {
    fn send(&self, body: rank_event::Body) {
        // A closed channel means that the session is over: its thread ends this process.
        let _ = self.outbox.send(RankEvent { body: Some(body), ..RankEvent::default() });
    }
}

impl Host for Daemon {
    fn report(&self, event: Event) {
        self.send(match event {
            Event::Section(name) => {
                *lock(&self.shared.section) = name;
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
            }),
            Event::Evaluated { step, loss } => rank_event::Body::Evaluated(Evaluated { step, loss }),
            Event::Saved { step, path, pause_seconds } => {
                rank_event::Body::Saved(Saved { step, path: path.display().to_string(), pause_seconds })
            }
        });
    }

    fn stop_requested(&self) -> bool {
        self.shared.stop_requested.load(Ordering::Acquire)
    }
}

impl Alarm for Stalled {
    fn stalled(&mut self, collective: &Collective) {
        let section = *lock(&self.shared.section);
        let report = self.reporter.report(section);
        let about = self.reporter.record().about(collective.tag);
        tracing::error!("{about} (#{}) has not ended in time: see {}", collective.sequence, report.dump_path);
        if let Some(outbox) = self.outbox.upgrade() {
            let _ = outbox
                .send(RankEvent { body: Some(rank_event::Body::Stalled(report)), ..RankEvent::default() });
        }
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
    /// Why this rank has to end, as an error.
    fn aborted(&self) -> Error {
        match lock(&self.abort).clone() {
            Some(Ending { reason, by_peer: true }) => Error::AbortedByPeer(reason),
            Some(Ending { reason, by_peer: false }) => Error::Aborted(reason),
            None => Error::Aborted("the daemon is gone".to_owned()),
        }
    }

    /// The session is over. Unless the task is done, this process has no business any more.
    async fn end(&self, ending: Ending, start: mpsc::Sender<StartRanks>) {
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
        let section = *lock(&self.section);
        match reporter {
            Some(reporter) => reporter.report(section),
            None => Collectives { section: section.to_owned(), ..Collectives::default() },
        }
    }
}

type Inbound = Streaming<DaemonMessage>;

async fn dial(
    socket: &Path,
    token: Token,
    events: tokio::sync::mpsc::UnboundedReceiver<RankEvent>,
) -> Result<(Assignment, Inbound), String> {
    let path = socket.to_owned();
    let connector = tower::service_fn(move |_| {
        let path = path.clone();
        async move { UnixStream::connect(path).await.map(TokioIo::new) }
    });
    // The address is not used: the connector knows where to go.
    let endpoint = Endpoint::from_static("http://daemon");
    let channel = endpoint.connect_with_connector(connector).await.map_err(|e| chain(&e))?;
    let mut client: ranks_client::RanksClient<_> = tunefleet_proto::rpc::ranks_client(channel, token);
    let response = client.session(UnboundedReceiverStream::new(events)).await.map_err(|e| chain(&e))?;
    let mut inbound = response.into_inner();
    match inbound.message().await {
        Ok(Some(DaemonMessage { body: Some(daemon_message::Body::Assignment(assignment)) })) => {
            Ok((assignment, inbound))
        }
        Ok(_) => Err("the daemon sent no assignment".to_owned()),
        Err(status) => Err(chain(&status)),
    }
}

/// Handles commands until there are no more; tells why.
async fn listen(
    mut inbound: Inbound,
    shared: &Shared,
    start: &mpsc::Sender<StartRanks>,
    outbox: &WeakUnboundedSender<RankEvent>,
) -> Ending {
    loop {
        let body = match inbound.message().await {
            Ok(Some(message)) => message.body,
            Ok(None) | Err(_) => {
                return Ending { reason: "the daemon is gone".to_owned(), by_peer: false };
            }
        };
        match body {
            Some(daemon_message::Body::Start(peers)) => {
                let _ = start.send(peers);
            }
            Some(daemon_message::Body::StopAtCheckpoint(_)) => {
                shared.stop_requested.store(true, Ordering::Release);
            }
            Some(daemon_message::Body::ReportCollectives(_)) => {
                // On this thread, so that it is told while the main thread is stuck.
                let body = Some(rank_event::Body::Collectives(shared.collectives()));
                if let Some(outbox) = outbox.upgrade() {
                    let _ = outbox.send(RankEvent { body, ..RankEvent::default() });
                }
            }
            Some(daemon_message::Body::Abort(abort)) => {
                return Ending { reason: abort.reason, by_peer: abort.by_peer };
            }
            // Sent once, before; or by a newer daemon.
            Some(daemon_message::Body::Assignment(_) | daemon_message::Body::Acknowledged(_)) | None => {}
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
