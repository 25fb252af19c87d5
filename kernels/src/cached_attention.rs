//! Attention of a few new tokens over the keys and values of their sequences, in place: what a step of completions needs.
//! Many sequences cost one call, not several operations each.

use tch::{Device, Kind, Tensor};
use tunefleet_kernels_sys as sys;

use crate::{Error, ffi};

const OP: &str = "attention over a cache";

/// New tokens of a sequence.
#[derive(Debug)]
pub struct Run<'a> {
    /// Keys `[K, S, C]`; those of the new tokens are added.
    pub k_ksc: &'a Tensor,
    /// Values, likewise.
    pub v_ksc: &'a Tensor,
    /// Tokens that count so far.
    pub cached: i64,
    /// Row of the first new token.
    pub first: i64,
    /// New tokens.
    pub tokens: i64,
}

/// `[N, H C]` of `qkv_nf` `[N, (H + 2K) C]`, which holds all queries of a token, then its keys, then its values: each row
/// of a run sees its sequence up to itself. Rows of no run hold nothing that means anything. A row's result is the same
/// bits whatever else is in the call. `None` where another way is needed: a device that is not a CPU with AVX-512, and
/// heads that are no multiple of 16 wide. Not differentiable.
///
/// # Errors
/// [`Error::Precondition`] for tensors that do not fit.
pub fn attend(qkv_nf: &Tensor, heads: i64, kv_heads: i64, runs: &[Run<'_>]) -> Result<Option<Tensor>, Error> {
    if qkv_nf.device() != Device::Cpu {
        return Ok(None);
    }
    let refuse = |rule, got| Err(Error::Precondition { op: OP, rule, got });
    let (size, kind) = (qkv_nf.size(), qkv_nf.kind());
    let all_heads = heads + 2 * kv_heads;
    let &[rows, width] = size.as_slice() else {
        return refuse("must be a matrix", format!("{size:?}"));
    };
    if heads < 1 || kv_heads < 1 || heads % kv_heads != 0 || width % all_heads != 0 || width == 0 {
        return refuse("must hold all heads", format!("{width} for {heads} and 2 x {kv_heads}"));
    }
    if !matches!(kind, Kind::Float | Kind::BFloat16) {
        return refuse("must be fp32 or bf16", format!("{kind:?}"));
    }
    let head_dim = width / all_heads;
    for run in runs {
        let fits = |cache: &Tensor| {
            let room = matches!(cache.size()[..], [k, s, c]
                if k == kv_heads && c == head_dim && s >= run.cached.saturating_add(run.tokens));
            room && cache.kind() == kind && cache.device() == Device::Cpu && cache.is_contiguous()
        };
        let is_inside = run.first >= 0 && run.tokens >= 0 && run.first.saturating_add(run.tokens) <= rows;
        let is_one = run.k_ksc.size() == run.v_ksc.size();
        if !(fits(run.k_ksc) && fits(run.v_ksc) && is_one && is_inside && run.cached >= 0) {
            return refuse("of caches must have room for the new tokens", format!("{run:?}"));
        }
    }
    let raw: Vec<_> = runs
        .iter()
        .map(|run| sys::tf_cached_run {
            k: ffi::ptr(run.k_ksc),
            v: ffi::ptr(run.v_ksc),
            cached: run.cached,
            first: run.first,
            tokens: run.tokens,
        })
        .collect();
    let mut out = std::ptr::null_mut();
    // SAFETY: live CPU tensors borrowed for the call, whose sizes and kinds were checked above: every run's rows and
    // tokens lie inside them. A place for one pointer.
    let status = unsafe {
        sys::tf_cached_attention(ffi::ptr(qkv_nf), heads, kv_heads, raw.as_ptr(), raw.len(), &mut out)
    };
    ffi::check(OP, status)?;
    if out.is_null() {
        return Ok(None);
    }
    // SAFETY: on success the call wrote null, or a tensor made by `new` for us.
    Ok(Some(unsafe { ffi::owned(vec![out]) }.remove(0)))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Heads, heads of keys and values, their width.
    const SHAPES: [(i64, i64, i64); 4] = [(12, 1, 64), (4, 4, 16), (6, 2, 128), (1, 1, 256)];
    /// Cached and new tokens of each sequence.
    const RUNS: [(i64, i64); 4] = [(0, 5), (1, 1), (33, 3), (500, 1)];

    fn random(size: &[i64], kind: Kind) -> Tensor {
        Tensor::randn(size, (Kind::Float, Device::Cpu)).to_kind(kind)
    }

    struct Case {
        qkv: Tensor,
        caches: Vec<(Tensor, Tensor)>,
    }

    fn case((heads, kv_heads, width): (i64, i64, i64), kind: Kind) -> Case {
        let rows: i64 = RUNS.iter().map(|(_, tokens)| tokens).sum();
        let cache = || random(&[kv_heads, 510, width], kind);
        Case {
            qkv: random(&[rows, (heads + 2 * kv_heads) * width], kind),
            caches: RUNS.iter().map(|_| (cache(), cache())).collect(),
        }
    }

    fn runs(case: &Case) -> Vec<Run<'_>> {
        let mut first = 0;
        let mut out = Vec::new();
        for ((cached, tokens), (k_ksc, v_ksc)) in RUNS.into_iter().zip(&case.caches) {
            out.push(Run { k_ksc, v_ksc, cached, first, tokens });
            first += tokens;
        }
        out
    }

    #[test]
    fn every_token_sees_its_sequence_up_to_itself_and_is_kept() {
        for shape @ (heads, kv_heads, width) in SHAPES {
            for kind in [Kind::Float, Kind::BFloat16] {
                let case = case(shape, kind);
                let before: Vec<_> = case.caches.iter().map(|(k, v)| (k.copy(), v.copy())).collect();
                let Some(out) = attend(&case.qkv, heads, kv_heads, &runs(&case)).unwrap() else {
                    return println!("skipped: this CPU has no AVX-512");
                };
                for (run, (k_before, v_before)) in runs(&case).iter().zip(&before) {
                    let rows = case.qkv.narrow(0, run.first, run.tokens).to_kind(Kind::Double);
                    let part = |from: i64, count: i64| {
                        rows.narrow(1, from * width, count * width)
                            .view([run.tokens, count, width])
                            .transpose(0, 1)
                    };
                    let (q, k, v) = (part(0, heads), part(heads, kv_heads), part(heads + kv_heads, kv_heads));
                    let seen = run.cached + run.tokens;
                    let all = |before: &Tensor, new: &Tensor| {
                        Tensor::cat(
                            &[before.narrow(1, 0, run.cached).to_kind(Kind::Double), new.shallow_clone()],
                            1,
                        )
                    };
                    let (k, v) = (all(k_before, &k), all(v_before, &v));
                    assert_eq!(run.k_ksc.narrow(1, 0, seen).to_kind(Kind::Double), k);
                    assert_eq!(run.v_ksc.narrow(1, 0, seen).to_kind(Kind::Double), v);
                    assert!(run.k_ksc.narrow(1, seen, 510 - seen).equal(&k_before.narrow(
                        1,
                        seen,
                        510 - seen
                    )));
                    let for_heads = |x: &Tensor| x.repeat_interleave_self_int(heads / kv_heads, 0, None);
                    let hidden =
                        Tensor::ones([run.tokens, seen], (Kind::Bool, Device::Cpu)).triu(run.cached + 1);
                    let scores = q.bmm(&for_heads(&k).transpose(1, 2)) / (width as f64).sqrt();
                    let weights = scores.masked_fill(&hidden, f64::NEG_INFINITY).softmax(-1, Kind::Double);
                    let exact =
                        weights.bmm(&for_heads(&v)).transpose(0, 1).reshape([run.tokens, heads * width]);
                    let ours = out.narrow(0, run.first, run.tokens).to_kind(Kind::Double);
                    let off = (ours - exact).abs().max().double_value(&[]);
                    let allowed = if kind == Kind::Float { 3e-6 } else { 2e-2 };
                    assert!(off <= allowed, "{shape:?} {kind:?} {run:?}: {off}");
                }
            }
        }
    }

    #[test]
    fn a_row_does_not_depend_on_the_others() {
        for shape @ (heads, kv_heads, _) in SHAPES {
            let case = case(shape, Kind::BFloat16);
            let of = |runs: &[Run<'_>]| attend(&case.qkv, heads, kv_heads, runs).unwrap();
            let Some(together) = of(&runs(&case)) else { return };
            for run in runs(&case) {
                for token in 0..run.tokens {
                    let alone =
                        Run { cached: run.cached + token, first: run.first + token, tokens: 1, ..run };
                    let out = of(&[alone]).unwrap().get(run.first + token);
                    assert!(out.equal(&together.get(run.first + token)), "{shape:?} {run:?} {token}");
                }
            }
        }
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let case = case((4, 4, 16), Kind::Float);
        let message = |run: Run<'_>, heads| attend(&case.qkv, heads, 4, &[run]).unwrap_err().to_string();
        let run = || Run { cached: 509, ..runs(&case).remove(0) };
        assert!(message(run(), 4).contains("room for the new tokens"));
        assert!(message(Run { cached: 0, first: 8, ..run() }, 4).contains("room for the new tokens"));
        assert!(message(Run { cached: -1, ..run() }, 4).contains("room for the new tokens"));
        assert!(message(run(), 5).contains("hold all heads"));
    }
}
