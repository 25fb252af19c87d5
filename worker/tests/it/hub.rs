//! `worker export --push` against a hub that huggingface_hub's own client agrees with.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::{Command, Output};

use sha2::{Digest, Sha256};
use tempfile::TempDir;
use tunefleet_tests::hub_server::{Content, Fault, FaultKind, HubServer, TOKEN};

use crate::common::{checkpoint_of, fixtures, python, root};

const PART_BYTES: u64 = 100_000;
const REPO: &str = "team/model";

/// What an export leaves, with a file of several parts, one of a single part, and text.
fn directory() -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    let bytes = |len: u32, seed: u32| -> Vec<u8> {
        (0..len).map(|i| (i.wrapping_add(seed).wrapping_mul(2_654_435_761) >> 24) as u8).collect()
    };
    for (name, content) in [
        ("config.json", b"{\"model_type\": \"gpt_bigcode\"}".to_vec()),
        ("empty.safetensors", Vec::new()),
        ("model-00001-of-00002.safetensors", bytes(350_001, 1)),
        ("model-00002-of-00002.safetensors", bytes(60_000, 2)),
        ("tokenizer.json", b"{}".repeat(8_000)),
    ] {
        std::fs::write(dir.path().join(name), content).unwrap();
    }
    dir
}

fn files_of(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    let entries = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
    entries
        .map(|p| (p.file_name().unwrap().to_str().unwrap().to_owned(), std::fs::read(&p).unwrap()))
        .collect()
}

/// A program that knows the hub of the test and no other.
fn at_hub(program: impl AsRef<std::ffi::OsStr>, server: &HubServer, token: &str) -> Command {
    let mut command = Command::new(program);
    for name in ["HF_HOME", "HF_TOKEN_PATH", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE", "RUST_LOG"] {
        command.env_remove(name);
    }
    command.env("HF_ENDPOINT", &server.url).env("HF_TOKEN", token).env("NO_PROXY", "127.0.0.1");
    command
}

fn push_as(server: &HubServer, dir: &Path, token: &str, more: &[&str]) -> Output {
    let mut command = at_hub(env!("CARGO_BIN_EXE_worker"), server, token);
    command.args(["export", "--out"]).arg(dir).args(["--push", REPO]).args(more);
    let output = command.output().unwrap();
    for text in [&output.stdout, &output.stderr] {
        let text = String::from_utf8_lossy(text);
        assert!(!text.contains(token) && !text.contains("signature"), "a secret was printed: {text}");
    }
    output
}

/// Pushes, and must be told so.
fn push(server: &HubServer, dir: &Path, more: &[&str]) -> String {
    let output = push_as(server, dir, TOKEN, more);
    let (stdout, stderr) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{stdout}{stderr}");
    stdout.into_owned()
}

/// Pushes in vain; what stderr says.
fn refusal(server: &HubServer, dir: &Path, token: &str) -> String {
    let output = push_as(server, dir, token, &[]);
    assert_eq!(output.status.code(), Some(1));
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn fault(server: &HubServer, on: &str, times: u32, kind: FaultKind) {
    server.hub().faults.push(Fault { on: on.to_owned(), times, kind });
}

#[test]
fn the_hubs_own_client_and_ours_leave_the_same_repository_by_the_same_requests() {
    let Some(python) = python() else { return };
    let dir = directory();
    let [ours, theirs] = [(); 2].map(|()| HubServer::start(PART_BYTES));
    push(&ours, dir.path(), &["--private"]);
    let output = at_hub(python, &theirs, TOKEN)
        .current_dir(root())
        .arg("tests/parity/push_reference.py")
        .arg(dir.path())
        .arg(REPO)
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));

    let (ours, theirs) = (ours.hub(), theirs.hub());
    let [our, their] = [&ours, &theirs].map(|hub| &hub.repositories[REPO]);
    assert!(our.private && their.private);
    assert_eq!(our.branches["main"].files, their.branches["main"].files);
    assert_eq!(ours.files(REPO, "main"), files_of(dir.path()));
    assert_eq!(theirs.files(REPO, "main"), files_of(dir.path()));
    assert!(matches!(our.branches["main"].files["tokenizer.json"], Content::Stored(_)));
    assert!(matches!(our.branches["main"].files["empty.safetensors"], Content::Committed(_)));
    assert_eq!(ours.count("PUT /store/"), 4 + 1 + 1);
    let kinds = ours.kinds_of_requests();
    assert_eq!(kinds, theirs.kinds_of_requests());
    assert!(kinds.contains("POST /store/complete/OID") && kinds.len() == 8, "{kinds:?}");
    assert!(!ours.token_leaked);
}

#[test]
fn a_second_push_sends_nothing_and_makes_no_commit() {
    let (server, dir) = (HubServer::start(PART_BYTES), directory());
    assert!(push(&server, dir.path(), &[]).contains("/team/model: commit 0"));
    let sent_bytes = server.hub().stored_bytes;
    assert!(push(&server, dir.path(), &[]).contains("has these files already"));
    assert_eq!(server.hub().stored_bytes, sent_bytes);
    assert_eq!(server.hub().repositories[REPO].branches["main"].commits, 1);

    std::fs::write(dir.path().join("config.json"), "{}").unwrap();
    push(&server, dir.path(), &[]);
    assert_eq!(server.hub().stored_bytes, sent_bytes);
    assert_eq!(server.hub().repositories[REPO].branches["main"].commits, 2);
    assert_eq!(server.hub().files(REPO, "main"), files_of(dir.path()));
}

#[test]
fn an_object_that_the_store_has_is_not_sent() {
    let (server, dir) = (HubServer::start(PART_BYTES), directory());
    let large = std::fs::read(dir.path().join("model-00001-of-00002.safetensors")).unwrap();
    let large_bytes = large.len() as u64;
    server.hub().objects.insert(tunefleet_proto::hex(&Sha256::digest(&large)), large);
    push(&server, dir.path(), &[]);
    let all_bytes: usize = files_of(dir.path()).values().filter(|f| f.len() > 10_000).map(Vec::len).sum();
    assert_eq!(server.hub().stored_bytes, all_bytes as u64 - large_bytes);
    assert_eq!(server.hub().files(REPO, "main"), files_of(dir.path()));
}

#[test]
fn a_branch_is_made_where_it_is_absent() {
    let (server, dir) = (HubServer::start(PART_BYTES), directory());
    push(&server, dir.path(), &["--revision", "try/1"]);
    assert_eq!(server.hub().files(REPO, "try/1"), files_of(dir.path()));
    assert!(server.hub().files(REPO, "main").is_empty());
    assert!(!server.hub().repositories[REPO].private);
    push(&server, dir.path(), &["--revision", "try/1"]);
    assert_eq!(server.hub().count("POST /api/models/team/model/branch/"), 1);
}

#[test]
fn what_passes_is_waited_for_and_broken_transfers_begin_anew() {
    use FaultKind::{Answer, AnswerAfter, CutAfter};
    let (server, dir) = (HubServer::start(PART_BYTES), directory());
    let busy = |status| Answer(status, vec![("retry-after", "0")], "busy");
    fault(&server, "POST /api/repos/create", 1, CutAfter(0));
    fault(&server, "POST /api/models/team/model/preupload/", 2, busy(429));
    fault(&server, "POST /team/model.git/info/lfs/objects/batch", 1, busy(503));
    let large = std::fs::read(dir.path().join("model-00001-of-00002.safetensors")).unwrap();
    let parts = format!("PUT /store/{}/", tunefleet_proto::hex(&Sha256::digest(large)));
    fault(&server, &format!("{parts}2"), 1, AnswerAfter(30_000, 500));
    fault(&server, &format!("{parts}3"), 1, CutAfter(30_000));
    fault(&server, "PUT /store/", 1, busy(503));
    fault(&server, "POST /store/complete/", 1, CutAfter(0));
    fault(&server, "POST /team/model.git/info/lfs/objects/verify", 1, busy(502));
    fault(&server, "POST /api/models/team/model/commit/", 1, busy(429));
    push(&server, dir.path(), &[]);
    let hub = server.hub();
    assert!(hub.faults.iter().all(|fault| fault.times == 0), "{:?}", hub.faults);
    assert_eq!(hub.files(REPO, "main"), files_of(dir.path()));
    assert_eq!(hub.repositories[REPO].branches["main"].commits, 1);
    assert_eq!(hub.count("PUT /store/"), 6 + 3);
}

#[test]
fn a_commit_whose_answer_is_lost_is_not_made_twice() {
    let (server, dir) = (HubServer::start(PART_BYTES), directory());
    fault(&server, "POST /api/models/team/model/commit/", 1, FaultKind::CutBeforeAnswer);
    push(&server, dir.path(), &[]);
    assert_eq!(server.hub().repositories[REPO].branches["main"].commits, 1);
    assert_eq!(server.hub().count("POST /api/models/team/model/commit/"), 1);

    // One that fails before it is made is tried again.
    std::fs::write(dir.path().join("config.json"), "{}").unwrap();
    fault(&server, "POST /api/models/team/model/commit/", 1, FaultKind::CutAfter(0));
    push(&server, dir.path(), &[]);
    assert_eq!(server.hub().files(REPO, "main"), files_of(dir.path()));
}

#[test]
fn a_push_that_was_given_up_is_gone_on_with_by_pushing_again() {
    let (server, dir) = (HubServer::start(PART_BYTES), directory());
    let full = || FaultKind::Answer(507, Vec::new(), "no room");
    fault(&server, "POST /api/models/team/model/commit/", 1, full());
    let message = refusal(&server, dir.path(), TOKEN);
    assert!(message.contains("committing to team/model at") && message.contains("507: no room"), "{message}");
    let sent_bytes = server.hub().stored_bytes;
    assert!(sent_bytes > 400_000);
    push(&server, dir.path(), &[]);
    assert_eq!(server.hub().stored_bytes, sent_bytes);
    assert_eq!(server.hub().files(REPO, "main"), files_of(dir.path()));
}

#[test]
fn a_hub_that_stays_away_is_given_up_with_its_words() {
    let (server, dir) = (HubServer::start(PART_BYTES), directory());
    let away = FaultKind::Answer(503, vec![("retry-after", "0"), ("x-error-message", "down for repair")], "");
    fault(&server, "PUT /store/", u32::MAX, away);
    let message = refusal(&server, dir.path(), TOKEN);
    let last = message.lines().last().unwrap();
    assert!(last.contains("error: sending ") && last.contains("answered 503: down for repair"), "{message}");
    assert!(!server.hub().repositories[REPO].branches["main"].files.contains_key("config.json"));
}

#[test]
fn refusals_say_what_to_do() {
    let (server, dir) = (HubServer::start(PART_BYTES), directory());
    let message = refusal(&server, dir.path(), "hf_of_a_stranger");
    assert!(message.contains("401: Invalid username or password."), "{message}");
    assert!(message.contains("--token-file or HF_TOKEN"), "{message}");

    let forbidden = FaultKind::Answer(403, Vec::new(), r#"{"error": "You don't have the rights"}"#);
    fault(&server, "POST /api/repos/create", 1, forbidden.clone());
    let message = refusal(&server, dir.path(), TOKEN);
    assert!(message.contains("making team/model at"), "{message}");
    assert!(message.contains("403: You don't have the rights; the token may not do that there"), "{message}");

    // A token that may write to what is there, but make nothing.
    push(&server, dir.path(), &[]);
    fault(&server, "POST /api/repos/create", 1, forbidden);
    push(&server, dir.path(), &[]);

    fault(&server, "POST /api/models/team/model/preupload/", 1, FaultKind::Answer(404, Vec::new(), ""));
    let message = refusal(&server, dir.path(), TOKEN);
    assert!(message.contains("404; the address, the repository or the branch"), "{message}");

    fault(&server, "POST /api/models/team/model/preupload/", 1, FaultKind::Answer(200, Vec::new(), "<html>"));
    let message = refusal(&server, dir.path(), TOKEN);
    assert!(message.contains("is this the address of a Hugging Face hub?"), "{message}");
}

#[test]
fn an_export_is_written_and_pushed_with_the_token_of_a_file() {
    let Some(fixtures) = fixtures() else { return };
    let (server, dir) = (HubServer::start(PART_BYTES), tempfile::tempdir().unwrap());
    let model = fixtures.join("exact-gelu");
    let [checkpoints, out, token] = ["checkpoints", "export", "token"].map(|name| dir.path().join(name));
    checkpoint_of(&model, &checkpoints);
    std::fs::write(&token, format!("{TOKEN}\n")).unwrap();
    let export = |push: &[&str]| {
        let mut command = at_hub(env!("CARGO_BIN_EXE_worker"), &server, "");
        command.arg("export").arg("--checkpoint").arg(&checkpoints).arg("--model").arg(&model);
        command.arg("--out").arg(&out).args(push).env("HOME", dir.path()).env_remove("XDG_CACHE_HOME");
        command.output().unwrap()
    };
    // What cannot be pushed is said before anything is written.
    let output = export(&["--push", REPO]);
    assert!(String::from_utf8_lossy(&output.stderr).contains("no token to push with"));
    assert!(!out.exists());
    let output = export(&["--private"]);
    assert_eq!(output.status.code(), Some(2), "--private is for --push");

    let output = export(&["--push", REPO, "--token-file", token.to_str().unwrap()]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let stdout = String::from_utf8_lossy(&output.stdout);
    assert!(stdout.contains("weights after 1 steps") && stdout.contains("team/model: commit "), "{stdout}");
    assert_eq!(server.hub().files(REPO, "main"), files_of(&out));
    assert!(files_of(&out).contains_key("model.safetensors"));
}
