//! The nearest pair of a given rank, and how near it is.
//!
//! A weighted sum of pairs is itself `[w s B ...] [A ...]` of rank `R = sum of ranks`. With `QR` of both
//! factors only an `R x R` matrix is decomposed, so no `out x in` matrix is ever formed. All in fp64.

use tch::{Kind, Tensor};

use super::Error;
use super::delta::Pair;

/// A pair with scaling 1, and what was cut off to get it.
#[derive(Debug)]
pub struct Truncated {
    /// `[rank, in]`, orthonormal rows.
    pub a: Tensor,
    /// `[out, rank]`, columns as long as the singular values.
    pub b: Tensor,
    /// Sum of the squares of the singular values that were cut off.
    pub dropped_squares: f64,
    /// Sum of all squares: the square of the whole difference's norm.
    pub squares: f64,
}

impl Truncated {
    /// Norm of what was cut off over the norm of the whole.
    pub fn relative_error(&self) -> f64 {
        relative(self.dropped_squares, self.squares)
    }
}

/// Root of a ratio of squares; 0 of nothing.
pub(super) fn relative(part: f64, whole: f64) -> f64 {
    if whole > 0.0 { (part / whole).sqrt() } else { 0.0 }
}

/// The pair of at most `rank` nearest to `sum w s B A` in the Frobenius norm.
///
/// # Errors
/// [`Error::Compute`] when libtorch's decomposition does not converge.
pub fn of_pairs(module: &str, terms: &[(f64, Pair<'_>)], rank: i64) -> Result<Truncated, Error> {
    let double = |t: &Tensor| t.to_kind(Kind::Double);
    let b: Vec<Tensor> = terms.iter().map(|(w, pair)| double(pair.b) * (w * pair.scaling)).collect();
    let a: Vec<Tensor> = terms.iter().map(|(_, pair)| double(pair.a)).collect();
    let compute = || -> Result<Truncated, tch::TchError> {
        let (left, left_r) = Tensor::f_linalg_qr(&Tensor::f_cat(&b, 1)?, "reduced")?;
        let (right, right_r) = Tensor::f_linalg_qr(&Tensor::f_cat(&a, 0)?.tr(), "reduced")?;
        let (u, s, v) = left_r.f_matmul(&right_r.tr())?.f_svd(true, true)?;
        Ok(cut(&left.f_matmul(&u)?, &s, &right.f_matmul(&v)?, rank))
    };
    compute().map_err(Error::compute(module))
}

/// The pair of at most `rank` nearest to a matrix that is at hand.
///
/// # Errors
/// As [`of_pairs`].
pub fn of_matrix(module: &str, delta: &Tensor, rank: i64) -> Result<Truncated, Error> {
    let (u, s, v) = delta.to_kind(Kind::Double).f_svd(true, true).map_err(Error::compute(module))?;
    Ok(cut(&u, &s, &v, rank))
}

fn cut(u: &Tensor, s: &Tensor, v: &Tensor, rank: i64) -> Truncated {
    let kept = rank.clamp(1, s.size()[0]);
    let square_sum = |t: &Tensor| t.square().sum(Kind::Double).double_value(&[]);
    let b = u.narrow(1, 0, kept) * s.narrow(0, 0, kept);
    Truncated {
        a: v.narrow(1, 0, kept).tr().to_kind(Kind::Float).contiguous(),
        b: b.to_kind(Kind::Float).contiguous(),
        dropped_squares: square_sum(&s.narrow(0, kept, s.size()[0] - kept)),
        squares: square_sum(s),
    }
}
