//! The one task that owns the fleet: it takes messages in order, lets the state machine say what follows,
//! keeps that, and only then does it.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;
use tonic::Status;
use tunefleet_proto::ids::{Attempt, JobId};
use tunefleet_proto::job::JobSpec;
use tunefleet_proto::rpc::coordinator_message::Body as Command;
use tunefleet_proto::rpc::job_event::Body;
use tunefleet_proto::rpc::{
    AuditRecord, Continuation, CoordinatorMessage, Examine, JobEvent, JobStatus, LogsRequest, PROTOCOL,
    ReadLog, Register, Registered, WorkerMessage, WorkerStatus, worker_message,
};

use super::doctor::{Answers, Examinations};
use super::entry::Entry;
use super::events::EventLog;
use super::figures::Figures;
use super::fleet::{Action, Fleet, Refused, Start, Submission};
use super::job::Input;
use super::metrics_log::{self, MetricsLog};
use super::output::{self, Output, OutputError};
use super::placement::WorkerName;
use super::rank::Exit;
use super::relay::{Lines, Relay};
use super::settings::{Now, Settings};
use super::store::{History, Store, StoreError, Write};
use super::telemetry::Telemetry;
use super::work;
use super::workers::Epoch;
use crate::metrics;

/// Messages under way to the plane before senders have to wait.
const WINDOW: usize = 4096;
/// Messages whose consequences are kept at once.
const BATCH: usize = 512;
/// How often what follows from time is looked for.
const TICK: Duration = Duration::from_millis(100);
/// A tick that is so late was held up: the process was stopped, or its disk.
const STOOD_STILL: Duration = Duration::from_secs(3);
/// A job that has ended since may have events that its coordinator could not log any more.
const RECENTLY: Duration = Duration::from_secs(3600);
/// Events that are read at once.
const PAGE: usize = 512;
/// Until a disk that cannot be written is tried again.
const TRY_AGAIN: Duration = Duration::from_secs(1);

type Reply<T> = oneshot::Sender<Result<T, Status>>;

/// What the plane is asked or told.
pub(super) enum Message {
    Submit {
        spec: Box<JobSpec>,
        continuation: Continuation,
        request: String,
        reply: Reply<Attempt>,
    },
    Resume {
        job: String,
        reply: Reply<JobStatus>,
    },
    Cancel {
        job: String,
        grace: Duration,
        reply: Reply<JobStatus>,
    },
    Suspend {
        job: String,
        grace: Duration,
        reply: Reply<JobStatus>,
    },
    Status {
        job: String,
        reply: Reply<JobStatus>,
    },
    List {
        reply: Reply<Vec<JobStatus>>,
    },
    Figures {
        reply: Reply<Figures>,
    },
    Events {
        job: String,
        reply: Reply<Arc<EventLog>>,
    },
    Workers {
        reply: Reply<Vec<WorkerStatus>>,
    },
    Drain {
        worker: String,
        preempt: bool,
        reply: Reply<WorkerStatus>,
    },
    Undrain {
        worker: String,
        reply: Reply<WorkerStatus>,
    },
    Identity {
        reply: Reply<String>,
    },
    Join {
        register: Box<Register>,
        commands: mpsc::UnboundedSender<CoordinatorMessage>,
        reply: Reply<Epoch>,
    },
    /// A session is over.
    Left {
        worker: WorkerName,
        epoch: Epoch,
    },
    Said {
        worker: WorkerName,
        epoch: Epoch,
        message: WorkerMessage,
    },
    /// An answer of work done outside.
    Happened {
        job: JobId,
        attempt: Attempt,
        input: Input,
    },
    Audit(AuditRecord),
    /// Asks all workers that are connected; their answers, and who is asked.
    Examine {
        question: Examine,
        answers: Answers,
        reply: Reply<Vec<WorkerName>>,
    },
    /// Lines of logs, from all workers that have them.
    Logs {
        what: LogsRequest,
        lines: Lines,
        reply: Reply<()>,
    },
}

/// Why a control plane does not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The state cannot be read.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A job was kept by another version.
    #[error("job {job} was kept by a version that this one cannot read: {cause}")]
    Job {
        /// Which job.
        job: JobId,
        /// What the parser said.
        cause: serde_json::Error,
    },
    /// The directory of an active job is somebody else's.
    #[error("job {job}: {cause}")]
    Output {
        /// Which job.
        job: JobId,
        /// What is wrong with it.
        cause: OutputError,
    },
    /// No thread for it.
    #[error("starting the thread that writes the state: {0}")]
    Thread(std::io::Error),
}

/// A handle to the plane's task.
#[derive(Clone)]
pub struct Plane {
    messages: mpsc::Sender<Message>,
    history: Arc<dyn History>,
}

impl Plane {
    /// Goes on with what `store` holds.
    ///
    /// # Errors
    /// See [`StartError`].
    pub fn start(
        mut store: Box<dyn Store>,
        history: Arc<dyn History>,
        settings: Settings,
    ) -> Result<Self, StartError> {
        let start = Instant::now();
        let secret = Box::new(|| rand::random::<[u8; 32]>().to_vec());
        let fleet = Fleet::restore(store.load()?, settings, secret, Now::since(start))
            .map_err(|(job, cause)| StartError::Job { job, cause })?;
        let (messages, inbox) = mpsc::channel(WINDOW);
        let telemetry = Telemetry::new(&fleet, history.as_ref())?;
        let mut state = State {
            start,
            fleet,
            writer: Writer::new(store).map_err(StartError::Thread)?,
            history: Arc::clone(&history),
            outputs: BTreeMap::new(),
            logs: BTreeMap::new(),
            sessions: BTreeMap::new(),
            messages: messages.downgrade(),
            relay: Relay::default(),
            examinations: Examinations::default(),
            telemetry,
            replies: Vec::new(),
        };
        state.reopen()?;
        tokio::spawn(state.run(inbox));
        Ok(Plane { messages, history })
    }

    /// A handle that does not keep the task going.
    pub(super) fn downgrade(&self) -> WeakPlane {
        WeakPlane { messages: self.messages.downgrade(), history: Arc::clone(&self.history) }
    }

    /// What is kept.
    pub(super) fn history(&self) -> &Arc<dyn History> {
        &self.history
    }

    /// Sends a message.
    pub(super) async fn tell(&self, message: Message) -> Result<(), Status> {
        self.messages.send(message).await.map_err(|_| Status::unavailable("the coordinator is stopping"))
    }

    /// Notes what was refused. A flood of it is not worth waiting for.
    pub(super) fn note(&self, record: AuditRecord) {
        let _ = self.messages.try_send(Message::Audit(record));
    }

    /// Jobs and workers in numbers.
    ///
    /// # Errors
    /// When the control plane is ending.
    pub async fn figures(&self) -> Result<Figures, Status> {
        self.ask(|reply| Message::Figures { reply }).await
    }

    /// Sends a message and waits for the answer.
    pub(super) async fn ask<T>(&self, message: impl FnOnce(Reply<T>) -> Message) -> Result<T, Status> {
        let (reply, answer) = oneshot::channel();
        self.tell(message(reply)).await?;
        answer.await.map_err(|_| Status::unavailable("the coordinator is stopping"))?
    }
}

/// A handle that does not keep the task going.
pub(super) struct WeakPlane {
    messages: mpsc::WeakSender<Message>,
    history: Arc<dyn History>,
}

impl WeakPlane {
    /// The plane, while it is there.
    pub fn upgrade(&self) -> Option<Plane> {
        Some(Plane { messages: self.messages.upgrade()?, history: Arc::clone(&self.history) })
    }
}

impl From<Refused> for Status {
    fn from(refused: Refused) -> Self {
        let message = refused.to_string();
        match refused {
            Refused::NotFound(_) => Status::not_found(message),
            Refused::Exists(_) => Status::already_exists(message),
            Refused::NotNow(_) => Status::failed_precondition(message),
        }
    }
}

impl From<OutputError> for Status {
    fn from(error: OutputError) -> Self {
        Status::failed_precondition(error.to_string())
    }
}

/// Events that were kept, and whose coordinator ended before they were in the job's log, are added to it.
fn catch_up(
    log: &mut MetricsLog,
    id: &JobId,
    entry: &Entry,
    history: &dyn History,
) -> Result<(), StartError> {
    let dir = &entry.spec.output;
    let at =
        |cause| StartError::Output { job: id.clone(), cause: OutputError::Io { dir: dir.clone(), cause } };
    let first = entry.attempts.first().map_or(entry.record.attempt, |row| row.attempt);
    let mut newest = metrics_log::newest_event(dir, first).map_err(at)?;
    loop {
        let missing = history.events(id, newest, PAGE)?;
        let Some(last) = missing.last() else { return Ok(()) };
        newest = last.sequence;
        for event in &missing {
            log.append(event).map_err(at)?;
        }
    }
}

type Commit = (Vec<Write>, oneshot::Sender<Result<(), StoreError>>);

/// What alone writes the state.
enum Writer {
    /// A store that never waits for a disk.
    Here(Box<dyn Store>),
    /// A thread that does.
    Thread(mpsc::UnboundedSender<Commit>),
}

impl Writer {
    fn new(mut store: Box<dyn Store>) -> std::io::Result<Self> {
        if !store.waits_for_a_disk() {
            return Ok(Writer::Here(store));
        }
        let (commits, mut inbox) = mpsc::unbounded_channel::<Commit>();
        std::thread::Builder::new().name("store".to_owned()).spawn(move || {
            while let Some((writes, reply)) = inbox.blocking_recv() {
                let _ = reply.send(store.commit(&writes));
            }
        })?;
        Ok(Writer::Thread(commits))
    }

    async fn commit(&mut self, writes: &[Write]) -> Result<(), StoreError> {
        let commits = match self {
            Writer::Here(store) => return store.commit(writes),
            Writer::Thread(commits) => commits,
        };
        let (reply, answer) = oneshot::channel();
        if commits.send((writes.to_vec(), reply)).is_ok()
            && let Ok(outcome) = answer.await
        {
            return outcome;
        }
        tracing::error!("the thread that writes the state is gone: this is a bug, please report it");
        std::process::abort();
    }
}

struct State {
    start: Instant,
    fleet: Fleet,
    writer: Writer,
    history: Arc<dyn History>,
    /// Directories of active jobs.
    outputs: BTreeMap<JobId, Output>,
    logs: BTreeMap<JobId, Arc<EventLog>>,
    sessions: BTreeMap<WorkerName, (Epoch, mpsc::UnboundedSender<CoordinatorMessage>)>,
    /// For answers of work done outside; weak, so that the task ends with its last handle.
    messages: mpsc::WeakSender<Message>,
    relay: Relay,
    examinations: Examinations,
    telemetry: Telemetry,
    /// To be sent once what they tell is kept.
    replies: Vec<Box<dyn FnOnce() + Send>>,
}

impl State {
    /// Takes the directories of active jobs back.
    fn reopen(&mut self) -> Result<(), StartError> {
        for (id, entry) in self.fleet.jobs() {
            let log = EventLog::new(
                id.clone(),
                Arc::clone(&self.history),
                entry.record.sequence,
                entry.is_active(),
            );
            self.logs.insert(id.clone(), Arc::new(log));
        }
        let recently = self.now().unix_ms.saturating_sub(RECENTLY.as_millis() as u64);
        let ended = |entry: &Entry| entry.attempts.last().map_or(0, |last| last.ended_unix_ms);
        for (id, entry) in
            self.fleet.jobs().filter(|(_, entry)| !entry.is_active() && ended(entry) > recently)
        {
            let dir = &entry.spec.output;
            let caught_up = MetricsLog::open(dir)
                .map_err(|cause| OutputError::Io { dir: dir.clone(), cause })
                .map_err(|cause| StartError::Output { job: id.clone(), cause })
                .and_then(|mut log| catch_up(&mut log, id, entry, self.history.as_ref()));
            if let Err(error) = caught_up {
                // It may have been deleted since.
                tracing::warn!("{error}");
            }
        }
        for (id, entry) in self.fleet.active() {
            let at = |cause| StartError::Output { job: id.clone(), cause };
            let mut output = Output::open(&entry.spec.output).map_err(at)?;
            catch_up(&mut output.log, id, entry, self.history.as_ref())?;
            self.outputs.insert(id.clone(), output);
        }
        Ok(())
    }

    async fn run(mut self, mut inbox: mpsc::Receiver<Message>) {
        let mut tick = tokio::time::interval(TICK);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut looked = Instant::now();
        self.settle().await;
        loop {
            tokio::select! {
                message = inbox.recv() => match message {
                    Some(message) => self.handle(message),
                    None => return,
                },
                _ = tick.tick() => {
                    let now = self.now();
                    // What workers said while this process stood still has not been read yet.
                    if looked.elapsed() > STOOD_STILL {
                        self.fleet.excuse(now);
                    }
                    looked = Instant::now();
                    self.fleet.tick(now);
                    self.forget_forsaken();
                }
            }
            for _ in 1..BATCH {
                let Ok(message) = inbox.try_recv() else { break };
                self.handle(message);
            }
            self.settle().await;
        }
    }

    fn now(&self) -> Now {
        Now::since(self.start)
    }

    /// Keeps what has come together, then does it, until nothing more follows.
    async fn settle(&mut self) {
        loop {
            let out = self.fleet.take(self.now());
            if out.writes.is_empty() && out.actions.is_empty() {
                break;
            }
            self.commit(out.writes).await;
            out.actions.into_iter().for_each(|action| self.act(action));
        }
        std::mem::take(&mut self.replies).into_iter().for_each(|reply| reply());
    }

    /// Nothing is done that is not kept: a disk that is full holds the control plane up, and nobody else.
    async fn commit(&mut self, writes: Vec<Write>) {
        if writes.is_empty() {
            return;
        }
        let began = Instant::now();
        while let Err(error) = self.writer.commit(&writes).await {
            tracing::error!("the state cannot be written, training goes on: {error}");
            tokio::time::sleep(TRY_AGAIN).await;
        }
        metrics::committed(began.elapsed());
    }

    // -------------------------------------------------------------------------------- messages

    fn handle(&mut self, message: Message) {
        let now = self.now();
        match message {
            Message::Submit { spec, continuation, request, reply } => {
                let answer = self.submit(*spec, continuation, request, now);
                self.reply(reply, answer);
            }
            Message::Resume { job, reply } => {
                let answer = self.resume(&JobId(job), now);
                self.reply(reply, answer);
            }
            Message::Cancel { job, grace, reply } => {
                let id = JobId(job);
                let done = self.fleet.cancel(&id, grace, now);
                let answer = done.and_then(|()| self.fleet.status(&id));
                self.reply(reply, answer.map_err(Status::from));
            }
            Message::Suspend { job, grace, reply } => {
                let id = JobId(job);
                let done = self.fleet.suspend(&id, grace, now);
                let answer = done.and_then(|()| self.fleet.status(&id));
                self.reply(reply, answer.map_err(Status::from));
            }
            Message::Status { job, reply } => {
                let answer = self.fleet.status(&JobId(job)).map_err(Status::from);
                self.reply(reply, answer);
            }
            Message::List { reply } => {
                let answer = self.fleet.jobs().map(|(id, entry)| entry.status(id)).collect();
                self.reply(reply, Ok(answer));
            }
            Message::Figures { reply } => {
                let mut answer = self.fleet.figures(now);
                self.telemetry.complete(&mut answer);
                self.reply(reply, Ok(answer));
            }
            Message::Events { job, reply } => {
                let id = JobId(job);
                let log = self.logs.get(&id).map(Arc::clone);
                let missing = || Status::not_found(format!("there is no job {id}"));
                self.reply(reply, log.ok_or_else(missing));
            }
            Message::Workers { reply } => {
                let answer = self.fleet.worker_statuses(now);
                self.reply(reply, Ok(answer));
            }
            Message::Drain { worker, preempt, reply } => {
                let name = WorkerName::from(worker.as_str());
                let done = self.fleet.drain(&name, preempt, now);
                let answer = done.and_then(|()| self.fleet.worker_status(&name, now));
                self.reply(reply, answer.map_err(Status::from));
            }
            Message::Undrain { worker, reply } => {
                let name = WorkerName::from(worker.as_str());
                let done = self.fleet.undrain(&name);
                let answer = done.and_then(|()| self.fleet.worker_status(&name, now));
                self.reply(reply, answer.map_err(Status::from));
            }
            Message::Identity { reply } => {
                let cluster = self.fleet.identity().0.to_owned();
                self.reply(reply, Ok(cluster));
            }
            Message::Join { register, commands, reply } => {
                let answer = self.join(*register, commands, now);
                self.reply(reply, answer);
            }
            Message::Left { worker, epoch } => {
                self.fleet.left(&worker, epoch);
                if self.sessions.get(&worker).is_some_and(|(session, _)| *session == epoch) {
                    self.sessions.remove(&worker);
                    self.relay.left(&worker);
                    self.examinations.left(&worker);
                }
            }
            Message::Said { worker, epoch, message } => {
                if let Some(worker_message::Body::Log(chunk)) = &message.body {
                    let request = chunk.request;
                    if self.relay.take(&worker, chunk.clone()) && !chunk.last {
                        self.send(
                            &worker,
                            epoch,
                            Command::ReadLog(ReadLog { request, ..ReadLog::default() }),
                        );
                    }
                }
                if let Some(worker_message::Body::Examined(examined)) = &message.body {
                    self.examinations.take(&worker, examined);
                }
                self.fleet.said(&worker, epoch, message, now);
            }
            Message::Logs { what, lines, reply } => {
                let answer = self.logs_of(what, lines);
                self.reply(reply, answer);
            }
            Message::Happened { job, attempt, input } => self.fleet.happened(&job, attempt, input, now),
            Message::Audit(record) => self.fleet.audit(record),
            Message::Examine { question, answers, reply } => {
                let asked = self.examine(question, answers);
                self.reply(reply, Ok(asked));
            }
        }
    }

    fn reply<T: Send + 'static>(&mut self, reply: Reply<T>, answer: Result<T, Status>) {
        // An asker that is gone needs no answer.
        self.replies.push(Box::new(move || drop(reply.send(answer))));
    }

    fn submit(
        &mut self,
        spec: JobSpec,
        continuation: Continuation,
        request: String,
        now: Now,
    ) -> Result<Attempt, Status> {
        let id = JobId(spec.name.clone());
        if let Some(attempt) = self.fleet.submitted_before(&id, &request) {
            return Ok(attempt);
        }
        self.fleet.may_submit(&id)?;
        let spec_json = serde_json::to_string(&spec).map_err(|error| Status::internal(error.to_string()))?;
        let earlier = self.open(&id, &spec)?;
        Ok(self.fleet.submit(Submission { spec, spec_json, continuation, request, earlier }, now)?)
    }

    fn resume(&mut self, id: &JobId, now: Now) -> Result<JobStatus, Status> {
        let missing = || Status::not_found(format!("there is no job {id}"));
        let spec = Arc::clone(&self.fleet.job(id).ok_or_else(missing)?.spec);
        self.fleet.may_submit(id)?;
        let earlier = self.open(id, &spec)?;
        self.fleet.resume(id, earlier, now)?;
        Ok(self.fleet.status(id)?)
    }

    /// Takes the directory of a job that is about to begin; the number of its newest attempt.
    fn open(&mut self, id: &JobId, spec: &JobSpec) -> Result<u32, OutputError> {
        let output = Output::open(&spec.output)?;
        let newest = output::newest_attempt(&spec.output)?;
        self.outputs.insert(id.clone(), output);
        match self.logs.get(id) {
            Some(log) => log.set_open(true),
            None => {
                let log = EventLog::new(id.clone(), Arc::clone(&self.history), 0, true);
                self.logs.insert(id.clone(), Arc::new(log));
            }
        }
        Ok(newest)
    }

    fn join(
        &mut self,
        register: Register,
        commands: mpsc::UnboundedSender<CoordinatorMessage>,
        now: Now,
    ) -> Result<Epoch, Status> {
        let name = WorkerName::from(register.name.as_str());
        let Register { version, slots, gpus, metrics_url, .. } = &register;
        tracing::info!("worker {name} {version}: {slots} slots, {gpus} GPUs, {metrics_url}");
        let joined =
            self.fleet.join(register, now).map_err(|refused| Status::already_exists(refused.to_string()))?;
        let (cluster, generation) = self.fleet.identity();
        let registered = Registered {
            heartbeat_interval_ms: self.fleet.settings().heartbeat.as_millis() as u64,
            epoch: joined.epoch.0,
            acknowledged: joined.acknowledged,
            cluster: cluster.to_owned(),
            generation,
            protocol: PROTOCOL,
        };
        // The first message of a session; what follows from the registration comes after it.
        let _ = commands.send(CoordinatorMessage { body: Some(Command::Registered(registered)) });
        self.sessions.insert(name, (joined.epoch, commands));
        Ok(joined.epoch)
    }

    /// Asks all workers for the logs of an attempt.
    fn logs_of(&mut self, what: LogsRequest, lines: Lines) -> Result<(), Status> {
        let id = JobId(what.job.clone());
        let missing = || Status::not_found(format!("there is no job {id}"));
        let entry = self.fleet.job(&id).ok_or_else(missing)?;
        let attempt = if what.attempt == 0 { entry.record.attempt } else { Attempt(what.attempt) };
        let log_dir = output::attempt_dir(&entry.spec.output, attempt).display().to_string();
        if self.sessions.is_empty() {
            return Err(Status::unavailable(
                "no worker is connected: logs are on the machines of the workers",
            ));
        }
        let request = self.relay.open(lines, self.sessions.keys().cloned().collect());
        for (worker, (epoch, _)) in &self.sessions {
            let ask = ReadLog { request, what: Some(what.clone()), log_dir: log_dir.clone() };
            self.send(worker, *epoch, Command::ReadLog(ask));
        }
        Ok(())
    }

    /// Asks all workers about their machines.
    fn examine(&mut self, question: Examine, answers: Answers) -> Vec<WorkerName> {
        let asked: Vec<WorkerName> = self.sessions.keys().cloned().collect();
        let request = self.examinations.open(answers, asked.clone());
        for (worker, (epoch, _)) in &self.sessions {
            self.send(worker, *epoch, Command::Examine(Examine { request, ..question.clone() }));
        }
        asked
    }

    fn forget_forsaken(&mut self) {
        for request in self.relay.forsaken() {
            for (worker, (epoch, _)) in &self.sessions {
                self.send(worker, *epoch, Command::ReadLog(ReadLog { request, ..ReadLog::default() }));
            }
        }
    }

    // --------------------------------------------------------------------------------- actions

    fn act(&mut self, action: Action) {
        match action {
            Action::Send(worker, epoch, command) => self.send(&worker, epoch, command),
            Action::Start(worker, epoch, start) => self.start_ranks(&worker, epoch, start),
            Action::EndSession(worker, epoch) => {
                if self.sessions.get(&worker).is_some_and(|(session, _)| *session == epoch) {
                    self.sessions.remove(&worker);
                }
            }
            Action::Opened(id, attempt) => self.opened(&id, attempt),
            Action::Work(id, attempt, what) => self.work(id, attempt, what),
            Action::Show(id, event) => self.show(&id, event),
            Action::Forgotten(id) => {
                self.logs.remove(&id);
                self.telemetry.forget(&id);
            }
            Action::Closed(id) => {
                self.outputs.remove(&id);
                if let Some(log) = self.logs.get(&id) {
                    log.set_open(false);
                }
            }
        }
    }

    /// Over the session that it was meant for: to a worker with another one, what is still true is told again.
    fn send(&self, worker: &WorkerName, epoch: Epoch, command: Command) {
        if let Some((_, commands)) = self.sessions.get(worker).filter(|(session, _)| *session == epoch) {
            let _ = commands.send(CoordinatorMessage { body: Some(command) });
        }
    }

    fn start_ranks(&mut self, worker: &WorkerName, epoch: Epoch, start: Start) {
        let id = JobId(start.task.job.clone());
        let Some(entry) = self.fleet.job(&id) else { return };
        let (stage, attempt, ranks) = (start.task.stage(), entry.record.attempt, start.ranks.clone());
        match output::start_task(&entry.spec, entry.spec_json(), start) {
            Ok(command) => self.send(worker, epoch, Command::StartTask(command)),
            Err(cause) => {
                let kind = tunefleet_proto::rpc::FailureKind::Configuration.into();
                for rank in ranks {
                    let exit = Exit { start_error: cause.clone(), kind, ..Exit::default() };
                    self.fleet.happened(&id, attempt, Input::Exited { stage, rank, exit }, self.now());
                }
            }
        }
    }

    fn opened(&self, id: &JobId, attempt: Attempt) {
        let Some(entry) = self.fleet.job(id) else { return };
        if let Err(error) = output::begin_attempt(&entry.spec, attempt) {
            // The ranks cannot write their logs either, and say so.
            tracing::warn!("job {id}: {error}");
        }
        if let Some(log) = self.logs.get(id) {
            log.set_open(true);
        }
    }

    fn work(&self, job: JobId, attempt: Attempt, what: super::fleet::Work) {
        let Some(spec) = self.fleet.job(&job).map(|entry| Arc::clone(&entry.spec)) else { return };
        let messages = self.messages.clone();
        tokio::spawn(async move {
            let input = work::run(spec, what).await;
            if let Some(messages) = messages.upgrade() {
                let _ = messages.send(Message::Happened { job, attempt, input }).await;
            }
        });
    }

    /// Notes, counts and shows an event that is kept.
    fn show(&mut self, id: &JobId, event: JobEvent) {
        if let Some(entry) = self.fleet.job(id) {
            self.telemetry.saw(id, entry, &event);
        }
        match &event.body {
            Some(Body::RankEnded(ended)) => {
                tracing::info!("job {id}: rank {} on {}: {}", ended.rank, ended.worker, ended.how);
            }
            Some(Body::AttemptEnded(ended)) => {
                tracing::info!("job {id}: attempt {} ended: {}", event.attempt, ended.decision);
            }
            _ => {}
        }
        if let Some(output) = self.outputs.get_mut(id)
            && let Err(error) = output.log.append(&event)
        {
            tracing::warn!("job {id}: {}: {error}", super::METRICS_LOG_FILE);
        }
        if let Some(log) = self.logs.get(id) {
            log.push(event);
        }
    }
}
