//! What the plane counts and traces of the events that it shows, and what it adds to the fleet's figures.

use std::collections::BTreeMap;

use tunefleet_proto::ids::JobId;
use tunefleet_proto::rpc::job_event::Body;
use tunefleet_proto::rpc::{JobEvent, JobState, Stage};

use super::entry::Entry;
use super::figures::Figures;
use super::fleet::Fleet;
use super::output;
use super::store::{History, StoreError};
use crate::metrics;
use crate::traces::{self, Tracer};

/// Events that are read at once.
const PAGE: usize = 512;

/// Of all jobs.
pub struct Telemetry {
    /// The attempt of each job that made a step last.
    stepped: BTreeMap<JobId, u32>,
    /// What a token of training costs, once the model's shape is there.
    flops_per_token: BTreeMap<JobId, f64>,
    tracer: Tracer,
}

impl Telemetry {
    /// Goes on with the jobs that `fleet` goes on with.
    ///
    /// # Errors
    /// When their events cannot be read.
    pub fn new(fleet: &Fleet, history: &dyn History) -> Result<Self, StoreError> {
        let tracer = Tracer::new(fleet.identity().0);
        let mut telemetry = Telemetry { stepped: BTreeMap::new(), flops_per_token: BTreeMap::new(), tracer };
        for (id, entry) in fleet.active() {
            telemetry.count_flops(id, entry);
            if traces::are_wanted() {
                telemetry.retrace(id, entry.record.sequence, history)?;
            }
        }
        Ok(telemetry)
    }

    /// An event that is kept; `entry` is the job after it.
    pub fn saw(&mut self, id: &JobId, entry: &Entry, event: &JobEvent) {
        self.observe(id, entry, event);
        if traces::are_wanted() {
            traces::export(self.tracer.take(event));
        }
    }

    /// Durations that only their ends tell.
    fn observe(&mut self, id: &JobId, entry: &Entry, event: &JobEvent) {
        let since = |began_unix_ms: u64| event.unix_ms.saturating_sub(began_unix_ms) as f64 / 1000.0;
        match &event.body {
            Some(Body::Saved(saved)) => metrics::checkpoint_paused(saved.pause_seconds),
            Some(Body::AttemptEnded(_)) => metrics::failure_detected(since(entry.record.progress_unix_ms)),
            Some(Body::Step(_)) if self.stepped.insert(id.clone(), event.attempt) != Some(event.attempt) => {
                let before = entry.attempts.iter().rev().find(|row| row.attempt.0 < event.attempt);
                if let Some(before) = before.filter(|row| row.state == JobState::Failed) {
                    metrics::restarted(since(before.ended_unix_ms));
                }
            }
            Some(Body::Stage(changed)) if changed.stage() == Stage::Train => self.count_flops(id, entry),
            _ => {}
        }
    }

    fn count_flops(&mut self, id: &JobId, entry: &Entry) {
        if let Some(flops) = output::model_flops_per_token(&entry.spec) {
            self.flops_per_token.insert(id.clone(), flops);
        }
    }

    /// Brings the tracer to where a job is: what has ended was told by a coordinator before this one.
    fn retrace(&mut self, id: &JobId, newest: u64, history: &dyn History) -> Result<(), StoreError> {
        let mut after = 0;
        while after < newest {
            let events = history.events(id, after, PAGE)?;
            let Some(last) = events.last() else { break };
            after = last.sequence;
            events.iter().for_each(|event| drop(self.tracer.take(event)));
        }
        Ok(())
    }

    /// What only this knows of the jobs in `figures`.
    pub fn complete(&self, figures: &mut Figures) {
        for job in &mut figures.jobs {
            job.model_flops_per_token = self.flops_per_token.get(&JobId(job.status.job.clone())).copied();
        }
    }

    /// A job is not kept any more.
    pub fn forget(&mut self, id: &JobId) {
        self.stepped.remove(id);
        self.flops_per_token.remove(id);
    }
}
