//! How a rank meets its peers: which communicator serves which device.
//!
//! Peers always meet over TCP, where each proves that it knows the attempt's secret. GPU ranks go
//! on to form an NCCL group, whose bootstrap travels through the proven connections: no port of
//! NCCL's own store is ever open.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use tch::Tensor;
use tunefleet_kernels::device::cuda_uuid;
use tunefleet_kernels::nccl::Store;
use tunefleet_proto::ids::{Attempt, JobId, Rank};
use tunefleet_proto::rpc::{Assignment, StartRanks};

use super::Error;
use crate::comm::nccl::NcclCommunicator;
use crate::comm::recorder::{Record, Recorded};
use crate::comm::tcp::subgroup::{self, Credentials};
use crate::comm::tcp::{TcpCommunicator, TcpListener};
use crate::comm::{self, Communicator, Groups, Tag, mesh};

/// How long the ranks of an attempt wait for each other.
const JOIN_TIMEOUT: Duration = Duration::from_secs(120);
/// Largest bootstrap value: NCCL's unique id has 128 bytes.
const MAX_BOOTSTRAP_BYTES: usize = 1024;

/// A rank that is ready to meet its peers.
pub(super) enum Listener {
    /// A world of one meets nobody.
    Solo,
    /// Peers connect here.
    Tcp(TcpListener),
}

impl Listener {
    /// Opens what peers connect to.
    pub fn open(assignment: &Assignment) -> Result<Self, Error> {
        if assignment.world <= 1 {
            return Ok(Listener::Solo);
        }
        let ip = parse_ip(&assignment.listen_address)?;
        Ok(Listener::Tcp(TcpListener::bind(ip).map_err(Error::Join)?))
    }

    /// Where peers connect to; empty in a world of one.
    pub fn address(&self) -> String {
        match self {
            Listener::Solo => String::new(),
            Listener::Tcp(listener) => listener.addr().to_string(),
        }
    }

    /// Meets all peers; of these, `shard_ranks` share a copy of the weights. What they do together is
    /// remembered in `record`; one collective may take `timeout`.
    pub fn join(
        self,
        assignment: &Assignment,
        start: &StartRanks,
        shard_ranks: u32,
        record: &Arc<Record>,
        timeout: Duration,
    ) -> Result<Groups, Error> {
        let listener = match self {
            Listener::Solo => return Ok(Groups::sole()),
            Listener::Tcp(listener) => listener,
        };
        let peers: Vec<SocketAddr> = start
            .peers
            .iter()
            .map(|peer| peer.parse().map_err(|e| Error::Assignment(format!("peer address {peer:?}: {e}"))))
            .collect::<Result<_, _>>()?;
        let secret: [u8; 32] =
            start.secret.as_slice().try_into().map_err(|_| {
                Error::Assignment(format!("secret of {} bytes, expected 32", start.secret.len()))
            })?;
        let task = start.task.clone().unwrap_or_default();
        let rank = Rank { rank: assignment.rank, world: assignment.world };
        let deadline = Instant::now() + JOIN_TIMEOUT;
        let credentials = Credentials { secret, job: JobId(task.job), attempt: Attempt(task.attempt) };
        let Credentials { job, attempt, .. } = &credentials;
        let tcp = listener.join(rank, &peers, &secret, job, *attempt, deadline).map_err(Error::Join)?;
        let nccl_on = match assignment.cuda_device {
            None => None,
            Some(gpu) => {
                let uuid = i32::try_from(gpu).ok().and_then(|gpu| cuda_uuid(gpu).ok());
                let uuid = uuid.ok_or_else(|| Error::Assignment(format!("there is no GPU {gpu} here")))?;
                let shared = share_a_gpu(&tcp, uuid).map_err(Error::Join)?;
                if shared {
                    tracing::warn!(
                        "two ranks share a GPU, which NCCL refuses: collectives go through the host"
                    );
                }
                (!shared).then_some(gpu as usize)
            }
        };
        // Groups of some ranks meet over the world's connections, before NCCL takes these.
        let some = (1 < shard_ranks && shard_ranks < rank.world).then(|| {
            let ip = parse_ip(&assignment.listen_address)?;
            let (shards, replicas) = mesh::neighbours(rank, shard_ranks);
            let meet = |members: &[u32]| {
                let tcp = subgroup::join(&tcp, members, ip, &credentials, deadline)?;
                Ok((tcp.rank(), tcp))
            };
            meet(&shards).and_then(|shards| Ok((shards, meet(&replicas)?))).map_err(Error::Join)
        });
        let some = some.transpose()?;
        let communicator = |(rank, tcp): (Rank, TcpCommunicator)| -> Result<Arc<dyn Communicator>, Error> {
            let Some(gpu) = nccl_on else { return Ok(Arc::new(Recorded::new(tcp, Arc::clone(record)))) };
            let store = Box::new(Bootstrap { group: tcp, used: AtomicBool::new(false) });
            let nccl = NcclCommunicator::join(rank, gpu, store, timeout).map_err(Error::Join)?;
            Ok(Arc::new(Recorded::new(nccl, Arc::clone(record))))
        };
        let world = communicator((rank, tcp))?;
        Ok(match some {
            None => Groups::of_world(world, shard_ranks),
            Some((shards, replicas)) => {
                Groups { world, shards: communicator(shards)?, replicas: Some(communicator(replicas)?) }
            }
        })
    }
}

fn parse_ip(text: &str) -> Result<IpAddr, Error> {
    text.parse().map_err(|e| Error::Assignment(format!("listen address {text:?}: {e}")))
}

/// Whether any two ranks compute on one GPU; all ranks get the same answer.
fn share_a_gpu(group: &TcpCommunicator, uuid: [u8; 16]) -> Result<bool, comm::Error> {
    let Rank { rank, world } = group.rank();
    let (high, low) = uuid.split_at(8);
    let word = |bytes: &[u8]| bytes.iter().fold(0i64, |word, byte| (word << 8) | i64::from(*byte));
    let mut words = vec![0i64; 2 * world as usize];
    words[2 * rank as usize..][..2].copy_from_slice(&[word(high), word(low)]);
    let all = Tensor::from_slice(&words);
    group.all_gather(&all, Tag { unit: None, what: "GPU identities" })?.wait()?;
    let words = Vec::<i64>::try_from(&all).unwrap_or_default();
    let mut seen = std::collections::HashSet::new();
    Ok(!words.chunks(2).all(|uuid| seen.insert(uuid)))
}

/// The store of the NCCL bootstrap. libtorch publishes one value, on rank 0, for which all others
/// wait: a sum to which the others add nothing.
struct Bootstrap {
    /// Kept as long as the NCCL group, so that a peer which is slow to read is not cut off.
    group: TcpCommunicator,
    used: AtomicBool,
}

impl Bootstrap {
    fn exchange(&self, value: &[u8]) -> Option<Vec<u8>> {
        let mut words = vec![0i64; 1 + MAX_BOOTSTRAP_BYTES];
        words[0] = value.len() as i64;
        for (word, byte) in words.get_mut(1..=value.len())?.iter_mut().zip(value) {
            *word = (*byte).into();
        }
        let sum = Tensor::from_slice(&words);
        let shared = self.group.all_reduce(&sum, Tag { unit: None, what: "NCCL bootstrap" });
        if let Err(error) = shared.and_then(|work| work.wait()) {
            tracing::warn!("NCCL bootstrap: {error}");
            return None;
        }
        let words = Vec::<i64>::try_from(&sum).ok()?;
        let len = usize::try_from(*words.first()?).ok()?;
        words.get(1..=len)?.iter().map(|word| u8::try_from(*word).ok()).collect()
    }
}

impl Store for Bootstrap {
    fn set(&self, _key: &str, value: &[u8]) -> bool {
        // Nobody asks for what other ranks, or later calls, publish.
        if self.group.rank().rank != 0 || self.used.swap(true, Ordering::AcqRel) {
            return true;
        }
        self.exchange(value).is_some()
    }

    fn get(&self, _key: &str) -> Option<Vec<u8>> {
        if self.used.swap(true, Ordering::AcqRel) {
            return None;
        }
        self.exchange(&[])
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;
    use std::thread;

    use super::*;

    fn on_ranks<T: Send>(world: u32, body: impl Fn(TcpCommunicator) -> T + Sync) -> Vec<T> {
        let bind = |_| TcpListener::bind(IpAddr::V4(Ipv4Addr::LOCALHOST)).unwrap();
        let listeners: Vec<TcpListener> = (0..world).map(bind).collect();
        let peers: Vec<_> = listeners.iter().map(TcpListener::addr).collect();
        let deadline = Instant::now() + Duration::from_secs(30);
        let job = JobId("group-test".to_owned());
        thread::scope(|scope| {
            let (peers, body, job) = (&peers, &body, &job);
            let join = |(rank, listener): (u32, TcpListener)| {
                scope.spawn(move || {
                    let rank = Rank { rank, world };
                    body(listener.join(rank, peers, &[5; 32], job, Attempt(1), deadline).unwrap())
                })
            };
            let ranks: Vec<_> = (0..).zip(listeners).map(join).collect();
            ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
        })
    }

    #[test]
    fn every_rank_gets_the_bootstrap_value_of_rank_0() {
        let id: Vec<u8> = (0..128u8).map(|byte| byte.wrapping_mul(37)).collect();
        let got = on_ranks(3, |group| {
            let rank = group.rank().rank;
            let store = Bootstrap { group, used: AtomicBool::new(false) };
            if rank == 0 { store.set("0", &id).then(|| id.clone()) } else { store.get("0") }
        });
        assert!(got.iter().all(|value| value.as_deref() == Some(id.as_slice())), "{got:?}");
    }

    #[test]
    fn ranks_agree_on_whether_they_share_a_gpu() {
        let gpu = |rank: u32, of: u32| [(rank % of) as u8; 16];
        for (gpus, shared) in [(3, false), (2, true), (1, true)] {
            let answers = on_ranks(3, |group| {
                let uuid = gpu(group.rank().rank, gpus);
                share_a_gpu(&group, uuid).unwrap()
            });
            assert_eq!(answers, [shared; 3], "{gpus} GPUs");
        }
    }
}
