//! Gradients with output gradients: what a block walk needs and `Tensor::run_backward` lacks.

use tch::Tensor;
use tunefleet_kernels_sys as sys;

use crate::{Error, ffi};

/// Gradients of `output`, weighted by `grad_output` (same shape), with respect to each input. The
/// graph is freed. An input that `output` does not depend on is an error.
///
/// # Errors
/// [`Error::Torch`] with libtorch's message.
pub fn grad(output: &Tensor, grad_output: &Tensor, inputs: &[Tensor]) -> Result<Vec<Tensor>, Error> {
    let output = ffi::ptr(output);
    let grad_output = ffi::ptr(grad_output);
    let input_ptrs = ffi::ptrs(inputs);
    let mut grads = vec![std::ptr::null_mut(); inputs.len()];
    // SAFETY: all pointers are live `at::Tensor*` borrowed for the call; the lengths are those of
    // the arrays; `grads` has room for one pointer per input.
    let status = unsafe {
        sys::tf_grad(&output, &grad_output, 1, input_ptrs.as_ptr(), inputs.len(), grads.as_mut_ptr())
    };
    ffi::check("autograd", status)?;
    // SAFETY: on success the call filled every entry with a tensor made by `new` for us.
    Ok(unsafe { ffi::owned(grads) })
}

#[cfg(test)]
mod tests {
    use tch::{Device, Kind};

    use super::*;

    #[test]
    fn a_weighted_gradient_equals_the_closed_form() {
        let x = Tensor::randn([3, 4], (Kind::Double, Device::Cpu)).set_requires_grad(true);
        let weight = Tensor::randn([3, 4], (Kind::Double, Device::Cpu));
        let grads = grad(&(&x * &x), &weight, &[x.shallow_clone()]).unwrap();
        assert_eq!(grads[0], x.detach() * 2.0 * weight);
    }

    #[test]
    fn an_unused_input_is_an_error_with_a_message() {
        let x = Tensor::ones([2], (Kind::Float, Device::Cpu)).set_requires_grad(true);
        let other = Tensor::ones([2], (Kind::Float, Device::Cpu)).set_requires_grad(true);
        let error = grad(&(&x * 2.0), &Tensor::ones_like(&x), &[other]).unwrap_err();
        assert!(error.to_string().contains("not have been used"), "{error}");
    }
}
