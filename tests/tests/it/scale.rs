//! A coordinator with a thousand workers, played by this test; and how soon a job's first process runs.

use std::time::{Duration, Instant};

use tokio_stream::wrappers::UnboundedReceiverStream;
use tonic::transport::Endpoint;
use tunefleet_proto::rpc::{
    self, Continuation, Heartbeat, ListRequest, ListWorkersRequest, PROTOCOL, Register, SubmitRequest, Token,
    WorkerMessage, coordinator_message, worker_message,
};
use tunefleet_tests::cluster::{Cluster, TOKEN};
use tunefleet_tests::job::Job;

const WORKERS: usize = 1000;
/// Sessions of one connection.
const SESSIONS: usize = 125;
const JOBS: usize = 1000;
/// Series of a job, of a worker, and of the coordinator itself, at most.
const SERIES_PER_JOB: usize = 35;
const SERIES_PER_WORKER: usize = 3;
const SERIES_OF_ALL: usize = 500;
const HEARTBEATS: u32 = 10;
const MAX_CORES: f64 = 1.0;
const MAX_BYTES: u64 = 300 << 20;
const MAX_STATUS: Duration = Duration::from_millis(50);
const MAX_START: Duration = Duration::from_millis(500);

/// A worker that does nothing but live.
async fn live(channel: tonic::transport::Channel, index: usize) {
    let (say, words) = tokio::sync::mpsc::unbounded_channel();
    let register = Register {
        name: format!("w{index}"),
        slots: 8,
        journal: format!("j{index}"),
        protocol: PROTOCOL,
        ..Register::default()
    };
    let body = Some(worker_message::Body::Register(register));
    say.send(WorkerMessage { body, ..WorkerMessage::default() }).unwrap();
    let mut client = rpc::workers_client(channel, Some(Token::new(TOKEN).unwrap()));
    let mut hear = client.session(UnboundedReceiverStream::new(words)).await.unwrap().into_inner();
    let first = hear.message().await.unwrap().unwrap();
    let Some(coordinator_message::Body::Registered(registered)) = first.body else { panic!("{first:?}") };
    let mut beat = tokio::time::interval(Duration::from_millis(registered.heartbeat_interval_ms));
    for sequence in 0.. {
        tokio::select! {
            _ = beat.tick() => {}
            message = hear.message() => assert!(message.unwrap().is_some(), "the session ended"),
        }
        let body = Some(worker_message::Body::Heartbeat(Heartbeat { sequence, ..Heartbeat::default() }));
        say.send(WorkerMessage { body, epoch: registered.epoch, sequence: 0 }).unwrap();
    }
}

/// Starts all workers; a client of the coordinator that has them.
async fn all_in(url: &str) -> rpc::ControlClient {
    for connection in 0..WORKERS / SESSIONS {
        let channel = Endpoint::from_shared(url.to_owned()).unwrap().connect().await.unwrap();
        for session in 0..SESSIONS {
            tokio::spawn(live(channel.clone(), connection * SESSIONS + session));
        }
    }
    let channel = Endpoint::from_shared(url.to_owned()).unwrap().connect().await.unwrap();
    let mut client = rpc::control_client(channel, Some(Token::new(TOKEN).unwrap()));
    let began = Instant::now();
    loop {
        let workers = client.list_workers(ListWorkersRequest {}).await.unwrap().into_inner().workers;
        if workers.len() == WORKERS {
            return client;
        }
        assert!(began.elapsed() < Duration::from_secs(60), "{} workers are in", workers.len());
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// Processor time and resident bytes of a process.
fn use_of(pid: u32) -> (Duration, u64) {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let fields: Vec<&str> = stat.rsplit_once(')').unwrap().1.split_whitespace().collect();
    let ticks: u64 = fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap();
    let pages: u64 = fields[21].parse().unwrap();
    (Duration::from_millis(ticks * 10), pages * 4096)
}

#[test]
fn a_thousand_workers_take_less_than_a_core_and_300_mib() {
    let job = Job::builder().build();
    let cluster = Cluster::start(job.dir(), &[]);
    let (pid, url) = (cluster.coordinator_pid(), cluster.url().to_owned());
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    runtime.block_on(async {
        let mut client = all_in(&url).await;
        let (cpu, _) = use_of(pid);
        let began = Instant::now();
        let mut answers = Vec::new();
        for _ in 0..HEARTBEATS {
            tokio::time::sleep(Duration::from_secs(1)).await;
            let asked = Instant::now();
            client.list(ListRequest {}).await.unwrap();
            answers.push(asked.elapsed());
        }
        let (after, bytes) = use_of(pid);
        let cores = (after - cpu).as_secs_f64() / began.elapsed().as_secs_f64();
        let slowest = answers.iter().max().unwrap();
        eprintln!("{WORKERS} workers: {cores:.2} cores, {} MiB, slowest answer {slowest:.1?}", bytes >> 20);
        assert!(cores < MAX_CORES, "{cores} cores");
        assert!(bytes < MAX_BYTES, "{bytes} bytes");
        assert!(*slowest < MAX_STATUS, "{slowest:?}");
        let workers = client.list_workers(ListWorkersRequest {}).await.unwrap().into_inner().workers;
        let silent = workers.iter().filter(|worker| worker.silent_ms > 3000).count();
        assert_eq!(silent, 0, "all are heard of");
    });
}

#[test]
fn a_thousand_jobs_and_workers_are_shown_in_a_moment_and_measured_by_a_bounded_number_of_series() {
    let job = Job::builder().ranks(1).steps(1).build();
    job.run(&[]).expect(0);
    let spec = std::fs::read_to_string(job.output().join("logs/attempt-1/job.json")).unwrap();
    let mut spec: serde_json::Value = serde_json::from_str(&spec).unwrap();
    // What is there already; it waits for a GPU, which nobody has.
    for (key, dir) in [("dataset", "dataset"), ("tokenizer", "tokenizer"), ("model", "model")] {
        spec[key] = serde_json::json!({ "existing": job.output().join(dir) });
    }
    spec["train"]["device"] = "cuda".into();
    let cluster = Cluster::start(job.dir(), &[]);
    let url = cluster.url().to_owned();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    runtime.block_on(async {
        let mut client = all_in(&url).await;
        for number in 0..JOBS {
            spec["name"] = format!("job-{number:04}").into();
            spec["output"] = job.dir().join(format!("many/{number}")).to_str().unwrap().into();
            let request = SubmitRequest {
                spec_json: spec.to_string(),
                continuation: Continuation::Fresh.into(),
                ..SubmitRequest::default()
            };
            client.submit(request).await.unwrap();
        }
    });
    // The last of them are looked at a moment after they were submitted.
    let queued = |page: &str| page.contains("tunefleet_jobs{state=\"queued\"} 1000");
    let patience = Instant::now() + Duration::from_secs(10);
    let (page, took) = loop {
        let began = Instant::now();
        let page = cluster.scrape().remove(0);
        if queued(&page) || Instant::now() > patience {
            break (page, began.elapsed());
        }
        std::thread::sleep(Duration::from_millis(50));
    };
    let series = page.lines().filter(|line| !line.starts_with('#')).count();
    eprintln!("{JOBS} jobs, {WORKERS} workers: {series} series, {} bytes in {took:.1?}", page.len());
    let states: Vec<&str> = page.lines().filter(|line| line.starts_with("tunefleet_jobs{")).collect();
    assert!(queued(&page), "{states:?}");
    assert!(series < JOBS * SERIES_PER_JOB + WORKERS * SERIES_PER_WORKER + SERIES_OF_ALL, "{series}");
    assert!(took < Duration::from_secs(2), "{took:?}");
    // The workers go on meanwhile: the runtime has a thread of its own.
    super::page::drive("crowd", &url, &job.dir().join("pictures"));
}

#[test]
fn the_first_process_of_a_job_runs_within_half_a_second_of_its_submission() {
    let job = Job::builder().steps(2).build();
    let mut cluster = Cluster::start(job.dir(), &[2]);
    // Afterwards nothing is left to do but train.
    cluster.launch(&job, &["--detach"]).wait().expect(0);
    cluster.wait_for_state("test", "completed");
    let ranks = job.dir().join("w0/ranks");
    let runs = || {
        let entries = std::fs::read_dir(&ranks).unwrap().filter_map(Result::ok);
        entries.into_iter().any(|entry| entry.path().join("child.json").exists())
    };
    let mut times = Vec::new();
    for _ in 0..20 {
        cluster.wait_for("the ranks before are gone", |_| !runs(), "test");
        let spec = std::fs::read_to_string(job.output().join("logs/attempt-1/job.json")).unwrap();
        let took = cluster.submit_and_wait(&spec, &runs);
        times.push(took);
        cluster.ask(&["cancel", "test", "--grace", "0"]).expect(0);
        cluster.wait_for(
            "it has ended",
            |status| status["state"] != "running" && status["state"] != "stopping",
            "test",
        );
    }
    times.sort();
    eprintln!("from submission to the first process: p50 {:.0?}, slowest of 20 {:.0?}", times[10], times[19]);
    assert!(times[19] < MAX_START, "{times:?}");
}
