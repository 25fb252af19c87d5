//! The ranks of this worker: which there are, what is told to them, what they tell. `host` is the life of one.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::task::JoinHandle;
use tunefleet_proto::job::JobSpec;
use tunefleet_proto::rpc::{
    Abort, Assignment, Beat, DaemonMessage, HeldRank, RankBeat, RankExited, StartTask, StepDone,
    StopAtCheckpoint, TaskId, WorkerMessage, coordinator_message, daemon_message, worker_message,
};

use super::journal::{Journal, LAST_WORDS_FILE, RankFile};
use super::logs::Readers;
use super::node::Node;
use super::outbox::{Key, Outbox};
use super::{Error, examine, process};

/// From the abort message to SIGKILL.
pub(super) const KILL_AFTER: Duration = Duration::from_secs(2);
/// Between two tries to kill a rank that has not been started wholly.
const KILL_AGAIN: Duration = Duration::from_millis(200);
/// Commands that wait for a rank which is not connected.
const MAX_QUEUE: usize = 64;

/// One rank.
pub(super) struct Rank {
    pub file: RankFile,
    /// For its first session; one that has it already does not look.
    pub assignment: Assignment,
    /// To the rank, while it is connected.
    pub commands: Option<UnboundedSender<DaemonMessage>>,
    /// What it was told while it was not.
    pub queue: Vec<DaemonMessage>,
    /// Reads what it tells.
    pub reader: Option<JoinHandle<()>>,
    /// Number of its newest event that is in the outbox.
    pub heard: u64,
    pub last_step: Option<StepDone>,
    pub beat: Option<(Beat, Instant)>,
    /// Its process is gone, and its exit is in the outbox.
    pub exited: bool,
}

/// All ranks of this worker.
pub(super) struct Ranks {
    pub node: Node,
    pub socket: PathBuf,
    /// Nobody will come after this daemon.
    pub ends_with_daemon: bool,
    pub memory_limit_bytes: Option<u64>,
    pub journal: Mutex<Journal>,
    outbox: Mutex<Outbox>,
    /// Signalled whenever there is something new in the outbox.
    pub grown: tokio::sync::Notify,
    /// What is worth saying once, to whoever is connected.
    once: UnboundedSender<worker_message::Body>,
    live: Mutex<BTreeMap<Key, Rank>>,
    readers: Readers,
    /// Signalled whenever a rank is gone.
    pub gone: tokio::sync::Notify,
    /// Whether there is a session with the coordinator.
    pub is_connected: AtomicBool,
    /// Ranks that have exited, for metrics.
    pub clean_exits: AtomicU64,
    pub failed_exits: AtomicU64,
}

impl Ranks {
    /// The ranks that the journal knows; none of them is looked after before [`Ranks::adopt`].
    pub fn new(
        node: &Node,
        socket: PathBuf,
        journal: Journal,
        ends_with_daemon: bool,
        memory_limit_bytes: Option<u64>,
        once: UnboundedSender<worker_message::Body>,
    ) -> Result<Self, Error> {
        let outbox = journal.outbox()?;
        Ok(Ranks {
            node: node.clone(),
            socket,
            ends_with_daemon,
            memory_limit_bytes,
            outbox: Mutex::new(outbox),
            journal: Mutex::new(journal),
            grown: tokio::sync::Notify::new(),
            once,
            live: Mutex::default(),
            readers: Readers::default(),
            gone: tokio::sync::Notify::new(),
            is_connected: AtomicBool::new(false),
            clean_exits: AtomicU64::new(0),
            failed_exits: AtomicU64::new(0),
        })
    }

    /// Ranks whose exit is not known to the coordinator yet.
    pub fn held(&self) -> Vec<HeldRank> {
        let held = |(key, rank): (&Key, &Rank)| HeldRank {
            task: Some(key.task()),
            rank: key.rank,
            exited: rank.exited,
        };
        self.live().iter().map(held).collect()
    }

    /// Tasks with running ranks.
    pub fn tasks(&self) -> Vec<TaskId> {
        let live = self.live();
        let running = live.iter().filter(|(_, rank)| !rank.exited);
        let tasks: BTreeSet<_> = running.map(|(key, _)| (key.job.clone(), key.attempt, key.stage)).collect();
        tasks.into_iter().map(|(job, attempt, stage)| TaskId { job, attempt, stage }).collect()
    }

    /// How far the ranks are. A rank that has stopped telling is as far as it was, for longer.
    pub fn beats(&self) -> Vec<RankBeat> {
        let beat = |(key, rank): (&Key, &Rank)| {
            let (beat, at) = rank.beat.clone().filter(|_| !rank.exited)?;
            let seconds = beat.seconds + at.elapsed().as_secs_f64();
            Some(RankBeat { task: Some(key.task()), rank: key.rank, beat: Some(Beat { seconds, ..beat }) })
        };
        self.live().iter().filter_map(beat).collect()
    }

    /// Ranks that run, for metrics: what they were told to do, and what they told last.
    pub fn shown(&self) -> Vec<(Key, Assignment, Option<StepDone>, Option<Beat>)> {
        let shown = |(key, rank): (&Key, &Rank)| {
            let beat = rank.beat.clone().map(|(beat, at)| {
                let seconds = beat.seconds + at.elapsed().as_secs_f64();
                Beat { seconds, ..beat }
            });
            (key.clone(), rank.assignment.clone(), rank.last_step, beat)
        };
        self.live().iter().filter(|(_, rank)| !rank.exited).map(shown).collect()
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
            coordinator_message::Body::Acknowledged(ack) => self.acknowledged(ack.through),
            coordinator_message::Body::ReadLog(asked) => self.readers.read(self, asked),
            coordinator_message::Body::Examine(asked) => examine::answer(self, asked),
            coordinator_message::Body::Registered(_) => {}
        }
    }

    fn start_task(self: &Arc<Self>, start: StartTask) {
        let Some(task) = start.task.clone() else { return };
        for number in start.ranks.iter().copied() {
            let key = Key::new(&task, number);
            let mut live = self.live();
            if live.contains_key(&key) {
                // Told again by a coordinator that does not know yet.
                continue;
            }
            let taken: BTreeSet<u32> =
                live.values().filter(|rank| !rank.exited).map(|rank| rank.file.slot).collect();
            let Some(slot) = (0..self.node.slots).find(|slot| !taken.contains(slot)) else {
                drop(live);
                self.not_started(&key, "no free slot on this worker".to_owned());
                continue;
            };
            let token = new_token();
            let rank = self.new_rank(&start, &key, slot, &token);
            live.insert(key.clone(), rank);
            drop(live);
            tokio::spawn(Arc::clone(self).host(key, token));
        }
    }

    fn new_rank(&self, start: &StartTask, key: &Key, slot: u32, token: &str) -> Rank {
        let cuda = start.cuda && self.node.gpus > 0;
        let task = key.task();
        let last_words = self.journal().rank_dir(key).join(LAST_WORDS_FILE);
        let assignment = Assignment {
            task: Some(task.clone()),
            rank: key.rank,
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
            ends_with_daemon: self.ends_with_daemon,
            last_words_path: last_words.display().to_string(),
        };
        let spec = serde_json::from_str::<JobSpec>(&start.spec_json);
        let file = RankFile {
            job: key.job.clone(),
            attempt: key.attempt,
            stage: key.stage,
            rank: key.rank,
            slot,
            token_sha256: tunefleet_proto::digest_hex(token.as_bytes()),
            log_path: process::log_path(&start.log_dir, task.stage(), key.rank),
            keeper: None,
            aborted: false,
            grace_seconds: spec.map(|spec| spec.restart.stop_grace_seconds).unwrap_or_default(),
        };
        Rank::new(file, assignment)
    }

    // ------------------------------------------------------------------------------ to a rank

    /// Lets a rank in that shows its token; the stream of commands to it. One that comes again takes the place of
    /// its former session.
    pub fn admit(self: &Arc<Self>, token: &str) -> Option<(Key, UnboundedReceiver<DaemonMessage>)> {
        let sha256 = tunefleet_proto::digest_hex(token.as_bytes());
        let mut live = self.live();
        let (key, rank) =
            live.iter_mut().find(|(_, rank)| !rank.exited && rank.file.token_sha256 == sha256)?;
        let (commands, received) = unbounded_channel();
        let _ = commands.send(message(daemon_message::Body::Assignment(rank.assignment.clone())));
        for waited in std::mem::take(&mut rank.queue) {
            let _ = commands.send(waited);
        }
        rank.commands = Some(commands);
        Some((key.clone(), received))
    }

    pub(super) fn tell(&self, task: Option<&TaskId>, body: &daemon_message::Body) {
        let Some(task) = task else { return };
        for (_, rank) in self.live().iter_mut().filter(|(key, _)| key.is_of(task)) {
            rank.tell(body.clone());
        }
    }

    fn abort(self: &Arc<Self>, abort: Abort) {
        let Some(task) = abort.task.clone() else { return };
        let mut keys = Vec::new();
        for (key, rank) in self.live().iter_mut().filter(|(key, rank)| key.is_of(&task) && !rank.exited) {
            if !rank.file.aborted {
                rank.file.aborted = true;
                keys.push(key.clone());
                self.note(rank);
            }
        }
        self.tell(Some(&task), &daemon_message::Body::Abort(abort));
        self.kill_later(keys, KILL_AFTER);
    }

    /// Kills ranks that are not gone after `patience`.
    fn kill_later(self: &Arc<Self>, keys: Vec<Key>, patience: Duration) {
        let ranks = Arc::clone(self);
        tokio::spawn(async move {
            tokio::time::sleep(patience).await;
            loop {
                let running: Vec<PathBuf> = {
                    let live = ranks.live();
                    let running = keys.iter().filter(|key| live.get(key).is_some_and(|rank| !rank.exited));
                    running.map(|key| ranks.journal().rank_dir(key)).collect()
                };
                if running.is_empty() {
                    return;
                }
                for dir in &running {
                    let _ = process::kill(dir);
                }
                tokio::time::sleep(KILL_AGAIN).await;
            }
        });
    }

    /// Lets all ranks save a checkpoint and stop, for as long as their jobs allow; then kills them. Ranks of the same
    /// tasks on other workers stop with them.
    pub async fn leave(self: &Arc<Self>) {
        let grace = {
            let live = self.live();
            let running = live.values().filter(|rank| !rank.exited);
            running.map(|rank| rank.file.grace_seconds).max()
        };
        for task in self.tasks() {
            let stop = StopAtCheckpoint { task: Some(task.clone()) };
            self.tell(Some(&task), &daemon_message::Body::StopAtCheckpoint(stop));
        }
        let grace = Duration::from_secs(grace.unwrap_or(0));
        if tokio::time::timeout(grace, self.all_gone()).await.is_err() {
            tracing::warn!("ranks have not saved within {} s: they are killed", grace.as_secs());
            self.end_all("the daemon ends, and the time to save is over").await;
        }
    }

    /// Ends all ranks at once.
    pub async fn end_all(self: &Arc<Self>, reason: &str) {
        for task in self.tasks() {
            self.abort(Abort { task: Some(task), reason: reason.to_owned(), by_peer: false });
        }
        let _ = tokio::time::timeout(2 * KILL_AFTER, self.all_gone()).await;
    }

    async fn all_gone(&self) {
        loop {
            let gone = self.gone.notified();
            if self.live().values().all(|rank| rank.exited) {
                return;
            }
            gone.await;
        }
    }

    // ------------------------------------------------------------------------ to the coordinator

    /// Keeps a message until the coordinator has it. `informs`: it may be left out when very much waits.
    pub(super) fn keep(&self, body: worker_message::Body, informs: bool) {
        self.outbox().push(body, informs);
        self.grown.notify_one();
    }

    /// Says something once.
    pub(super) fn say_once(&self, body: worker_message::Body) {
        // Nobody listens once the daemon ends.
        let _ = self.once.send(body);
    }

    /// Kept messages after a number.
    pub fn kept_after(&self, sequence: u64, at_most: usize) -> Vec<WorkerMessage> {
        self.outbox().after(sequence).take(at_most).cloned().collect()
    }

    /// Messages that the coordinator has not acknowledged.
    pub fn unacknowledged(&self) -> usize {
        self.outbox().after(0).count()
    }

    /// Whether the coordinator has everything.
    pub fn is_told(&self) -> bool {
        self.outbox().after(0).next().is_none()
    }

    /// The coordinator has everything up to this number.
    pub fn acknowledged(&self, through: u64) {
        let gone = self.outbox().acknowledged(through);
        for message in gone {
            if let Some(worker_message::Body::Exited(exited)) = message.body
                && let Some(task) = exited.task
            {
                let key = Key::new(&task, exited.rank);
                let mut live = self.live();
                if live.get(&key).is_some_and(|rank| rank.exited) {
                    live.remove(&key);
                    self.journal().forget(&key);
                }
            }
        }
    }

    pub(super) fn not_started(&self, key: &Key, start_error: String) {
        let kind = tunefleet_proto::rpc::FailureKind::Start.into();
        let (task, rank) = (Some(key.task()), key.rank);
        let exited = RankExited { task, rank, start_error, kind, ..RankExited::default() };
        self.keep(worker_message::Body::Exited(exited), false);
    }

    pub(super) fn note(&self, rank: &Rank) {
        if let Err(error) = self.journal().note(&rank.file) {
            tracing::error!("journal: {error}; a later daemon may not find rank {}", rank.file.rank);
        }
    }

    pub(super) fn live(&self) -> MutexGuard<'_, BTreeMap<Key, Rank>> {
        self.live.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn journal(&self) -> MutexGuard<'_, Journal> {
        self.journal.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn outbox(&self) -> MutexGuard<'_, Outbox> {
        self.outbox.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Rank {
    pub fn new(file: RankFile, assignment: Assignment) -> Self {
        Rank {
            file,
            assignment,
            commands: None,
            queue: Vec::new(),
            reader: None,
            heard: 0,
            last_step: None,
            beat: None,
            exited: false,
        }
    }

    /// Tells it something, now or when it dials again.
    fn tell(&mut self, body: daemon_message::Body) {
        let told = message(body);
        let unsent = match &self.commands {
            Some(commands) => commands.send(told).err().map(|failed| failed.0),
            None => Some(told),
        };
        if let Some(unsent) = unsent.filter(|_| self.queue.len() < MAX_QUEUE) {
            self.queue.push(unsent);
        }
    }
}

pub(super) fn message(body: daemon_message::Body) -> DaemonMessage {
    DaemonMessage { body: Some(body) }
}

/// 256 random bits, in hex.
fn new_token() -> String {
    tunefleet_proto::hex(&rand::random::<[u8; 32]>())
}
