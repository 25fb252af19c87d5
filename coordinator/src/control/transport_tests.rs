//! The control plane and its workers over real gRPC on a network and a clock that are made up (turmoil): connections
//! stand still and break, the coordinator ends and another goes on with its state. A daemon is the one of the
//! simulation; here it is its session that is tried.

use std::cell::RefCell;
use std::net::IpAddr;
use std::path::Path;
use std::rc::Rc;

use hyper_util::rt::TokioIo;
use tonic::transport::{Channel, Endpoint};
use tunefleet_proto::checkpoint;
use tunefleet_proto::rpc::JobState;
use tunefleet_proto::rpc::{
    Finished, Heartbeat, RankDone, Stage, StepDone, Token, WorkerMessage, coordinator_message, rank_done,
    rank_event, worker_message,
};

use super::*;
use crate::control::fleet::Start;
use crate::control::sim::{Daemon, Down, Random};
use crate::control::{Settings, store};

const TOKEN: &str = "token";
const PORT: u16 = 7070;
const STEPS: u64 = 100;
/// Of the ranks; heartbeats come once a second.
const STEP: Duration = Duration::from_millis(200);
const WORKERS: [&str; 2] = ["w0", "w1"];
/// How long the network is bad.
const BAD_FOR: Duration = Duration::from_secs(30);

/// What a machine keeps when its daemon loses the session.
struct Machine {
    daemon: Daemon,
    /// Steps of its rank.
    steps: u64,
    done: bool,
}

async fn serve(store: store::Memory) -> Result<(), Box<dyn std::error::Error>> {
    let plane = Plane::start(Box::new(store.clone()), std::sync::Arc::new(store), Settings::default())?;
    let access = Access::open(None, Some(Token::new(TOKEN)?.sha256().to_owned()))?;
    let guard = Guard::new(plane.clone(), access, false);
    let (ready, connections) = tokio::sync::mpsc::channel(64);
    let listener = turmoil::net::TcpListener::bind((IpAddr::from([0, 0, 0, 0]), PORT)).await?;
    tokio::spawn(async move {
        while let Ok((stream, address)) = listener.accept().await {
            let _ = ready.send(Ok(listen::Connection::of(stream, address))).await;
        }
    });
    Ok(Service { plane, guard, state: None, certificate: None }.serve(connections).await?)
}

async fn dial() -> Result<Channel, tonic::transport::Error> {
    let connect = tower::service_fn(|_| async {
        turmoil::net::TcpStream::connect(("control", PORT)).await.map(TokioIo::new)
    });
    // As `dial::Credentials` does, which dials real sockets.
    let seconds = Duration::from_secs(10);
    Endpoint::from_static("http://control:7070")
        .connect_timeout(Duration::from_secs(5))
        .http2_keep_alive_interval(seconds)
        .keep_alive_timeout(seconds)
        .keep_alive_while_idle(true)
        .connect_with_connector(connect)
        .await
}

/// One session, until it breaks.
async fn session(machine: &RefCell<Machine>, spec: &JobSpec) -> Result<(), Box<dyn std::error::Error>> {
    let (up, words) = tokio::sync::mpsc::channel(64);
    let mut client = rpc::workers_client(dial().await?, Some(Token::new(TOKEN)?));
    let register = machine.borrow().daemon.register();
    up.send(WorkerMessage {
        body: Some(worker_message::Body::Register(register)),
        ..WorkerMessage::default()
    })
    .await?;
    let mut down = client.session(ReceiverStream::new(words)).await?.into_inner();
    let mut step = tokio::time::interval(STEP);
    let mut heartbeat = tokio::time::interval(Duration::from_secs(1));
    let mut epoch = 0;
    loop {
        let body = tokio::select! {
            command = down.message() => {
                let Some(command) = command?.and_then(|message| message.body) else { return Ok(()) };
                let now_ms = turmoil::elapsed().as_millis() as u64;
                let command = match command {
                    coordinator_message::Body::Registered(registered) => {
                        epoch = registered.epoch;
                        Down::Registered { epoch, acknowledged: registered.acknowledged }
                    }
                    coordinator_message::Body::StartTask(start) => Down::Start(Start {
                        task: start.task.unwrap(),
                        ranks: start.ranks,
                        world: start.world,
                        resume: start.resume,
                        cuda: start.cuda,
                    }),
                    command => Down::Command(command),
                };
                machine.borrow_mut().daemon.obey(command, now_ms);
                None
            }
            _ = step.tick() => {
                train(&mut machine.borrow_mut(), spec);
                None
            }
            _ = heartbeat.tick() => Some(worker_message::Body::Heartbeat(Heartbeat::default())),
        };
        if epoch == 0 {
            continue;
        }
        let mut messages = machine.borrow_mut().daemon.unsent();
        messages.extend(body.map(|body| WorkerMessage { body: Some(body), epoch, sequence: 0 }));
        for message in messages {
            up.send(message).await?;
        }
    }
}

/// Ranks train whether there is a session or not.
fn train(machine: &mut Machine, spec: &JobSpec) {
    machine.daemon.become_ready(turmoil::elapsed().as_millis() as u64);
    let started = machine.daemon.running().find(|(_, rank)| rank.started.is_some());
    let Some((key, task)) = started.map(|(key, rank)| (key.clone(), rank.task.clone())) else { return };
    if machine.done {
        return;
    }
    machine.steps += 1;
    let (rank, step) = (key.1, machine.steps);
    let done = StepDone { step, loss: 1.0, ..StepDone::default() };
    machine.daemon.report(&task, rank, rank_event::Body::Step(done));
    if step == STEPS {
        let last = spec.checkpoints_dir().join(checkpoint::dir_name(STEPS));
        std::fs::create_dir_all(&last).unwrap();
        std::fs::write(last.join(checkpoint::MANIFEST_FILE), "{}").unwrap();
        let outcome = Some(rank_done::Outcome::Finished(Finished {}));
        machine.daemon.report(&task, rank, rank_event::Body::Done(RankDone { outcome }));
        machine.daemon.exit(&key, Some(0), None);
        machine.done = true;
    }
}

async fn work(machine: Rc<RefCell<Machine>>, spec: Rc<JobSpec>) -> turmoil::Result {
    loop {
        let mut session = std::pin::pin!(session(&machine, &spec));
        // What a session says of its end is of no use: it is dialled again.
        let _ = (&mut session).await;
        let mut step = tokio::time::interval(STEP);
        for _ in 0..3 {
            step.tick().await;
            train(&mut machine.borrow_mut(), &spec);
        }
    }
}

/// A job trains over a bad network, and then a good one; all of its events.
fn over_a_bad_network(seed: u64, dir: &Path) -> (Vec<JobEvent>, u32) {
    let spec = Rc::new(tests::spec_of(dir, 2, STEPS));
    let store = store::Memory::default();
    let mut sim = turmoil::Builder::new()
        .rng_seed(seed)
        .simulation_duration(Duration::from_secs(600))
        .min_message_latency(Duration::from_millis(1))
        .max_message_latency(Duration::from_millis(80))
        .build();
    let kept = store.clone();
    sim.host("control", move || serve(kept.clone()));
    for (index, name) in WORKERS.into_iter().enumerate() {
        let machine = Machine { daemon: Daemon::new(index, 1), steps: 0, done: false };
        let (machine, spec) = (Rc::new(RefCell::new(machine)), Rc::clone(&spec));
        sim.host(name, move || work(Rc::clone(&machine), Rc::clone(&spec)));
    }
    let spec_json = serde_json::to_string(&*spec).unwrap();
    sim.client("person", async move {
        let request = "once".to_owned();
        // The answer may be lost, and the question asked again.
        loop {
            let asked = async {
                let mut client = rpc::control_client(dial().await?, Some(Token::new(TOKEN)?));
                let request = SubmitRequest {
                    spec_json: spec_json.clone(),
                    request: request.clone(),
                    ..SubmitRequest::default()
                };
                client.submit(request).await?;
                Ok::<(), Box<dyn std::error::Error>>(())
            };
            match tokio::time::timeout(Duration::from_secs(20), asked).await {
                Ok(Ok(())) => break,
                _ => tokio::time::sleep(Duration::from_secs(1)).await,
            }
        }
        loop {
            tokio::time::sleep(Duration::from_secs(1)).await;
            let asked = async {
                let mut client = rpc::control_client(dial().await?, Some(Token::new(TOKEN)?));
                let status = client.status(StatusRequest { job: "job".to_owned() }).await?.into_inner();
                Ok::<JobState, Box<dyn std::error::Error>>(status.state())
            };
            if let Ok(Ok(state)) = tokio::time::timeout(Duration::from_secs(5), asked).await
                && state.is_end()
            {
                assert_eq!(state, JobState::Completed);
                return Ok(());
            }
        }
    });
    let mut random = Random(seed);
    let (mut faults, mut next) = (0, Duration::from_secs(1));
    let mut healed = false;
    while !sim.step().unwrap_or_else(|error| panic!("seed {seed}: {error}")) {
        if healed || sim.elapsed() < next {
            continue;
        }
        next = sim.elapsed() + Duration::from_millis(random.between(200, 3000));
        for name in WORKERS {
            sim.repair("control", name);
            sim.release("control", name);
        }
        if sim.elapsed() > BAD_FOR {
            healed = true;
            continue;
        }
        faults += 1;
        let name = WORKERS[random.below(2) as usize];
        match random.below(4) {
            0 => sim.partition("control", name),
            1 => sim.hold("control", name),
            2 => {
                sim.crash("control");
                sim.bounce("control");
            }
            // The network is well for a while.
            _ => {}
        }
    }
    let job = tunefleet_proto::ids::JobId("job".to_owned());
    (store::History::events(&store, &job, 0, 10_000).unwrap(), faults)
}

/// Every step is told once, in order, by the one attempt that there was.
fn check(seed: u64) {
    let dir = tempfile::tempdir().unwrap();
    let (events, faults) = over_a_bad_network(seed, dir.path());
    assert!(faults > 5, "seed {seed}: {faults} faults");
    let numbers: Vec<u64> = events.iter().map(|event| event.sequence).collect();
    assert_eq!(numbers, (1..=events.len() as u64).collect::<Vec<_>>(), "seed {seed}");
    let steps: Vec<(u32, u64)> = events
        .iter()
        .filter_map(|event| match &event.body {
            Some(tunefleet_proto::rpc::job_event::Body::Step(step)) => Some((event.attempt, step.step)),
            _ => None,
        })
        .collect();
    assert_eq!(steps, (1..=STEPS).map(|step| (1, step)).collect::<Vec<_>>(), "seed {seed}");
    let trained = events.iter().any(|event| match &event.body {
        Some(tunefleet_proto::rpc::job_event::Body::Stage(stage)) => stage.stage() == Stage::Train,
        _ => false,
    });
    assert!(trained, "seed {seed}");
}

#[test]
fn sessions_over_a_bad_network_lose_and_double_nothing() {
    (0..5).for_each(check);
}

/// Minutes: CI runs a sample.
mod long {
    #[test]
    fn sessions_over_many_bad_networks_lose_and_double_nothing() {
        let is_sample = std::env::var("TUNEFLEET_LONG_SAMPLE").is_ok_and(|sample| !sample.is_empty());
        (100..if is_sample { 110 } else { 600 }).for_each(super::check);
    }
}
