//! Layer norm and RMS norm.

use tch::Tensor;
use tunefleet_kernels_sys as sys;

use crate::{Error, ffi};

/// Layer norm (Ba et al. 2016) over the last dimension, of `x` `[.., D]` and `weight`, `bias` `[D]`, all fp32 or all
/// bf16; differentiable in all three. Without a bias, RMS norm (Zhang and Sennrich 2019): nothing is subtracted.
/// Statistics and sums are fp32; the graph keeps `x`, the weight, and the mean and inverse deviation of each row. Other
/// dtypes, and CPUs without AVX-512, get libtorch's own.
///
/// # Errors
/// [`Error::Torch`] with libtorch's message.
pub fn layer_norm(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>, epsilon: f64) -> Result<Tensor, Error> {
    let mut out = std::ptr::null_mut();
    let (x, weight) = (ffi::ptr(x), ffi::ptr(weight));
    let bias = bias.map_or(std::ptr::null_mut(), ffi::ptr);
    // SAFETY: live tensors borrowed for the call (the graph takes its own references), the bias null or one, and a place
    // for one pointer; shapes and dtypes are checked on the other side, which falls back to libtorch's own.
    let status = unsafe { sys::tf_layer_norm(x, weight, bias, epsilon, &mut out) };
    ffi::check("layer norm", status)?;
    // SAFETY: on success the call wrote a tensor made by `new` for us.
    Ok(unsafe { ffi::owned(vec![out]) }.remove(0))
}

#[cfg(test)]
mod tests {
    use tch::{Device, Kind};

    use super::*;
    use crate::fused::testing::*;

    const EPSILON: f64 = 1e-5;

    fn theirs(leaves: &[Tensor]) -> Tensor {
        let (x, weight) = (&leaves[0], &leaves[1]);
        match leaves.get(2) {
            Some(bias) => x.layer_norm(weight.size(), Some(weight), Some(bias), EPSILON, false),
            None => x.rms_norm(weight.size(), Some(weight), Some(EPSILON)),
        }
    }

    fn ours(leaves: &[Tensor]) -> Tensor {
        layer_norm(&leaves[0], &leaves[1], leaves.get(2), EPSILON).unwrap()
    }

    fn case(rows: i64, columns: i64, kind: Kind, device: Device) -> [Tensor; 3] {
        let of = |size: &[i64]| Tensor::randn(size, (Kind::Float, device));
        [of(&[rows, columns]) * 2.0 + 1.0, of(&[columns]) + 1.0, of(&[columns])].map(|x| x.to_kind(kind))
    }

    #[test]
    fn layer_norm_and_its_gradients_are_about_as_exact_as_libtorchs_whatever_the_shape() {
        for device in devices() {
            for kind in [Kind::Float, Kind::BFloat16] {
                for (rows, columns) in SHAPES {
                    assert_about_as_exact(
                        || case(rows, columns, kind, device).into(),
                        ours,
                        theirs,
                        &format!("{device:?} {kind:?} {rows} {columns}"),
                    );
                }
            }
        }
    }

    #[test]
    fn rms_norm_and_its_gradients_are_about_as_exact_as_libtorchs_whatever_the_shape() {
        for device in devices() {
            for kind in [Kind::Float, Kind::BFloat16] {
                for (rows, columns) in SHAPES {
                    assert_about_as_exact(
                        || case(rows, columns, kind, device).into_iter().take(2).collect(),
                        ours,
                        theirs,
                        &format!("{device:?} {kind:?} {rows} {columns}"),
                    );
                }
            }
        }
    }

    #[test]
    fn strided_input_and_a_frozen_weight_give_the_same() {
        for device in devices() {
            let [x, weight, bias] = case(65, 48, Kind::BFloat16, device);
            let strided = x.tr().contiguous().tr();
            assert!(!strided.is_contiguous());
            let (out, grads) = run(&[x, weight.shallow_clone(), bias.shallow_clone()], ours);
            let x = strided.set_requires_grad(true);
            let again = layer_norm(&x, &weight, Some(&bias), EPSILON).unwrap();
            assert!(again.detach().equal(&out));
            let dx = crate::autograd::grad(&again, &weights_like(&out), &[x]).unwrap();
            assert!(dx[0].equal(&grads[0]));
        }
    }

    #[test]
    fn rows_far_from_zero_keep_their_variance() {
        for device in devices() {
            let [x, weight, bias] = case(5, 1000, Kind::Float, device);
            let x = x + 1000.0;
            let exact = theirs(&[wide(&x), wide(&weight), wide(&bias)]);
            let apart = (wide(&ours(&[x, weight, bias])) - exact).abs().max().double_value(&[]);
            // The mean itself is rounded by 3e-5; squares would be by 0.06.
            assert!(apart < 1e-3, "{apart}");
        }
    }

    #[test]
    fn no_rows_are_no_error_and_what_does_not_fit_is_libtorchs_error() {
        let [x, weight, bias] = case(0, 7, Kind::Float, Device::Cpu);
        let (out, grads) = run(&[x, weight.shallow_clone(), bias.shallow_clone()], ours);
        assert_eq!(out.size(), [0, 7]);
        assert_eq!(grads[1].abs().sum(Kind::Float).double_value(&[]), 0.0);
        let wrong = Tensor::ones([2, 8], (Kind::Float, Device::Cpu));
        assert!(layer_norm(&wrong, &weight, Some(&bias), EPSILON).unwrap_err().to_string().contains("shape"));
        assert!(layer_norm(&wrong, &weight, None, EPSILON).unwrap_err().to_string().contains("shape"));
    }

    #[test]
    fn neither_the_number_of_threads_nor_a_repetition_changes_a_bit() {
        for device in devices() {
            let leaves = case(1003, 96, Kind::BFloat16, device);
            for leaves in [&leaves[..], &leaves[..2]] {
                assert_same_on_any_number_of_threads(|| {
                    let (out, mut grads) = run(leaves, ours);
                    grads.push(out);
                    grads
                });
            }
        }
    }
}
