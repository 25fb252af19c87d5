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
    let options = sys::tf_adamw {
        learning_rate: options.learning_rate,
        beta1: options.beta1,
        beta2: options.beta2,
        weight_decay: options.weight_decay,
        epsilon: options.epsilon,
    };
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
