//! Starts `worker measure` as often as ranks share this machine, and has them measure together.

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use tunefleet_proto::job::JobSpec;
use tunefleet_proto::measure::{Answer, Disk, Measured, Point, Request};
use tunefleet_proto::model::ModelConfig;

/// What is measured, and how.
pub struct Question<'a> {
    /// The job.
    pub spec: &'a JobSpec,
    /// The shape of its model.
    pub config: &'a ModelConfig,
    /// Depths.
    pub points: Vec<Point>,
    /// Ranks that share this machine.
    pub ranks: u32,
    /// Threads of each.
    pub threads: u32,
    /// Whether traffic is simulated at the rate of this machine's loopback.
    pub over_loopback: bool,
}

/// What came back.
#[derive(Debug)]
pub struct Asked {
    /// Of each point, what the slowest rank took.
    pub points: Vec<Measured>,
    /// Rates of the slowest rank.
    pub disk: Disk,
    /// Of each rank, while all send.
    pub link_bytes_per_second: Option<f64>,
    /// Ranks that measured together.
    pub ranks: u32,
    /// Threads of each.
    pub threads: u32,
}

/// Why nothing was measured.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The program does not start, or its pipes break.
    #[error("{program} measure: {cause}")]
    Program {
        /// The program.
        program: String,
        /// What the system said.
        cause: std::io::Error,
    },
    /// It ended early.
    #[error("{program} measure ended without an answer; what it said stands above")]
    Ended {
        /// The program.
        program: String,
    },
    /// It answered something else.
    #[error("{program} measure answered {answer:?}: both programs must be of one version")]
    Answer {
        /// The program.
        program: String,
        /// What it said.
        answer: String,
    },
}

/// Asks `program`, the `worker`.
///
/// # Errors
/// See [`Error`].
pub fn ask(program: &Path, question: &Question<'_>) -> Result<Asked, Error> {
    let link = match question.over_loopback {
        true => Some(shared(loopback(program)?, question.ranks)),
        false => None,
    };
    let request = Request {
        spec: question.spec.clone(),
        config: question.config.clone(),
        points: question.points.clone(),
        link_bytes_per_second: link,
        threads: question.threads,
        in_step: true,
    };
    let ranks: Result<Vec<Rank>, Error> =
        (0..question.ranks).map(|_| Rank::start(program, &request)).collect();
    let mut ranks = ranks?;
    let mut points = Vec::new();
    for _ in &question.points {
        let mut slowest: Option<Box<Measured>> = None;
        for answer in together(&mut ranks)? {
            let Answer::Point(measured) = answer else { return Err(ranks[0].unexpected(&answer)) };
            if slowest.as_ref().is_none_or(|other| measured.step.median > other.step.median) {
                slowest = Some(measured);
            }
        }
        points.extend(slowest.map(|measured| *measured));
    }
    let mut slowest: Option<Disk> = None;
    for answer in together(&mut ranks)? {
        let Answer::Disk(disk) = answer else { return Err(ranks[0].unexpected(&answer)) };
        let is_slower = |other: &Disk| disk.write_bytes_per_second < other.write_bytes_per_second;
        if slowest.as_ref().is_none_or(is_slower) {
            slowest = Some(disk);
        }
    }
    let disk = slowest.ok_or_else(|| Error::Ended { program: program.display().to_string() })?;
    let (ranks, threads) = (question.ranks, question.threads);
    Ok(Asked { points, disk, link_bytes_per_second: link, ranks, threads })
}

/// What each of `ranks` sends in a second when all do, of what two do: copies in this machine's memory.
fn shared(bytes_per_second: f64, ranks: u32) -> f64 {
    bytes_per_second * 2.0 / f64::from(ranks.max(2))
}

fn loopback(program: &Path) -> Result<f64, Error> {
    let name = || program.display().to_string();
    let output = Command::new(program)
        .args(["measure", "--link"])
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()
        .map_err(|cause| Error::Program { program: name(), cause })?;
    if !output.status.success() {
        return Err(Error::Ended { program: name() });
    }
    let answer = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    match answer.parse() {
        Ok(rate) if rate > 0.0 => Ok(rate),
        _ => Err(Error::Answer { program: name(), answer }),
    }
}

/// Waits until all are ready, lets them go, and has their answers.
fn together(ranks: &mut [Rank]) -> Result<Vec<Answer>, Error> {
    for rank in ranks.iter_mut() {
        let answer = rank.answer()?;
        if answer != Answer::Ready {
            return Err(rank.unexpected(&answer));
        }
    }
    for rank in ranks.iter_mut() {
        rank.say("go")?;
    }
    ranks.iter_mut().map(Rank::answer).collect()
}

/// One `worker measure`; killed when dropped.
struct Rank {
    program: String,
    child: Child,
    stdin: ChildStdin,
    stdout: BufReader<ChildStdout>,
}

impl Rank {
    fn start(program: &Path, request: &Request) -> Result<Self, Error> {
        let name = program.display().to_string();
        let failed = |cause| Error::Program { program: name.clone(), cause };
        // As a daemon starts its ranks.
        let mkl = std::fs::read_to_string("/proc/cpuinfo").is_ok_and(|cpu| cpu.contains("GenuineIntel"));
        let mut child = Command::new(program)
            .arg("measure")
            .env("OMP_NUM_THREADS", request.threads.to_string())
            .envs(mkl.then_some(("MKL_CBWR", "AUTO")))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit())
            .spawn()
            .map_err(failed)?;
        let (Some(stdin), Some(stdout)) = (child.stdin.take(), child.stdout.take()) else {
            return Err(Error::Ended { program: name });
        };
        let mut rank = Rank { program: name, child, stdin, stdout: BufReader::new(stdout) };
        let text = serde_json::to_string(request).map_err(|error| rank.broken(error.into()))?;
        rank.say(&text)?;
        Ok(rank)
    }

    fn say(&mut self, line: &str) -> Result<(), Error> {
        let said = writeln!(self.stdin, "{line}").and_then(|()| self.stdin.flush());
        said.map_err(|cause| match cause.kind() {
            std::io::ErrorKind::BrokenPipe => Error::Ended { program: self.program.clone() },
            _ => self.broken(cause),
        })
    }

    fn answer(&mut self) -> Result<Answer, Error> {
        let mut line = String::new();
        match self.stdout.read_line(&mut line) {
            Ok(0) => Err(Error::Ended { program: self.program.clone() }),
            Ok(_) => serde_json::from_str(&line)
                .map_err(|_| Error::Answer { program: self.program.clone(), answer: line.trim().to_owned() }),
            Err(cause) => Err(self.broken(cause)),
        }
    }

    fn broken(&self, cause: std::io::Error) -> Error {
        Error::Program { program: self.program.clone(), cause }
    }

    fn unexpected(&self, answer: &Answer) -> Error {
        Error::Answer { program: self.program.clone(), answer: format!("{answer:?}") }
    }
}

impl Drop for Rank {
    fn drop(&mut self) {
        // One that has ended cannot be killed, and need not be.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_loopback_is_shared_by_all_who_send() {
        assert_eq!(shared(6.0, 1), 6.0);
        assert_eq!(shared(6.0, 2), 6.0);
        assert_eq!(shared(6.0, 8), 1.5);
    }
}
