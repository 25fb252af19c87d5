//! `worker measure`: what steps, an evaluation and a checkpoint of one rank take on this machine, by the
//! code that trains: the walk, the update, the copy of the state, the writer of checkpoints.
//!
//! Weights and tokens are random and peers are made up (`comm::simulated`), so neither data nor a model
//! need be there. `proto::measure` has the questions and answers.

/// Rates of the writer of checkpoints.
mod disk;
/// Rate of the TCP communicator on loopback.
mod link;
/// A rank with random weights.
mod setup;
/// Steps, timed.
mod steps;

use std::io::{BufRead, Write};
use std::panic::{AssertUnwindSafe, catch_unwind};

use tch::Device;
use tunefleet_kernels::device;
use tunefleet_proto::job::DeviceKind;
use tunefleet_proto::measure::{Answer, Request};

/// Longest question that is read.
const MAX_REQUEST_BYTES: u64 = 16 << 20;

/// Command line of `worker measure`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Measure what two ranks of this machine send each other in a second instead, and print that.
    #[arg(long)]
    link: bool,
    /// With --link: what so many GPUs send each other, where there are at least two.
    #[arg(long, value_name = "N", default_value_t = 0, requires = "link")]
    gpus: u32,
}

/// Why nothing was measured.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The question cannot be read.
    #[error("reading a request from stdin: {0}")]
    Request(String),
    /// The answer cannot be written.
    #[error("answering: {0}")]
    Answer(#[from] std::io::Error),
    /// The job contradicts its model.
    #[error("adapter: {0}")]
    Adapter(#[from] tunefleet_proto::adapter::Error),
    /// The engine failed.
    #[error(transparent)]
    Train(#[from] crate::train::Error),
    /// A kernel refused.
    #[error(transparent)]
    Kernel(#[from] tunefleet_kernels::Error),
    /// A checkpoint could not be written.
    #[error(transparent)]
    Checkpoint(#[from] crate::checkpoint::Error),
    /// The communicator failed.
    #[error(transparent)]
    Comm(#[from] crate::comm::Error),
    /// libtorch, out of memory above all: tch raises its failures as panics.
    #[error("measuring: {0}")]
    Panicked(String),
}

/// Runs the verb.
///
/// # Errors
/// See [`Error`].
pub fn run(args: Args) -> Result<(), Error> {
    if args.link {
        // A reader that has gone away wants no more.
        let _ = writeln!(std::io::stdout(), "{}", link::bytes_per_second(args.gpus)?);
        return Ok(());
    }
    let mut lines = std::io::stdin().lock();
    let mut text = String::new();
    let limited = &mut std::io::Read::take(&mut lines, MAX_REQUEST_BYTES);
    limited.read_line(&mut text).map_err(|error| Error::Request(error.to_string()))?;
    let request: Request =
        serde_json::from_str(&text).map_err(|error| Error::Request(format!("{error}; expected one line")))?;
    let measured = catch_unwind(AssertUnwindSafe(|| measure(&request, &mut lines)));
    measured.unwrap_or_else(|panic| Err(Error::Panicked(crate::rank::message_of(panic.as_ref()))))
}

fn measure(request: &Request, lines: &mut impl BufRead) -> Result<(), Error> {
    tch::set_num_threads(i32::try_from(request.threads.max(1)).unwrap_or(i32::MAX));
    let device = match request.spec.train.device {
        DeviceKind::Cpu => Device::Cpu,
        DeviceKind::Cuda => Device::Cuda(0),
        DeviceKind::Auto => Device::cuda_if_available(),
    };
    crate::memory::count(device)?;
    if device == Device::Cpu {
        device::keep_freed_memory();
    }
    device::set_deterministic(true)?;
    let mut last = None;
    for point in &request.points {
        // One model at a time.
        drop(last.take());
        let mut wait = || match request.in_step {
            true => answer(&Answer::Ready).and_then(|()| wait_for_line(lines)),
            false => Ok(()),
        };
        let (measured, staged) = steps::measure(request, *point, device, &mut wait)?;
        answer(&Answer::Point(Box::new(measured)))?;
        last = Some(staged);
    }
    if request.in_step {
        answer(&Answer::Ready)?;
        wait_for_line(lines)?;
    }
    answer(&Answer::Disk(disk::measure(&request.spec.output, last.unwrap_or_default())?))
}

fn answer(answer: &Answer) -> Result<(), Error> {
    let text = serde_json::to_string(answer).map_err(std::io::Error::from)?;
    let mut out = std::io::stdout().lock();
    writeln!(out, "{text}")?;
    Ok(out.flush()?)
}

fn wait_for_line(lines: &mut impl BufRead) -> Result<(), Error> {
    match lines.read_line(&mut String::new()) {
        Ok(0) => Err(Error::Request("who asked is gone".to_owned())),
        Ok(_) => Ok(()),
        Err(error) => Err(Error::Request(error.to_string())),
    }
}
