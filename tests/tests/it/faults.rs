//! One rank of several is struck in each phase of its work: the job fails soon, names that rank, and
//! tells the others apart as aborted by their peer. Debug builds of the programs know `TUNEFLEET_FAULT`.

use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;
use tunefleet_tests::job::{Builder, Job};
use tunefleet_tests::process::{Ended, LIMIT, Running};

const RANKS: usize = 3;
/// From the death of a rank to the failure of its job.
const DEATH_TO_FAILURE: Duration = Duration::from_secs(5);
/// `train.collective_timeout_seconds` of the jobs that hang.
const COLLECTIVE_TIMEOUT: Duration = Duration::from_secs(3);
/// From a time-out to the verdict: ranks have 2 s to answer, and looks take their time.
const TIMEOUT_TO_VERDICT: Duration = Duration::from_secs(8);

fn job() -> Builder {
    Job::builder().ranks(RANKS as u32).steps(4).checkpoint_every(2)
}

/// Starts the job anew, with a fault waiting for one of its ranks.
fn launch(job: &Job, fault: &str) -> Running {
    let mut command = job.command("launch", &["--fresh"]);
    command.env("TUNEFLEET_FAULT", fault);
    Running::start(command)
}

/// Waits for the first of the training ranks to be gone and for the job's failure; how long it took
/// from one to the other.
fn fail_by_death(job: &Job, fault: &str) -> (Duration, Ended) {
    let launch = launch(job, fault);
    let began = Instant::now();
    let until = |condition: &dyn Fn(usize) -> bool| {
        while !condition(launch.ranks().len()) {
            assert!(began.elapsed() < LIMIT, "{fault}:\n{}", launch.output_so_far());
            thread::sleep(Duration::from_millis(10));
        }
    };
    until(&|ranks| ranks == RANKS);
    until(&|ranks| ranks < RANKS);
    let died = Instant::now();
    launch.wait_for_line("error: test failed in train");
    let took = died.elapsed();
    eprintln!("{fault}: {took:.1?} from death to failure, {:.1?} in all", began.elapsed());
    (took, launch.wait().expect(1))
}

/// The `others` ended because of rank 1, and all that tells of them says so.
fn assert_aborted_by_peer(job: &Job, ended: &Ended, attempt: usize, others: &[u32]) {
    for rank in others {
        let told = format!("rank {rank} on worker local: aborted by peer: ");
        assert!(ended.output.contains(&told), "{told:?} is not in:\n{}", ended.output);
        let path = job.output().join(format!("logs/attempt-{attempt}/rank-{rank}.log"));
        let log =
            std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        assert!(log.contains("error: aborted by peer: "), "{}:\n{log}", path.display());
    }
    assert!(!ended.output.contains("rank 1 on worker local: aborted by peer"), "{}", ended.output);
    let listed = if others.len() == 2 { "ranks 0 and 2" } else { "ranks 0, 2 and 3" };
    assert!(ended.output.contains(&format!("\n{listed}: aborted by peer\n")), "{}", ended.output);
}

#[test]
fn a_rank_that_is_killed_in_any_phase_fails_the_job_within_5_seconds_and_is_named() {
    let job = job().build();
    let phases = ["start", "gather", "backward", "reduce", "update", "save"];
    for (attempt, phase) in (1..).zip(phases) {
        let step = if phase == "start" { 0 } else { 2 };
        let (took, ended) = fail_by_death(&job, &format!("rank=1,step={step},phase={phase},do=kill"));
        assert!(took < DEATH_TO_FAILURE, "{phase}: {took:?}");
        let ended = ended.says(&["failed in train: rank 1 on worker local: ended by signal 9 (SIGKILL)"]);
        assert_aborted_by_peer(&job, &ended, attempt, &[0, 2]);
    }
}

#[test]
fn a_rank_that_runs_out_of_memory_or_exits_fails_the_job_within_5_seconds_and_is_named() {
    let job = job().build();
    let cases = [
        ("phase=backward,do=oom", "out of memory"),
        ("phase=update,do=oom", "coordinator plan shows what a rank needs"),
        ("phase=reduce,do=exit", "ended by exit code 3"),
    ];
    for (attempt, (fault, said)) in (1..).zip(cases) {
        let (took, ended) = fail_by_death(&job, &format!("rank=1,step=2,{fault}"));
        assert!(took < DEATH_TO_FAILURE, "{fault}: {took:?}");
        let ended = ended.says(&["failed in train: rank 1 on worker local: ", said]);
        assert_aborted_by_peer(&job, &ended, attempt, &[0, 2]);
    }
}

/// Lets the job hang after its first step; the line of the verdict, and the output at the end.
fn fail_by_hang(job: &Job, attempt: usize, fault: &str) -> (String, Ended) {
    let mut launch = launch(job, fault);
    launch.wait_until("its first step", || job.metrics().attempts() == attempt);
    let hung = Instant::now();
    let verdict = launch.wait_for_line(" is behind: ");
    let took = hung.elapsed();
    eprintln!("{fault}: {took:.1?} to the verdict: {verdict}");
    assert!(took < COLLECTIVE_TIMEOUT + TIMEOUT_TO_VERDICT, "{fault}: {took:?}");
    (verdict, launch.wait().expect(1))
}

fn dump_path(job: &Job, attempt: usize, rank: u32) -> PathBuf {
    job.output().join(format!("hangs/attempt-{attempt}/rank-{rank}.json"))
}

/// The record of a rank that hung.
fn dump(job: &Job, attempt: usize, rank: u32) -> Value {
    let path = dump_path(job, attempt, rank);
    let text = std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    serde_json::from_slice(&text).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// Lets rank 1 stall in one phase, and checks what is told and what is left. The `others` wait in
/// `waited_for`, the first thing that it does not do.
fn stall(job: &Job, attempt: usize, others: &[u32], phase: &str, waited_for: &str) {
    let (verdict, ended) = fail_by_hang(job, attempt, &format!("rank=1,step=2,phase={phase},do=stall"));
    assert!(verdict.contains("rank 1 is behind: it is at "), "{verdict}");
    let (_, waited) = verdict.split_once("the others wait in ").unwrap_or_else(|| panic!("{verdict}"));
    assert!(waited.starts_with(waited_for), "{phase}: {verdict}");
    assert!(verdict.contains("in section \"step\""), "{verdict}");
    let dir = job.output().join(format!("hangs/attempt-{attempt}"));
    assert!(verdict.contains(&format!("dumps in {}", dir.display())), "{verdict}");
    let ended = ended.says(&["failed in train: rank 1 on worker local: rank 1 is behind"]);
    assert_aborted_by_peer(job, &ended, attempt, others);

    let waits = dump(job, attempt, 0);
    let about = waits["oldest_unfinished"]["about"].as_str().unwrap_or_default();
    assert!(about.starts_with(waited_for), "{waits:#}");
    assert!(waits["collectives"].as_array().is_some_and(|all| all.len() > 10), "{waits:#}");
    let started = |rank| dump(job, attempt, rank)["last_started"]["sequence"].as_u64();
    assert!(others.iter().all(|rank| started(1) < started(*rank)), "{verdict}");
}

#[test]
fn a_rank_that_stalls_is_named_with_the_block_that_the_others_wait_for() {
    let seconds = COLLECTIVE_TIMEOUT.as_secs();
    let job = job().train(&format!("collective_timeout_seconds: {seconds}")).build();
    stall(&job, 1, &[0, 2], "reduce", "reduce of block.1");
    stall(&job, 2, &[0, 2], "gather", "gather of block.");
    stall(&job, 3, &[0, 2], "update", "loss and norm");
}

#[test]
fn a_rank_that_stalls_is_named_over_the_bounds_of_groups() {
    let seconds = COLLECTIVE_TIMEOUT.as_secs();
    let job = job().ranks(4).train("strategy: hybrid_shard").train("shard_ranks: 2");
    let job = job.train(&format!("collective_timeout_seconds: {seconds}")).build();
    stall(&job, 1, &[0, 2, 3], "reduce", "reduce of block.1");
}

#[test]
fn a_rank_that_is_frozen_is_named_as_the_one_that_did_not_answer() {
    let seconds = COLLECTIVE_TIMEOUT.as_secs();
    let job = job().train(&format!("collective_timeout_seconds: {seconds}")).build();
    let (verdict, ended) = fail_by_hang(&job, 1, "rank=1,step=2,phase=backward,do=stop");
    assert!(verdict.contains("rank 1 is behind: it did not answer when it was asked"), "{verdict}");
    assert!(verdict.contains("last heard of in section \"step\"; the others wait in "), "{verdict}");
    assert_aborted_by_peer(&job, &ended, 1, &[0, 2]);
    assert_eq!([0, 1, 2].map(|rank| dump_path(&job, 1, rank).is_file()), [true, false, true]);
    assert!(dump(&job, 1, 2)["oldest_unfinished"]["sequence"].as_u64().unwrap() > 0);
}
