//! A job that trains while something is killed every few seconds: it goes on, repeats steps with the same losses,
//! and nothing is left over.

use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use tunefleet_tests::cluster::Cluster;
use tunefleet_tests::job::Job;

/// Between two kills, on average.
const MEAN_PAUSE: Duration = Duration::from_secs(20);

/// SplitMix64.
fn next(seed: &mut u64) -> u64 {
    *seed = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut mixed = (*seed ^ (*seed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ (mixed >> 31)
}

fn open_files(pid: u32) -> usize {
    std::fs::read_dir(format!("/proc/{pid}/fd")).map_or(0, Iterator::count)
}

fn resident_kib(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap_or_default().to_owned();
    line.trim().trim_end_matches(" kB").parse().unwrap_or(0)
}

fn soak(duration: Duration, mean_pause: Duration) {
    let job = Job::builder()
        .steps(1_000_000)
        .checkpoint_every(50)
        .train("dropout: 0.1")
        .train("collective_timeout_seconds: 3")
        .train("eval_every_steps: 0")
        .restart(
            "max_restarts: 1000, backoff_seconds: 0.1, max_attempts_without_progress: 1000, \
             max_failures_per_worker: 1000, hang_after_seconds: 5, first_hang_after_seconds: 60",
        )
        .build();
    let mut cluster = Cluster::start(job.dir(), &[1, 1]);
    cluster.launch(&job, &["--detach"]).wait().expect(0);
    cluster.wait_for("some steps", |_| job.metrics().last_step() >= 20, "test");
    let files_before = open_files(cluster.coordinator_pid());
    let mut seed = 7;
    let mut kills = [0u32; 6];
    let began = Instant::now();
    while began.elapsed() < duration {
        let pause = next(&mut seed) % (2 * mean_pause.as_millis() as u64);
        std::thread::sleep(Duration::from_millis(pause));
        let kind = (next(&mut seed) % 6) as usize;
        let worker = (next(&mut seed) % 2) as usize;
        kills[kind] += 1;
        let attempt = cluster.status("test")["attempt"].as_u64().unwrap();
        let is_struck = kind < 3 && !cluster.ranks_of(worker).is_empty();
        match kind {
            0 => cluster.ranks_of(worker).iter().for_each(|rank| rank.kill()),
            1 => cluster.ranks_of(worker).iter().for_each(|rank| rank.signal(Signal::SIGSTOP)),
            2 => cluster.ranks_of(worker).iter().for_each(|rank| rank.end_by(Signal::SIGSEGV)),
            3 => {
                cluster.kill_daemon(worker);
                cluster.restart_daemon(worker);
            }
            4 => {
                cluster.kill_coordinator();
                cluster.restart_coordinator();
            }
            _ => {
                cluster.signal_daemon(worker, Signal::SIGTERM);
                let told = Instant::now();
                while !cluster.has_daemon_ended(worker) {
                    assert!(told.elapsed() < Duration::from_secs(60), "a daemon does not end");
                    std::thread::sleep(Duration::from_millis(20));
                }
                cluster.restart_daemon(worker);
            }
        }
        if is_struck {
            // A step that was under way is no sign that it goes on.
            cluster.wait_for("the next attempt", |status| status["attempt"].as_u64() > Some(attempt), "test");
        }
        let seen = job.metrics().last_step();
        cluster.wait_for("it goes on", |_| job.metrics().last_step() > seen, "test");
    }
    let status = cluster.status("test");
    let goodput = status["goodput_ratio"].as_f64().unwrap();
    let (files, memory) =
        (open_files(cluster.coordinator_pid()), resident_kib(cluster.coordinator_pid()) >> 10);
    cluster.ask(&["cancel", "test"]).expect(0);
    cluster.wait_for_state("test", "stopped");
    eprintln!(
        "{:.0?}: {} kills {kills:?}, {} attempts, step {}, goodput {:.1}%, coordinator {files} files, {memory} MiB",
        began.elapsed(),
        kills.iter().sum::<u32>(),
        status["attempt"],
        job.metrics().last_step(),
        100.0 * goodput
    );
    // A step that was made twice had the same loss both times: reading them asserts it.
    assert!(job.metrics().losses().len() as u64 >= job.metrics().last_step() / 2);
    assert!(cluster.ranks().is_empty());
    assert!((0..2).all(|worker| cluster.left_of(worker).is_empty()), "a daemon left processes");
    assert!(files <= files_before + 4, "{files_before} files before, {files} now");
    assert!(memory < 200, "{memory} MiB");
    for worker in ["w0", "w1"] {
        cluster.wait_for(
            "journals are empty",
            |_| std::fs::read_dir(job.dir().join(worker).join("ranks")).unwrap().next().is_none(),
            "test",
        );
    }
}

#[test]
fn a_job_goes_on_through_kills_and_nothing_is_left_over() {
    soak(Duration::from_secs(20), Duration::from_secs(3));
}

/// Half an hour.
mod long {
    use super::*;

    #[test]
    fn half_an_hour_with_a_kill_every_20_seconds() {
        if std::env::var("TUNEFLEET_LONG_SAMPLE").is_ok_and(|sample| !sample.is_empty()) {
            println!("left out of a sample of the long tests: the other one does the same for half a minute");
            return;
        }
        soak(Duration::from_secs(1800), MEAN_PAUSE);
    }
}
