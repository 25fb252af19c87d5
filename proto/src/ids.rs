//! Identity and position. Each prints short (`r3/8`, `s42`), so that log lines stay readable.

use std::fmt;

use serde::{Deserialize, Serialize};

/// A job's name on one control plane: letters, digits, `-`, `_`, `.`; at most 100 characters.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct JobId(pub String);

/// One start of a job; counts from 1. Every command and secret carries (job, attempt).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Attempt(pub u32);

/// A rank and the size of the world that it is part of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Rank {
    /// 0-based.
    pub rank: u32,
    /// Number of ranks, at least 1.
    pub world: u32,
}

/// Optimizer updates done so far; step 1 is the first update.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Step(pub u64);

impl Rank {
    /// The only rank of a world of one.
    pub const SOLE: Rank = Rank { rank: 0, world: 1 };
}

impl fmt::Display for JobId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Display for Attempt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "a{}", self.0)
    }
}

impl fmt::Display for Rank {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "r{}/{}", self.rank, self.world)
    }
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "s{}", self.0)
    }
}
