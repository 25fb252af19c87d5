//! A started program: its output, its processes, its end.

use std::io::{BufRead, BufReader, Read};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill, killpg};
use nix::unistd::Pid;

/// Longest wait for anything: a machine under load is slow, a test that hangs is worse.
pub const LIMIT: Duration = Duration::from_secs(120);
/// Between two looks at something that cannot be waited for.
pub(crate) const LOOK_AGAIN: Duration = Duration::from_millis(10);
/// In the environment of every process that a test starts, and so of all their descendants.
const MARK: &str = "TUNEFLEET_TEST_MARK";

/// A program under way. When dropped, it and all its descendants are killed.
pub struct Running {
    child: Child,
    output: Arc<Output>,
    mark: String,
}

/// How a program ended.
#[derive(Debug)]
pub struct Ended {
    /// Exit code; `None` after a signal.
    pub code: Option<i32>,
    /// All that it wrote, both streams, line by line as they came.
    pub output: String,
    /// What it wrote to stdout.
    pub stdout: String,
}

#[derive(Default)]
struct Output {
    state: Mutex<Lines>,
    changed: Condvar,
}

#[derive(Default)]
struct Lines {
    all: Vec<String>,
    stdout: Vec<String>,
    open_streams: u32,
}

impl Running {
    /// Starts `command` in a process group of its own, as a shell would.
    pub fn start(mut command: Command) -> Self {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        let mark = format!("{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        command.env(MARK, &mark).env("NO_COLOR", "1").process_group(0);
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap_or_else(|e| panic!("{command:?}: {e}"));
        let output = Arc::new(Output::default());
        output.state.lock().unwrap().open_streams = 2;
        output.capture(child.stdout.take().unwrap(), true);
        output.capture(child.stderr.take().unwrap(), false);
        Running { child, output, mark }
    }

    /// Waits for a line that contains `pattern` and returns the first such.
    ///
    /// # Panics
    /// When the program closes its output or [`LIMIT`] passes before.
    pub fn wait_for_line(&self, pattern: &str) -> String {
        let find = |lines: &Lines| lines.all.iter().find(|line| line.contains(pattern)).cloned();
        let state = self.output.state.lock().unwrap();
        let waiting = |lines: &mut Lines| find(lines).is_none() && lines.open_streams > 0;
        let (state, _) = self.output.changed.wait_timeout_while(state, LIMIT, waiting).unwrap();
        find(&state).unwrap_or_else(|| panic!("no line with {pattern:?} in:\n{}", state.all.join("\n")))
    }

    /// Waits until `condition` holds.
    ///
    /// # Panics
    /// When the program ends or [`LIMIT`] passes before.
    pub fn wait_until(&mut self, what: &str, mut condition: impl FnMut() -> bool) {
        let began = Instant::now();
        while !condition() {
            if let Some(status) = self.child.try_wait().unwrap() {
                panic!("it ended ({status}) before {what}:\n{}", self.output_so_far());
            }
            assert!(began.elapsed() < LIMIT, "waiting for {what}:\n{}", self.output_so_far());
            thread::sleep(LOOK_AGAIN);
        }
    }

    /// Waits until the program has ended and its output is complete.
    ///
    /// # Panics
    /// When [`LIMIT`] passes before, or a process that it started outlives it.
    pub fn wait(mut self) -> Ended {
        let status = self.wait_for_exit();
        let left = self.processes();
        assert!(left.is_empty(), "it left {left:?} running:\n{}", self.output_so_far());
        let state = self.output.state.lock().unwrap();
        let state = self.output.changed.wait_while(state, |lines| lines.open_streams > 0).unwrap();
        Ended { code: status.code(), output: state.all.join("\n"), stdout: state.stdout.join("\n") }
    }

    fn wait_for_exit(&mut self) -> ExitStatus {
        let began = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            if began.elapsed() > LIMIT {
                panic!("it does not end:\n{}", self.output_so_far());
            }
            thread::sleep(LOOK_AGAIN);
        }
    }

    /// Whether the program ends before `limit` has passed.
    pub fn ends_within(&mut self, limit: Duration) -> bool {
        let began = Instant::now();
        while began.elapsed() < limit {
            if self.has_ended() {
                return true;
            }
            thread::sleep(LOOK_AGAIN);
        }
        false
    }

    /// Whether the program has ended.
    pub fn has_ended(&mut self) -> bool {
        self.child.try_wait().unwrap().is_some()
    }

    /// Sends `signal` to the foreground processes, as a terminal does on Ctrl-C.
    pub fn signal(&self, signal: Signal) {
        killpg(Pid::from_raw(self.child.id() as i32), signal).unwrap();
    }

    /// All processes that came of this start and live.
    pub fn processes(&self) -> Vec<Process> {
        processes_with(&self.mark)
    }

    /// The processes that are ranks.
    pub fn ranks(&self) -> Vec<Process> {
        self.processes()
            .into_iter()
            .filter(|p| p.arguments.get(1).is_some_and(|verb| verb == "rank"))
            .collect()
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Kills the program alone; what it started lives on.
    pub fn kill_alone(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Kills every process, with no chance to clean up, and waits until all are gone.
    pub fn kill_everything(&mut self) {
        let began = Instant::now();
        loop {
            let processes = self.processes();
            for process in &processes {
                process.kill();
            }
            // Reaped, or it would stay a zombie.
            let _ = self.child.try_wait();
            if processes.is_empty() {
                // Its environment is gone before its last thread is, and with that its locks and ports.
                let _ = self.child.wait();
                return;
            }
            assert!(began.elapsed() < LIMIT, "cannot be killed: {processes:?}");
            thread::sleep(LOOK_AGAIN);
        }
    }

    /// What it wrote until now.
    pub fn output_so_far(&self) -> String {
        self.output.state.lock().unwrap().all.join("\n")
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if thread::panicking() {
            for process in self.processes() {
                process.kill();
            }
            eprintln!("--- output of the program\n{}\n---", self.output_so_far());
        } else {
            self.kill_everything();
        }
        let _ = self.child.wait();
    }
}

impl Output {
    fn capture(self: &Arc<Self>, stream: impl Read + Send + 'static, is_stdout: bool) {
        let output = Arc::clone(self);
        thread::spawn(move || {
            for line in BufReader::new(stream).split(b'\n').map_while(Result::ok) {
                let line = String::from_utf8_lossy(&line).into_owned();
                let mut state = output.state.lock().unwrap();
                if is_stdout {
                    state.stdout.push(line.clone());
                }
                state.all.push(line);
                output.changed.notify_all();
            }
            output.state.lock().unwrap().open_streams -= 1;
            output.changed.notify_all();
        });
    }
}

impl Ended {
    /// Asserts the exit code, showing the output otherwise.
    #[track_caller]
    pub fn expect(self, code: i32) -> Self {
        assert_eq!(self.code, Some(code), "exit code; output:\n{}", self.output);
        self
    }

    /// Asserts that each of `texts` was said.
    #[track_caller]
    pub fn says(self, texts: &[&str]) -> Self {
        for text in texts {
            assert!(self.output.contains(text), "{text:?} is not in:\n{}", self.output);
        }
        self
    }
}

/// A live process.
#[derive(Debug)]
pub struct Process {
    /// Its id.
    pub pid: i32,
    /// Its command line.
    pub arguments: Vec<String>,
}

impl Process {
    /// Kills it.
    pub fn kill(&self) {
        self.signal(Signal::SIGKILL);
    }

    /// Sends it a signal until it is gone: a first SIGSEGV may only take away the handler that looks for stack
    /// overflows.
    pub fn end_by(&self, signal: Signal) {
        let is_there = || {
            let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.pid)).unwrap_or_default();
            stat.rsplit_once(") ").is_some_and(|(_, rest)| !rest.starts_with(['Z', 'X']))
        };
        while is_there() {
            self.signal(signal);
            thread::sleep(LOOK_AGAIN);
        }
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: Signal) {
        // It may have ended meanwhile.
        let _ = kill(Pid::from_raw(self.pid), signal);
    }
}

/// Processes whose environment holds the mark; a zombie's is empty.
fn processes_with(mark: &str) -> Vec<Process> {
    let wanted = format!("{MARK}={mark}");
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc").unwrap().filter_map(Result::ok) {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
        let fields = |file: &str| fields(&entry.path().join(file));
        if fields("environ").contains(&wanted) {
            found.push(Process { pid, arguments: fields("cmdline") });
        }
    }
    found
}

/// Zero-terminated fields; none of a process that is gone or somebody else's.
fn fields(path: &Path) -> Vec<String> {
    let bytes = std::fs::read(path).unwrap_or_default();
    bytes.split(|&b| b == 0).map(|field| String::from_utf8_lossy(field).into_owned()).collect()
}
