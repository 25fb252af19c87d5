//! What follows from nothing having happened: silence, patience that is over, pauses that end.

use std::time::Duration;

use tunefleet_proto::ids::JobId;
use tunefleet_proto::rpc::{Stage, WorkerState};

use super::{Action, Fleet};
use crate::control::budget::Overdue;
use crate::control::entry::{Entry, Intent, Life};
use crate::control::job::Input;
use crate::control::placement::WorkerName;
use crate::control::settings::Now;
use crate::control::store::Write;

/// Between two looks for what has ended long ago.
const FORGETS_EVERY: Duration = Duration::from_secs(3600);

impl Fleet {
    /// Time has passed.
    pub fn tick(&mut self, now: Now) {
        self.look_at_workers(now);
        let ids: Vec<JobId> = self.active().map(|(id, _)| id.clone()).collect();
        for id in ids {
            self.look_at(&id, now);
        }
        if now.uptime >= self.forgets_at {
            self.forgets_at = now.uptime + FORGETS_EVERY;
            self.forget(now);
        }
    }

    /// What has ended long ago is not kept any more; directories of jobs are left alone.
    fn forget(&mut self, now: Now) {
        let before_unix_ms = now.unix_ms.saturating_sub(self.settings.keep_ended.as_millis() as u64);
        let is_old = |(_, entry): &(&JobId, &Entry)| {
            let ended = entry.attempts.last().map_or(0, |last| last.ended_unix_ms);
            entry.state().is_end() && !entry.is_active() && ended > 0 && ended < before_unix_ms
        };
        let old: Vec<JobId> = self.jobs.iter().filter(is_old).map(|(id, _)| id.clone()).collect();
        for id in old {
            tracing::info!("job {id} ended long ago: it is forgotten");
            self.jobs.remove(&id);
            self.touched.remove(&id);
            self.out.writes.push(Write::Forget(id.clone()));
            self.out.actions.push(Action::Forgotten(id));
        }
        self.out.writes.push(Write::ForgetAudit { before_unix_ms });
    }

    /// The time until now was not seen: what workers said meanwhile has not been read yet.
    pub fn excuse(&mut self, now: Now) {
        self.workers.values_mut().for_each(|worker| worker.heard(now));
        self.jobs.values_mut().for_each(|entry| entry.seen.clear());
    }

    fn look_at_workers(&mut self, now: Now) {
        let states: Vec<(WorkerName, WorkerState)> = self
            .workers
            .iter()
            .filter(|(_, worker)| worker.silence(now) >= self.settings.suspect_after)
            .map(|(name, worker)| (name.clone(), worker.state(&self.settings, now)))
            .collect();
        for (name, state) in states {
            if self.workers.get(&name).is_some_and(|worker| worker.shown != state) {
                self.show_worker(&name, state, now);
                self.may_place = true;
            }
            let give_up = |worker: &crate::control::workers::Worker| {
                !worker.given_up && worker.silence(now) >= self.settings.give_up_after
            };
            if self.workers.get(&name).is_some_and(give_up) {
                if let Some(worker) = self.workers.get_mut(&name) {
                    worker.given_up = true;
                }
                tracing::warn!("worker {name} is given up: its ranks count as gone");
                self.lose(&name, now);
            } else if state == WorkerState::Lost {
                self.give_up_with_peers(&name, now);
            }
        }
    }

    /// Ranks of a lost worker whose peers have all ended, because one of them failed, have ended as well
    /// or will: no step can be made without the others.
    fn give_up_with_peers(&mut self, name: &WorkerName, now: Now) {
        for id in self.jobs_on(name) {
            let Some(task) = self.jobs.get(&id).and_then(|entry| entry.record.job.task()) else { continue };
            let lost = |worker: &WorkerName| {
                self.workers
                    .get(worker)
                    .is_none_or(|worker| worker.state(&self.settings, now) == WorkerState::Lost)
            };
            let had_peers = task.placed().iter().any(|worker| worker != name);
            if task.is_failing() && had_peers && task.workers().iter().all(lost) {
                self.apply(&id, Input::WorkerLost(name.clone()), now);
            }
        }
    }

    fn look_at(&mut self, id: &JobId, now: Now) {
        let Some(entry) = self.jobs.get_mut(id) else { return };
        let record = &entry.record;
        match record.life {
            Life::Pausing { until_unix_ms } if until_unix_ms <= now.unix_ms => {
                return self.begin_again(id, now);
            }
            Life::Live | Life::Pausing { .. } => {}
            Life::Suspended | Life::Ended(_) => return,
        }
        let deadline = entry
            .spec
            .deadline_seconds
            .map(|seconds| record.submitted_unix_ms.saturating_add(seconds.saturating_mul(1000)));
        let is_late = deadline.is_some_and(|deadline| deadline <= now.unix_ms);
        let grace = Duration::from_secs(entry.spec.restart.stop_grace_seconds);
        let is_over = record.stop_by_unix_ms.is_some_and(|by| by <= now.unix_ms);
        let intent = record.intent;
        let answers_over = entry.answers_until.take_if(|until| *until <= now.uptime).is_some();
        let stage = entry.record.job.stage();
        if is_late && intent < Intent::Deadline {
            self.stop(id, Intent::Deadline, grace, now);
        }
        if is_over {
            if let Some(entry) = self.jobs.get_mut(id) {
                entry.record.stop_by_unix_ms = None;
            }
            self.apply(id, Input::GraceOver, now);
        }
        if answers_over {
            self.apply(id, Input::AnswersOver(stage), now);
        }
        self.look_for_hangs(id, now);
    }

    fn look_for_hangs(&mut self, id: &JobId, now: Now) {
        let Some(entry) = self.jobs.get(id) else { return };
        let Some(task) = entry.record.job.task().filter(|task| task.stage() == Stage::Train) else { return };
        // What a worker that is not heard of has not said is not known.
        let heard = |rank: u32| {
            let worker = task.placed().get(rank as usize).and_then(|name| self.workers.get(name)).cloned();
            worker.is_some_and(|worker| worker.silence(now) < self.settings.suspect_after)
        };
        let beats = entry.seen.iter().filter(|(rank, _)| heard(**rank)).map(|(rank, seen)| {
            let age = now.uptime.saturating_sub(seen.at).as_secs_f64();
            (*rank, seen.step, seen.section.as_str(), seen.seconds + age)
        });
        let Some(overdue) = entry.record.budget.overdue(&entry.spec.restart, beats) else { return };
        let Overdue { rank, .. } = overdue;
        let words = overdue.to_string();
        self.apply(id, Input::Overdue { stage: Stage::Train, rank, words }, now);
    }
}
