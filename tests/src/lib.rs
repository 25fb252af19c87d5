//! Harness of the end-to-end tests: the two programs as users start them, on repositories, ports
//! and directories of their own.
#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a harness fails and speaks as tests do")]

/// `coordinator collect` in a place of its own.
pub mod collecting;
/// A control plane of its own processes.
pub mod cluster;
/// Hosts of a test on one machine.
pub mod hosts;
/// A job file, its repositories and what the job makes of them.
pub mod job;
/// What a job logged: `<output>/metrics.jsonl`.
pub mod metrics;
/// A started program: its output, its processes, its end.
pub mod process;
/// Where the programs under test are.
pub mod programs;
/// Calls with any bytes.
pub mod raw;
/// A small Hugging Face hub.
pub mod hub_server;
/// Small models of any family.
pub mod model_files;
/// Small git repositories.
pub mod repository;

/// Says why a test cannot run here and lets it pass; fails it with `CI=true`, where it must run.
pub fn skip(reason: &str) {
    assert!(std::env::var("CI").as_deref() != Ok("true"), "must run in CI: {reason}");
    println!("skipped: {reason}");
}
