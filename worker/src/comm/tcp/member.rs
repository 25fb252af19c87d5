//! The operations: what of a tensor goes to which peer, what comes from it, and what is done with it.

use std::sync::Arc;

use tch::{Device, Kind, Tensor};
use tunefleet_proto::ids::Rank;

use super::frame::{self, Header, Op};
use super::group::{Group, Operation, PeerQueues};
use super::link::Transfer;
use super::sum::{Pool, Sum};
use crate::comm::{Completion, Done, Error, Tag, Work};

/// Sums of at least so many elements are made in parts, one a rank, which are gathered then: each
/// element travels twice, and not to every rank.
const SUM_IN_PARTS: usize = 16 * 1024;

/// Parts of a tensor, one per rank.
type Parts = Vec<Tensor>;

/// What starts operations.
#[derive(Clone)]
pub struct Member {
    /// The group.
    pub group: Arc<Group>,
    /// Memory for what arrives.
    pub pool: Arc<Pool>,
}

impl Member {
    /// Queues one operation: `outgoing[r]` goes to rank r, `incoming[r]` is filled by it.
    pub fn start(
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

    /// Whether there is nobody else.
    pub fn is_sole(&self) -> bool {
        self.group.rank.world == 1
    }

    /// `tensor` cut into one part per rank.
    fn parts(&self, tensor: &Tensor) -> Parts {
        let world = i64::from(self.group.rank.world);
        let n = tensor.numel() as i64 / world;
        (0..world).map(|r| tensor.narrow(0, r * n, n)).collect()
    }

    /// See [`crate::comm::Communicator::all_gather`].
    pub fn all_gather(&self, buffer: &Tensor, tag: Tag) -> Result<Box<dyn Work>, Error> {
        let Rank { rank, world } = self.group.rank;
        check("all-gather", buffer, buffer.numel().is_multiple_of(world as usize), "of world x n elements")?;
        if self.is_sole() {
            return Ok(Box::new(Done));
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

    /// See [`crate::comm::Communicator::reduce_scatter`].
    pub fn reduce_scatter(&self, input: &Tensor, output: &Tensor, tag: Tag) -> Result<Box<dyn Work>, Error> {
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
            return Ok(Box::new(Done));
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

    /// See [`crate::comm::Communicator::all_reduce`].
    pub fn all_reduce(&self, tensor: &Tensor, tag: Tag) -> Result<Box<dyn Work>, Error> {
        let Rank { rank, world } = self.group.rank;
        check("all-reduce", tensor, frame::has_code(tensor.kind()), "fp32, bf16, fp64, int64 or bytes")?;
        if self.is_sole() {
            return Ok(Box::new(Done));
        }
        let output = tensor.detach().view(-1);
        let elements = output.numel();
        if is_summed_in_parts(&output) && !elements.is_multiple_of(world as usize) {
            // What divides goes in parts, and the few that are left by themselves.
            let rest = (elements % world as usize) as i64;
            let most = elements as i64 - rest;
            let parts = self.all_reduce(&output.narrow(0, 0, most), tag)?;
            let rest = self.all_reduce(&output.narrow(0, most, rest), tag)?;
            return Ok(Box::new(Both(parts, rest)));
        }
        if is_summed_in_parts(&output) {
            let sum = self.pool.take(output.kind(), (elements / world as usize) as i64, Device::Cpu)?;
            return self.sum_in_parts(output, sum, tag);
        }
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

    /// Each rank's part of the sum goes to `sum`, and from there, while this is waited for, to all ranks.
    fn sum_in_parts(&self, whole: Tensor, sum: Tensor, tag: Tag) -> Result<Box<dyn Work>, Error> {
        let scatter = self.reduce_scatter(&whole, &sum, tag)?;
        Ok(Box::new(SumInParts { member: self.clone(), scatter, whole, sum, tag }))
    }

    /// See [`crate::comm::Communicator::barrier`].
    pub fn barrier(&self) -> Result<(), Error> {
        if self.is_sole() {
            return Ok(());
        }
        let operation = self.start(Op::Barrier, Tag { unit: None, what: "barrier" }, None, None, None)?;
        self.group.wait(&operation)
    }
}

/// Two operations as one.
struct Both(Box<dyn Work>, Box<dyn Work>);

impl Work for Both {
    fn wait(self: Box<Self>) -> Result<(), Error> {
        self.0.wait()?;
        self.1.wait()
    }
}

/// Whether a sum of `tensor` is made in parts, one by each rank: of short ones every rank adds up all.
pub fn is_summed_in_parts(tensor: &Tensor) -> bool {
    matches!(tensor.kind(), Kind::Float | Kind::BFloat16) && tensor.numel() >= SUM_IN_PARTS
}

struct SumInParts {
    member: Member,
    scatter: Box<dyn Work>,
    whole: Tensor,
    sum: Tensor,
    tag: Tag,
}

impl Work for SumInParts {
    fn wait(self: Box<Self>) -> Result<(), Error> {
        let SumInParts { member, scatter, whole, sum, tag } = *self;
        scatter.wait()?;
        copy(&member.parts(&whole)[member.group.rank.rank as usize], &sum)?;
        member.all_gather(&whole, tag)?.wait()?;
        member.pool.put(sum);
        Ok(())
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

    fn completion(&self) -> Option<Arc<dyn Completion>> {
        Some(self.operation.clone())
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
