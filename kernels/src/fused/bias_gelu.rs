//! GELU of a sum.

use tch::Tensor;
use tunefleet_kernels_sys as sys;

use super::check_bias;
use crate::{Error, ffi};

const OP: &str = "GELU with a bias";

/// GELU (Hendrycks and Gimpel 2016) of `x + bias`, by its tanh approximation or exactly, for `x` `[.., D]` and
/// `bias` `[D]`; differentiable in both. The sum is rounded to x's dtype, as a linear layer with a bias would leave
/// it, but never written: the graph keeps `x` and the bias. The exact form on a CPU, CPUs without AVX-512 and
/// other dtypes than fp32 and bf16 get libtorch's operations, which do write it.
///
/// # Errors
/// [`Error::Precondition`] for a bias of another shape or dtype.
pub fn bias_gelu(x: &Tensor, bias: &Tensor, tanh_form: bool) -> Result<Tensor, Error> {
    check_bias(OP, x, bias)?;
    let mut out = std::ptr::null_mut();
    // SAFETY: live tensors borrowed for the call (the graph takes its own references), and a place for one
    // pointer; shapes and dtypes were checked above.
    let status = unsafe { sys::tf_bias_gelu(ffi::ptr(x), ffi::ptr(bias), tanh_form.into(), &mut out) };
    ffi::check(OP, status)?;
    // SAFETY: on success the call wrote a tensor made by `new` for us.
    Ok(unsafe { ffi::owned(vec![out]) }.remove(0))
}

#[cfg(test)]
mod tests {
    use tch::{Device, Kind};

    use super::*;
    use crate::fused::testing::*;

    fn ours(leaves: &[Tensor], tanh_form: bool) -> Tensor {
        bias_gelu(&leaves[0], &leaves[1], tanh_form).unwrap()
    }

    fn theirs(leaves: &[Tensor], tanh_form: bool) -> Tensor {
        (&leaves[0] + &leaves[1]).gelu(if tanh_form { "tanh" } else { "none" })
    }

    fn case(rows: i64, columns: i64, kind: Kind, device: Device) -> [Tensor; 2] {
        let of = |size: &[i64]| (Tensor::randn(size, (Kind::Float, device)) * 2.0).to_kind(kind);
        [of(&[rows, columns]), of(&[columns])]
    }

    #[test]
    fn it_and_its_gradients_are_about_as_exact_as_libtorchs_whatever_the_shape() {
        for device in devices() {
            for kind in [Kind::Float, Kind::BFloat16] {
                for (rows, columns) in SHAPES {
                    for tanh in [true, false] {
                        let leaves = || case(rows, columns, kind, device).into();
                        let name = format!("{device:?} {kind:?} {rows} {columns} {tanh}");
                        assert_about_as_exact(leaves, |x| ours(x, tanh), |x| theirs(x, tanh), &name);
                    }
                }
            }
        }
    }

    #[test]
    fn on_a_cpu_it_equals_gelu_of_the_rounded_sum_to_the_bit() {
        for kind in [Kind::Float, Kind::BFloat16] {
            let leaves = case(70, 1003, kind, Device::Cpu);
            let (out, grads) = run(&leaves, |x| ours(x, true));
            let (two_steps, their_grads) =
                run(&leaves, |x| crate::fused::gelu(&(&x[0] + &x[1]), true).unwrap());
            assert!(out.equal(&two_steps));
            assert!(grads[0].equal(&their_grads[0]));
        }
    }

    #[test]
    fn strided_input_and_a_frozen_bias_give_the_same() {
        for device in devices() {
            let [x, bias] = case(65, 48, Kind::BFloat16, device);
            let (out, grads) = run(&[x.shallow_clone(), bias.shallow_clone()], |x| ours(x, true));
            let x = x.tr().contiguous().tr().set_requires_grad(true);
            let again = bias_gelu(&x, &bias, true).unwrap();
            assert!(again.detach().equal(&out));
            let dx = crate::autograd::grad(&again, &weights_like(&out), &[x]).unwrap();
            assert!(dx[0].equal(&grads[0]));
        }
    }

    #[test]
    fn no_rows_are_no_error_and_a_bias_that_does_not_fit_is_one() {
        let [x, bias] = case(0, 7, Kind::Float, Device::Cpu);
        let (out, grads) = run(&[x, bias.shallow_clone()], |x| ours(x, true));
        assert_eq!((out.size(), grads[1].abs().sum(Kind::Float).double_value(&[])), (vec![0, 7], 0.0));
        let wrong = Tensor::ones([2, 8], (Kind::Float, Device::Cpu));
        assert!(bias_gelu(&wrong, &bias, true).unwrap_err().to_string().contains("last dimension"));
        let half = wrong.narrow(1, 0, 7).to_kind(Kind::Half);
        assert!(bias_gelu(&half, &bias, true).unwrap_err().to_string().contains("Half"));
    }

    #[test]
    fn neither_the_number_of_threads_nor_a_repetition_changes_a_bit() {
        for device in devices() {
            let leaves = case(1003, 96, Kind::BFloat16, device);
            assert_same_on_any_number_of_threads(|| {
                let (out, mut grads) = run(&leaves, |x| ours(x, true));
                grads.push(out);
                grads
            });
        }
    }
}
