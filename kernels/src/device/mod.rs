//! What the machine can do, and what it must do.

mod attention;

use std::sync::OnceLock;

use tch::{Device, Kind, Tensor};
use tunefleet_kernels_sys as sys;

pub use attention::assert_fused_attention;

use crate::{Error, ffi};

/// Whether CPU matrix products in bf16 run on hardware instructions (AVX-512 and up). Without
/// them libtorch falls back to a loop several times slower than fp32.
pub fn cpu_bf16_matmul_is_native() -> bool {
    static NATIVE: OnceLock<bool> = OnceLock::new();
    *NATIVE.get_or_init(|| {
        let mut native = 0;
        // SAFETY: `native` is a valid place to write one int.
        let status = unsafe { sys::tf_cpu_bf16_matmul_is_native(&mut native) };
        ffi::check("bf16 probe", status).is_ok() && native != 0
    })
}

/// Only deterministic algorithms from here on, in this process.
///
/// # Errors
/// [`Error::Torch`] with libtorch's message.
pub fn set_deterministic(on: bool) -> Result<(), Error> {
    if on {
        settle();
    }
    // SAFETY: no precondition.
    let status = unsafe { sys::tf_set_deterministic(on.into()) };
    ffi::check("deterministic switch", status)
}

/// From here on this process keeps the memory of freed CPU tensors of up to 32 MiB for the next ones.
/// Given back and taken again, every page costs a fault and is filled with zeros: a quarter of a
/// training step on a CPU.
pub fn keep_freed_memory() {
    // SAFETY: no precondition.
    unsafe { sys::tf_keep_freed_memory() };
}

/// Memory of CPU tensors, bytes as they asked for them; what the C allocator adds or keeps is not in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CpuMemory {
    /// In live tensors now.
    pub allocated: i64,
    /// Most in live tensors since the start or the last reset.
    pub allocated_peak: i64,
}

/// From here on this process counts the memory of CPU tensors. Call it before the first tensor: those
/// made before are not counted, and no second call changes anything.
///
/// # Errors
/// [`Error::Torch`] with libtorch's message.
pub fn count_cpu_memory() -> Result<(), Error> {
    // SAFETY: no precondition; tensors made before keep the deleters that they were made with.
    let status = unsafe { sys::tf_count_cpu_memory() };
    ffi::check("counting CPU memory", status)
}

/// What counted CPU tensors take; zeros before [`count_cpu_memory`].
pub fn cpu_memory() -> CpuMemory {
    let mut raw = sys::tf_cpu_memory::default();
    // SAFETY: `raw` is a valid place to write the struct.
    unsafe { sys::tf_cpu_memory(&mut raw) };
    CpuMemory { allocated: raw.allocated, allocated_peak: raw.allocated_peak }
}

/// Begins a new peak measurement of CPU tensors.
pub fn reset_cpu_peak() {
    // SAFETY: no precondition.
    unsafe { sys::tf_cpu_reset_peak() };
}

/// Makes the first calls of the mathematical libraries on one thread. They look then which
/// instructions the CPU has; of two threads that are first together, one may compute a little
/// otherwise than ever after, and a run does not repeat bit for bit.
fn settle() {
    static ONCE: std::sync::Once = std::sync::Once::new();
    ONCE.call_once(|| {
        let threads = tch::get_num_threads();
        tch::set_num_threads(1);
        for kind in [Kind::Float, Kind::Double, Kind::BFloat16] {
            let x = Tensor::full([64, 64], 0.5, (kind, Device::Cpu));
            let _ = (x.exp(), x.log(), x.erf(), x.tanh(), x.sqrt(), x.sin(), x.cos());
            let _ = (x.mm(&x), x.softmax(-1, kind), x.gelu("none"), x.gelu("tanh"), x.bernoulli());
        }
        tch::set_num_threads(threads);
    });
}

/// GPU memory of libtorch's caching allocator, bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CudaMemory {
    /// In live tensors now.
    pub allocated: i64,
    /// Most in live tensors since the start or the last reset.
    pub allocated_peak: i64,
    /// Held from the driver now.
    pub reserved: i64,
    /// Most held since the start or the last reset.
    pub reserved_peak: i64,
}

/// Memory figures of GPU `device`.
///
/// # Errors
/// [`Error::NoCuda`] without a GPU.
pub fn cuda_memory(device: i32) -> Result<CudaMemory, Error> {
    let mut raw = sys::tf_cuda_memory::default();
    // SAFETY: `raw` is a valid place to write the struct.
    let status = unsafe { sys::tf_cuda_memory(device, &mut raw) };
    ffi::check("GPU memory", status)?;
    Ok(CudaMemory {
        allocated: raw.allocated,
        allocated_peak: raw.allocated_peak,
        reserved: raw.reserved,
        reserved_peak: raw.reserved_peak,
    })
}

/// Begins a new peak measurement on GPU `device`.
///
/// # Errors
/// [`Error::NoCuda`] without a GPU.
pub fn reset_cuda_peak(device: i32) -> Result<(), Error> {
    // SAFETY: no precondition.
    let status = unsafe { sys::tf_cuda_reset_peak(device) };
    ffi::check("GPU memory", status)
}

/// fp32 zeros `[len]` on GPU `device`, in memory that it shares with the host: pages move to where they
/// are used, and those that do not fit the GPU stay in main memory.
///
/// # Errors
/// [`Error::NoCuda`] without a GPU; [`Error::Torch`] when main memory does not suffice.
pub fn managed_zeros(len: i64, device: usize) -> Result<Tensor, Error> {
    let mut out = std::ptr::null_mut();
    let device = i32::try_from(device).unwrap_or(i32::MAX);
    // SAFETY: `out` is a valid place for one pointer.
    let status = unsafe { sys::tf_cuda_managed_zeros(len, device, &mut out) };
    ffi::check("managed memory", status)?;
    // SAFETY: on success the call wrote a tensor made by `new` for us.
    Ok(unsafe { ffi::owned(vec![out]) }.remove(0))
}

/// What tells GPU `device` from every other GPU or MIG instance, on any machine.
///
/// # Errors
/// [`Error::NoCuda`] without a GPU.
pub fn cuda_uuid(device: i32) -> Result<[u8; 16], Error> {
    let mut uuid = [0; 16];
    // SAFETY: `uuid` is a valid place to write 16 bytes.
    let status = unsafe { sys::tf_cuda_uuid(device, uuid.as_mut_ptr()) };
    ffi::check("GPU identity", status)?;
    Ok(uuid)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_a_gpu_the_error_says_so_and_what_to_do() {
        if tch::Cuda::is_available() {
            println!("skipped: this machine has a GPU");
            return;
        }
        let message = cuda_memory(0).unwrap_err().to_string();
        assert!(message.contains("no CUDA device"), "{message}");
        assert!(message.contains("train.device"), "{message}");
    }
}
