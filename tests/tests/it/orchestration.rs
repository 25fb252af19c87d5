//! What dies, goes away or is taken away while a job runs on a coordinator and workers: the job goes on as if
//! nothing had happened, or starts again by itself where that is right, and its losses are those of a run that
//! nothing disturbed, bit for bit.

use std::collections::BTreeMap;

use nix::sys::signal::Signal;
use serde_json::Value;
use tunefleet_keeper::cgroup::Cgroup;
use tunefleet_tests::cluster::Cluster;
use tunefleet_tests::job::{Builder, Job};

const STEPS: u64 = 120;
const CHECKPOINT_EVERY: u64 = 10;
const RESTART: &str = "max_restarts: 3, backoff_seconds: 0.1";

fn job() -> Builder {
    Job::builder().steps(STEPS).checkpoint_every(CHECKPOINT_EVERY).train("dropout: 0.1").restart(RESTART)
}

/// Submits the job and returns once `step` steps are logged.
fn until_step(cluster: &mut Cluster, job: &Job, step: u64) {
    cluster.launch(job, &["--detach"]).wait().expect(0);
    wait_for_step(cluster, job, step);
}

fn wait_for_step(cluster: &mut Cluster, job: &Job, step: u64) {
    cluster.wait_for(&format!("step {step}"), |_| job.metrics().last_step() >= step, "test");
}

fn events(cluster: &Cluster) -> Vec<Value> {
    let told = cluster.ask(&["events", "test", "--json"]).expect(0);
    told.stdout.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// Steps that were told, by attempt; numbered without a gap.
fn steps(events: &[Value]) -> Vec<(u64, u64)> {
    for (event, number) in events.iter().zip(1..) {
        assert_eq!(event["sequence"], number, "an event is missing");
    }
    let steps = events.iter().filter(|event| event["kind"] == "step");
    steps.map(|event| (event["attempt"].as_u64().unwrap(), event["step"].as_u64().unwrap())).collect()
}

/// Each step was made in the first attempt, and told once.
fn assert_undisturbed(cluster: &Cluster) {
    let told = steps(&events(cluster));
    assert_eq!(told, (1..=STEPS).map(|step| (1, step)).collect::<Vec<_>>());
}

fn assert_same_losses(job: &Job) {
    let twin = job.twin();
    twin.run(&[]).expect(0);
    let (disturbed, undisturbed): (BTreeMap<_, _>, _) = (job.metrics().losses(), twin.metrics().losses());
    assert_eq!(undisturbed.len() as u64, STEPS);
    assert_eq!(disturbed, undisturbed);
}

fn attempts(cluster: &Cluster) -> Vec<Value> {
    cluster.status("test")["attempts"].as_array().unwrap().clone()
}

#[test]
fn a_coordinator_that_is_killed_again_and_again_disturbs_no_step_and_loses_no_event() {
    let job = job().build();
    let mut cluster = Cluster::start(job.dir(), &[1, 1]);
    until_step(&mut cluster, &job, 2);
    let mut kills = 0;
    while job.metrics().last_step() < STEPS - 5 {
        cluster.kill_coordinator();
        cluster.restart_coordinator();
        kills += 1;
        let next = job.metrics().last_step() + 3;
        wait_for_step(&mut cluster, &job, next.min(STEPS));
    }
    cluster.wait_for_state("test", "completed");
    eprintln!("{kills} kills");
    assert!(kills >= 3);
    assert_undisturbed(&cluster);
    assert_same_losses(&job);
}

#[test]
fn ranks_outlive_their_daemon_and_the_next_one_tells_every_step_and_exit_once() {
    let job = job().build();
    let mut cluster = Cluster::start(job.dir(), &[1, 1]);
    until_step(&mut cluster, &job, 5);
    let before = cluster.ranks();
    cluster.kill_daemon(0);
    // It trains on without the daemon; nobody is told of it, since rank 0 runs there.
    cluster.restart_daemon(0);
    let seen = job.metrics().last_step();
    wait_for_step(&mut cluster, &job, seen + 5);
    let now = cluster.ranks();
    assert_eq!(before.len(), 2);
    assert!(now.iter().all(|rank| before.iter().any(|old| old.pid == rank.pid)), "a rank was started again");
    cluster.kill_daemon(1);
    cluster.restart_daemon(1);
    cluster.wait_for_state("test", "completed");
    assert_undisturbed(&cluster);
    assert_same_losses(&job);
}

#[test]
fn the_exit_of_a_rank_that_ended_while_no_daemon_ran_is_known() {
    let job = job().restart("max_restarts: 0").build();
    // A daemon takes its time to start: its silence alone is no reason to give its ranks up.
    let mut cluster = Cluster::serving_with(job.dir(), &[1, 1], &["--lost-after", "60"]);
    until_step(&mut cluster, &job, 5);
    cluster.kill_daemon(1);
    let ranks = cluster.ranks_of(1);
    ranks.iter().for_each(|rank| rank.end_by(Signal::SIGSEGV));
    // The other rank notices that its peer is gone, and its exit alone does not tell why.
    cluster.wait_for("the other rank has ended", |status| status["state"] != "running", "test");
    cluster.restart_daemon(1);
    cluster.wait_for_state("test", "failed");
    let detail = cluster.status("test")["detail"].as_str().unwrap().to_owned();
    assert!(detail.contains("signal 11 (SIGSEGV)"), "{detail}");
}

#[test]
fn a_killed_rank_starts_the_job_again_from_its_checkpoint() {
    let job = job().build();
    let mut cluster = Cluster::start(job.dir(), &[1, 1]);
    until_step(&mut cluster, &job, CHECKPOINT_EVERY + 5);
    cluster.ranks()[1].kill();
    cluster.wait_for_state("test", "completed");
    let attempts = attempts(&cluster);
    assert_eq!(attempts.len(), 2, "{attempts:?}");
    assert_eq!((&attempts[0]["kind"], &attempts[0]["state"]), (&"signal".into(), &"failed".into()));
    let ended: Vec<Value> =
        events(&cluster).into_iter().filter(|event| event["kind"] == "attempt_ended").collect();
    assert_eq!(ended.len(), 1);
    assert!(ended[0]["decision"].as_str().unwrap().starts_with("restart 1 of 3"), "{ended:?}");
    assert_same_losses(&job);
}

#[test]
fn a_daemon_that_is_told_to_end_saves_first_and_the_job_goes_on_when_it_is_back() {
    let job = job().build();
    let mut cluster = Cluster::start(job.dir(), &[1, 1]);
    until_step(&mut cluster, &job, 5);
    cluster.signal_daemon(1, Signal::SIGTERM);
    cluster.wait_for(
        "the attempt has ended",
        |status| status["attempts"][0]["ended_unix_ms"].is_u64(),
        "test",
    );
    let stopped_at = *job.checkpoints().last().unwrap();
    assert!((5..STEPS).contains(&stopped_at));
    cluster.wait_for("it waits", |status| status["attempt"] == 2, "test");
    while !cluster.has_daemon_ended(1) {
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    cluster.restart_daemon(1);
    assert!(cluster.left_of(1).is_empty());
    cluster.wait_for_state("test", "completed");
    assert_eq!(attempts(&cluster)[0]["kind"], "preempted");
    assert_eq!(job.metrics().attempts(), 2);
    assert_same_losses(&job);
}

#[test]
fn a_rank_that_gets_sigterm_stops_the_job_with_a_checkpoint_and_it_goes_on() {
    let job = job().build();
    let mut cluster = Cluster::start(job.dir(), &[2]);
    until_step(&mut cluster, &job, 5);
    cluster.ranks()[0].signal(Signal::SIGTERM);
    cluster.wait_for_state("test", "completed");
    assert_eq!(attempts(&cluster)[0]["kind"], "preempted");
    assert_same_losses(&job);
}

#[test]
fn a_drained_worker_gives_its_job_to_another_and_gets_nothing_until_it_is_undrained() {
    let job = job().ranks(1).build();
    let mut cluster = Cluster::start(job.dir(), &[1, 1]);
    until_step(&mut cluster, &job, 5);
    let status = cluster.status("test");
    let worker = status["workers"][0].as_str().unwrap().to_owned();
    cluster.ask(&["drain", &worker, "--preempt"]).expect(0).says(&["draining"]);
    cluster.wait_for_state("test", "completed");
    assert_eq!(job.metrics().attempts(), 2);
    let told = events(&cluster).iter().map(Value::to_string).collect::<Vec<_>>().join("\n");
    assert!(told.contains("it is being drained"), "{told}");
    let workers = || cluster.ask(&["workers", "--json"]).expect(0).stdout;
    assert!(workers().contains("draining"));
    cluster.ask(&["undrain", &worker]).expect(0).says(&["ready"]);
    assert_same_losses(&job);
}

#[test]
fn a_suspended_job_gives_its_slots_back_and_resumes_bit_for_bit() {
    let job = job().build();
    let mut cluster = Cluster::start(job.dir(), &[2]);
    until_step(&mut cluster, &job, 5);
    cluster.ask(&["suspend", "test"]).expect(0);
    cluster.wait_for_state("test", "suspended");
    assert!(cluster.ranks().is_empty());
    cluster.kill_coordinator();
    cluster.restart_coordinator();
    assert_eq!(cluster.status("test")["state"], "suspended");
    cluster.ask(&["resume", "test"]).expect(0);
    cluster.wait_for_state("test", "completed");
    assert_same_losses(&job);
}

#[test]
fn what_would_only_fail_again_is_not_started_again() {
    let mut kinds = vec![("oom", "out_of_memory")];
    match Cgroup::make("tunefleet-test", Some(1 << 30)) {
        Some(_) => kinds.push(("leak", "host_out_of_memory")),
        None => println!("without a control group that may be written, a lack of memory is left out"),
    }
    for (fault, kind) in kinds {
        let job = job().build();
        let fault = format!("rank=1,step=3,phase=backward,do={fault}");
        let limit: &[&str] = if kind == "host_out_of_memory" { &["--rank-memory-gib", "1.5"] } else { &[] };
        let mut cluster = Cluster::start_with(job.dir(), &[2], &[("TUNEFLEET_FAULT", &fault)], limit);
        cluster.launch(&job, &["--detach"]).wait().expect(0);
        cluster.wait_for_state("test", "failed");
        let attempts = attempts(&cluster);
        assert_eq!((attempts.len(), &attempts[0]["kind"]), (1, &kind.into()), "{attempts:?}");
        let detail = cluster.status("test")["detail"].as_str().unwrap().to_owned();
        assert!(detail.contains("not started again"), "{detail}");
    }
}

#[test]
fn three_attempts_without_a_new_checkpoint_end_the_job() {
    let job = job().restart("max_restarts: 9, backoff_seconds: 0.1").build();
    let mut cluster = Cluster::start_with(
        job.dir(),
        &[2],
        &[("TUNEFLEET_FAULT", "rank=1,step=3,phase=update,do=kill")],
        &[],
    );
    cluster.launch(&job, &["--detach"]).wait().expect(0);
    cluster.wait_for_state("test", "failed");
    assert_eq!(attempts(&cluster).len(), 3);
    let detail = cluster.status("test")["detail"].as_str().unwrap().to_owned();
    assert!(detail.contains("3 attempts in a row left no new checkpoint"), "{detail}");
}

#[test]
fn a_rank_that_loops_for_ever_is_named_by_the_time_that_it_takes() {
    let restart = "max_restarts: 0, hang_after_seconds: 2, first_hang_after_seconds: 30";
    let job = job().ranks(1).restart(restart).build();
    let mut cluster = Cluster::start_with(
        job.dir(),
        &[1],
        &[("TUNEFLEET_FAULT", "rank=0,step=20,phase=update,do=stall")],
        &[],
    );
    cluster.launch(&job, &["--detach"]).wait().expect(0);
    cluster.wait_for_state("test", "failed");
    let status = cluster.status("test");
    assert_eq!(status["attempts"][0]["kind"], "hang");
    let detail = status["detail"].as_str().unwrap();
    assert!(detail.contains("rank 0 shows no progress") && detail.contains("section \"step\""), "{detail}");
}

#[test]
fn who_attends_a_job_goes_on_when_the_coordinator_is_back() {
    let job = job().build();
    let mut cluster = Cluster::start(job.dir(), &[2]);
    let mut launch = cluster.launch(&job, &[]);
    launch.wait_until("some steps", || job.metrics().last_step() >= 5);
    cluster.kill_coordinator();
    launch.wait_for_line("out of reach");
    cluster.restart_coordinator();
    launch.wait().expect(0).says(&["the coordinator is back", "test is complete"]);
}

#[test]
fn logs_come_from_the_workers_and_follow_an_attempt_to_its_end() {
    let job = job().build();
    let mut cluster = Cluster::start(job.dir(), &[1, 1]);
    until_step(&mut cluster, &job, 5);
    let followed = cluster.ask(&["logs", "test", "-f"]).expect(0);
    cluster.wait_for_state("test", "completed");
    for (worker, rank) in [("w0", 0), ("w1", 1)] {
        let prefix = [
            format!("[{worker}/{rank}] "),
            format!("[{}/{rank}] ", if worker == "w0" { "w1" } else { "w0" }),
        ];
        let shown =
            followed.stdout.lines().filter(|line| prefix.iter().any(|prefix| line.starts_with(prefix)));
        let shown: Vec<&str> = shown.collect();
        assert!(shown.iter().any(|line| line.contains("tensors took")), "{}", followed.output);
        let path = job.output().join(format!("logs/attempt-1/rank-{rank}.log"));
        assert_eq!(shown.len(), std::fs::read_to_string(path).unwrap().lines().count(), "each line once");
    }
    let one = cluster.ask(&["logs", "test", "--rank", "1", "--tail", "1"]).expect(0).stdout;
    assert_eq!(one.lines().count(), 1, "{one}");
    let none = cluster.ask(&["logs", "test", "--since", "0s"]).expect(0).stdout;
    assert_eq!(none, "");
    cluster.ask(&["logs", "nothing"]).expect(4);
}

/// Minutes: CI runs a sample.
mod long {
    use std::thread::sleep;
    use std::time::{Duration, Instant};

    use tunefleet_tests::process::LIMIT;

    use super::*;

    /// Between two kills: a coordinator that starts takes a core of this machine's for a moment, and the
    /// median step shall show the kills, not the starts.
    const STEPS_BETWEEN: u64 = 30;

    /// Without asking the coordinator, which would take time from the ranks.
    fn wait_for_logged(job: &Job, step: u64) {
        let began = Instant::now();
        while job.metrics().last_step() < step {
            assert!(began.elapsed() < LIMIT, "step {step} does not come");
            sleep(Duration::from_millis(20));
        }
    }

    #[test]
    fn fifty_kills_of_the_coordinator_change_no_loss_no_event_and_no_step_time() {
        let is_sample = std::env::var("TUNEFLEET_LONG_SAMPLE").is_ok_and(|sample| !sample.is_empty());
        let kills = if is_sample { 10 } else { 50 };
        let steps = (kills + 1) * STEPS_BETWEEN;
        let job = Job::builder().steps(steps).train("dropout: 0.1").build();
        let twin = job.twin();
        let run = |job: &Job, kills: u64| {
            let mut cluster = Cluster::start(job.dir(), &[1, 1]);
            cluster.launch(job, &["--detach"]).wait().expect(0);
            for kill in 1..=kills {
                wait_for_logged(job, kill * STEPS_BETWEEN);
                cluster.kill_coordinator();
                cluster.restart_coordinator();
            }
            wait_for_logged(job, steps);
            cluster.wait_for_state("test", "completed");
            let told = super::steps(&events(&cluster));
            assert_eq!(told, (1..=steps).map(|step| (1, step)).collect::<Vec<_>>());
        };
        run(&twin, 0);
        run(&job, kills);
        assert_eq!(job.metrics().losses(), twin.metrics().losses());
        let (disturbed, undisturbed) = (job.metrics().step_seconds(), twin.metrics().step_seconds());
        let at = |seconds: &[f64], share: f64| seconds[(seconds.len() as f64 * share) as usize] * 1e3;
        let of = |share| (at(&disturbed, share), at(&undisturbed, share));
        let (p50, p90) = (of(0.5), of(0.9));
        println!(
            "{kills} kills: steps take {:.1} ms (p90 {:.1}), without kills {:.1} ms (p90 {:.1})",
            p50.0, p90.0, p50.1, p90.1
        );
        // In a second or two of steps, starting ten coordinators takes its share of few cores.
        let most = if is_sample { 1.5 } else { 1.1 };
        assert!(p50.0 < most * p50.1, "{p50:?}");
    }
}
