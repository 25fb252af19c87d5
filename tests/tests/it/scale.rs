//! A coordinator with a thousand workers, played by this test; and how soon a job's first process runs.

use std::time::{Duration, Instant};

use tokio_stream::wrappers::UnboundedReceiverStream;
use tonic::transport::Endpoint;
use tunefleet_proto::rpc::{
    self, Heartbeat, ListRequest, ListWorkersRequest, PROTOCOL, Register, Token, WorkerMessage,
    coordinator_message, worker_message,
};
use tunefleet_tests::cluster::{Cluster, TOKEN};
use tunefleet_tests::job::Job;

const WORKERS: usize = 1000;
/// Sessions of one connection.
const SESSIONS: usize = 125;
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
        for connection in 0..WORKERS / SESSIONS {
            let channel = Endpoint::from_shared(url.clone()).unwrap().connect().await.unwrap();
            for session in 0..SESSIONS {
                tokio::spawn(live(channel.clone(), connection * SESSIONS + session));
            }
        }
        let channel = Endpoint::from_shared(url.clone()).unwrap().connect().await.unwrap();
        let mut client = rpc::control_client(channel, Some(Token::new(TOKEN).unwrap()));
        let began = Instant::now();
        loop {
            let workers = client.list_workers(ListWorkersRequest {}).await.unwrap().into_inner().workers;
            if workers.len() == WORKERS {
                break;
            }
            assert!(began.elapsed() < Duration::from_secs(60), "{} workers are in", workers.len());
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
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
