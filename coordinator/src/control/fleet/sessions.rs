//! What workers say: registrations, reports, exits, signs of life.

use std::collections::{BTreeMap, BTreeSet};

use tunefleet_proto::ids::JobId;
use tunefleet_proto::rpc::coordinator_message::Body as Command;
use tunefleet_proto::rpc::job_event::Body;
use tunefleet_proto::rpc::{
    Abort, Acknowledged, AuditRecord, OLDEST_PROTOCOL, PROTOCOL, RankBeat, RankReport, Register, TaskId,
    WorkerMessage, WorkerState, rank_event, worker_message,
};

use super::{Action, Fleet, Refused, no_worker, task_id};
use crate::control::entry::{Intent, Seen};
use crate::control::job::Input;
use crate::control::placement::WorkerName;
use crate::control::settings::Now;
use crate::control::store::Write;
use crate::control::workers::{Epoch, Worker};

/// What is told to ranks of an attempt that is not the live one.
const OVER: &str = "this attempt is over";

/// A worker is in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Joined {
    pub epoch: Epoch,
    pub acknowledged: u64,
}

/// Why a worker is not let in.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NotJoined {
    /// Another daemon of that name is connected.
    #[error("a worker named {0} is connected: give this one another --name")]
    NameTaken(WorkerName),
    /// It is too old or too new.
    #[error(
        "worker {name} {version} speaks protocol {protocol}, and this coordinator {OLDEST_PROTOCOL} to {PROTOCOL}: \
         install the same version on both"
    )]
    Protocol { name: WorkerName, version: String, protocol: u32 },
    /// It has obeyed a later start of this coordinator's state.
    #[error(
        "worker {name} knows generation {theirs} of this cluster, and this coordinator is generation {ours}: its state is \
         an old copy; start it with the newest one"
    )]
    Generation { name: WorkerName, theirs: u64, ours: u64 },
}

impl Fleet {
    /// Lets a worker in, and tells it all that should be true of the ranks there.
    ///
    /// # Errors
    /// See [`NotJoined`].
    pub fn join(&mut self, register: Register, now: Now) -> Result<Joined, NotJoined> {
        let name = WorkerName::from(register.name.as_str());
        let protocol = register.protocol.max(1);
        if !(OLDEST_PROTOCOL..=PROTOCOL).contains(&protocol) {
            return Err(NotJoined::Protocol { name, version: register.version, protocol });
        }
        if register.cluster == self.cluster && register.generation > self.generation {
            return Err(NotJoined::Generation { name, theirs: register.generation, ours: self.generation });
        }
        let known = self.workers.get(&name);
        let same = known.is_some_and(|known| known.has_journal_of(&register));
        if let Some(session) = known.and_then(|known| known.session) {
            if !same {
                return Err(NotJoined::NameTaken(name));
            }
            self.out.actions.push(Action::EndSession(name, session));
        }
        let name = WorkerName::from(register.name.as_str());
        self.sessions += 1;
        let epoch = Epoch(self.generation << 32 | self.sessions);
        let worker = Worker::joined(register, self.workers.get(&name), epoch, now);
        let acknowledged = worker.acknowledged;
        let was_known = self.workers.insert(name.clone(), worker).is_some();
        self.keep_worker(&name);
        if was_known && !same {
            self.lose(&name, now);
        }
        self.tell_again(&name, now);
        self.show_worker(&name, WorkerState::Ready, now);
        self.may_place = true;
        Ok(Joined { epoch, acknowledged })
    }

    /// A session is over; the worker will be back, or not.
    pub fn left(&mut self, name: &WorkerName, epoch: Epoch) {
        if let Some(worker) = self.workers.get_mut(name)
            && worker.session == Some(epoch)
        {
            worker.session = None;
            self.may_place = true;
        }
    }

    /// Commands that a broken session may have lost; none of them harms when it comes twice.
    fn tell_again(&mut self, name: &WorkerName, now: Now) {
        let Some(worker) = self.workers.get(name) else { return };
        let mut held: BTreeMap<(String, u32, i32), BTreeSet<u32>> = BTreeMap::new();
        for task in &worker.register.running {
            held.entry((task.job.clone(), task.attempt, task.stage)).or_default();
        }
        let mut holds_all = worker.register.journal.is_empty();
        for rank in &worker.register.ranks {
            let Some(task) = &rank.task else { continue };
            let key = (task.job.clone(), task.attempt, task.stage);
            held.entry(key).or_default().insert(rank.rank);
            holds_all = false;
        }
        let mut effects = Vec::new();
        for (id, entry) in &self.jobs {
            let Some(task) = entry.record.job.task() else { continue };
            let TaskId { job, attempt, stage } = task_id(id, entry, task.stage());
            let mut ranks = held.remove(&(job, attempt, stage)).unwrap_or_default();
            if holds_all {
                // An old daemon names tasks, and holds what it was told to.
                ranks.extend(task.ranks_on(name));
            }
            if task.runs_on(name) {
                effects.extend(entry.record.job.again(name, &ranks).into_iter().map(|one| (id.clone(), one)));
            } else if !ranks.is_empty() {
                self.out.actions.extend(refusal(name, worker, task_id(id, entry, task.stage())));
            }
        }
        for (job, attempt, stage) in held.into_keys() {
            self.out.actions.extend(refusal(name, worker, TaskId { job, attempt, stage }));
        }
        for (id, effect) in effects {
            self.carry_out(&id, effect, now);
        }
    }

    /// A message of a worker's session.
    pub fn said(&mut self, name: &WorkerName, session: Epoch, message: WorkerMessage, now: Now) {
        let Some(worker) = self.workers.get_mut(name).filter(|worker| worker.session == Some(session)) else {
            return;
        };
        let old = worker.register.protocol <= 1;
        if message.epoch != session.0 && !(old && message.epoch == 0) {
            let refused = format!("epoch {} in session {}", message.epoch, session.0);
            return self.end_session(name, session, "message", refused, now);
        }
        if worker.given_up {
            // What became of its ranks was decided without it: it registers anew, and is told.
            self.left(name, session);
            self.out.actions.push(Action::EndSession(name.clone(), session));
            return;
        }
        if worker.state(&self.settings, now) != WorkerState::Ready {
            self.may_place = true;
        }
        worker.heard(now);
        match message.sequence {
            0 => {}
            sequence if sequence <= worker.acknowledged => {
                // Said again: it does not know yet that it was heard.
                worker.told = worker.told.min(sequence.saturating_sub(1));
                return;
            }
            sequence if sequence == worker.acknowledged + 1 => worker.acknowledged = sequence,
            sequence if !worker.has_spoken => {
                // It has forgotten what a former state had acknowledged: this one was restored from a copy.
                tracing::warn!("worker {name}: what it said up to message {sequence} is not in this state");
                worker.acknowledged = sequence;
            }
            sequence => {
                let refused = format!("message {sequence} after {}", worker.acknowledged);
                return self.end_session(name, session, "message", refused, now);
            }
        }
        worker.has_spoken |= message.sequence > 0;
        self.show_worker(name, WorkerState::Ready, now);
        match message.body {
            Some(worker_message::Body::Heartbeat(heartbeat)) => self.beat(name, heartbeat.ranks, now),
            Some(worker_message::Body::Report(report)) => self.reported(name, report, now),
            Some(worker_message::Body::Exited(exited)) => {
                let Some(task) = exited.task.clone() else { return };
                if self.is_live(&task, name) {
                    let (stage, rank) = (task.stage(), exited.rank);
                    self.apply(&JobId(task.job), Input::Exited { stage, rank, exit: exited.into() }, now);
                }
            }
            Some(worker_message::Body::Leaving(leaving)) => self.leaving(name, &leaving.reason, now),
            // Answers to what others have asked; not the fleet's business.
            Some(worker_message::Body::Log(_) | worker_message::Body::Examined(_)) => {}
            Some(worker_message::Body::Register(_)) | None => {}
        }
    }

    fn end_session(&mut self, name: &WorkerName, session: Epoch, action: &str, refused: String, now: Now) {
        tracing::warn!("worker {name}: {refused}: its session ends");
        self.audit(AuditRecord {
            unix_ms: now.unix_ms,
            actor: name.to_string(),
            peer: String::new(),
            action: action.to_owned(),
            target: name.to_string(),
            refused,
        });
        self.left(name, session);
        self.out.actions.push(Action::EndSession(name.clone(), session));
    }

    fn is_live(&self, task: &TaskId, worker: &WorkerName) -> bool {
        let entry = self.jobs.get(&JobId(task.job.clone()));
        entry.is_some_and(|entry| {
            entry.record.attempt.0 == task.attempt && entry.record.job.runs_on(task.stage(), worker)
        })
    }

    fn reported(&mut self, worker: &WorkerName, report: RankReport, now: Now) {
        let Some(task) = report.task.clone() else { return };
        if !self.is_live(&task, worker) {
            if let Some(known) = self.workers.get(worker) {
                self.out.actions.extend(refusal(worker, known, task));
            }
            return;
        }
        let (id, stage, rank) = (JobId(task.job.clone()), task.stage(), report.rank);
        let Some(body) = report.event.and_then(|event| event.body) else { return };
        let input = match body {
            rank_event::Body::Ready(ready) => Input::Ready { stage, rank, address: ready.address },
            rank_event::Body::Done(done) => match done.outcome {
                Some(outcome) => Input::Done { stage, rank, outcome: outcome.into() },
                None => return,
            },
            rank_event::Body::Stalled(at) => Input::Stalled { stage, rank, at },
            rank_event::Body::Collectives(at) => Input::Answered { stage, rank, at },
            rank_event::Body::Beat(beat) => {
                return self.beat(worker, vec![RankBeat { task: Some(task), rank, beat: Some(beat) }], now);
            }
            rank_event::Body::Section(section) => {
                if rank == 0 {
                    self.tell(&id, Body::Section(section.clone()), now);
                }
                Input::Entered { stage, rank, section }
            }
            rank_event::Body::Note(text) => return self.tell(&id, Body::Note(text), now),
            // Losses are those of all ranks: one of them is enough to tell.
            _ if rank != 0 => return,
            rank_event::Body::Step(step) => return self.tell(&id, Body::Step(step), now),
            rank_event::Body::Evaluated(evaluated) => return self.tell(&id, Body::Evaluated(evaluated), now),
            rank_event::Body::Saved(saved) => return self.tell(&id, Body::Saved(saved), now),
        };
        self.apply(&id, input, now);
    }

    fn beat(&mut self, worker: &WorkerName, beats: Vec<RankBeat>, now: Now) {
        for RankBeat { task, rank, beat } in beats {
            let (Some(task), Some(beat)) = (task, beat) else { continue };
            if !self.is_live(&task, worker) {
                continue;
            }
            let Some(entry) = self.jobs.get_mut(&JobId(task.job)) else { continue };
            entry.record.budget.learn(rank, &beat);
            let seen = Seen { step: beat.step, section: beat.section, seconds: beat.seconds, at: now.uptime };
            entry.seen.insert(rank, seen);
        }
    }

    /// The daemon ends: it lets its ranks save a checkpoint, and with them all ranks of their tasks.
    fn leaving(&mut self, name: &WorkerName, reason: &str, now: Now) {
        if let Some(worker) = self.workers.get_mut(name) {
            worker.leaving = true;
        }
        self.show_worker(name, WorkerState::Draining, now);
        self.preempt(name, reason, now);
    }

    /// Jobs with ranks on the worker stop with a checkpoint, and go on elsewhere.
    fn preempt(&mut self, name: &WorkerName, reason: &str, now: Now) {
        for id in self.jobs_on(name) {
            let Some(entry) = self.jobs.get(&id) else { continue };
            let grace = std::time::Duration::from_secs(entry.spec.restart.stop_grace_seconds);
            self.tell(&id, Body::Note(format!("worker {name} is being taken away: {reason}")), now);
            self.stop(&id, Intent::Preempt, grace, now);
        }
    }

    pub(super) fn jobs_on(&self, name: &WorkerName) -> Vec<JobId> {
        let runs = |(_, entry): &(&JobId, &crate::control::entry::Entry)| {
            entry.record.job.task().is_some_and(|task| task.runs_on(name))
        };
        self.jobs.iter().filter(runs).map(|(id, _)| id.clone()).collect()
    }

    /// Places nothing more on a worker; with `preempt`, what runs there goes elsewhere.
    ///
    /// # Errors
    /// When there is none of that name.
    pub fn drain(&mut self, name: &WorkerName, preempt: bool, now: Now) -> Result<(), Refused> {
        self.workers.get_mut(name).ok_or_else(|| no_worker(name))?.draining = true;
        self.keep_worker(name);
        if preempt {
            self.preempt(name, "it is being drained", now);
        }
        Ok(())
    }

    /// Lets a worker have ranks again, also those of jobs that it was left out of.
    ///
    /// # Errors
    /// When there is none of that name.
    pub fn undrain(&mut self, name: &WorkerName) -> Result<(), Refused> {
        self.workers.get_mut(name).ok_or_else(|| no_worker(name))?.draining = false;
        self.keep_worker(name);
        for (id, entry) in &mut self.jobs {
            entry.record.restarts.forgive(name);
            self.touched.insert(id.clone());
        }
        self.may_place = true;
        Ok(())
    }

    /// Tells the jobs that run there how the worker is, when that has changed.
    pub(super) fn show_worker(&mut self, name: &WorkerName, state: WorkerState, now: Now) {
        let Some(worker) = self.workers.get_mut(name).filter(|worker| worker.shown != state) else { return };
        worker.shown = state;
        let silent = worker.silence(now).as_secs();
        let detail = match state {
            WorkerState::Suspect => format!("not heard of for {silent} s; its ranks go on"),
            WorkerState::Lost => format!(
                "lost: not heard of for {silent} s; its ranks may go on, and are given up after {} s",
                self.settings.give_up_after.as_secs()
            ),
            WorkerState::Draining => "leaves after a checkpoint".to_owned(),
            _ => "is heard of again".to_owned(),
        };
        tracing::info!("worker {name}: {detail}");
        for id in self.jobs_on(name) {
            let seen = tunefleet_proto::rpc::WorkerSeen {
                worker: name.to_string(),
                state: state.into(),
                detail: detail.clone(),
            };
            self.tell(&id, Body::Worker(seen), now);
        }
    }

    /// Ranks on the worker count as gone.
    pub(super) fn lose(&mut self, name: &WorkerName, now: Now) {
        for id in self.jobs_on(name) {
            self.apply(&id, Input::WorkerLost(name.clone()), now);
        }
    }

    pub(super) fn send(&mut self, name: &WorkerName, command: Command) {
        if let Some(session) = self.workers.get(name).and_then(|worker| worker.session) {
            self.out.actions.push(Action::Send(name.clone(), session, command));
        }
    }

    pub(super) fn keep_worker(&mut self, name: &WorkerName) {
        if let Some(worker) = self.workers.get(name) {
            self.out.writes.push(Write::Worker(worker.row(name)));
        }
    }

    /// Keeps how far each worker was heard, and tells it.
    pub(super) fn acknowledge(&mut self) {
        for (name, worker) in &mut self.workers {
            if worker.told == worker.acknowledged {
                continue;
            }
            worker.told = worker.acknowledged;
            self.out.writes.push(Write::Worker(worker.row(name)));
            if let Some(session) = worker.session {
                let through = Acknowledged { through: worker.acknowledged };
                self.out.actions.push(Action::Send(name.clone(), session, Command::Acknowledged(through)));
            }
        }
    }
}

/// Tells a worker to end ranks that should not be.
fn refusal(name: &WorkerName, worker: &Worker, task: TaskId) -> Option<Action> {
    let abort = Abort { task: Some(task), reason: OVER.to_owned(), by_peer: false };
    Some(Action::Send(name.clone(), worker.session?, Command::Abort(abort)))
}
