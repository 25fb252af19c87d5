//! Which ranks run where: all of a task's ranks find a slot, or none is taken.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

/// Name of a worker, unique on a control plane.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct WorkerName(String);

/// What one worker has room for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Room {
    /// Free slots.
    pub free: u32,
    /// All slots.
    pub total: u32,
    /// Whether its slots have a GPU each.
    pub has_gpu: bool,
}

impl From<&str> for WorkerName {
    fn from(name: &str) -> Self {
        WorkerName(name.to_owned())
    }
}

impl fmt::Display for WorkerName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A worker for each of `world` ranks, in rank order; `None` when there is not room for all.
/// The emptiest workers come first, so that a task spans as few machines as possible.
pub fn place(rooms: &BTreeMap<WorkerName, Room>, world: u32, needs_gpu: bool) -> Option<Vec<WorkerName>> {
    let mut usable: Vec<_> = rooms.iter().filter(|(_, room)| room.has_gpu || !needs_gpu).collect();
    usable.sort_by_key(|(name, room)| (std::cmp::Reverse(room.free), *name));
    let ranks: Vec<WorkerName> = usable
        .into_iter()
        .flat_map(|(name, room)| std::iter::repeat_n(name, room.free as usize))
        .take(world as usize)
        .cloned()
        .collect();
    (ranks.len() == world as usize).then_some(ranks)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rooms(list: &[(&str, u32, bool)]) -> BTreeMap<WorkerName, Room> {
        list.iter()
            .map(|(name, free, has_gpu)| ((*name).into(), Room { free: *free, total: 4, has_gpu: *has_gpu }))
            .collect()
    }

    fn placed(rooms: &BTreeMap<WorkerName, Room>, world: u32, needs_gpu: bool) -> Option<Vec<String>> {
        place(rooms, world, needs_gpu).map(|ranks| ranks.iter().map(WorkerName::to_string).collect())
    }

    #[test]
    fn a_task_gets_all_its_slots_on_as_few_workers_as_possible_or_none() {
        let rooms = rooms(&[("a", 1, false), ("b", 4, true), ("c", 2, true)]);
        assert_eq!(placed(&rooms, 4, false).unwrap(), ["b", "b", "b", "b"]);
        assert_eq!(placed(&rooms, 5, false).unwrap(), ["b", "b", "b", "b", "c"]);
        assert_eq!(placed(&rooms, 7, false).unwrap(), ["b", "b", "b", "b", "c", "c", "a"]);
        assert_eq!(placed(&rooms, 8, false), None);
        assert_eq!(placed(&rooms, 7, true), None, "a has no GPU");
    }
}
