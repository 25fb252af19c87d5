//! Sessions between daemons and the coordinator: in order within one, late, and cut off without either side
//! being told.

use std::collections::VecDeque;

use tunefleet_proto::rpc::WorkerMessage;
use tunefleet_proto::rpc::coordinator_message::Body as Command;

use super::random::Random;
use crate::control::fleet::Start;
use crate::control::workers::Epoch;

/// What the coordinator tells a daemon.
#[derive(Debug, Clone)]
pub enum Down {
    Registered { epoch: u64, acknowledged: u64 },
    Start(Start),
    Command(Command),
}

/// One session. Each direction is a queue of (time of arrival, message).
pub struct Link {
    pub epoch: Epoch,
    pub up: VecDeque<(u64, WorkerMessage)>,
    pub down: VecDeque<(u64, Down)>,
    /// The coordinator has ended it, or is gone.
    pub closed_above: bool,
    /// The daemon has ended it, or is gone.
    pub closed_below: bool,
}

impl Link {
    pub fn new(epoch: Epoch) -> Self {
        Link { epoch, up: VecDeque::new(), down: VecDeque::new(), closed_above: false, closed_below: false }
    }

    pub fn send_up(&mut self, now_ms: u64, random: &mut Random, message: WorkerMessage) {
        let at = arrival(now_ms, self.up.back().map(|(at, _)| *at), random);
        self.up.push_back((at, message));
    }

    pub fn send_down(&mut self, now_ms: u64, random: &mut Random, message: Down) {
        let at = arrival(now_ms, self.down.back().map(|(at, _)| *at), random);
        self.down.push_back((at, message));
    }
}

/// Mostly a few milliseconds, now and then seconds; never before what was sent earlier.
fn arrival(now_ms: u64, earlier: Option<u64>, random: &mut Random) -> u64 {
    let delay = if random.chance(0.02) { random.between(100, 3000) } else { random.between(1, 20) };
    (now_ms + delay).max(earlier.unwrap_or(0))
}
