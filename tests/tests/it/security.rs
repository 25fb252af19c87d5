//! Who is let in, who is not, and what is noted of it.

use std::fs;
use std::net::{Ipv4Addr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant, SystemTime};

use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};
use rcgen::{CertificateParams, Issuer, KeyPair};
use serde_json::Value;
use tonic::transport::{Channel, Endpoint};
use tunefleet_proto::rpc::{self, Register, WorkerMessage, coordinator_message, worker_message};
use tunefleet_tests::job::Job;
use tunefleet_tests::process::{Ended, LIMIT, Running};
use tunefleet_tests::{programs, raw};

const DAY: Duration = Duration::from_secs(24 * 3600);

/// A coordinator with TLS, an authority, and a token of each role.
struct Secured {
    dir: PathBuf,
    coordinator: Running,
    url: String,
    with_tls: bool,
}

impl Secured {
    fn start(dir: &Path) -> Self {
        certs(dir, &["init"]);
        certs(dir, &["server", "127.0.0.1", "localhost"]);
        let state = dir.join("state");
        for role in ["worker", "viewer", "user", "admin"] {
            let made = tokens(&state, &["create", role, "--role", role]);
            fs::write(dir.join(role), made.stdout).unwrap();
        }
        let certs = dir.join("certs");
        let serve = format!(
            "listen: 127.0.0.1:0\nstate: {}\ntls_cert: certs/server.pem\ntls_key: certs/server.key\n\
             client_ca: certs/ca.pem\n",
            state.display()
        );
        assert!(certs.join("ca.key").exists());
        Secured::serve(dir, &serve, true)
    }

    /// One without TLS, on loopback.
    fn plain(dir: &Path) -> Self {
        let state = dir.join("state");
        let made = tokens(&state, &["create", "admin", "--role", "admin"]);
        fs::write(dir.join("admin"), made.stdout).unwrap();
        Secured::serve(dir, &format!("listen: 127.0.0.1:0\nstate: {}\n", state.display()), false)
    }

    fn serve(dir: &Path, config: &str, with_tls: bool) -> Self {
        let file = dir.join("serve.yaml");
        fs::write(&file, config).unwrap();
        let mut command = Command::new(programs::coordinator());
        command.args(["validate", "--serve"]).arg(&file);
        Running::start(command).wait().expect(0);
        let mut command = Command::new(programs::coordinator());
        command.args(["serve", "--config"]).arg(&file).env("RUST_LOG", "info");
        let coordinator = Running::start(command);
        let line = coordinator.wait_for_line("coordinator listens on");
        let url = line.split_whitespace().nth(3).unwrap().trim_end_matches(',').to_owned();
        Secured { dir: dir.to_owned(), coordinator, url, with_tls }
    }

    fn state(&self) -> PathBuf {
        self.dir.join("state")
    }

    fn verb(&self, arguments: &[&str], token: &str) -> Command {
        let mut command = Command::new(programs::coordinator());
        command.args(arguments).args(["--coordinator", &self.url]);
        if self.with_tls {
            command.arg("--ca").arg(self.dir.join("certs/ca.pem"));
        }
        command.env("TUNEFLEET_TOKEN", token);
        command
    }

    fn token(&self, role: &str) -> String {
        fs::read_to_string(self.dir.join(role)).unwrap().trim().to_owned()
    }

    fn ask(&self, arguments: &[&str], role: &str) -> Ended {
        Running::start(self.verb(arguments, &self.token(role))).wait()
    }

    /// A daemon of this name that shows these files of the directory of certificates.
    fn worker(&self, name: &str, shows: Option<&str>) -> Running {
        let mut command = Command::new(programs::worker());
        command.args(["daemon", "--cpu", "--slots", "2", "--metrics", "127.0.0.1:0", "--name", name]);
        command.args(["--coordinator", &self.url]).arg("--ca").arg(self.dir.join("certs/ca.pem"));
        command.arg("--state-dir").arg(self.dir.join(format!("state-{name}")));
        if let Some(stem) = shows {
            let file = |ending: &str| self.dir.join("certs").join(format!("{stem}.{ending}"));
            command.arg("--cert").arg(file("pem")).arg("--key").arg(file("key"));
        }
        // A right token does not stand for a certificate.
        command.env("TUNEFLEET_TOKEN", self.token("worker")).env("TMPDIR", self.dir.join("tmp"));
        Running::start(command)
    }

    /// Waits until a refusal with these words is in the audit.
    fn wait_for_refusal(&self, words: &[&str]) {
        let began = Instant::now();
        loop {
            let told = self.ask(&["audit", "--refused", "--json"], "admin").expect(0).stdout;
            let has_all = |line: &&str| words.iter().all(|word| line.contains(word));
            if told.lines().any(|line| has_all(&line)) {
                return;
            }
            assert!(began.elapsed() < LIMIT, "{words:?} is not in\n{told}");
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    fn workers(&self) -> Value {
        serde_json::from_str(&self.ask(&["workers", "--json"], "viewer").expect(0).stdout).unwrap()
    }

    async fn channel(&self) -> Channel {
        Endpoint::from_shared(self.url.clone()).unwrap().connect().await.unwrap()
    }
}

fn certs(dir: &Path, arguments: &[&str]) -> Ended {
    let mut command = Command::new(programs::coordinator());
    command.arg("certs").args(arguments).arg("--dir").arg(dir.join("certs"));
    Running::start(command).wait().expect(0)
}

fn tokens(state: &Path, arguments: &[&str]) -> Ended {
    let mut command = Command::new(programs::coordinator());
    command.arg("tokens").args(arguments).arg("--state").arg(state);
    Running::start(command).wait().expect(0)
}

/// A certificate of the authority that ended yesterday.
fn write_expired(dir: &Path, name: &str) {
    let certs = dir.join("certs");
    let authority = fs::read_to_string(certs.join("ca.pem")).unwrap();
    let key = KeyPair::from_pem(&fs::read_to_string(certs.join("ca.key")).unwrap()).unwrap();
    let issuer = Issuer::from_ca_cert_pem(&authority, key).unwrap();
    let mut parameters = CertificateParams::new(vec![name.to_owned()]).unwrap();
    parameters.not_before = (SystemTime::now() - 3 * DAY).into();
    parameters.not_after = (SystemTime::now() - DAY).into();
    let key = KeyPair::generate().unwrap();
    let certificate = parameters.signed_by(&key, &issuer).unwrap();
    fs::write(certs.join("expired.pem"), certificate.pem()).unwrap();
    fs::write(certs.join("expired.key"), key.serialize_pem()).unwrap();
}

#[test]
fn a_job_trains_where_coordinator_and_workers_know_each_other_by_certificates() {
    let job = Job::builder().steps(3).build();
    let secured = Secured::start(job.dir());
    certs(job.dir(), &["worker", "w0"]);
    let _worker = secured.worker("w0", Some("worker-w0"));
    let mut launch = job.command("launch", &["--coordinator", &secured.url]);
    launch.arg("--ca").arg(job.dir().join("certs/ca.pem")).arg("--token-file").arg(job.dir().join("user"));
    Running::start(launch).wait().expect(0);
    let told = secured.ask(&["audit"], "admin").expect(0).stdout;
    assert!(told.lines().any(|line| line.contains("user from") && line.contains("submit test")), "{told}");
    // In the clear, and to who does not know the authority, it says nothing.
    let plain = secured.url.replace("https://", "http://");
    let mut command = Command::new(programs::coordinator());
    command.args(["list", "--coordinator", &plain]).env("TUNEFLEET_TOKEN", secured.token("admin"));
    Running::start(command).wait().expect(5);
    let mut command = Command::new(programs::coordinator());
    command.args(["list", "--coordinator", &secured.url]).env("TUNEFLEET_TOKEN", secured.token("admin"));
    Running::start(command).wait().expect(5).says(&["invalid peer certificate", "--ca"]);
}

#[test]
fn a_worker_without_the_right_certificate_is_refused_and_that_is_noted() {
    let job = Job::builder().build();
    let dir = job.dir();
    let secured = Secured::start(dir);

    secured.worker("w0", None).wait().expect(1).says(&["workers must show a certificate"]);
    secured.wait_for_refusal(&["\"session\"", "must show a certificate"]);

    certs(dir, &["worker", "w1"]);
    let refused = secured.worker("w0", Some("worker-w1")).wait().expect(1);
    refused.says(&["worker w0 shows a certificate for w1"]);
    secured.wait_for_refusal(&["\"w0\"", "shows a certificate for w1"]);

    // Another authority of the same name.
    let other = dir.join("other");
    certs(&other, &["init"]);
    certs(&other, &["worker", "w0"]);
    for ending in ["pem", "key"] {
        let stranger = dir.join(format!("certs/stranger.{ending}"));
        fs::copy(other.join(format!("certs/worker-w0.{ending}")), stranger).unwrap();
    }
    let stranger = secured.worker("w0", Some("stranger"));
    secured.wait_for_refusal(&["\"connect\"", "TLS", "invalid peer certificate"]);
    stranger.wait_for_line("no session to");
    drop(stranger);

    write_expired(dir, "w0");
    let late = secured.worker("w0", Some("expired"));
    secured.wait_for_refusal(&["\"connect\"", "TLS", "xpired"]);
    late.wait_for_line("no session to");
    drop(late);
    assert_eq!(secured.workers(), serde_json::json!([]), "none of them was let in");

    // One that is let in, until its certificate is revoked.
    let worker = secured.worker("w1", Some("worker-w1"));
    secured.coordinator.wait_for_line("worker w1");
    let mut revoke = Command::new(programs::coordinator());
    revoke.args(["certs", "revoke"]).arg(dir.join("certs/worker-w1.pem")).arg("--state").arg(secured.state());
    Running::start(revoke).wait().expect(0);
    secured.wait_for_refusal(&["\"session\"", "\"w1\"", "revoked"]);
    worker.wait().expect(1).says(&["the certificate is revoked"]);
}

#[test]
fn a_user_may_do_what_the_role_of_the_token_allows_until_it_is_revoked() {
    let job = Job::builder().build();
    let secured = Secured::start(job.dir());
    secured.ask(&["list"], "viewer").expect(0);
    secured.ask(&["cancel", "test"], "viewer").expect(5).says(&["the role viewer", "needs user"]);
    secured.wait_for_refusal(&["\"viewer\"", "\"cancel\""]);
    secured.ask(&["cancel", "test"], "user").expect(4);
    secured.ask(&["audit"], "user").expect(5).says(&["needs admin"]);
    secured.ask(&["list"], "worker").expect(5).says(&["the role worker"]);
    Running::start(secured.verb(&["list"], "tf_guessed")).wait().expect(5).says(&["no longer, valid"]);
    secured.wait_for_refusal(&["\"nobody\"", "\"list\""]);
    let mut without = secured.verb(&["list"], "");
    without.env_remove("TUNEFLEET_TOKEN");
    Running::start(without).wait().expect(5).says(&["no bearer token"]);

    let listed = tokens(&secured.state(), &["list"]).stdout;
    assert!(listed.lines().any(|line| line.starts_with("viewer ")), "{listed}");
    assert!(!listed.contains(&secured.token("viewer")));
    tokens(&secured.state(), &["revoke", "viewer"]);
    secured.ask(&["list"], "viewer").expect(5).says(&["no longer, valid"]);
}

#[test]
fn a_certificate_that_is_replaced_is_shown_without_a_restart() {
    let job = Job::builder().build();
    let dir = job.dir();
    let secured = Secured::start(dir);
    let other = dir.join("other");
    certs(&other, &["init"]);
    certs(&other, &["server", "127.0.0.1"]);
    let list = || {
        let mut command = Command::new(programs::coordinator());
        command.args(["list", "--coordinator", &secured.url]).arg("--ca").arg(other.join("certs/ca.pem"));
        command.env("TUNEFLEET_TOKEN", secured.token("admin"));
        Running::start(command).wait()
    };
    list().expect(5).says(&["invalid peer certificate", "--ca"]);
    // What is wrong changes nothing.
    fs::write(dir.join("certs/server.pem"), "not a certificate").unwrap();
    secured.coordinator.wait_for_line("the certificate before it stays in use");
    secured.ask(&["list"], "admin").expect(0);
    for name in ["server.key", "server.pem"] {
        fs::copy(other.join("certs").join(name), dir.join("certs").join(name)).unwrap();
    }
    secured.coordinator.wait_for_line("read again");
    list().expect(0);
}

#[test]
fn peers_that_never_finish_their_handshake_hold_nobody_up() {
    let job = Job::builder().build();
    let secured = Secured::start(job.dir());
    let port = secured.url.rsplit(':').next().unwrap().parse::<u16>().unwrap();
    let silent: Vec<TcpStream> =
        (0..200).map(|_| TcpStream::connect((Ipv4Addr::LOCALHOST, port)).unwrap()).collect();
    secured.ask(&["list"], "viewer").expect(0);
    drop(silent);
}

#[test]
fn messages_that_are_too_large_or_are_none_are_refused_and_noted() {
    let job = Job::builder().build();
    let secured = Secured::plain(job.dir());
    let token = secured.token("admin");
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        let channel = secured.channel().await;
        let large = vec![0; rpc::MAX_REQUEST_BYTES + 1];
        let refused = raw::call(&channel, "/tunefleet.v1.Control/Submit", &token, large).await.unwrap_err();
        assert_eq!(refused.code(), tonic::Code::OutOfRange, "{refused}");
        let nonsense = vec![0xff; 64];
        let refused =
            raw::call(&channel, "/tunefleet.v1.Control/Cancel", &token, nonsense).await.unwrap_err();
        assert_eq!(refused.code(), tonic::Code::Internal, "{refused}");
        let unknown =
            raw::call(&channel, "/tunefleet.v1.Control/Format", &token, Vec::new()).await.unwrap_err();
        assert_eq!(unknown.code(), tonic::Code::Unimplemented, "{unknown}");
    });
    secured.wait_for_refusal(&["\"submit\"", "too large"]);
    secured.wait_for_refusal(&["\"cancel\"", "decode"]);
    secured.wait_for_refusal(&["\"format\""]);
}

#[test]
fn a_coordinator_survives_any_message() {
    const PATHS: [&str; 14] = [
        "/tunefleet.v1.Control/Submit",
        "/tunefleet.v1.Control/Watch",
        "/tunefleet.v1.Control/List",
        "/tunefleet.v1.Control/Status",
        "/tunefleet.v1.Control/Cancel",
        "/tunefleet.v1.Control/Suspend",
        "/tunefleet.v1.Control/Resume",
        "/tunefleet.v1.Control/Logs",
        "/tunefleet.v1.Control/ListWorkers",
        "/tunefleet.v1.Control/Drain",
        "/tunefleet.v1.Control/Undrain",
        "/tunefleet.v1.Control/Audit",
        "/tunefleet.v1.Control/Version",
        "/tunefleet.v1.Workers/Session",
    ];
    let job = Job::builder().build();
    let secured = Secured::plain(job.dir());
    let token = secured.token("admin");
    let seed = rand::random::<u64>();
    println!("seed {seed}");
    let mut random = StdRng::seed_from_u64(seed);
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        let channel = secured.channel().await;
        for round in 0..20 {
            for path in PATHS {
                let length = random.random_range(0..200);
                let mut message: Vec<u8> = (0..length).map(|_| random.random()).collect();
                if round % 2 == 0 {
                    // Fields of a plausible number and kind come further than noise.
                    message = [&[(random.random_range(1..12u8) << 3) | 2, length as u8 & 0x7f], &message[..]]
                        .concat();
                }
                // Any answer will do, and the next is answered as well.
                let _ = raw::call(&channel, path, &token, message).await;
            }
        }
    });
    secured.ask(&["list"], "admin").expect(0);
    secured.ask(&["workers"], "admin").expect(0);
}

#[test]
fn a_worker_that_speaks_of_an_old_session_is_cut_off_and_that_is_noted() {
    let job = Job::builder().build();
    let secured = Secured::plain(job.dir());
    let token = rpc::Token::new(&secured.token("admin")).unwrap();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        let mut client = rpc::workers_client(secured.channel().await, Some(token));
        let mut epochs = Vec::new();
        for _ in 0..2 {
            let (say, words) = tokio::sync::mpsc::channel(4);
            let register = Register {
                name: "w0".to_owned(),
                slots: 1,
                protocol: rpc::PROTOCOL,
                journal: "journal".to_owned(),
                incarnation: "one".to_owned(),
                ..Register::default()
            };
            let body = Some(worker_message::Body::Register(register));
            say.send(WorkerMessage { body, ..WorkerMessage::default() }).await.unwrap();
            let words = tokio_stream::wrappers::ReceiverStream::new(words);
            let mut hear = client.session(words).await.unwrap().into_inner();
            let first = hear.message().await.unwrap().unwrap().body.unwrap();
            let coordinator_message::Body::Registered(registered) = first else { panic!("{first:?}") };
            epochs.push(registered.epoch);
            if let [old, _] = epochs[..] {
                let body = Some(worker_message::Body::Heartbeat(Default::default()));
                say.send(WorkerMessage { body, epoch: old, ..WorkerMessage::default() }).await.unwrap();
                while let Ok(Some(_)) = hear.message().await {}
            }
        }
        assert_ne!(epochs[0], epochs[1]);
    });
    secured.wait_for_refusal(&["\"w0\"", "epoch"]);
}

#[test]
fn a_file_of_flags_that_is_wrong_is_refused_with_every_fault() {
    let dir = Job::builder().build();
    let file = dir.dir().join("serve.yaml");
    fs::write(&file, "lisen: 127.0.0.1:0\nsuspect_after: soon\n").unwrap();
    for arguments in [["validate", "--serve"], ["serve", "--config"]] {
        let mut command = Command::new(programs::coordinator());
        command.args(arguments).arg(&file);
        let faults = ["serve.yaml:1:1: unknown key \"lisen\"", "serve.yaml:2:16: suspect_after: \"soon\""];
        Running::start(command).wait().expect(78).says(&faults);
    }
    fs::write(&file, "coordinator: http://10.1.2.3:7070\nrank_memory_gib: 0\n").unwrap();
    let mut command = Command::new(programs::worker());
    command.args(["validate", "--config"]).arg(&file).env_remove("TUNEFLEET_TOKEN");
    Running::start(command).wait().expect(78).says(&["--rank-memory-gib must be above 0"]);
    let mut command = Command::new(programs::worker());
    command.args(["validate", "--config"]).arg(&file).env("TUNEFLEET_TOKEN", "t");
    Running::start(command).wait().expect(78).says(&["--insecure"]);
}
