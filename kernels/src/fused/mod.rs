//! Training's work between the matrix products: each operation reads and writes its tensors as few times as can
//! be, where libtorch's would make several passes, leave the CPU's matrix instructions idle, or compute a tanh
//! where an exponential would do. What is computed here and not by libtorch is the same bits on any number of
//! threads of a CPU, and from run to run on a GPU.

mod accumulate;
mod bias_gelu;
mod cross_entropy;
mod dropout;
mod gated;
mod layer_norm;
mod rotary;
#[cfg(test)]
mod testing;

pub use accumulate::accumulate;
pub use bias_gelu::bias_gelu;
pub use cross_entropy::softmax_cross_entropy_;
pub use dropout::residual_dropout;
pub use gated::gated;
pub use layer_norm::layer_norm;
pub use rotary::rotate;

use tch::Tensor;
use tunefleet_kernels_sys as sys;

use crate::{Error, ffi};

/// Scaled dot-product attention without dropout, differentiable: `q_bhtc`, and `k_bksc`, `v_bksc` with H a
/// multiple of K. The forward pass is libtorch's flash kernel. On a CPU with AVX-512 and bf16 matrix
/// products the backward pass (Dao et al. 2022) runs in them; the same bits on any number of threads.
///
/// # Errors
/// [`Error::Torch`] with libtorch's message.
pub fn attention(q_bhtc: &Tensor, k_bksc: &Tensor, v_bksc: &Tensor, causal: bool) -> Result<Tensor, Error> {
    let mut out = std::ptr::null_mut();
    let (q, k, v) = (ffi::ptr(q_bhtc), ffi::ptr(k_bksc), ffi::ptr(v_bksc));
    // SAFETY: live tensors borrowed for the call (the graph takes its own references), and a place for
    // one pointer; shapes and dtypes are checked on the other side, which falls back to libtorch's own.
    let status = unsafe { sys::tf_attention_cpu(q, k, v, causal.into(), &mut out) };
    ffi::check("attention", status)?;
    // SAFETY: on success the call wrote a tensor made by `new` for us.
    Ok(unsafe { ffi::owned(vec![out]) }.remove(0))
}

/// GELU (Hendrycks and Gimpel 2016), by its tanh approximation or exactly; differentiable.
///
/// # Errors
/// [`Error::Torch`] with libtorch's message.
pub fn gelu(x: &Tensor, tanh_form: bool) -> Result<Tensor, Error> {
    let mut out = std::ptr::null_mut();
    // SAFETY: a live tensor borrowed for the call (the graph takes its own reference), and a place for
    // one pointer.
    let status = unsafe { sys::tf_gelu_cpu(ffi::ptr(x), tanh_form.into(), &mut out) };
    ffi::check("GELU", status)?;
    // SAFETY: on success the call wrote a tensor made by `new` for us.
    Ok(unsafe { ffi::owned(vec![out]) }.remove(0))
}

/// A bias `[D]` beside `x` `[.., D]`.
fn check_bias(op: &'static str, x: &Tensor, bias: &Tensor) -> Result<(), Error> {
    let refuse = |rule, got| Err(Error::Precondition { op, rule, got });
    let (x_size, bias_size) = (x.size(), bias.size());
    if bias_size.len() != 1 || x_size.last() != bias_size.first() {
        return refuse(
            "of biases must be as long as x's last dimension",
            format!("{bias_size:?} for {x_size:?}"),
        );
    }
    if bias.kind() != x.kind() || bias.device() != x.device() {
        let got = format!("{:?} on {:?} for {:?} on {:?}", bias.kind(), bias.device(), x.kind(), x.device());
        return refuse("of biases must have x's dtype and device", got);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use tch::{Device, Kind};

    use super::*;
    use crate::autograd::grad;
    use crate::fused::testing::error;

    fn sdpa(q: &Tensor, k: &Tensor, v: &Tensor) -> Tensor {
        Tensor::scaled_dot_product_attention(q, k, v, None::<&Tensor>, 0.0, true, None, true)
    }

    #[test]
    fn gradients_of_attention_are_about_as_exact_as_libtorchs_whatever_the_shape() {
        for (heads, kv_heads, tokens, width) in [
            (4, 1, 1, 32),
            (4, 1, 33, 32),
            (16, 1, 100, 64),
            (4, 4, 257, 64),
            (8, 2, 64, 128),
            (2, 1, 40, 48),
        ] {
            let leaf = |heads: i64| {
                // As a projection leaves them.
                let x = Tensor::randn([2, tokens, heads, width], (Kind::BFloat16, Device::Cpu));
                x.transpose(1, 2).set_requires_grad(true)
            };
            let (q, k, v) = (leaf(heads), leaf(kv_heads), leaf(kv_heads));
            let out = attention(&q, &k, &v, true).unwrap();
            let dout = Tensor::randn_like(&out);
            let of = |out: &Tensor, dout: &Tensor, leaves: &[Tensor; 3]| grad(out, dout, leaves).unwrap();
            let ours = of(&out, &dout, &[&q, &k, &v].map(Tensor::shallow_clone));
            let theirs = of(&sdpa(&q, &k, &v), &dout, &[&q, &k, &v].map(Tensor::shallow_clone));
            let wide = [&q, &k, &v].map(|t| t.detach().to_kind(Kind::Double).set_requires_grad(true));
            let exact = of(&sdpa(&wide[0], &wide[1], &wide[2]), &dout.to_kind(Kind::Double), &wide);
            for ((ours, theirs), exact) in ours.iter().zip(&theirs).zip(&exact) {
                let (own, peers) = (error(ours, exact), error(theirs, exact));
                assert!(own <= 1.3 * peers + 1e-6, "{heads} {kv_heads} {tokens} {width}: {own} and {peers}");
            }
        }
    }

    #[test]
    fn gelu_is_right_to_the_last_bit_of_bf16() {
        let bits: Vec<i16> = (i16::MIN..=i16::MAX).collect();
        let all = Tensor::from_slice(&bits).view_dtype(Kind::BFloat16);
        let finite = all.isfinite();
        let x = all.masked_select(&finite).set_requires_grad(true);
        let exact_x = x.detach().to_kind(Kind::Double).set_requires_grad(true);
        // The exact form is libtorch's own.
        let (y, exact) = (gelu(&x, true).unwrap(), exact_x.gelu("tanh"));
        let ones = Tensor::ones_like(&y);
        let dx = grad(&y, &ones, &[x.shallow_clone()]).unwrap().remove(0);
        let exact_dx =
            grad(&exact, &ones.to_kind(Kind::Double), &[exact_x.shallow_clone()]).unwrap().remove(0);
        for (ours, exact) in [(&y, &exact), (&dx, &exact_dx)] {
            let apart = (ours.detach().to_kind(Kind::Double) - exact.detach()).abs();
            // Half a unit in the last of 8 bits, and a little of fp32's own error.
            let allowed = exact.detach().abs() * 0.00391 + 1e-7;
            let off = apart.gt_tensor(&allowed).sum(Kind::Int64).int64_value(&[]);
            assert_eq!(off, 0, "{off} values are off");
        }
    }
}
