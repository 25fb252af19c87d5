//! A worker daemon as the coordinator knows it: a journal of ranks, numbered messages that are said again until
//! they are acknowledged, and ranks that outlive it.

use std::collections::{BTreeMap, VecDeque};

use tunefleet_proto::rpc::coordinator_message::Body as Command;
use tunefleet_proto::rpc::{
    Collectives, HeldRank, PROTOCOL, RankEvent, RankExited, RankReport, Ready, Register, TaskId,
    WorkerMessage, rank_event, worker_message,
};

use super::network::Down;
use crate::control::fleet::Start;

/// (job, attempt, stage): ranks of one task, wherever they run.
pub type Group = (String, u32, i32);

pub fn group_of(task: &TaskId) -> Group {
    (task.job.clone(), task.attempt, task.stage)
}

/// A rank's process.
#[derive(Debug, Clone)]
pub struct Rank {
    pub task: TaskId,
    pub world: u32,
    pub resume: bool,
    /// It has been let go, with this secret.
    pub started: Option<Vec<u8>>,
    pub stop: bool,
    pub abort: bool,
    /// Its process is gone; the exit may be on the way.
    pub exited: bool,
    /// When it will have told that it is ready.
    pub ready_at: u64,
    pub is_ready: bool,
}

pub struct Daemon {
    pub name: String,
    pub slots: u32,
    pub journal: String,
    /// A daemon process runs.
    pub alive: bool,
    /// Nothing passes between it and the coordinator before then.
    pub cut_off_until: u64,
    /// When it dials again.
    pub dials_at: u64,
    pub epoch: u64,
    /// It has said that it ends.
    pub has_left: bool,
    sequence: u64,
    sent: u64,
    outbox: VecDeque<WorkerMessage>,
    pub ranks: BTreeMap<(Group, u32), Rank>,
}

impl Daemon {
    pub fn new(index: usize, slots: u32) -> Self {
        Daemon {
            name: format!("w{index}"),
            slots,
            journal: format!("j{index}"),
            alive: true,
            cut_off_until: 0,
            dials_at: 0,
            epoch: 0,
            has_left: false,
            sequence: 0,
            sent: 0,
            outbox: VecDeque::new(),
            ranks: BTreeMap::new(),
        }
    }

    pub fn register(&self) -> Register {
        let held = self.ranks.iter().map(|((_, rank), held)| HeldRank {
            task: Some(held.task.clone()),
            rank: *rank,
            exited: held.exited,
        });
        Register {
            name: self.name.clone(),
            slots: self.slots,
            journal: self.journal.clone(),
            protocol: PROTOCOL,
            ranks: held.collect(),
            ..Register::default()
        }
    }

    /// What has not been sent over the present session yet.
    pub fn unsent(&mut self) -> Vec<WorkerMessage> {
        let epoch = self.epoch;
        let from = self.sent;
        self.sent = self.sequence;
        let unsent = self.outbox.iter().filter(|message| message.sequence > from);
        unsent.map(|message| WorkerMessage { epoch, ..message.clone() }).collect()
    }

    pub fn has_outbox(&self) -> bool {
        !self.outbox.is_empty()
    }

    /// Keeps a message until it is acknowledged.
    fn keep(&mut self, body: worker_message::Body) {
        self.sequence += 1;
        self.outbox.push_back(WorkerMessage { body: Some(body), epoch: 0, sequence: self.sequence });
    }

    pub fn report(&mut self, task: &TaskId, rank: u32, body: rank_event::Body) {
        let event = Some(RankEvent { body: Some(body), ..RankEvent::default() });
        self.keep(worker_message::Body::Report(RankReport { task: Some(task.clone()), rank, event }));
    }

    /// A rank's process has ended.
    pub fn exit(&mut self, key: &(Group, u32), exit_code: Option<i32>, signal: Option<i32>) {
        let Some(rank) = self.ranks.get_mut(key).filter(|rank| !rank.exited) else { return };
        rank.exited = true;
        let (task, aborted) = (Some(rank.task.clone()), rank.abort);
        let exited = RankExited { task, rank: key.1, exit_code, signal, aborted, ..RankExited::default() };
        self.keep(worker_message::Body::Exited(exited));
    }

    /// The machine is gone with all that ran there; with `forgets`, so is the journal.
    pub fn die(&mut self, forgets: bool, incarnation: u64) {
        self.alive = false;
        let keys: Vec<_> = self.ranks.keys().cloned().collect();
        for key in keys {
            self.exit(&key, None, Some(9));
        }
        if forgets {
            self.ranks.clear();
            self.outbox.clear();
            self.sequence = 0;
            self.journal = format!("{}-{incarnation}", self.name);
        }
        self.sent = 0;
    }

    /// Ranks whose process lives.
    pub fn running(&self) -> impl Iterator<Item = (&(Group, u32), &Rank)> {
        self.ranks.iter().filter(|(_, rank)| !rank.exited)
    }

    /// Obeys; what is said once comes back.
    pub fn obey(&mut self, down: Down, now_ms: u64) -> Vec<WorkerMessage> {
        match down {
            Down::Registered { epoch, acknowledged } => {
                self.epoch = epoch;
                self.acknowledged(acknowledged);
                self.sent = acknowledged;
            }
            Down::Start(start) => self.start(start, now_ms),
            Down::Command(Command::Acknowledged(ack)) => self.acknowledged(ack.through),
            Down::Command(Command::StartRanks(start)) => {
                let Some(task) = &start.task else { return Vec::new() };
                for rank in self.of_task(task) {
                    rank.started.get_or_insert_with(|| start.secret.clone());
                }
            }
            Down::Command(Command::StopAtCheckpoint(stop)) => {
                let Some(task) = &stop.task else { return Vec::new() };
                self.of_task(task).for_each(|rank| rank.stop = true);
            }
            Down::Command(Command::Abort(abort)) => {
                let Some(task) = abort.task else { return Vec::new() };
                self.of_task(&task).for_each(|rank| rank.abort = true);
            }
            Down::Command(Command::ReportCollectives(ask)) => {
                let Some(task) = ask.task else { return Vec::new() };
                let group = group_of(&task);
                let here: Vec<u32> =
                    self.running().filter(|((of, _), _)| *of == group).map(|((_, rank), _)| *rank).collect();
                let answer = |rank| {
                    let body = Some(rank_event::Body::Collectives(Collectives::default()));
                    let event = Some(RankEvent { body, ..RankEvent::default() });
                    let report = RankReport { task: Some(task.clone()), rank, event };
                    let body = Some(worker_message::Body::Report(report));
                    WorkerMessage { body, epoch: self.epoch, sequence: 0 }
                };
                return here.into_iter().map(answer).collect();
            }
            Down::Command(_) => {}
        }
        Vec::new()
    }

    fn of_task(&mut self, task: &TaskId) -> impl Iterator<Item = &mut Rank> {
        let group = group_of(task);
        self.ranks
            .iter_mut()
            .filter(move |((of, _), rank)| *of == group && !rank.exited)
            .map(|(_, rank)| rank)
    }

    fn start(&mut self, start: Start, now_ms: u64) {
        let Start { task, ranks, world, resume, .. } = start;
        for rank in ranks {
            let key = (group_of(&task), rank);
            if self.ranks.contains_key(&key) {
                continue;
            }
            let taken = self.running().count() as u32;
            let started = Rank {
                task: task.clone(),
                world,
                resume,
                started: None,
                stop: false,
                abort: false,
                exited: false,
                ready_at: now_ms + 200,
                is_ready: false,
            };
            self.ranks.insert(key.clone(), started);
            if taken >= self.slots {
                let Some(held) = self.ranks.get_mut(&key) else { continue };
                held.exited = true;
                let start_error = "no free slot on this worker".to_owned();
                let task = Some(task.clone());
                self.keep(worker_message::Body::Exited(RankExited {
                    task,
                    rank,
                    start_error,
                    ..RankExited::default()
                }));
            }
        }
    }

    /// Ranks that are up by now tell so.
    pub fn become_ready(&mut self, now_ms: u64) {
        let ready: Vec<_> = self
            .running()
            .filter(|(_, rank)| !rank.is_ready && rank.ready_at <= now_ms)
            .map(|(key, rank)| (key.clone(), rank.task.clone()))
            .collect();
        for (key, task) in ready {
            if let Some(rank) = self.ranks.get_mut(&key) {
                rank.is_ready = true;
            }
            self.report(
                &task,
                key.1,
                rank_event::Body::Ready(Ready { address: format!("{}:{}", self.name, key.1) }),
            );
        }
    }

    fn acknowledged(&mut self, through: u64) {
        while let Some(message) = self.outbox.pop_front_if(|message| message.sequence <= through) {
            if let Some(worker_message::Body::Exited(exited)) = message.body
                && let Some(task) = exited.task
            {
                self.ranks.remove(&(group_of(&task), exited.rank));
            }
        }
    }
}
