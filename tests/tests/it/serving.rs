//! Jobs that end with a completion server: it answers until the job is stopped, and is started again where it dies.

use std::hash::{BuildHasher, RandomState};
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};

use nix::sys::signal::Signal;
use serde_json::Value;
use tunefleet_tests::cluster::Cluster;
use tunefleet_tests::job::Job;

/// A port that nothing listens on now, below those that the system gives to whoever asks for any.
pub fn free_port() -> u16 {
    let random = || RandomState::new().hash_one(0u8);
    let mut ports = std::iter::repeat_with(|| 10_000 + (random() % 20_000) as u16);
    ports.find(|port| TcpListener::bind(("127.0.0.1", *port)).is_ok()).unwrap()
}

/// The body of an answer, once there is one that is well.
fn ask(port: u16, method: &str, path: &str, body: &str) -> Option<String> {
    post(port, method, path, body).filter(|(status, _)| *status == 200).map(|(_, body)| body)
}

/// Status and body of an answer.
pub fn post(port: u16, method: &str, path: &str, body: &str) -> Option<(u16, String)> {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).ok()?;
    let length = body.len();
    write!(
        stream,
        "{method} {path} HTTP/1.1\r\nHost: test\r\nConnection: close\r\nContent-Type: application/json\r\n\
         Content-Length: {length}\r\n\r\n{body}"
    )
    .ok()?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).ok()?;
    let (head, body) = answer.split_once("\r\n\r\n")?;
    Some((head.get(9..12)?.parse().ok()?, body.to_owned()))
}

pub fn completion(port: u16, model: &str) -> Option<String> {
    let body = format!(
        r#"{{"model": "{model}", "prompt": "fn main() {{", "max_tokens": 8, "temperature": 0, "stop": []}}"#
    );
    let answer: Value = serde_json::from_str(&ask(port, "POST", "/v1/completions", &body)?).ok()?;
    Some(answer["choices"][0]["text"].as_str()?.to_owned())
}

#[test]
fn a_job_serves_what_it_exported_until_it_is_stopped_and_again_when_its_rank_is_killed() {
    let port = free_port();
    let job = Job::builder()
        .steps(2)
        .restart("max_restarts: 3, backoff_seconds: 0.1")
        .section(&format!("serve: {{ listen: '127.0.0.1:{port}', max_batch: 2 }}"))
        .build();
    let mut cluster = Cluster::start(job.dir(), &[2]);
    cluster.launch(&job, &["--detach"]).wait().expect(0);
    cluster.wait_for("an answer", |_| completion(port, "test").is_some(), "test");
    let status = cluster.status("test");
    assert_eq!((&status["state"], &status["stage"]), (&"running".into(), &"serve".into()), "{status}");
    assert!(ask(port, "GET", "/metrics", "").unwrap().contains("tunefleet_serve_"));
    let before = completion(port, "test").unwrap();

    let rank = cluster.ranks().remove(0);
    rank.kill();
    cluster.wait_for("another attempt", |status| status["attempt"] == 2, "test");
    cluster.wait_for("an answer of another rank", |_| completion(port, "test").is_some(), "test");
    assert!(cluster.ranks().iter().all(|another| another.pid != rank.pid));
    assert_eq!(completion(port, "test").unwrap(), before);

    cluster.ask(&["cancel", "test"]).expect(0);
    cluster.wait_for_state("test", "stopped");
    assert!(TcpStream::connect(("127.0.0.1", port)).is_err(), "it still listens");
}

#[test]
fn launch_ends_with_a_server_of_base_and_adapter_until_control_c() {
    let port = free_port();
    let job = Job::builder()
        .ranks(1)
        .steps(2)
        .section("adapter: { rank: 4, quantize: nf4 }")
        .section(&format!("serve: {{ listen: '127.0.0.1:{port}' }}"))
        .build();
    let mut launched = job.launch(&[]);
    launched.wait_for_line(&format!("serve: http://127.0.0.1:{port}"));
    launched.wait_until("an answer", || completion(port, "").is_some());
    let models = ask(port, "GET", "/v1/models", "").unwrap();
    assert!(models.contains("\"base\"") && models.contains("\"test\""), "{models}");
    // Who names none is answered by the adapter.
    assert_eq!(completion(port, ""), completion(port, "test"));
    assert!(completion(port, "base").is_some());
    for name in ["base", "test", "what/it-is-called-elsewhere"] {
        let answer = ask(port, "POST", &format!("/models/{name}"), r#"{"inputs": "fn main() {"}"#).unwrap();
        assert!(answer.contains("generated_text"), "{name}: {answer}");
    }
    launched.signal(Signal::SIGINT);
    let ended = launched.wait();
    assert!(ended.output.contains("test stopped"), "{}", ended.output);
}

#[test]
fn a_server_that_nobody_may_reach_so_is_refused_before_anything_runs() {
    let cases = [
        ("serve: { listen: '0.0.0.0:8080' }", "serve.listen 0.0.0.0:8080 is open to other machines"),
        ("serve: { listen: nowhere }", "serve.listen must be IP:PORT"),
        ("serve: { }\nexport: { enabled: false }", "export.enabled is false"),
        ("serve: { max_batch: 0 }", "serve.max_batch must be 1 to 1024"),
        ("serve: { }\nadapter: { dora: true }", "it trains more than pairs"),
    ];
    for (section, message) in cases {
        let job = Job::builder().section(section).build();
        let ended = job.run(&[]);
        assert!(ended.output.contains(message), "{section}: {}", ended.output);
    }
}
