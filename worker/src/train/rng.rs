//! Seeds by position: no generator state to save, and none to restore.

use sha2::{Digest, Sha256};

use super::walk::MicroPosition;

/// The seeds of one run.
#[derive(Debug, Clone, Copy)]
pub struct Seeds {
    seed: u64,
}

impl Seeds {
    /// Those of `seed`.
    pub fn new(seed: u64) -> Self {
        Seeds { seed }
    }

    /// The seed of a unit's dropout masks at a position on a rank.
    pub fn at(&self, position: MicroPosition, rank: u32, unit: usize) -> i64 {
        let mut hash = Sha256::new();
        for part in [self.seed, position.step, position.micro.into(), rank.into(), unit as u64] {
            hash.update(part.to_le_bytes());
        }
        let digest = hash.finalize();
        let mut first = [0; 8];
        first.copy_from_slice(&digest[..8]);
        i64::from_le_bytes(first)
    }
}
