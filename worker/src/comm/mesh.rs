//! The groups that a rank belongs to: all ranks; those that share one copy of the weights; and
//! those that hold the same shard of other copies.
//!
//! Ranks that share a copy are neighbours: of `S` ranks a copy, rank `r` is the `r % S`-th of copy `r / S`.

use std::sync::Arc;

use tunefleet_proto::ids::Rank;

use super::{Communicator, Solo};

/// The groups, borrowed.
#[derive(Clone, Copy)]
pub struct Mesh<'a> {
    /// All ranks: control values, data, randomness.
    pub world: &'a dyn Communicator,
    /// Ranks that share one copy: weights are gathered from them, gradients scattered to them.
    pub shards: &'a dyn Communicator,
    /// Ranks that hold the same shard; absent where there is one copy.
    pub replicas: Option<&'a dyn Communicator>,
}

impl<'a> Mesh<'a> {
    /// One copy over all ranks of `world`.
    pub fn sharded(world: &'a dyn Communicator) -> Self {
        Mesh { world, shards: world, replicas: None }
    }

    /// A copy on every rank of `world`.
    pub fn replicated(world: &'a dyn Communicator) -> Self {
        let replicas = (world.rank().world > 1).then_some(world);
        Mesh { world, shards: &Solo, replicas }
    }

    /// Which copy this rank has a part in.
    pub fn copy(&self) -> u32 {
        self.replicas.map_or(0, |replicas| replicas.rank().rank)
    }
}

/// The groups, owned.
#[derive(Clone)]
pub struct Groups {
    /// All ranks.
    pub world: Arc<dyn Communicator>,
    /// See [`Mesh::shards`].
    pub shards: Arc<dyn Communicator>,
    /// See [`Mesh::replicas`].
    pub replicas: Option<Arc<dyn Communicator>>,
}

impl Groups {
    /// A world of one.
    pub fn sole() -> Self {
        Groups { world: Arc::new(Solo), shards: Arc::new(Solo), replicas: None }
    }

    /// The groups of a strategy that needs none besides `world`: `shard_ranks` is 1 or all.
    pub fn of_world(world: Arc<dyn Communicator>, shard_ranks: u32) -> Self {
        match shard_ranks {
            1 if world.rank().world > 1 => {
                Groups { shards: Arc::new(Solo), replicas: Some(world.clone()), world }
            }
            _ => Groups { shards: world.clone(), replicas: None, world },
        }
    }

    /// Borrowed.
    pub fn mesh(&self) -> Mesh<'_> {
        Mesh { world: &*self.world, shards: &*self.shards, replicas: self.replicas.as_deref() }
    }

    /// From any thread: fails what is under way and all that follows, in all groups.
    pub fn abort(&self, reason: &str) {
        for group in [Some(&self.world), Some(&self.shards), self.replicas.as_ref()].into_iter().flatten() {
            group.abort(reason);
        }
    }
}

/// The world's ranks that share a copy with `rank`, and those that hold its shard of other copies.
pub fn neighbours(rank: Rank, shard_ranks: u32) -> (Vec<u32>, Vec<u32>) {
    let first = rank.rank / shard_ranks * shard_ranks;
    let shards = (first..first + shard_ranks).collect();
    let replicas = (0..rank.world / shard_ranks).map(|copy| copy * shard_ranks + rank.rank % shard_ranks);
    (shards, replicas.collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_rank_is_in_one_copy_and_in_one_row_of_equals() {
        let of = |rank| neighbours(Rank { rank, world: 8 }, 4);
        assert_eq!(of(0), (vec![0, 1, 2, 3], vec![0, 4]));
        assert_eq!(of(6), (vec![4, 5, 6, 7], vec![2, 6]));
        assert_eq!(neighbours(Rank { rank: 3, world: 4 }, 1), (vec![3], vec![0, 1, 2, 3]));
        assert_eq!(neighbours(Rank { rank: 3, world: 4 }, 4), (vec![0, 1, 2, 3], vec![3]));
    }
}
