//! Three hosts in network namespaces: a coordinator and two workers, with a rank each. Cables are pulled.

use std::process::Command;
use std::thread;
use std::time::Duration;

use serde_json::Value;
use tunefleet_tests::cluster::Cluster;
use tunefleet_tests::hosts::Hosts;
use tunefleet_tests::job::{Builder, Job};

const STEPS: u64 = 400;
/// How patient the coordinator is.
const PATIENCE: [&str; 6] = ["--suspect-after", "2", "--lost-after", "3", "--give-up-after", "6"];

fn job() -> Builder {
    Job::builder()
        .steps(STEPS)
        .checkpoint_every(20)
        .train("dropout: 0.1")
        .restart("max_restarts: 5, backoff_seconds: 0.1, max_attempts_without_progress: 5")
}

/// Hosts, and a cluster on them; `None` where there can be none.
fn cluster(job: &Job, patience: &[&str]) -> Option<(Hosts, Cluster)> {
    let hosts = Hosts::make(&["control", "a", "b"])?;
    let cluster = Cluster::on_hosts(&hosts, job.dir(), &[1, 1], patience);
    Some((hosts, cluster))
}

fn begin(cluster: &mut Cluster, job: &Job) {
    cluster.launch(job, &["--detach"]).wait().expect(0);
    cluster.wait_for("some steps", |_| job.metrics().last_step() >= 25, "test");
}

fn losses_without_disturbance(job: &Job) -> std::collections::BTreeMap<u64, u64> {
    let twin = job.twin();
    twin.run(&[]).expect(0);
    twin.metrics().losses()
}

#[test]
fn a_coordinator_that_is_cut_off_from_all_workers_disturbs_nobody() {
    let job = job().build();
    // It gives nobody up in that time.
    let Some((hosts, mut cluster)) = cluster(&job, &["--suspect-after", "2", "--lost-after", "3"]) else {
        return;
    };
    begin(&mut cluster, &job);
    hosts.cut("control");
    // Longer than a worker may be silent.
    thread::sleep(Duration::from_secs(5));
    hosts.mend("control");
    cluster.wait_for_state("test", "completed");
    let told = cluster.ask(&["events", "test", "--json"]).expect(0).stdout;
    let events: Vec<Value> = told.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let steps: Vec<u64> = events
        .iter()
        .filter(|event| event["kind"] == "step")
        .map(|event| event["step"].as_u64().unwrap())
        .collect();
    assert_eq!(steps, (1..=STEPS).collect::<Vec<_>>(), "every step of the first attempt is told once");
    assert_eq!(cluster.status("test")["attempt"], 1);
    assert!(told.contains("its ranks may go on"), "the workers were lost for a while");
    assert_eq!(job.metrics().losses(), losses_without_disturbance(&job));
}

#[test]
fn a_host_that_is_cut_off_is_named_and_its_job_goes_on_when_it_is_back() {
    let job = job().train("collective_timeout_seconds: 3").build();
    let Some((hosts, mut cluster)) = cluster(&job, &PATIENCE) else { return };
    begin(&mut cluster, &job);
    hosts.cut("b");
    cluster.wait_for(
        "the attempt has failed",
        |status| status["attempts"][0]["ended_unix_ms"].is_u64(),
        "test",
    );
    let cause = cluster.status("test")["attempts"][0]["cause"].as_str().unwrap().to_owned();
    assert!(cause.contains("did not answer") || cause.contains("not heard of"), "{cause}");
    // Its rank may live; it cannot write, and is ended as soon as it is back.
    hosts.mend("b");
    cluster.wait_for_state("test", "completed");
    assert!(cluster.ranks().is_empty());
    assert!(cluster.status("test")["attempt"].as_u64().unwrap() > 1);
    assert_eq!(job.metrics().losses(), losses_without_disturbance(&job));
}

#[test]
fn hosts_can_be_cut_off_and_mended() {
    let Some(hosts) = Hosts::make(&["one", "two"]) else { return };
    let reaches = || {
        let mut command = hosts.command("one", Command::new("ping"));
        let output = command.args(["-c", "1", "-W", "1", &hosts.address("two")]).output();
        output.is_ok_and(|output| output.status.success())
    };
    if Command::new("ping").arg("-V").output().is_err() {
        println!("skipped: there is no ping");
        return;
    }
    assert!(reaches());
    hosts.cut("two");
    assert!(!reaches());
    hosts.mend("two");
    assert!(reaches());
}
