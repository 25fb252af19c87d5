//! Bandwidth of the TCP communicator between two processes on loopback:
//! `cargo run --release -p tunefleet-worker --example comm_bandwidth`.

use std::io::{BufRead, BufReader, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use tch::{Device, Kind, Tensor};
use tunefleet_proto::ids::{Attempt, JobId, Rank};
use tunefleet_worker::comm::tcp::{TcpCommunicator, TcpListener};
use tunefleet_worker::comm::{Communicator, Error, Tag};

const ROUNDS: usize = 20;
const WARM_UP: usize = 5;
const TAG: Tag = Tag { unit: None, what: "measurement" };

type Failure = Box<dyn std::error::Error>;

fn main() -> Result<(), Failure> {
    let listener = TcpListener::bind(IpAddr::V4(Ipv4Addr::LOCALHOST))?;
    tch::set_num_threads(1);
    if let Some(first) = std::env::args().nth(1) {
        writeln!(std::io::stdout(), "{}", listener.addr())?;
        let second = listener.addr();
        return measure(join(listener, 1, [first.parse()?, second])?, false);
    }
    let mut other = Command::new(std::env::current_exe()?)
        .arg(listener.addr().to_string())
        .stdout(Stdio::piped())
        .spawn()?;
    let mut line = String::new();
    BufReader::new(other.stdout.take().ok_or("no pipe")?).read_line(&mut line)?;
    let first = listener.addr();
    measure(join(listener, 0, [first, line.trim().parse()?])?, true)?;
    other.wait()?;
    Ok(())
}

fn join(listener: TcpListener, rank: u32, addrs: [SocketAddr; 2]) -> Result<TcpCommunicator, Error> {
    let (deadline, job) = (Instant::now() + Duration::from_secs(10), JobId("bandwidth".into()));
    listener.join(Rank { rank, world: 2 }, &addrs, &[0; 32], &job, Attempt(1), deadline)
}

fn measure(comm: TcpCommunicator, tell: bool) -> Result<(), Failure> {
    let mut out = std::io::stdout();
    for mib in [1i64, 4, 16, 64] {
        // What each rank sends, and what it receives at the same time.
        let bytes = mib << 20;
        let whole = Tensor::ones([2 * bytes / 4], (Kind::Float, Device::Cpu));
        let part = Tensor::zeros([bytes / 4], (Kind::Float, Device::Cpu));
        let gather = median(|| Ok(comm.all_gather(&whole, TAG)?.wait()?))?;
        let reduce = median(|| Ok(comm.reduce_scatter(&whole, &part, TAG)?.wait()?))?;
        let rate = |seconds: f64| bytes as f64 / seconds / 1e9;
        if tell {
            writeln!(
                out,
                "{mib:>3} MiB each way: all-gather {:.2} GB/s, reduce-scatter {:.2} GB/s",
                rate(gather),
                rate(reduce)
            )?;
        }
    }
    Ok(())
}

/// Median seconds of `operation`.
fn median(operation: impl Fn() -> Result<(), Failure>) -> Result<f64, Failure> {
    let mut seconds = Vec::new();
    for round in 0..WARM_UP + ROUNDS {
        let began = Instant::now();
        operation()?;
        if round >= WARM_UP {
            seconds.push(began.elapsed().as_secs_f64());
        }
    }
    seconds.sort_by(f64::total_cmp);
    Ok(seconds[ROUNDS / 2])
}
