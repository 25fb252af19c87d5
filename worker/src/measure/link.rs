//! What a rank sends to the others on this machine in a second: the TCP communicator on loopback, or NCCL.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tch::{Device, Kind, Tensor};
use tunefleet_kernels::nccl::Store;
use tunefleet_proto::ids::{Attempt, JobId, Rank};
use tunefleet_proto::measure::Seconds;

use super::Error;
use crate::comm::nccl::NcclCommunicator;
use crate::comm::tcp::TcpListener;
use crate::comm::{self, Communicator, Tag};

/// What each rank sends at a time.
const PART_BYTES: i64 = 8 << 20;
const ROUNDS: usize = 10;
const WARM_UP: usize = 3;
/// How long ranks may take to meet.
const JOIN_LIMIT: Duration = Duration::from_secs(60);

/// The median of some gathers: between two ranks on the CPU, or between all `gpus`.
pub(super) fn bytes_per_second(gpus: u32) -> Result<f64, Error> {
    let seconds = if gpus > 1 { over_nccl(gpus)? } else { over_tcp()? };
    let others = gpus.max(2) - 1;
    let median = Seconds::of(&seconds).map_or(1.0, |s| s.median);
    Ok(f64::from(others) * PART_BYTES as f64 / median.max(1e-9))
}

fn over_tcp() -> Result<Vec<f64>, comm::Error> {
    tch::set_num_threads(1);
    let bind = || TcpListener::bind(IpAddr::V4(Ipv4Addr::LOCALHOST));
    let listeners = [bind()?, bind()?];
    let secret = rand::random::<[u8; 32]>();
    let peers: Vec<SocketAddr> = listeners.iter().map(TcpListener::addr).collect();
    let (peers, secret) = (&peers, &secret);
    together((0..).zip(listeners).map(|(rank, listener)| {
        move || {
            let deadline = Instant::now() + JOIN_LIMIT;
            let (rank, job) = (Rank { rank, world: 2 }, JobId("measure".to_owned()));
            let comm = listener.join(rank, peers, secret, &job, Attempt(1), deadline)?;
            gathers(&comm, Device::Cpu)
        }
    }))
}

fn over_nccl(gpus: u32) -> Result<Vec<f64>, comm::Error> {
    let values = Shared::default();
    together((0..gpus).map(|rank| {
        let store = Box::new(values.clone());
        move || {
            let gpu = rank as usize;
            let comm = NcclCommunicator::join(Rank { rank, world: gpus }, gpu, store, JOIN_LIMIT)?;
            gathers(&comm, Device::Cuda(gpu))
        }
    }))
}

/// What the first of some ranks, each on a thread of its own, has measured.
fn together<F>(ranks: impl Iterator<Item = F>) -> Result<Vec<f64>, comm::Error>
where
    F: FnOnce() -> Result<Vec<f64>, comm::Error> + Send,
{
    let seconds = std::thread::scope(|scope| {
        let ranks: Vec<_> = ranks.map(|rank| scope.spawn(rank)).collect();
        let joined = ranks.into_iter().map(|rank| rank.join());
        joined.map(|result| result.unwrap_or_else(|panic| std::panic::resume_unwind(panic))).collect()
    });
    let seconds: Result<Vec<Vec<f64>>, comm::Error> = seconds;
    Ok(seconds?.into_iter().next().unwrap_or_default())
}

fn gathers(comm: &dyn Communicator, device: Device) -> Result<Vec<f64>, comm::Error> {
    let elements = i64::from(comm.rank().world) * PART_BYTES / 4;
    let whole = Tensor::ones([elements], (Kind::Float, device));
    let mut seconds = Vec::new();
    for round in 0..WARM_UP + ROUNDS {
        comm.barrier()?;
        let began = Instant::now();
        comm.all_gather(&whole, Tag { unit: None, what: "measurement" })?.wait()?;
        if let Device::Cuda(gpu) = device {
            tch::Cuda::synchronize(gpu as i64);
        }
        if round >= WARM_UP {
            seconds.push(began.elapsed().as_secs_f64());
        }
    }
    Ok(seconds)
}

/// The values by which NCCL's ranks find each other, within this process.
#[derive(Default, Clone)]
struct Shared(Arc<Values>);

#[derive(Default)]
struct Values {
    known: Mutex<HashMap<String, Vec<u8>>>,
    grown: Condvar,
}

impl Store for Shared {
    fn set(&self, key: &str, value: &[u8]) -> bool {
        let mut known = self.0.known.lock().unwrap_or_else(PoisonError::into_inner);
        known.insert(key.to_owned(), value.to_vec());
        self.0.grown.notify_all();
        true
    }

    fn get(&self, key: &str) -> Option<Vec<u8>> {
        let known = self.0.known.lock().unwrap_or_else(PoisonError::into_inner);
        let waiting = self.0.grown.wait_timeout_while(known, JOIN_LIMIT, |known| !known.contains_key(key));
        let (known, _) = waiting.unwrap_or_else(PoisonError::into_inner);
        known.get(key).cloned()
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn loopback_has_a_rate() {
        let rate = super::bytes_per_second(0).unwrap();
        assert!((1e7..1e12).contains(&rate), "{rate} bytes/s");
    }
}
