//! The workers that the control plane knows: their sessions, their room, when they were last heard of.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use tokio::sync::mpsc::UnboundedSender;
use tunefleet_proto::rpc::{CoordinatorMessage, Register, coordinator_message};

use super::placement::{Room, WorkerName};

/// A worker that was not heard of for so long is lost.
pub const LOST_AFTER: Duration = Duration::from_secs(15);

/// Number of a session: what an older one still says is ignored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Epoch(u64);

/// One worker.
pub struct Worker {
    /// What it told of itself.
    pub register: Register,
    epoch: Epoch,
    commands: UnboundedSender<CoordinatorMessage>,
    last_heard: Instant,
    used: u32,
}

/// All workers, by name.
#[derive(Default)]
pub struct Workers {
    known: BTreeMap<WorkerName, Worker>,
    sessions: u64,
}

/// What a registration means.
#[derive(Debug, PartialEq, Eq)]
pub enum Joined {
    /// A worker that was not known, or is again the one that was.
    Welcome(Epoch),
    /// The daemon was started anew: what the former one ran is gone.
    Restarted(Epoch),
    /// Another daemon of that name is connected.
    NameTaken,
}

impl Workers {
    /// Takes a worker in.
    pub fn join(
        &mut self,
        register: Register,
        commands: UnboundedSender<CoordinatorMessage>,
        now: Instant,
    ) -> Joined {
        let name = WorkerName::from(register.name.as_str());
        let (mut used, mut restarted) = (0, false);
        if let Some(known) = self.known.get(&name) {
            if known.register.incarnation == register.incarnation {
                used = known.used;
            } else if known.commands.is_closed() {
                restarted = true;
            } else {
                return Joined::NameTaken;
            }
        }
        self.sessions += 1;
        let epoch = Epoch(self.sessions);
        self.known.insert(name, Worker { register, epoch, commands, last_heard: now, used });
        if restarted { Joined::Restarted(epoch) } else { Joined::Welcome(epoch) }
    }

    /// Notes that the worker said something; `false` when that session is not its present one.
    pub fn heard(&mut self, name: &WorkerName, epoch: Epoch, now: Instant) -> bool {
        match self.known.get_mut(name) {
            Some(worker) if worker.epoch == epoch => {
                worker.last_heard = now;
                true
            }
            _ => false,
        }
    }

    /// Takes nobody's silence so far for a loss.
    pub fn excuse(&mut self, now: Instant) {
        self.known.values_mut().for_each(|worker| worker.last_heard = now);
    }

    /// Forgets workers that were not heard of for [`LOST_AFTER`]; their names.
    pub fn forget_lost(&mut self, now: Instant) -> Vec<WorkerName> {
        let is_lost = |worker: &Worker| now.duration_since(worker.last_heard) >= LOST_AFTER;
        let lost: Vec<_> =
            self.known.iter().filter(|(_, worker)| is_lost(worker)).map(|(name, _)| name.clone()).collect();
        for name in &lost {
            self.known.remove(name);
        }
        lost
    }

    /// Sends a command. To a worker with a broken session it is lost: the worker says what runs
    /// there when it is back.
    pub fn send(&self, name: &WorkerName, body: coordinator_message::Body) {
        if let Some(worker) = self.known.get(name) {
            let _ = worker.commands.send(CoordinatorMessage { body: Some(body) });
        }
    }

    /// Room on each worker with a live session.
    pub fn rooms(&self) -> BTreeMap<WorkerName, Room> {
        let live = self.known.iter().filter(|(_, worker)| !worker.commands.is_closed());
        live.map(|(name, worker)| {
            let total = worker.register.slots;
            let free = total.saturating_sub(worker.used);
            (name.clone(), Room { free, total, has_gpu: worker.register.gpus > 0 })
        })
        .collect()
    }

    /// Takes one slot for each entry.
    pub fn take(&mut self, ranks: &[WorkerName]) {
        for name in ranks {
            if let Some(worker) = self.known.get_mut(name) {
                worker.used += 1;
            }
        }
    }

    /// Gives one slot back for each entry.
    pub fn release(&mut self, ranks: &[WorkerName]) {
        for name in ranks {
            if let Some(worker) = self.known.get_mut(name) {
                worker.used = worker.used.saturating_sub(1);
            }
        }
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.known.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::sync::mpsc::unbounded_channel;

    fn register(name: &str, incarnation: &str) -> Register {
        Register {
            name: name.to_owned(),
            slots: 2,
            incarnation: incarnation.to_owned(),
            ..Register::default()
        }
    }

    #[test]
    fn a_broken_session_keeps_its_slots_and_an_older_one_is_not_heard() {
        let (mut workers, now) = (Workers::default(), Instant::now());
        let (commands, session) = unbounded_channel();
        let Joined::Welcome(first) = workers.join(register("w", "1"), commands, now) else { panic!() };
        let name = WorkerName::from("w");
        workers.take(std::slice::from_ref(&name));
        drop(session);
        assert!(workers.rooms().is_empty(), "nothing is placed on a broken session");
        let (commands, _session) = unbounded_channel();
        let Joined::Welcome(second) = workers.join(register("w", "1"), commands, now) else { panic!() };
        assert_eq!(workers.rooms()[&name].free, 1);
        assert!(workers.heard(&name, second, now));
        assert!(!workers.heard(&name, first, now));
    }

    #[test]
    fn a_name_in_use_is_refused_until_its_session_breaks() {
        let (mut workers, now) = (Workers::default(), Instant::now());
        let (commands, session) = unbounded_channel();
        workers.join(register("w", "1"), commands, now);
        let (other, _other_session) = unbounded_channel();
        assert_eq!(workers.join(register("w", "2"), other.clone(), now), Joined::NameTaken);
        drop(session);
        assert!(matches!(workers.join(register("w", "2"), other, now), Joined::Restarted(_)));
    }

    #[test]
    fn silence_makes_a_worker_lost_and_a_heartbeat_keeps_it() {
        let (mut workers, start) = (Workers::default(), Instant::now());
        let (commands, _session) = unbounded_channel();
        let Joined::Welcome(epoch) = workers.join(register("w", "1"), commands, start) else { panic!() };
        let name = WorkerName::from("w");
        let later = start + LOST_AFTER / 2;
        workers.heard(&name, epoch, later);
        assert!(workers.forget_lost(start + LOST_AFTER).is_empty());
        workers.excuse(later + LOST_AFTER);
        assert!(workers.forget_lost(later + LOST_AFTER).is_empty());
        assert_eq!(workers.forget_lost(later + 2 * LOST_AFTER), [name]);
        assert_eq!(workers.len(), 0);
    }
}
