//! Rank processes: each is started, kept and buried by a keeper, which outlives this daemon.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::process::Stdio;

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use tokio::io::AsyncWriteExt;
use tokio::process::{Child, Command};
use tunefleet_keeper::{CHILD_FILE, EXIT_FILE, Exit, Process};
use tunefleet_proto::rpc::{FailureKind, RankExited, Stage, TOKEN_VARIABLE};

use crate::comm::nccl;

/// How much of the end of a log is read for the failure report.
const TAIL_BYTES: u64 = 16 * 1024;
/// Lines of it that are reported.
const TAIL_LINES: usize = 20;

/// How a rank is started.
pub(super) struct Launch<'a> {
    /// The rank's directory in the journal.
    pub dir: &'a Path,
    /// Where it dials this daemon.
    pub socket: &'a Path,
    pub log_path: &'a Path,
    /// Shown when it dials; it comes on stdin: neither arguments nor environment, which others may read.
    pub token: &'a str,
    pub threads: u32,
    /// Nobody will come after this daemon.
    pub ends_with_daemon: bool,
    pub memory_limit_bytes: Option<u64>,
}

/// Makes MKL add up in one order, whatever else the machine does: now and then its threads share out
/// their work differently, and a run does not repeat bit for bit. On CPUs of other makers MKL would
/// take this for its oldest instructions, and be slow.
fn mkl_settings() -> Option<(&'static str, &'static str)> {
    let cpu = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    cpu.contains("GenuineIntel").then_some(("MKL_CBWR", "AUTO"))
}

/// Starts a keeper, and through it `worker rank`.
pub(super) async fn start(launch: &Launch<'_>) -> Result<Child, String> {
    let program = std::env::current_exe().map_err(|error| format!("finding this program: {error}"))?;
    let keeper = tunefleet_keeper::find().ok_or_else(|| {
        let beside = program.parent().unwrap_or_else(|| Path::new("")).display().to_string();
        format!("no program `keeper` in {beside} or on PATH: install it beside `worker`")
    })?;
    let mut command = Command::new(&keeper);
    // What systemd is told, the daemon tells.
    command.env_remove("NOTIFY_SOCKET").env_remove("WATCHDOG_USEC").env_remove("WATCHDOG_PID");
    command.arg(launch.dir);
    if launch.ends_with_daemon {
        command.arg("--ends-with-parent");
    }
    if let Some(bytes) = launch.memory_limit_bytes {
        command.arg("--memory-bytes").arg(bytes.to_string());
    }
    command.arg("--log").arg(launch.log_path).arg("--").arg(&program);
    command.arg("rank").arg("--socket").arg(launch.socket);
    let mut child = command
        .env_remove(TOKEN_VARIABLE)
        .env("OMP_NUM_THREADS", launch.threads.to_string())
        // GPUs have the numbers that the driver's tools show.
        .env("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
        .envs(nccl::SETTINGS)
        .envs(mkl_settings())
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::inherit())
        // What ends this daemon's group is not meant for it.
        .process_group(0)
        .spawn()
        .map_err(|error| format!("starting {}: {error}", keeper.display()))?;
    if let Some(mut stdin) = child.stdin.take() {
        // One that died at once is noticed by its exit.
        let _ = stdin.write_all(launch.token.as_bytes()).await;
    }
    Ok(child)
}

/// The keeper of the rank in `dir`, whoever started it.
pub(super) fn keeper_of(dir: &Path) -> Option<Process> {
    let wanted = dir.as_os_str().as_encoded_bytes();
    let pids =
        std::fs::read_dir("/proc").ok()?.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    let pids = pids.filter_map(|name| name.parse::<i32>().ok());
    pids.filter(|pid| {
        let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let mut words = line.split(|byte| *byte == 0);
        words.next().is_some_and(|program| program.ends_with(b"keeper")) && words.next() == Some(wanted)
    })
    .find_map(Process::of)
}

/// `<log_dir>/rank-R.log` while training, `<log_dir>/<stage>.log` of another stage, `<log_dir>/<stage>-R.log` of its
/// further ranks.
pub(super) fn log_path(log_dir: &str, stage: Stage, rank: u32) -> PathBuf {
    let name = match (stage, rank) {
        (Stage::Train, rank) => format!("rank-{rank}.log"),
        (stage, 0) => format!("{}.log", stage.name()),
        (stage, rank) => format!("{}-{rank}.log", stage.name()),
    };
    Path::new(log_dir).join(name)
}

/// Kills the process of the rank in `dir` with its group, unless it is gone; its keeper buries it. `false` when there
/// is none yet.
pub(super) fn kill(dir: &Path) -> bool {
    let Some(process) = tunefleet_keeper::read::<Process>(dir, CHILD_FILE) else { return false };
    if process.is_alive() {
        let _ = killpg(Pid::from_raw(process.pid), Signal::SIGKILL);
    }
    true
}

/// What is told of a rank whose keeper has ended.
pub(super) fn exited(dir: &Path, log_path: &Path) -> RankExited {
    let exit = tunefleet_keeper::read::<Exit>(dir, EXIT_FILE).unwrap_or_else(|| {
        kill(dir);
        let start_error = "its keeper was killed, and it was killed with it".to_owned();
        Exit { code: None, signal: None, start_error, out_of_memory: false }
    });
    let was_kept = dir.join(EXIT_FILE).exists();
    let kind = match &exit {
        _ if !was_kept => FailureKind::Exit,
        Exit { out_of_memory: true, signal: Some(_), .. } => FailureKind::HostOutOfMemory,
        Exit { start_error, .. } if !start_error.is_empty() => FailureKind::Start,
        Exit { signal: Some(_), .. } => FailureKind::Signal,
        _ => FailureKind::Unspecified,
    };
    RankExited {
        exit_code: exit.code,
        signal: exit.signal,
        start_error: exit.start_error,
        last_lines: tail(log_path).unwrap_or_default(),
        log_path: log_path.display().to_string(),
        kind: kind.into(),
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

    #[test]
    fn exits_signals_and_a_lack_of_memory_are_told_apart() {
        let dir = tempfile::tempdir().unwrap();
        let log = Path::new("/nonexistent");
        let of = |code, signal, out_of_memory| {
            let exit = Exit { code, signal, start_error: String::new(), out_of_memory };
            tunefleet_keeper::write(dir.path(), EXIT_FILE, &exit).unwrap();
            let told = exited(dir.path(), log);
            (told.exit_code, told.signal, told.kind())
        };
        assert_eq!(of(Some(7), None, false), (Some(7), None, FailureKind::Unspecified));
        assert_eq!(of(None, Some(11), false), (None, Some(11), FailureKind::Signal));
        assert_eq!(of(None, Some(9), true), (None, Some(9), FailureKind::HostOutOfMemory));
        std::fs::remove_file(dir.path().join(EXIT_FILE)).unwrap();
        assert!(exited(dir.path(), log).start_error.contains("keeper was killed"));
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
    fn a_number_that_belongs_to_another_process_now_is_not_killed() {
        let dir = tempfile::tempdir().unwrap();
        assert!(!kill(dir.path()), "there is none yet");
        let this = Process::of(std::process::id() as i32).unwrap();
        let former = Process { started: this.started - 1, ..this };
        tunefleet_keeper::write(dir.path(), CHILD_FILE, &former).unwrap();
        assert!(kill(dir.path()));
    }
}
