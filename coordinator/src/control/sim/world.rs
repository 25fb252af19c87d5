//! The world of one seed: it moves in ticks, and looks after each whether what must hold does.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use tunefleet_proto::ids::{Attempt, JobId};
use tunefleet_proto::job::{self, JobSpec};
use tunefleet_proto::rpc::job_event::Body;
use tunefleet_proto::rpc::{
    Continuation, FailureKind, Finished, Heartbeat, JobState, Leaving, RankDone, RankFailed, Saved, Stage,
    StepDone, TaskId, WorkerMessage, rank_done, rank_event, worker_message,
};

use super::daemon::{Daemon, Group, group_of};
use super::network::{Down, Link};
use super::random::Random;
use crate::control::fleet::{Action, Fleet, Submission, Work};
use crate::control::job::{Input, Verdict};
use crate::control::placement::WorkerName;
use crate::control::settings::{Now, Settings};
use crate::control::store::{self, History, Store};

/// One look at everything.
const TICK_MS: u64 = 100;
/// A step of training.
const STEP_MS: u64 = 500;
const STEPS: u64 = 60;
const SAVE_EVERY: u64 = 5;
const SECOND_MS: u64 = 1000;
/// How long healing may take: the longest pause between attempts, a few times.
const HEALING_MINUTES: u64 = 90;

/// What kind of world it is.
#[derive(Debug, Clone, Copy)]
pub struct Plan {
    pub workers: usize,
    pub slots: u32,
    pub jobs: usize,
    pub ranks: u32,
    pub minutes: u64,
    /// Faults a second.
    pub faults: f64,
    /// Probability at each point between a change and its consequence.
    pub coordinator_crashes: f64,
}

impl Default for Plan {
    fn default() -> Self {
        Plan { workers: 5, slots: 2, jobs: 5, ranks: 3, minutes: 5, faults: 0.2, coordinator_crashes: 0.002 }
    }
}

pub struct World {
    plan: Plan,
    random: Random,
    now_ms: u64,
    store: store::Memory,
    fleet: Option<Fleet>,
    coordinator_up_at: u64,
    daemons: Vec<Daemon>,
    links: Vec<Option<Link>>,
    /// Work outside the coordinator.
    answers: Vec<(u64, JobId, Attempt, Input)>,
    to_submit: Vec<(u64, JobSpec)>,
    /// Steps that the ranks of a task have made together.
    groups: BTreeMap<Group, u64>,
    /// Newest checkpoint of a job: attempt and step.
    saved: BTreeMap<String, (u32, u64)>,
    /// Newest attempt whose directory is there.
    opened: BTreeMap<String, u32>,
    trained: BTreeSet<String>,
    /// Steps that rank 0 of a job has told.
    told: BTreeMap<String, Vec<(u32, u64)>>,
    ended: BTreeMap<JobId, (u32, JobState)>,
    healing: bool,
    incarnations: u64,
    pub seen: Seen,
}

/// What happened to a world.
#[derive(Debug, Default, Clone, Copy)]
pub struct Seen {
    pub coordinator_ends: u64,
    pub faults: u64,
    pub attempts: u64,
    pub jobs: u64,
    pub completed: u64,
}

impl World {
    pub fn new(plan: Plan, seed: u64) -> Self {
        let mut random = Random(seed);
        let daemons: Vec<_> = (0..plan.workers).map(|index| Daemon::new(index, plan.slots)).collect();
        let to_submit = (0..plan.jobs).map(|index| {
            let ranks = random.between(1, u64::from(plan.ranks));
            let priority = random.below(3) * 50;
            (random.below(plan.minutes * 30 * SECOND_MS), spec(index, ranks, priority))
        });
        let to_submit = to_submit.collect();
        World {
            links: daemons.iter().map(|_| None).collect(),
            daemons,
            to_submit,
            plan,
            random,
            now_ms: 0,
            store: store::Memory::default(),
            fleet: None,
            coordinator_up_at: 0,
            answers: Vec::new(),
            groups: BTreeMap::new(),
            saved: BTreeMap::new(),
            opened: BTreeMap::new(),
            trained: BTreeSet::new(),
            told: BTreeMap::new(),
            ended: BTreeMap::new(),
            healing: false,
            incarnations: 0,
            seen: Seen::default(),
        }
    }

    pub fn run(mut self) -> Seen {
        let disturbed_until = self.plan.minutes * 60 * SECOND_MS;
        while self.now_ms < disturbed_until {
            self.tick();
        }
        self.heal();
        let limit = self.now_ms + HEALING_MINUTES * 60 * SECOND_MS;
        while !self.is_over() {
            assert!(self.now_ms < limit, "it does not come to an end: {}", self.describe());
            self.tick();
        }
        self.check_history();
        self.seen
    }

    fn now(&self) -> Now {
        Now { unix_ms: 1_700_000_000_000 + self.now_ms, uptime: Duration::from_millis(self.now_ms) }
    }

    fn tick(&mut self) {
        self.now_ms += TICK_MS;
        self.run_coordinator();
        self.run_people();
        for index in 0..self.daemons.len() {
            self.run_daemon(index);
        }
        if self.now_ms.is_multiple_of(STEP_MS) {
            self.run_ranks();
        }
        if !self.healing && self.random.chance(self.plan.faults * TICK_MS as f64 / SECOND_MS as f64) {
            self.strike();
        }
        self.check();
    }

    // ----------------------------------------------------------------------------- coordinator

    fn run_coordinator(&mut self) {
        if self.fleet.is_none() {
            if self.now_ms < self.coordinator_up_at {
                return;
            }
            let loaded = self.store.load().unwrap();
            let mut secrets = Random(self.random.next());
            let secret = Box::new(move || secrets.next().to_le_bytes().to_vec());
            let restored = Fleet::restore(loaded, Settings::default(), secret, self.now());
            self.fleet = Some(restored.unwrap_or_else(|(job, error)| panic!("{job}: {error}")));
            self.settle();
        }
        let now = self.now();
        let due: Vec<_> =
            self.answers.extract_if(.., |(at, ..)| *at <= now.uptime.as_millis() as u64).collect();
        for (_, job, attempt, input) in due {
            if let Some(fleet) = &mut self.fleet {
                fleet.happened(&job, attempt, input, now);
            }
            self.settle();
        }
        if let Some(fleet) = &mut self.fleet {
            fleet.tick(now);
        }
        self.settle();
    }

    /// Keeps what has come together and does it; the coordinator may end at any point in between.
    fn settle(&mut self) {
        let now = self.now();
        while let Some(fleet) = &mut self.fleet {
            let out = fleet.take(now);
            if out.writes.is_empty() && out.actions.is_empty() || self.crashes() {
                return;
            }
            self.store.commit(&out.writes).unwrap();
            for action in out.actions {
                if self.crashes() {
                    return;
                }
                self.act(action);
            }
        }
    }

    fn crashes(&mut self) -> bool {
        let crashes = !self.healing && self.random.chance(self.plan.coordinator_crashes);
        if crashes {
            self.stop_coordinator();
        }
        crashes
    }

    fn stop_coordinator(&mut self) {
        self.fleet = None;
        self.seen.coordinator_ends += 1;
        self.coordinator_up_at = self.now_ms + self.random.between(100, 20_000);
        self.answers.clear();
        self.links.iter_mut().flatten().for_each(|link| link.closed_above = true);
    }

    fn act(&mut self, action: Action) {
        match action {
            Action::Send(worker, epoch, command) => self.send(&worker, epoch.0, Down::Command(command)),
            Action::Start(worker, epoch, start) => {
                assert!(start.ranks.iter().all(|rank| *rank < start.world));
                self.send(&worker, epoch.0, Down::Start(start));
            }
            Action::EndSession(worker, epoch) => {
                if let Some(link) = self.link_of(&worker).filter(|link| link.epoch == epoch) {
                    link.closed_above = true;
                }
            }
            Action::Opened(job, attempt) => {
                let newest = self.opened.entry(job.0).or_insert(0);
                assert!(attempt.0 >= *newest, "attempt {attempt:?} after {newest}");
                *newest = attempt.0;
            }
            Action::Work(job, attempt, work) => {
                let input = self.work(&job, work);
                self.answers.push((self.now_ms + self.random.between(10, 2000), job, attempt, input));
            }
            Action::Show(..) | Action::Closed(_) | Action::Forgotten(_) => {}
        }
    }

    fn work(&mut self, job: &JobId, work: Work) -> Input {
        let verdict = |stage| match stage {
            Stage::Train if self.trained.contains(&job.0) => Verdict::Cached,
            Stage::Train => Verdict::Run { resume: self.saved.contains_key(&job.0) },
            _ => Verdict::Absent,
        };
        match work {
            Work::Inspect(stage, _) => Input::Inspected(stage, Ok(verdict(stage))),
            Work::Collect => Input::Collected(Ok(())),
            Work::Record(stage) => Input::Recorded(stage, Ok(())),
        }
    }

    fn link_of(&mut self, worker: &WorkerName) -> Option<&mut Link> {
        let name = worker.to_string();
        let index = self.daemons.iter().position(|daemon| daemon.name == name)?;
        self.links.get_mut(index)?.as_mut()
    }

    fn send(&mut self, worker: &WorkerName, epoch: u64, down: Down) {
        let (now_ms, mut random) = (self.now_ms, Random(self.random.next()));
        if let Some(link) = self.link_of(worker).filter(|link| link.epoch.0 == epoch && !link.closed_above) {
            link.send_down(now_ms, &mut random, down);
        }
    }

    // ---------------------------------------------------------------------------------- people

    fn run_people(&mut self) {
        let now = self.now();
        let due: Vec<_> = self.to_submit.extract_if(.., |(at, _)| *at <= self.now_ms).collect();
        for (at, spec) in due {
            let request = spec.name.clone();
            let id = JobId(spec.name.clone());
            let Some(fleet) = &mut self.fleet else {
                self.to_submit.push((at + SECOND_MS, spec));
                continue;
            };
            // Asked again after an answer that did not come, it is submitted once.
            if fleet.submitted_before(&id, &request).is_none() {
                let spec_json = serde_json::to_string(&spec).unwrap();
                let continuation = Continuation::Unspecified;
                let submission =
                    Submission { spec: spec.clone(), spec_json, continuation, request, earlier: 0 };
                fleet.submit(submission, now).unwrap();
                self.to_submit.push((self.now_ms + 500, spec));
            }
            self.settle();
        }
    }

    // --------------------------------------------------------------------------------- daemons

    fn run_daemon(&mut self, index: usize) {
        let now = self.now();
        let now_ms = self.now_ms;
        let daemon = &mut self.daemons[index];
        if !daemon.alive {
            if daemon.dials_at <= now_ms {
                daemon.alive = true;
            } else if let Some(link) = &mut self.links[index] {
                link.closed_below = true;
            }
        }
        let cut_off = daemon.cut_off_until > now_ms;
        if daemon.alive {
            daemon.become_ready(now_ms);
        }
        self.notice_ends(index, cut_off);
        if self.links[index].is_none() {
            self.dial(index, cut_off);
        }
        let daemon = &mut self.daemons[index];
        if let Some(link) = self.links[index].as_mut().filter(|link| !link.closed_below && daemon.alive)
            && daemon.epoch == link.epoch.0
        {
            for message in daemon.unsent() {
                link.send_up(now_ms, &mut self.random, message);
            }
            if now_ms.is_multiple_of(SECOND_MS) {
                let body = Some(worker_message::Body::Heartbeat(Heartbeat::default()));
                link.send_up(
                    now_ms,
                    &mut self.random,
                    WorkerMessage { body, epoch: daemon.epoch, sequence: 0 },
                );
            }
        }
        if cut_off {
            return;
        }
        while let Some(link) = &mut self.links[index]
            && !link.closed_above
            && let Some((_, message)) = link.up.pop_front_if(|(at, _)| *at <= now_ms)
        {
            let (name, epoch) = (WorkerName::from(self.daemons[index].name.as_str()), link.epoch);
            if let Some(fleet) = &mut self.fleet {
                fleet.said(&name, epoch, message, now);
            }
            self.settle();
        }
        while let Some(link) = &mut self.links[index]
            && !link.closed_below
            && let Some((_, down)) = link.down.pop_front_if(|(at, _)| *at <= now_ms)
        {
            let answers = self.daemons[index].obey(down, now_ms);
            for answer in answers {
                link.send_up(now_ms, &mut self.random, answer);
            }
        }
    }

    /// Each side learns some time later that the other has ended the session.
    fn notice_ends(&mut self, index: usize, cut_off: bool) {
        let Some(link) = &mut self.links[index] else { return };
        let noticed = !cut_off && self.random.chance(0.2);
        if (link.closed_above || link.closed_below) && noticed {
            let epoch = link.epoch;
            self.links[index] = None;
            self.daemons[index].epoch = 0;
            let name = WorkerName::from(self.daemons[index].name.as_str());
            if let Some(fleet) = &mut self.fleet {
                fleet.left(&name, epoch);
            }
            self.settle();
        }
    }

    fn dial(&mut self, index: usize, cut_off: bool) {
        let now = self.now();
        let daemon = &mut self.daemons[index];
        if !daemon.alive || cut_off || daemon.dials_at > self.now_ms {
            return;
        }
        daemon.dials_at = self.now_ms + 1000;
        let Some(fleet) = &mut self.fleet else { return };
        let Ok(joined) = fleet.join(daemon.register(), now) else { return };
        let mut link = Link::new(joined.epoch);
        let hello = Down::Registered { epoch: joined.epoch.0, acknowledged: joined.acknowledged };
        link.send_down(self.now_ms, &mut self.random, hello);
        self.links[index] = Some(link);
        self.settle();
    }

    // ----------------------------------------------------------------------------------- ranks

    fn run_ranks(&mut self) {
        let mut groups: BTreeMap<Group, Vec<(usize, u32)>> = BTreeMap::new();
        for (index, daemon) in self.daemons.iter().enumerate() {
            for ((group, rank), _) in daemon.running() {
                groups.entry(group.clone()).or_default().push((index, *rank));
            }
        }
        for (group, mut ranks) in groups {
            ranks.sort_by_key(|(_, rank)| *rank);
            self.run_group(&group, &ranks);
        }
    }

    fn run_group(&mut self, group: &Group, ranks: &[(usize, u32)]) {
        let mut alive = Vec::new();
        for (index, rank) in ranks {
            let key = (group.clone(), *rank);
            let held = &self.daemons[*index].ranks[&key];
            if held.abort {
                self.daemons[*index].exit(&key, None, Some(9));
            } else {
                alive.push((*index, *rank, held.clone()));
            }
        }
        let Some((_, _, first)) = alive.first().cloned() else { return };
        let numbers: BTreeSet<u32> = alive.iter().map(|(_, rank, _)| *rank).collect();
        assert_eq!(numbers.len(), alive.len(), "a rank of {group:?} runs twice");
        let complete = alive.len() == first.world as usize;
        let all_started = alive.iter().all(|(_, _, rank)| rank.started.is_some());
        if !complete || !all_started {
            // Peers that have met notice that one is gone; who waits for the others goes on waiting.
            let met = self.groups.contains_key(group);
            for (index, rank, held) in alive.iter().filter(|_| met && !complete) {
                self.end_rank(*index, &held.task, *rank, failed(FailureKind::Unspecified, true), 1);
            }
            return;
        }
        let secrets: BTreeSet<_> = alive.iter().map(|(_, _, rank)| rank.started.clone()).collect();
        assert_eq!(secrets.len(), 1, "ranks of {group:?} do not know each other");
        let begun = if first.resume { self.saved.get(&group.0).map_or(0, |(_, step)| *step) } else { 0 };
        let mut step = *self.groups.entry(group.clone()).or_insert(begun);
        let stops = alive.iter().any(|(_, _, rank)| rank.stop);
        if !stops && step < STEPS {
            step += 1;
            self.groups.insert(group.clone(), step);
            self.told.entry(group.0.clone()).or_default().push((group.1, step));
            self.say(&alive, rank_event::Body::Step(StepDone { step, ..StepDone::default() }));
        }
        if (stops || step == STEPS || step.is_multiple_of(SAVE_EVERY)) && !self.save(group, step) {
            for (index, rank, held) in &alive {
                self.end_rank(*index, &held.task, *rank, failed(FailureKind::Unspecified, true), 1);
            }
            return;
        }
        if stops || step == STEPS || step.is_multiple_of(SAVE_EVERY) {
            self.say(&alive, rank_event::Body::Saved(Saved { step, ..Saved::default() }));
        }
        if step == STEPS || stops {
            let outcome = if step == STEPS {
                self.trained.insert(group.0.clone());
                rank_done::Outcome::Finished(Finished {})
            } else {
                rank_done::Outcome::StoppedAtStep(step)
            };
            for (index, rank, held) in &alive {
                self.end_rank(*index, &held.task, *rank, outcome.clone(), 0);
            }
        }
    }

    /// Writes a checkpoint, unless a newer attempt has begun.
    fn save(&mut self, group: &Group, step: u64) -> bool {
        let (job, attempt, _) = group;
        if self.opened.get(job).is_some_and(|newest| newest > attempt) {
            return false;
        }
        let before = self.saved.insert(job.clone(), (*attempt, step)).unwrap_or_default();
        assert!(before.0 <= *attempt, "{job}: a{attempt} writes after a{}", before.0);
        assert!(before.1 <= step, "{job}: step {step} is written after step {}", before.1);
        true
    }

    fn say(&mut self, alive: &[(usize, u32, super::daemon::Rank)], body: rank_event::Body) {
        if let Some((index, rank, held)) = alive.first() {
            self.daemons[*index].report(&held.task, *rank, body);
        }
    }

    fn end_rank(&mut self, index: usize, task: &TaskId, rank: u32, outcome: rank_done::Outcome, code: i32) {
        let daemon = &mut self.daemons[index];
        daemon.report(task, rank, rank_event::Body::Done(RankDone { outcome: Some(outcome) }));
        daemon.exit(&(group_of(task), rank), Some(code), None);
    }

    // ---------------------------------------------------------------------------------- faults

    /// A session ends with the daemon that had it, however soon another one comes.
    fn close_below(&mut self, index: usize) {
        if let Some(link) = &mut self.links[index] {
            link.closed_below = true;
        }
    }

    fn strike(&mut self) {
        let now_ms = self.now_ms;
        self.seen.faults += 1;
        let index = self.random.below(self.daemons.len() as u64) as usize;
        let name = WorkerName::from(self.daemons[index].name.as_str());
        let now = self.now();
        match self.random.below(14) {
            0..3 => self.strike_rank(index),
            3 => {
                let daemon = &mut self.daemons[index];
                daemon.alive = false;
                daemon.dials_at = now_ms + self.random.between(500, 30_000);
                self.close_below(index);
            }
            4 => {
                self.incarnations += 1;
                let forgets = self.random.chance(0.4);
                let daemon = &mut self.daemons[index];
                daemon.die(forgets, self.incarnations);
                daemon.dials_at = now_ms + self.random.between(1000, 120_000);
                self.close_below(index);
            }
            5..7 => {
                let seconds = if self.random.chance(0.1) { 400 } else { self.random.between(1, 40) };
                self.daemons[index].cut_off_until = now_ms + seconds * SECOND_MS;
            }
            7..9 => {
                if let Some(link) = &mut self.links[index] {
                    if self.random.chance(0.5) { link.closed_above = true } else { link.closed_below = true }
                }
            }
            9 => self.stop_coordinator(),
            10 => {
                let preempt = self.random.chance(0.5);
                if let Some(fleet) = &mut self.fleet {
                    let _ = fleet.drain(&name, preempt, now);
                }
            }
            11 => {
                if let Some(fleet) = &mut self.fleet {
                    let _ = fleet.undrain(&name);
                }
            }
            12 => self.people_interfere(),
            _ => self.leave(index),
        }
        self.settle();
    }

    fn strike_rank(&mut self, index: usize) {
        let keys: Vec<_> = self.daemons[index].running().map(|(key, _)| key.clone()).collect();
        let Some(key) = self.random.pick(&keys).cloned() else { return };
        if self.random.chance(0.1) {
            let task = self.daemons[index].ranks[&key].task.clone();
            self.end_rank(index, &task, key.1, failed(FailureKind::OutOfMemory, false), 1);
        } else {
            self.daemons[index].exit(&key, None, Some(9));
        }
    }

    fn people_interfere(&mut self) {
        let now = self.now();
        let choice = self.random.below(4);
        let grace = Duration::from_secs(self.random.below(20));
        let Some(fleet) = &mut self.fleet else { return };
        let ids: Vec<JobId> = fleet.jobs().map(|(id, _)| id.clone()).collect();
        let Some(id) = self.random.pick(&ids) else { return };
        let active = fleet.job(id).is_some_and(|entry| entry.is_active());
        let _ = match choice {
            0 => fleet.cancel(id, grace, now),
            1 => fleet.suspend(id, grace, now),
            _ if !active => fleet.resume(id, 0, now).map(|_| ()),
            _ => Ok(()),
        };
        if fleet.job(id).is_some_and(|entry| entry.is_active()) {
            self.ended.remove(id);
        }
    }

    /// The daemon is told to end: its ranks save and stop, and it comes back later.
    fn leave(&mut self, index: usize) {
        let daemon = &mut self.daemons[index];
        let Some(link) =
            self.links[index].as_mut().filter(|link| daemon.alive && daemon.epoch == link.epoch.0)
        else {
            return;
        };
        daemon.ranks.values_mut().for_each(|rank| rank.stop = true);
        daemon.has_left = true;
        let body = Some(worker_message::Body::Leaving(Leaving { reason: "SIGTERM".to_owned() }));
        link.send_up(self.now_ms, &mut self.random, WorkerMessage { body, epoch: daemon.epoch, sequence: 0 });
    }

    fn heal(&mut self) {
        self.healing = true;
        let now = self.now();
        for daemon in &mut self.daemons {
            daemon.cut_off_until = 0;
            daemon.dials_at = daemon.dials_at.min(self.now_ms);
        }
        // Who has left is started again; with the others the sessions simply go on.
        for (daemon, link) in self.daemons.iter_mut().zip(&mut self.links) {
            if let Some(link) = link.as_mut().filter(|_| std::mem::take(&mut daemon.has_left)) {
                link.closed_below = true;
            }
        }
        self.coordinator_up_at = self.coordinator_up_at.min(self.now_ms);
        self.run_coordinator();
        let names: Vec<_> =
            self.daemons.iter().map(|daemon| WorkerName::from(daemon.name.as_str())).collect();
        if let Some(fleet) = &mut self.fleet {
            let suspended: Vec<JobId> = fleet
                .jobs()
                .filter(|(_, entry)| entry.state() == JobState::Suspended)
                .map(|(id, _)| id.clone())
                .collect();
            for id in suspended {
                fleet.resume(&id, 0, now).unwrap();
            }
            for name in names {
                let drained =
                    fleet.worker_status(&name, now).is_ok_and(|worker| worker.detail.contains("drained"));
                if drained {
                    fleet.undrain(&name).unwrap();
                }
            }
        }
        self.settle();
    }

    // ------------------------------------------------------------------------------ what holds

    fn check(&mut self) {
        let Some(fleet) = &self.fleet else { return };
        for (id, entry) in fleet.jobs() {
            let state = entry.state();
            let now = (entry.record.attempt.0, state);
            if let Some(before) = self.ended.get(id) {
                assert!(
                    *before == now || before.0 < now.0,
                    "{id} was {before:?} and is {now:?}: an end absorbs"
                );
            }
            if state.is_end() {
                self.ended.insert(id.clone(), now);
            }
            assert!(
                entry.attempts.iter().filter(|row| row.ended_unix_ms == 0).count() <= 1,
                "{id}: one live attempt"
            );
            if !entry.is_active() {
                assert!(entry.record.slots.is_empty(), "{id} has ended and holds slots");
            }
        }
    }

    fn is_over(&self) -> bool {
        let Some(fleet) = &self.fleet else { return false };
        self.to_submit.is_empty()
            && fleet.active().next().is_none()
            && self.daemons.iter().all(|daemon| daemon.running().next().is_none() && !daemon.has_outbox())
    }

    fn check_history(&mut self) {
        let fleet = self.fleet.as_ref().unwrap();
        for (id, entry) in fleet.jobs() {
            self.seen.jobs += 1;
            self.seen.attempts += u64::from(entry.record.attempt.0);
            self.seen.completed += u64::from(entry.state() == JobState::Completed);
            let events = self.store.events(id, 0, usize::MAX).unwrap();
            let numbers: Vec<u64> = events.iter().map(|event| event.sequence).collect();
            assert_eq!(
                numbers,
                (1..=entry.record.sequence).collect::<Vec<_>>(),
                "{id}: events without a gap"
            );
            let steps: Vec<(u32, u64)> = events
                .iter()
                .filter_map(|event| match &event.body {
                    Some(Body::Step(step)) => Some((event.attempt, step.step)),
                    _ => None,
                })
                .collect();
            let told = self.told.get(&id.0).cloned().unwrap_or_default();
            let distinct: BTreeSet<_> = steps.iter().copied().collect();
            assert_eq!(distinct.len(), steps.len(), "{id}: a step is told once an attempt");
            assert!(distinct.iter().all(|step| told.contains(step)), "{id}: a step that nobody made");
            if self.plan.faults == 0.0 {
                assert_eq!(steps, told, "{id}: every step that was made is kept");
                assert_eq!(entry.state(), JobState::Completed, "{id}");
                assert_eq!(entry.record.attempt, Attempt(1), "{id}: nothing was started again");
            }
        }
    }

    fn describe(&self) -> String {
        let mut text = format!("at {} s; ", self.now_ms / SECOND_MS);
        let Some(fleet) = &self.fleet else { return text + "the coordinator is down" };
        for (id, entry) in fleet.active() {
            let job = serde_json::to_string(&entry.record).unwrap();
            text += &format!("\n{id} is {}: {job}", entry.state().name());
        }
        for (daemon, link) in self.daemons.iter().zip(&self.links) {
            let ranks: Vec<_> = daemon.ranks.iter().collect();
            let linked = link.as_ref().map(|link| (link.epoch, link.closed_above, link.closed_below));
            text += &format!("\n{} alive {} link {linked:?} {ranks:?}", daemon.name, daemon.alive);
        }
        text
    }
}

fn failed(kind: FailureKind, consequence: bool) -> rank_done::Outcome {
    let message = "failed".to_owned();
    rank_done::Outcome::Failed(RankFailed { message, consequence, kind: kind.into() })
}

pub fn spec(index: usize, ranks: u64, priority: u64) -> JobSpec {
    let text = format!(
        "name: job-{index}\npriority: {priority}\noutput: out\ndataset: .\ntokenizer: {{path: .}}\nmodel: {{path: .}}\n\
         export: {{enabled: false}}\nrestart: {{max_restarts: 1000, max_attempts_without_progress: 1000, \
         stop_grace_seconds: 30}}\n\
         train: {{ranks: {ranks}, device: cpu, precision: fp32, steps: {STEPS}, eval_every_steps: 0}}\n"
    );
    let dir = std::path::Path::new("/sim");
    job::load(&dir.join("job.yaml"), &text, &[], dir).unwrap()
}
