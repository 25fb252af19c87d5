//! What people ask for, and what becomes of attempts.

use std::collections::BTreeMap;
use std::time::Duration;

use tunefleet_proto::ids::{Attempt, JobId};
use tunefleet_proto::job::JobSpec;
use tunefleet_proto::rpc::coordinator_message::Body as Command;
use tunefleet_proto::rpc::job_event::Body;
use tunefleet_proto::rpc::{
    Abort, AttemptEnded, Continuation, Failure, FailureKind, JobState, ReportCollectives, Stage, StartRanks,
    StateChanged, StopAtCheckpoint, Waiting,
};

use super::{Action, Fleet, Refused, Start, Work, task_id};
use crate::control::entry::{Ended, Entry, Intent, Life, cause_of};
use crate::control::job::{Effect, End, Input, Job};
use crate::control::placement::{Room, WorkerName};
use crate::control::queue;
use crate::control::restart;
use crate::control::settings::Now;
use crate::control::store::Write;

/// How long ranks may take to tell where they are among their collectives.
const ANSWER_LIMIT: Duration = Duration::from_secs(2);

/// A server that has run for so long before it failed is not one that cannot run.
const SETTLED_SECONDS: u64 = 600;

/// A job that is submitted.
pub struct Submission {
    pub spec: JobSpec,
    pub spec_json: String,
    pub continuation: Continuation,
    /// Chosen by the caller; empty when it never asks twice.
    pub request: String,
    /// The attempt is numbered higher: there are logs of so many in the output directory.
    pub earlier: u32,
}

impl Fleet {
    pub(super) fn known(&self, id: &JobId) -> Result<&Entry, Refused> {
        self.jobs.get(id).ok_or_else(|| Refused::NotFound(format!("there is no job {id}")))
    }

    /// The attempt that this very request has begun already.
    pub fn submitted_before(&self, id: &JobId, request: &str) -> Option<Attempt> {
        let entry = self.jobs.get(id)?;
        (!request.is_empty() && entry.record.request == request).then_some(entry.record.attempt)
    }

    /// Whether a job of this name may be submitted.
    ///
    /// # Errors
    /// When one is active.
    pub fn may_submit(&self, id: &JobId) -> Result<(), Refused> {
        match self.jobs.get(id).filter(|entry| entry.is_active()) {
            Some(active) => {
                let state = active.state().name();
                let hint = "cancel it first, or submit under another name";
                Err(Refused::Exists(format!("job {id} is {state}: {hint}")))
            }
            None => Ok(()),
        }
    }

    /// Takes a job up.
    ///
    /// # Errors
    /// When one of this name is active.
    pub fn submit(&mut self, submission: Submission, now: Now) -> Result<Attempt, Refused> {
        let Submission { spec, spec_json, continuation, request, earlier } = submission;
        let id = JobId(spec.name.clone());
        self.may_submit(&id)?;
        let known = self.jobs.remove(&id);
        let before = known.as_ref().map_or(0, |known| known.record.attempt.0).max(earlier);
        let attempt = Attempt(before.saturating_add(1));
        let mut entry = Entry::new(spec, spec_json, continuation, attempt, now);
        entry.record.request = request;
        if let Some(known) = known {
            entry.record.sequence = known.record.sequence;
            entry.attempts = known.attempts;
            if continuation == Continuation::Resume {
                entry.record.saved_step = known.record.saved_step;
                entry.record.saved_before = known.record.saved_step;
                entry.record.saved_unix_ms = known.record.saved_unix_ms;
                entry.record.account = known.record.account;
                entry.record.furthest_step = known.record.furthest_step;
                entry.record.budget = known.record.budget;
            }
        }
        self.jobs.insert(id.clone(), entry);
        self.begin(&id, now);
        Ok(attempt)
    }

    /// The next attempt of a job that is suspended or has ended.
    ///
    /// # Errors
    /// When there is none of that name, or it is active.
    pub fn resume(&mut self, id: &JobId, earlier: u32, now: Now) -> Result<Attempt, Refused> {
        let entry = self.known(id)?;
        let submission = Submission {
            spec: (*entry.spec).clone(),
            spec_json: entry.spec_json().to_owned(),
            continuation: Continuation::Resume,
            request: String::new(),
            earlier,
        };
        self.submit(submission, now)
    }

    /// Ends a job: with a checkpoint when `grace` is above 0, at once after that.
    ///
    /// # Errors
    /// When there is none of that name.
    pub fn cancel(&mut self, id: &JobId, grace: Duration, now: Now) -> Result<(), Refused> {
        self.known(id)?;
        self.stop(id, Intent::Stop, grace, now);
        Ok(())
    }

    /// Stops a job with a checkpoint until it is resumed.
    ///
    /// # Errors
    /// When there is none of that name, or it is not active.
    pub fn suspend(&mut self, id: &JobId, grace: Duration, now: Now) -> Result<(), Refused> {
        let entry = self.known(id)?;
        if !entry.is_active() {
            return Err(Refused::NotNow(format!("job {id} is {}", entry.state().name())));
        }
        self.stop(id, Intent::Suspend, grace, now);
        Ok(())
    }

    /// Stops the live attempt, or what would follow it, because of `intent`.
    pub(super) fn stop(&mut self, id: &JobId, intent: Intent, grace: Duration, now: Now) {
        let Some(entry) = self.jobs.get_mut(id) else { return };
        if matches!(entry.record.life, Life::Ended(_)) {
            return;
        }
        entry.record.intent = entry.record.intent.max(intent);
        self.touched.insert(id.clone());
        match entry.record.life {
            Life::Live => {
                let checkpoint = !grace.is_zero();
                if checkpoint {
                    let by = now.unix_after(grace);
                    let earlier = entry.record.stop_by_unix_ms.unwrap_or(u64::MAX);
                    entry.record.stop_by_unix_ms = Some(by.min(earlier));
                }
                self.apply(id, Input::Stop { checkpoint }, now);
            }
            Life::Pausing { .. } | Life::Suspended | Life::Ended(_) => self.settle(id, now),
        }
    }

    // -------------------------------------------------------------------------------- attempts

    /// Begins the attempt that the record names.
    fn begin(&mut self, id: &JobId, now: Now) {
        let Some(entry) = self.jobs.get_mut(id) else { return };
        let record = &mut entry.record;
        record.life = Life::Live;
        record.intent = Intent::None;
        record.stop_by_unix_ms = None;
        record.saved_before = record.saved_step;
        record.job = Job::new(entry.spec.train.ranks, entry.spec.train.steps);
        record.detail.clear();
        record.budget.forget_ranks();
        entry.seen.clear();
        let row = entry.attempt_row(id, now);
        entry.attempts.push(row.clone());
        self.out.writes.push(Write::Attempt(row));
        self.out.actions.push(Action::Opened(id.clone(), entry.record.attempt));
        self.apply(id, Input::Begin, now);
    }

    /// Begins the next attempt of a job whose last one has failed.
    pub(super) fn begin_again(&mut self, id: &JobId, now: Now) {
        let Some(entry) = self.jobs.get_mut(id) else { return };
        entry.record.attempt = Attempt(entry.record.attempt.0.saturating_add(1));
        entry.record.continuation = Continuation::Resume;
        self.begin(id, now);
    }

    /// Work outside that was under way when the control plane ended.
    pub(super) fn ask_again(&mut self) {
        let mut asked = Vec::new();
        for (id, entry) in &self.jobs {
            if entry.record.life == Life::Live {
                asked.extend(entry.record.job.asked_again().into_iter().map(|effect| (id.clone(), effect)));
            }
        }
        for (id, effect) in asked {
            self.carry_out(&id, effect, Now::default());
        }
    }

    /// Hands a job's live attempt a fact.
    pub fn apply(&mut self, id: &JobId, input: Input, now: Now) {
        let Some(entry) = self.jobs.get_mut(id) else { return };
        if entry.record.life != Life::Live {
            return;
        }
        self.touched.insert(id.clone());
        match entry.record.job.apply(input) {
            Ok(effects) => effects.into_iter().for_each(|effect| self.carry_out(id, effect, now)),
            Err(stale) => tracing::debug!("job {id}: {stale}"),
        }
        let Some(entry) = self.jobs.get(id) else { return };
        if entry.record.life == Life::Live && entry.record.job.end().is_some() {
            self.attempt_ended(id, now);
        }
        if self.jobs.get(id).is_some_and(|entry| entry.record.job.waiting().is_some()) {
            self.may_place = true;
        }
    }

    /// An input of work outside, or a timer, for the attempt that asked for it.
    pub fn happened(&mut self, id: &JobId, attempt: Attempt, input: Input, now: Now) {
        if self.jobs.get(id).is_some_and(|entry| entry.record.attempt == attempt) {
            self.apply(id, input, now);
        }
    }

    pub(super) fn tell(&mut self, id: &JobId, body: Body, now: Now) {
        let Some(entry) = self.jobs.get_mut(id) else { return };
        let event = entry.event(id, body, now);
        self.touched.insert(id.clone());
        self.out.writes.push(Write::Event(event.clone()));
        self.out.actions.push(Action::Show(id.clone(), event));
    }

    pub(super) fn carry_out(&mut self, id: &JobId, effect: Effect, now: Now) {
        let Some(entry) = self.jobs.get_mut(id) else { return };
        let attempt = entry.record.attempt;
        let continuation = entry.record.continuation;
        let task = |stage: Stage| Some(task_id(id, entry, stage));
        match effect {
            Effect::Tell(body) => self.tell(id, body, now),
            Effect::Inspect(stage) => self.work(id, attempt, Work::Inspect(stage, continuation)),
            Effect::Collect => self.work(id, attempt, Work::Collect),
            Effect::Record(stage) => self.work(id, attempt, Work::Record(stage)),
            Effect::Place(_) => self.may_place = true,
            Effect::StartOn { stage, worker, ranks, resume } => {
                let (world, cuda) = (entry.record.job.world(stage), entry.record.cuda);
                let start = Start { task: task_id(id, entry, stage), ranks, world, resume, cuda };
                if let Some(session) = self.workers.get(&worker).and_then(|worker| worker.session) {
                    self.out.actions.push(Action::Start(worker, session, start));
                }
            }
            Effect::StartRanks { stage, workers, peers, secret } => {
                let start = StartRanks { task: task(stage), peers, secret };
                self.send_all(workers, &Command::StartRanks(start));
            }
            Effect::StopAtCheckpoint { stage, workers } => {
                let stop = StopAtCheckpoint { task: task(stage) };
                self.send_all(workers, &Command::StopAtCheckpoint(stop));
            }
            Effect::ReportCollectives { stage, workers } => {
                let ask = ReportCollectives { task: task(stage) };
                entry.answers_until = Some(now.uptime + ANSWER_LIMIT);
                self.send_all(workers, &Command::ReportCollectives(ask));
            }
            Effect::Abort { stage, workers, reason, by_peer } => {
                let abort = Abort { task: task(stage), reason, by_peer };
                self.send_all(workers, &Command::Abort(abort));
            }
            Effect::Release => {
                entry.record.slots.clear();
                entry.seen.clear();
                self.may_place = true;
            }
        }
    }

    fn work(&mut self, id: &JobId, attempt: Attempt, work: Work) {
        self.out.actions.push(Action::Work(id.clone(), attempt, work));
    }

    fn send_all(&mut self, workers: impl IntoIterator<Item = WorkerName>, command: &Command) {
        for worker in workers {
            self.send(&worker, command.clone());
        }
    }

    /// Says what a job waits for, when that has changed.
    pub(super) fn wait(
        &mut self,
        id: &JobId,
        item: &queue::Waiting,
        rooms: &BTreeMap<WorkerName, Room>,
        now: Now,
    ) {
        let usable: Vec<&Room> = rooms.values().filter(|room| room.has_gpu || !item.needs_gpu).collect();
        let waiting = Waiting {
            needed: item.world,
            free: usable.iter().map(|room| room.free).sum(),
            total: usable.iter().map(|room| room.total).sum(),
            workers: rooms.len() as u32,
            needs_gpu: item.needs_gpu,
        };
        let Some(entry) = self.jobs.get_mut(id) else { return };
        if entry.waiting != Some(waiting) {
            entry.waiting = Some(waiting);
            entry.record.detail = format!("waits for {} slots, {} are free", waiting.needed, waiting.free);
            self.tell(id, Body::Waiting(waiting), now);
        }
    }

    // ------------------------------------------------------------------------------------ ends

    /// The last rank of an attempt is gone, or nothing of it ever ran.
    fn attempt_ended(&mut self, id: &JobId, now: Now) {
        let Some(entry) = self.jobs.get_mut(id) else { return };
        let row = entry.attempt_row(id, now);
        if let Some(last) = entry.attempts.last_mut() {
            last.clone_from(&row);
        }
        self.out.writes.push(Write::Attempt(row));
        let intent = entry.record.intent;
        match (entry.record.job.end().cloned(), intent) {
            (Some(End::Completed), _) => self.close(id, Ended::Completed, None, now),
            (Some(End::Failed(failure)), Intent::Preempt | Intent::None) => self.failed(id, failure, now),
            (Some(End::Failed(failure)), _) => self.close(id, Ended::Failed, Some(failure), now),
            (Some(End::Stopped(_) | End::Cancelled), Intent::Preempt | Intent::None) => {
                let cause = "its machine is being taken away, or a person ended a rank".to_owned();
                let kind = FailureKind::Preempted.into();
                self.failed(
                    id,
                    Failure { stage: Stage::Train.into(), cause, kind, ..Failure::default() },
                    now,
                );
            }
            (Some(End::Stopped(_) | End::Cancelled), _) => self.settle(id, now),
            (None, _) => {}
        }
    }

    /// Nothing runs any more, as somebody wanted.
    fn settle(&mut self, id: &JobId, now: Now) {
        let Some(entry) = self.jobs.get(id) else { return };
        let stopped = matches!(entry.record.job.end(), Some(End::Stopped(_)));
        let kept = stopped || (entry.record.life != Life::Live && entry.record.saved_step > 0);
        match entry.record.intent {
            Intent::Suspend => {
                let step = entry.record.saved_step;
                if let Some(entry) = self.jobs.get_mut(id) {
                    entry.record.life = Life::Suspended;
                    entry.record.detail = "until it is resumed".to_owned();
                }
                let state = JobState::Suspended.into();
                self.tell(id, Body::State(StateChanged { state, failure: None, step }), now);
                self.out.actions.push(Action::Closed(id.clone()));
            }
            Intent::Deadline => {
                let seconds = entry.spec.deadline_seconds.unwrap_or(0);
                let saved = if kept { "; its last checkpoint is kept" } else { "" };
                let cause = format!(
                    "the deadline of {seconds} s has passed{saved}: raise deadline_seconds and resume it"
                );
                let failure = Failure {
                    stage: entry.record.job.stage().into(),
                    cause,
                    kind: FailureKind::Deadline.into(),
                    ..Failure::default()
                };
                self.close(id, Ended::Failed, Some(failure), now);
            }
            _ if kept => self.close(id, Ended::Stopped, None, now),
            _ => self.close(id, Ended::Cancelled, None, now),
        }
    }

    /// An attempt has failed: another follows, or the job has failed.
    fn failed(&mut self, id: &JobId, mut failure: Failure, now: Now) {
        let Some(entry) = self.jobs.get(id) else { return };
        let blamed = WorkerName::from(failure.worker.as_str());
        let leaves = |worker: &WorkerName| self.workers.get(worker).is_some_and(|w| w.leaving);
        if entry.record.intent == Intent::Preempt && !restart::is_final(failure.kind()) && leaves(&blamed) {
            failure.kind = FailureKind::Preempted.into();
        }
        let Some(entry) = self.jobs.get_mut(id) else { return };
        if let Some(row) = entry.attempts.last_mut() {
            row.kind = failure.kind();
            self.out.writes.push(Write::Attempt(row.clone()));
        }
        let record = &mut entry.record;
        let stage_seconds = now.unix_ms.saturating_sub(record.stage_began_unix_ms) / 1000;
        if failure.stage() == Stage::Serve && stage_seconds >= SETTLED_SECONDS {
            record.restarts.forget();
        }
        let decision = record.restarts.decide(
            &entry.spec.restart,
            &restart::Failed {
                kind: failure.kind(),
                worker: (!failure.worker.is_empty()).then_some(&blamed),
                progressed: record.saved_step > record.saved_before,
            },
        );
        record.detail = format!("{}; {}", cause_of(&failure), decision.words);
        let ended = AttemptEnded {
            failure: Some(failure.clone()),
            restarts: decision.restarts,
            restart_delay_ms: decision.delay.as_millis() as u64,
            restarts_left: decision.left,
            counted: decision.counted,
            decision: decision.words,
        };
        if decision.restarts {
            record.life = Life::Pausing { until_unix_ms: now.unix_after(decision.delay) };
            self.tell(id, Body::AttemptEnded(ended), now);
            let state = JobState::Restarting.into();
            self.tell(id, Body::State(StateChanged { state, failure: None, step: 0 }), now);
        } else {
            self.tell(id, Body::AttemptEnded(ended), now);
            self.close(id, Ended::Failed, Some(failure), now);
        }
    }

    fn close(&mut self, id: &JobId, ended: Ended, failure: Option<Failure>, now: Now) {
        let Some(entry) = self.jobs.get_mut(id) else { return };
        let record = &mut entry.record;
        record.life = Life::Ended(ended);
        let step = match record.job.end() {
            Some(End::Stopped(step)) => *step,
            _ if ended == Ended::Stopped => record.saved_step,
            _ => 0,
        };
        match &failure {
            Some(failure) if record.detail.is_empty() => record.detail = cause_of(failure),
            Some(_) => {}
            None => record.detail.clear(),
        }
        let state = entry.state().into();
        self.tell(id, Body::State(StateChanged { state, failure, step }), now);
        self.out.actions.push(Action::Closed(id.clone()));
    }
}
