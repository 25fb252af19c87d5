//! `train.memory_budget_gib`: the same choice wherever a job enters, and what ranks get.

use serde_json::Value;
use tunefleet_tests::job::Job;
use tunefleet_tests::process::Running;

#[test]
fn a_budget_chooses_settings_that_the_plan_shows_and_the_ranks_get() {
    let job = Job::builder().model("model: { init: { preset: demo, seed: 1 } }").steps(2).build();
    let json = |set: &str| {
        let plan = Running::start(job.command("plan", &["--json", "--set", set])).wait().expect(0);
        serde_json::from_str::<Value>(&plan.stdout).unwrap()
    };
    let needs = |set: &str| json(set)["memory"]["needed_bytes"].as_u64().unwrap();
    let (none, all) = (needs("train.recompute=none"), needs("train.recompute=all"));
    assert!(none > all);
    let between = (none + all) as f64 / 2.0 / (1u64 << 30) as f64;
    let budget = format!("train.memory_budget_gib={between:.6}");
    let plan = Running::start(job.command("plan", &["--set", &budget])).wait().expect(0);
    plan.says(&["memory budget: chosen to fit", "recompute "]);
    let chosen = json(&budget);
    let bytes = chosen["memory"]["needed_bytes"].as_u64().unwrap();
    assert!(bytes < none && bytes as f64 <= between * (1u64 << 30) as f64);

    let ended = job.run(&["--set", &budget]).expect(0);
    let words = chosen["chosen"].as_str().unwrap();
    ended.says(&[&format!("memory: {words}")]);
    let assigned = std::fs::read_dir(job.output().join("logs/attempt-1")).unwrap();
    assert!(assigned.count() > 0);
}

#[test]
fn a_budget_that_nothing_keeps_is_refused_with_the_least_that_would_do() {
    let job = Job::builder().model("model: { init: { preset: demo, seed: 1 } }").build();
    let budget = ["--set", "train.memory_budget_gib=0.1"];
    let refused = |verb| Running::start(job.command(verb, &budget)).wait().expect(3);
    for verb in ["plan", "launch"] {
        refused(verb).says(&["train.memory_budget_gib: a rank may have 102.4 MiB, but needs", "at least"]);
    }
    assert!(!job.output().exists());
}
