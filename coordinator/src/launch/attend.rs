//! Watches a job until it ends, and passes on what the user asks by Ctrl-C.

use std::time::Duration;

use tokio::signal::unix::{Signal, SignalKind, signal};
use tonic::Streaming;
use tunefleet_proto::job::JobSpec;
use tunefleet_proto::rpc::job_event::Body;
use tunefleet_proto::rpc::{
    CancelRequest, ControlClient, JobEvent, JobState, StateChanged, SubmitResponse, Waiting, WatchRequest,
};

use super::screen::Screen;
use super::summary;
use crate::cli::exit;
use crate::connect::Failure;
use crate::job_file::JobArgs;

/// How long a checkpoint may take once the job was asked to stop.
const STOP_GRACE_MS: u64 = 60 * 60 * 1000;

/// Between two tries to reach a coordinator that was there before.
const DIAL_AGAIN: Duration = Duration::from_millis(500);

/// Whose the coordinator is.
pub enum Owner {
    /// This process's: it ends with the job.
    Embedded,
    /// Somebody else's: the job goes on without this process.
    Remote {
        /// Where it is.
        url: String,
    },
}

/// One job, as seen from the terminal.
pub struct Attendance<'a> {
    client: ControlClient,
    job: String,
    attempt: u32,
    spec: &'a JobSpec,
    args: &'a JobArgs,
    owner: Owner,
    screen: Screen,
}

impl<'a> Attendance<'a> {
    /// Attends the attempt that was just submitted.
    pub fn new(
        client: ControlClient,
        submitted: SubmitResponse,
        spec: &'a JobSpec,
        args: &'a JobArgs,
        owner: Owner,
    ) -> Self {
        let SubmitResponse { job, attempt } = submitted;
        Attendance { client, job, attempt, spec, args, owner, screen: Screen::new(spec) }
    }

    /// Shows progress until the job ends or the user leaves; the exit code.
    pub async fn until_end(mut self) -> Result<u8, Failure> {
        let handle = |kind| signal(kind).map_err(|error| Failure::new(exit::FAILED, error.to_string()));
        let mut interrupt = handle(SignalKind::interrupt())?;
        let mut terminate = handle(SignalKind::terminate())?;
        let mut asked: Option<u8> = None;
        let mut sequence = 0;
        let mut events = self.watch(sequence).await?;
        loop {
            let event = tokio::select! {
                event = events.message() => event,
                code = told_to_stop(&mut interrupt, &mut terminate) => {
                    if let Owner::Remote { url } = &self.owner {
                        self.screen.close();
                        eprintln!("detached: {} goes on; stop it with", self.job);
                        eprintln!("  coordinator cancel {} --coordinator {url}", self.job);
                        return Ok(exit::INTERRUPTED);
                    }
                    self.ask_to_stop(asked.is_some()).await?;
                    asked.get_or_insert(code);
                    continue;
                }
            };
            let event = match (event, &self.owner) {
                (Ok(Some(event)), _) => event,
                (Ok(None), Owner::Embedded) => {
                    return Err(Failure::new(
                        exit::UNREACHABLE,
                        "the coordinator ended the stream of events",
                    ));
                }
                (Err(status), Owner::Embedded) => return Err(self.lost(&status)),
                (broken, Owner::Remote { .. }) => {
                    let status =
                        broken.err().unwrap_or_else(|| tonic::Status::unavailable("it closed the stream"));
                    tokio::select! {
                        again = self.reconnect(&status, sequence) => events = again?,
                        _ = told_to_stop(&mut interrupt, &mut terminate) => return Err(self.lost(&status)),
                    }
                    continue;
                }
            };
            sequence = event.sequence;
            if event.attempt < self.attempt {
                continue;
            }
            match event.body {
                Some(Body::State(state)) if state.state() == JobState::Suspended => {
                    self.screen.close();
                    eprintln!("{} is suspended; coordinator resume {} lets it go on", self.job, self.job);
                    return Ok(exit::OK);
                }
                Some(Body::State(state)) if state.state().is_end() => return Ok(self.ended(&state, asked)),
                // The only worker is on its way, or it is all there will ever be.
                Some(Body::Waiting(waiting))
                    if matches!(self.owner, Owner::Embedded) && is_too_small(&waiting) =>
                {
                    return Err(no_capacity(&waiting));
                }
                Some(Body::Waiting(_)) if matches!(self.owner, Owner::Embedded) => {}
                Some(body) => self.screen.show(body),
                None => {}
            }
        }
    }

    async fn watch(&mut self, after: u64) -> Result<Streaming<JobEvent>, tonic::Status> {
        let request = WatchRequest { job: self.job.clone(), from_sequence: after + 1, only_past: false };
        Ok(self.client.watch(request).await?.into_inner())
    }

    /// Dials again until the coordinator is back; the job goes on meanwhile.
    async fn reconnect(
        &mut self,
        status: &tonic::Status,
        after: u64,
    ) -> Result<Streaming<JobEvent>, Failure> {
        let job = &self.job;
        self.screen.say(&format!(
            "the coordinator is out of reach ({}); {job} goes on, and so does this, when it is back",
            status.message()
        ));
        loop {
            tokio::time::sleep(DIAL_AGAIN).await;
            match self.watch(after).await {
                Ok(events) => {
                    self.screen.say("the coordinator is back");
                    return Ok(events);
                }
                Err(status) if status.code() == tonic::Code::Unavailable => {}
                Err(status) => return Err(self.lost(&status)),
            }
        }
    }

    async fn ask_to_stop(&mut self, again: bool) -> Result<(), Failure> {
        let grace_ms = if again { 0 } else { STOP_GRACE_MS };
        self.screen.say(if again {
            "stopping at once"
        } else {
            "stopping; while it trains, after this step and with a checkpoint (Ctrl-C again: at once, without)"
        });
        self.client.cancel(CancelRequest { job: self.job.clone(), grace_ms }).await?;
        Ok(())
    }

    fn ended(&mut self, state: &StateChanged, asked: Option<u8>) -> u8 {
        self.screen.close();
        let again = summary::Command { job: self.args, coordinator: self.coordinator() };
        match state.state() {
            JobState::Completed => {
                summary::completed(&self.job, self.spec, &self.screen.totals, &again);
                exit::OK
            }
            JobState::Stopped => {
                eprintln!("{} stopped after step {}, with a checkpoint; go on with", self.job, state.step);
                eprintln!("  {}", again.launch("--resume"));
                asked.unwrap_or(exit::PREEMPTED)
            }
            JobState::Cancelled => {
                eprintln!("{} was cancelled", self.job);
                // 143 promises a checkpoint.
                asked.filter(|code| *code != exit::PREEMPTED).unwrap_or(exit::FAILED)
            }
            _ => {
                let failure = state.failure.clone().unwrap_or_default();
                summary::failed(&self.job, &failure, self.screen.totals.has_checkpoint, &again);
                exit::FAILED
            }
        }
    }

    /// The coordinator does not answer any more; what that means for the job.
    fn lost(&self, status: &tonic::Status) -> Failure {
        let message = match &self.owner {
            Owner::Embedded => format!("the coordinator in this process failed: {}", status.message()),
            Owner::Remote { url } => format!(
                "lost the coordinator at {url} ({}); {job} may go on: coordinator status {job} --coordinator {url}",
                status.message(),
                job = self.job
            ),
        };
        Failure::new(exit::UNREACHABLE, message)
    }

    fn coordinator(&self) -> Option<&str> {
        match &self.owner {
            Owner::Embedded => None,
            Owner::Remote { url } => Some(url),
        }
    }
}

/// Whether the workers that there are can never run the stage.
fn is_too_small(waiting: &Waiting) -> bool {
    waiting.workers > 0 && waiting.total < waiting.needed
}

fn no_capacity(waiting: &Waiting) -> Failure {
    let gpu = if waiting.needs_gpu { " with a GPU" } else { "" };
    let (needed, total) = (waiting.needed, waiting.total);
    let hint = "lower train.ranks, raise workers.slots, or launch on a coordinator with more workers";
    Failure::new(exit::NO_CAPACITY, format!("{needed} slots{gpu} are needed and there are {total}: {hint}"))
}

/// The exit code of the signal that came.
async fn told_to_stop(interrupt: &mut Signal, terminate: &mut Signal) -> u8 {
    tokio::select! {
        _ = interrupt.recv() => exit::INTERRUPTED,
        _ = terminate.recv() => exit::PREEMPTED,
    }
}
