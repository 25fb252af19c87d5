//! The inside of a gated MLP.

use tch::Tensor;
use tunefleet_kernels_sys as sys;

use crate::{Error, ffi};

const OP: &str = "a gated SiLU";

/// `silu(gate) * up` (Shazeer 2020), of tensors of one shape, both fp32 or both bf16; differentiable in both. Computed in
/// fp32 and rounded once; the graph keeps the two. Other dtypes, and CPUs without AVX-512, get libtorch's operations.
///
/// # Errors
/// [`Error::Precondition`] for tensors of different shapes, dtypes or devices.
pub fn gated(gate: &Tensor, up: &Tensor) -> Result<Tensor, Error> {
    if gate.size() != up.size() || gate.kind() != up.kind() || gate.device() != up.device() {
        let of = |x: &Tensor| format!("{:?} {:?} on {:?}", x.kind(), x.size(), x.device());
        let got = format!("{} and {}", of(gate), of(up));
        return Err(Error::Precondition { op: OP, rule: "must be two tensors alike", got });
    }
    let mut out = std::ptr::null_mut();
    // SAFETY: live tensors borrowed for the call (the graph takes its own references), alike as was checked above, and a
    // place for one pointer.
    let status = unsafe { sys::tf_gated(ffi::ptr(gate), ffi::ptr(up), &mut out) };
    ffi::check(OP, status)?;
    // SAFETY: on success the call wrote a tensor made by `new` for us.
    Ok(unsafe { ffi::owned(vec![out]) }.remove(0))
}

#[cfg(test)]
mod tests {
    use tch::{Device, Kind};

    use super::*;
    use crate::fused::testing::*;

    fn ours(leaves: &[Tensor]) -> Tensor {
        gated(&leaves[0], &leaves[1]).unwrap()
    }

    fn theirs(leaves: &[Tensor]) -> Tensor {
        leaves[0].silu() * &leaves[1]
    }

    fn case(rows: i64, columns: i64, kind: Kind, device: Device) -> [Tensor; 2] {
        [3.0, 1.0].map(|scale| (Tensor::randn([rows, columns], (Kind::Float, device)) * scale).to_kind(kind))
    }

    #[test]
    fn it_and_its_gradients_are_about_as_exact_as_libtorchs_whatever_the_shape() {
        for device in devices() {
            for kind in [Kind::Float, Kind::BFloat16] {
                for (rows, columns) in SHAPES {
                    let leaves = || case(rows, columns, kind, device).into();
                    assert_about_as_exact(
                        leaves,
                        ours,
                        theirs,
                        &format!("{device:?} {kind:?} {rows} {columns}"),
                    );
                }
            }
        }
    }

    #[test]
    fn large_values_neither_overflow_nor_lose_their_sign() {
        for device in devices() {
            let gate = Tensor::from_slice(&[-1e30f32, -200.0, -0.0, 200.0, 1e30]).to_device(device);
            let up = Tensor::from_slice(&[1f32, 1.0, 1.0, 2.0, 0.5]).to_device(device);
            let (out, grads) = run(&[gate, up], ours);
            let values = Vec::<f32>::try_from(out.to_device(Device::Cpu)).unwrap();
            assert_eq!(values, [0.0, 0.0, 0.0, 400.0, 0.5e30]);
            assert!(grads.iter().all(|grad| grad.isfinite().all().int64_value(&[]) == 1));
        }
    }

    #[test]
    fn strided_input_gives_the_same_and_no_rows_are_no_error() {
        for device in devices() {
            let [gate, up] = case(65, 48, Kind::BFloat16, device);
            let (out, _) = run(&[gate.shallow_clone(), up.shallow_clone()], ours);
            assert!(gated(&gate.tr().contiguous().tr(), &up).unwrap().equal(&out));
        }
        let [gate, up] = case(0, 7, Kind::Float, Device::Cpu);
        assert_eq!(gated(&gate, &up).unwrap().size(), [0, 7]);
        assert!(gated(&gate, &up.to_kind(Kind::Half)).unwrap_err().to_string().contains("two tensors alike"));
    }

    #[test]
    fn neither_the_number_of_threads_nor_a_repetition_changes_a_bit() {
        for device in devices() {
            let leaves = case(1003, 96, Kind::BFloat16, device);
            assert_same_on_any_number_of_threads(|| {
                let (out, mut grads) = run(&leaves, ours);
                grads.push(out);
                grads
            });
        }
    }
}
