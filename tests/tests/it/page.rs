//! The coordinator's page in a real browser, during a real run.

use std::path::Path;
use std::process::Command;

use tunefleet_tests::cluster::{Cluster, TOKEN};
use tunefleet_tests::job::{Builder, Job};
use tunefleet_tests::programs::root;
use tunefleet_tests::skip;

/// Runs the browser, where there is one.
pub fn drive(mode: &str, url: &str, pictures: &Path) {
    let python = root().join(".venv/bin/python");
    if !python.exists() || !Path::new("/usr/bin/chromedriver").exists() {
        skip("no browser: apt-get install -y chromium chromium-driver, and make setup-tests");
        return;
    }
    let mut command = Command::new(python);
    command.arg(root().join("tests/web/drive.py")).args([mode, url, TOKEN]).arg(pictures);
    let out = command.env("OMP_NUM_THREADS", "1").output().unwrap();
    let (said, faults) = (String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
    eprintln!("{said}");
    assert!(out.status.success(), "{said}\n{faults}\npictures: {}", pictures.display());
}

fn job(more: impl FnOnce(Builder) -> Builder) -> Job {
    more(Job::builder().ranks(1).steps(20_000).checkpoint_every(200).train("eval_every_steps: 20")).build()
}

#[test]
fn a_person_sees_curves_move_and_why_a_job_failed() {
    let full = job(|builder| builder);
    let qlora = job(|builder| builder.section("adapter: { rank: 4 }").learning_rate("1e-2"));
    let broken = job(|builder| builder.ranks(2));
    let mut cluster = Cluster::start_with(
        full.dir(),
        &[4],
        &[("TUNEFLEET_FAULT", "rank=1,step=5,phase=update,do=kill")],
        &[],
    );
    for (job, name) in [(&full, "full"), (&qlora, "qlora"), (&broken, "broken")] {
        cluster.launch(job, &["--set", &format!("name={name}"), "--detach"]).wait().expect(0);
    }
    cluster.wait_for_state("broken", "failed");
    cluster.wait_for("qlora trains", |status| status["step"].as_u64().unwrap() >= 40, "qlora");
    cluster.wait_for("full trains", |status| status["step"].as_u64().unwrap() >= 10, "full");
    drive("live", cluster.url(), &full.dir().join("pictures"));
    cluster.ask(&["cancel", "full", "--grace", "0"]);
    cluster.ask(&["cancel", "qlora", "--grace", "0"]);
}

#[test]
fn a_launch_prints_the_address_of_a_page_that_logs_in() {
    let job = job(|builder| builder);
    let launch = job.launch(&[]);
    let line = launch.wait_for_line("page: http://");
    let url = line.split_whitespace().find(|word| word.starts_with("http://")).unwrap().to_owned();
    assert!(url.contains("/#token="), "{url}");
    drive("link", &url, &job.dir().join("pictures"));
}
