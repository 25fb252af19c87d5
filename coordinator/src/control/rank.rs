//! How ranks end, and which of several failures is the cause.

use nix::sys::signal::Signal;
use serde::{Deserialize, Serialize};
use tunefleet_proto::rpc::{Failure, FailureKind, RankEnded, RankExited, Stage, rank_done};

use super::placement::WorkerName;

/// What a rank told before it exited.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Outcome {
    /// The task is complete.
    Finished,
    /// Stopped on request; so many updates are in the checkpoint.
    Stopped(u64),
    /// Why not; `consequence` when another rank is to blame.
    Failed {
        /// What the rank said.
        message: String,
        /// Whether a peer or an abort caused it.
        consequence: bool,
        /// A `FailureKind`.
        kind: i32,
    },
}

/// How a rank's process ended, and what it left.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Exit {
    /// Exit code, unless a signal ended it.
    pub code: Option<i32>,
    /// Signal number.
    pub signal: Option<i32>,
    /// Why the process could not be started; empty when it was.
    pub start_error: String,
    /// Whether its daemon had been told to stop it.
    pub aborted: bool,
    /// Last lines of its log.
    pub last_lines: Vec<String>,
    /// Where the log is.
    pub log_path: String,
    /// A `FailureKind`, where its daemon knows one.
    pub kind: i32,
}

/// What is said of a rank that the kernel killed for its memory.
const HOST_OUT_OF_MEMORY: &str = "the machine, or the memory limit of its worker, had no more memory: the kernel \
    killed the process; run fewer ranks on this machine, or raise the limit";
/// What is said of a rank that ended because of another.
const ABORTED_BY_PEER: &str = "aborted by peer: ";

/// One rank's failure.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RankFailure {
    rank: u32,
    worker: WorkerName,
    consequence: bool,
    /// What went wrong, in words.
    message: String,
    exit: Exit,
    kind: i32,
}

impl From<rank_done::Outcome> for Outcome {
    fn from(outcome: rank_done::Outcome) -> Self {
        match outcome {
            rank_done::Outcome::Finished(_) => Outcome::Finished,
            rank_done::Outcome::StoppedAtStep(step) => Outcome::Stopped(step),
            rank_done::Outcome::Failed(failed) => Outcome::Failed {
                message: failed.message,
                consequence: failed.consequence,
                kind: failed.kind,
            },
        }
    }
}

impl From<RankExited> for Exit {
    fn from(exited: RankExited) -> Self {
        let RankExited { exit_code, signal, start_error, last_lines, log_path, aborted, kind, .. } = exited;
        Exit { code: exit_code, signal, start_error, aborted, last_lines, log_path, kind }
    }
}

impl Exit {
    /// In words, e.g. `signal 9 (SIGKILL)`.
    pub fn describe(&self) -> String {
        match (self.signal, self.code) {
            (Some(number), _) => match Signal::try_from(number) {
                Ok(signal) => format!("signal {number} ({})", signal.as_str()),
                Err(_) => format!("signal {number}"),
            },
            (None, Some(code)) => format!("exit code {code}"),
            (None, None) => String::new(),
        }
    }
}

impl RankFailure {
    /// The failure that follows from what a rank told and how it exited; `None` when all is well.
    pub fn of(rank: u32, worker: &WorkerName, outcome: Option<&Outcome>, exit: Exit) -> Option<Self> {
        let clean = exit.code == Some(0);
        let (message, consequence) = match outcome {
            Some(Outcome::Finished | Outcome::Stopped(_)) if clean => return None,
            Some(Outcome::Failed { message, consequence, .. }) => (message.clone(), *consequence),
            _ if exit.kind == FailureKind::HostOutOfMemory as i32 => {
                (format!("{HOST_OUT_OF_MEMORY} ({})", exit.describe()), false)
            }
            _ if !exit.start_error.is_empty() => (exit.start_error.clone(), false),
            None if clean => ("exited before its task was done".to_owned(), exit.aborted),
            _ => (format!("ended by {}", exit.describe()), exit.aborted),
        };
        let kind = match outcome {
            Some(Outcome::Failed { kind, message, .. })
                if *kind == 0 && message.starts_with("out of memory") =>
            {
                FailureKind::OutOfMemory as i32
            }
            Some(Outcome::Failed { kind, .. }) if *kind != 0 => *kind,
            _ if exit.kind != 0 => exit.kind,
            _ if !exit.start_error.is_empty() => FailureKind::Start as i32,
            _ if exit.signal.is_some() => FailureKind::Signal as i32,
            _ => FailureKind::Exit as i32,
        };
        Some(RankFailure { rank, worker: worker.clone(), consequence, message, exit, kind })
    }

    /// Whose it is.
    pub fn rank(&self) -> u32 {
        self.rank
    }

    /// Whether another rank, or whoever stopped this one, is to blame.
    pub fn is_consequence(&self) -> bool {
        self.consequence
    }

    /// How the process ended.
    pub fn exit(&self) -> &Exit {
        &self.exit
    }

    /// Why the others are stopped when this is the first failure.
    pub fn reason(&self) -> String {
        match self.message.strip_prefix(ABORTED_BY_PEER) {
            Some(cause) => cause.to_owned(),
            None => format!("rank {} failed: {}", self.rank, self.message),
        }
    }

    /// As it is told when it happens. `reason` is why the ranks of the task were aborted, if they were.
    pub fn ended(&self, reason: Option<&str>) -> RankEnded {
        let how = if self.consequence {
            let told = self.message.strip_prefix(ABORTED_BY_PEER);
            format!("{ABORTED_BY_PEER}{}", told.or(reason).unwrap_or(&self.message))
        } else {
            self.message.clone()
        };
        let (rank, worker) = (self.rank, self.worker.to_string());
        RankEnded { rank, worker, how, aborted_by_peer: self.consequence }
    }

    /// A rank whose worker is not heard of any more.
    pub fn lost(rank: u32, worker: &WorkerName) -> Self {
        let message = format!("worker {worker} is not heard of any more");
        let kind = FailureKind::WorkerLost as i32;
        RankFailure { rank, worker: worker.clone(), consequence: false, message, exit: Exit::default(), kind }
    }

    /// As it is shown to people.
    pub fn to_failure(&self, stage: Stage) -> Failure {
        Failure {
            stage: stage.into(),
            cause: self.message.clone(),
            rank: Some(self.rank),
            worker: self.worker.to_string(),
            exit: self.exit.describe(),
            last_lines: self.exit.last_lines.clone(),
            log_path: self.exit.log_path.clone(),
            aborted_ranks: Vec::new(),
            kind: self.kind,
        }
    }
}

/// The failure that explains the others: the first that is not a consequence, else the first.
pub fn first_cause(failures: &[RankFailure]) -> Option<&RankFailure> {
    failures.iter().find(|failure| !failure.consequence).or_else(|| failures.first())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn failure(outcome: Option<Outcome>, exit: Exit) -> Option<RankFailure> {
        RankFailure::of(1, &WorkerName::from("w"), outcome.as_ref(), exit)
    }

    #[test]
    fn exits_are_told_in_words() {
        let exit = |code, signal| Exit { code, signal, ..Exit::default() }.describe();
        assert_eq!(exit(Some(1), None), "exit code 1");
        assert_eq!(exit(None, Some(9)), "signal 9 (SIGKILL)");
        assert_eq!(exit(None, Some(11)), "signal 11 (SIGSEGV)");
        assert_eq!(exit(None, Some(99)), "signal 99");
    }

    #[test]
    fn a_rank_that_says_it_finished_but_dies_has_failed() {
        let clean = Exit { code: Some(0), ..Exit::default() };
        let killed = Exit { signal: Some(9), ..Exit::default() };
        assert_eq!(failure(Some(Outcome::Finished), clean.clone()), None);
        assert_eq!(failure(Some(Outcome::Stopped(7)), clean.clone()), None);
        assert!(failure(Some(Outcome::Finished), killed).is_some());
        assert!(failure(None, clean).is_some());
    }

    #[test]
    fn the_killed_rank_is_the_cause_and_not_the_peer_that_noticed_first() {
        let gone = Outcome::Failed { message: "rank 1 is gone".to_owned(), consequence: true, kind: 0 };
        let noticed = failure(Some(gone), Exit { code: Some(1), ..Exit::default() }).unwrap();
        let killed = failure(None, Exit { signal: Some(9), ..Exit::default() }).unwrap();
        let aborted = failure(None, Exit { signal: Some(15), aborted: true, ..Exit::default() }).unwrap();
        let failures = [noticed, aborted, killed.clone()];
        assert_eq!(first_cause(&failures), Some(&killed));
        assert_eq!(killed.to_failure(Stage::Train).exit, "signal 9 (SIGKILL)");
    }

    #[test]
    fn consequences_are_told_apart_from_their_cause() {
        let reason = Some("rank 1 failed: ended by signal 9 (SIGKILL)");
        let killed = failure(None, Exit { signal: Some(9), ..Exit::default() }).unwrap();
        assert_eq!(killed.reason(), "rank 1 failed: ended by signal 9 (SIGKILL)");
        let ended = killed.ended(None);
        assert_eq!((ended.how.as_str(), ended.aborted_by_peer), ("ended by signal 9 (SIGKILL)", false));

        let message = "aborted by peer: rank 1 is gone during gather".to_owned();
        let gone = Outcome::Failed { message, consequence: true, kind: 0 };
        let noticed = failure(Some(gone), Exit { code: Some(1), ..Exit::default() }).unwrap();
        assert_eq!(noticed.reason(), "rank 1 is gone during gather");
        assert_eq!(noticed.ended(reason).how, "aborted by peer: rank 1 is gone during gather");

        // It was stuck, and had no time to tell anything.
        let stuck = failure(None, Exit { signal: Some(9), aborted: true, ..Exit::default() }).unwrap();
        let ended = stuck.ended(reason);
        assert_eq!(ended.how, "aborted by peer: rank 1 failed: ended by signal 9 (SIGKILL)");
        assert!(ended.aborted_by_peer);
    }
}
