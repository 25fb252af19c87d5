//! A deterministic simulation of a whole fleet: the real state machine and a real store, with workers, network
//! and clock made up from one seed. Faults strike everywhere, the coordinator ends at every point between a
//! change and its consequence; in the end all is healed, and every job must have come to its end.

mod daemon;
mod network;
mod random;
mod world;

pub use daemon::Daemon;
pub use network::Down;
pub use random::Random;
use std::time::Duration;

use tunefleet_proto::ids::JobId;
use tunefleet_proto::rpc::Continuation;
use world::{Plan, Seen, World};

use crate::control::fleet::{Fleet, Submission};
use crate::control::settings::{Now, Settings};
use crate::control::store::{Loaded, Write};

/// One seed; a failure names it.
fn simulate(plan: Plan, seed: u64) -> Seen {
    let run = std::panic::AssertUnwindSafe(|| World::new(plan, seed).run());
    std::panic::catch_unwind(run).unwrap_or_else(|panic| {
        eprintln!("seed {seed} of {plan:?} failed: TUNEFLEET_SEED={seed} runs it alone");
        std::panic::resume_unwind(panic)
    })
}

/// The seeds to run: `count` from the first, or the one that the environment names.
fn seeds(first: u64, count: u64) -> std::ops::Range<u64> {
    let told = std::env::var("TUNEFLEET_SEED").ok().and_then(|seed| seed.parse::<u64>().ok());
    told.map_or(first..first + count, |seed| seed..seed + 1)
}

fn run(plan: Plan, first: u64, count: u64) -> Seen {
    let mut all = Seen::default();
    for seed in seeds(first, count) {
        let seen = simulate(plan, seed);
        all.coordinator_ends += seen.coordinator_ends;
        all.faults += seen.faults;
        all.attempts += seen.attempts;
        all.jobs += seen.jobs;
        all.completed += seen.completed;
    }
    eprintln!("{all:?}");
    all
}

#[test]
fn a_fleet_that_nothing_disturbs_trains_every_job_in_one_attempt() {
    run(Plan { faults: 0.0, coordinator_crashes: 0.0, ..Plan::default() }, 0, 20);
}

#[test]
fn a_coordinator_that_ends_between_any_change_and_its_consequence_disturbs_nobody() {
    let seen = run(Plan { faults: 0.0, coordinator_crashes: 0.05, ..Plan::default() }, 0, 60);
    assert!(seen.coordinator_ends > 60 && seen.attempts == seen.jobs, "{seen:?}");
}

#[test]
fn whatever_is_killed_cut_off_or_delayed_every_job_comes_to_its_end() {
    let seen = run(Plan::default(), 0, 120);
    assert!(seen.faults > 120 && seen.attempts > seen.jobs && seen.completed > seen.jobs / 2, "{seen:?}");
}

#[test]
fn a_job_that_ended_long_ago_is_forgotten_and_one_that_waits_is_not() {
    let settings = Settings::default();
    let at = |days: u64| Now { unix_ms: days * 86_400_000, uptime: Duration::from_secs(days * 86_400) };
    let mut fleet = Fleet::restore(Loaded::default(), settings, Box::new(Vec::new), at(1)).unwrap();
    let mut ids = Vec::new();
    for index in 0..2 {
        let spec = world::spec(index, 1, 0);
        let (id, spec_json) = (JobId(spec.name.clone()), serde_json::to_string(&spec).unwrap());
        let (continuation, request) = (Continuation::Unspecified, String::new());
        fleet.submit(Submission { spec, spec_json, continuation, request, earlier: 0 }, at(1)).unwrap();
        ids.push(id);
    }
    fleet.cancel(&ids[0], Duration::ZERO, at(2)).unwrap();
    fleet.take(at(2));
    let days = settings.keep_ended.as_secs() / 86_400;
    fleet.tick(at(days + 1));
    assert_eq!(fleet.jobs().count(), 2, "not long enough");
    fleet.tick(at(days + 3));
    assert_eq!(fleet.jobs().map(|(id, _)| id).collect::<Vec<_>>(), [&ids[1]]);
    let out = fleet.take(at(days + 3));
    assert!(out.writes.contains(&Write::Forget(ids[0].clone())), "{:?}", out.writes);
}

/// Minutes: CI runs a sample.
mod long {
    use super::*;

    fn is_sample() -> bool {
        std::env::var("TUNEFLEET_LONG_SAMPLE").is_ok_and(|sample| !sample.is_empty())
    }

    #[test]
    fn ten_thousand_seeds() {
        let count = if is_sample() { 300 } else { 10_000 };
        run(Plan::default(), 1_000_000, count);
    }

    #[test]
    fn a_thousand_workers() {
        let plan = Plan { workers: 1000, jobs: 40, ranks: 64, minutes: 4, ..Plan::default() };
        run(plan, 0, if is_sample() { 1 } else { 10 });
    }
}
