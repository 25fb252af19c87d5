//! Runs a program that nobody trusts, such as one that a model wrote, and says how it ended.
//!
//! request -> helper (`supervise`: its namespaces, its time, its output) -> first process of the namespaces (`enter`: a root
//! of its own, limits, a filter of system calls) -> the program

#![forbid(unsafe_code)]

/// The helper: one program, from its namespaces to its end.
pub mod supervise;
/// What the program's own process does before it becomes the program.
pub mod enter;
/// A root directory that holds nothing but what the program may read.
mod root;
/// System calls that a program may make.
mod filter;

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// What a program may take.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Limits {
    /// Time from its start to its end.
    pub wall_seconds: f64,
    /// Memory of one process, and of all of them together.
    pub memory_bytes: u64,
    /// Processes and threads at once.
    pub processes: u64,
    /// Of one file, and of all its files together.
    pub file_bytes: u64,
    /// Bytes that it may write to each of stdout and stderr.
    pub output_bytes: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Limits {
            wall_seconds: 3.0,
            memory_bytes: 1 << 30,
            processes: 16,
            file_bytes: 16 << 20,
            output_bytes: 64 << 10,
        }
    }
}

/// How far a program is kept apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Isolation {
    /// Its own namespaces of users, processes, files, network, messages and names, limits, and a filter of system calls.
    Full,
    /// Limits and the filter alone: it reads what the user may read, and writes what the user may write.
    LimitsOnly,
}

/// What is run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Program {
    /// Absolute path of the executable, and its arguments.
    pub argv: Vec<String>,
    /// Files and directories that it may read, beside the system's libraries.
    pub readable: Vec<PathBuf>,
    /// What it finds on its standard input.
    pub stdin: String,
}

/// How a program ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Ended {
    /// By itself, with this code.
    Exited(i32),
    /// By this signal.
    Signalled(i32),
    /// Its time was up.
    TimedOut,
    /// It wrote more than it may.
    TooMuchOutput,
    /// Its processes together took more memory than they may.
    TooMuchMemory,
}

/// What became of a program.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Outcome {
    /// How it ended.
    pub ended: Ended,
    /// What it wrote, up to its limit; what is no UTF-8 is replaced.
    pub stdout: String,
    /// As `stdout`.
    pub stderr: String,
    /// From its start to its end.
    pub wall_seconds: f64,
}

/// Why a program was not run.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The helper is not there.
    #[error("no `sandbox` program beside {beside} or on PATH: install it next to `worker`")]
    NoHelper {
        /// Where it was looked for.
        beside: PathBuf,
    },
    /// The system refused the helper.
    #[error("the sandbox's helper {path}: {source}")]
    Helper {
        /// The helper.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The helper ended without an answer.
    #[error("the sandbox's helper gave no answer ({status}): {said}")]
    NoAnswer {
        /// How it ended.
        status: String,
        /// What it said.
        said: String,
    },
    /// Namespaces, mounts, limits or the filter.
    #[error("cannot keep a program apart on this machine: {0}")]
    Refused(String),
}

/// What the helper is asked.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Request {
    /// What is run.
    pub program: Program,
    /// What it may take.
    pub limits: Limits,
    /// How far it is kept apart.
    pub isolation: Isolation,
}

/// What the helper answers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Answer {
    /// It ran.
    Ran(Outcome),
    /// It could not be run as was asked for.
    Refused(String),
}

/// Runs programs, each in a sandbox of its own.
#[derive(Debug, Clone)]
pub struct Sandbox {
    helper: PathBuf,
    isolation: Isolation,
    limits: Limits,
}

impl Sandbox {
    /// A sandbox whose helper is beside this program or on PATH.
    ///
    /// # Errors
    /// [`Error::NoHelper`].
    pub fn find(isolation: Isolation, limits: Limits) -> Result<Self, Error> {
        let this = std::env::current_exe().unwrap_or_default();
        let beside = this.parent().map(Path::to_owned).unwrap_or_default();
        let on_path = std::env::var_os("PATH").unwrap_or_default();
        let places = std::iter::once(beside.clone()).chain(std::env::split_paths(&on_path));
        let helper = places.map(|dir| dir.join("sandbox")).find(|path| path.is_file());
        let helper = helper.ok_or(Error::NoHelper { beside })?;
        Ok(Sandbox { helper, isolation, limits })
    }

    /// A sandbox with this helper.
    pub fn with_helper(helper: &Path, isolation: Isolation, limits: Limits) -> Self {
        Sandbox { helper: helper.to_owned(), isolation, limits }
    }

    /// Runs a program to its end, in at most its time.
    ///
    /// # Errors
    /// When it was not run; whatever the program does is an [`Outcome`].
    pub fn run(&self, program: &Program) -> Result<Outcome, Error> {
        let failed = |source| Error::Helper { path: self.helper.clone(), source };
        let request =
            Request { program: program.clone(), limits: self.limits.clone(), isolation: self.isolation };
        let request = serde_json::to_vec(&request).map_err(|error| failed(error.into()))?;
        let mut helper = Command::new(&self.helper)
            .arg("supervise")
            .env_clear()
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(failed)?;
        // A helper that has ended says why itself.
        let sent = helper.stdin.take().map(|mut stdin| stdin.write_all(&request));
        let output = helper.wait_with_output().map_err(failed)?;
        match serde_json::from_slice(&output.stdout) {
            Ok(Answer::Ran(outcome)) => Ok(outcome),
            Ok(Answer::Refused(cause)) => Err(Error::Refused(cause)),
            Err(_) => {
                let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
                let said = match (said.is_empty(), sent) {
                    (true, Some(Err(error))) => format!("it took no request: {error}"),
                    _ => said,
                };
                Err(Error::NoAnswer { status: output.status.to_string(), said })
            }
        }
    }
}

/// The time that a program has.
fn wall(limits: &Limits) -> Duration {
    Duration::try_from_secs_f64(limits.wall_seconds).unwrap_or(Duration::MAX)
}
