//! The chart agrees with the programs: they take the files that it writes, answer its probes, and end within its grace.

use std::path::Path;
use std::process::Command;

use serde_json::Value;
use tunefleet_tests::cluster::{Cluster, TOKEN, wait_until_healthy};
use tunefleet_tests::job::Job;
use tunefleet_tests::programs::{self, root};
use tunefleet_tests::skip;

/// Renders and checks the chart; what is to be asked of the programs, where the tools are there.
fn facts(out: &Path) -> Option<Value> {
    let python = root().join(".venv/bin/python");
    let there = |module: &str| {
        let import = Command::new(&python).args(["-c", &format!("import {module}")]).output();
        import.is_ok_and(|out| out.status.success())
    };
    if !there("helm_python") || !there("kubernetes_validate") {
        skip("no helm_python or kubernetes_validate in .venv: make setup-tests");
        return None;
    }
    let check =
        Command::new(&python).arg(root().join("tests/kubernetes/check_chart.py")).arg(out).output().unwrap();
    let said = String::from_utf8_lossy(&check.stdout) + String::from_utf8_lossy(&check.stderr);
    assert!(check.status.success(), "{said}");
    Some(serde_json::from_str(&std::fs::read_to_string(out.join("facts.json")).unwrap()).unwrap())
}

/// A program's words for a file of its flags.
fn validated(program: &Path, arguments: &[&str], file: &Path) {
    let out = Command::new(program)
        .arg("validate")
        .args(arguments)
        .arg(file)
        .env("TUNEFLEET_TOKEN", TOKEN)
        .output();
    let out = out.unwrap();
    let said = String::from_utf8_lossy(&out.stdout) + String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success(), "{}: {said}", file.display());
}

/// The default of a key or flag, as its manual tells it.
fn default_of(program: &Path, manual: &[&str], key: &str, before: &str) -> u64 {
    let out = Command::new(program).args(manual).output().unwrap();
    let text = String::from_utf8_lossy(&out.stdout).split_whitespace().collect::<Vec<_>>().join(" ");
    let after = text.split_once(key).unwrap_or_else(|| panic!("no {key}")).1;
    let after = after.split_once(before).unwrap_or_else(|| panic!("no default of {key}")).1;
    let digits: String = after.trim_start().chars().take_while(char::is_ascii_digit).collect();
    digits.parse().unwrap()
}

#[test]
fn the_chart_and_the_units_agree_with_the_programs() {
    let job = Job::builder().build();
    let out = job.dir().join("chart");
    std::fs::create_dir(&out).unwrap();
    let Some(facts) = facts(&out) else { return };
    let (coordinator, worker) = (programs::coordinator(), programs::worker());

    // The programs take the files that it writes, with certificates in their place.
    let certs = job.dir().join("certs");
    for arguments in [vec!["certs", "init", "--dir"], vec!["certs", "server", "localhost", "--dir"]] {
        let made = Command::new(&coordinator).args(&arguments).arg(&certs).output().unwrap();
        assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    }
    std::fs::write(job.dir().join("tokens"), "a-token\n").unwrap();
    let here = job.dir().to_str().unwrap();
    for (part, program, arguments) in [
        ("coordinator", &coordinator, &["--serve"]),
        ("worker", &worker, &["--config"]),
        ("server", &worker, &["--serve"]),
    ] {
        let path = out.join(format!("{part}-config.yaml"));
        let text = std::fs::read_to_string(&path).unwrap();
        let text = text
            .replace("/etc/tunefleet/tls/tls.crt", &format!("{here}/certs/server.pem"))
            .replace("/etc/tunefleet/tls/tls.key", &format!("{here}/certs/server.key"))
            .replace("/etc/tunefleet/tls/ca.crt", &format!("{here}/certs/ca.pem"))
            .replace("/etc/tunefleet/tokens/tokens", &format!("{here}/tokens"))
            .replace("/var/lib/tunefleet", &format!("{here}/state"));
        std::fs::write(&path, text).unwrap();
        validated(program, arguments, &path);
    }
    for (file, program, arguments) in [
        ("coordinator.yaml", &coordinator, &["--serve"]),
        ("worker.yaml", &worker, &["--config"]),
        ("server.yaml", &worker, &["--serve"]),
    ] {
        validated(program, arguments, &root().join("deploy/debian").join(file));
    }

    // They answer its probes.
    let cluster = Cluster::start(job.dir(), &[1]);
    for (part, url) in ["coordinator", "worker"].into_iter().zip(cluster.metrics_urls()) {
        for path in facts["probes"][part].as_array().unwrap() {
            wait_until_healthy(&url.replace("/metrics", path.as_str().unwrap()));
        }
    }

    // And end within its grace, as within systemd's.
    let save = default_of(&coordinator, &["validate", "--keys"], "restart.stop_grace_seconds:", "Default:");
    let answer = default_of(&worker, &["serve", "--help"], "--timeout-seconds", "[default:");
    let unit = std::fs::read_to_string(root().join("deploy/systemd/tunefleet-worker.service")).unwrap();
    let stop =
        unit.lines().find_map(|line| line.strip_prefix("TimeoutStopSec=")?.parse::<u64>().ok()).unwrap();
    assert!(facts["grace"]["worker"].as_u64().unwrap() >= save + 60 && stop >= save + 60, "{save} s to save");
    assert!(facts["grace"]["server"].as_u64().unwrap() >= answer + 30, "{answer} s to answer");
}
