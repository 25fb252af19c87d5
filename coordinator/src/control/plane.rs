//! The one task that owns all jobs and workers: it takes messages in order, asks the state
//! machine of the job, and carries out what follows. A state changes before a command goes out.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::{mpsc, oneshot};
use tonic::Status;
use tunefleet_proto::ids::{Attempt, JobId};
use tunefleet_proto::job::{DatasetSpec, DeviceKind, JobSpec};
use tunefleet_proto::rpc::job_event::Body;
use tunefleet_proto::rpc::{
    Abort, Continuation, CoordinatorMessage, JobStatus, RankReport, Register, ReportCollectives, Stage,
    StartRanks, StopAtCheckpoint, TaskId, Waiting, WorkerMessage, coordinator_message, rank_event,
    worker_message,
};

use super::entry::Entry;
use super::events::EventLog;
use super::job::{Effect, Input};
use super::placement::{Room, WorkerName, place};
use super::stage;
use super::workers::{Epoch, Joined, Workers};
use crate::metrics;

/// Messages under way to the plane before senders have to wait.
const WINDOW: usize = 1024;
/// How often silent workers are looked for.
const TICK: Duration = Duration::from_secs(1);
/// How long ranks may take to tell where they are among their collectives.
const ANSWER_LIMIT: Duration = Duration::from_secs(2);
/// A tick that is so late was held up: the process was stopped, or its disk.
const STOOD_STILL: Duration = Duration::from_secs(3);

/// What the plane is asked or told.
pub(super) enum Message {
    Submit {
        spec: Box<JobSpec>,
        continuation: Continuation,
        reply: oneshot::Sender<Result<Attempt, Status>>,
    },
    Resume {
        job: String,
        reply: oneshot::Sender<Result<JobStatus, Status>>,
    },
    Cancel {
        job: String,
        grace: Duration,
        reply: oneshot::Sender<Result<JobStatus, Status>>,
    },
    Status {
        job: String,
        reply: oneshot::Sender<Result<JobStatus, Status>>,
    },
    List {
        reply: oneshot::Sender<Vec<JobStatus>>,
    },
    Events {
        job: String,
        reply: oneshot::Sender<Result<Arc<EventLog>, Status>>,
    },
    Join {
        register: Register,
        commands: mpsc::UnboundedSender<CoordinatorMessage>,
        reply: oneshot::Sender<Result<Epoch, Status>>,
    },
    Said {
        worker: WorkerName,
        epoch: Epoch,
        message: WorkerMessage,
    },
    /// An answer of work done outside, or a timer.
    Happened {
        job: JobId,
        attempt: Attempt,
        input: Input,
    },
}

/// A handle to the plane's task.
#[derive(Clone)]
pub struct Plane {
    messages: mpsc::Sender<Message>,
}

impl Plane {
    /// Starts the task.
    pub fn start() -> Self {
        let (messages, inbox) = mpsc::channel(WINDOW);
        let state =
            State { jobs: BTreeMap::new(), workers: Workers::default(), messages: messages.downgrade() };
        tokio::spawn(state.run(inbox));
        Plane { messages }
    }

    /// Sends a message.
    pub(super) async fn tell(&self, message: Message) -> Result<(), Status> {
        self.messages.send(message).await.map_err(|_| Status::unavailable("the coordinator is stopping"))
    }

    /// Sends a message and waits for the answer.
    pub(super) async fn ask<T>(
        &self,
        message: impl FnOnce(oneshot::Sender<T>) -> Message,
    ) -> Result<T, Status> {
        let (reply, answer) = oneshot::channel();
        self.tell(message(reply)).await?;
        answer.await.map_err(|_| Status::unavailable("the coordinator is stopping"))
    }
}

struct State {
    jobs: BTreeMap<JobId, Entry>,
    workers: Workers,
    /// For answers of work done outside; weak, so that the task ends with its last handle.
    messages: mpsc::WeakSender<Message>,
}

impl State {
    async fn run(mut self, mut inbox: mpsc::Receiver<Message>) {
        let mut tick = tokio::time::interval(TICK);
        let mut looked = Instant::now();
        loop {
            tokio::select! {
                message = inbox.recv() => match message {
                    Some(message) => self.handle(message),
                    None => return,
                },
                _ = tick.tick() => {
                    // What workers said while this process stood still has not been read yet.
                    if looked.elapsed() > STOOD_STILL {
                        self.workers.excuse(Instant::now());
                    }
                    looked = Instant::now();
                    self.lose_silent_workers();
                }
            }
            self.place_waiting();
            metrics::workers(self.workers.len());
            metrics::jobs(self.jobs.values().map(|entry| entry.job.state()));
        }
    }

    fn handle(&mut self, message: Message) {
        // An asker that is gone needs no answer.
        match message {
            Message::Submit { spec, continuation, reply } => {
                let _ = reply.send(self.submit(*spec, continuation));
            }
            Message::Resume { job, reply } => {
                let _ = reply.send(self.resume(&JobId(job)));
            }
            Message::Cancel { job, grace, reply } => {
                let _ = reply.send(self.cancel(&JobId(job), grace));
            }
            Message::Status { job, reply } => {
                let id = JobId(job);
                let _ = reply.send(self.entry(&id).map(|entry| entry.status(&id)));
            }
            Message::List { reply } => {
                let _ = reply.send(self.jobs.iter().map(|(id, entry)| entry.status(id)).collect());
            }
            Message::Events { job, reply } => {
                let _ = reply.send(self.entry(&JobId(job)).map(|entry| Arc::clone(&entry.events)));
            }
            Message::Join { register, commands, reply } => {
                let _ = reply.send(self.join(register, commands));
            }
            Message::Said { worker, epoch, message } => {
                if self.workers.heard(&worker, epoch, Instant::now()) {
                    self.said(&worker, message);
                }
            }
            Message::Happened { job, attempt, input } => {
                if self.jobs.get(&job).is_some_and(|entry| entry.attempt == attempt) {
                    self.apply(&job, input);
                }
            }
        }
    }

    fn entry(&mut self, id: &JobId) -> Result<&mut Entry, Status> {
        self.jobs.get_mut(id).ok_or_else(|| Status::not_found(format!("there is no job {id}")))
    }

    // ------------------------------------------------------------------------------------ jobs

    fn submit(&mut self, spec: JobSpec, continuation: Continuation) -> Result<Attempt, Status> {
        let id = JobId(spec.name.clone());
        let known = self.jobs.get(&id);
        if let Some(known) = known.filter(|known| known.job.end().is_none()) {
            let state = known.job.state().name();
            let message = format!("job {id} is {state}: cancel it first, or submit under another name");
            return Err(Status::already_exists(message));
        }
        let entry = Entry::begin(spec, continuation, known)?;
        let attempt = entry.attempt;
        metrics::attempt(&id.0, entry.spec.train.steps);
        self.jobs.insert(id.clone(), entry);
        self.apply(&id, Input::Begin);
        Ok(attempt)
    }

    fn resume(&mut self, id: &JobId) -> Result<JobStatus, Status> {
        let spec = (*self.entry(id)?.spec).clone();
        self.submit(spec, Continuation::Resume)?;
        Ok(self.entry(id)?.status(id))
    }

    fn cancel(&mut self, id: &JobId, grace: Duration) -> Result<JobStatus, Status> {
        self.entry(id)?;
        let checkpoint = !grace.is_zero();
        self.apply(id, Input::Stop { checkpoint });
        if checkpoint {
            self.after(grace, id, Input::GraceOver);
        }
        Ok(self.entry(id)?.status(id))
    }

    fn apply(&mut self, id: &JobId, input: Input) {
        let Some(entry) = self.jobs.get_mut(id) else { return };
        match entry.job.apply(input) {
            Ok(effects) => effects.into_iter().for_each(|effect| self.carry_out(id, effect)),
            Err(stale) => tracing::debug!("job {id}: {stale}"),
        }
    }

    fn carry_out(&mut self, id: &JobId, effect: Effect) {
        let Some(entry) = self.jobs.get_mut(id) else { return };
        let task =
            |stage: Stage| Some(TaskId { job: id.0.clone(), attempt: entry.attempt.0, stage: stage.into() });
        match effect {
            Effect::Tell(body) => entry.tell(id, body),
            Effect::Inspect(stage) => {
                let (spec, continuation) = (Arc::clone(&entry.spec), entry.continuation);
                let work = move || {
                    let verdict = stage::prepare(&spec, continuation, stage);
                    Input::Inspected(stage, verdict.map_err(|error| error.to_string()))
                };
                self.outside(id, work, move |bug| Input::Inspected(stage, Err(bug)));
            }
            Effect::Collect => {
                let spec = Arc::clone(&entry.spec);
                self.outside(id, move || Input::Collected(collect(&spec)), |bug| Input::Collected(Err(bug)));
            }
            Effect::Record(stage) => {
                let spec = Arc::clone(&entry.spec);
                let work = move || {
                    Input::Recorded(stage, stage::record(&spec, stage).map_err(|error| error.to_string()))
                };
                self.outside(id, work, move |bug| Input::Recorded(stage, Err(bug)));
            }
            // After each message, as long as it waits.
            Effect::Place(_) => {}
            Effect::StartTask { stage, ranks, resume } => match entry.start_task(task(stage), &ranks, resume)
            {
                Ok(commands) => {
                    for (worker, command) in commands {
                        self.workers.send(&worker, coordinator_message::Body::StartTask(command));
                    }
                }
                Err(cause) => {
                    for (rank, _) in ranks.iter().enumerate() {
                        let exit = super::rank::Exit { start_error: cause.clone(), ..Default::default() };
                        self.apply(id, Input::Exited { stage, rank: rank as u32, exit });
                    }
                }
            },
            Effect::StartRanks { stage, workers, peers } => {
                let secret = rand::random::<[u8; 32]>().to_vec();
                let start = StartRanks { task: task(stage), peers, secret };
                for worker in workers {
                    self.workers.send(&worker, coordinator_message::Body::StartRanks(start.clone()));
                }
            }
            Effect::StopAtCheckpoint { stage, workers } => {
                let stop = StopAtCheckpoint { task: task(stage) };
                for worker in workers {
                    self.workers.send(&worker, coordinator_message::Body::StopAtCheckpoint(stop.clone()));
                }
            }
            Effect::ReportCollectives { stage, workers } => {
                let ask = ReportCollectives { task: task(stage) };
                for worker in workers {
                    self.workers.send(&worker, coordinator_message::Body::ReportCollectives(ask.clone()));
                }
                self.after(ANSWER_LIMIT, id, Input::AnswersOver(stage));
            }
            Effect::Abort { stage, workers, reason, by_peer } => {
                let abort = Abort { task: task(stage), reason, by_peer };
                for worker in workers {
                    self.workers.send(&worker, coordinator_message::Body::Abort(abort.clone()));
                }
            }
            Effect::Release => {
                let slots = std::mem::take(&mut entry.slots);
                self.workers.release(&slots);
            }
        }
    }

    /// Hands this attempt an input once `delay` has passed.
    fn after(&self, delay: Duration, id: &JobId, input: Input) {
        let Some(attempt) = self.jobs.get(id).map(|entry| entry.attempt) else { return };
        let happened = Message::Happened { job: id.clone(), attempt, input };
        let messages = self.messages.clone();
        tokio::spawn(async move {
            tokio::time::sleep(delay).await;
            answer(messages, happened).await;
        });
    }

    /// Runs blocking work; its answer comes back as an input of this attempt, also after a panic.
    fn outside(
        &self,
        id: &JobId,
        work: impl FnOnce() -> Input + Send + 'static,
        panicked: impl FnOnce(String) -> Input + Send + 'static,
    ) {
        let Some(attempt) = self.jobs.get(id).map(|entry| entry.attempt) else { return };
        let (messages, job) = (self.messages.clone(), id.clone());
        tokio::spawn(async move {
            let input = tokio::task::spawn_blocking(work).await.unwrap_or_else(|error| {
                panicked(format!("{error}; this is a bug of the coordinator, please report it with its log"))
            });
            answer(messages, Message::Happened { job, attempt, input }).await;
        });
    }

    /// Gives slots to jobs that wait, the oldest first.
    fn place_waiting(&mut self) {
        let mut waiting: Vec<(Instant, JobId, Stage)> = Vec::new();
        for (id, entry) in &self.jobs {
            if let Some(stage) = entry.job.waiting() {
                waiting.push((entry.submitted, id.clone(), stage));
            }
        }
        waiting.sort();
        for (_, id, stage) in waiting {
            let Some(entry) = self.jobs.get_mut(&id) else { continue };
            let rooms = self.workers.rooms();
            let world = entry.job.world(stage);
            let cuda = match entry.spec.train.device {
                DeviceKind::Cpu => false,
                DeviceKind::Cuda => true,
                DeviceKind::Auto => rooms.values().any(|room| room.has_gpu),
            };
            let Some(ranks) = place(&rooms, world, cuda) else {
                entry.wait(&id, waiting_for(world, cuda, &rooms));
                continue;
            };
            entry.detail.clear();
            entry.waiting = None;
            entry.cuda = cuda;
            entry.slots.clone_from(&ranks);
            self.workers.take(&ranks);
            self.apply(&id, Input::Placed(stage, ranks));
        }
    }

    // --------------------------------------------------------------------------------- workers

    fn join(
        &mut self,
        register: Register,
        commands: mpsc::UnboundedSender<CoordinatorMessage>,
    ) -> Result<Epoch, Status> {
        let name = WorkerName::from(register.name.as_str());
        let running = register.running.clone();
        tracing::info!(
            "worker {name} {}: {} slots, {} GPUs, {}",
            register.version,
            register.slots,
            register.gpus,
            register.metrics_url
        );
        let epoch = match self.workers.join(register, commands, Instant::now()) {
            Joined::Welcome(epoch) => epoch,
            Joined::Restarted(epoch) => {
                self.lose(&name);
                epoch
            }
            Joined::NameTaken => {
                let message = format!("a worker named {name} is connected: give this one another --name");
                return Err(Status::already_exists(message));
            }
        };
        for task in running {
            if !self.is_live(&task, &name) {
                self.refuse(&name, task, "this attempt is over");
            }
        }
        Ok(epoch)
    }

    fn is_live(&self, task: &TaskId, worker: &WorkerName) -> bool {
        let entry = self.jobs.get(&JobId(task.job.clone()));
        entry.is_some_and(|e| e.attempt.0 == task.attempt && e.job.runs_on(task.stage(), worker))
    }

    /// Tells a worker to end ranks that should not be.
    fn refuse(&self, worker: &WorkerName, task: TaskId, reason: &str) {
        let abort = Abort { task: Some(task), reason: reason.to_owned(), by_peer: false };
        self.workers.send(worker, coordinator_message::Body::Abort(abort));
    }

    fn said(&mut self, worker: &WorkerName, message: WorkerMessage) {
        let (task, rank) = match &message.body {
            Some(worker_message::Body::Report(report)) => (report.task.clone(), report.rank),
            Some(worker_message::Body::Exited(exited)) => (exited.task.clone(), exited.rank),
            _ => return,
        };
        let Some(task) = task else { return };
        if !self.is_live(&task, worker) {
            tracing::debug!("worker {worker}: stale message of {} a{}", task.job, task.attempt);
            if let Some(worker_message::Body::Report(_)) = message.body {
                self.refuse(worker, task, "this attempt is over");
            }
            return;
        }
        let (id, stage) = (JobId(task.job.clone()), task.stage());
        match message.body {
            Some(worker_message::Body::Report(report)) => self.reported(&id, stage, report),
            Some(worker_message::Body::Exited(exited)) => {
                self.apply(&id, Input::Exited { stage, rank, exit: exited.into() });
            }
            _ => {}
        }
    }

    fn reported(&mut self, id: &JobId, stage: Stage, report: RankReport) {
        let rank = report.rank;
        let body = match report.event.and_then(|event| event.body) {
            Some(rank_event::Body::Ready(ready)) => {
                return self.apply(id, Input::Ready { stage, rank, address: ready.address });
            }
            Some(rank_event::Body::Done(done)) => {
                let Some(outcome) = done.outcome else { return };
                return self.apply(id, Input::Done { stage, rank, outcome: outcome.into() });
            }
            Some(rank_event::Body::Stalled(at)) => {
                return self.apply(id, Input::Stalled { stage, rank, at });
            }
            Some(rank_event::Body::Collectives(at)) => {
                return self.apply(id, Input::Answered { stage, rank, at });
            }
            Some(rank_event::Body::Section(section)) => {
                self.apply(id, Input::Entered { stage, rank, section: section.clone() });
                if rank != 0 {
                    return;
                }
                Body::Section(section)
            }
            Some(rank_event::Body::Note(text)) => Body::Note(text),
            // Losses are those of all ranks: one of them is enough to tell.
            Some(rank_event::Body::Beat(_)) => return,
            _ if rank != 0 => return,
            Some(rank_event::Body::Step(step)) => Body::Step(step),
            Some(rank_event::Body::Evaluated(evaluated)) => Body::Evaluated(evaluated),
            Some(rank_event::Body::Saved(saved)) => Body::Saved(saved),
            None => return,
        };
        if let Some(entry) = self.jobs.get_mut(id) {
            entry.tell(id, body);
        }
    }

    fn lose_silent_workers(&mut self) {
        for name in self.workers.forget_lost(Instant::now()) {
            tracing::warn!("worker {name} is lost: not heard of for too long");
            self.lose(&name);
        }
    }

    fn lose(&mut self, worker: &WorkerName) {
        let ids: Vec<JobId> = self.jobs.keys().cloned().collect();
        for id in ids {
            if self.jobs.get(&id).is_some_and(|entry| entry.job.end().is_none()) {
                self.apply(&id, Input::WorkerLost(worker.clone()));
            }
        }
    }
}

fn waiting_for(needed: u32, needs_gpu: bool, rooms: &BTreeMap<WorkerName, Room>) -> Waiting {
    let usable: Vec<&Room> = rooms.values().filter(|room| room.has_gpu || !needs_gpu).collect();
    Waiting {
        needed,
        free: usable.iter().map(|room| room.free).sum(),
        total: usable.iter().map(|room| room.total).sum(),
        workers: rooms.len() as u32,
        needs_gpu,
    }
}

async fn answer(messages: mpsc::WeakSender<Message>, message: Message) {
    if let Some(messages) = messages.upgrade() {
        let _ = messages.send(message).await;
    }
}

fn collect(spec: &JobSpec) -> Result<(), String> {
    match &spec.dataset {
        DatasetSpec::Collect(collect) => {
            let progress = crate::progress::on_stderr();
            let (cache, out) = (spec.output.join("repos"), spec.dataset_dir());
            let done = crate::collect::collect(collect, &cache, &out, progress.as_ref());
            done.map(|_| ()).map_err(|error| error.to_string())
        }
        DatasetSpec::Existing(_) => Ok(()),
    }
}
