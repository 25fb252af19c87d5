//! The control plane over real gRPC, with a worker that is played by the test.

use std::net::Ipv4Addr;
use std::path::Path;

use tokio::sync::mpsc::UnboundedSender;
use tonic::Code;
use tonic::transport::Endpoint;
use tunefleet_proto::job::{self, TrainSpec};
use tunefleet_proto::model::ModelConfig;
use tunefleet_proto::rpc::job_event::Body;
use tunefleet_proto::rpc::{
    Collective, Collectives, ControlClient, Finished, JobState, RankDone, RankEvent, RankExited, RankFailed,
    RankReport, Ready, Register, Stage, StartRanks, StepDone, TaskId, Token, coordinator_message, rank_done,
    rank_event,
};
use tunefleet_proto::{checkpoint, dataset};

use super::*;
use crate::control::{Settings, store};

const LOOPBACK: (Ipv4Addr, u16) = (Ipv4Addr::LOCALHOST, 0);

/// A job with nothing to do but train, on 2 ranks.
fn spec(dir: &Path) -> JobSpec {
    spec_of(dir, 2, 3)
}

/// The same of any size.
pub(super) fn spec_of(dir: &Path, ranks: u32, steps: u64) -> JobSpec {
    let manifest = dataset::Manifest {
        version: dataset::MANIFEST_VERSION,
        written_by: String::new(),
        settings: serde_json::Value::Null,
        repositories: Vec::new(),
        train: Vec::new(),
        validation: Vec::new(),
        dropped: Default::default(),
        found: Default::default(),
    };
    std::fs::write(dir.join(dataset::MANIFEST_FILE), serde_json::to_string(&manifest).unwrap()).unwrap();
    std::fs::write(dir.join("tokenizer.json"), "{}").unwrap();
    let config = ModelConfig::preset("tiny").unwrap().to_json("float32");
    std::fs::write(dir.join("config.json"), config.to_string()).unwrap();
    let text = format!(
        "name: job\noutput: out\ndataset: .\ntokenizer: {{path: .}}\nmodel: {{path: .}}\n\
         data: {{sequence_tokens: 8}}\nexport: {{enabled: false}}\n\
         train: {{ranks: {ranks}, device: cpu, precision: fp32, steps: {steps}, eval_every_steps: 0}}\n\
         restart: {{max_restarts: 0}}\n"
    );
    job::load(&dir.join("job.yaml"), &text, &[], dir).unwrap()
}

fn door(token: Option<Token>) -> Door {
    let access = Access::open(None, token.map(|token| token.sha256().to_owned())).unwrap();
    Door { access, tls: None, insecure: false }
}

/// A served control plane; its URL.
async fn served(token: Option<Token>) -> String {
    let server = Server::bind(LOOPBACK.into(), door(token)).await.unwrap();
    let url = server.url();
    let (store, history) = store::memory();
    tokio::spawn(server.serve(Plane::start(store, history, Settings::default()).unwrap()));
    url
}

async fn control(url: &str, token: Option<Token>) -> ControlClient {
    let channel = Endpoint::from_shared(url.to_owned()).unwrap().connect().await.unwrap();
    rpc::control_client(channel, token)
}

async fn submit(client: &mut ControlClient, spec: &JobSpec) -> Result<u32, Status> {
    let spec_json = serde_json::to_string(spec).unwrap();
    let request = SubmitRequest { spec_json, ..SubmitRequest::default() };
    Ok(client.submit(request).await?.into_inner().attempt)
}

/// A worker whose every word is the test's.
struct Worker {
    say: UnboundedSender<WorkerMessage>,
    hear: Streaming<CoordinatorMessage>,
}

impl Worker {
    async fn join(url: &str, name: &str, incarnation: &str) -> Result<Self, Status> {
        let (say, words) = tokio::sync::mpsc::unbounded_channel();
        let (name, incarnation) = (name.to_owned(), incarnation.to_owned());
        let register = Register { name, incarnation, slots: 2, ..Register::default() };
        say.send(WorkerMessage {
            body: Some(worker_message::Body::Register(register)),
            ..WorkerMessage::default()
        })
        .unwrap();
        let channel = Endpoint::from_shared(url.to_owned()).unwrap().connect().await.unwrap();
        let mut client = rpc::workers_client(channel, None);
        let hear = client.session(UnboundedReceiverStream::new(words)).await?.into_inner();
        let mut worker = Worker { say, hear };
        assert!(matches!(worker.next().await, coordinator_message::Body::Registered(_)));
        Ok(worker)
    }

    async fn next(&mut self) -> coordinator_message::Body {
        self.hear.message().await.unwrap().unwrap().body.unwrap()
    }

    fn report(&self, attempt: u32, rank: u32, body: rank_event::Body) {
        let event = Some(RankEvent { body: Some(body), ..RankEvent::default() });
        let report = RankReport { task: Some(task(attempt)), rank, event };
        self.say
            .send(WorkerMessage {
                body: Some(worker_message::Body::Report(report)),
                ..WorkerMessage::default()
            })
            .unwrap();
    }

    fn exit(&self, attempt: u32, rank: u32, exit_code: Option<i32>, signal: Option<i32>) {
        let task = Some(task(attempt));
        let exited = RankExited { task, rank, exit_code, signal, ..RankExited::default() };
        self.say
            .send(WorkerMessage {
                body: Some(worker_message::Body::Exited(exited)),
                ..WorkerMessage::default()
            })
            .unwrap();
    }

    /// Takes the start of a task, and lets all its ranks be ready.
    async fn start(&mut self, attempt: u32) -> StartRanks {
        let coordinator_message::Body::StartTask(start) = self.next().await else { panic!() };
        assert_eq!((start.task, start.world, start.ranks), (Some(task(attempt)), 2, vec![0, 1]));
        assert!(start.shard_plan_json.contains("block.0"));
        for rank in 0..2 {
            self.report(attempt, rank, rank_event::Body::Ready(Ready { address: format!("a{rank}") }));
        }
        let coordinator_message::Body::StartRanks(start) = self.next().await else { panic!() };
        start
    }
}

fn task(attempt: u32) -> TaskId {
    TaskId { job: "job".to_owned(), attempt, stage: Stage::Train.into() }
}

/// All events of the job up to its end.
async fn watch(client: &mut ControlClient) -> Vec<Body> {
    let request = WatchRequest { job: "job".to_owned(), ..WatchRequest::default() };
    let mut stream = client.watch(request).await.unwrap().into_inner();
    let mut bodies = Vec::new();
    while let Some(event) = stream.message().await.unwrap() {
        bodies.extend(event.body);
    }
    bodies
}

#[tokio::test]
async fn a_stranger_is_refused_by_both_services() {
    let url = served(Some(Token::new("right").unwrap())).await;
    for token in [None, Some(Token::new("wrong").unwrap())] {
        let status = control(&url, token.clone()).await.list(ListRequest {}).await.unwrap_err();
        assert_eq!(status.code(), Code::Unauthenticated);
        let channel = Endpoint::from_shared(url.clone()).unwrap().connect().await.unwrap();
        let words = tokio_stream::pending::<WorkerMessage>();
        let status = rpc::workers_client(channel, token).session(words).await.unwrap_err();
        assert_eq!(status.code(), Code::Unauthenticated);
    }
    let mut friend = control(&url, Some(Token::new("right").unwrap())).await;
    assert!(friend.list(ListRequest {}).await.unwrap().into_inner().jobs.is_empty());
}

#[tokio::test]
async fn an_open_network_address_needs_a_token_and_tls() {
    let everywhere = SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0));
    let refused = Server::bind(everywhere, door(None)).await.err().unwrap().to_string();
    assert!(refused.contains("coordinator tokens create"), "{refused}");
    let token = || Some(Token::new("t").unwrap());
    let refused = Server::bind(everywhere, door(token())).await.err().unwrap().to_string();
    assert!(refused.contains("--tls-cert") && refused.contains("--insecure"), "{refused}");
    assert!(Server::bind(everywhere, Door { insecure: true, ..door(token()) }).await.is_ok());
}

#[tokio::test]
async fn a_port_in_use_is_named_with_what_to_do() {
    let first = Server::bind(LOOPBACK.into(), door(None)).await.unwrap();
    let address = first.url().strip_prefix("http://").unwrap().to_owned();
    let refused = Server::bind(address.parse().unwrap(), door(None)).await.err().unwrap().to_string();
    assert!(refused.contains(&address), "{refused}");
    assert!(refused.contains("choose another port"), "{refused}");
}

#[tokio::test]
async fn a_job_trains_on_a_worker_and_completes() {
    let dir = tempfile::tempdir().unwrap();
    let spec = spec(dir.path());
    let url = served(None).await;
    let mut client = control(&url, None).await;
    let attempt = submit(&mut client, &spec).await.unwrap();
    assert_eq!(attempt, 1);
    let refused = submit(&mut client, &spec).await.unwrap_err();
    assert_eq!(refused.code(), Code::AlreadyExists, "one live attempt: {refused}");

    let mut worker = Worker::join(&url, "w", "1").await.unwrap();
    let start = worker.start(attempt).await;
    assert_eq!(start.peers, ["a0", "a1"]);
    assert_eq!(start.secret.len(), 32);
    let loss = 0.1 + 0.2;
    worker.report(attempt, 0, rank_event::Body::Step(StepDone { step: 3, loss, ..StepDone::default() }));
    worker.report(attempt, 1, rank_event::Body::Step(StepDone { step: 3, loss, ..StepDone::default() }));
    let last = spec.checkpoints_dir().join(checkpoint::dir_name(3));
    std::fs::create_dir_all(&last).unwrap();
    std::fs::write(last.join(checkpoint::MANIFEST_FILE), "{}").unwrap();
    for rank in 0..2 {
        let outcome = Some(rank_done::Outcome::Finished(Finished {}));
        worker.report(attempt, rank, rank_event::Body::Done(RankDone { outcome }));
        worker.exit(attempt, rank, Some(0), None);
    }
    let events = watch(&mut client).await;
    let steps = events.iter().filter(|body| matches!(body, Body::Step(_))).count();
    assert_eq!(steps, 1, "one rank's word is enough");
    let Some(Body::State(end)) = events.last() else { panic!("{events:?}") };
    assert_eq!(end.state(), JobState::Completed);
    let log = std::fs::read_to_string(spec.output.join(super::super::METRICS_LOG_FILE)).unwrap();
    assert!(log.contains("\"loss\":0.30000000000000004"), "{log}");

    // Again: nothing is left to do, and the attempts count on.
    assert_eq!(submit(&mut client, &spec).await.unwrap(), 2);
    let events = watch(&mut client).await;
    let is_cached = |body: &Body| {
        matches!(body, Body::Stage(s) if s.stage() == Stage::Train
            && s.what() == tunefleet_proto::rpc::stage_changed::What::Cached)
    };
    assert!(events.iter().any(is_cached), "{events:?}");
}

#[tokio::test]
async fn what_a_stale_attempt_says_is_not_heard_and_its_ranks_are_ended() {
    let dir = tempfile::tempdir().unwrap();
    let url = served(None).await;
    let mut client = control(&url, None).await;
    let attempt = submit(&mut client, &spec(dir.path())).await.unwrap();
    let mut worker = Worker::join(&url, "w", "1").await.unwrap();
    worker.start(attempt).await;

    worker.report(attempt + 1, 0, rank_event::Body::Step(StepDone { step: 2, ..StepDone::default() }));
    let coordinator_message::Body::Abort(abort) = worker.next().await else { panic!() };
    assert_eq!(abort.task, Some(task(attempt + 1)));
    // The exit of a rank of another attempt is not that of the live one.
    worker.exit(attempt + 1, 0, None, Some(9));
    worker.report(attempt, 0, rank_event::Body::Step(StepDone { step: 1, ..StepDone::default() }));

    worker.exit(attempt, 1, None, Some(9));
    let coordinator_message::Body::Abort(abort) = worker.next().await else { panic!() };
    assert_eq!(abort.task, Some(task(attempt)), "the others are stopped");
    worker.exit(attempt, 0, Some(1), None);
    let events = watch(&mut client).await;
    let steps: Vec<u64> =
        events.iter().filter_map(|body| if let Body::Step(s) = body { Some(s.step) } else { None }).collect();
    assert_eq!(steps, [1]);
    let Some(Body::State(end)) = events.last() else { panic!("{events:?}") };
    let failure = end.failure.clone().unwrap();
    assert_eq!((end.state(), failure.rank), (JobState::Failed, Some(1)));
    assert_eq!(failure.exit, "signal 9 (SIGKILL)");
}

#[tokio::test]
async fn ranks_are_asked_where_they_are_and_the_one_behind_is_named_in_the_status() {
    let dir = tempfile::tempdir().unwrap();
    let url = served(None).await;
    let mut client = control(&url, None).await;
    let attempt = submit(&mut client, &spec(dir.path())).await.unwrap();
    let mut worker = Worker::join(&url, "w", "1").await.unwrap();
    worker.start(attempt).await;

    let collective = |sequence, about: &str| {
        Some(Collective { sequence, about: about.to_owned(), seconds: 2.0, ..Collective::default() })
    };
    let waits = || Collectives {
        last_started: collective(8, "reduce of block.1"),
        oldest_unfinished: collective(8, "reduce of block.1"),
        ..Collectives::default()
    };
    let behind = Collectives { last_started: collective(7, "gather of block.1"), ..Collectives::default() };
    worker.report(attempt, 0, rank_event::Body::Stalled(waits()));
    let coordinator_message::Body::ReportCollectives(ask) = worker.next().await else { panic!() };
    assert_eq!(ask.task, Some(task(attempt)));
    worker.report(attempt, 0, rank_event::Body::Collectives(waits()));
    worker.report(attempt, 1, rank_event::Body::Collectives(behind));
    let coordinator_message::Body::Abort(abort) = worker.next().await else { panic!() };
    assert!(abort.by_peer && abort.reason.starts_with("rank 1 is behind"), "{abort:?}");
    worker.exit(attempt, 1, None, Some(9));
    let message = format!("aborted by peer: {}", abort.reason);
    let outcome =
        Some(rank_done::Outcome::Failed(RankFailed { message, consequence: true, ..RankFailed::default() }));
    worker.report(attempt, 0, rank_event::Body::Done(RankDone { outcome }));
    worker.exit(attempt, 0, Some(1), None);

    let events = watch(&mut client).await;
    let aborted: Vec<u32> = events
        .iter()
        .filter_map(|body| match body {
            Body::RankEnded(ended) if ended.aborted_by_peer => Some(ended.rank),
            _ => None,
        })
        .collect();
    assert_eq!(aborted, [0]);
    let request = StatusRequest { job: "job".to_owned() };
    let detail = client.status(request).await.unwrap().into_inner().detail;
    assert!(detail.starts_with("rank 1 is behind: it is at gather of block.1 (#7)"), "{detail}");
    assert!(detail.contains("the others wait in reduce of block.1 (#8)"), "{detail}");
    assert!(detail.contains("; rank 0: aborted by peer; not started again: "), "{detail}");
}

#[tokio::test]
async fn unfinished_training_is_neither_resumed_nor_discarded_unasked() {
    let dir = tempfile::tempdir().unwrap();
    let mut spec = spec(dir.path());
    let url = served(None).await;
    let mut client = control(&url, None).await;
    let attempt = submit(&mut client, &spec).await.unwrap();
    let mut worker = Worker::join(&url, "w", "1").await.unwrap();
    worker.start(attempt).await;
    let saved = spec.checkpoints_dir().join(checkpoint::dir_name(2));
    std::fs::create_dir_all(&saved).unwrap();
    std::fs::write(saved.join(checkpoint::MANIFEST_FILE), "{}").unwrap();
    for rank in 0..2 {
        worker.exit(attempt, rank, None, Some(9));
    }
    watch(&mut client).await;

    let cause = async |client: &mut ControlClient, spec: &JobSpec| {
        submit(client, spec).await.unwrap();
        let events = watch(client).await;
        let Some(Body::State(end)) = events.last() else { panic!("{events:?}") };
        end.failure.clone().unwrap().cause
    };
    let unfinished = cause(&mut client, &spec).await;
    assert!(unfinished.contains("--resume") && unfinished.contains("step 2 of 3"), "{unfinished}");
    spec.train.learning_rate = 2e-3;
    let foreign = cause(&mut client, &spec).await;
    assert!(foreign.contains("--fresh") && !foreign.contains("--resume"), "{foreign}");
    assert!(saved.exists());
}

#[tokio::test]
async fn attempts_of_one_name_have_different_numbers_wherever_they_write() {
    let dir = tempfile::tempdir().unwrap();
    let mut spec = spec(dir.path());
    let mut client = control(&served(None).await, None).await;
    for attempt in [1, 2, 3] {
        spec.output = dir.path().join(format!("out-{attempt}"));
        assert_eq!(submit(&mut client, &spec).await.unwrap(), attempt);
        let asked = spec.output.join(format!("logs/attempt-{attempt}/job.json"));
        assert_eq!(serde_json::from_slice::<JobSpec>(&std::fs::read(asked).unwrap()).unwrap(), spec);
        client.cancel(CancelRequest { job: "job".to_owned(), grace_ms: 0 }).await.unwrap();
    }
}

#[tokio::test]
async fn a_second_worker_of_the_same_name_is_refused() {
    let url = served(None).await;
    let _first = Worker::join(&url, "w", "1").await.unwrap();
    let refused = Worker::join(&url, "w", "2").await.err().unwrap();
    assert_eq!(refused.code(), Code::AlreadyExists);
    assert!(Worker::join(&url, "other", "2").await.is_ok());
}

#[tokio::test]
async fn two_jobs_do_not_share_an_output_directory() {
    let dir = tempfile::tempdir().unwrap();
    let mut spec = spec(dir.path());
    let mut client = control(&served(None).await, None).await;
    let mut other = control(&served(None).await, None).await;
    submit(&mut client, &spec).await.unwrap();
    spec.name = "another".to_owned();
    let refused = submit(&mut other, &spec).await.unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition);
    assert!(refused.message().contains("another job runs"), "{refused}");
}

#[tokio::test]
async fn a_job_that_waits_for_slots_is_cancelled_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let mut client = control(&served(None).await, None).await;
    submit(&mut client, &spec(dir.path())).await.unwrap();
    client.cancel(CancelRequest { job: "job".to_owned(), grace_ms: 0 }).await.unwrap();
    let events = watch(&mut client).await;
    let Some(Body::State(end)) = events.last() else { panic!("{events:?}") };
    assert_eq!(end.state(), JobState::Cancelled);
    let missing = client.status(StatusRequest { job: "none".to_owned() }).await.unwrap_err();
    assert_eq!(missing.code(), Code::NotFound);
}

#[tokio::test]
async fn a_spec_that_cannot_be_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let mut client = control(&served(None).await, None).await;
    let good = spec(dir.path());
    for (bad, word) in [
        (JobSpec { name: "../up".to_owned(), ..good.clone() }, "name"),
        (JobSpec { output: "relative".into(), ..good.clone() }, "absolute"),
        (JobSpec { train: TrainSpec { ranks: 0, ..good.train.clone() }, ..good.clone() }, "ranks"),
        (
            JobSpec {
                train: TrainSpec { micro_batch_sequences: u32::MAX, ..good.train.clone() },
                ..good.clone()
            },
            "micro_batch_sequences",
        ),
    ] {
        let refused = submit(&mut client, &bad).await.unwrap_err();
        assert_eq!(refused.code(), Code::InvalidArgument);
        assert!(refused.message().contains(word), "{refused}");
    }
    let not_json = SubmitRequest { spec_json: "{".to_owned(), ..SubmitRequest::default() };
    assert_eq!(client.submit(not_json).await.unwrap_err().code(), Code::InvalidArgument);
}
