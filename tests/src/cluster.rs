//! A control plane of its own processes: `coordinator serve` and worker daemons.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::Command;

use serde_json::Value;

use crate::job::Job;
use crate::process::{Ended, Running};
use crate::programs;

/// Known to the coordinator and whoever may speak to it.
const TOKEN: &str = "a-token-of-this-test";

/// A running coordinator and its workers.
pub struct Cluster {
    coordinator: Running,
    workers: Vec<Running>,
    url: String,
    metrics_urls: Vec<String>,
    tmp: std::path::PathBuf,
}

impl Cluster {
    /// Starts a coordinator with these many CPU slots on each worker, on free ports. `dir` is for
    /// temporary files.
    pub fn start(dir: &Path, worker_slots: &[u32]) -> Self {
        let tmp = dir.join("tmp");
        let mut command = Command::new(programs::coordinator());
        command.args(["serve", "--listen", "127.0.0.1:0", "--metrics", "127.0.0.1:0"]);
        command.env("TUNEFLEET_TOKEN", TOKEN);
        let coordinator = Running::start(command);
        let line = coordinator.wait_for_line("listens on");
        let urls: Vec<String> = line
            .split(|c: char| c == ',' || c.is_whitespace())
            .filter(|word| word.starts_with("http://"))
            .map(str::to_owned)
            .collect();
        let [url, metrics_url] = urls.as_slice() else { panic!("no addresses in {line:?}") };
        let mut cluster = Cluster {
            coordinator,
            workers: Vec::new(),
            url: url.clone(),
            metrics_urls: vec![metrics_url.clone()],
            tmp,
        };
        for (index, slots) in worker_slots.iter().enumerate() {
            cluster.add_worker(&format!("w{index}"), *slots);
        }
        cluster
    }

    fn add_worker(&mut self, name: &str, slots: u32) {
        let mut command = Command::new(programs::worker());
        command.args(["daemon", "--coordinator", &self.url, "--name", name, "--cpu"]);
        command.args(["--slots", &slots.to_string(), "--metrics", "127.0.0.1:0"]);
        command.env("TUNEFLEET_TOKEN", TOKEN).env("TMPDIR", &self.tmp);
        let worker = Running::start(command);
        let line = worker.wait_for_line("metrics http://");
        let url = line.split_whitespace().find(|word| word.starts_with("http://")).unwrap();
        self.metrics_urls.push(url.to_owned());
        self.workers.push(worker);
    }

    /// Address of the coordinator.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// `coordinator launch` of a job on this cluster.
    pub fn launch(&self, job: &Job, arguments: &[&str]) -> Running {
        let mut command = job.command("launch", &["--coordinator", &self.url]);
        command.args(arguments).env("TUNEFLEET_TOKEN", TOKEN);
        Running::start(command)
    }

    /// A verb that asks the coordinator.
    pub fn ask(&self, arguments: &[&str]) -> Ended {
        self.ask_with_token(arguments, TOKEN)
    }

    /// As [`Cluster::ask`], with another token.
    pub fn ask_with_token(&self, arguments: &[&str], token: &str) -> Ended {
        let mut command = Command::new(programs::coordinator());
        command.args(arguments).args(["--coordinator", &self.url]).env("TUNEFLEET_TOKEN", token);
        Running::start(command).wait()
    }

    /// What `coordinator status --json` says of a job.
    pub fn status(&self, job: &str) -> Value {
        serde_json::from_str(&self.ask(&["status", job, "--json"]).expect(0).stdout).unwrap()
    }

    /// Waits until a job is in `state`.
    pub fn wait_for_state(&mut self, job: &str, state: &str) {
        let url = self.url.clone();
        let status = || {
            let mut command = Command::new(programs::coordinator());
            command.args(["status", job, "--json", "--coordinator", &url]).env("TUNEFLEET_TOKEN", TOKEN);
            serde_json::from_str::<Value>(&Running::start(command).wait().expect(0).stdout).unwrap()
        };
        self.coordinator.wait_until(&format!("{job} is {state}"), || status()["state"] == state);
    }

    /// All that Prometheus would scrape: the coordinator's page, then each worker's.
    pub fn scrape(&self) -> Vec<String> {
        self.metrics_urls.iter().map(|url| get(url)).collect()
    }

    /// Processes of ranks on all workers.
    pub fn ranks(&self) -> usize {
        self.workers.iter().map(|worker| worker.ranks().len()).sum()
    }
}

/// The body of a page.
fn get(url: &str) -> String {
    let (authority, path) = url.strip_prefix("http://").unwrap().split_once('/').unwrap();
    let mut stream = TcpStream::connect(authority).unwrap();
    write!(stream, "GET /{path} HTTP/1.1\r\nhost: {authority}\r\nconnection: close\r\n\r\n").unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    assert!(text.starts_with("HTTP/1.1 200"), "{url}: {text}");
    text.split_once("\r\n\r\n").unwrap().1.to_owned()
}
