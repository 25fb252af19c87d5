//! Jobs on a coordinator and workers that were there before and stay.

use nix::sys::signal::Signal;
use tunefleet_tests::cluster::Cluster;
use tunefleet_tests::job::Job;

#[test]
fn ctrl_c_detaches_and_the_job_goes_on_until_it_is_cancelled_and_resumed() {
    let job = Job::builder().steps(240).checkpoint_every(100).build();
    let twin = job.twin();
    // Two workers, so that the ranks are peers across daemons.
    let mut cluster = Cluster::start(job.dir(), &[1, 1]);
    let mut launch = cluster.launch(&job, &[]);
    launch.wait_until("some steps", || job.metrics().last_step() >= 5);
    launch.signal(Signal::SIGINT);
    let cancel = format!("coordinator cancel test --coordinator {}", cluster.url());
    launch.wait().expect(130).says(&["detached", &cancel]);

    let seen = job.metrics().last_step();
    cluster.wait_for_state("test", "running");
    let pages = cluster.scrape();
    for name in [
        "tunefleet_job_step{job=\"test\"}",
        "tunefleet_job_loss{job=\"test\"}",
        "tunefleet_workers{state=\"ready\"} 2",
    ] {
        assert!(pages[0].contains(name), "{name} is not in:\n{}", pages[0]);
    }
    for (page, rank) in pages[1..].iter().zip(["0", "1"]) {
        assert!(page.contains("tunefleet_daemon_slots 1"), "{page}");
        assert!(page.contains(&format!("job=\"test\",rank=\"{rank}\"")), "{page}");
    }
    cluster.ask(&["list"]).expect(0).says(&["test", "running", "train"]);

    cluster.ask(&["cancel", "test"]).expect(0).says(&["test"]);
    cluster.wait_for_state("test", "stopped");
    let stopped_at = job.metrics().last_step();
    assert!((seen..240).contains(&stopped_at), "stopped at {stopped_at}");
    assert_eq!(job.checkpoints().last(), Some(&stopped_at), "stopping saves a checkpoint");
    assert_eq!(cluster.ranks().len(), 0);

    cluster.ask(&["resume", "test"]).expect(0).says(&["test"]);
    cluster.wait_for_state("test", "completed");
    assert_eq!(cluster.status("test")["step"], 240);
    cluster.ask(&["logs", "test", "--rank", "0"]).expect(0).says(&["/0] ", "tensors took"]);
    twin.run(&[]).expect(0);
    assert_eq!(job.metrics().losses(), twin.metrics().losses());
}

#[test]
fn who_has_another_token_is_refused_and_what_is_not_there_is_said_so() {
    let job = Job::builder().build();
    let cluster = Cluster::start(job.dir(), &[]);
    cluster.ask_with_token(&["list"], "a-token-that-is-wrong").expect(5).says(&["token"]);
    cluster.ask(&["status", "nothing"]).expect(4).says(&["there is no job nothing"]);
    let launch = cluster.launch(&job, &["--detach"]).wait().expect(0);
    assert_eq!(launch.stdout.trim(), "test");
    // Nobody has a slot: the job waits, and says so.
    cluster.ask(&["cancel", "test", "--grace", "0"]).expect(0);
}
