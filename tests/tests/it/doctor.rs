//! Looks at machines before a night of training.

use std::process::Command;

use serde_json::Value;
use tunefleet_tests::cluster::Cluster;
use tunefleet_tests::job::Job;
use tunefleet_tests::process::Running;
use tunefleet_tests::programs;

fn found(told: &str) -> Vec<Value> {
    told.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[track_caller]
fn verdict<'a>(found: &'a [Value], place: &str, check: &str) -> &'a str {
    let one = found.iter().find(|one| one["place"] == place && one["check"] == check);
    one.unwrap_or_else(|| panic!("no {check} of {place} in {found:#?}"))["verdict"].as_str().unwrap()
}

#[test]
fn the_machines_of_a_cluster_and_the_ways_between_them_are_looked_at() {
    let job = Job::builder().build();
    let cluster = Cluster::start(job.dir(), &[1, 1]);
    let told = cluster.ask(&["doctor", "--json"]);
    let found = found(&told.stdout);
    for check in ["state file", "events", "jobs", "disk"] {
        verdict(&found, "coordinator", check);
    }
    assert_eq!(verdict(&found, "coordinator", "state file"), "ok");
    for (own, other) in [("w0", "w1"), ("w1", "w0")] {
        for check in ["session", "clock", "keeper", "GPUs", "collectives"] {
            assert_eq!(verdict(&found, own, check), "ok", "{check} in {found:#?}");
        }
        for check in ["disk", "memory", "open files", "shared memory"] {
            verdict(&found, own, check);
        }
        let way = verdict(&found, own, &format!("network to {other}"));
        assert!(["ok", "warning"].contains(&way), "{way}");
    }
    // The worst of them; the machine of this test may have little memory or few descriptors left.
    let is_warned = found.iter().any(|one| one["verdict"] == "warning");
    assert_eq!(told.code, Some(i32::from(is_warned)), "{}", told.output);
}

#[test]
fn a_worker_whose_address_is_not_its_own_is_critical() {
    let job = Job::builder().build();
    // An address for documents: no machine has it.
    let cluster = Cluster::start_with(job.dir(), &[1], &[], &["--advertise", "192.0.2.1"]);
    let told = cluster.ask(&["doctor"]).expect(2);
    told.says(&["CRITICAL", "w0: network: 192.0.2.1 is not an address of this machine", "--advertise"]);
}

#[test]
fn a_machine_looks_at_itself_without_a_coordinator() {
    let job = Job::builder().build();
    let mut command = Command::new(programs::worker());
    command.args(["doctor", "--state-dir"]).arg(job.dir());
    let ended = Running::start(command).wait();
    assert!(matches!(ended.code, Some(0 | 1)), "{}", ended.output);
    ended.says(&["keeper: ", "shared memory: ", "collectives: ", "GB/s from each rank"]);
}

#[test]
fn both_programs_write_their_manual_and_complete_their_verbs() {
    let job = Job::builder().build();
    for (program, page) in
        [(programs::coordinator(), "coordinator-launch.1"), (programs::worker(), "worker-daemon.1")]
    {
        let dir = job.dir().join("man");
        let mut command = Command::new(&program);
        command.arg("man").arg(&dir);
        Running::start(command).wait().expect(0);
        let text = std::fs::read_to_string(dir.join(page)).unwrap();
        assert!(text.contains(".TH") && text.contains("\\-\\-coordinator"), "{text}");
        let mut command = Command::new(&program);
        command.args(["completions", "bash"]);
        Running::start(command).wait().expect(0).says(&["complete -F"]);
    }
}
