//! Rotary positions.

use tch::{Kind, Tensor};
use tunefleet_kernels_sys as sys;

use crate::{Error, ffi};

const OP: &str = "a rotation";

/// Turns the heads of `x` `[.., H C]`, the first half of each against the second (Su et al. 2021, in the order of
/// transformers): pair (a, b) to (a cos - b sin, b cos + a sin). `turns` `[R, 2, C / 2]`, fp32, holds cosines and sines of R
/// rows, which x's rows take again and again. Differentiable in `x`; computed in fp32 and rounded once for fp32 and bf16.
/// Other dtypes, and CPUs without AVX-512, get libtorch's operations in x's dtype.
///
/// # Errors
/// [`Error::Precondition`] for turns that do not fit.
pub fn rotate(x: &Tensor, turns: &Tensor) -> Result<Tensor, Error> {
    let refuse = |rule, got| Err(Error::Precondition { op: OP, rule, got });
    let (size, turns_size) = (x.size(), turns.size());
    let width = size.last().copied().unwrap_or(0);
    let rows: i64 = size.iter().rev().skip(1).product();
    let &[turn_rows, 2, pairs] = turns_size.as_slice() else {
        return refuse("needs turns of rows x 2 x pairs", format!("{turns_size:?}"));
    };
    let fits = pairs > 0 && width > 0 && width % (2 * pairs) == 0 && turn_rows > 0 && rows % turn_rows == 0;
    if !fits {
        return refuse("needs turns for its rows and heads", format!("{turns_size:?} for {size:?}"));
    }
    if turns.kind() != Kind::Float || !turns.is_contiguous() || turns.device() != x.device() {
        let got = format!("{:?} on {:?}", turns.kind(), turns.device());
        return refuse("needs dense fp32 turns beside its input", got);
    }
    let mut out = std::ptr::null_mut();
    // SAFETY: live tensors borrowed for the call (the graph takes its own references) whose shapes, dtypes and devices
    // were checked above, and a place for one pointer.
    let status = unsafe { sys::tf_rotate(ffi::ptr(x), ffi::ptr(turns), &mut out) };
    ffi::check(OP, status)?;
    // SAFETY: on success the call wrote a tensor made by `new` for us.
    Ok(unsafe { ffi::owned(vec![out]) }.remove(0))
}

#[cfg(test)]
mod tests {
    use tch::Device;

    use super::*;
    use crate::fused::testing::*;

    /// Rows of turns, times they are used, heads, pairs.
    const CASES: [(i64, i64, i64, i64); 6] =
        [(1, 1, 1, 1), (3, 2, 2, 8), (5, 1, 3, 17), (40, 3, 4, 32), (7, 2, 1, 64), (33, 1, 5, 5)];

    fn turns(rows: i64, pairs: i64, device: Device) -> Tensor {
        let angles = Tensor::randn([rows, pairs], (Kind::Float, device)) * 3.0;
        Tensor::stack(&[angles.cos(), angles.sin()], 1)
    }

    /// As transformers writes it.
    fn theirs(x: &Tensor, turns: &Tensor) -> Tensor {
        let pairs = turns.size()[2];
        let rows = turns.size()[0];
        let heads = x.size()[1] / (2 * pairs);
        let x_rth = x.view([-1, rows, heads, 2 * pairs]);
        let twice = |at: i64| {
            let half = turns.select(1, at).to_kind(x.kind()).to_device(x.device());
            Tensor::cat(&[&half, &half], 1).unsqueeze(1)
        };
        let turned = Tensor::cat(&[-x_rth.narrow(3, pairs, pairs), x_rth.narrow(3, 0, pairs)], 3);
        (&x_rth * twice(0) + turned * twice(1)).view(x.size().as_slice())
    }

    #[test]
    fn it_and_its_gradient_are_about_as_exact_as_transformers_whatever_the_shape() {
        for device in devices() {
            for kind in [Kind::Float, Kind::BFloat16] {
                for (rows, times, heads, pairs) in CASES {
                    let turns = turns(rows, pairs, device);
                    let size = [rows * times, heads * 2 * pairs];
                    assert_about_as_exact(
                        || vec![Tensor::randn(size, (Kind::Float, device)).to_kind(kind)],
                        |x| rotate(&x[0], &turns).unwrap(),
                        |x| theirs(&x[0], &turns),
                        &format!("{device:?} {kind:?} {rows} {times} {heads} {pairs}"),
                    );
                }
            }
        }
    }

    #[test]
    fn lengths_stay_and_the_way_back_leads_where_it_began() {
        for device in devices() {
            let x = Tensor::randn([6, 2 * 16], (Kind::Float, device));
            let turns = turns(6, 8, device);
            let back = Tensor::stack(&[turns.select(1, 0), -turns.select(1, 1)], 1);
            let turned = rotate(&x, &turns).unwrap();
            assert!((turned.norm() - x.norm()).abs().double_value(&[]) < 1e-4);
            assert!((rotate(&turned, &back).unwrap() - x).abs().max().double_value(&[]) < 1e-5);
        }
    }

    #[test]
    fn a_cpu_without_avx512_gets_the_same() {
        assert_passes_without_avx512(
            "fused::rotary::tests::lengths_stay_and_the_way_back_leads_where_it_began",
        );
    }

    #[test]
    fn turns_that_do_not_fit_are_refused() {
        let x = Tensor::zeros([4, 12], (Kind::Float, Device::Cpu));
        let of = |size: &[i64], kind| {
            rotate(&x, &Tensor::zeros(size, (kind, Device::Cpu))).unwrap_err().to_string()
        };
        assert!(of(&[4, 2, 4], Kind::Float).contains("for its rows and heads"));
        assert!(of(&[3, 2, 3], Kind::Float).contains("for its rows and heads"));
        assert!(of(&[4, 6], Kind::Float).contains("rows x 2 x pairs"));
        assert!(of(&[4, 2, 3], Kind::BFloat16).contains("fp32"));
    }
}
