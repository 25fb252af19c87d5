//! The ranks of one stage, from the start of their processes to the last exit; part of the state
//! machine of a job.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};
use tunefleet_proto::rpc::job_event::Body;
use tunefleet_proto::rpc::{Collectives, Failure, FailureKind, RankEnded, Stage};

use super::hang::{Hang, Verdict};
use super::job::{Effect, Stale};
use super::placement::WorkerName;
use super::rank::{Exit, Outcome, RankFailure, first_cause};

/// Why ranks are told to stop at once when a person is the reason.
pub const CANCELLED: &str = "cancelled";

/// A stage's ranks.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Task {
    stage: Stage,
    ranks: Vec<Rank>,
    /// Train from the newest checkpoint.
    resume: bool,
    /// A rank talks only to those that know it.
    secret: Vec<u8>,
    /// Whether the ranks were let go; before, there is nothing to save.
    started: bool,
    failures: Vec<RankFailure>,
    /// A collective has stalled, and ranks are being asked where they are. A question whose asker was
    /// restarted is asked again.
    #[serde(skip)]
    hang: Option<Hang>,
    /// What came of it.
    verdict: Option<Verdict>,
    /// Why the ranks were told to stop, when one of them was the reason.
    abort_reason: Option<String>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Rank {
    worker: WorkerName,
    address: Option<String>,
    outcome: Option<Outcome>,
    /// Where it was last heard of; empty before the first section.
    #[serde(skip)]
    section: String,
    exited: bool,
}

impl Task {
    /// Ranks that are about to start, each on one of `workers`.
    pub fn new(stage: Stage, workers: &[WorkerName], resume: bool, secret: Vec<u8>) -> Self {
        let rank = |worker: &WorkerName| Rank {
            worker: worker.clone(),
            address: None,
            outcome: None,
            section: String::new(),
            exited: false,
        };
        Task {
            stage,
            ranks: workers.iter().map(rank).collect(),
            resume,
            secret,
            started: false,
            failures: Vec::new(),
            hang: None,
            verdict: None,
            abort_reason: None,
        }
    }

    /// Whose task it is.
    pub fn stage(&self) -> Stage {
        self.stage
    }

    /// Whether the ranks were let go.
    pub fn is_started(&self) -> bool {
        self.started
    }

    /// Whether it can only fail.
    pub fn is_failing(&self) -> bool {
        !self.failures.is_empty() || self.verdict.is_some()
    }

    /// Whether the last rank has exited.
    pub fn is_over(&self) -> bool {
        self.ranks.iter().all(|rank| rank.exited)
    }

    /// Whether a rank may be alive on `worker`.
    pub fn runs_on(&self, worker: &WorkerName) -> bool {
        self.ranks.iter().any(|rank| rank.worker == *worker && !rank.exited)
    }

    /// Ranks of `worker` that have not exited.
    pub fn ranks_on(&self, worker: &WorkerName) -> Vec<u32> {
        let on = |rank: &Rank| rank.worker == *worker && !rank.exited;
        (0..).zip(&self.ranks).filter(|(_, rank)| on(rank)).map(|(index, _)| index).collect()
    }

    /// The worker of each rank, in rank order.
    pub fn placed(&self) -> Vec<WorkerName> {
        self.ranks.iter().map(|rank| rank.worker.clone()).collect()
    }

    /// All that should be true of the ranks on `worker`, as commands that may come twice. It holds the ranks in
    /// `held`; it was never told to start the others.
    pub fn again(&self, worker: &WorkerName, held: &BTreeSet<u32>, stopping: Option<bool>) -> Vec<Effect> {
        let here = self.ranks_on(worker);
        if here.is_empty() {
            return Vec::new();
        }
        let stage = self.stage;
        let mut effects = Vec::new();
        let missing: Vec<u32> = here.iter().copied().filter(|rank| !held.contains(rank)).collect();
        if !missing.is_empty() {
            let worker = worker.clone();
            effects.push(Effect::StartOn { stage, worker, ranks: missing, resume: self.resume });
        }
        let workers = BTreeSet::from([worker.clone()]);
        if self.started {
            effects.extend(self.start_ranks(workers.clone()));
        }
        match (&self.abort_reason, stopping) {
            (Some(reason), _) => {
                effects.push(Effect::Abort { stage, workers, reason: reason.clone(), by_peer: true });
            }
            (None, Some(false)) => {
                let reason = CANCELLED.to_owned();
                effects.push(Effect::Abort { stage, workers, reason, by_peer: false });
            }
            (None, Some(true)) => effects.push(Effect::StopAtCheckpoint { stage, workers }),
            (None, None) => {}
        }
        effects
    }

    fn start_ranks(&self, workers: BTreeSet<WorkerName>) -> Option<Effect> {
        let peers = self.ranks.iter().map(|rank| rank.address.clone()).collect::<Option<Vec<_>>>()?;
        Some(Effect::StartRanks { stage: self.stage, workers, peers, secret: self.secret.clone() })
    }

    /// Workers with ranks that have not exited.
    pub fn workers(&self) -> BTreeSet<WorkerName> {
        self.ranks.iter().filter(|rank| !rank.exited).map(|rank| rank.worker.clone()).collect()
    }

    /// Updates in the checkpoint with which the ranks stopped on request.
    pub fn stopped_at(&self) -> Option<u64> {
        self.ranks.iter().find_map(|rank| match rank.outcome {
            Some(Outcome::Stopped(step)) => Some(step),
            _ => None,
        })
    }

    /// Why it failed: the rank that others waited for, else the first that failed by itself.
    pub fn failure(&self) -> Option<Failure> {
        let mut failure = match &self.verdict {
            Some(verdict) => self.failure_of(verdict),
            None => first_cause(&self.failures)?.to_failure(self.stage),
        };
        let blamed = |rank: u32| Some(rank) == failure.rank || self.is_behind(rank);
        let consequences = self.failures.iter().filter(|failure| failure.is_consequence());
        let mut aborted: Vec<u32> =
            consequences.map(RankFailure::rank).filter(|rank| !blamed(*rank)).collect();
        aborted.sort_unstable();
        failure.aborted_ranks = aborted;
        Some(failure)
    }

    fn failure_of(&self, verdict: &Verdict) -> Failure {
        let rank = verdict.behind.first().copied();
        let worker = rank.and_then(|rank| self.ranks.get(rank as usize)).map(|rank| rank.worker.to_string());
        let exit = self.failures.iter().find(|failure| Some(failure.rank()) == rank).map(RankFailure::exit);
        Failure {
            stage: self.stage.into(),
            cause: verdict.words.clone(),
            rank,
            worker: worker.unwrap_or_default(),
            last_lines: exit.map_or_else(Vec::new, |exit| exit.last_lines.clone()),
            log_path: exit.map_or_else(String::new, |exit| exit.log_path.clone()),
            kind: FailureKind::Hang as i32,
            // How it was ended explains nothing.
            ..Failure::default()
        }
    }

    fn is_behind(&self, rank: u32) -> bool {
        self.verdict.as_ref().is_some_and(|verdict| verdict.behind.contains(&rank))
    }

    fn live_rank(&mut self, stage: Stage, rank: u32) -> Result<&mut Rank, Stale> {
        if self.stage != stage {
            return Err(Stale(format!("{} is over, {} runs", stage.name(), self.stage.name())));
        }
        match self.ranks.get_mut(rank as usize) {
            Some(found) if !found.exited => Ok(found),
            Some(_) => Err(Stale(format!("rank {rank} has exited"))),
            None => Err(Stale(format!("there is no rank {rank}"))),
        }
    }

    // ---------------------------------------------------------------------- what a rank tells

    /// A rank is ready to join its peers at `address`; when it is the last, all are let go.
    pub fn ready(&mut self, stage: Stage, rank: u32, address: String) -> Result<Vec<Effect>, Stale> {
        let found = self.live_rank(stage, rank)?;
        if found.address.is_some() {
            return Err(Stale(format!("rank {rank} was ready before")));
        }
        found.address = Some(address);
        if self.ranks.iter().any(|rank| rank.exited) {
            return Ok(Vec::new());
        }
        let Some(start) = self.start_ranks(self.workers()) else { return Ok(Vec::new()) };
        self.started = true;
        Ok(vec![start])
    }

    /// A rank entered a section of the training loop.
    pub fn entered(&mut self, stage: Stage, rank: u32, section: String) -> Result<(), Stale> {
        self.live_rank(stage, rank)?.section = section;
        Ok(())
    }

    /// A rank told how its task went.
    pub fn done(&mut self, stage: Stage, rank: u32, outcome: Outcome) -> Result<(), Stale> {
        self.live_rank(stage, rank)?.outcome = Some(outcome);
        Ok(())
    }

    /// A rank's process is gone; the first failure stops the others. Nothing is told of a task that was
    /// `cancelled`.
    pub fn exited(
        &mut self,
        stage: Stage,
        rank: u32,
        exit: Exit,
        cancelled: bool,
    ) -> Result<Vec<Effect>, Stale> {
        let found = self.live_rank(stage, rank)?;
        found.exited = true;
        let failure = RankFailure::of(rank, &found.worker, found.outcome.as_ref(), exit);
        match failure {
            Some(failure) => Ok(self.failed(vec![failure], cancelled)),
            None => Ok(self.judge_if_answered()),
        }
    }

    /// Nothing is heard of a worker any more: its ranks count as gone.
    pub fn worker_lost(&mut self, worker: &WorkerName, cancelled: bool) -> Vec<Effect> {
        let mut lost = Vec::new();
        for (index, rank) in self.ranks.iter_mut().enumerate() {
            if rank.worker == *worker && !rank.exited {
                rank.exited = true;
                lost.push(RankFailure::lost(index as u32, worker));
            }
        }
        self.failed(lost, cancelled)
    }

    fn failed(&mut self, failures: Vec<RankFailure>, cancelled: bool) -> Vec<Effect> {
        let Some(first) = failures.first().filter(|_| !self.is_failing() && !cancelled) else {
            let effects = self.told(&failures, cancelled);
            self.failures.extend(failures);
            return effects;
        };
        let reason = first.reason();
        let mut effects = self.told(&failures, cancelled);
        self.failures.extend(failures);
        // A rank that is gone explains a hang better than where the others are.
        self.hang = None;
        effects.extend(self.abort(reason));
        effects
    }

    /// What those who watch are told of ranks that ended. A task of one rank is its job's failure.
    fn told(&self, failures: &[RankFailure], cancelled: bool) -> Vec<Effect> {
        if cancelled || self.ranks.len() == 1 {
            return Vec::new();
        }
        let tell = |failure: &RankFailure| {
            let ended = if self.is_behind(failure.rank()) {
                let how = format!("ended because others waited for it: {}", failure.exit().describe());
                RankEnded { how, aborted_by_peer: false, ..failure.ended(None) }
            } else {
                failure.ended(self.abort_reason.as_deref())
            };
            Effect::Tell(Body::RankEnded(ended))
        };
        failures.iter().map(tell).collect()
    }

    fn abort(&mut self, reason: String) -> Vec<Effect> {
        self.abort_reason = Some(reason.clone());
        let workers = self.workers();
        if workers.is_empty() {
            return Vec::new();
        }
        vec![Effect::Abort { stage: self.stage, workers, reason, by_peer: true }]
    }

    // ------------------------------------------------------------------------------- hangs

    /// A collective of a rank takes longer than it may: all ranks are asked where they are.
    pub fn stalled(
        &mut self,
        stage: Stage,
        rank: u32,
        at: Collectives,
        cancelled: bool,
    ) -> Result<Vec<Effect>, Stale> {
        self.live_rank(stage, rank)?;
        if self.is_failing() || cancelled {
            // It ends anyway.
            return Ok(Vec::new());
        }
        let note = at.oldest_unfinished.as_ref().map(|stalled| {
            let (about, sequence, seconds) = (&stalled.about, stalled.sequence, stalled.seconds);
            format!("rank {rank} waits in {about} (#{sequence}) since {seconds:.1} s: asking all ranks where they are")
        });
        let asked = self.hang.is_some();
        self.hang.get_or_insert_default().answer(rank, at);
        let mut effects = Vec::new();
        if !asked {
            effects.extend(note.map(|note| Effect::Tell(Body::Note(note))));
            effects.push(Effect::ReportCollectives { stage, workers: self.workers() });
        }
        effects.extend(self.judge_if_answered());
        Ok(effects)
    }

    /// A rank shows no progress for longer than it may, in these words: all ranks are asked where they are.
    pub fn overdue(
        &mut self,
        stage: Stage,
        rank: u32,
        words: String,
        cancelled: bool,
    ) -> Result<Vec<Effect>, Stale> {
        self.live_rank(stage, rank)?;
        if self.is_failing() || cancelled || self.hang.is_some() {
            return Ok(Vec::new());
        }
        let note = format!("{words}: asking all ranks where they are");
        self.hang.get_or_insert_default().suspect(rank, words);
        let workers = self.workers();
        Ok(vec![Effect::Tell(Body::Note(note)), Effect::ReportCollectives { stage, workers }])
    }

    /// A rank told where it is.
    pub fn answered(&mut self, stage: Stage, rank: u32, at: Collectives) -> Result<Vec<Effect>, Stale> {
        self.live_rank(stage, rank)?;
        let hang = self.hang.as_mut().ok_or_else(|| Stale("no collective has stalled".to_owned()))?;
        hang.answer(rank, at);
        Ok(self.judge_if_answered())
    }

    /// Who has not answered will not.
    pub fn answers_over(&mut self, stage: Stage) -> Result<Vec<Effect>, Stale> {
        match self.hang.take() {
            Some(hang) if self.stage == stage => Ok(self.judge(&hang)),
            hang => {
                self.hang = hang;
                Err(Stale("no collective has stalled".to_owned()))
            }
        }
    }

    fn judge_if_answered(&mut self) -> Vec<Effect> {
        let live = self.live();
        match self.hang.take_if(|hang| hang.is_answered_by(live.keys())) {
            Some(hang) => self.judge(&hang),
            None => Vec::new(),
        }
    }

    /// The ranks that have not exited, with the section that each was last heard of in.
    fn live(&self) -> BTreeMap<u32, String> {
        let live = (0..).zip(&self.ranks).filter(|(_, rank)| !rank.exited);
        live.map(|(index, rank)| (index, rank.section.clone())).collect()
    }

    fn judge(&mut self, hang: &Hang) -> Vec<Effect> {
        let live = self.live();
        if live.is_empty() {
            // It ended after all, and so did they.
            return Vec::new();
        }
        let verdict = hang.verdict(&live);
        let mut effects = vec![Effect::Tell(Body::Note(verdict.words.clone()))];
        effects.extend(self.abort(verdict.words.clone()));
        self.verdict = Some(verdict);
        effects
    }
}
