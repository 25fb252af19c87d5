//! Dropout into a residual stream.

use tch::{Kind, Tensor};
use tunefleet_kernels_sys as sys;

use super::check_bias;
use crate::{Error, ffi};

const OP: &str = "residual dropout";

/// `residual + dropout(x + bias)` (Srivastava et al. 2014), for `residual` and `x` `[.., D]` and `bias` `[D]`, all fp32
/// or all bf16; differentiable in all three. Kept values are scaled by 1 / (1 - `probability`); computed in fp32,
/// rounded once.
///
/// Whether an element is kept depends on `seed`, `stream`, the probability and the element's index alone
/// (Philox4x32-10, Salmon et al. 2011): element i is dropped where word i % 4 of counter i / 4 is below the
/// probability times 2^32. So the mask is the same on every device and computed again in the backward pass, and
/// the graph keeps no tensor. A probability of 0 needs no random number.
///
/// # Errors
/// [`Error::Precondition`] for tensors that do not fit, and for a probability outside [0, 1).
pub fn residual_dropout(
    residual: &Tensor,
    x: &Tensor,
    bias: Option<&Tensor>,
    probability: f64,
    seed: i64,
    stream: i64,
) -> Result<Tensor, Error> {
    let refuse = |rule, got| Err(Error::Precondition { op: OP, rule, got });
    if !(0.0..1.0).contains(&probability) {
        return refuse("must be dropped with a probability from 0 to below 1", probability.to_string());
    }
    if !matches!(x.kind(), Kind::Float | Kind::BFloat16) || x.dim() == 0 {
        return refuse("must be fp32 or bf16 and have a dimension", format!("{:?} {:?}", x.kind(), x.size()));
    }
    if residual.size() != x.size() || residual.kind() != x.kind() || residual.device() != x.device() {
        let of = |x: &Tensor| format!("{:?} {:?} on {:?}", x.kind(), x.size(), x.device());
        return refuse("of the residual must be like x", format!("{} and {}", of(residual), of(x)));
    }
    if let Some(bias) = bias {
        check_bias(OP, x, bias)?;
    }
    let bias = bias.map_or(std::ptr::null_mut(), ffi::ptr);
    let mut out = std::ptr::null_mut();
    // SAFETY: live tensors borrowed for the call (the graph takes its own references), and a place for one
    // pointer; shapes, dtypes and devices were checked above.
    let status = unsafe {
        sys::tf_residual_dropout(ffi::ptr(residual), ffi::ptr(x), bias, probability, seed, stream, &mut out)
    };
    ffi::check(OP, status)?;
    // SAFETY: on success the call wrote a tensor made by `new` for us.
    Ok(unsafe { ffi::owned(vec![out]) }.remove(0))
}

#[cfg(test)]
mod tests {
    use tch::Device;

    use super::*;
    use crate::fused::testing::*;

    const P: f64 = 0.1;

    fn ones(size: &[i64], device: Device) -> Tensor {
        Tensor::ones(size, (Kind::Float, device))
    }

    /// 1 where kept, else 0.
    fn mask(size: &[i64], p: f64, seed: i64, stream: i64, device: Device) -> Tensor {
        let x = ones(size, device);
        let out = residual_dropout(&x.zeros_like(), &x, None, p, seed, stream).unwrap();
        out.gt(0.0).to_kind(Kind::Float)
    }

    /// The published vectors of Random123: (seed, stream, counter, words).
    const VECTORS: [(u64, u64, u64, [u32; 4]); 1] =
        [(0, 0, 0, [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8])];

    #[test]
    fn the_random_numbers_are_philox_by_its_published_vector() {
        for device in devices() {
            for (seed, stream, counter, words) in VECTORS {
                let first = counter as i64 * 4;
                for (i, word) in (0..).zip(words) {
                    let kept_at = |p: f64| {
                        mask(&[first + 4], p, seed as i64, stream as i64, device).double_value(&[first + i])
                    };
                    // An element is kept up to the very probability of its word.
                    let p = f64::from(word) / f64::from(1u32 << 16) / f64::from(1u32 << 16);
                    assert_eq!((kept_at(p), kept_at(p + 2f64.powi(-32))), (1.0, 0.0), "word {i}");
                }
            }
        }
    }

    /// Philox4x32-10 as its paper writes it.
    fn philox(seed: u64, stream: u64, counter: u64) -> [u32; 4] {
        let mut c = [counter as u32, (counter >> 32) as u32, stream as u32, (stream >> 32) as u32];
        let mut k = [seed as u32, (seed >> 32) as u32];
        for _ in 0..10 {
            let products = [u64::from(c[0]) * 0xD251_1F53, u64::from(c[2]) * 0xCD9E_8D57];
            let high = products.map(|p| (p >> 32) as u32);
            c = [high[1] ^ c[1] ^ k[0], products[1] as u32, high[0] ^ c[3] ^ k[1], products[0] as u32];
            k = [k[0].wrapping_add(0x9E37_79B9), k[1].wrapping_add(0xBB67_AE85)];
        }
        c
    }

    #[test]
    fn the_mask_is_a_function_of_seed_stream_and_index_on_every_device_and_in_every_shape() {
        let pi = philox(0x299f_31d0_a409_3822, 0x0370_7344_1319_8a2e, 0x85a3_08d3_243f_6a88);
        assert_eq!(pi, [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1], "the published vector");
        let (seed, stream) = (-0x1234_5678_9abc_def1, 0x7edc_ba98_7654_3210);
        let threshold = (P * 2f64.powi(32)) as u32;
        let len = 65 * 84;
        let expected: Vec<f32> = (0..len)
            .map(|i| philox(seed as u64, stream as u64, i / 4)[i as usize % 4])
            .map(|word| if word >= threshold { 1.0 } else { 0.0 })
            .collect();
        for device in devices() {
            for size in [
                vec![len as i64],
                vec![65, 84],
                vec![84, 65],
                vec![5, 13, 84],
                vec![1820, 3],
                vec![len as i64, 1],
            ] {
                let mask = mask(&size, P, seed, stream, device);
                assert_eq!(
                    Vec::<f32>::try_from(mask.flatten(0, -1)).unwrap(),
                    expected,
                    "{device:?} {size:?}"
                );
            }
        }
    }

    #[test]
    fn without_avx512_the_mask_is_the_same() {
        assert_passes_without_avx512(
            "fused::dropout::tests::the_mask_is_a_function_of_seed_stream_and_index_on_every_device_and_in_every_shape",
        );
    }

    #[test]
    fn as_many_are_dropped_as_asked_for_and_streams_and_seeds_differ() {
        for device in devices() {
            let kept = |seed, stream| mask(&[1000, 1000], P, seed, stream, device);
            let share = 1.0 - kept(1, 2).mean(Kind::Double).double_value(&[]);
            // Five standard deviations.
            assert!((share - P).abs() < 5.0 * (P * (1.0 - P) / 1e6f64).sqrt(), "{share}");
            for other in [kept(2, 2), kept(1, 3)] {
                // Both drop what one of a hundred drops, so 18 in a hundred differ.
                let apart = (kept(1, 2) - other).abs().mean(Kind::Double).double_value(&[]);
                assert!((apart - 0.18).abs() < 0.01, "{apart}");
            }
        }
    }

    fn case(rows: i64, columns: i64, kind: Kind, device: Device) -> [Tensor; 3] {
        let of = |size: &[i64]| Tensor::randn(size, (Kind::Float, device)).to_kind(kind);
        [of(&[rows, columns]), of(&[rows, columns]), of(&[columns])]
    }

    #[test]
    fn it_and_its_gradients_are_about_as_exact_as_libtorchs_whatever_the_shape() {
        for device in devices() {
            for kind in [Kind::Float, Kind::BFloat16] {
                for (rows, columns) in SHAPES {
                    for (p, with_bias) in [(P, true), (P, false), (0.0, true), (0.0, false)] {
                        let leaves = || -> Vec<Tensor> {
                            let all = case(rows, columns, kind, device);
                            all.into_iter().take(if with_bias { 3 } else { 2 }).collect()
                        };
                        let kept = mask(&[rows, columns], p, 5, 6, device) / (1.0 - p);
                        let ours = |x: &[Tensor]| residual_dropout(&x[0], &x[1], x.get(2), p, 5, 6).unwrap();
                        let theirs = |x: &[Tensor]| {
                            let summed = x.get(2).map_or_else(|| x[1].shallow_clone(), |bias| &x[1] + bias);
                            &x[0] + summed * kept.to_device(x[0].device()).to_kind(x[0].kind())
                        };
                        let name = format!("{device:?} {kind:?} {rows} {columns} {p} {with_bias}");
                        assert_about_as_exact(leaves, ours, theirs, &name);
                    }
                }
            }
        }
    }

    #[test]
    fn a_gpu_computes_the_same_bits_as_a_cpu() {
        let leaves = case(65, 1000, Kind::BFloat16, Device::Cpu);
        let of = |device| {
            let [residual, x, bias] = leaves.each_ref().map(|x| x.to_device(device));
            residual_dropout(&residual, &x, Some(&bias), P, 7, 8).unwrap().to_device(Device::Cpu)
        };
        for device in devices() {
            assert!(of(device).equal(&of(Device::Cpu)));
        }
    }

    #[test]
    fn without_a_probability_it_is_a_plain_sum_and_strides_change_nothing() {
        for device in devices() {
            let [residual, x, bias] = case(65, 48, Kind::Float, device);
            let plain = residual_dropout(&residual, &x, Some(&bias), 0.0, 1, 2).unwrap();
            assert!(plain.equal(&(&residual + (&x + &bias))));
            let dropped = residual_dropout(&residual, &x, None, P, 1, 2).unwrap();
            let strided =
                residual_dropout(&residual.tr().contiguous().tr(), &x.tr().contiguous().tr(), None, P, 1, 2);
            assert!(strided.unwrap().equal(&dropped));
        }
    }

    #[test]
    fn no_rows_are_no_error_and_what_does_not_fit_is_refused() {
        let leaves = case(0, 7, Kind::Float, Device::Cpu);
        let (out, grads) = run(&leaves, |x| residual_dropout(&x[0], &x[1], Some(&x[2]), P, 1, 2).unwrap());
        assert_eq!((out.size(), grads[2].abs().sum(Kind::Float).double_value(&[])), (vec![0, 7], 0.0));
        let x = ones(&[2, 8], Device::Cpu);
        let message = |residual: &Tensor, x: &Tensor, bias: &Tensor, p| {
            residual_dropout(residual, x, Some(bias), p, 1, 2).unwrap_err().to_string()
        };
        let bias = ones(&[8], Device::Cpu);
        for p in [1.0, -0.1, f64::NAN] {
            assert!(message(&x, &x, &bias, p).contains("probability"));
        }
        assert!(message(&bias, &x, &bias, P).contains("like x"));
        assert!(message(&x, &x, &leaves[2], P).contains("last dimension"));
        let half = x.to_kind(Kind::Half);
        assert!(message(&half, &half, &bias, P).contains("fp32 or bf16"));
    }

    #[test]
    fn neither_the_number_of_threads_nor_a_repetition_changes_a_bit() {
        for device in devices() {
            let leaves = case(1003, 97, Kind::BFloat16, device);
            assert_same_on_any_number_of_threads(|| {
                let (out, mut grads) =
                    run(&leaves, |x| residual_dropout(&x[0], &x[1], Some(&x[2]), P, 3, 4).unwrap());
                grads.push(out);
                grads
            });
        }
    }
}
