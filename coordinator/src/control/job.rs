//! The life of one attempt of a job, as a pure state machine: facts in, effects out. It does no
//! IO and knows no clock, so that every order of events can be tried in a test.
//!
//! A stage goes `inspect -> (cached | wait for slots -> run -> record)`; `collect` runs in the
//! coordinator, the others as tasks on worker slots. A task ends only when its last rank has
//! exited: nothing of it can reach what comes after.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};
use tunefleet_proto::rpc::job_event::Body;
use tunefleet_proto::rpc::{
    Collectives, Failure, FailureKind, JobState, Stage, StageChanged, StateChanged, stage_changed::What,
};

use super::placement::WorkerName;
use super::rank::{Exit, Outcome};
use super::task::{CANCELLED, Task};

/// What happened.
#[derive(Debug, Clone, PartialEq)]
pub enum Input {
    /// The control plane takes the job up.
    Begin,
    /// Whether a stage has to run.
    Inspected(Stage, Result<Verdict, String>),
    /// `collect` is done.
    Collected(Result<(), String>),
    /// Slots for all ranks of the stage, in rank order, and a secret for the ranks to know each other by.
    Placed(Stage, Vec<WorkerName>, Vec<u8>),
    /// A rank is ready to join its peers.
    Ready {
        /// Whose task.
        stage: Stage,
        /// Which rank.
        rank: u32,
        /// Where it listens; empty in a world of one.
        address: String,
    },
    /// A rank entered a section of the training loop.
    Entered {
        /// Whose task.
        stage: Stage,
        /// Which rank.
        rank: u32,
        /// Name of the section.
        section: String,
    },
    /// A collective of a rank takes longer than it may.
    Stalled {
        /// Whose task.
        stage: Stage,
        /// Which rank.
        rank: u32,
        /// Where it is.
        at: Collectives,
    },
    /// A rank shows no progress for longer than it may.
    Overdue {
        /// Whose task.
        stage: Stage,
        /// Which rank.
        rank: u32,
        /// For how long, and where.
        words: String,
    },
    /// A rank told where it is among its collectives.
    Answered {
        /// Whose task.
        stage: Stage,
        /// Which rank.
        rank: u32,
        /// Where it is.
        at: Collectives,
    },
    /// Ranks that have not told where they are will not do so any more.
    AnswersOver(Stage),
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
    /// Start the processes of these ranks.
    StartOn {
        /// Which task.
        stage: Stage,
        /// On this worker.
        worker: WorkerName,
        /// Which ranks.
        ranks: Vec<u32>,
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
        /// What they know each other by.
        secret: Vec<u8>,
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
        /// Whether another rank is the reason, and not a person.
        by_peer: bool,
    },
    /// Ask the ranks where they are among their collectives; answer with [`Input::Answered`], and after
    /// a while with [`Input::AnswersOver`].
    ReportCollectives {
        /// Which task.
        stage: Stage,
        /// On these workers.
        workers: BTreeSet<WorkerName>,
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

/// How an attempt ended.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
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

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
enum Stopping {
    Checkpoint,
    Now,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
enum Phase {
    Queued,
    Inspecting(Stage),
    Collecting,
    Waiting { stage: Stage, resume: bool },
    Running(Task),
    Recording(Stage),
    Ended(End),
}

/// One attempt of a job.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
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
        if stage.has_all_ranks() { self.train_ranks } else { 1 }
    }

    /// The state as people see it.
    pub fn state(&self) -> JobState {
        match &self.phase {
            Phase::Queued => JobState::Queued,
            Phase::Ended(End::Completed) => JobState::Completed,
            Phase::Ended(End::Failed(_)) => JobState::Failed,
            Phase::Ended(End::Cancelled) => JobState::Cancelled,
            Phase::Ended(End::Stopped(_)) => JobState::Stopped,
            Phase::Running(task) if task.is_failing() => JobState::Stopping,
            _ if self.stopping.is_some() => JobState::Stopping,
            _ => JobState::Running,
        }
    }

    /// The stage that it is at.
    pub fn stage(&self) -> Stage {
        match &self.phase {
            Phase::Inspecting(stage) | Phase::Waiting { stage, .. } | Phase::Recording(stage) => *stage,
            Phase::Running(task) => task.stage(),
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

    /// The ranks that run.
    pub fn task(&self) -> Option<&Task> {
        match &self.phase {
            Phase::Running(task) => Some(task),
            _ => None,
        }
    }

    /// What was under way outside when the control plane ended, and has to be asked for again.
    pub fn asked_again(&self) -> Vec<Effect> {
        match &self.phase {
            Phase::Inspecting(stage) => vec![Effect::Inspect(*stage)],
            Phase::Collecting => vec![Effect::Collect],
            Phase::Recording(stage) => vec![Effect::Record(*stage)],
            Phase::Queued | Phase::Waiting { .. } | Phase::Running(_) | Phase::Ended(_) => Vec::new(),
        }
    }

    /// All that should be true of its ranks on `worker`, which holds those in `held`; see [`Task::again`].
    pub fn again(&self, worker: &WorkerName, held: &BTreeSet<u32>) -> Vec<Effect> {
        let stopping = self.stopping.map(|ask| ask == Stopping::Checkpoint);
        self.task().map_or_else(Vec::new, |task| task.again(worker, held, stopping))
    }

    /// Whether ranks of this stage's task may be alive on `worker`.
    pub fn runs_on(&self, stage: Stage, worker: &WorkerName) -> bool {
        matches!(&self.phase, Phase::Running(task) if task.stage() == stage && task.runs_on(worker))
    }

    /// Takes a fact and tells what to do about it.
    ///
    /// # Errors
    /// [`Stale`] when the fact does not belong to the job as it is; nothing has changed then.
    pub fn apply(&mut self, input: Input) -> Result<Vec<Effect>, Stale> {
        let before = self.state();
        let cancelled = self.stopping == Some(Stopping::Now);
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
            (Phase::Waiting { stage, resume }, Input::Placed(of, workers, secret)) if *stage == of => {
                let resume = *resume;
                self.place(of, workers, resume, secret)?
            }
            (Phase::Running(task), Input::Ready { stage, rank, address }) => {
                task.ready(stage, rank, address)?
            }
            (Phase::Running(task), Input::Done { stage, rank, outcome }) => {
                task.done(stage, rank, outcome)?;
                Vec::new()
            }
            (Phase::Running(task), Input::Entered { stage, rank, section }) => {
                task.entered(stage, rank, section)?;
                Vec::new()
            }
            (Phase::Running(task), Input::Stalled { stage, rank, at }) => {
                task.stalled(stage, rank, at, cancelled)?
            }
            (Phase::Running(task), Input::Overdue { stage, rank, words }) => {
                task.overdue(stage, rank, words, cancelled)?
            }
            (Phase::Running(task), Input::Answered { stage, rank, at }) => task.answered(stage, rank, at)?,
            (Phase::Running(task), Input::AnswersOver(stage)) => task.answers_over(stage)?,
            (Phase::Running(task), Input::Exited { stage, rank, exit }) => {
                let aborts = task.exited(stage, rank, exit, cancelled)?;
                self.settle(aborts)
            }
            (Phase::Running(task), Input::WorkerLost(worker)) => {
                let aborts = task.worker_lost(&worker, cancelled);
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
        // What an end means for the job is not known here.
        if before != after && !after.is_end() {
            let state = StateChanged { state: after.into(), ..StateChanged::default() };
            effects.insert(0, Effect::Tell(Body::State(state)));
        }
        Ok(effects)
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

    fn place(
        &mut self,
        stage: Stage,
        workers: Vec<WorkerName>,
        resume: bool,
        secret: Vec<u8>,
    ) -> Result<Vec<Effect>, Stale> {
        let world = self.world(stage);
        if workers.len() != world as usize {
            return Err(Stale(format!("{} slots for {world} ranks", workers.len())));
        }
        let task = Task::new(stage, &workers, resume, secret);
        let none = BTreeSet::new();
        let effects = task.workers().iter().flat_map(|worker| task.again(worker, &none, None)).collect();
        self.phase = Phase::Running(task);
        Ok(effects)
    }

    /// After a rank is gone: nothing until the last one is, then what follows from all.
    fn settle(&mut self, mut effects: Vec<Effect>) -> Vec<Effect> {
        let Phase::Running(task) = &self.phase else { return effects };
        if !task.is_over() {
            return effects;
        }
        effects.push(Effect::Release);
        let stage = task.stage();
        let end = if self.stopping == Some(Stopping::Now) {
            End::Cancelled
        } else if let Some(failure) = task.failure() {
            End::Failed(failure)
        } else if let Some(step) = task.stopped_at() {
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
        match stage.next() {
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
                let (stage, workers) = (task.stage(), task.workers());
                // Training saves, a server finishes what it is answering.
                let has_end = matches!(stage, Stage::Train | Stage::Serve);
                if checkpoint && has_end && task.is_started() {
                    self.stopping = Some(Stopping::Checkpoint);
                    return vec![Effect::StopAtCheckpoint { stage, workers }];
                }
                self.stopping = Some(Stopping::Now);
                let reason = CANCELLED.to_owned();
                vec![Effect::Abort { stage, workers, reason, by_peer: false }]
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
        let kind = FailureKind::Configuration.into();
        self.finish(End::Failed(Failure { stage: stage.into(), cause, kind, ..Failure::default() }))
    }

    fn finish(&mut self, end: End) -> Vec<Effect> {
        self.phase = Phase::Ended(end);
        Vec::new()
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
