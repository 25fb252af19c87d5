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

/// `x W^T + bias`, differentiable in `x` alone. The graph refers to the memory of `weight_oi` and reads
/// it in the backward pass, whatever was written there in between: a scratch that several weights
/// share must hold this one again by then.
///
/// # Errors
/// [`Error::Torch`] with libtorch's message.
pub fn frozen_linear(x: &Tensor, weight_oi: &Tensor, bias: Option<&Tensor>) -> Result<Tensor, Error> {
    let mut out = std::ptr::null_mut();
    let bias = bias.map_or(std::ptr::null_mut(), ffi::ptr);
    // SAFETY: live tensors borrowed for the call (the graph takes its own references), and a place for
    // one pointer.
    let status = unsafe { sys::tf_frozen_linear(ffi::ptr(x), ffi::ptr(weight_oi), bias, &mut out) };
    ffi::check("frozen linear", status)?;
    // SAFETY: on success the call wrote a tensor made by `new` for us.
    Ok(unsafe { ffi::owned(vec![out]) }.remove(0))
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
    fn a_frozen_linear_reads_its_weight_again_in_the_backward_pass() {
        let cpu = (Kind::Float, Device::Cpu);
        let x = Tensor::randn([3, 4], cpu).set_requires_grad(true);
        let (weight, bias) = (Tensor::randn([5, 4], cpu), Tensor::randn([5], cpu));
        let scratch = weight.copy();
        let y = frozen_linear(&x, &scratch, Some(&bias)).unwrap();
        assert_eq!(y.detach(), x.detach().linear(&weight, Some(&bias)));
        // Another block's weights come and go.
        let _ = scratch.shallow_clone().fill_(f64::NAN);
        scratch.shallow_clone().copy_(&weight);
        let dy = Tensor::randn([3, 5], cpu);
        let grads = grad(&y, &dy, &[x.shallow_clone()]).unwrap();
        assert_eq!(grads[0], dy.matmul(&weight));
    }

    #[test]
    fn an_unused_input_is_an_error_with_a_message() {
        let x = Tensor::ones([2], (Kind::Float, Device::Cpu)).set_requires_grad(true);
        let other = Tensor::ones([2], (Kind::Float, Device::Cpu)).set_requires_grad(true);
        let error = grad(&(&x * 2.0), &Tensor::ones_like(&x), &[other]).unwrap_err();
        assert!(error.to_string().contains("not have been used"), "{error}");
    }
}
