//! Gradients into the flat buffer of a unit.

use tch::Tensor;
use tunefleet_kernels_sys as sys;

use crate::{Error, ffi};

const OP: &str = "accumulating gradients";

/// Sets each of `into` to its gradient (`first`) or adds it: in one parallel region on a CPU, and in one launch
/// for each 64 tensors on a GPU. Sums are fp32's; a bf16 `into` is for `first` alone. Tensors that are not dense,
/// or of another dtype than fp32 and bf16, go through libtorch one by one. Not differentiable.
///
/// # Errors
/// [`Error::Precondition`] for a gradient of another shape, or a sum in another dtype than fp32.
pub fn accumulate(into: &[Tensor], grads: &[Tensor], first: bool) -> Result<(), Error> {
    let refuse = |rule, got| Err(Error::Precondition { op: OP, rule, got });
    if into.len() != grads.len() {
        return refuse("lists must be of one length", format!("{} and {}", into.len(), grads.len()));
    }
    for (into, grad) in into.iter().zip(grads) {
        if into.size() != grad.size() {
            let got = format!("{:?}, expected {:?}", grad.size(), into.size());
            return refuse("must have its buffer's shape", got);
        }
        if !first && into.kind() != tch::Kind::Float {
            return refuse("that is added to must be fp32", format!("{:?}", into.kind()));
        }
    }
    let (into, grads) = (ffi::ptrs(into), ffi::ptrs(grads));
    // SAFETY: arrays of as many live tensors, pairwise of one shape; dtypes, strides and devices are looked at
    // on the other side.
    let status = unsafe { sys::tf_accumulate(into.as_ptr(), grads.as_ptr(), into.len(), first.into()) };
    ffi::check(OP, status)
}

#[cfg(test)]
mod tests {
    use tch::{Device, Kind};

    use super::*;
    use crate::fused::testing::*;

    /// Parts of one flat buffer, each at a multiple of 64 elements, and gradients for them.
    fn case(kind: Kind, grad_kind: Kind, device: Device) -> (Tensor, Vec<Tensor>, Vec<Tensor>) {
        let mut shapes =
            vec![vec![1], vec![3, 1], vec![63], vec![64], vec![65, 1], vec![0, 4], vec![1000, 70]];
        // More than one launch holds.
        shapes.extend((1..130).map(|i| vec![i]));
        let lens: Vec<i64> = shapes.iter().map(|shape| shape.iter().product()).collect();
        let padded = |len: i64| (len + 63) / 64 * 64;
        let flat = Tensor::randn([lens.iter().map(|&len| padded(len)).sum()], (kind, device));
        let mut first = 0;
        let mut into = Vec::new();
        let mut grads = Vec::new();
        for (i, (shape, &len)) in shapes.iter().zip(&lens).enumerate() {
            into.push(flat.narrow(0, first, len).view(shape.as_slice()));
            first += padded(len);
            grads.push(match (i % 4, shape.as_slice()) {
                (0, _) => Tensor::randn([1], (grad_kind, device)).expand(shape.as_slice(), false),
                (2, &[rows, columns]) => Tensor::randn([columns, rows], (grad_kind, device)).tr(),
                // Not at a multiple of a word.
                (3, _) => {
                    Tensor::randn([len + 1], (grad_kind, device)).narrow(0, 1, len).view(shape.as_slice())
                }
                _ => Tensor::randn(shape.as_slice(), (grad_kind, device)),
            });
        }
        (flat, into, grads)
    }

    #[test]
    fn every_gradient_is_set_or_added_as_libtorch_would_and_nothing_else_is_touched() {
        for device in devices() {
            for (kind, grad_kind, first) in [
                (Kind::Float, Kind::Float, true),
                (Kind::Float, Kind::Float, false),
                (Kind::Float, Kind::BFloat16, true),
                (Kind::Float, Kind::BFloat16, false),
                (Kind::BFloat16, Kind::BFloat16, true),
                (Kind::BFloat16, Kind::Float, true),
                (Kind::Double, Kind::Float, true),
            ] {
                let (flat, into, grads) = case(kind, grad_kind, device);
                let expected = flat.copy();
                let mut offset = 0;
                for grad in &grads {
                    let len = grad.numel() as i64;
                    let mut to = expected.narrow(0, offset, len).view(grad.size().as_slice());
                    if first {
                        to.copy_(grad);
                    } else {
                        let _ = to.g_add_(grad);
                    }
                    offset += (len + 63) / 64 * 64;
                }
                accumulate(&into, &grads, first).unwrap();
                assert!(flat.equal(&expected), "{device:?} {kind:?} {grad_kind:?} {first}");
            }
        }
    }

    #[test]
    fn without_avx512_the_results_are_the_same() {
        assert_passes_without_avx512(
            "fused::accumulate::tests::every_gradient_is_set_or_added_as_libtorch_would_and_nothing_else_is_touched",
        );
    }

    #[test]
    fn a_nan_of_any_bits_stays_one_in_bf16() {
        let nan = Tensor::from_slice(&[-1i32, i32::MAX]).view_dtype(Kind::Float);
        for device in devices() {
            let into = Tensor::zeros([2], (Kind::BFloat16, device));
            accumulate(&[into.shallow_clone()], &[nan.to_device(device)], true).unwrap();
            assert_eq!(into.isnan().all().int64_value(&[]), 1);
        }
    }

    #[test]
    fn no_graph_is_kept() {
        let grad = Tensor::ones([3], (Kind::Float, Device::Cpu)).set_requires_grad(true);
        let into = Tensor::zeros([3], (Kind::Float, Device::Cpu));
        for first in [true, false] {
            accumulate(&[into.shallow_clone()], &[grad.expand([3], false)], first).unwrap();
        }
        assert_eq!((into.requires_grad(), into.sum(Kind::Float).double_value(&[])), (false, 6.0));
    }

    #[test]
    fn neither_the_number_of_threads_nor_a_repetition_changes_a_bit() {
        for device in devices() {
            let (flat, into, grads) = case(Kind::Float, Kind::BFloat16, device);
            let before = flat.copy();
            assert_same_on_any_number_of_threads(|| {
                flat.shallow_clone().copy_(&before);
                accumulate(&into, &grads, false).unwrap();
                vec![flat.copy()]
            });
        }
    }

    #[test]
    fn pairs_that_do_not_fit_are_refused() {
        let (wide, narrow) =
            (Tensor::zeros([4], (Kind::Float, Device::Cpu)), Tensor::zeros([3], (Kind::Float, Device::Cpu)));
        let message = |into: &Tensor, grad: &Tensor| {
            accumulate(&[into.shallow_clone()], &[grad.shallow_clone()], false).unwrap_err().to_string()
        };
        assert!(message(&wide, &narrow).contains("[3], expected [4]"));
        assert!(message(&wide.to_kind(Kind::BFloat16), &wide).contains("must be fp32"));
        assert!(accumulate(&[wide], &[], true).unwrap_err().to_string().contains("1 and 0"));
    }
}
