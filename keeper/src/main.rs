//! `keeper DIR [--ends-with-parent] [--memory-bytes N] --log FILE -- PROGRAM ARGUMENTS...`: see the library.
#![forbid(unsafe_code)]

use std::ffi::OsString;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};

use nix::errno::Errno;
use nix::sys::prctl;
use nix::sys::signal::{SigSet, Signal, kill, killpg};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{Pid, getppid};
use tunefleet_keeper::cgroup::Cgroup;
use tunefleet_keeper::{CHILD_FILE, EXIT_FILE, Exit, Process, write};

/// Longest that is passed on from stdin.
const MAX_STDIN_BYTES: u64 = 64 * 1024;
/// So often what is left is looked for, before it counts as unkillable.
const MAX_ROUNDS: u32 = 100;

struct Arguments {
    dir: PathBuf,
    ends_with_parent: bool,
    memory_limit_bytes: Option<u64>,
    log: PathBuf,
    command: Vec<OsString>,
}

fn main() -> ExitCode {
    let arguments = match parse(std::env::args_os().skip(1)) {
        Ok(arguments) => arguments,
        Err(error) => {
            eprintln!("error: {error}; keeper is started by worker daemon");
            return ExitCode::from(2);
        }
    };
    let exit = keep(&arguments).unwrap_or_else(|error| Exit {
        code: None,
        signal: None,
        start_error: error.to_string(),
        out_of_memory: false,
    });
    match write(&arguments.dir, EXIT_FILE, &exit) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {}: {error}", arguments.dir.join(EXIT_FILE).display());
            ExitCode::FAILURE
        }
    }
}

fn parse(mut words: impl Iterator<Item = OsString>) -> Result<Arguments, String> {
    let dir = PathBuf::from(words.next().ok_or("no directory")?);
    let (mut ends_with_parent, mut memory_limit_bytes, mut log) = (false, None, None);
    loop {
        let word = words.next().ok_or("no program")?;
        match word.to_str() {
            Some("--ends-with-parent") => ends_with_parent = true,
            Some("--memory-bytes") => {
                let bytes = words.next().ok_or("--memory-bytes without a number")?;
                let bytes = bytes.to_str().and_then(|text| text.parse().ok());
                memory_limit_bytes = Some(bytes.ok_or("--memory-bytes must be a number")?);
            }
            Some("--log") => log = words.next(),
            Some("--") => break,
            _ => return Err(format!("unknown argument {word:?}")),
        }
    }
    let log = PathBuf::from(log.ok_or("no --log")?);
    let command: Vec<OsString> = words.collect();
    if command.is_empty() {
        return Err("no program".to_owned());
    }
    Ok(Arguments { dir, ends_with_parent, memory_limit_bytes, log, command })
}

/// Runs the program to its end, and ends what it leaves.
fn keep(arguments: &Arguments) -> io::Result<Exit> {
    // Orphans of the program become children of this process: they can be found, and cannot get away.
    prctl::set_child_subreaper(true)?;
    if arguments.ends_with_parent {
        prctl::set_pdeathsig(Signal::SIGKILL)?;
        if getppid() == Pid::from_raw(1) {
            return Err(io::Error::other("the daemon is gone"));
        }
    }
    let name = format!("tunefleet-keeper-{}", std::process::id());
    let cgroup = Cgroup::make(&name, arguments.memory_limit_bytes);
    if cgroup.is_none() && arguments.memory_limit_bytes.is_some() {
        return Err(io::Error::other(
            "no control group could be made for the memory limit: see docs/operations.md",
        ));
    }
    let mut child = start(arguments)?;
    // The program's own mask is that of before.
    SigSet::all().thread_block()?;
    let pid = Pid::from_raw(child.id() as i32);
    if let Some(cgroup) = &cgroup {
        cgroup.admit(pid.as_raw());
    }
    if let Some(process) = Process::of(pid.as_raw()) {
        write(&arguments.dir, CHILD_FILE, &process)?;
    }
    // The token goes on only now that the process is where it belongs.
    let mut token = Vec::new();
    io::stdin().take(MAX_STDIN_BYTES).read_to_end(&mut token)?;
    if let Some(mut stdin) = child.stdin.take() {
        // One that died at once is noticed by its exit.
        let _ = stdin.write_all(&token);
    }
    let (code, signal) = wait_for(pid)?;
    let _ = killpg(pid, Signal::SIGKILL);
    if let Some(cgroup) = &cgroup {
        cgroup.kill();
    }
    end_descendants();
    let out_of_memory = cgroup.as_ref().is_some_and(Cgroup::was_out_of_memory);
    Ok(Exit { code, signal, start_error: String::new(), out_of_memory })
}

fn start(arguments: &Arguments) -> io::Result<std::process::Child> {
    let log = open_log(&arguments.log)?;
    let (program, rest) = arguments.command.split_first().ok_or(io::ErrorKind::InvalidInput)?;
    let started = Command::new(program)
        .args(rest)
        .stdin(Stdio::piped())
        .stdout(log.try_clone()?)
        .stderr(log)
        .process_group(0)
        .spawn();
    started.map_err(|error| io::Error::other(format!("starting {}: {error}", Path::new(program).display())))
}

fn open_log(path: &Path) -> io::Result<File> {
    let open = || {
        if let Some(dir) = path.parent() {
            std::fs::create_dir_all(dir)?;
        }
        OpenOptions::new().create(true).append(true).open(path)
    };
    open().map_err(|error| io::Error::other(format!("log file {}: {error}", path.display())))
}

/// Waits for the process, and reaps what it has orphaned meanwhile.
fn wait_for(pid: Pid) -> io::Result<(Option<i32>, Option<i32>)> {
    loop {
        match waitpid(None, None) {
            Ok(WaitStatus::Exited(ended, code)) if ended == pid => return Ok((Some(code), None)),
            Ok(WaitStatus::Signaled(ended, signal, _)) if ended == pid => {
                return Ok((None, Some(signal as i32)));
            }
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// Kills children of this process until there are none: each round may orphan others.
fn end_descendants() {
    for _ in 0..MAX_ROUNDS {
        for pid in children() {
            let _ = kill(pid, Signal::SIGKILL);
        }
        loop {
            match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
                Ok(WaitStatus::StillAlive) => break,
                Ok(_) | Err(Errno::EINTR) => {}
                // None are left.
                Err(_) => return,
            }
        }
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
}

fn children() -> Vec<Pid> {
    let this = std::process::id().to_string();
    let Ok(entries) = std::fs::read_dir("/proc") else { return Vec::new() };
    let is_child = |pid: &str| {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        let parent = stat.rsplit_once(')').and_then(|(_, fields)| fields.split_ascii_whitespace().nth(1));
        parent == Some(this.as_str())
    };
    let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    let pids = names.filter(|name| name.bytes().all(|byte| byte.is_ascii_digit()) && is_child(name));
    pids.filter_map(|pid| pid.parse().ok()).map(Pid::from_raw).collect()
}
