//! The ranks of this worker: which there are, what is told to them, what they tell.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use nix::sys::signal::Signal;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::task::JoinHandle;
use tonic::Streaming;
use tunefleet_proto::rpc::{
    Abort, Assignment, DaemonMessage, RankEvent, RankExited, RankReport, StartTask, TaskId, WorkerMessage,
    coordinator_message, daemon_message, rank_event, worker_message,
};

use super::node::Node;
use super::{Error, io, process};
use crate::metrics;

/// From the abort message to SIGTERM.
const TERMINATE_AFTER: Duration = Duration::from_secs(2);
/// From SIGTERM to SIGKILL.
const KILL_AFTER: Duration = Duration::from_secs(2);
/// How long the last events of a rank that is gone may take to arrive.
const DRAIN_LIMIT: Duration = Duration::from_secs(1);

/// Which rank of which task.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Key {
    job: String,
    attempt: u32,
    stage: i32,
    rank: u32,
}

/// One rank process.
struct Rank {
    slot: u32,
    token_sha256: String,
    /// Commands; taken down when the rank has told its outcome.
    commands: Option<UnboundedSender<DaemonMessage>>,
    /// The other end, until the rank connects.
    waiting: Option<UnboundedReceiver<DaemonMessage>>,
    /// Reads the rank's events.
    reader: Option<JoinHandle<()>>,
    pid: Option<u32>,
    aborted: bool,
    section: String,
}

/// All ranks of this worker.
pub(super) struct Ranks {
    node: Node,
    socket: PathBuf,
    outbox: UnboundedSender<WorkerMessage>,
    live: Mutex<BTreeMap<Key, Rank>>,
    /// Signalled whenever a rank is gone.
    gone: tokio::sync::Notify,
}

impl Ranks {
    /// No ranks yet; what they tell goes to `outbox`.
    pub fn new(node: &Node, socket: PathBuf, outbox: UnboundedSender<WorkerMessage>) -> Result<Self, Error> {
        let socket = std::path::absolute(&socket).map_err(io("rank socket"))?;
        let live = Mutex::default();
        Ok(Ranks { node: node.clone(), socket, outbox, live, gone: tokio::sync::Notify::new() })
    }

    /// Tasks with live ranks here.
    pub fn tasks(&self) -> Vec<TaskId> {
        let tasks: BTreeSet<_> =
            self.live().keys().map(|key| (key.job.clone(), key.attempt, key.stage)).collect();
        tasks.into_iter().map(|(job, attempt, stage)| TaskId { job, attempt, stage }).collect()
    }

    /// Carries out a command of the coordinator.
    pub fn obey(self: &Arc<Self>, command: coordinator_message::Body) {
        match command {
            coordinator_message::Body::StartTask(start) => self.start_task(start),
            coordinator_message::Body::StartRanks(start) => {
                let task = start.task.clone();
                self.tell(task.as_ref(), &daemon_message::Body::Start(start));
            }
            coordinator_message::Body::StopAtCheckpoint(stop) => {
                let task = stop.task.clone();
                self.tell(task.as_ref(), &daemon_message::Body::StopAtCheckpoint(stop));
            }
            coordinator_message::Body::ReportCollectives(ask) => {
                let task = ask.task.clone();
                self.tell(task.as_ref(), &daemon_message::Body::ReportCollectives(ask));
            }
            coordinator_message::Body::Abort(abort) => self.abort(abort),
            coordinator_message::Body::Registered(_)
            | coordinator_message::Body::Acknowledged(_)
            | coordinator_message::Body::ReadLog(_)
            | coordinator_message::Body::Probe(_) => {}
        }
    }

    fn start_task(self: &Arc<Self>, start: StartTask) {
        let Some(task) = start.task.clone() else { return };
        for rank in start.ranks.iter().copied() {
            let key = Key { job: task.job.clone(), attempt: task.attempt, stage: task.stage, rank };
            let mut live = self.live();
            if live.contains_key(&key) {
                tracing::warn!("rank {rank} of {} a{} runs already: ignored", task.job, task.attempt);
                continue;
            }
            let taken: BTreeSet<u32> = live.values().map(|rank| rank.slot).collect();
            let Some(slot) = (0..self.node.slots).find(|slot| !taken.contains(slot)) else {
                drop(live);
                self.not_started(&task, rank, "no free slot on this worker".to_owned());
                continue;
            };
            let cuda = start.cuda && self.node.gpus > 0;
            let assignment = Assignment {
                task: Some(task.clone()),
                rank,
                world: start.world,
                spec_json: start.spec_json.clone(),
                shard_plan_json: start.shard_plan_json.clone(),
                resume: start.resume,
                cuda_device: cuda.then(|| slot % self.node.gpus),
                threads: match start.threads {
                    0 => (self.node.cores / (start.ranks.len() as u32).max(1)).max(1),
                    threads => threads,
                },
                listen_address: self.node.address.to_string(),
            };
            let token = new_token();
            let (commands, waiting) = unbounded_channel();
            let _ = commands.send(message(daemon_message::Body::Assignment(assignment.clone())));
            let entry = Rank {
                slot,
                token_sha256: tunefleet_proto::digest_hex(token.as_bytes()),
                commands: Some(commands),
                waiting: Some(waiting),
                reader: None,
                pid: None,
                aborted: false,
                section: String::new(),
            };
            live.insert(key.clone(), entry);
            metrics::ranks(live.len());
            drop(live);
            let log_path = process::log_path(&start.log_dir, task.stage(), rank);
            tokio::spawn(Arc::clone(self).host(key, assignment, token, log_path));
        }
    }

    /// One rank process from start to end.
    async fn host(self: Arc<Self>, key: Key, assignment: Assignment, token: String, log_path: PathBuf) {
        let mut exited = match process::start(&assignment, &self.socket, &token, &log_path).await {
            Err(start_error) => {
                RankExited { start_error, log_path: log_path.display().to_string(), ..RankExited::default() }
            }
            Ok(mut child) => {
                let aborted = match self.live().get_mut(&key) {
                    Some(rank) => {
                        rank.pid = child.id();
                        rank.aborted
                    }
                    None => true,
                };
                if aborted {
                    let _ = child.start_kill();
                }
                match child.wait().await {
                    Ok(status) => {
                        // Before anything else: an abort that comes now did not end it.
                        let aborted = self.live().get(&key).is_some_and(|rank| rank.aborted);
                        self.drain(&key).await;
                        RankExited { aborted, ..process::exited(status, &log_path) }
                    }
                    Err(error) => RankExited {
                        start_error: format!("waiting for the process: {error}"),
                        ..RankExited::default()
                    },
                }
            }
        };
        let rank = {
            let mut live = self.live();
            let rank = live.remove(&key);
            metrics::ranks(live.len());
            rank
        };
        // Whatever the rank started goes with it.
        if let Some(pid) = rank.as_ref().and_then(|rank| rank.pid) {
            process::signal_group(pid, Signal::SIGKILL);
        }
        metrics::rank_exited(exited.exit_code == Some(0));
        if let Some(rank) = rank {
            metrics::section(&key.job, key.rank, &rank.section, "");
        }
        exited.task = assignment.task;
        exited.rank = key.rank;
        self.say(worker_message::Body::Exited(exited));
        self.gone.notify_waiters();
    }

    /// Waits for what the rank said before it ended.
    async fn drain(&self, key: &Key) {
        let reader = self.live().get_mut(key).and_then(|rank| rank.reader.take());
        if let Some(reader) = reader {
            let _ = tokio::time::timeout(DRAIN_LIMIT, reader).await;
        }
    }

    /// Lets a rank in that shows its token, once; the stream of commands to it.
    pub fn admit(
        self: &Arc<Self>,
        token: &str,
        events: Streaming<RankEvent>,
    ) -> Option<UnboundedReceiver<DaemonMessage>> {
        let sha256 = tunefleet_proto::digest_hex(token.as_bytes());
        let mut live = self.live();
        let (key, rank) = live.iter_mut().find(|(_, rank)| rank.token_sha256 == sha256)?;
        let waiting = rank.waiting.take()?;
        rank.reader = Some(tokio::spawn(Arc::clone(self).read(key.clone(), events)));
        Some(waiting)
    }

    async fn read(self: Arc<Self>, key: Key, mut events: Streaming<RankEvent>) {
        while let Ok(Some(event)) = events.message().await {
            match &event.body {
                Some(rank_event::Body::Step(report)) => metrics::step(&key.job, key.rank, report),
                Some(rank_event::Body::Section(name)) => {
                    if let Some(rank) = self.live().get_mut(&key) {
                        metrics::section(&key.job, key.rank, &rank.section, name);
                        rank.section.clone_from(name);
                    }
                }
                _ => {}
            }
            let task = TaskId { job: key.job.clone(), attempt: key.attempt, stage: key.stage };
            let report = RankReport { task: Some(task), rank: key.rank, event: Some(event) };
            self.say(worker_message::Body::Report(report));
        }
        // The rank has said its last word: with its commands gone, it may leave.
        if let Some(rank) = self.live().get_mut(&key) {
            rank.commands = None;
        }
    }

    fn tell(&self, task: Option<&TaskId>, body: &daemon_message::Body) {
        let Some(task) = task else { return };
        for (key, rank) in self.live().iter() {
            if key.is_of(task)
                && let Some(commands) = &rank.commands
            {
                let _ = commands.send(message(body.clone()));
            }
        }
    }

    fn abort(self: &Arc<Self>, abort: Abort) {
        let Some(task) = abort.task.clone() else { return };
        let mut keys = Vec::new();
        for (key, rank) in self.live().iter_mut() {
            if key.is_of(&task) {
                rank.aborted = true;
                keys.push(key.clone());
            }
        }
        self.tell(Some(&task), &daemon_message::Body::Abort(abort));
        let ranks = Arc::clone(self);
        tokio::spawn(async move {
            tokio::time::sleep(TERMINATE_AFTER).await;
            ranks.signal(&keys, Signal::SIGTERM);
            tokio::time::sleep(KILL_AFTER).await;
            ranks.signal(&keys, Signal::SIGKILL);
        });
    }

    fn signal(&self, keys: &[Key], signal: Signal) {
        let pids: Vec<u32> = {
            let live = self.live();
            keys.iter().filter_map(|key| live.get(key)?.pid).collect()
        };
        pids.into_iter().for_each(|pid| process::signal_group(pid, signal));
    }

    /// Ends all ranks, the stubborn ones by SIGKILL.
    pub async fn stop_all(&self) {
        for (patience, signal) in [(KILL_AFTER, Signal::SIGTERM), (KILL_AFTER, Signal::SIGKILL)] {
            let keys: Vec<Key> = {
                let mut live = self.live();
                live.values_mut().for_each(|rank| rank.aborted = true);
                live.keys().cloned().collect()
            };
            self.signal(&keys, signal);
            let all_gone = async {
                loop {
                    let gone = self.gone.notified();
                    if self.live().is_empty() {
                        return;
                    }
                    gone.await;
                }
            };
            if tokio::time::timeout(patience, all_gone).await.is_ok() {
                return;
            }
        }
    }

    fn not_started(&self, task: &TaskId, rank: u32, start_error: String) {
        let task = Some(task.clone());
        self.say(worker_message::Body::Exited(RankExited {
            task,
            rank,
            start_error,
            ..RankExited::default()
        }));
    }

    fn say(&self, body: worker_message::Body) {
        // Closed only when the daemon itself ends.
        let _ = self.outbox.send(WorkerMessage { body: Some(body), ..WorkerMessage::default() });
    }

    fn live(&self) -> MutexGuard<'_, BTreeMap<Key, Rank>> {
        self.live.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Key {
    fn is_of(&self, task: &TaskId) -> bool {
        self.job == task.job && self.attempt == task.attempt && self.stage == task.stage
    }
}

fn message(body: daemon_message::Body) -> DaemonMessage {
    DaemonMessage { body: Some(body) }
}

/// 256 random bits, in hex.
fn new_token() -> String {
    tunefleet_proto::hex(&rand::random::<[u8; 32]>())
}
