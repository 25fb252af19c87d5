//! All jobs and workers of a control plane, as a pure state machine: facts and the time come in, rows to
//! keep and things to do come out. It does no IO, so that every order of events can be tried in a test.
//!
//! `jobs` is what people ask for and what becomes of attempts, `sessions` what workers say, `time` what
//! follows from nothing having happened.

mod jobs;
mod sessions;
mod time;

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use tunefleet_proto::ids::{Attempt, JobId};
use tunefleet_proto::job::DeviceKind;
use tunefleet_proto::rpc::coordinator_message::Body as Command;
use tunefleet_proto::rpc::{
    AuditRecord, Continuation, JobEvent, JobState, JobStatus, Register, Stage, TaskId, WorkerState,
    WorkerStatus,
};

use super::entry::Entry;
use super::figures::{Figures, JobFigures};
use super::goodput::Lost;
use super::job::Input;
use super::placement::{Room, WorkerName};
use super::queue;
use super::settings::{Now, Settings};
use super::store::{Loaded, Write};
use super::workers::{Epoch, Worker};

use crate::plan::GpuModel;

pub use jobs::Submission;

/// Something to do, once the rows that came with it are on disk; in order.
#[derive(Debug, Clone, PartialEq)]
pub enum Action {
    /// Tell a worker, over the session that it has.
    Send(WorkerName, Epoch, Command),
    /// Tell a worker to start ranks; the settings of the job come with it.
    Start(WorkerName, Epoch, Start),
    /// End this session: its worker has another, or breaks the rules.
    EndSession(WorkerName, Epoch),
    /// An attempt begins.
    Opened(JobId, Attempt),
    /// Work outside; answered by an input of this attempt.
    Work(JobId, Attempt, Work),
    /// Show an event to those who watch.
    Show(JobId, JobEvent),
    /// Nothing more happens by itself: let go of the job's output.
    Closed(JobId),
    /// A job ended long ago and is not kept any more.
    Forgotten(JobId),
}

/// Ranks to start on one worker.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Start {
    /// Of which task.
    pub task: TaskId,
    /// Which ranks.
    pub ranks: Vec<u32>,
    /// All ranks of the task.
    pub world: u32,
    /// Train from the newest checkpoint.
    pub resume: bool,
    /// One GPU for each.
    pub cuda: bool,
}

/// Work outside the state machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Work {
    /// See [`super::stage::prepare`].
    Inspect(Stage, Continuation),
    /// See [`crate::collect`].
    Collect,
    /// See [`super::stage::record`].
    Record(Stage),
}

/// What came of a round.
#[derive(Debug, Default)]
pub struct Out {
    /// To be on disk, all or none, before anything is done.
    pub writes: Vec<Write>,
    /// To do then.
    pub actions: Vec<Action>,
}

/// Why something that was asked for is not done.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// There is no such job or worker.
    #[error("{0}")]
    NotFound(String),
    /// Something else is in the way.
    #[error("{0}")]
    Exists(String),
    /// The job or worker is not in a state for that.
    #[error("{0}")]
    NotNow(String),
}

/// The state machine.
pub struct Fleet {
    settings: Settings,
    cluster: String,
    generation: u64,
    sessions: u64,
    jobs: BTreeMap<JobId, Entry>,
    workers: BTreeMap<WorkerName, Worker>,
    /// Random bytes for the ranks of a task to know each other by.
    secret: Box<dyn FnMut() -> Vec<u8> + Send>,
    /// Whether something has changed that may let a job that waits find slots.
    may_place: bool,
    /// When what has ended long ago is looked for again, in uptime.
    forgets_at: Duration,
    /// Jobs whose rows may have changed.
    touched: BTreeSet<JobId>,
    out: Out,
}

impl Fleet {
    /// What was kept, at the start of a control plane.
    ///
    /// # Errors
    /// When a job was kept by a version that this one cannot read; its name comes with it.
    pub fn restore(
        loaded: Loaded,
        settings: Settings,
        secret: Box<dyn FnMut() -> Vec<u8> + Send>,
        now: Now,
    ) -> Result<Self, (JobId, serde_json::Error)> {
        let mut attempts: BTreeMap<JobId, Vec<_>> = BTreeMap::new();
        for row in loaded.attempts {
            attempts.entry(row.job.clone()).or_default().push(row);
        }
        let mut jobs = BTreeMap::new();
        for row in loaded.jobs {
            let id = row.id.clone();
            let of_job = attempts.remove(&id).unwrap_or_default();
            jobs.insert(id.clone(), Entry::restore(row, of_job).map_err(|error| (id, error))?);
        }
        let workers = loaded.workers.iter().filter_map(|row| {
            let register: Register = prost::Message::decode(row.register.as_slice()).ok()?;
            Some((row.name.clone(), Worker::restore(row, register, now)))
        });
        let mut fleet = Fleet {
            settings,
            cluster: loaded.cluster,
            generation: loaded.generation,
            sessions: 0,
            jobs,
            workers: workers.collect(),
            secret,
            may_place: true,
            forgets_at: now.uptime,
            touched: BTreeSet::new(),
            out: Out::default(),
        };
        fleet.ask_again();
        Ok(fleet)
    }

    /// How patient it is.
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// Identity of the state, and how often it has been started.
    pub fn identity(&self) -> (&str, u64) {
        (&self.cluster, self.generation)
    }

    /// Jobs that hold their output directory.
    pub fn active(&self) -> impl Iterator<Item = (&JobId, &Entry)> {
        self.jobs.iter().filter(|(_, entry)| entry.is_active())
    }

    /// All jobs.
    pub fn jobs(&self) -> impl Iterator<Item = (&JobId, &Entry)> {
        self.jobs.iter()
    }

    /// A job.
    pub fn job(&self, id: &JobId) -> Option<&Entry> {
        self.jobs.get(id)
    }

    /// How a job stands.
    ///
    /// # Errors
    /// When there is none of that name.
    pub fn status(&self, id: &JobId) -> Result<JobStatus, Refused> {
        Ok(self.known(id)?.status(id))
    }

    /// All in numbers, of jobs that have not ended long ago and workers that were heard of since.
    pub fn figures(&self, now: Now) -> Figures {
        let oldest_unix_ms = now.unix_ms.saturating_sub(self.settings.show_ended.as_millis() as u64);
        let is_shown = |entry: &Entry| {
            let last = entry.attempts.last();
            entry.is_active() || last.is_some_and(|last| last.ended_unix_ms >= oldest_unix_ms)
        };
        let peak = |entry: &Entry| {
            let slots = &entry.record.slots;
            let of = |name: &WorkerName| {
                let device = self.workers.get(name)?.register.devices.first()?;
                Some(GpuModel::named(&device.name)?.peak_flops)
            };
            let all = slots.iter().map(of).sum::<Option<f64>>();
            all.filter(|_| entry.record.cuda && !slots.is_empty())
        };
        let shown = self.jobs.iter().filter(|(_, entry)| is_shown(entry));
        let mut states = [0; JobState::ALL.len()];
        for state in self.jobs.values().map(Entry::state) {
            if let Some(index) = JobState::ALL.iter().position(|known| *known == state) {
                states[index] += 1;
            }
        }
        let show_workers = self.settings.show_ended.as_millis() as u64;
        let mut workers = self.worker_statuses(now);
        workers.retain(|worker| worker.silent_ms <= show_workers);
        Figures {
            states,
            jobs: shown.map(|(id, entry)| JobFigures::new(id, entry, peak(entry))).collect(),
            workers,
        }
    }

    /// How a worker is.
    ///
    /// # Errors
    /// When there is none of that name.
    pub fn worker_status(&self, name: &WorkerName, now: Now) -> Result<WorkerStatus, Refused> {
        let worker = self.workers.get(name).ok_or_else(|| no_worker(name))?;
        Ok(self.status_of(name, worker, &self.used(), now))
    }

    /// How all workers are.
    pub fn worker_statuses(&self, now: Now) -> Vec<WorkerStatus> {
        let used = self.used();
        self.workers.iter().map(|(name, worker)| self.status_of(name, worker, &used, now)).collect()
    }

    fn status_of(
        &self,
        name: &WorkerName,
        worker: &Worker,
        used: &BTreeMap<&WorkerName, u32>,
        now: Now,
    ) -> WorkerStatus {
        let excluding = self.active().filter(|(_, entry)| entry.record.restarts.excludes(name));
        let excluding: Vec<String> = excluding.map(|(id, _)| id.to_string()).collect();
        let mut detail = match (worker.leaving, worker.draining) {
            (true, _) => "its daemon is ending".to_owned(),
            (_, true) => "drained by a person".to_owned(),
            _ => String::new(),
        };
        let mut state = worker.state(&self.settings, now);
        if !excluding.is_empty() && state == WorkerState::Ready {
            state = WorkerState::Excluded;
            detail = format!("left out of {}: too many of its attempts failed here", excluding.join(", "));
        }
        let tasks = self.jobs.iter().filter_map(|(id, entry)| {
            let task = entry.record.job.task().filter(|task| task.runs_on(name))?;
            Some(task_id(id, entry, task.stage()))
        });
        WorkerStatus {
            name: name.to_string(),
            state: state.into(),
            registered: Some(worker.register.clone()),
            used_slots: used.get(name).copied().unwrap_or(0),
            silent_ms: worker.silence(now).as_millis() as u64,
            tasks: tasks.collect(),
            detail,
        }
    }

    /// What has come together since the last time. Waiting jobs get slots first.
    pub fn take(&mut self, now: Now) -> Out {
        if std::mem::take(&mut self.may_place) {
            self.place_waiting(now);
        }
        for id in std::mem::take(&mut self.touched) {
            let Some(entry) = self.jobs.get_mut(&id) else { continue };
            if let Some(row) = entry.changed(&id) {
                self.out.writes.push(Write::Job(row));
            }
        }
        self.acknowledge();
        std::mem::take(&mut self.out)
    }

    /// Notes who asked for something, or what was refused.
    pub fn audit(&mut self, record: AuditRecord) {
        self.out.writes.push(Write::Audit(record));
    }

    // ------------------------------------------------------------------------------- placement

    /// Slots that are taken, by worker.
    fn used(&self) -> BTreeMap<&WorkerName, u32> {
        let mut used = BTreeMap::new();
        for name in self.jobs.values().flat_map(|entry| &entry.record.slots) {
            *used.entry(name).or_insert(0) += 1;
        }
        used
    }

    fn rooms(&self, now: Now) -> BTreeMap<WorkerName, Room> {
        let used = self.used();
        let room = |(name, worker): (&WorkerName, &Worker)| {
            let used = used.get(name).copied().unwrap_or(0);
            Some((name.clone(), worker.room(used, &self.settings, now)?))
        };
        self.workers.iter().filter_map(room).collect()
    }

    fn place_waiting(&mut self, now: Now) {
        let waits = |(id, entry): (&JobId, &Entry)| {
            let stage = entry.record.job.waiting().filter(|_| entry.is_active())?;
            Some((id.clone(), stage))
        };
        let waiting: Vec<(JobId, Stage)> = self.jobs.iter().filter_map(waits).collect();
        if waiting.is_empty() {
            return;
        }
        let rooms = self.rooms(now);
        let any_gpu = rooms.values().any(|room| room.has_gpu);
        let items = waiting.iter().filter_map(|(id, stage)| {
            let entry = self.jobs.get(id)?;
            let needs_gpu = match entry.spec.train.device {
                DeviceKind::Cpu => false,
                DeviceKind::Cuda => true,
                DeviceKind::Auto => any_gpu,
            };
            Some(queue::Waiting {
                job: id.clone(),
                priority: entry.spec.priority,
                submitted_unix_ms: entry.record.submitted_unix_ms,
                world: entry.record.job.world(*stage),
                needs_gpu,
                excluded: entry.record.restarts.excluded(),
            })
        });
        let items: Vec<queue::Waiting> = items.collect();
        let mut placed = queue::place_all(&items, &rooms);
        for (item, (id, stage)) in items.iter().zip(waiting) {
            let Some(ranks) = placed.remove(&id) else {
                self.wait(&id, item, &rooms, now);
                continue;
            };
            let secret = (self.secret)();
            if let Some(entry) = self.jobs.get_mut(&id) {
                entry.record.detail.clear();
                entry.record.account.lost(Lost::Queue, now);
                entry.waiting = None;
                entry.record.cuda = item.needs_gpu;
                entry.record.slots.clone_from(&ranks);
            }
            self.apply(&id, Input::Placed(stage, ranks, secret), now);
        }
    }
}

fn no_worker(name: &WorkerName) -> Refused {
    Refused::NotFound(format!("there is no worker {name}"))
}

fn task_id(id: &JobId, entry: &Entry, stage: Stage) -> TaskId {
    TaskId { job: id.0.clone(), attempt: entry.record.attempt.0, stage: stage.into() }
}
