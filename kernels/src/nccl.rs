//! libtorch's `c10d::ProcessGroupNCCL`: PyTorch's own streams, time-outs and abort.
//!
//! Operations are asynchronous and ordered: every rank must start the same ones in the same
//! order, from one thread. The bootstrap goes through a [`Store`] of the caller's, so that no
//! unauthenticated port is opened.
//!
//! What c10d does about a failed or late operation is set by environment variables, which it reads
//! when a group is made: whoever starts a process that joins one sets them. [`Progress`] lets the
//! caller watch over its operations itself.

use std::ffi::{c_char, c_int, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Duration;

use tch::Tensor;
use tunefleet_kernels_sys as sys;

use crate::{Error, ffi};

/// Key-value store that all ranks of the group see.
pub trait Store: Send + Sync {
    /// Publishes a value; false when that is not possible any more.
    fn set(&self, key: &str, value: &[u8]) -> bool;
    /// Waits for a value; `None` when it will not come.
    fn get(&self, key: &str) -> Option<Vec<u8>>;
}

/// One rank's membership in an NCCL group.
pub struct Group {
    raw: *mut sys::tf_nccl,
    /// Boxed inside: the C side holds the address of the inner fat pointer.
    store: Arc<Box<dyn Store>>,
}

// SAFETY: ProcessGroupNCCL locks its own state; the pointer is not tied to a thread.
unsafe impl Send for Group {}
// SAFETY: as above. Operations from several threads would be memory-safe, though their order
// would not be defined: the owner starts them from one thread. `abort` is made for other threads.
unsafe impl Sync for Group {}

/// A started operation.
pub struct Work {
    progress: Arc<Progress>,
    waited: bool,
}

/// How far an operation is, for threads other than the one that started it. It may outlive the
/// [`Work`] that it is of.
pub struct Progress {
    raw: *mut sys::tf_work,
    /// A c10d::Work keeps its group's store, which calls back into this one.
    _store: Arc<Box<dyn Store>>,
}

// SAFETY: a c10d::Work is reference-counted, and may be waited for and freed on any thread.
unsafe impl Send for Progress {}
// SAFETY: c10d's own watchdog thread asks a Work whether it is complete while another thread waits
// for it; what the two share is behind the Work's lock.
unsafe impl Sync for Progress {}

impl Group {
    /// Joins `world` ranks as `rank` on GPU `device`; returns when all have connected.
    ///
    /// # Errors
    /// [`Error::NoCuda`] without a GPU; [`Error::Torch`] when the group does not form.
    pub fn join(
        rank: u32,
        world: u32,
        device: i32,
        store: Box<dyn Store>,
        timeout: Duration,
    ) -> Result<Self, Error> {
        let store = Arc::new(store);
        let context: *const Box<dyn Store> = &*store;
        let callbacks = sys::tf_store { context: context.cast_mut().cast(), set: store_set, get: store_get };
        let timeout_ms = i64::try_from(timeout.as_millis()).unwrap_or(i64::MAX);
        let mut raw = std::ptr::null_mut();
        // SAFETY: `callbacks` is copied by the call; its context is the heap address of `store`,
        // which this Group and each Work of it keep alive.
        let status = unsafe {
            sys::tf_nccl_join(rank as c_int, world as c_int, device, &callbacks, timeout_ms, &mut raw)
        };
        ffi::check("joining the NCCL group", status)?;
        Ok(Group { raw, store })
    }

    /// `output` `[world * n]` = every rank's `input` `[n]`, in rank order. `input` may be this
    /// rank's part of `output`.
    ///
    /// # Errors
    /// [`Error::Torch`] with libtorch's message.
    pub fn all_gather(&self, output: &Tensor, input: &Tensor) -> Result<Work, Error> {
        self.start("NCCL all-gather", |group, work| {
            // SAFETY: live tensors and group; `work` is a valid place for the handle.
            unsafe { sys::tf_nccl_all_gather(group, ffi::ptr(output), ffi::ptr(input), work) }
        })
    }

    /// `output` `[n]` = sum over ranks of their `input` `[world * n]` at this rank's position.
    ///
    /// # Errors
    /// [`Error::Torch`] with libtorch's message.
    pub fn reduce_scatter(&self, input: &Tensor, output: &Tensor) -> Result<Work, Error> {
        self.start("NCCL reduce-scatter", |group, work| {
            // SAFETY: live tensors and group; `work` is a valid place for the handle.
            unsafe { sys::tf_nccl_reduce_scatter(group, ffi::ptr(output), ffi::ptr(input), work) }
        })
    }

    /// In place sum over ranks.
    ///
    /// # Errors
    /// [`Error::Torch`] with libtorch's message.
    pub fn all_reduce(&self, tensor: &Tensor) -> Result<Work, Error> {
        self.start("NCCL all-reduce", |group, work| {
            // SAFETY: live tensor and group; `work` is a valid place for the handle.
            unsafe { sys::tf_nccl_all_reduce(group, ffi::ptr(tensor), work) }
        })
    }

    /// From any thread: fails what is under way.
    ///
    /// # Errors
    /// [`Error::Torch`] with libtorch's message.
    pub fn abort(&self) -> Result<(), Error> {
        // SAFETY: the group lives as long as self; abort is made to be called beside operations.
        let status = unsafe { sys::tf_nccl_abort(self.raw) };
        ffi::check("aborting the NCCL group", status)
    }

    fn start(
        &self,
        op: &'static str,
        call: impl FnOnce(*mut sys::tf_nccl, *mut *mut sys::tf_work) -> c_int,
    ) -> Result<Work, Error> {
        let mut raw = std::ptr::null_mut();
        ffi::check(op, call(self.raw, &mut raw))?;
        let progress = Arc::new(Progress { raw, _store: Arc::clone(&self.store) });
        Ok(Work { progress, waited: false })
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        // SAFETY: made by tf_nccl_join, freed once, and the store outlives this call.
        unsafe { sys::tf_nccl_free(self.raw) };
    }
}

impl Work {
    /// Orders the current stream after the operation; the host does not wait.
    ///
    /// # Errors
    /// [`Error::Torch`] when the operation failed.
    pub fn wait(self) -> Result<(), Error> {
        let mut this = self;
        this.join()
    }

    /// A view of this operation for other threads.
    pub fn progress(&self) -> Arc<Progress> {
        Arc::clone(&self.progress)
    }

    fn join(&mut self) -> Result<(), Error> {
        if std::mem::replace(&mut self.waited, true) {
            return Ok(());
        }
        // SAFETY: made by a start call, and freed only when the last holder of `progress` goes.
        let status = unsafe { sys::tf_nccl_wait(self.progress.raw) };
        ffi::check("waiting for a collective", status)
    }
}

impl Progress {
    /// Whether the device is through with the operation; waits for nothing. One that failed, or that
    /// cannot be looked at, never is.
    pub fn is_complete(&self) -> bool {
        let mut complete = 0;
        // SAFETY: a live handle, and a valid place for the answer.
        let status = unsafe { sys::tf_nccl_is_complete(self.raw, &mut complete) };
        ffi::check("looking at a collective", status).is_ok() && complete != 0
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        // SAFETY: made by a start call and freed here, once: nobody else holds the handle any more.
        unsafe { sys::tf_work_free(self.raw) };
    }
}

impl Drop for Work {
    fn drop(&mut self) {
        // An operation nobody waits for still holds its tensors: join it, its error is not wanted.
        let _ = self.join();
    }
}

/// The store, key and nothing else, from what C++ passes.
///
/// # Safety
/// `context` is the address of a live `Box<dyn Store>`; `key` points to `key_len` bytes.
unsafe fn store_and_key<'a>(
    context: *mut c_void,
    key: *const c_char,
    key_len: usize,
) -> (&'a dyn Store, std::borrow::Cow<'a, str>) {
    // SAFETY: the caller vouches for the context.
    let store = unsafe { &*context.cast::<Box<dyn Store>>() };
    // SAFETY: the caller vouches for the key.
    let key = unsafe { std::slice::from_raw_parts(key.cast::<u8>(), key_len) };
    (store.as_ref(), String::from_utf8_lossy(key))
}

unsafe extern "C" fn store_set(
    context: *mut c_void,
    key: *const c_char,
    key_len: usize,
    value: *const u8,
    value_len: usize,
) -> c_int {
    // SAFETY: C++ passes back the context of `join`, whose store lives as long as the group, and a
    // key it owns during the call.
    let (store, key) = unsafe { store_and_key(context, key, key_len) };
    // SAFETY: C++ passes a vector's data and size; an empty vector's data may be null.
    let value = if value_len == 0 { &[] } else { unsafe { std::slice::from_raw_parts(value, value_len) } };
    // A panic must not cross into C++.
    let stored = catch_unwind(AssertUnwindSafe(|| store.set(&key, value))).unwrap_or(false);
    c_int::from(!stored)
}

unsafe extern "C" fn store_get(
    context: *mut c_void,
    key: *const c_char,
    key_len: usize,
    value: *mut u8,
    value_len: *mut usize,
) -> c_int {
    // SAFETY: as in `store_set`.
    let (store, key) = unsafe { store_and_key(context, key, key_len) };
    let Some(found) = catch_unwind(AssertUnwindSafe(|| store.get(&key))).ok().flatten() else {
        return 1;
    };
    // SAFETY: C++ passes the address of its own size_t.
    let capacity = unsafe { &mut *value_len };
    if found.len() > *capacity {
        return 1;
    }
    *capacity = found.len();
    // SAFETY: `value` has room for the capacity, which was checked; the buffers do not overlap.
    unsafe { std::ptr::copy_nonoverlapping(found.as_ptr(), value, found.len()) };
    0
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Unused;

    impl Store for Unused {
        fn set(&self, _key: &str, _value: &[u8]) -> bool {
            true
        }
        fn get(&self, _key: &str) -> Option<Vec<u8>> {
            None
        }
    }

    #[test]
    fn joining_without_a_gpu_is_a_clear_error() {
        if tch::Cuda::is_available() {
            println!("skipped: this machine has a GPU");
            return;
        }
        let error = Group::join(0, 1, 0, Box::new(Unused), Duration::from_secs(1)).err().unwrap();
        assert!(matches!(error, Error::NoCuda(_)), "{error}");
    }
}
