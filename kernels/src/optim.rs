//! Fused optimizer update and norms.

use tch::{Kind, Tensor};
use tunefleet_kernels_sys as sys;

use crate::{Error, ffi};

/// Settings of one AdamW update (Loshchilov and Hutter 2019), as in `torch.optim.AdamW`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamW {
    /// Learning rate of this step.
    pub learning_rate: f64,
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// Added to the root of the second moment.
    pub epsilon: f64,
}

impl AdamW {
    fn raw(self) -> sys::tf_adamw {
        let AdamW { learning_rate, beta1, beta2, weight_decay, epsilon } = self;
        sys::tf_adamw { learning_rate, beta1, beta2, weight_decay, epsilon }
    }
}

/// One tensor's share of an update: four fp32 tensors of one shape on one device.
pub struct AdamWState {
    /// Weights, updated in place.
    pub param: Tensor,
    /// Gradients; divided by the divisor in place.
    pub grad: Tensor,
    /// First moment, updated in place.
    pub exp_avg: Tensor,
    /// Second moment, updated in place.
    pub exp_avg_sq: Tensor,
}

/// Updates every tensor in one pass, without a host synchronisation: gradients are divided by
/// `grad_divisor`, and nothing changes where `found_nonfinite` is 1 (both fp32 scalars on the
/// tensors' device). `step` (fp32 scalar, same device) counts from 1.
///
/// # Errors
/// [`Error::Precondition`] for a tensor that is not fp32; [`Error::Torch`] otherwise.
pub fn fused_adamw(
    tensors: &[AdamWState],
    step: &Tensor,
    grad_divisor: &Tensor,
    found_nonfinite: &Tensor,
    options: AdamW,
) -> Result<(), Error> {
    if tensors.is_empty() {
        return Ok(());
    }
    for state in tensors {
        for tensor in [&state.param, &state.grad, &state.exp_avg, &state.exp_avg_sq] {
            if tensor.kind() != Kind::Float || tensor.size() != state.param.size() {
                return Err(Error::Precondition {
                    op: "fused AdamW",
                    rule: "must be fp32 and of its parameter's shape",
                    got: format!("{:?} {:?}", tensor.kind(), tensor.size()),
                });
            }
        }
    }
    let column = |field: fn(&AdamWState) -> &Tensor| -> Vec<sys::tf_tensor> {
        tensors.iter().map(|state| ffi::ptr(field(state))).collect()
    };
    let params = column(|s| &s.param);
    let grads = column(|s| &s.grad);
    let exp_avgs = column(|s| &s.exp_avg);
    let exp_avg_sqs = column(|s| &s.exp_avg_sq);
    let options = options.raw();
    // SAFETY: each array holds `tensors.len()` live `at::Tensor*`; kinds and shapes were checked
    // above; the scalars and `options` are borrowed for the call.
    let status = unsafe {
        sys::tf_fused_adamw(
            params.as_ptr(),
            grads.as_ptr(),
            exp_avgs.as_ptr(),
            exp_avg_sqs.as_ptr(),
            tensors.len(),
            ffi::ptr(step),
            ffi::ptr(grad_divisor),
            ffi::ptr(found_nonfinite),
            &options,
        )
    };
    ffi::check("fused AdamW", status)
}

/// One tensor's share of an 8-bit update; all dense, of one length, on one device.
pub struct AdamW8State<'a> {
    /// fp32 weights, updated in place.
    pub param: &'a Tensor,
    /// fp32 gradients; left as they are.
    pub grad: &'a Tensor,
    /// First moment: bytes into `signed8`, updated in place.
    pub exp_avg: &'a Tensor,
    /// Its scales, fp32, one per 256 elements: the largest value of each, with its sign.
    pub exp_avg_scales: &'a Tensor,
    /// Second moment: bytes into `unsigned8`, updated in place.
    pub exp_avg_sq: &'a Tensor,
    /// Its scales.
    pub exp_avg_sq_scales: &'a Tensor,
    /// [`crate::quant::dynamic_code`], signed.
    pub signed8: &'a Tensor,
    /// The same, unsigned.
    pub unsigned8: &'a Tensor,
}

/// As [`fused_adamw`], with moments of 8 bits (Dettmers et al. 2022). The update uses the moments before
/// they are rounded again.
///
/// # Errors
/// [`Error::Precondition`] for tensors that do not fit.
pub fn adamw_8bit(
    state: &AdamW8State<'_>,
    step: u64,
    grad_divisor: &Tensor,
    found_nonfinite: &Tensor,
    options: AdamW,
) -> Result<(), Error> {
    const OP: &str = "8-bit AdamW";
    let len = state.param.numel() as i64;
    let blocks = crate::quant::blocks(len, crate::quant::DOUBLE_BLOCK);
    let parts = [
        (state.param, len, Kind::Float),
        (state.grad, len, Kind::Float),
        (state.exp_avg, len, Kind::Uint8),
        (state.exp_avg_sq, len, Kind::Uint8),
        (state.exp_avg_scales, blocks, Kind::Float),
        (state.exp_avg_sq_scales, blocks, Kind::Float),
        (state.signed8, 256, Kind::Float),
        (state.unsigned8, 256, Kind::Float),
        (grad_divisor, 1, Kind::Float),
        (found_nonfinite, 1, Kind::Float),
    ];
    for (tensor, len, kind) in parts {
        let fits = tensor.numel() as i64 == len
            && tensor.kind() == kind
            && tensor.device() == state.param.device()
            && tensor.is_contiguous();
        if !fits {
            return Err(Error::Precondition {
                op: OP,
                rule: "must be dense, on its parameter's device and of the right length and dtype",
                got: format!("{} of {:?}, expected {len} of {kind:?}", tensor.numel(), tensor.kind()),
            });
        }
    }
    let raw = sys::tf_adamw_8bit_state {
        param: ffi::ptr(state.param),
        grad: ffi::ptr(state.grad),
        exp_avg: ffi::ptr(state.exp_avg),
        exp_avg_scales: ffi::ptr(state.exp_avg_scales),
        exp_avg_sq: ffi::ptr(state.exp_avg_sq),
        exp_avg_sq_scales: ffi::ptr(state.exp_avg_sq_scales),
        signed8: ffi::ptr(state.signed8),
        unsigned8: ffi::ptr(state.unsigned8),
        grad_divisor: ffi::ptr(grad_divisor),
        found_nonfinite: ffi::ptr(found_nonfinite),
    };
    let step = i64::try_from(step).unwrap_or(i64::MAX);
    // SAFETY: live tensors, whose lengths, kinds and devices were checked above; both structs are
    // borrowed for the call.
    let status = unsafe { sys::tf_adamw_8bit(&raw, step, &options.raw()) };
    ffi::check(OP, status)
}

/// Euclidean norm of each tensor, as scalars on its device.
///
/// # Errors
/// [`Error::Torch`] with libtorch's message.
pub fn norms(tensors: &[Tensor]) -> Result<Vec<Tensor>, Error> {
    let ptrs = ffi::ptrs(tensors);
    let mut out = vec![std::ptr::null_mut(); tensors.len()];
    // SAFETY: live tensors and arrays of `tensors.len()` entries, `out` with room for as many.
    let status = unsafe { sys::tf_foreach_norm(ptrs.as_ptr(), ptrs.len(), out.as_mut_ptr()) };
    ffi::check("norms", status)?;
    // SAFETY: on success the call filled every entry with a tensor made by `new` for us.
    Ok(unsafe { ffi::owned(out) })
}

#[cfg(test)]
mod tests {
    use tch::Device;

    use super::*;

    fn scalar(value: f64) -> Tensor {
        Tensor::from(value).to_kind(Kind::Float)
    }

    fn state() -> AdamWState {
        let cpu = (Kind::Float, Device::Cpu);
        AdamWState {
            param: Tensor::ones([5], cpu),
            grad: Tensor::full([5], 4.0, cpu),
            exp_avg: Tensor::zeros([5], cpu),
            exp_avg_sq: Tensor::zeros([5], cpu),
        }
    }

    const OPTIONS: AdamW =
        AdamW { learning_rate: 0.1, beta1: 0.9, beta2: 0.999, weight_decay: 0.01, epsilon: 1e-8 };

    #[test]
    fn the_first_update_equals_the_closed_form() {
        let s = state();
        fused_adamw(
            &[AdamWState { param: s.param.shallow_clone(), ..state() }],
            &scalar(1.0),
            &scalar(2.0),
            &scalar(0.0),
            OPTIONS,
        )
        .unwrap();
        // With one step the bias-corrected moments are g and g^2: the update is the learning rate.
        let expected = 1.0 - 0.1 * 0.01 - 0.1;
        assert!((s.param.double_value(&[0]) - expected).abs() < 1e-6);
    }

    #[test]
    fn a_nonfinite_flag_leaves_everything_as_it_was() {
        let s = state();
        let param = s.param.shallow_clone();
        fused_adamw(&[s], &scalar(1.0), &scalar(1.0), &scalar(1.0), OPTIONS).unwrap();
        assert_eq!(param, Tensor::ones([5], (Kind::Float, Device::Cpu)));
    }

    #[test]
    fn norms_are_euclidean() {
        let x = Tensor::from_slice(&[3f32, 4.0]);
        assert_eq!(norms(&[x]).unwrap()[0].double_value(&[]), 5.0);
    }
}
