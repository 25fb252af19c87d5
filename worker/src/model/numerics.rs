//! Dtype and device of the computation, and the products that depend on them.

use tch::{Device, Kind, Tensor};
use tunefleet_kernels::fused;
use tunefleet_proto::job::Precision;
use tunefleet_proto::model::Activation;

use super::block::Norm;

/// How to compute.
///
/// On CPUs without bf16 matrix instructions libtorch multiplies bf16 several times slower than
/// fp32. There, bf16 means: weights and the residual stream between blocks are rounded to bf16,
/// and the inside of a block runs in fp32 on them. That is more accurate, and as fast as fp32.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Numerics {
    /// Where.
    pub device: Device,
    /// Dtype of gathered weights and of what is kept between blocks.
    pub kind: Kind,
    /// Dtype in which products run.
    pub product_kind: Kind,
}

impl Numerics {
    /// The fastest faithful way to compute in `precision` on `device`.
    pub fn new(device: Device, precision: Precision) -> Self {
        let kind = match precision {
            Precision::Fp32 => Kind::Float,
            Precision::Bf16 => Kind::BFloat16,
        };
        let slow = device == Device::Cpu && !tunefleet_kernels::device::cpu_bf16_matmul_is_native();
        Numerics { device, kind, product_kind: if slow { Kind::Float } else { kind } }
    }

    /// The precision in which `device` is fast: bf16, but fp32 on a CPU that does not multiply bf16.
    pub fn fast_precision(device: Device) -> Precision {
        let native = device != Device::Cpu || tunefleet_kernels::device::cpu_bf16_matmul_is_native();
        if native { Precision::Bf16 } else { Precision::Fp32 }
    }

    /// `tensors` in the dtype of products; the same tensors where that is theirs.
    pub fn for_products(&self, tensors: Vec<Tensor>) -> Vec<Tensor> {
        if self.product_kind == self.kind {
            return tensors;
        }
        tensors.iter().map(|t| t.to_kind(self.product_kind)).collect()
    }
}

/// Scaled dot-product attention, differentiable. `q_bhtc`, and `k_bksc`, `v_bksc` with H a
/// multiple of K. Causal masks let query t see keys up to t. Which of libtorch's paths it takes
/// depends on device, dtype and dropout; on CPU without dropout it is the fused one, with our own
/// backward pass in bf16.
///
/// # Panics
/// Where libtorch fails, as every operation of tch does; the rank process turns it into an error.
pub fn attention(q_bhtc: &Tensor, k_bksc: &Tensor, v_bksc: &Tensor, causal: bool, dropout: f64) -> Tensor {
    if dropout == 0.0 && q_bhtc.device() == Device::Cpu {
        return fused::attention(q_bhtc, k_bksc, v_bksc, causal).unwrap_or_else(|error| panic!("{error}"));
    }
    Tensor::scaled_dot_product_attention(q_bhtc, k_bksc, v_bksc, None::<&Tensor>, dropout, causal, None, true)
}

/// The activation of `x`, with `bias` added first where there is one; differentiable.
///
/// # Panics
/// As [`attention`].
pub fn activate(x: &Tensor, bias: Option<&Tensor>, activation: Activation) -> Tensor {
    let tanh_form = match activation {
        Activation::Gelu => false,
        Activation::GeluPytorchTanh => true,
        Activation::Silu => return bias.map_or_else(|| x.silu(), |bias| (x + bias).silu()),
    };
    let y = match bias {
        None => fused::gelu(x, tanh_form),
        Some(bias) => fused::bias_gelu(x, bias, tanh_form),
    };
    y.unwrap_or_else(|error| panic!("{error}"))
}

/// The activation of `gate`, times `up`; differentiable.
///
/// # Panics
/// As [`attention`].
pub fn gated(gate: &Tensor, up: &Tensor, activation: Activation) -> Tensor {
    match activation {
        Activation::Silu => fused::gated(gate, up).unwrap_or_else(|error| panic!("{error}")),
        _ => activate(gate, None, activation) * up,
    }
}

/// A norm over the last dimension, differentiable: layer norm where it has a bias, else RMS norm.
///
/// # Panics
/// As [`attention`].
pub fn norm(norm: &Norm<'_>, x: &Tensor, epsilon: f64) -> Tensor {
    fused::layer_norm(x, norm.weight, norm.bias, epsilon).unwrap_or_else(|error| panic!("{error}"))
}

/// `residual + dropout(x)`, differentiable; what is dropped follows from `seed` and `stream`.
///
/// # Panics
/// As [`attention`].
pub fn residual_dropout(residual: &Tensor, x: &Tensor, probability: f64, seed: i64, stream: i64) -> Tensor {
    fused::residual_dropout(residual, x, None, probability, seed, stream)
        .unwrap_or_else(|error| panic!("{error}"))
}
