//! Which of the waiting tasks get slots now. All ranks of a task are placed, or none; a task that the fleet
//! could hold is not overtaken by less urgent ones that would take the slots it waits for.

use std::collections::{BTreeMap, BTreeSet};

use tunefleet_proto::ids::JobId;

use super::placement::{Room, WorkerName, place};

/// A task that waits.
#[derive(Debug, Clone)]
pub struct Waiting {
    /// Whose.
    pub job: JobId,
    /// The highest comes first.
    pub priority: u8,
    /// Among equals, the oldest comes first.
    pub submitted_unix_ms: u64,
    /// Its ranks.
    pub world: u32,
    /// Each rank needs a GPU.
    pub needs_gpu: bool,
    /// Workers to be left out where others can hold it.
    pub excluded: BTreeSet<WorkerName>,
}

/// Where the ranks of each task go that is placed, in rank order. What is placed is taken from `rooms`' free slots.
pub fn place_all(
    waiting: &[Waiting],
    rooms: &BTreeMap<WorkerName, Room>,
) -> BTreeMap<JobId, Vec<WorkerName>> {
    let mut order: Vec<&Waiting> = waiting.iter().collect();
    order.sort_by_key(|one| (std::cmp::Reverse(one.priority), one.submitted_unix_ms, one.job.clone()));
    let (all, mut rooms) = (rooms, rooms.clone());
    let mut placed = BTreeMap::new();
    for one in order {
        // Which workers it may use does not depend on who came before; their free slots do.
        let mut usable = usable(one, all);
        let total: u64 = usable.values().map(|room| u64::from(room.total)).sum();
        let names: Vec<WorkerName> = usable.keys().cloned().collect();
        usable.retain(|worker, _| rooms.contains_key(worker));
        for (worker, room) in &mut usable {
            room.free = rooms.get(worker).map_or(0, |room| room.free);
        }
        match place(&usable, one.world, one.needs_gpu) {
            Some(ranks) => {
                for worker in &ranks {
                    if let Some(room) = rooms.get_mut(worker) {
                        room.free = room.free.saturating_sub(1);
                    }
                }
                placed.insert(one.job.clone(), ranks);
            }
            // It waits for slots of these workers: they are nobody else's before it has them.
            None if total >= u64::from(one.world) => {
                rooms.retain(|worker, _| !names.contains(worker));
            }
            // The workers that there are could never hold it.
            None => {}
        }
    }
    placed
}

/// Workers that the task may use.
fn usable(one: &Waiting, rooms: &BTreeMap<WorkerName, Room>) -> BTreeMap<WorkerName, Room> {
    let fits = |room: &Room| room.has_gpu || !one.needs_gpu;
    let all = rooms.iter().filter(|(_, room)| fits(room)).map(|(worker, room)| (worker.clone(), *room));
    let all: BTreeMap<WorkerName, Room> = all.collect();
    let mut preferred = all.clone();
    preferred.retain(|worker, _| !one.excluded.contains(worker));
    let total: u64 = preferred.values().map(|room| u64::from(room.total)).sum();
    if total >= u64::from(one.world) { preferred } else { all }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn task(job: &str, priority: u8, submitted_unix_ms: u64, world: u32) -> Waiting {
        let job = JobId(job.to_owned());
        Waiting { job, priority, submitted_unix_ms, world, needs_gpu: false, excluded: BTreeSet::new() }
    }

    fn rooms(list: &[(&str, u32, u32)]) -> BTreeMap<WorkerName, Room> {
        list.iter()
            .map(|(name, free, total)| {
                (WorkerName::from(*name), Room { free: *free, total: *total, has_gpu: false })
            })
            .collect()
    }

    fn placed(waiting: &[Waiting], rooms: &BTreeMap<WorkerName, Room>) -> Vec<String> {
        place_all(waiting, rooms).into_keys().map(|job| job.0).collect()
    }

    #[test]
    fn the_urgent_come_first_and_then_the_old() {
        let waiting = [task("new", 50, 3, 2), task("old", 50, 1, 2), task("urgent", 90, 9, 2)];
        assert_eq!(placed(&waiting, &rooms(&[("a", 2, 4)])), ["urgent"]);
        assert_eq!(placed(&waiting, &rooms(&[("a", 4, 4)])), ["old", "urgent"]);
    }

    #[test]
    fn a_large_task_is_not_starved_by_small_ones() {
        let waiting = [task("large", 50, 1, 4), task("small", 50, 2, 1)];
        assert!(placed(&waiting, &rooms(&[("a", 3, 4)])).is_empty(), "its slots are kept for it");
        assert_eq!(placed(&waiting, &rooms(&[("a", 3, 3)])), ["small"], "it can never run here");
        let more_urgent = [task("large", 50, 1, 4), task("small", 60, 2, 1)];
        assert_eq!(placed(&more_urgent, &rooms(&[("a", 3, 4)])), ["small"]);
    }

    #[test]
    fn excluded_workers_are_used_only_where_the_others_could_never_do() {
        let mut one = task("one", 50, 1, 2);
        one.excluded.insert(WorkerName::from("bad"));
        assert!(placed(&[one.clone()], &rooms(&[("bad", 2, 2), ("good", 0, 2)])).is_empty());
        assert_eq!(placed(&[one], &rooms(&[("bad", 2, 2), ("good", 1, 1)])), ["one"]);
    }

    #[test]
    fn slots_that_are_kept_for_another_do_not_open_an_excluded_worker() {
        let mut gpu = task("gpu", 50, 1, 2);
        gpu.needs_gpu = true;
        let mut one = task("one", 50, 2, 1);
        one.excluded.insert(WorkerName::from("bad"));
        let mut rooms = rooms(&[("bad", 2, 2), ("good", 1, 2)]);
        rooms.get_mut(&WorkerName::from("good")).unwrap().has_gpu = true;
        assert!(placed(&[gpu, one], &rooms).is_empty());
    }

    proptest! {
        #[test]
        fn nobody_gets_a_slot_twice_and_all_ranks_are_placed_or_none(
            tasks in prop::collection::vec((0u8..3, 1u32..6), 0..8),
            sizes in prop::collection::vec((0u32..5, 0u32..3), 0..6),
        ) {
            let waiting: Vec<Waiting> = tasks
                .iter()
                .enumerate()
                .map(|(index, (priority, world))| task(&format!("j{index}"), *priority, index as u64, *world))
                .collect();
            let rooms: BTreeMap<WorkerName, Room> = sizes
                .iter()
                .enumerate()
                .map(|(index, (free, used))| {
                    let room = Room { free: *free, total: free + used, has_gpu: false };
                    (WorkerName::from(format!("w{index}").as_str()), room)
                })
                .collect();
            let placed = place_all(&waiting, &rooms);
            for one in &waiting {
                let ranks = placed.get(&one.job);
                prop_assert!(ranks.is_none_or(|ranks| ranks.len() == one.world as usize));
            }
            for (name, room) in &rooms {
                let taken = placed.values().flatten().filter(|worker| *worker == name).count();
                prop_assert!(taken <= room.free as usize);
            }
            // The first of all gets its slots as soon as they are free.
            let first = waiting.iter().min_by_key(|one| (std::cmp::Reverse(one.priority), one.submitted_unix_ms));
            if let Some(first) = first {
                let free: u32 = rooms.values().map(|room| room.free).sum();
                prop_assert_eq!(placed.contains_key(&first.job), free >= first.world);
            }
        }
    }
}
