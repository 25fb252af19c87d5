//! The life of one attempt of a job, as a pure state machine: facts in, effects out. It does no
//! IO and knows no clock, so that every order of events can be tried in a test.
//!
//! A stage goes `inspect -> (cached | wait for slots -> run -> record)`; `collect` runs in the
//! coordinator, the others as tasks on worker slots. A task ends only when its last rank has
//! exited: nothing of it can reach what comes after.

use std::collections::BTreeSet;

use tunefleet_proto::rpc::job_event::Body;
use tunefleet_proto::rpc::{Failure, JobState, Stage, StageChanged, StateChanged, stage_changed::What};

use super::placement::WorkerName;
use super::rank::{Exit, Outcome, RankFailure, first_cause};

/// What happened.
#[derive(Debug, Clone, PartialEq)]
pub enum Input {
    /// The control plane takes the job up.
    Begin,
    /// Whether a stage has to run.
    Inspected(Stage, Result<Verdict, String>),
    /// `collect` is done.
    Collected(Result<(), String>),
    /// Slots for all ranks of the stage, in rank order.
    Placed(Stage, Vec<WorkerName>),
    /// A rank is ready to join its peers.
    Ready {
        /// Whose task.
        stage: Stage,
        /// Which rank.
        rank: u32,
        /// Where it listens; empty in a world of one.
        address: String,
    },
    /// A rank told how its task went; its exit follows.
    Done {
        /// Whose task.
        stage: Stage,
        /// Which rank.
        rank: u32,
        /// What it told.
        outcome: Outcome,
    },
    /// A rank's process is gone.
    Exited {
        /// Whose task.
        stage: Stage,
        /// Which rank.
        rank: u32,
        /// How it ended.
        exit: Exit,
    },
    /// A worker has not been heard of for too long: its ranks count as gone.
    WorkerLost(WorkerName),
    /// The stage's record is on disk.
    Recorded(Stage, Result<(), String>),
    /// A person asks the job to stop, with a checkpoint when `checkpoint` is set.
    Stop {
        /// Save first where that is possible.
        checkpoint: bool,
    },
    /// A stop with a checkpoint took longer than its grace period.
    GraceOver,
}

/// What inspection found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Not part of this job.
    Absent,
    /// Output of the same inputs is there.
    Cached,
    /// To do; `resume` starts from the newest checkpoint.
    Run {
        /// Whether there is a checkpoint to go on from.
        resume: bool,
    },
}

/// What to do about it, in order.
#[derive(Debug, Clone, PartialEq)]
pub enum Effect {
    /// Find out whether the stage has to run; answer with [`Input::Inspected`].
    Inspect(Stage),
    /// Collect the dataset; answer with [`Input::Collected`].
    Collect,
    /// Find a slot for each rank, all or none; answer with [`Input::Placed`] as soon as there are.
    Place(Stage),
    /// Start the processes of all ranks.
    StartTask {
        /// Which task.
        stage: Stage,
        /// Where each rank runs.
        ranks: Vec<WorkerName>,
        /// Train from the newest checkpoint.
        resume: bool,
    },
    /// All ranks are ready: let them join.
    StartRanks {
        /// Which task.
        stage: Stage,
        /// On these workers.
        workers: BTreeSet<WorkerName>,
        /// Addresses in rank order.
        peers: Vec<String>,
    },
    /// Tell the ranks to save and stop at the next step boundary.
    StopAtCheckpoint {
        /// Which task.
        stage: Stage,
        /// On these workers.
        workers: BTreeSet<WorkerName>,
    },
    /// Stop the ranks now.
    Abort {
        /// Which task.
        stage: Stage,
        /// On these workers.
        workers: BTreeSet<WorkerName>,
        /// Why.
        reason: String,
    },
    /// All ranks are gone: their slots are free.
    Release,
    /// Write the stage's record; answer with [`Input::Recorded`].
    Record(Stage),
    /// Tell those who watch.
    Tell(Body),
}

/// The input does not fit the job as it is: it comes from an older attempt or task, or twice.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("stale: {0}")]
pub struct Stale(pub String);

/// How a job ended.
#[derive(Debug, Clone, PartialEq)]
pub enum End {
    /// All stages are done.
    Completed,
    /// One failed.
    Failed(Failure),
    /// Stopped on request, with nothing saved.
    Cancelled,
    /// Stopped on request; so many updates are in the checkpoint.
    Stopped(u64),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Stopping {
    Checkpoint,
    Now,
}

#[derive(Debug, Clone, PartialEq)]
enum Phase {
    Queued,
    Inspecting(Stage),
    Collecting,
    Waiting { stage: Stage, resume: bool },
    Running(Task),
    Recording(Stage),
    Ended(End),
}

#[derive(Debug, Clone, PartialEq)]
struct Task {
    stage: Stage,
    ranks: Vec<Rank>,
    /// Whether the ranks were let go; before, there is nothing to save.
    started: bool,
    failures: Vec<RankFailure>,
}

#[derive(Debug, Clone, PartialEq)]
struct Rank {
    worker: WorkerName,
    address: Option<String>,
    outcome: Option<Outcome>,
    exited: bool,
}

/// One attempt of a job.
#[derive(Debug, Clone, PartialEq)]
pub struct Job {
    train_ranks: u32,
    steps: u64,
    phase: Phase,
    stopping: Option<Stopping>,
}

impl Job {
    /// A queued attempt that trains on `train_ranks` ranks for `steps` updates.
    pub fn new(train_ranks: u32, steps: u64) -> Self {
        Job { train_ranks, steps, phase: Phase::Queued, stopping: None }
    }

    /// Ranks of a stage's task.
    pub fn world(&self, stage: Stage) -> u32 {
        if stage == Stage::Train { self.train_ranks } else { 1 }
    }

    /// The state as people see it.
    pub fn state(&self) -> JobState {
        match &self.phase {
            Phase::Queued => JobState::Queued,
            Phase::Ended(End::Completed) => JobState::Completed,
            Phase::Ended(End::Failed(_)) => JobState::Failed,
            Phase::Ended(End::Cancelled) => JobState::Cancelled,
            Phase::Ended(End::Stopped(_)) => JobState::Stopped,
            Phase::Running(task) if self.stopping.is_some() || !task.failures.is_empty() => {
                JobState::Stopping
            }
            _ if self.stopping.is_some() => JobState::Stopping,
            _ => JobState::Running,
        }
    }

    /// The stage that it is at.
    pub fn stage(&self) -> Stage {
        match &self.phase {
            Phase::Inspecting(stage) | Phase::Waiting { stage, .. } | Phase::Recording(stage) => *stage,
            Phase::Running(task) => task.stage,
            Phase::Collecting => Stage::Collect,
            Phase::Ended(End::Failed(failure)) => failure.stage(),
            Phase::Queued | Phase::Ended(_) => Stage::Unspecified,
        }
    }

    /// How it ended, once it has.
    pub fn end(&self) -> Option<&End> {
        match &self.phase {
            Phase::Ended(end) => Some(end),
            _ => None,
        }
    }

    /// The stage that waits for slots.
    pub fn waiting(&self) -> Option<Stage> {
        match self.phase {
            Phase::Waiting { stage, .. } => Some(stage),
            _ => None,
        }
    }

    /// Whether ranks of this stage's task may be alive on `worker`.
    pub fn runs_on(&self, stage: Stage, worker: &WorkerName) -> bool {
        matches!(&self.phase, Phase::Running(task) if task.stage == stage
            && task.ranks.iter().any(|rank| rank.worker == *worker && !rank.exited))
    }

    /// Takes a fact and tells what to do about it.
    ///
    /// # Errors
    /// [`Stale`] when the fact does not belong to the job as it is; nothing has changed then.
    pub fn apply(&mut self, input: Input) -> Result<Vec<Effect>, Stale> {
        let before = self.state();
        let mut effects = match (&mut self.phase, input) {
            (Phase::Ended(_), input) => return Err(Stale(format!("{input:?} after the end"))),
            (Phase::Queued, Input::Begin) => self.inspect(Stage::Collect),
            (Phase::Inspecting(stage), Input::Inspected(of, verdict)) if *stage == of => {
                self.inspected(of, verdict)
            }
            (Phase::Collecting, Input::Collected(result)) => match result {
                Ok(()) => self.record(Stage::Collect),
                Err(cause) => self.fail(Stage::Collect, cause),
            },
            (Phase::Waiting { stage, resume }, Input::Placed(of, workers)) if *stage == of => {
                let resume = *resume;
                self.place(of, workers, resume)?
            }
            (Phase::Running(task), Input::Ready { stage, rank, address }) => {
                task.ready(stage, rank, address)?
            }
            (Phase::Running(task), Input::Done { stage, rank, outcome }) => {
                task.live_rank(stage, rank)?.outcome = Some(outcome);
                Vec::new()
            }
            (Phase::Running(task), Input::Exited { stage, rank, exit }) => {
                let aborts = task.exited(stage, rank, exit, self.stopping)?;
                self.settle(aborts)
            }
            (Phase::Running(task), Input::WorkerLost(worker)) => {
                let aborts = task.worker_lost(&worker);
                self.settle(aborts)
            }
            // Nothing of this job runs there.
            (_, Input::WorkerLost(_)) => Vec::new(),
            (Phase::Recording(stage), Input::Recorded(of, result)) if *stage == of => match result {
                Ok(()) => self.recorded(of),
                Err(cause) => self.fail(of, cause),
            },
            (_, Input::Stop { checkpoint }) => self.stop(checkpoint),
            (_, Input::GraceOver) if self.stopping == Some(Stopping::Checkpoint) => self.stop(false),
            (phase, input) => return Err(Stale(format!("{input:?} while {phase:?}"))),
        };
        let after = self.state();
        if before != after {
            let tell = Effect::Tell(self.told(after));
            // The end is the last that is told of an attempt.
            let at = if after.is_end() { effects.len() } else { 0 };
            effects.insert(at, tell);
        }
        Ok(effects)
    }

    fn told(&self, state: JobState) -> Body {
        let (failure, step) = match self.end() {
            Some(End::Failed(failure)) => (Some(failure.clone()), 0),
            Some(End::Stopped(step)) => (None, *step),
            _ => (None, 0),
        };
        Body::State(StateChanged { state: state.into(), failure, step })
    }

    fn inspect(&mut self, stage: Stage) -> Vec<Effect> {
        self.phase = Phase::Inspecting(stage);
        vec![Effect::Inspect(stage)]
    }

    fn inspected(&mut self, stage: Stage, verdict: Result<Verdict, String>) -> Vec<Effect> {
        match verdict {
            Err(cause) => self.fail(stage, cause),
            Ok(_) if self.stopping.is_some() => self.finish(End::Cancelled),
            Ok(Verdict::Absent) => self.next_after(stage),
            Ok(Verdict::Cached) => {
                let mut effects = vec![tell_stage(stage, What::Cached)];
                effects.extend(self.next_after(stage));
                effects
            }
            Ok(Verdict::Run { .. }) if stage == Stage::Collect => {
                self.phase = Phase::Collecting;
                vec![tell_stage(stage, What::Started), Effect::Collect]
            }
            Ok(Verdict::Run { resume }) => {
                self.phase = Phase::Waiting { stage, resume };
                vec![tell_stage(stage, What::Started), Effect::Place(stage)]
            }
        }
    }

    fn place(&mut self, stage: Stage, workers: Vec<WorkerName>, resume: bool) -> Result<Vec<Effect>, Stale> {
        let world = self.world(stage);
        if workers.len() != world as usize {
            return Err(Stale(format!("{} slots for {world} ranks", workers.len())));
        }
        let rank = |worker: &WorkerName| Rank {
            worker: worker.clone(),
            address: None,
            outcome: None,
            exited: false,
        };
        let ranks = workers.iter().map(rank).collect();
        self.phase = Phase::Running(Task { stage, ranks, started: false, failures: Vec::new() });
        Ok(vec![Effect::StartTask { stage, ranks: workers, resume }])
    }

    /// After a rank is gone: nothing until the last one is, then what follows from all.
    fn settle(&mut self, mut effects: Vec<Effect>) -> Vec<Effect> {
        let Phase::Running(task) = &self.phase else { return effects };
        if !task.ranks.iter().all(|rank| rank.exited) {
            return effects;
        }
        effects.push(Effect::Release);
        let stage = task.stage;
        let stopped_at = task.ranks.iter().find_map(|rank| match rank.outcome {
            Some(Outcome::Stopped(step)) => Some(step),
            _ => None,
        });
        let end = if self.stopping == Some(Stopping::Now) {
            End::Cancelled
        } else if let Some(cause) = first_cause(&task.failures) {
            End::Failed(cause.to_failure(stage))
        } else if let Some(step) = stopped_at {
            End::Stopped(step)
        } else {
            effects.extend(self.record(stage));
            return effects;
        };
        effects.extend(self.finish(end));
        effects
    }

    fn record(&mut self, stage: Stage) -> Vec<Effect> {
        self.phase = Phase::Recording(stage);
        vec![Effect::Record(stage)]
    }

    fn recorded(&mut self, stage: Stage) -> Vec<Effect> {
        let mut effects = vec![tell_stage(stage, What::Done)];
        effects.extend(match self.stopping {
            Some(_) if stage == Stage::Train => self.finish(End::Stopped(self.steps)),
            Some(_) => self.finish(End::Cancelled),
            None => self.next_after(stage),
        });
        effects
    }

    fn next_after(&mut self, stage: Stage) -> Vec<Effect> {
        match Stage::ALL.into_iter().find(|next| *next > stage) {
            Some(next) => self.inspect(next),
            None => self.finish(End::Completed),
        }
    }

    fn stop(&mut self, checkpoint: bool) -> Vec<Effect> {
        let ask = if checkpoint { Stopping::Checkpoint } else { Stopping::Now };
        if self.stopping >= Some(ask) {
            return Vec::new();
        }
        match &self.phase {
            // Nothing to save; the answer of work under way comes too late.
            Phase::Queued | Phase::Waiting { .. } | Phase::Inspecting(_) | Phase::Collecting => {
                self.finish(End::Cancelled)
            }
            Phase::Running(task) => {
                let (stage, workers) = (task.stage, task.workers());
                if checkpoint && stage == Stage::Train && task.started {
                    self.stopping = Some(Stopping::Checkpoint);
                    return vec![Effect::StopAtCheckpoint { stage, workers }];
                }
                self.stopping = Some(Stopping::Now);
                vec![Effect::Abort { stage, workers, reason: "cancelled".to_owned() }]
            }
            // A stage is done and being noted, in a moment: the job ends with that.
            Phase::Recording(_) | Phase::Ended(_) => {
                self.stopping = Some(ask);
                Vec::new()
            }
        }
    }

    fn fail(&mut self, stage: Stage, cause: String) -> Vec<Effect> {
        if self.stopping == Some(Stopping::Now) {
            return self.finish(End::Cancelled);
        }
        self.finish(End::Failed(Failure { stage: stage.into(), cause, ..Failure::default() }))
    }

    fn finish(&mut self, end: End) -> Vec<Effect> {
        self.phase = Phase::Ended(end);
        Vec::new()
    }
}

impl Task {
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

    fn ready(&mut self, stage: Stage, rank: u32, address: String) -> Result<Vec<Effect>, Stale> {
        let found = self.live_rank(stage, rank)?;
        if found.address.is_some() {
            return Err(Stale(format!("rank {rank} was ready before")));
        }
        found.address = Some(address);
        let Some(peers) = self.ranks.iter().map(|rank| rank.address.clone()).collect::<Option<Vec<_>>>()
        else {
            return Ok(Vec::new());
        };
        if self.ranks.iter().any(|rank| rank.exited) {
            return Ok(Vec::new());
        }
        self.started = true;
        Ok(vec![Effect::StartRanks { stage, workers: self.workers(), peers }])
    }

    fn exited(
        &mut self,
        stage: Stage,
        rank: u32,
        exit: Exit,
        stopping: Option<Stopping>,
    ) -> Result<Vec<Effect>, Stale> {
        let found = self.live_rank(stage, rank)?;
        found.exited = true;
        let failure = RankFailure::of(rank, &found.worker, found.outcome.as_ref(), exit);
        let Some(failure) = failure else { return Ok(Vec::new()) };
        let first = self.failures.is_empty() && stopping != Some(Stopping::Now);
        let reason = format!("rank {rank} failed: {}", failure.message);
        self.failures.push(failure);
        Ok(if first { self.abort(reason) } else { Vec::new() })
    }

    fn worker_lost(&mut self, worker: &WorkerName) -> Vec<Effect> {
        let first = self.failures.is_empty();
        let mut hit = false;
        for (index, rank) in self.ranks.iter_mut().enumerate() {
            if rank.worker == *worker && !rank.exited {
                rank.exited = true;
                hit = true;
                self.failures.push(RankFailure::lost(index as u32, worker));
            }
        }
        if hit && first { self.abort(format!("worker {worker} was lost")) } else { Vec::new() }
    }

    fn abort(&self, reason: String) -> Vec<Effect> {
        let workers = self.workers();
        if workers.is_empty() {
            return Vec::new();
        }
        vec![Effect::Abort { stage: self.stage, workers, reason }]
    }

    /// Workers with ranks that have not exited.
    fn workers(&self) -> BTreeSet<WorkerName> {
        self.ranks.iter().filter(|rank| !rank.exited).map(|rank| rank.worker.clone()).collect()
    }
}

fn tell_stage(stage: Stage, what: What) -> Effect {
    Effect::Tell(Body::Stage(StageChanged {
        stage: stage.into(),
        what: what.into(),
        ..StageChanged::default()
    }))
}

#[cfg(test)]
#[path = "job_tests.rs"]
mod tests;
