//! A control plane of its own processes: `coordinator serve` and worker daemons.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::Command;

use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use serde_json::Value;
use tonic::transport::Endpoint;
use tunefleet_proto::rpc::{self, Continuation, SubmitRequest, Token};

use crate::hosts::Hosts;
use crate::job::Job;
use crate::process::{Ended, LIMIT, LOOK_AGAIN, Process, Running};
use crate::programs;

/// Known to the coordinator and whoever may speak to it.
pub const TOKEN: &str = "a-token-of-this-test";

/// A running coordinator and its workers.
pub struct Cluster {
    coordinator: Running,
    workers: Vec<Worker>,
    url: String,
    metrics_urls: Vec<String>,
    dir: std::path::PathBuf,
    environment: Vec<(String, String)>,
    arguments: Vec<String>,
    serve_arguments: Vec<String>,
    /// Makes each program one of a host; absent on one machine.
    place: Option<Place>,
}

/// What runs a program on a host: "control", "a", "b" and so on.
type Place = Box<dyn Fn(&str, Command) -> Command>;

/// A worker daemon, and how it was started.
struct Worker {
    name: String,
    slots: u32,
    running: Running,
    /// Daemons before it: ranks of theirs may live.
    former: Vec<Running>,
}

impl Cluster {
    /// Starts a coordinator with these many CPU slots on each worker, on free ports. `dir` is for
    /// temporary files and state.
    pub fn start(dir: &Path, worker_slots: &[u32]) -> Self {
        Cluster::start_with(dir, worker_slots, &[], &[])
    }

    /// As [`Cluster::start`], with variables in the workers' environment, and arguments of theirs.
    pub fn start_with(
        dir: &Path,
        worker_slots: &[u32],
        environment: &[(&str, &str)],
        arguments: &[&str],
    ) -> Self {
        let mut cluster = Cluster::serving_with(dir, &[], &[]);
        let environment = environment.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned()));
        cluster.environment = environment.collect();
        cluster.arguments = arguments.iter().map(|argument| (*argument).to_owned()).collect();
        cluster.add_workers(worker_slots);
        cluster
    }

    /// As [`Cluster::start`], with arguments of the coordinator's.
    pub fn serving_with(dir: &Path, worker_slots: &[u32], serve_arguments: &[&str]) -> Self {
        let (coordinator, url, metrics_url) = serve(dir, "127.0.0.1:0", serve_arguments, None);
        let mut cluster = Cluster {
            coordinator,
            workers: Vec::new(),
            url,
            metrics_urls: vec![metrics_url],
            dir: dir.to_owned(),
            environment: Vec::new(),
            arguments: Vec::new(),
            serve_arguments: serve_arguments.iter().map(|&argument| argument.to_owned()).collect(),
            place: None,
        };
        cluster.add_workers(worker_slots);
        cluster
    }

    /// A coordinator on the host "control" with these arguments, and a worker on each of "a", "b" and so on.
    pub fn on_hosts(hosts: &Hosts, dir: &Path, worker_slots: &[u32], serve_arguments: &[&str]) -> Self {
        let spaces = hosts.spaces();
        // The hosts' network is this machine's.
        let place: Place = Box::new(move |host, mut command| {
            command.env("TUNEFLEET_INSECURE", "true");
            spaces.command(host, command)
        });
        let address = format!("{}:7070", hosts.address("control"));
        let (coordinator, url, metrics_url) = serve(dir, &address, serve_arguments, Some(&place));
        let mut cluster = Cluster {
            coordinator,
            workers: Vec::new(),
            url,
            metrics_urls: vec![metrics_url],
            dir: dir.to_owned(),
            environment: Vec::new(),
            arguments: Vec::new(),
            serve_arguments: serve_arguments.iter().map(|&argument| argument.to_owned()).collect(),
            place: Some(place),
        };
        cluster.add_workers(worker_slots);
        cluster
    }

    fn add_workers(&mut self, worker_slots: &[u32]) {
        for (index, slots) in worker_slots.iter().enumerate() {
            let name = format!("w{index}");
            let (running, metrics_url) = self.daemon(&name, *slots);
            self.metrics_urls.push(metrics_url);
            self.workers.push(Worker { name, slots: *slots, running, former: Vec::new() });
        }
        // A daemon says where its metrics are before the coordinator knows it.
        self.wait_until_asked("all workers are known", &["workers"], |known| {
            known.as_array().map_or(0, Vec::len) >= worker_slots.len()
        });
    }

    /// A program that speaks to the coordinator, where it can be reached.
    fn near_coordinator(&self, command: Command) -> Command {
        match &self.place {
            Some(place) => place("control", command),
            None => command,
        }
    }

    fn daemon(&self, name: &str, slots: u32) -> (Running, String) {
        let mut command = Command::new(programs::worker());
        command.args(["daemon", "--coordinator", &self.url, "--name", name, "--cpu"]);
        command.args(["--slots", &slots.to_string(), "--metrics", "127.0.0.1:0"]);
        command.arg("--state-dir").arg(self.dir.join(name)).args(&self.arguments);
        command.env("TUNEFLEET_TOKEN", TOKEN).env("TMPDIR", self.dir.join("tmp"));
        command.envs(self.environment.iter().map(|(key, value)| (key, value)));
        let command = match &self.place {
            Some(place) => {
                let host = if name == "w0" { "a" } else { "b" };
                place(host, command)
            }
            None => command,
        };
        let worker = Running::start(command);
        let line = worker.wait_for_line("metrics http://");
        let url = line.split_whitespace().find(|word| word.starts_with("http://")).unwrap().to_owned();
        (worker, url)
    }

    /// Process of the coordinator.
    pub fn coordinator_pid(&self) -> u32 {
        self.coordinator.pid()
    }

    /// Submits a job afresh over gRPC; how long it takes until `happened`.
    pub fn submit_and_wait(&self, spec_json: &str, happened: &dyn Fn() -> bool) -> Duration {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let channel = Endpoint::from_shared(self.url.clone()).unwrap().connect().await.unwrap();
            let mut client = rpc::control_client(channel, Some(Token::new(TOKEN).unwrap()));
            let continuation = Continuation::Fresh.into();
            let request =
                SubmitRequest { spec_json: spec_json.to_owned(), continuation, ..SubmitRequest::default() };
            let began = Instant::now();
            client.submit(request).await.unwrap();
            while !happened() {
                assert!(began.elapsed() < LIMIT, "nothing happens");
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            began.elapsed()
        })
    }

    /// Kills the coordinator, with no chance to clean up.
    pub fn kill_coordinator(&mut self) {
        self.coordinator.kill_everything();
    }

    /// Starts a coordinator in the place of one that was killed: same state, same address.
    pub fn restart_coordinator(&mut self) {
        let address = self.url.strip_prefix("http://").unwrap().to_owned();
        let arguments: Vec<&str> = self.serve_arguments.iter().map(String::as_str).collect();
        let (coordinator, url, metrics_url) = serve(&self.dir, &address, &arguments, self.place.as_ref());
        assert_eq!(url, self.url);
        self.coordinator = coordinator;
        self.metrics_urls[0] = metrics_url;
    }

    /// Kills a worker's daemon, and nothing else.
    pub fn kill_daemon(&mut self, index: usize) {
        self.workers[index].running.kill_alone();
    }

    /// Waits until the coordinator has said something.
    pub fn wait_for_coordinator_to_say(&self, text: &str) {
        self.coordinator.wait_for_line(text);
    }

    /// Sends a worker's daemon a signal.
    pub fn signal_daemon(&self, index: usize, signal: Signal) {
        self.workers[index].running.signal(signal);
    }

    /// Whether a worker's daemon has ended.
    pub fn has_daemon_ended(&mut self, index: usize) -> bool {
        self.workers[index].running.has_ended()
    }

    /// Starts a daemon in the place of one that has ended, with its state.
    pub fn restart_daemon(&mut self, index: usize) {
        let Worker { name, slots, .. } = &self.workers[index];
        let (running, _) = self.daemon(name, *slots);
        let worker = &mut self.workers[index];
        worker.former.push(std::mem::replace(&mut worker.running, running));
    }

    /// Address of the coordinator.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// `coordinator launch` of a job on this cluster.
    pub fn launch(&self, job: &Job, arguments: &[&str]) -> Running {
        let mut command = job.command("launch", &["--coordinator", &self.url]);
        command.args(arguments).env("TUNEFLEET_TOKEN", TOKEN);
        Running::start(self.near_coordinator(command))
    }

    /// A verb that asks the coordinator.
    pub fn ask(&self, arguments: &[&str]) -> Ended {
        self.ask_with_token(arguments, TOKEN)
    }

    /// As [`Cluster::ask`], with another token.
    pub fn ask_with_token(&self, arguments: &[&str], token: &str) -> Ended {
        let mut command = Command::new(programs::coordinator());
        command.args(arguments).args(["--coordinator", &self.url]).env("TUNEFLEET_TOKEN", token);
        Running::start(self.near_coordinator(command)).wait()
    }

    /// What `coordinator status --json` says of a job.
    pub fn status(&self, job: &str) -> Value {
        serde_json::from_str(&self.ask(&["status", job, "--json"]).expect(0).stdout).unwrap()
    }

    /// Waits until a job is in `state`.
    pub fn wait_for_state(&mut self, job: &str, state: &str) {
        self.wait_for(&format!("{job} is {state}"), |status| status["state"] == state, job);
    }

    /// Waits until `condition` holds of a job's status.
    pub fn wait_for(&mut self, what: &str, condition: impl Fn(&Value) -> bool, job: &str) {
        self.wait_until_asked(what, &["status", job], condition);
    }

    /// Waits until `condition` holds of what the coordinator answers.
    fn wait_until_asked(&mut self, what: &str, arguments: &[&str], condition: impl Fn(&Value) -> bool) {
        let (url, place) = (&self.url, &self.place);
        let answer = || {
            let mut command = Command::new(programs::coordinator());
            command.args(arguments).args(["--json", "--coordinator", url]).env("TUNEFLEET_TOKEN", TOKEN);
            let command = match place {
                Some(place) => place("control", command),
                None => command,
            };
            serde_json::from_str::<Value>(&Running::start(command).wait().expect(0).stdout).unwrap()
        };
        self.coordinator.wait_until(what, || condition(&answer()));
    }

    /// All that Prometheus would scrape: the coordinator's page, then each worker's.
    pub fn scrape(&self) -> Vec<String> {
        self.metrics_urls.iter().map(|url| get(url)).collect()
    }

    /// Where the coordinator's metrics are, then each worker's.
    pub fn metrics_urls(&self) -> &[String] {
        &self.metrics_urls
    }

    /// Host and port of the coordinator's metrics.
    pub fn metrics_address(&self) -> String {
        let url = self.metrics_urls[0].strip_prefix("http://").unwrap();
        url.split('/').next().unwrap().to_owned()
    }

    /// Processes of ranks on all workers, whichever daemon has started them.
    pub fn ranks(&self) -> Vec<Process> {
        (0..self.workers.len()).flat_map(|index| self.ranks_of(index)).collect()
    }

    /// Ranks of one worker, whichever daemon has started them.
    pub fn ranks_of(&self, index: usize) -> Vec<Process> {
        let worker = &self.workers[index];
        worker.running.ranks().into_iter().chain(worker.former.iter().flat_map(Running::ranks)).collect()
    }

    /// Processes of one worker, whichever daemon has started them, the present one left out.
    pub fn left_of(&self, index: usize) -> Vec<Process> {
        self.workers[index].former.iter().flat_map(Running::processes).collect()
    }
}

/// Starts `coordinator serve`; its address and that of its metrics.
fn serve(dir: &Path, address: &str, arguments: &[&str], place: Option<&Place>) -> (Running, String, String) {
    let mut command = Command::new(programs::coordinator());
    command.args(["serve", "--listen", address, "--metrics", "127.0.0.1:0"]);
    command.arg("--state").arg(dir.join("coordinator")).args(arguments).env("TUNEFLEET_TOKEN", TOKEN);
    let command = match place {
        Some(place) => place("control", command),
        None => command,
    };
    let coordinator = Running::start(command);
    let line = coordinator.wait_for_line("listens on");
    let urls: Vec<String> = line
        .split(|c: char| c == ',' || c.is_whitespace())
        .filter(|word| word.starts_with("http://"))
        .map(str::to_owned)
        .collect();
    let [url, metrics_url] = urls.as_slice() else { panic!("no addresses in {line:?}") };
    (coordinator, url.clone(), metrics_url.clone())
}

/// The body of a page that is there.
fn get(url: &str) -> String {
    let answer = ask_for(url);
    assert!(answer.starts_with("HTTP/1.1 200"), "{url}: {answer}");
    answer.split_once("\r\n\r\n").unwrap().1.to_owned()
}

/// Waits until a probe is answered well: a worker is ready a moment after the coordinator knows it.
pub fn wait_until_healthy(url: &str) {
    let began = Instant::now();
    loop {
        let answer = ask_for(url);
        if answer.starts_with("HTTP/1.1 200") {
            return;
        }
        assert!(began.elapsed() < LIMIT, "{url}: {answer}");
        std::thread::sleep(LOOK_AGAIN);
    }
}

fn ask_for(url: &str) -> String {
    let (authority, path) = url.strip_prefix("http://").unwrap().split_once('/').unwrap();
    let mut stream = TcpStream::connect(authority).unwrap();
    write!(stream, "GET /{path} HTTP/1.1\r\nhost: {authority}\r\nconnection: close\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer
}
