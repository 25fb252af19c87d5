//! Collectives over TCP, for ranks without NCCL: CPUs, and GPUs staged through the host.
//!
//! A full mesh of connections, each proved by the attempt's secret ([`handshake`]); a thread per
//! connection and direction ([`link`]); tensor memory goes to the socket and comes from it without
//! a copy; sums are made in rank order on one more thread ([`sum`]), so that results are
//! bit-identical from run to run whatever arrives first.

mod frame;
mod group;
mod handshake;
mod join;
mod link;
mod sum;
mod member;
/// A group of some of a group's ranks.
pub mod subgroup;

use std::net::{IpAddr, Shutdown, SocketAddr};
use std::sync::{Arc, mpsc};
use std::thread::{self, JoinHandle};
use std::time::Instant;

use tch::Tensor;
use tunefleet_proto::ids::{Attempt, JobId, Rank};

use self::frame::Op;
use self::group::{End, Group, Operation, PeerQueues, Queues};
use self::handshake::Identity;
use self::member::Member;
pub(super) use self::member::is_summed_in_parts;
pub(super) use self::sum::Pool;
use self::sum::Sum;
use super::{Communicator, Error, Tag, Work};

/// A port on which this rank will be found, before the group exists.
pub struct TcpListener {
    listener: std::net::TcpListener,
    addr: SocketAddr,
}

impl TcpListener {
    /// Listens on a free port of `ip`.
    ///
    /// # Errors
    /// [`Error::Join`] when the address cannot be used.
    pub fn bind(ip: IpAddr) -> Result<Self, Error> {
        let bound = std::net::TcpListener::bind((ip, 0)).and_then(|l| Ok((l.local_addr()?, l)));
        let (addr, listener) = bound.map_err(|e| Error::Join(format!("listening on {ip}: {e}")))?;
        Ok(TcpListener { listener, addr })
    }

    /// Where peers connect to.
    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// Forms the group: `peers` are the addresses of all ranks, in rank order. Returns once every
    /// rank has joined. The port is closed then.
    ///
    /// # Errors
    /// [`Error::Join`] names the ranks that are missing at the deadline.
    pub fn join(
        self,
        rank: Rank,
        peers: &[SocketAddr],
        secret: &[u8; 32],
        job: &JobId,
        attempt: Attempt,
        deadline: Instant,
    ) -> Result<TcpCommunicator, Error> {
        if peers.len() != rank.world as usize || rank.rank >= rank.world {
            return Err(Error::Join(format!("{} addresses for {rank}", peers.len())));
        }
        let me = Identity { rank, secret: *secret, job: job.clone(), attempt };
        let streams = join::mesh(self.listener, &me, peers, deadline)?;
        let communicator = TcpCommunicator::new(rank, streams)
            .map_err(|e| Error::Join(format!("starting the links: {e}")))?;
        if communicator.member.is_sole() {
            return Ok(communicator);
        }
        // A link may have been proved on one side only.
        let all_here = Tag { unit: None, what: "join" };
        let operation = communicator.member.start(Op::Barrier, all_here, None, None, None)?;
        if communicator
            .member
            .group
            .wait_timeout(&operation, deadline.saturating_duration_since(Instant::now()))?
        {
            return Ok(communicator);
        }
        Err(Error::Join("connected to all ranks, but not all of them are to each other".to_owned()))
    }
}

/// A member of a group of ranks; see the module's text.
pub struct TcpCommunicator {
    member: Member,
    senders: Vec<JoinHandle<()>>,
    others: Vec<JoinHandle<()>>,
}

impl TcpCommunicator {
    fn new(rank: Rank, streams: Vec<Option<std::net::TcpStream>>) -> std::io::Result<Self> {
        let (mut sockets, mut peers, mut ends) = (Vec::new(), Vec::new(), Vec::new());
        for (peer, stream) in (0..).zip(streams) {
            let Some(stream) = stream else { continue };
            join::tune(&stream)?;
            let (send, to_send) = mpsc::channel();
            let (receive, to_receive) = mpsc::channel();
            sockets.push(stream.try_clone()?);
            peers.push(PeerQueues { peer, send, receive });
            ends.push((peer, stream.try_clone()?, to_send, stream, to_receive));
        }
        let (sums, to_sum) = mpsc::channel();
        let group = Arc::new(Group::new(rank, sockets, Queues { started: 0, peers, sums }));
        let pool = Arc::new(Pool::default());
        let spawn =
            |name: String, body: Box<dyn FnOnce() + Send>| thread::Builder::new().name(name).spawn(body);

        // Made before any thread: if one cannot be started, Drop ends those that were.
        let mut this = TcpCommunicator {
            member: Member { group: group.clone(), pool: pool.clone() },
            senders: Vec::new(),
            others: Vec::new(),
        };
        for (peer, outgoing, to_send, incoming, to_receive) in ends {
            let group = this.member.group.clone();
            let body = Box::new(move || link::send_all(&group, peer, outgoing, &to_send));
            this.senders.push(spawn(format!("send-{peer}"), body)?);
            let group = this.member.group.clone();
            let body = Box::new(move || link::receive_all(&group, peer, incoming, &to_receive));
            this.others.push(spawn(format!("receive-{peer}"), body)?);
        }
        let body = Box::new(move || add_up(&group, &pool, &to_sum));
        this.others.push(spawn("add-up".to_owned(), body)?);
        Ok(this)
    }
}

impl Communicator for TcpCommunicator {
    fn rank(&self) -> Rank {
        self.member.group.rank
    }

    fn all_gather(&self, buffer: &Tensor, tag: Tag) -> Result<Box<dyn Work>, Error> {
        self.member.all_gather(buffer, tag)
    }

    fn reduce_scatter(&self, input: &Tensor, output: &Tensor, tag: Tag) -> Result<Box<dyn Work>, Error> {
        self.member.reduce_scatter(input, output, tag)
    }

    fn all_reduce(&self, tensor: &Tensor, tag: Tag) -> Result<Box<dyn Work>, Error> {
        self.member.all_reduce(tensor, tag)
    }

    fn barrier(&self) -> Result<(), Error> {
        self.member.barrier()
    }

    fn abort(&self, reason: &str) {
        self.member.group.fail(Error::Aborted(reason.to_owned()));
    }
}

impl Drop for TcpCommunicator {
    fn drop(&mut self) {
        self.member.group.finish(End::Left);
        // Senders deliver what is queued and say farewell; none of them waits long.
        for thread in self.senders.drain(..) {
            let _ = thread.join();
        }
        self.member.group.shutdown(Shutdown::Both);
        for thread in self.others.drain(..) {
            let _ = thread.join();
        }
    }
}

/// Body of the thread that adds up.
fn add_up(group: &Group, pool: &Pool, queue: &mpsc::Receiver<(Arc<Operation>, Sum)>) {
    let _no_grad = tch::no_grad_guard();
    while let Ok((operation, sum)) = queue.recv() {
        if let Err(error) = sum.run() {
            return group.fail(error);
        }
        let Sum { parts, scratch, .. } = sum;
        drop(parts);
        scratch.into_iter().for_each(|tensor| pool.put(tensor));
        group.complete(&operation);
    }
}
