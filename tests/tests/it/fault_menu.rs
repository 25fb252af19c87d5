//! Each way in which a rank can go wrong, once, in the first attempt of a job on two workers: what it was is named,
//! the job goes on by itself where that is right, and its losses are those of a run that nothing disturbed.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use serde_json::Value;
use tunefleet_tests::cluster::Cluster;
use tunefleet_tests::job::{Builder, Job};

/// Ranks of each of the two workers.
const RANKS: u32 = 1;
const STEPS: u64 = 30;
const STRIKES_AT: u64 = 12;
/// How long a collective may take. Ranks on a machine with other work stand still for a moment, too.
const PATIENCE_SECONDS: u64 = 4;
/// Other tests run beside these: they may take so many times longer.
const SLACK: u32 = 3;
/// From the strike, in the middle of a step, to the end of the attempt being known and told.
const CRASH_LIMIT: Duration = Duration::from_secs(4);
/// Of what only time tells: the limits below, the ranks' answers, and the ranks' ends.
const HANG_LIMIT: Duration = Duration::from_secs(15);

fn job(ranks_per_worker: u32, patience_seconds: u64) -> Builder {
    Job::builder()
        .ranks(2 * ranks_per_worker)
        .steps(STEPS)
        .checkpoint_every(10)
        .train("dropout: 0.1")
        .train(&format!("collective_timeout_seconds: {patience_seconds}"))
        .restart(&format!(
            "max_restarts: 2, backoff_seconds: 0.1, hang_after_seconds: {patience_seconds}, \
             first_hang_after_seconds: 60"
        ))
}

/// A fault, the kind that it is told as, words of the cause, and how soon.
struct Case {
    fault: &'static str,
    kind: &'static str,
    words: &'static str,
    limit: Duration,
}

const fn case(fault: &'static str, kind: &'static str, words: &'static str, limit: Duration) -> Case {
    Case { fault, kind, words, limit }
}

const CASES: [Case; 9] = [
    case("kill", "signal", "signal 9 (SIGKILL)", CRASH_LIMIT),
    case("segv", "signal", "signal 11 (SIGSEGV)", CRASH_LIMIT),
    case("abort", "signal", "signal 6 (SIGABRT)", CRASH_LIMIT),
    case("exit", "exit", "exit code 3", CRASH_LIMIT),
    case("panic", "exit", "a fault that was asked for", CRASH_LIMIT),
    case("term", "preempted", "a person ended a rank", CRASH_LIMIT),
    case("stop", "hang", "rank 1 ", HANG_LIMIT),
    case("stall", "hang", "rank 1 ", HANG_LIMIT),
    case("loop", "hang", "rank 1 ", HANG_LIMIT),
];

fn losses(job: &Job) -> BTreeMap<u64, u64> {
    job.metrics().losses()
}

/// Runs a job with a fault in it; how long it took to know.
fn strike(
    case: &Case,
    ranks: u32,
    slack: u32,
    (template, undisturbed): &(Job, BTreeMap<u64, u64>),
) -> Duration {
    let job = template.twin();
    let fault = format!("rank=1,step={STRIKES_AT},attempt=1,phase=backward,do={}", case.fault);
    let mut cluster = Cluster::start_with(job.dir(), &[ranks, ranks], &[("TUNEFLEET_FAULT", &fault)], &[]);
    cluster.launch(&job, &["--detach"]).wait().expect(0);
    cluster.wait_for("the steps before", |_| job.metrics().last_step() >= STRIKES_AT - 1, "test");
    let began = Instant::now();
    cluster.wait_for(
        "the end of the attempt",
        |status| status["attempts"][0]["ended_unix_ms"].is_u64(),
        "test",
    );
    let took = began.elapsed();
    cluster.wait_for_state("test", "completed");
    let attempts = cluster.status("test")["attempts"].as_array().unwrap().clone();
    assert_eq!(attempts.len(), 2, "{}: {attempts:?}", case.fault);
    assert_eq!(attempts[0]["kind"], case.kind, "{}: {attempts:?}", case.fault);
    let told = cluster.ask(&["events", "test", "--json"]).expect(0).stdout;
    let events: Vec<Value> = told.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let ended = events.iter().find(|event| event["kind"] == "attempt_ended").unwrap();
    let cause = ended["failure"]["cause"].as_str().unwrap();
    assert!(cause.contains(case.words), "{}: {cause}", case.fault);
    if case.kind != "preempted" {
        assert_eq!(ended["failure"]["rank"], 1, "{}: {ended}", case.fault);
    }
    assert!(cluster.ranks().is_empty(), "{}", case.fault);
    assert_eq!(&losses(&job), undisturbed, "{}", case.fault);
    assert!(took < slack * case.limit, "{}: {took:.1?}", case.fault);
    eprintln!("{}: known after {took:.2?}: {cause}", case.fault);
    took
}

fn template(ranks_per_worker: u32, patience_seconds: u64) -> (Job, BTreeMap<u64, u64>) {
    let template = job(ranks_per_worker, patience_seconds).build();
    template.run(&[]).expect(0);
    let undisturbed = losses(&template);
    assert_eq!(undisturbed.len() as u64, STEPS);
    (template, undisturbed)
}

#[test]
fn whatever_ends_a_rank_is_named_and_the_job_goes_on_bit_for_bit() {
    let template = template(RANKS, PATIENCE_SECONDS);
    // Each kind of end once; the long test has them all.
    for case in CASES.iter().filter(|case| ["kill", "segv", "panic", "term"].contains(&case.fault)) {
        strike(case, RANKS, SLACK, &template);
    }
}

#[test]
fn whatever_holds_a_rank_up_is_named_and_the_job_goes_on_bit_for_bit() {
    let template = template(RANKS, PATIENCE_SECONDS);
    for case in CASES.iter().filter(|case| ["stop", "loop"].contains(&case.fault)) {
        strike(case, RANKS, SLACK, &template);
    }
}

#[test]
fn a_rank_that_is_only_slow_is_waited_for() {
    let (template, undisturbed) = template(RANKS, PATIENCE_SECONDS);
    let job = template.twin();
    let fault = format!("rank=1,step={STRIKES_AT},phase=update,do=slow");
    let mut cluster = Cluster::start_with(job.dir(), &[RANKS, RANKS], &[("TUNEFLEET_FAULT", &fault)], &[]);
    cluster.launch(&job, &["--detach"]).wait().expect(0);
    cluster.wait_for_state("test", "completed");
    assert_eq!(cluster.status("test")["attempt"], 1);
    assert_eq!(losses(&job), undisturbed);
}

/// Minutes: CI runs a sample.
mod long {
    use super::*;

    /// Ranks of each of the two workers.
    const MANY_RANKS: u32 = 2;
    const FEW_SECONDS: u64 = 2;
    const STRIKES: u32 = 20;

    #[test]
    fn times_until_the_end_of_a_rank_is_known() {
        if std::env::var("TUNEFLEET_LONG_SAMPLE").is_ok_and(|sample| !sample.is_empty()) {
            println!("left out of a sample of the long tests: most cases run once in the others");
            return;
        }
        let template = template(MANY_RANKS, FEW_SECONDS);
        let (mut crashes, mut hangs) = (Vec::new(), Vec::new());
        for case in &CASES {
            let struck = (0..STRIKES).map(|_| strike(case, MANY_RANKS, 1, &template));
            let times: Vec<Duration> = struck.collect();
            report(case.fault, &times);
            if case.kind == "hang" { &mut hangs } else { &mut crashes }.extend(times);
        }
        report("all that end a rank", &crashes);
        report("all that hold a rank up", &hangs);
    }

    /// Percentiles by nearest rank.
    fn report(what: &str, times: &[Duration]) {
        let mut sorted = times.to_vec();
        sorted.sort();
        let at = |percent: usize| sorted[(sorted.len() * percent).div_ceil(100) - 1];
        eprintln!(
            "{what}: p50 {:.2?}, p99 {:.2?}, longest {:.2?} of {}",
            at(50),
            at(99),
            at(100),
            sorted.len()
        );
    }
}
