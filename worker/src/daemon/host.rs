//! The life of one rank, as its daemon sees it: its start or its adoption, what it tells, its end.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use prost::Message;
use tokio::process::Child;
use tonic::Streaming;
use tunefleet_keeper::Process;
use tunefleet_proto::rpc::{
    Acknowledged, Assignment, RankEvent, RankReport, daemon_message, rank_event, worker_message,
};

use super::examine::gpus;
use super::journal::RankFile;
use super::outbox::Key;
use super::process::{self, Launch};
use super::ranks::{Rank, Ranks, message};
use super::{Error, io};

/// How long the last events of a rank that is gone may take to arrive.
const DRAIN_LIMIT: Duration = Duration::from_secs(1);
/// Between two looks at a keeper that another daemon has started.
const LOOK_AGAIN: Duration = Duration::from_millis(100);
const ASSIGNMENT_FILE: &str = "assignment";

impl Ranks {
    /// Starts a rank and sees it to its end.
    pub(super) async fn host(self: Arc<Self>, key: Key, token: String) {
        match self.start(&key, &token).await {
            Ok(mut keeper) => {
                // Whatever it says, the files that it leaves say more.
                let _ = keeper.wait().await;
                self.ended(&key).await;
            }
            Err(start_error) => {
                self.live().remove(&key);
                self.journal().forget(&key);
                self.not_started(&key, start_error);
                self.gone.notify_waiters();
            }
        }
    }

    async fn start(&self, key: &Key, token: &str) -> Result<Child, String> {
        let (file, assignment) = {
            let live = self.live();
            let rank = live.get(key).ok_or("it was forgotten")?;
            (rank.file.clone(), rank.assignment.clone())
        };
        let dir = self.journal().rank_dir(key);
        // Before the process, so that a later daemon knows of it in any case.
        let noted = self.journal().note(&file).and_then(|()| {
            let path = dir.join(ASSIGNMENT_FILE);
            std::fs::write(path, assignment.encode_to_vec())
        });
        noted.map_err(|error| format!("journal {}: {error}", dir.display()))?;
        let launch = Launch {
            dir: &dir,
            socket: &self.socket,
            log_path: &file.log_path,
            token,
            threads: assignment.threads,
            ends_with_daemon: self.ends_with_daemon,
            memory_limit_bytes: self.memory_limit_bytes,
        };
        if let Some(gpu) = assignment.cuda_device.filter(|gpu| !self.shares_gpu(key, *gpu)) {
            // The rank of an attempt before may have been killed a moment ago.
            gpus::wait_until_free(gpu).await?;
        }
        let keeper = process::start(&launch).await?;
        let process = keeper.id().and_then(|pid| Process::of(pid as i32));
        if let Some(rank) = self.live().get_mut(key) {
            rank.file.keeper = process;
            self.note(rank);
        }
        Ok(keeper)
    }

    /// Whether another rank of this worker computes on that GPU.
    fn shares_gpu(&self, own: &Key, gpu: u32) -> bool {
        let live = self.live();
        live.iter().any(|(key, rank)| key != own && !rank.exited && rank.assignment.cuda_device == Some(gpu))
    }

    /// Looks after the ranks that former daemons have left.
    pub fn adopt(self: &Arc<Self>) -> Result<(), Error> {
        let ranks = self.journal().ranks()?;
        let heard = self.outbox().heard();
        let told: Vec<Key> = self
            .outbox()
            .after(0)
            .filter_map(|message| match &message.body {
                Some(worker_message::Body::Exited(exited)) => {
                    Some(Key::new(exited.task.as_ref()?, exited.rank))
                }
                _ => None,
            })
            .collect();
        for (key, file) in ranks {
            let dir = self.journal().rank_dir(&key);
            let bytes = std::fs::read(dir.join(ASSIGNMENT_FILE)).map_err(io("reading a rank's assignment"));
            let assignment = bytes.ok().and_then(|bytes| Assignment::decode(bytes.as_slice()).ok());
            let keeper = file.keeper.or_else(|| process::keeper_of(&dir));
            let mut rank = Rank::new(RankFile { keeper, ..file }, assignment.unwrap_or_default());
            rank.heard = self.journal().heard(&key).max(heard.get(&key).copied().unwrap_or(0));
            rank.exited = told.contains(&key);
            tracing::info!("rank {} of {} a{} is found again", key.rank, key.job, key.attempt);
            let exited = rank.exited;
            self.live().insert(key.clone(), rank);
            if !exited {
                let ranks = Arc::clone(self);
                tokio::spawn(async move {
                    while keeper.is_some_and(|keeper| keeper.is_alive()) {
                        tokio::time::sleep(LOOK_AGAIN).await;
                    }
                    ranks.ended(&key).await;
                });
            }
        }
        Ok(())
    }

    /// A rank's process is gone, and its keeper with it.
    async fn ended(&self, key: &Key) {
        // Before anything else: an abort that comes now did not end it.
        let Some((aborted, log_path)) =
            self.live().get(key).map(|rank| (rank.file.aborted, rank.file.log_path.clone()))
        else {
            return;
        };
        self.drain(key).await;
        let last_words = self.journal().last_words(key);
        for event in last_words {
            self.heard(key, event);
        }
        let dir = self.journal().rank_dir(key);
        let mut exited = process::exited(&dir, &log_path);
        exited.task = Some(key.task());
        exited.rank = key.rank;
        exited.aborted = aborted;
        let count = if exited.exit_code == Some(0) { &self.clean_exits } else { &self.failed_exits };
        count.fetch_add(1, Ordering::Relaxed);
        // Both at once: who acknowledges the exit forgets a rank that has ended, and would leave this one for ever.
        let mut live = self.live();
        self.keep(worker_message::Body::Exited(exited), false);
        if let Some(rank) = live.get_mut(key) {
            rank.exited = true;
            rank.commands = None;
        }
        drop(live);
        self.gone.notify_waiters();
    }

    /// Waits for what the rank said before it ended.
    async fn drain(&self, key: &Key) {
        let reader = self.live().get_mut(key).and_then(|rank| rank.reader.take());
        if let Some(reader) = reader {
            let _ = tokio::time::timeout(DRAIN_LIMIT, reader).await;
        }
    }

    /// Reads what a rank tells until its session ends.
    pub async fn read(self: Arc<Self>, key: Key, mut events: Streaming<RankEvent>) {
        while let Ok(Some(event)) = events.message().await {
            let sequence = event.sequence;
            self.heard(&key, event);
            if sequence == 0 {
                continue;
            }
            let acknowledged = daemon_message::Body::Acknowledged(Acknowledged { through: sequence });
            if let Some(commands) = self.live().get(&key).and_then(|rank| rank.commands.as_ref()) {
                let _ = commands.send(message(acknowledged));
            }
        }
    }

    /// Takes an event of a rank, unless it was taken before.
    fn heard(&self, key: &Key, event: RankEvent) {
        let sequence = event.sequence;
        let mut live = self.live();
        let Some(rank) = live.get_mut(key) else { return };
        if sequence > 0 && sequence <= rank.heard {
            return;
        }
        let (mut informs, mut lasts) = (false, true);
        match &event.body {
            Some(rank_event::Body::Step(report)) => rank.last_step = Some(*report),
            Some(rank_event::Body::Section(_) | rank_event::Body::Note(_)) => informs = true,
            Some(rank_event::Body::Beat(beat)) => {
                rank.beat = Some((beat.clone(), Instant::now()));
                return;
            }
            Some(rank_event::Body::Stalled(_) | rank_event::Body::Collectives(_)) => lasts = false,
            _ => {}
        }
        rank.heard = rank.heard.max(sequence);
        drop(live);
        let report = RankReport { task: Some(key.task()), rank: key.rank, event: Some(event) };
        let body = worker_message::Body::Report(report);
        if lasts {
            self.keep(body, informs);
            self.journal().note_heard(key, sequence);
        } else {
            self.say_once(body);
        }
    }
}
