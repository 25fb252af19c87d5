//! The program as the daemon starts it.
#![allow(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

use std::io::Write;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tunefleet_keeper::{CHILD_FILE, EXIT_FILE, Exit, Process, read};

fn keep(dir: &Path, more: &[&str], script: &str) -> Child {
    let mut keeper = Command::new(env!("CARGO_BIN_EXE_keeper"))
        .arg(dir)
        .args(more)
        .arg("--log")
        .arg(dir.join("log"))
        .args(["--", "sh", "-c", script])
        .stdin(Stdio::piped())
        .spawn()
        .unwrap();
    keeper.stdin.take().unwrap().write_all(b"token\n").unwrap();
    keeper
}

fn kept(dir: &Path, script: &str) -> Exit {
    assert!(keep(dir, &[], script).wait().unwrap().success());
    read(dir, EXIT_FILE).unwrap()
}

fn wait_until(what: &str, condition: impl Fn() -> bool) {
    let began = Instant::now();
    while !condition() {
        assert!(began.elapsed() < Duration::from_secs(30), "waiting for {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn how_the_program_ended_is_noted_and_its_words_are_in_the_log() {
    let dir = tempfile::tempdir().unwrap();
    let exit = kept(dir.path(), "read word; echo out $word; echo err >&2; exit 7");
    assert_eq!((exit.code, exit.signal), (Some(7), None));
    assert_eq!(std::fs::read_to_string(dir.path().join("log")).unwrap(), "out token\nerr\n");
    let exit = kept(dir.path(), "kill -SEGV $$");
    assert_eq!((exit.code, exit.signal), (None, Some(11)));
}

#[test]
fn nothing_that_the_program_started_survives_it() {
    let dir = tempfile::tempdir().unwrap();
    let pids = dir.path().join("pids");
    // One in its process group, one that has left it and lost its parent.
    let script = format!(
        "sleep 1000 & echo $! >> {pids}; setsid sh -c 'sleep 1000 & echo $! >> {pids}' ; exit 0",
        pids = pids.display()
    );
    assert_eq!(kept(dir.path(), &script).code, Some(0));
    let text = std::fs::read_to_string(&pids).unwrap();
    assert_eq!(text.lines().count(), 2, "{text}");
    for pid in text.lines() {
        assert_eq!(Process::of(pid.parse().unwrap()), None, "{pid} lives");
    }
}

#[test]
fn a_keeper_is_not_ended_by_what_ends_daemons() {
    let dir = tempfile::tempdir().unwrap();
    let mut keeper = keep(dir.path(), &[], "sleep 0.5; exit 3");
    wait_until("the program", || dir.path().join(CHILD_FILE).exists());
    for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP] {
        kill(Pid::from_raw(keeper.id() as i32), signal).unwrap();
    }
    assert!(keeper.wait().unwrap().success());
    assert_eq!(read::<Exit>(dir.path(), EXIT_FILE).unwrap().code, Some(3));
}

#[test]
fn a_program_that_is_not_there_is_an_exit_that_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let status = Command::new(env!("CARGO_BIN_EXE_keeper"))
        .arg(dir.path())
        .arg("--log")
        .arg(dir.path().join("log"))
        .args(["--", "/no/such/program"])
        .stdin(Stdio::null())
        .status()
        .unwrap();
    assert!(status.success());
    let exit: Exit = read(dir.path(), EXIT_FILE).unwrap();
    assert!(exit.start_error.contains("/no/such/program"), "{exit:?}");
}

#[test]
fn a_program_over_its_memory_limit_is_known_to_have_been_out_of_memory() {
    let dir = tempfile::tempdir().unwrap();
    let script = "x=$(head -c 300000000 /dev/zero | tr '\\0' x); echo ${#x}";
    let mut keeper = keep(dir.path(), &["--memory-bytes", "67108864"], script);
    keeper.wait().unwrap();
    let exit: Exit = read(dir.path(), EXIT_FILE).unwrap();
    if exit.start_error.contains("no control group") {
        println!("skipped: {}", exit.start_error);
        return;
    }
    assert!(exit.out_of_memory, "{exit:?}");
}
