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

use std::net::{IpAddr, Shutdown, SocketAddr};
use std::sync::{Arc, mpsc};
use std::thread::{self, JoinHandle};
use std::time::Instant;

use tch::{Device, Kind, Tensor};
use tunefleet_proto::ids::{Attempt, JobId, Rank};

use self::frame::{Header, Op};
use self::group::{End, Group, Operation, PeerQueues, Queues};
use self::handshake::Identity;
use self::link::Transfer;
use self::sum::{Pool, Sum};
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
        if communicator.is_sole() {
            return Ok(communicator);
        }
        // A link may have been proved on one side only.
        let all_here = Tag { unit: None, what: "join" };
        let operation = communicator.start(Op::Barrier, all_here, None, None, None)?;
        if communicator.group.wait_timeout(&operation, deadline.saturating_duration_since(Instant::now()))? {
            return Ok(communicator);
        }
        Err(Error::Join("connected to all ranks, but not all of them are to each other".to_owned()))
    }
}

/// A member of a group of ranks; see the module's text.
pub struct TcpCommunicator {
    group: Arc<Group>,
    pool: Arc<Pool>,
    senders: Vec<JoinHandle<()>>,
    others: Vec<JoinHandle<()>>,
}

/// Parts of a tensor, one per rank.
type Parts = Vec<Tensor>;

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
            group: group.clone(),
            pool: pool.clone(),
            senders: Vec::new(),
            others: Vec::new(),
        };
        for (peer, outgoing, to_send, incoming, to_receive) in ends {
            let group = this.group.clone();
            let body = Box::new(move || link::send_all(&group, peer, outgoing, &to_send));
            this.senders.push(spawn(format!("send-{peer}"), body)?);
            let group = this.group.clone();
            let body = Box::new(move || link::receive_all(&group, peer, incoming, &to_receive));
            this.others.push(spawn(format!("receive-{peer}"), body)?);
        }
        let body = Box::new(move || add_up(&group, &pool, &to_sum));
        this.others.push(spawn("add-up".to_owned(), body)?);
        Ok(this)
    }

    /// Queues one operation: `outgoing[r]` goes to rank r, `incoming[r]` is filled by it.
    fn start(
        &self,
        op: Op,
        tag: Tag,
        outgoing: Option<&Parts>,
        incoming: Option<&Parts>,
        sum: Option<Sum>,
    ) -> Result<Arc<Operation>, Error> {
        self.group.start(|queues| {
            let operation = Arc::new(Operation::new(tag, 2 * queues.peers.len(), sum));
            let seq = queues.started;
            queues.started += 1;
            for PeerQueues { peer, send, receive } in &queues.peers {
                let transfer = |parts: Option<&Parts>| {
                    let part = parts.and_then(|parts| parts.get(*peer as usize));
                    let bytes = part.map_or(0, |t| (t.numel() * t.kind().elt_size_in_bytes()) as u64);
                    let kind = part.map(Tensor::kind);
                    let header = Header { seq, op, kind, unit: tag.unit, culprit: None, bytes };
                    Transfer {
                        header,
                        payload: part.map(Tensor::shallow_clone),
                        operation: operation.clone(),
                    }
                };
                // A thread that is gone has ended the group, and waiters know.
                let _ = send.send(transfer(outgoing));
                let _ = receive.send(transfer(incoming));
            }
            operation
        })
    }

    fn work(&self, operation: Arc<Operation>, copy_back: Option<(Tensor, Tensor)>) -> Box<dyn Work> {
        Box::new(TcpWork { group: self.group.clone(), pool: self.pool.clone(), operation, copy_back })
    }

    fn is_sole(&self) -> bool {
        self.group.rank.world == 1
    }

    /// `tensor` cut into one part per rank.
    fn parts(&self, tensor: &Tensor) -> Parts {
        let world = i64::from(self.group.rank.world);
        let n = tensor.numel() as i64 / world;
        (0..world).map(|r| tensor.narrow(0, r * n, n)).collect()
    }
}

impl Communicator for TcpCommunicator {
    fn rank(&self) -> Rank {
        self.group.rank
    }

    fn all_gather(&self, buffer: &Tensor, tag: Tag) -> Result<Box<dyn Work>, Error> {
        let Rank { rank, world } = self.group.rank;
        check("all-gather", buffer, buffer.numel().is_multiple_of(world as usize), "of world x n elements")?;
        if self.is_sole() {
            return Ok(Box::new(super::Done));
        }
        let flat = buffer.detach().view(-1);
        let (host, copy_back) = match flat.device() {
            Device::Cpu => (flat, None),
            device => {
                let host = self.pool.take(flat.kind(), flat.numel() as i64, device)?;
                let mine = self.parts(&host).swap_remove(rank as usize);
                copy(&mine, &self.parts(&flat)[rank as usize])?;
                (host.shallow_clone(), Some((flat, host)))
            }
        };
        let parts = self.parts(&host);
        let mine = parts.iter().map(|_| parts[rank as usize].shallow_clone()).collect();
        let operation = self.start(Op::AllGather, tag, Some(&mine), Some(&parts), None)?;
        Ok(self.work(operation, copy_back))
    }

    fn reduce_scatter(&self, input: &Tensor, output: &Tensor, tag: Tag) -> Result<Box<dyn Work>, Error> {
        let Rank { rank, world } = self.group.rank;
        const OP: &str = "reduce-scatter";
        check(OP, output, matches!(output.kind(), Kind::Float | Kind::BFloat16), "fp32 or bf16")?;
        let kinds_fit =
            input.kind() == output.kind() || (input.kind() == Kind::BFloat16 && output.kind() == Kind::Float);
        check(OP, input, kinds_fit, "of the output's dtype, or bf16 into fp32")?;
        check(
            OP,
            input,
            input.numel() == output.numel() * world as usize,
            "of world x the output's elements",
        )?;
        check(OP, input, !overlap(input, output), "apart from the output in memory")?;
        let (input, output) = (input.detach().view(-1), output.detach().view(-1));
        if self.is_sole() {
            copy(&output, &input)?;
            return Ok(Box::new(super::Done));
        }
        let mut scratch = Vec::new();
        let (host_input, host_output, copy_back) = match input.device() {
            Device::Cpu => (input, output, None),
            device => {
                let host_input = self.pool.take(input.kind(), input.numel() as i64, device)?;
                copy(&host_input, &input)?;
                let host_output = self.pool.take(output.kind(), output.numel() as i64, device)?;
                scratch.push(host_input.shallow_clone());
                (host_input, host_output.shallow_clone(), Some((output, host_output)))
            }
        };
        let outgoing = self.parts(&host_input);
        let received = self.pool.take(host_input.kind(), host_input.numel() as i64, Device::Cpu)?;
        let mut incoming = self.parts(&received);
        scratch.push(received);
        incoming[rank as usize] = outgoing[rank as usize].shallow_clone();
        let sum =
            Sum { parts: incoming.iter().map(Tensor::shallow_clone).collect(), output: host_output, scratch };
        let operation = self.start(Op::ReduceScatter, tag, Some(&outgoing), Some(&incoming), Some(sum))?;
        Ok(self.work(operation, copy_back))
    }

    fn all_reduce(&self, tensor: &Tensor, tag: Tag) -> Result<Box<dyn Work>, Error> {
        let Rank { rank, world } = self.group.rank;
        check("all-reduce", tensor, frame::has_code(tensor.kind()), "fp32, bf16, fp64, int64 or bytes")?;
        if self.is_sole() {
            return Ok(Box::new(super::Done));
        }
        let output = tensor.detach().view(-1);
        // Sent from a copy, because the sum overwrites the tensor while slow peers still take it.
        let all = Tensor::f_zeros([i64::from(world) * output.numel() as i64], (output.kind(), Device::Cpu))
            .map_err(|e| Error::Backend(e.to_string()))?;
        let parts = self.parts(&all);
        copy(&parts[rank as usize], &output)?;
        let mine = parts.iter().map(|_| parts[rank as usize].shallow_clone()).collect();
        let (host_output, copy_back) = match output.device() {
            Device::Cpu => (output, None),
            _ => {
                let host_output = output.zeros_like().to_device(Device::Cpu);
                (host_output.shallow_clone(), Some((output, host_output)))
            }
        };
        let sum = Sum {
            parts: parts.iter().map(Tensor::shallow_clone).collect(),
            output: host_output,
            scratch: Vec::new(),
        };
        let operation = self.start(Op::AllReduce, tag, Some(&mine), Some(&parts), Some(sum))?;
        Ok(self.work(operation, copy_back))
    }

    fn barrier(&self) -> Result<(), Error> {
        if self.is_sole() {
            return Ok(());
        }
        let operation = self.start(Op::Barrier, Tag { unit: None, what: "barrier" }, None, None, None)?;
        self.group.wait(&operation)
    }

    fn abort(&self, reason: &str) {
        self.group.fail(Error::Aborted(reason.to_owned()));
    }
}

impl Drop for TcpCommunicator {
    fn drop(&mut self) {
        self.group.finish(End::Left);
        // Senders deliver what is queued and say farewell; none of them waits long.
        for thread in self.senders.drain(..) {
            let _ = thread.join();
        }
        self.group.shutdown(Shutdown::Both);
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

struct TcpWork {
    group: Arc<Group>,
    pool: Arc<Pool>,
    operation: Arc<Operation>,
    /// To a GPU tensor, from the host's.
    copy_back: Option<(Tensor, Tensor)>,
}

impl Work for TcpWork {
    fn wait(self: Box<Self>) -> Result<(), Error> {
        self.group.wait(&self.operation)?;
        if let Some((to, from)) = self.copy_back {
            copy(&to, &from)?;
            self.pool.put(from);
        }
        Ok(())
    }
}

/// Blocks until the elements are there, also to and from a GPU.
fn copy(to: &Tensor, from: &Tensor) -> Result<(), Error> {
    to.shallow_clone().f_copy_(from).map_err(|e| Error::Backend(format!("staging: {e}")))
}

fn check(op: &'static str, tensor: &Tensor, holds: bool, rule: &str) -> Result<(), Error> {
    let refuse = |rule: &str| {
        let got = format!("{:?} {:?} on {:?}", tensor.kind(), tensor.size(), tensor.device());
        Err(Error::Tensor { op, rule: format!("the tensor must be {rule}"), got })
    };
    if !tensor.is_contiguous() {
        return refuse("contiguous");
    }
    if !frame::has_code(tensor.kind()) {
        return refuse("fp32, bf16, fp64, int64 or bytes");
    }
    if holds { Ok(()) } else { refuse(rule) }
}

/// Whether two contiguous tensors share memory.
fn overlap(a: &Tensor, b: &Tensor) -> bool {
    let span = |t: &Tensor| {
        let begin = t.data_ptr() as usize;
        begin..begin + t.numel() * t.kind().elt_size_in_bytes()
    };
    let (a, b) = (span(a), span(b));
    a.start < b.end && b.start < a.end
}
