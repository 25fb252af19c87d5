//! Which kernel attention would run on, before a step depends on it.

use tch::{Device, Kind, Tensor};
use tunefleet_kernels_sys as sys;

use crate::{Error, ffi};

const OP: &str = "choosing attention's kernel";

/// Names by their numbers in `at::SDPBackend`.
const BACKENDS: [&str; 5] = ["math", "flash", "efficient", "cuDNN", "overrideable"];

/// What attention is asked for: q `[1, heads, tokens, head_dim]`, k and v `[1, kv_heads, tokens, head_dim]`.
#[derive(Debug, Clone, Copy)]
struct Shape {
    device: Device,
    kind: Kind,
    heads: i64,
    kv_heads: i64,
    head_dim: i64,
    tokens: i64,
    dropout: f64,
}

/// The kernel that causal attention with gradients would run on: of libtorch "flash", "efficient" or "cuDNN"; on a
/// CPU also "own" (see [`crate::fused::attention`]) and "math", which holds every score at once. On a GPU "math" is
/// an error. Tensors of these shapes exist for the time of the call, but are not written to.
///
/// # Errors
/// [`Error::UnfusedAttention`] as said; [`Error::Torch`] for a shape that attention cannot have, or when memory
/// does not suffice.
pub fn assert_fused_attention(
    device: Device,
    kind: Kind,
    heads: i64,
    kv_heads: i64,
    head_dim: i64,
    tokens: i64,
    dropout: f64,
) -> Result<&'static str, Error> {
    let shape = Shape { device, kind, heads, kv_heads, head_dim, tokens, dropout };
    let name = backend(shape)?;
    if name != "math" || device == Device::Cpu {
        return Ok(name);
    }
    Err(Error::UnfusedAttention { shape: format!("{shape:?}"), advice: advice(shape, backend)? })
}

/// What makes a kernel of "math" a fused one, as far as trying says.
fn advice(
    shape: Shape,
    backend: impl Fn(Shape) -> Result<&'static str, Error>,
) -> Result<&'static str, Error> {
    let repeated = Shape { kv_heads: shape.heads, ..shape };
    if shape.kv_heads != shape.heads && backend(repeated)? != "math" {
        return Ok("repeat each key and value head for its query heads, which the kernel then takes");
    }
    let bf16 = Shape { kind: Kind::BFloat16, ..shape };
    if shape.kind != Kind::BFloat16 && backend(bf16)? != "math" {
        return Ok("compute in bf16");
    }
    if shape.dropout > 0.0 && backend(Shape { dropout: 0.0, ..shape })? != "math" {
        return Ok("set attention's dropout to 0");
    }
    Ok("use heads of another width: a multiple of 8 up to 128 suits most GPUs")
}

fn backend(shape: Shape) -> Result<&'static str, Error> {
    let Shape { device, kind, heads, kv_heads, head_dim, tokens, dropout } = shape;
    if heads <= 0 || kv_heads <= 0 || heads % kv_heads != 0 || head_dim <= 0 || tokens <= 0 {
        return Err(Error::Precondition {
            op: OP,
            rule: "of queries must have a multiple of the key and value heads, and no dimension of 0",
            got: format!("{shape:?}"),
        });
    }
    let of = |heads: i64| {
        // As projections leave them.
        let x = Tensor::f_empty([1, tokens, heads, head_dim], (kind, device));
        x.and_then(|x| x.f_transpose(1, 2)).and_then(|x| x.f_set_requires_grad(true)).map_err(|error| {
            Error::Torch { op: OP, message: error.to_string().lines().next().unwrap_or_default().to_owned() }
        })
    };
    let (q, k, v) = (of(heads)?, of(kv_heads)?, of(kv_heads)?);
    let mut chosen = 0;
    // SAFETY: live tensors borrowed for the call, and a place to write one int.
    let status =
        unsafe { sys::tf_attention_backend(ffi::ptr(&q), ffi::ptr(&k), ffi::ptr(&v), dropout, &mut chosen) };
    ffi::check(OP, status)?;
    if chosen == sys::TF_ATTENTION_OWN {
        return Ok("own");
    }
    let name = usize::try_from(chosen).ok().and_then(|index| BACKENDS.get(index)).copied();
    name.ok_or_else(|| Error::Torch {
        op: OP,
        message: format!("libtorch chose kernel {chosen}, of no name"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn on_a_cpu_the_kernel_that_runs_is_named() {
        let name = |kind, head_dim, dropout| {
            assert_fused_attention(Device::Cpu, kind, 4, 1, head_dim, 64, dropout).unwrap()
        };
        assert_eq!(name(Kind::Float, 64, 0.0), "flash");
        assert_eq!(name(Kind::Float, 64, 0.1), "math");
        // Ours needs tiles of bf16: a processor that has only vectors of it stays with libtorch's.
        let cpu = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let has_tiles = cpu.split_whitespace().any(|flag| flag == "amx_bf16");
        assert_eq!(name(Kind::BFloat16, 64, 0.0), if has_tiles { "own" } else { "flash" });
        assert_eq!(name(Kind::BFloat16, 40, 0.0), "flash", "a width that ours does not take");
    }

    #[test]
    fn a_shape_that_attention_cannot_have_is_refused() {
        for (heads, kv_heads, tokens) in [(4, 3, 8), (0, 1, 8), (4, 0, 8), (4, 4, 0), (-4, -2, 8)] {
            let error = assert_fused_attention(Device::Cpu, Kind::Float, heads, kv_heads, 64, tokens, 0.0);
            assert!(error.unwrap_err().to_string().contains("multiple"), "{heads} {kv_heads} {tokens}");
        }
        let negative =
            assert_fused_attention(Device::Cpu, Kind::Float, i64::MAX, 1, 64, 64, 0.0).unwrap_err();
        assert!(matches!(negative, Error::Torch { .. }), "{negative}");
    }

    #[test]
    fn the_advice_is_what_helps() {
        let shape = Shape {
            device: Device::Cuda(0),
            kind: Kind::Float,
            heads: 8,
            kv_heads: 1,
            head_dim: 64,
            tokens: 8,
            dropout: 0.1,
        };
        let when = |helps: fn(&Shape) -> bool| {
            advice(shape, |shape| Ok(if helps(&shape) { "flash" } else { "math" })).unwrap()
        };
        assert!(when(|shape| shape.kv_heads == 8).contains("repeat"));
        assert!(when(|shape| shape.kind == Kind::BFloat16).contains("bf16"));
        assert!(when(|shape| shape.dropout == 0.0).contains("dropout"));
        assert!(when(|_| false).contains("width"));
    }

    #[test]
    fn on_a_gpu_bf16_is_fused_and_fp32_of_shared_heads_is_an_error_that_helps_or_fused() {
        if !tch::Cuda::is_available() {
            println!("skipped: this machine has no GPU that libtorch can use");
            return;
        }
        let ask = |kind| assert_fused_attention(Device::Cuda(0), kind, 16, 1, 128, 2048, 0.1);
        assert_ne!(ask(Kind::BFloat16).unwrap(), "math");
        match ask(Kind::Float) {
            Ok(name) => assert_ne!(name, "math"),
            Err(error) => {
                let message = error.to_string();
                assert!(message.contains("kv_heads: 1") && message.contains("Float"), "{message}");
                assert!(message.contains("repeat") || message.contains("bf16"), "{message}");
            }
        }
    }
}
