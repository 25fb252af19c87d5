//! Rank processes: start, log, exit, kill. Each is the leader of its own process group, so that
//! a signal meant for it reaches all that it started and nothing else.

use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, SeekFrom};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use tokio::io::AsyncWriteExt;
use tokio::process::{Child, Command};
use tunefleet_proto::rpc::{Assignment, RankExited, Stage, TOKEN_VARIABLE};

use crate::comm::nccl;

/// How much of the end of a log is read for the failure report.
const TAIL_BYTES: u64 = 16 * 1024;
/// Lines of it that are reported.
const TAIL_LINES: usize = 20;

/// Makes MKL add up in one order, whatever else the machine does: now and then its threads share out
/// their work differently, and a run does not repeat bit for bit. On CPUs of other makers MKL would
/// take this for its oldest instructions, and be slow.
fn mkl_settings() -> Option<(&'static str, &'static str)> {
    let cpu = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    cpu.contains("GenuineIntel").then_some(("MKL_CBWR", "AUTO"))
}

/// Starts `worker rank` for the assignment and hands it its token, through stdin: neither
/// arguments nor environment, which other processes may read.
pub(super) async fn start(
    assignment: &Assignment,
    socket: &Path,
    token: &str,
    log_path: &Path,
) -> Result<Child, String> {
    let log = open_log(log_path).map_err(|error| format!("log file {}: {error}", log_path.display()))?;
    let program = std::env::current_exe().map_err(|error| format!("finding this program: {error}"))?;
    let spawn = || -> std::io::Result<Child> {
        Command::new(&program)
            .arg("rank")
            .arg("--socket")
            .arg(socket)
            .env_remove(TOKEN_VARIABLE)
            .env("OMP_NUM_THREADS", assignment.threads.to_string())
            .envs(nccl::SETTINGS)
            .envs(mkl_settings())
            .stdin(Stdio::piped())
            .stdout(log.try_clone()?)
            .stderr(log)
            .process_group(0)
            .kill_on_drop(true)
            .spawn()
    };
    let mut child = spawn().map_err(|error| format!("starting {}: {error}", program.display()))?;
    if let Some(mut stdin) = child.stdin.take() {
        // A child that died at once is noticed by its exit.
        let _ = stdin.write_all(token.as_bytes()).await;
    }
    Ok(child)
}

fn open_log(path: &Path) -> std::io::Result<File> {
    if let Some(dir) = path.parent() {
        std::fs::create_dir_all(dir)?;
    }
    OpenOptions::new().create(true).append(true).open(path)
}

/// `<log_dir>/rank-R.log` while training, `<log_dir>/<stage>.log` for the tasks of one rank.
pub(super) fn log_path(log_dir: &str, stage: Stage, rank: u32) -> PathBuf {
    let name =
        if stage == Stage::Train { format!("rank-{rank}.log") } else { format!("{}.log", stage.name()) };
    Path::new(log_dir).join(name)
}

/// Signals the process group of `pid`; one that is gone is no error.
pub(super) fn signal_group(pid: u32, signal: Signal) {
    if let Ok(raw) = i32::try_from(pid) {
        let _ = killpg(Pid::from_raw(raw), signal);
    }
}

/// What is told of a process that has ended.
pub(super) fn exited(status: ExitStatus, log_path: &Path) -> RankExited {
    RankExited {
        exit_code: status.code(),
        signal: status.signal(),
        last_lines: tail(log_path).unwrap_or_default(),
        log_path: log_path.display().to_string(),
        ..RankExited::default()
    }
}

fn tail(path: &Path) -> std::io::Result<Vec<String>> {
    let mut file = File::open(path)?;
    let bytes = file.metadata()?.len();
    file.seek(SeekFrom::Start(bytes.saturating_sub(TAIL_BYTES)))?;
    let mut end = Vec::new();
    file.take(TAIL_BYTES).read_to_end(&mut end)?;
    let text = String::from_utf8_lossy(&end);
    let lines: Vec<&str> = text.lines().collect();
    Ok(lines.iter().skip(lines.len().saturating_sub(TAIL_LINES)).map(|line| (*line).to_owned()).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn run(script: &str) -> ExitStatus {
        Command::new("sh").arg("-c").arg(script).status().await.unwrap()
    }

    #[tokio::test]
    async fn exits_and_signals_are_told_apart() {
        let none = Path::new("/nonexistent");
        let exit = exited(run("exit 7").await, none);
        assert_eq!((exit.exit_code, exit.signal), (Some(7), None));
        let exit = exited(run("kill -9 $$").await, none);
        assert_eq!((exit.exit_code, exit.signal), (None, Some(9)));
    }

    #[test]
    fn the_last_lines_of_a_long_log_are_reported() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("rank-0.log");
        let lines: Vec<String> = (0..5000).map(|n| format!("line {n}")).collect();
        std::fs::write(&path, lines.join("\n")).unwrap();
        let tail = tail(&path).unwrap();
        assert_eq!(tail, lines[4980..]);
    }

    #[test]
    fn a_signal_to_a_group_that_is_gone_does_nothing() {
        signal_group(u32::MAX, Signal::SIGTERM);
        signal_group(i32::MAX as u32, Signal::SIGTERM);
    }
}
