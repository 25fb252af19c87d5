//! The parent of a sandbox's first process: it makes the namespaces, starts it, and ends it and all that it started when
//! its time is up, when it writes or takes too much, or when it is done.

use std::collections::VecDeque;
use std::fs;
use std::io::{self, Read, Write as _};
use std::os::fd::AsFd;
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::process::{Child, ChildStderr, ChildStdin, ChildStdout, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CloneFlags, unshare};
use nix::sys::prctl;
use nix::sys::signal::{Signal, killpg};
use nix::unistd::{Gid, Pid, Uid, setgroups, setresgid, setresuid};

use crate::enter::Orders;
use crate::{Ended, Isolation, Limits, Outcome, Request, wall};

/// Exit code of a first process that did not become the program.
pub const REFUSED_CODE: u8 = 125;
/// What such a one writes to stderr first. A program that fakes it is reported as one that could not be run.
pub const REFUSAL_MARK: &str = "sandbox-refused: ";
/// How often memory is looked at, and an end without closed pipes is looked for.
const LOOK_INTERVAL: Duration = Duration::from_millis(20);
/// The user and group that root becomes.
const NOBODY: u32 = 65534;
const READ_BYTES: usize = 8192;
/// What a program may have is a fraction of this in practice.
const MAX_FAMILY: usize = 1024;

/// Runs the program of a request, from its namespaces to its end.
///
/// # Errors
/// What keeps it from being run as was asked for.
pub fn run(request: Request) -> Result<Outcome, String> {
    // Whoever asks is gone: nobody wants the outcome.
    prctl::set_pdeathsig(Signal::SIGKILL).map_err(|error| format!("ending with the caller: {error}"))?;
    let Request { program, limits, isolation } = request;
    if isolation == Isolation::Full {
        separate()?;
    }
    let orders = Orders { argv: program.argv, readable: program.readable, limits: limits.clone(), isolation };
    let orders = serde_json::to_string(&orders).map_err(|error| error.to_string())?;
    let mut first = Command::new("/proc/self/exe")
        .arg("enter")
        .arg(orders)
        .env_clear()
        .process_group(0)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|error| format!("starting the first process: {error}"))?;
    let started = Instant::now();
    let pipes = Pipes::of(&mut first, program.stdin).map_err(|error| format!("its pipes: {error}"))?;
    let mut watch = Watch { first, pipes, limits, started, output: [Vec::new(), Vec::new()] };
    let ended = watch.until_end();
    let [stdout, stderr] = watch.output.map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
    if let (Ended::Exited(code), Some(cause)) = (&ended, stderr.strip_prefix(REFUSAL_MARK))
        && *code == i32::from(REFUSED_CODE)
    {
        return Err(cause.trim_end().to_owned());
    }
    Ok(Outcome { ended, stdout, stderr, wall_seconds: started.elapsed().as_secs_f64() })
}

/// Namespaces of its own for what this process starts. Root becomes nobody first: limits do not bind root, and a program
/// that found a way out would be nobody.
fn separate() -> Result<(), String> {
    let step = |what: &'static str| move |error: nix::Error| format!("{what}: {error}");
    if Uid::effective().is_root() && is_root_of_machine() {
        let (user, group) = (Uid::from_raw(NOBODY), Gid::from_raw(NOBODY));
        setgroups(&[]).map_err(step("giving up groups"))?;
        setresgid(group, group, group).map_err(step("becoming nobody's group"))?;
        setresuid(user, user, user).map_err(step("becoming nobody"))?;
        // Or this process could not read what it is told about itself.
        prctl::set_dumpable(true).map_err(step("becoming nobody"))?;
        prctl::set_pdeathsig(Signal::SIGKILL).map_err(step("ending with the caller"))?;
    }
    let (user, group) = (Uid::effective(), Gid::effective());
    unshare(
        CloneFlags::CLONE_NEWUSER
            | CloneFlags::CLONE_NEWPID
            | CloneFlags::CLONE_NEWNET
            | CloneFlags::CLONE_NEWIPC
            | CloneFlags::CLONE_NEWUTS
            | CloneFlags::CLONE_NEWCGROUP,
    )
    .map_err(|error| {
        format!(
            "namespaces: {error}; allow users to make them (sysctl kernel.unprivileged_userns_clone=1, \
             user.max_user_namespaces above 0, kernel.apparmor_restrict_unprivileged_userns=0; in a container, a seccomp \
             profile that allows unshare)"
        )
    })?;
    for (file, text) in [
        ("setgroups", "deny".to_owned()),
        ("uid_map", format!("0 {user} 1")),
        ("gid_map", format!("0 {group} 1")),
    ] {
        fs::write(format!("/proc/self/{file}"), text)
            .map_err(|error| format!("/proc/self/{file}: {error}"))?;
    }
    Ok(())
}

/// Whether this root is not only somebody's who calls himself so, in a namespace of his own.
fn is_root_of_machine() -> bool {
    let map = fs::read_to_string("/proc/self/uid_map").unwrap_or_default();
    let outside = map.lines().find_map(|line| {
        let mut words = line.split_whitespace();
        (words.next() == Some("0")).then(|| words.next()).flatten()
    });
    outside.is_none_or(|outside| outside == "0")
}

/// A process's standard streams; none of them ever blocks. Threads are out of the question: a process with threads makes no
/// namespace of users, and one with a new namespace of processes makes no threads.
struct Pipes {
    stdin: Option<ChildStdin>,
    /// What is still to be written to it.
    unwritten: VecDeque<u8>,
    stdout: Option<ChildStdout>,
    stderr: Option<ChildStderr>,
}

impl Pipes {
    fn of(process: &mut Child, stdin: String) -> nix::Result<Self> {
        let unwritten = VecDeque::from(stdin.into_bytes());
        let (stdin, stdout, stderr) = (process.stdin.take(), process.stdout.take(), process.stderr.take());
        for pipe in [
            stdin.as_ref().map(AsFd::as_fd),
            stdout.as_ref().map(AsFd::as_fd),
            stderr.as_ref().map(AsFd::as_fd),
        ] {
            let Some(pipe) = pipe else { continue };
            let flags = OFlag::from_bits_retain(fcntl(pipe, FcntlArg::F_GETFL)?);
            fcntl(pipe, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
        }
        Ok(Pipes { stdin, unwritten, stdout, stderr })
    }

    fn are_silent(&self) -> bool {
        self.stdout.is_none() && self.stderr.is_none()
    }

    /// Waits until a stream is ready, at most `pause`.
    fn wait(&self, pause: Duration) {
        let mut waited = Vec::new();
        waited.extend(self.stdin.as_ref().map(|pipe| PollFd::new(pipe.as_fd(), PollFlags::POLLOUT)));
        waited.extend(self.stdout.as_ref().map(|pipe| PollFd::new(pipe.as_fd(), PollFlags::POLLIN)));
        waited.extend(self.stderr.as_ref().map(|pipe| PollFd::new(pipe.as_fd(), PollFlags::POLLIN)));
        // Rounded up: a pause of less than a millisecond is none.
        let milliseconds = u16::try_from(pause.as_millis() + 1).unwrap_or(u16::MAX);
        let _ = poll(&mut waited, PollTimeout::from(milliseconds));
    }

    /// Writes what there is room for.
    fn write(&mut self) {
        let Some(stdin) = &mut self.stdin else { return };
        let (head, _) = self.unwritten.as_slices();
        match stdin.write(head) {
            Ok(bytes) => drop(self.unwritten.drain(..bytes)),
            Err(error) if is_not_yet(&error) => return,
            // It reads no more.
            Err(_) => self.unwritten.clear(),
        }
        if self.unwritten.is_empty() {
            self.stdin = None;
        }
    }

    /// Reads what is there, once from each stream.
    fn read(&mut self) -> [Vec<u8>; 2] {
        [next_bytes(&mut self.stdout), next_bytes(&mut self.stderr)]
    }
}

/// What a stream holds now; one that has ended is closed.
fn next_bytes(pipe: &mut Option<impl Read>) -> Vec<u8> {
    let mut buffer = vec![0; READ_BYTES];
    let read = pipe.as_mut().map_or(Ok(0), |pipe| pipe.read(&mut buffer));
    buffer.truncate(*read.as_ref().unwrap_or(&0));
    if !read.is_err_and(|error| is_not_yet(&error)) && buffer.is_empty() {
        *pipe = None;
    }
    buffer
}

fn is_not_yet(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted)
}

struct Watch {
    first: Child,
    pipes: Pipes,
    limits: Limits,
    started: Instant,
    output: [Vec<u8>; 2],
}

impl Watch {
    /// Waits for the end of the program, or brings it about; nothing of it is left then.
    fn until_end(&mut self) -> Ended {
        let mut next_look = self.started + LOOK_INTERVAL;
        let cut = loop {
            let left = wall(&self.limits).saturating_sub(self.started.elapsed());
            if left.is_zero() {
                break Some(Ended::TimedOut);
            }
            let pause = left.min(next_look.saturating_duration_since(Instant::now()));
            if self.pipes.are_silent() {
                // Nothing more will be written; most programs have ended.
                match self.first.try_wait() {
                    Ok(None) => std::thread::sleep(pause.min(Duration::from_millis(1))),
                    _ => break None,
                }
            } else {
                self.pipes.wait(pause);
                self.pipes.write();
                if !self.keep() {
                    break Some(Ended::TooMuchOutput);
                }
            }
            if Instant::now() >= next_look {
                next_look = Instant::now() + LOOK_INTERVAL;
                if memory_of_family(self.first.id()) > self.limits.memory_bytes {
                    break Some(Ended::TooMuchMemory);
                }
                // Where others hold its pipes open, its end is still its end.
                if matches!(self.first.try_wait(), Ok(Some(_))) {
                    break None;
                }
            }
        };
        // The first process of a namespace takes all others with it; without one, its group does.
        let _ = self.first.kill();
        let _ = i32::try_from(self.first.id()).map(|group| killpg(Pid::from_raw(group), Signal::SIGKILL));
        let status = self.first.wait();
        while cut.is_none() && !self.pipes.are_silent() && self.started.elapsed() < wall(&self.limits) {
            // What it had written is still in the pipes.
            self.pipes.stdin = None;
            self.pipes.wait(LOOK_INTERVAL);
            if !self.keep() {
                break;
            }
        }
        cut.unwrap_or_else(|| status.map_or(Ended::Signalled(0), how))
    }

    /// Takes what was written; false when there is more than there may be.
    fn keep(&mut self) -> bool {
        let most = self.limits.output_bytes;
        let read = self.pipes.read();
        for (kept, bytes) in self.output.iter_mut().zip(read) {
            kept.extend(bytes.iter().take(most.saturating_sub(kept.len())));
        }
        self.output.iter().all(|kept| kept.len() < most)
    }
}

fn how(status: ExitStatus) -> Ended {
    match (status.code(), status.signal()) {
        (Some(code), _) => Ended::Exited(code),
        (None, signal) => Ended::Signalled(signal.unwrap_or(0)),
    }
}

/// Resident memory of a process and all that descend from it, without what they share with files.
fn memory_of_family(first: u32) -> u64 {
    let mut bytes = 0;
    let mut family = VecDeque::from([first]);
    for _ in 0..MAX_FAMILY {
        let Some(process) = family.pop_front() else { break };
        bytes += resident_bytes(&fs::read_to_string(format!("/proc/{process}/status")).unwrap_or_default());
        for task in fs::read_dir(format!("/proc/{process}/task")).into_iter().flatten().flatten() {
            let children = fs::read_to_string(task.path().join("children")).unwrap_or_default();
            family.extend(children.split_whitespace().filter_map(|child| child.parse::<u32>().ok()));
        }
    }
    bytes
}

fn resident_bytes(status: &str) -> u64 {
    let of = |key: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(key))?;
        line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()
    };
    [of("RssAnon:"), of("RssShmem:")].into_iter().flatten().sum::<u64>() * 1024
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_of_a_process_is_what_no_file_backs() {
        let status =
            "Name:\tx\nVmRSS:\t 900 kB\nRssAnon:\t     100 kB\nRssFile:\t 780 kB\nRssShmem:\t      20 kB\n";
        assert_eq!(resident_bytes(status), 120 * 1024);
        assert_eq!(resident_bytes(""), 0);
        assert!(memory_of_family(std::process::id()) > 0);
    }
}
