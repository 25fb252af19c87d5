//! Statuses to results, tensors to pointers.

use std::ffi::{CStr, c_int};

use tch::Tensor;
use tunefleet_kernels_sys as sys;

use crate::Error;

/// Turns the status of a call on this thread into a result.
pub(crate) fn check(op: &'static str, status: c_int) -> Result<(), Error> {
    if status == sys::TF_OK {
        return Ok(());
    }
    // SAFETY: no precondition; the string is thread-local in C++, terminated, and lives until this
    // thread's next call, which is after the copy below.
    let raw = unsafe { sys::tf_last_error() };
    // SAFETY: as above; `raw` is never null (c_str of a std::string).
    let text = unsafe { CStr::from_ptr(raw) }.to_string_lossy();
    // The rest of a libtorch message is its C++ stack.
    let message = text.lines().next().unwrap_or_default().trim_end_matches('.').to_owned();
    Err(if status == sys::TF_NO_CUDA { Error::NoCuda(message) } else { Error::Torch { op, message } })
}

/// The `at::Tensor*` behind `tensor`. The C side reads it, or writes the tensor's elements, which
/// tch's own in-place methods do through shared references as well.
pub(crate) fn ptr(tensor: &Tensor) -> sys::tf_tensor {
    tensor.as_ptr().cast_mut().cast()
}

/// [`ptr`] of each.
pub(crate) fn ptrs(tensors: &[Tensor]) -> Vec<sys::tf_tensor> {
    tensors.iter().map(ptr).collect()
}

/// Takes ownership of tensors that a call returned.
///
/// # Safety
/// Each pointer is an `at::Tensor*` from `new`, and nobody else owns it.
pub(crate) unsafe fn owned(raw: Vec<sys::tf_tensor>) -> Vec<Tensor> {
    raw.into_iter()
        .map(|p| {
            // SAFETY: the caller vouches for the pointer and its ownership.
            unsafe { Tensor::from_ptr(p.cast()) }
        })
        .collect()
}
