//! The communicator of GPU ranks: libtorch's NCCL group. Operations run on NCCL's own streams;
//! waiting orders the compute stream after them and never stops the host.
//!
//! One communicator has one order, which is that of the walk: in the backward pass the gather of
//! block i-1 is enqueued before the reduction of block i, so that the reduction never delays the
//! weights that are needed next. One thread enqueues for all of a rank's communicators, in an order that
//! is the same on all ranks: no two ranks can meet two communicators in different orders and wait for
//! each other for ever.
//!
//! What becomes of a late or failed operation is decided by this process's watchdog and by the
//! coordinator, not by c10d: see [`SETTINGS`].

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use tch::{Device, Kind, Tensor};
use tunefleet_kernels::nccl::{self, Group, Store};
use tunefleet_proto::ids::Rank;

use super::{Communicator, Completion, Error, Tag, Work};

/// Environment of a process that joins a group, said and not left to defaults: c10d reads it when the
/// group is made. Names and meanings are those of PyTorch 2.11, `ProcessGroupNCCL.hpp`.
pub const SETTINGS: [(&str, &str); 9] = [
    // NoHandling: c10d's watchdog notes errors and time-outs, and neither aborts communicators nor ends
    // the process: it cannot know which rank is to blame. An abort comes from the session's thread.
    ("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0"),
    // Waiting orders streams. A host that blocked in it could not be unblocked by an abort at once.
    ("TORCH_NCCL_BLOCKING_WAIT", "0"),
    // The monitor ends a process whose c10d watchdog is stuck, with no report: the daemon's SIGKILL does.
    ("TORCH_NCCL_ENABLE_MONITORING", "0"),
    // Read all the same; as long as no monitor runs it ends nothing.
    ("TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC", "600"),
    // These three speak to other ranks through the bootstrap's store, which serves one value only.
    ("TORCH_NCCL_DUMP_ON_TIMEOUT", "0"),
    ("TORCH_NCCL_PROPAGATE_ERROR", "0"),
    ("TORCH_NCCL_DESYNC_DEBUG", "0"),
    // c10d's own recorder: the record of collectives says more, and is kept for every communicator.
    ("TORCH_FR_BUFFER_SIZE", "0"),
    // One root for any number of ranks: more would need more bootstrap values.
    ("TORCH_NCCL_RANKS_PER_ROOT", "1024"),
];

/// A rank's membership in a group of GPUs.
pub struct NcclCommunicator {
    group: Group,
    rank: Rank,
    device: Device,
    aborted: Arc<OnceLock<String>>,
}

impl NcclCommunicator {
    /// Joins the group whose bootstrap values travel through `store`. After `timeout` c10d counts a
    /// collective as failed; with [`SETTINGS`] it does no more about it.
    ///
    /// # Errors
    /// [`Error::Join`] without a GPU, or when the group does not form.
    pub fn join(rank: Rank, gpu: usize, store: Box<dyn Store>, timeout: Duration) -> Result<Self, Error> {
        let device = i32::try_from(gpu).map_err(|_| Error::Join(format!("no GPU {gpu}")))?;
        let group = Group::join(rank.rank, rank.world, device, store, timeout)
            .map_err(|e| Error::Join(e.to_string()))?;
        Ok(NcclCommunicator { group, rank, device: Device::Cuda(gpu), aborted: Arc::default() })
    }

    fn check(&self, op: &'static str, tensor: &Tensor, multiple: i64) -> Result<(), Error> {
        let refuse = |rule: String, got: String| Err(Error::Tensor { op, rule, got });
        if let Some(reason) = self.aborted.get() {
            return Err(Error::Aborted(reason.clone()));
        }
        if tensor.device() != self.device {
            return refuse(format!("tensor must be on {:?}", self.device), format!("{:?}", tensor.device()));
        }
        if !tensor.is_contiguous() {
            return refuse("tensor must be contiguous".to_owned(), format!("strides {:?}", tensor.stride()));
        }
        if tensor.numel() as i64 % multiple != 0 {
            return refuse(format!("elements must be a multiple of {multiple}"), tensor.numel().to_string());
        }
        Ok(())
    }

    fn work(&self, started: Result<nccl::Work, tunefleet_kernels::Error>) -> Result<Box<dyn Work>, Error> {
        let work = started.map_err(|e| Error::Backend(e.to_string()))?;
        Ok(Box::new(NcclWork { work, aborted: Arc::clone(&self.aborted) }))
    }
}

struct NcclWork {
    work: nccl::Work,
    aborted: Arc<OnceLock<String>>,
}

impl Work for NcclWork {
    fn wait(self: Box<Self>) -> Result<(), Error> {
        let outcome = self.work.wait();
        match self.aborted.get() {
            Some(reason) => Err(Error::Aborted(reason.clone())),
            None => outcome.map_err(|e| Error::Backend(e.to_string())),
        }
    }

    fn completion(&self) -> Option<Arc<dyn Completion>> {
        Some(self.work.progress())
    }
}

/// A sum that is copied to a tensor of another dtype.
struct Widened {
    work: Box<dyn Work>,
    sum: Tensor,
    output: Tensor,
}

impl Work for Widened {
    fn wait(self: Box<Self>) -> Result<(), Error> {
        let Widened { work, sum, mut output } = *self;
        work.wait()?;
        output.f_copy_(&sum).map_err(|e| Error::Backend(e.to_string()))
    }

    fn completion(&self) -> Option<Arc<dyn Completion>> {
        self.work.completion()
    }
}

impl Completion for nccl::Progress {
    fn is_complete(&self) -> bool {
        nccl::Progress::is_complete(self)
    }
}

impl Communicator for NcclCommunicator {
    fn rank(&self) -> Rank {
        self.rank
    }

    fn all_gather(&self, buffer: &Tensor, _tag: Tag) -> Result<Box<dyn Work>, Error> {
        self.check("all-gather", buffer, self.rank.world.into())?;
        let len = buffer.numel() as i64 / i64::from(self.rank.world);
        let own = buffer.view([-1]).narrow(0, i64::from(self.rank.rank) * len, len);
        self.work(self.group.all_gather(&buffer.view([-1]), &own))
    }

    fn reduce_scatter(&self, input: &Tensor, output: &Tensor, _tag: Tag) -> Result<Box<dyn Work>, Error> {
        self.check("reduce-scatter", input, self.rank.world.into())?;
        self.check("reduce-scatter", output, 1)?;
        if input.kind() == output.kind() {
            return self.work(self.group.reduce_scatter(input, output));
        }
        // c10d wants one dtype: the sum arrives in the input's.
        let sum = Tensor::empty(output.size(), (input.kind(), self.device));
        let work = self.work(self.group.reduce_scatter(input, &sum))?;
        Ok(Box::new(Widened { work, sum, output: output.shallow_clone() }))
    }

    fn all_reduce(&self, tensor: &Tensor, _tag: Tag) -> Result<Box<dyn Work>, Error> {
        self.check("all-reduce", tensor, 1)?;
        self.work(self.group.all_reduce(tensor))
    }

    fn barrier(&self) -> Result<(), Error> {
        let token = Tensor::zeros([1], (Kind::Float, self.device));
        self.all_reduce(&token, Tag { unit: None, what: "barrier" })?.wait()?;
        // Reading the value is what makes the host wait.
        let _ = token.double_value(&[0]);
        Ok(())
    }

    fn abort(&self, reason: &str) {
        if self.aborted.set(reason.to_owned()).is_err() {
            // Once is enough, and whoever comes second must not wait for the first.
            return;
        }
        if let Err(error) = self.group.abort() {
            tracing::warn!(%error, "aborting the NCCL group");
        }
    }
}
