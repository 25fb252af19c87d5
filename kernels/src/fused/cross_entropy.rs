//! Cross-entropy and its gradient, in place of the logits.

use tch::{Kind, Tensor};
use tunefleet_kernels_sys as sys;

use crate::{Error, ffi};

const OP: &str = "softmax cross-entropy";

/// Losses (fp32, `[C]`) of logits `[C, V]`, fp32 or bf16, for targets `[C]`, int64, which may be `ignored`: then
/// the loss is 0. The logits become their gradient, softmax - onehot, or zeros where the target is ignored.
/// Computed in fp32, rounded once. Not differentiable: this is the derivative.
///
/// A GPU is not waited for, so a target outside the vocabulary is an error on the CPU alone, and there NaN.
///
/// # Errors
/// [`Error::Precondition`] for tensors that do not fit; [`Error::Torch`] for a target outside the vocabulary.
pub fn softmax_cross_entropy_(logits_cv: &Tensor, targets_c: &Tensor, ignored: i64) -> Result<Tensor, Error> {
    let refuse = |rule, got| Err(Error::Precondition { op: OP, rule, got });
    let size = logits_cv.size();
    let &[rows, vocab] = size.as_slice() else {
        return refuse("of logits must be a matrix", format!("{size:?}"));
    };
    if vocab == 0 || !logits_cv.is_contiguous() || !matches!(logits_cv.kind(), Kind::Float | Kind::BFloat16) {
        let got = format!("{:?} {size:?} with strides {:?}", logits_cv.kind(), logits_cv.stride());
        return refuse("of logits must be dense, not empty, and fp32 or bf16", got);
    }
    if targets_c.size() != [rows] || targets_c.kind() != Kind::Int64 || !targets_c.is_contiguous() {
        let got = format!("{:?} {:?}", targets_c.kind(), targets_c.size());
        return refuse("of targets must be dense int64, one a row", got);
    }
    if targets_c.device() != logits_cv.device() {
        return refuse("of targets must lie where the logits do", format!("{:?}", targets_c.device()));
    }
    let mut losses = std::ptr::null_mut();
    // SAFETY: live tensors whose shapes, dtypes, strides and devices were checked above, and a place for one
    // pointer; targets are checked on the other side before a row is written.
    let status = unsafe {
        sys::tf_softmax_cross_entropy_(ffi::ptr(logits_cv), ffi::ptr(targets_c), ignored, &mut losses)
    };
    ffi::check(OP, status)?;
    // SAFETY: on success the call wrote a tensor made by `new` for us.
    Ok(unsafe { ffi::owned(vec![losses]) }.remove(0))
}

#[cfg(test)]
mod tests {
    use tch::Device;

    use super::*;
    use crate::fused::testing::*;

    const IGNORED: i64 = -100;

    fn exact(logits_cv: &Tensor, targets_c: &Tensor) -> (Tensor, Tensor) {
        let log_probs_cv = wide(logits_cv).log_softmax(-1, Kind::Double);
        let targets_c1 = targets_c.to_device(Device::Cpu).clamp_min(0).unsqueeze(1);
        let counts_c1 = targets_c.to_device(Device::Cpu).ne(IGNORED).to_kind(Kind::Double).unsqueeze(1);
        let losses_c = -(log_probs_cv.gather(1, &targets_c1, false) * &counts_c1).squeeze_dim(1);
        let ones = Tensor::full_like(&targets_c1, -1.0).to_kind(Kind::Double);
        (losses_c, log_probs_cv.exp().scatter_add(1, &targets_c1, &ones) * counts_c1)
    }

    fn case(rows: i64, vocab: i64, spread: f64, kind: Kind, device: Device) -> (Tensor, Tensor) {
        let logits_cv = (Tensor::randn([rows, vocab], (Kind::Float, device)) * spread).to_kind(kind);
        let mut targets_c = Tensor::randint(vocab, [rows], (Kind::Int64, device));
        let _ = targets_c.narrow(0, 0, rows.min(1)).fill_(IGNORED);
        if rows > 1 {
            // One row that is all but certain.
            let _ = logits_cv.get(1).narrow(0, 0, 1).fill_(90.0);
            targets_c = targets_c.index_fill(0, &Tensor::from_slice(&[1i64]).to_device(device), 0);
        }
        (logits_cv, targets_c)
    }

    #[test]
    fn losses_and_gradients_are_those_of_fp64_rounded_once_whatever_the_shape() {
        for device in devices() {
            for kind in [Kind::Float, Kind::BFloat16] {
                for (rows, vocab, spread) in [
                    (0, 7, 1.0),
                    (1, 1, 1.0),
                    (2, 3, 8.0),
                    (3, 63, 1.0),
                    (5, 64, 1.0),
                    (4, 65, 30.0),
                    (7, 1000, 3.0),
                    (3, 49_153, 2.0),
                    (2, 49_152, 5.0),
                ] {
                    let (logits_cv, targets_c) = case(rows, vocab, spread, kind, device);
                    let (exact_losses_c, exact_grads_cv) = exact(&logits_cv, &targets_c);
                    let losses_c = softmax_cross_entropy_(&logits_cv, &targets_c, IGNORED).unwrap();
                    assert_eq!((losses_c.kind(), losses_c.size()), (Kind::Float, vec![rows]));
                    let loss_limit = exact_losses_c.abs() * 3e-7 + 6e-7;
                    let apart = (wide(&losses_c) - &exact_losses_c).abs() - loss_limit;
                    assert!(rows == 0 || apart.max().double_value(&[]) <= 0.0, "{kind:?} {rows} {vocab}");
                    // Half a unit in the last place of the result, and fp32's own error.
                    let half_unit = if kind == Kind::Float { 6e-8 } else { 0.003_907 };
                    let limit = exact_grads_cv.abs() * (half_unit + 1e-6) + 2e-7;
                    let apart = (wide(&logits_cv) - &exact_grads_cv).abs() - limit;
                    assert!(rows == 0 || apart.max().double_value(&[]) <= 0.0, "{kind:?} {rows} {vocab}");
                    assert!(rows == 0 || logits_cv.get(0).eq(0.0).all().int64_value(&[]) == 1);
                }
            }
        }
    }

    #[test]
    fn without_avx512_the_results_are_as_exact() {
        assert_passes_without_avx512(
            "fused::cross_entropy::tests::losses_and_gradients_are_those_of_fp64_rounded_once_whatever_the_shape",
        );
    }

    #[test]
    fn small_gradients_keep_their_relative_precision() {
        let (logits_cv, targets_c) = case(16, 4096, 4.0, Kind::Float, Device::Cpu);
        let (_, exact_grads_cv) = exact(&logits_cv, &targets_c);
        let _ = softmax_cross_entropy_(&logits_cv, &targets_c, IGNORED).unwrap();
        let off_target = exact_grads_cv.gt(0.0);
        let ours = wide(&logits_cv).masked_select(&off_target);
        let exact = exact_grads_cv.masked_select(&off_target);
        // Those that fp32 holds as normal numbers.
        let relative = ((ours - &exact) / &exact).masked_select(&exact.gt(1e-37));
        let worst = relative.abs().max().double_value(&[]);
        // The largest logit is 90, whose distance to another one fp32 rounds.
        assert!(worst < 90.0 * 6e-8 + 3e-7, "{worst}");
    }

    #[test]
    fn infinities_and_nans_end_in_the_rows_where_they_were() {
        for device in devices() {
            for vocab in [9, 640] {
                let logits_cv = Tensor::randn([4, vocab], (Kind::BFloat16, device));
                let _ = logits_cv.get(0).narrow(0, 3, 2).fill_(f64::NEG_INFINITY);
                let _ = logits_cv.get(1).narrow(0, 3, 1).fill_(f64::NAN);
                let _ = logits_cv.get(2).narrow(0, 3, 1).fill_(f64::INFINITY);
                let targets_c = Tensor::zeros([4], (Kind::Int64, device));
                let losses_c = softmax_cross_entropy_(&logits_cv, &targets_c, IGNORED).unwrap();
                let finite = Vec::<bool>::try_from(losses_c.isfinite().to_device(Device::Cpu)).unwrap();
                assert_eq!(finite, [true, false, false, true]);
                assert_eq!(logits_cv.get(0).double_value(&[3]), 0.0);
                assert!(logits_cv.get(1).isnan().all().int64_value(&[]) == 1);
                assert!(logits_cv.get(3).isfinite().all().int64_value(&[]) == 1);
            }
        }
    }

    #[test]
    fn neither_the_number_of_threads_nor_a_repetition_changes_a_bit() {
        for device in devices() {
            let (logits_cv, targets_c) = case(37, 5000, 3.0, Kind::BFloat16, device);
            assert_same_on_any_number_of_threads(|| {
                let grads_cv = logits_cv.copy();
                let losses_c = softmax_cross_entropy_(&grads_cv, &targets_c, IGNORED).unwrap();
                vec![losses_c, grads_cv]
            });
        }
    }

    #[test]
    fn targets_and_tensors_that_do_not_fit_are_refused_before_anything_is_written() {
        let logits_cv = Tensor::ones([2, 5], (Kind::Float, Device::Cpu));
        let message = |logits_cv: &Tensor, targets: &[i64]| {
            let targets_c = Tensor::from_slice(targets);
            softmax_cross_entropy_(logits_cv, &targets_c, IGNORED).unwrap_err().to_string()
        };
        assert!(message(&logits_cv, &[0, 5]).contains("target 5 of row 1 is outside the vocabulary of 5"));
        assert!(message(&logits_cv, &[-1, 0]).contains("target -1 of row 0"));
        assert!(message(&logits_cv, &[0]).contains("one a row"));
        assert!(message(&logits_cv.tr(), &[0; 5]).contains("dense"));
        assert!(message(&logits_cv.to_kind(Kind::Half), &[0, 1]).contains("fp32 or bf16"));
        assert!(message(&logits_cv.get(0), &[0]).contains("matrix"));
        assert_eq!(logits_cv, Tensor::ones([2, 5], (Kind::Float, Device::Cpu)));
    }
}
