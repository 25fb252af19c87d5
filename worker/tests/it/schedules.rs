//! Learning rates beside transformers', step by step.

use serde::Deserialize;
use tunefleet_proto::job::{Schedule, TrainSpec};
use tunefleet_worker::train::schedule;

use crate::common::fixtures_of;
use crate::engine::train_spec;

/// `index.json`.
#[derive(Deserialize)]
struct Index {
    learning_rate: f64,
    cases: Vec<Case>,
}

#[derive(Deserialize, Debug)]
struct Case {
    schedule: Schedule,
    schedule_power: f64,
    final_learning_rate: f64,
    warmup_steps: u64,
    steps: u64,
    rates: Vec<f64>,
}

#[test]
fn every_schedule_has_the_rates_of_transformers_at_every_step() {
    let Some(dir) = fixtures_of("schedules.py", "schedules") else { return };
    let index: Index =
        serde_json::from_str(&std::fs::read_to_string(dir.join("index.json")).unwrap()).unwrap();
    let mut largest = 0f64;
    for case in &index.cases {
        let spec = TrainSpec {
            learning_rate: index.learning_rate,
            schedule: case.schedule,
            schedule_power: case.schedule_power,
            final_learning_rate: case.final_learning_rate,
            warmup_steps: case.warmup_steps,
            steps: case.steps,
            ..train_spec("ranks: 1")
        };
        assert_eq!(case.rates.len() as u64, case.steps);
        for (step, &theirs) in (1..).zip(&case.rates) {
            let ours = schedule::learning_rate(&spec, step);
            let apart = (ours - theirs).abs();
            assert!(apart <= 1e-12 * theirs, "step {step} of {case:?}: {ours:e} and {theirs:e}");
            if theirs > 0.0 {
                largest = largest.max(apart / theirs);
            }
        }
    }
    println!("{} schedules, rates at most {largest:.1e} apart, relative", index.cases.len());
}
