//! A real Prometheus scrapes a real run: every query of the dashboards and every rule returns data.

use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::Value;
use tunefleet_tests::cluster::Cluster;
use tunefleet_tests::job::Job;
use tunefleet_tests::process::Running;
use tunefleet_tests::programs::root;
use tunefleet_tests::skip;

use super::serving::{completion, free_port};

const LIMIT: Duration = Duration::from_secs(90);
/// Panels and rules that this machine cannot have data for say so.
const NEEDS: [&str; 2] = ["Needs a GPU", "Needs DCGM"];

fn monitoring() -> PathBuf {
    root().join("deploy/monitoring")
}

/// Whether there is a Prometheus; says so where there is none.
fn there_is(program: &str) -> bool {
    let found = Command::new(program).arg("--version").output().is_ok();
    if !found {
        skip(&format!("no {program}: apt-get install -y prometheus"));
    }
    found
}

fn promtool(arguments: &[&str], input: &str) {
    let mut command = Command::new("promtool");
    command.args(arguments).current_dir(monitoring());
    command.stdin(std::process::Stdio::piped()).stdout(std::process::Stdio::piped());
    let mut child = command.stderr(std::process::Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    let out = child.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&out.stdout) + String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success(), "promtool {arguments:?}: {said}");
}

/// A Prometheus that scrapes once a second.
struct Prometheus {
    _running: Running,
    port: u16,
}

impl Prometheus {
    fn start(dir: &Path, coordinator: &str) -> Self {
        // The file that users are given, with addresses of this test and less patience.
        let config = std::fs::read_to_string(monitoring().join("prometheus.yml")).unwrap();
        let rules = monitoring().join("rules.yml");
        let config = config
            .replace("127.0.0.1:7071", coordinator)
            .replace(": 15s", ": 1s")
            .replace("[rules.yml]", &format!("[{}]", rules.display()))
            .replace("/sd/targets", "/sd/targets\n        refresh_interval: 1s");
        let path = dir.join("prometheus.yml");
        std::fs::write(&path, config).unwrap();
        let port = free_port();
        let mut command = Command::new("prometheus");
        command.arg(format!("--config.file={}", path.display()));
        command.arg(format!("--storage.tsdb.path={}", dir.join("tsdb").display()));
        command.arg(format!("--web.listen-address=127.0.0.1:{port}"));
        Prometheus { _running: Running::start(command), port }
    }

    fn get(&self, path: &str) -> Option<Value> {
        let mut stream = TcpStream::connect(("127.0.0.1", self.port)).ok()?;
        write!(stream, "GET /api/v1/{path} HTTP/1.0\r\nHost: test\r\n\r\n").ok()?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).ok()?;
        serde_json::from_str(answer.split_once("\r\n\r\n")?.1).ok()
    }

    /// Series that a query finds now.
    fn series(&self, query: &str) -> usize {
        let answer = self.get(&format!("query?query={}", escaped(query))).unwrap_or_default();
        assert_ne!(answer["status"], "error", "{query}: {answer}");
        answer["data"]["result"].as_array().map_or(0, Vec::len)
    }

    fn targets_up(&self) -> usize {
        self.series("up == 1")
    }
}

fn escaped(query: &str) -> String {
    use std::fmt::Write as _;
    query.bytes().fold(String::new(), |mut text, byte| {
        if byte.is_ascii_alphanumeric() {
            text.push(char::from(byte));
        } else {
            let _ = write!(text, "%{byte:02X}");
        }
        text
    })
}

/// Queries of all dashboards, with what their variables stand for here.
fn dashboard_queries() -> Vec<(String, String)> {
    let mut queries = Vec::new();
    for name in ["fleet", "job", "rank", "server"] {
        let path = monitoring().join(format!("dashboards/{name}.json"));
        let board: Value = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
        for panel in board["panels"].as_array().unwrap() {
            let about = panel["description"].as_str().unwrap();
            if NEEDS.iter().any(|needs| about.contains(needs)) {
                continue;
            }
            for target in panel["targets"].as_array().unwrap() {
                let query = target["expr"].as_str().unwrap();
                let query =
                    query.replace("$job", ".*").replace("$instance", ".*").replace("$__rate_interval", "30s");
                queries.push((format!("{name}: {}", panel["title"].as_str().unwrap()), query));
            }
        }
    }
    queries
}

/// What a rule compares, whatever the comparison says.
fn compared(query: &str) -> String {
    [" > ", " < ", " == ", " != ", " >= ", " <= "]
        .into_iter()
        .fold(query.to_owned(), |query, sign| query.replace(sign, &format!("{sign}bool ")))
}

#[test]
fn the_dashboards_are_those_that_their_program_writes() {
    let out = Command::new("python3")
        .args(["-c", "import dashboards, json; print(json.dumps([dashboards.FLEET, dashboards.JOB_BOARD, dashboards.RANK, dashboards.SERVER]))"])
        .env("PYTHONDONTWRITEBYTECODE", "1")
        .current_dir(monitoring())
        .output()
        .unwrap();
    let written: Vec<Value> = serde_json::from_slice(&out.stdout).expect("dashboards.py runs");
    for (board, name) in written.into_iter().zip(["fleet", "job", "rank", "server"]) {
        let path = monitoring().join(format!("dashboards/{name}.json"));
        let kept: Value = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
        assert!(
            kept == board,
            "deploy/monitoring/dashboards/{name}.json is old: run deploy/monitoring/dashboards.py"
        );
    }
}

#[test]
fn rules_say_what_they_are_meant_to() {
    if there_is("promtool") {
        promtool(&["check", "config", "prometheus.yml"], "");
        promtool(&["check", "rules", "rules.yml"], "");
        promtool(&["test", "rules", "rules.test.yml"], "");
    }
}

#[test]
fn prometheus_scrapes_a_run_and_every_panel_and_rule_has_data() {
    if !there_is("prometheus") {
        return;
    }
    let serve_port = free_port();
    let served = Job::builder()
        .ranks(1)
        .steps(2)
        .section(&format!("serve: {{ listen: '127.0.0.1:{serve_port}' }}"))
        .build();
    // One attempt fails, so that there is something to tell of failures.
    let trained = Job::builder()
        .steps(100_000)
        .checkpoint_every(20)
        .train("eval_every_steps: 50")
        .restart("max_restarts: 3, backoff_seconds: 0.1")
        .build();
    // And one job, which finds no slots before its time is over.
    let late = Job::builder().section("deadline_seconds: 1").build();
    let fault = ("TUNEFLEET_FAULT", "rank=1,step=60,phase=update,do=kill,attempt=1");
    let mut cluster = Cluster::start_with(trained.dir(), &[1, 2], &[fault], &[]);
    let prometheus = Prometheus::start(trained.dir(), &cluster.metrics_address());
    cluster.launch(&served, &["--set", "name=served", "--detach"]).wait().expect(0);
    cluster.launch(&trained, &["--set", "name=trained", "--detach"]).wait().expect(0);
    cluster.launch(&late, &["--set", "name=late", "--detach"]).wait().expect(0);
    cluster.wait_for("a second attempt", |status| status["attempt"] == 2, "trained");
    cluster.wait_for("an answer", |_| completion(serve_port, "served").is_some(), "served");
    cluster.wait_for("an evaluation", |status| status["step"].as_u64().unwrap() >= 120, "trained");

    for page in cluster.scrape() {
        promtool(&["check", "metrics"], &page);
    }
    let began = Instant::now();
    // The coordinator, two workers and the completion server, which the coordinator has named.
    while prometheus.targets_up() < 4 {
        assert!(began.elapsed() < LIMIT, "{:?}", prometheus.get("targets"));
        std::thread::sleep(Duration::from_millis(200));
    }
    let rules = prometheus.get("rules").unwrap();
    let rules: Vec<&Value> = rules["data"]["groups"]
        .as_array()
        .unwrap()
        .iter()
        .flat_map(|group| group["rules"].as_array().unwrap())
        .collect();
    assert!(rules.len() >= 15, "{rules:?}");
    let mut queries = dashboard_queries();
    assert!(queries.len() >= 60, "{}", queries.len());
    for rule in &rules {
        if rule["labels"]["needs"].is_null() {
            let query = compared(rule["query"].as_str().unwrap());
            queries.push((format!("rule {}", rule["name"].as_str().unwrap()), query));
        }
    }
    // What is still empty is asked again: rates need two scrapes, rules an evaluation.
    let mut empty: BTreeSet<&(String, String)> = queries.iter().collect();
    while !empty.is_empty() {
        completion(serve_port, "served");
        empty.retain(|(_, query)| prometheus.series(query) == 0);
        assert!(began.elapsed() < LIMIT, "no data: {empty:#?}");
        std::thread::sleep(Duration::from_millis(200));
    }
    let rules = prometheus.get("rules").unwrap().to_string();
    assert!(!rules.contains("\"lastError\":\"") && !rules.contains("\"health\":\"err\""), "{rules}");

    // Where the time went adds up, and one attempt has failed by a signal.
    assert_eq!(prometheus.series("tunefleet_job_attempts_total{job=\"trained\", cause=\"signal\"} == 1"), 1);
    let whole = "tunefleet_job_goodput_ratio{job=\"trained\"} > 0 < 1";
    assert_eq!(prometheus.series(whole), 1);
    cluster.ask(&["cancel", "trained", "--grace", "0"]);
    cluster.ask(&["cancel", "served", "--grace", "0"]);
}

#[test]
fn series_of_a_job_leave_some_time_after_it_has_ended() {
    let job = Job::builder().steps(2).build();
    let mut cluster = Cluster::serving_with(job.dir(), &[2], &["--metrics-keep", "1"]);
    cluster.launch(&job, &["--detach"]).wait().expect(0);
    cluster.wait_for_state("test", "completed");
    let began = Instant::now();
    while cluster.scrape().iter().any(|page| page.contains("job=\"test\"")) {
        assert!(began.elapsed() < LIMIT, "it is still there");
        std::thread::sleep(Duration::from_millis(100));
    }
    assert!(cluster.scrape()[0].contains("tunefleet_jobs{state=\"completed\"} 1"), "it is still counted");
}

#[test]
fn a_log_becomes_a_run_of_weights_and_biases() {
    let python = root().join(".venv/bin/python");
    let there =
        Command::new(&python).args(["-c", "import wandb"]).output().is_ok_and(|out| out.status.success());
    if !there {
        return skip("no wandb in .venv: make setup-tests");
    }
    let job = Job::builder().steps(4).train("eval_every_steps: 2").build();
    job.run(&[]).expect(0);
    let mut command = Command::new(&python);
    command.arg(monitoring().join("to_wandb.py")).arg(job.output()).args(["--project", "test"]);
    let out = command.env("WANDB_MODE", "offline").env("WANDB_SILENT", "false").output().unwrap();
    let said = String::from_utf8_lossy(&out.stdout) + String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success(), "{said}");
    // Its own summary of what it was told last.
    let loss = f64::from_bits(job.metrics().losses()[&4]);
    let told = said.split_whitespace().collect::<Vec<_>>().join(" ");
    let shown = |name: &str| {
        let (_, rest) = told.rsplit_once(&format!("wandb: {name} "))?;
        rest.split(' ').next()?.parse::<f64>().ok()
    };
    assert!((shown("train/loss").unwrap() - loss).abs() < 1e-4, "{loss}: {said}");
    assert!(shown("eval/loss").is_some() && shown("train/learning_rate").is_some(), "{said}");
    let runs = std::fs::read_dir(job.output().join("wandb")).unwrap().flatten();
    let runs = runs.filter(|entry| entry.file_name().to_string_lossy().starts_with("offline-run-"));
    assert_eq!(runs.count(), 1);
}
