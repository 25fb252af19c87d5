//! What `worker measure` is asked and what it answers: lines of JSON on its stdin and stdout.
//!
//! One process plays rank 0 of the job: its shapes, dtypes and strategy are the job's, its peers are made
//! up. A question may name smaller depths; who asks goes on from there to the whole model.

use serde::{Deserialize, Serialize};

use crate::job::{JobSpec, Recompute};
use crate::model::ModelConfig;

/// The first line on stdin.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Request {
    /// The job.
    pub spec: JobSpec,
    /// The shape of its model.
    pub config: ModelConfig,
    /// What is measured, in this order.
    pub points: Vec<Point>,
    /// What a rank sends to its peers in a second; absent: as if traffic took no time.
    pub link_bytes_per_second: Option<f64>,
    /// Threads of a CPU rank.
    pub threads: u32,
    /// Before each measurement say [`Answer::Ready`] and wait for a line, so that ranks of one machine
    /// measure together.
    pub in_step: bool,
}

/// A model of some of the job's blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Point {
    /// Blocks.
    pub layers: u64,
    /// Which of them are computed again.
    pub recompute: Recompute,
    /// Blocks that stay gathered, see `train.resident_blocks`.
    pub resident_blocks: u32,
    /// Whether each step has all of the job's micro-batches; else at most two.
    pub whole_steps: bool,
}

/// One line on stdout.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Answer {
    /// It waits for a line before it measures.
    Ready,
    /// What one [`Point`] took.
    Point(Box<Measured>),
    /// What a checkpoint is written at; the last line.
    Disk(Disk),
}

/// What one point took.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Measured {
    /// Which one.
    pub point: Point,
    /// Whether on a GPU.
    pub on_gpu: bool,
    /// A step's first micro-batch, which gathers all.
    pub first_micro_batch: Seconds,
    /// One of the others, where there are any.
    pub later_micro_batch: Option<Seconds>,
    /// From the last micro-batch to gradients that are complete, and the update.
    pub update: Seconds,
    /// The whole step.
    pub step: Seconds,
    /// One micro-batch of an evaluation.
    pub evaluation: Seconds,
    /// How long training stands still for an asynchronous checkpoint; absent where none is staged.
    pub staging: Option<Seconds>,
    /// fp32 elements that this rank updates.
    pub shard_elements: u64,
    /// Most in live tensors since the set-up, with what is staged for a checkpoint, bytes.
    pub peak_bytes: u64,
    /// What the set-up left in live tensors, bytes.
    pub held_bytes: u64,
    /// What a step's gathers brought this rank, bytes.
    pub gathered_bytes: u64,
    /// What a step's reductions took from this rank, bytes.
    pub reduced_bytes: u64,
}

/// Seconds of something that was done several times.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Seconds {
    /// The one in the middle.
    pub median: f64,
    /// The shortest.
    pub least: f64,
    /// The longest.
    pub most: f64,
}

impl Seconds {
    /// Of `seconds`; `None` of none.
    pub fn of(seconds: &[f64]) -> Option<Self> {
        let mut sorted = seconds.to_vec();
        sorted.sort_by(f64::total_cmp);
        Some(Seconds {
            median: *sorted.get(sorted.len() / 2)?,
            least: *sorted.first()?,
            most: *sorted.last()?,
        })
    }
}

/// Rates of one rank that writes its part of a checkpoint, while the others write theirs.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Disk {
    /// What was written for it.
    pub bytes: u64,
    /// Hashed, written and on the disk.
    pub write_bytes_per_second: f64,
    /// Hashed alone.
    pub hash_bytes_per_second: f64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_the_one_in_the_middle() {
        assert_eq!(Seconds::of(&[]), None);
        assert_eq!(Seconds::of(&[3.0, 1.0, 2.0]), Some(Seconds { median: 2.0, least: 1.0, most: 3.0 }));
    }
}
