//! The logged values of a job, thinned out for a picture, with its newest events.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};

use axum::Json;
use axum::extract::{Path, State};
use axum::response::Response;
use serde::Serialize;
use serde_json::{Value, json};
use tonic::Status;
use tunefleet_proto::rpc::JobEvent;
use tunefleet_proto::rpc::job_event::Body;

use super::{Web, refusal};
use crate::control::events::EventLog;
use crate::control::plane::Message;
use crate::events;

/// Points of a curve that a browser is shown, and that are held.
const SHOWN: usize = 1500;
const HELD: usize = 16_384;
/// Events that are shown below the curves.
const EVENTS: usize = 300;
/// Jobs whose curves are held.
const JOBS: usize = 64;

#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
struct Point {
    step: u64,
    unix_ms: u64,
    tokens: u64,
    loss: f64,
    grad_norm: f64,
    learning_rate: f64,
    tokens_per_second: f64,
}

#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
struct Eval {
    step: u64,
    unix_ms: u64,
    loss: f64,
}

#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
struct Attempt {
    attempt: u32,
    /// Its first step.
    step: u64,
}

/// One job's.
#[derive(Debug, Default)]
struct Curves {
    /// Number of the newest event that is in it.
    through: u64,
    steps: Vec<Point>,
    evals: Vec<Eval>,
    attempts: Vec<Attempt>,
    newest: VecDeque<Value>,
}

impl Curves {
    fn take(&mut self, event: &JobEvent) {
        self.through = event.sequence;
        match &event.body {
            Some(Body::Step(step)) => {
                self.begin(event.attempt, step.step);
                self.steps.push(Point {
                    step: step.step,
                    unix_ms: event.unix_ms,
                    tokens: step.tokens,
                    loss: step.loss,
                    grad_norm: step.grad_norm,
                    learning_rate: step.learning_rate,
                    tokens_per_second: step.tokens_per_second,
                });
                if self.steps.len() > HELD {
                    self.steps = thinned(&self.steps, HELD / 2);
                }
            }
            Some(Body::Evaluated(eval)) => {
                self.evals.push(Eval { step: eval.step, unix_ms: event.unix_ms, loss: eval.loss });
                if self.evals.len() > HELD {
                    let mut count = 0;
                    self.evals.retain(|_| {
                        count += 1;
                        count % 2 == 0
                    });
                }
            }
            Some(Body::Section(_)) | None => {}
            Some(_) => {
                self.newest.push_back(events::to_json(event));
                if self.newest.len() > EVENTS {
                    self.newest.pop_front();
                }
            }
        }
    }

    /// What an attempt makes again replaces what was made before.
    fn begin(&mut self, attempt: u32, step: u64) {
        if self.attempts.last().is_some_and(|last| last.attempt == attempt) {
            return;
        }
        self.attempts.push(Attempt { attempt, step });
        self.steps.truncate(self.steps.partition_point(|point| point.step < step));
        self.evals.truncate(self.evals.partition_point(|eval| eval.step < step));
    }

    async fn catch_up(&mut self, log: &Arc<EventLog>) -> Result<(), Status> {
        if log.newest() < self.through {
            // Another job of that name.
            *self = Curves::default();
        }
        loop {
            let next = log.next_after(self.through, true).await;
            let next = next.map_err(|error| Status::internal(error.to_string()))?;
            if next.is_empty() {
                return Ok(());
            }
            next.iter().for_each(|event| self.take(event));
        }
    }

    fn to_json(&self) -> Value {
        json!({
            "through": self.through, "steps": thinned(&self.steps, SHOWN), "evals": self.evals,
            "attempts": self.attempts, "events": self.newest,
        })
    }
}

/// At most `most` points in the same order: of each stretch the one of the lowest and the one of the highest loss, so
/// that what stands out still does; and the last.
fn thinned(points: &[Point], most: usize) -> Vec<Point> {
    if points.len() <= most {
        return points.to_vec();
    }
    let stretch = points.len().div_ceil(most.saturating_sub(1).max(2) / 2);
    let mut kept = Vec::with_capacity(most);
    for stretch in points.chunks(stretch) {
        let by_loss = |a: &&Point, b: &&Point| a.loss.total_cmp(&b.loss);
        let mut ends: Vec<Point> = stretch
            .iter()
            .min_by(by_loss)
            .into_iter()
            .chain(stretch.iter().max_by(by_loss))
            .copied()
            .collect();
        ends.sort_by_key(|point| point.step);
        ends.dedup_by_key(|point| point.step);
        kept.extend(ends);
    }
    if let Some(last) = points.last().filter(|last| kept.last() != Some(last)) {
        kept.push(*last);
    }
    kept
}

/// Curves that were asked for lately.
#[derive(Default)]
pub struct Cache {
    jobs: Mutex<HashMap<String, Arc<tokio::sync::Mutex<Curves>>>>,
}

impl Cache {
    fn of(&self, job: &str) -> Arc<tokio::sync::Mutex<Curves>> {
        let mut jobs = self.jobs.lock().unwrap_or_else(PoisonError::into_inner);
        if jobs.len() >= JOBS && !jobs.contains_key(job) {
            jobs.clear();
        }
        Arc::clone(jobs.entry(job.to_owned()).or_default())
    }
}

/// The curves of a job.
pub async fn curves(State(web): State<Web>, Path(job): Path<String>) -> Result<Json<Value>, Response> {
    let name = job.clone();
    let log =
        web.plane.ask(|reply| Message::Events { job, reply }).await.map_err(|status| refusal(&status))?;
    let curves = web.curves.of(&name);
    let mut curves = curves.lock().await;
    curves.catch_up(&log).await.map_err(|status| refusal(&status))?;
    Ok(Json(curves.to_json()))
}

#[cfg(test)]
mod tests {
    use tunefleet_proto::rpc::StepDone;

    use super::*;

    fn step(sequence: u64, attempt: u32, step: u64, loss: f64) -> JobEvent {
        let body = Some(Body::Step(StepDone { step, loss, ..StepDone::default() }));
        JobEvent { sequence, attempt, body, ..JobEvent::default() }
    }

    #[test]
    fn what_an_attempt_makes_again_replaces_what_was_made_before() {
        let mut curves = Curves::default();
        for (sequence, (attempt, number)) in [(1, 1), (1, 2), (1, 3), (2, 2), (2, 3)].into_iter().enumerate()
        {
            curves.take(&step(sequence as u64 + 1, attempt, number, f64::from(attempt)));
        }
        let shown: Vec<_> = curves.steps.iter().map(|point| (point.step, point.loss)).collect();
        assert_eq!(shown, [(1, 1.0), (2, 2.0), (3, 2.0)]);
        assert_eq!(curves.attempts.last(), Some(&Attempt { attempt: 2, step: 2 }));
        assert_eq!(curves.through, 5);
    }

    #[test]
    fn thinning_keeps_what_stands_out_and_the_last_point_and_memory_is_bounded() {
        let mut curves = Curves::default();
        for number in 1..=100_000 {
            let loss = if number == 77_777 { f64::INFINITY } else { 5.0 - number as f64 * 1e-5 };
            curves.take(&step(number, 1, number, loss));
        }
        assert!(curves.steps.len() <= HELD, "{}", curves.steps.len());
        let shown = thinned(&curves.steps, SHOWN);
        assert!(shown.len() <= SHOWN, "{}", shown.len());
        assert!(shown.iter().any(|point| point.step == 77_777));
        assert_eq!(shown.last().map(|point| point.step), Some(100_000));
        assert!(shown.is_sorted_by_key(|point| point.step));
        assert_eq!(thinned(&[], SHOWN), []);
    }
}
