//! Calls that last: the events of a job and the lines of its logs, to one who is admitted as long as what he has
//! shown is good.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;
use tonic::Status;
use tunefleet_proto::rpc::{JobEvent, JobState, LogLines, LogsRequest};

use super::events::EventLog;
use super::guard::{Caller, Guard};
use super::plane::{Message, Plane};
use super::relay;

/// Messages under way to one who watches.
pub const WINDOW: usize = 64;
/// Between two looks at whether there is more.
const LOOK_AGAIN: Duration = Duration::from_secs(1);

/// Who watches, and whether he still may.
#[derive(Clone)]
pub struct Watcher {
    /// Who.
    pub who: Caller,
    /// Who knows.
    pub guard: Guard,
}

/// When a stream of events ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Until {
    /// With the newest that there is.
    Now,
    /// With the end of the job.
    TheEnd,
    /// When the watcher has gone: a job that has ended may be resumed.
    Left,
}

/// Events of a job after number `sequence`.
pub fn events(
    log: Arc<EventLog>,
    mut sequence: u64,
    until: Until,
    watcher: Watcher,
) -> mpsc::Receiver<Result<JobEvent, Status>> {
    let (sender, receiver) = mpsc::channel(WINDOW);
    tokio::spawn(async move {
        loop {
            let next = tokio::select! {
                next = log.next_after(sequence, until == Until::Now) => next,
                () = sender.closed() => return,
            };
            if let Err(revoked) = watcher.guard.admits_still(&watcher.who) {
                let _ = sender.send(Err(revoked)).await;
                return;
            }
            match next {
                Ok(next) if next.is_empty() && until == Until::Left => tokio::select! {
                    () = tokio::time::sleep(LOOK_AGAIN) => {}
                    () = sender.closed() => return,
                },
                Ok(next) if next.is_empty() => return,
                Ok(next) => {
                    for event in next {
                        sequence = event.sequence;
                        if sender.send(Ok(event)).await.is_err() {
                            return;
                        }
                    }
                }
                Err(error) => {
                    let _ = sender.send(Err(Status::internal(error.to_string()))).await;
                    return;
                }
            }
        }
    });
    receiver
}

/// Lines of a job's logs, wherever its ranks run.
///
/// # Errors
/// When there is no such job, or no worker to ask.
pub async fn logs(
    plane: &Plane,
    what: LogsRequest,
    watcher: Watcher,
) -> Result<mpsc::Receiver<Result<LogLines, Status>>, Status> {
    let (follow, job, mut asked) = (what.follow, what.job.clone(), what.attempt);
    if asked == 0 {
        let job = job.clone();
        asked = plane.ask(|reply| Message::Status { job, reply }).await?.attempt;
    }
    let (lines, mut received) = mpsc::channel(relay::WINDOW);
    plane.ask(|reply| Message::Logs { what, lines, reply }).await?;
    let (sender, shown) = mpsc::channel(WINDOW);
    let plane = plane.clone();
    tokio::spawn(async move {
        let mut over = std::pin::pin!(async {
            while !follow || lives(&plane, &job, asked).await {
                tokio::time::sleep(LOOK_AGAIN).await;
            }
            // What it wrote last is on its way.
            tokio::time::sleep(LOOK_AGAIN).await;
        });
        loop {
            let line = tokio::select! {
                line = received.recv() => line,
                () = &mut over => return,
                () = sender.closed() => return,
            };
            let Some(line) = line else { return };
            let line = watcher.guard.admits_still(&watcher.who).and(line);
            let is_over = line.is_err();
            if sender.send(line).await.is_err() || is_over {
                return;
            }
        }
    });
    Ok(shown)
}

/// Whether that attempt of a job may still write logs.
async fn lives(plane: &Plane, job: &str, attempt: u32) -> bool {
    let job = job.to_owned();
    let status = plane.ask(|reply| Message::Status { job, reply }).await;
    status.is_ok_and(|status| {
        let state = status.state();
        let rests = state.is_end() || matches!(state, JobState::Suspended | JobState::Restarting);
        status.attempt == attempt && !rests
    })
}
