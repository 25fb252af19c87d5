//! What live tensors take where a rank computes: in a GPU's memory, or in main memory for CPU ranks.

use tch::Device;
use tunefleet_kernels::{Error, device as kernels};

/// Bytes in live tensors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tensors {
    /// Now.
    pub bytes: u64,
    /// At most, since the start or the last reset.
    pub peak_bytes: u64,
}

/// Begins to count, before the first tensor is made.
///
/// # Errors
/// Whatever libtorch refuses.
pub fn count(device: Device) -> Result<(), Error> {
    if device == Device::Cpu { kernels::count_cpu_memory() } else { Ok(()) }
}

/// What live tensors take on `device`.
///
/// # Errors
/// Without that GPU.
pub fn tensors(device: Device) -> Result<Tensors, Error> {
    let (bytes, peak) = match device {
        Device::Cuda(index) => {
            let memory = kernels::cuda_memory(index as i32)?;
            (memory.allocated, memory.allocated_peak)
        }
        _ => {
            let memory = kernels::cpu_memory();
            (memory.allocated, memory.allocated_peak)
        }
    };
    Ok(Tensors { bytes: bytes.max(0) as u64, peak_bytes: peak.max(0) as u64 })
}

/// Begins a new peak.
///
/// # Errors
/// Without that GPU.
pub fn reset_peak(device: Device) -> Result<(), Error> {
    match device {
        Device::Cuda(index) => kernels::reset_cuda_peak(index as i32),
        _ => {
            kernels::reset_cpu_peak();
            Ok(())
        }
    }
}
