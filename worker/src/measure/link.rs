//! What a rank sends to another one on this machine in a second: the TCP communicator on loopback.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::{Duration, Instant};

use tch::{Device, Kind, Tensor};
use tunefleet_proto::ids::{Attempt, JobId, Rank};
use tunefleet_proto::measure::Seconds;

use super::Error;
use crate::comm::tcp::TcpListener;
use crate::comm::{self, Communicator, Tag};

/// What each rank sends at a time.
const PART_BYTES: i64 = 8 << 20;
const ROUNDS: usize = 10;
const WARM_UP: usize = 3;

/// The median of some gathers between two ranks.
pub(super) fn bytes_per_second() -> Result<f64, Error> {
    tch::set_num_threads(1);
    let bind = || TcpListener::bind(IpAddr::V4(Ipv4Addr::LOCALHOST));
    let listeners = [bind()?, bind()?];
    let secret = rand::random::<[u8; 32]>();
    let peers: Vec<SocketAddr> = listeners.iter().map(TcpListener::addr).collect();
    let seconds = std::thread::scope(|scope| {
        let ranks = (0..).zip(listeners).map(|(rank, listener)| {
            let peers = &peers;
            scope.spawn(move || gathers(listener, rank, peers, &secret))
        });
        let ranks: Vec<_> = ranks.collect();
        let joined = ranks.into_iter().map(|rank| rank.join());
        joined.map(|result| result.unwrap_or_else(|panic| std::panic::resume_unwind(panic))).collect()
    });
    let seconds: Result<Vec<Vec<f64>>, comm::Error> = seconds;
    let median = seconds?.first().and_then(|seconds| Seconds::of(seconds)).map_or(1.0, |s| s.median);
    Ok(PART_BYTES as f64 / median.max(1e-9))
}

fn gathers(
    listener: TcpListener,
    rank: u32,
    peers: &[SocketAddr],
    secret: &[u8; 32],
) -> Result<Vec<f64>, comm::Error> {
    let deadline = Instant::now() + Duration::from_secs(10);
    let (rank, job) = (Rank { rank, world: 2 }, JobId("measure".to_owned()));
    let comm = listener.join(rank, peers, secret, &job, Attempt(1), deadline)?;
    let whole = Tensor::ones([2 * PART_BYTES / 4], (Kind::Float, Device::Cpu));
    let mut seconds = Vec::new();
    for round in 0..WARM_UP + ROUNDS {
        let began = Instant::now();
        comm.all_gather(&whole, Tag { unit: None, what: "measurement" })?.wait()?;
        if round >= WARM_UP {
            seconds.push(began.elapsed().as_secs_f64());
        }
    }
    Ok(seconds)
}

#[cfg(test)]
mod tests {
    #[test]
    fn loopback_has_a_rate() {
        let rate = super::bytes_per_second().unwrap();
        assert!((1e7..1e12).contains(&rate), "{rate} bytes/s");
    }
}
