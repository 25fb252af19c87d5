//! Sums in the order of ranks, whatever order the parts arrived in; and the memory they need.

use std::sync::{Mutex, MutexGuard, PoisonError};

use tch::{Device, Kind, TchError, Tensor};

use crate::comm::Error;

/// One part per rank, in rank order, to be added into `output`.
pub struct Sum {
    /// All of one dtype and length.
    pub parts: Vec<Tensor>,
    /// fp32, or of the parts' dtype.
    pub output: Tensor,
    /// Memory to be given back afterwards.
    pub scratch: Vec<Tensor>,
}

impl Sum {
    /// `((p0 + p1) + p2) + ...`; 16-bit parts are added in fp32 and rounded once.
    ///
    /// # Errors
    /// [`Error::Backend`] with libtorch's message.
    pub fn run(&self) -> Result<(), Error> {
        self.add_up().map_err(|e| Error::Backend(format!("adding up: {e}")))
    }

    fn add_up(&self) -> Result<(), TchError> {
        let mut output = self.output.shallow_clone();
        let [first, rest @ ..] = self.parts.as_slice() else { return Ok(()) };
        if let [second, rest @ ..] = rest
            && first.kind() == output.kind()
            && first.kind() != Kind::BFloat16
        {
            // The first two in one pass over memory.
            let _ = first.f_add_out(&output, second)?;
            return add_all(&mut output, rest);
        }
        if output.kind() != Kind::BFloat16 {
            output.f_copy_(first)?;
            return add_all(&mut output, rest);
        }
        let mut sum = first.f_to_kind(Kind::Float)?;
        add_all(&mut sum, rest)?;
        output.f_copy_(&sum)
    }
}

fn add_all(sum: &mut Tensor, parts: &[Tensor]) -> Result<(), TchError> {
    for part in parts {
        let _ = sum.f_add_(part)?;
    }
    Ok(())
}

/// Buffers that are kept: fresh ones cost a page fault per 4 KiB, more than the network does.
#[derive(Default)]
pub struct Pool(Mutex<Vec<Tensor>>);

/// At most two operations of a kind are under way in the block walk; on a GPU each has three.
const KEPT: usize = 8;

impl Pool {
    /// A CPU tensor of `elements`; pinned when it is to be copied from or to `device`, a GPU.
    pub fn take(&self, kind: Kind, elements: i64, device: Device) -> Result<Tensor, Error> {
        let fits = |t: &Tensor| {
            t.kind() == kind && t.numel() as i64 == elements && (!device.is_cuda() || t.is_pinned(device))
        };
        let mut kept = self.lock();
        if let Some(at) = kept.iter().position(fits) {
            return Ok(kept.remove(at));
        }
        drop(kept);
        let fresh = Tensor::f_zeros([elements], (kind, Device::Cpu));
        let fresh = if device.is_cuda() { fresh.and_then(|t| t.f_pin_memory(device)) } else { fresh };
        fresh.map_err(|e| Error::Backend(format!("a buffer of {elements} elements: {e}")))
    }

    /// Keeps `tensor` for the next [`Pool::take`]; the oldest goes when there are too many.
    pub fn put(&self, tensor: Tensor) {
        let mut kept = self.lock();
        if kept.len() >= KEPT {
            drop(kept.remove(0));
        }
        kept.push(tensor);
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Tensor>> {
        // No critical section leaves the list half-changed.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
