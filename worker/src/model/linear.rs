//! One linear: trained whole, frozen with a low-rank pair beside it, or only multiplied with.

use tch::{Kind, Tensor};
use tunefleet_kernels::autograd::frozen_linear;

use super::matrix::Matrix;

/// A linear's tensors for one forward pass, all in the dtype of products. I and O: widths of input and
/// output, R: inner width of the pair, N: rows.
pub struct Linear<'a> {
    /// `[O, I]`.
    pub weight: &'a Tensor,
    /// `[O]`, where it adds one.
    pub bias: Option<&'a Tensor>,
    /// What an adapter adds; the weight is then frozen, and may lie in a scratch.
    pub adapted: Adapted<'a>,
}

/// What stands beside a weight.
pub enum Adapted<'a> {
    /// Nothing: the weight itself is trained.
    Trained,
    /// Nothing, and the weight is frozen.
    Frozen,
    /// A pair, and the weight is frozen.
    Pair(Pair<'a>),
}

/// A linear of a model that completes text, without gradients.
pub struct Served<'a> {
    /// The weight.
    pub matrix: &'a Matrix,
    /// `[O]`, where it adds one.
    pub bias: Option<&'a Tensor>,
    /// Pairs for runs of rows (first row, rows), without dropout and magnitudes.
    pub runs: Vec<(i64, i64, Pair<'a>)>,
}

/// A linear of a block.
pub enum Projection<'a> {
    /// Of a model in training.
    Trained(Linear<'a>),
    /// Of a model that completes text.
    Served(Served<'a>),
}

/// A low-rank pair (Hu et al. 2021), with a magnitude in DoRA (Liu et al. 2024).
pub struct Pair<'a> {
    /// `A`, `[R, I]`.
    pub a: &'a Tensor,
    /// `B`, `[O, R]`.
    pub b: &'a Tensor,
    /// What the product is multiplied by.
    pub scaling: f64,
    /// On the input of `A`; 0 in evaluation.
    pub dropout: f64,
    /// `[O]`; with it, rows of the adapted weight are scaled to these lengths.
    pub magnitude: Option<&'a Tensor>,
}

impl<'a> Projection<'a> {
    /// `[.., I]` to `[.., O]`.
    pub fn forward(&self, x: &Tensor) -> Tensor {
        match self {
            Projection::Trained(linear) => linear.forward(x),
            Projection::Served(served) => served.add_runs(x, served.matrix.times(x, served.bias)),
        }
    }

    /// As [`Linear::forward_unbiased`].
    pub fn forward_unbiased(&self, x: &Tensor) -> (Tensor, Option<&'a Tensor>) {
        match self {
            Projection::Trained(linear) => linear.forward_unbiased(x),
            Projection::Served(served) if x.device().is_cuda() => {
                (served.add_runs(x, served.matrix.times(x, None)), served.bias)
            }
            Projection::Served(_) => (self.forward(x), None),
        }
    }
}

impl Served<'_> {
    /// Adds to `y`, fresh from a product, what the pairs make of their rows of `x`.
    fn add_runs(&self, x: &Tensor, y: Tensor) -> Tensor {
        let rows = |t: &Tensor| t.reshape([-1, t.size().last().copied().unwrap_or(1)]);
        let (x_ni, y_no) = (rows(x), rows(&y));
        for (first, count, pair) in &self.runs {
            let inner_nr = x_ni.narrow(0, *first, *count).mm(&pair.a.tr()) * pair.scaling;
            let _ = y_no.narrow(0, *first, *count).addmm_(&inner_nr, &pair.b.tr());
        }
        y
    }
}

impl<'a> Linear<'a> {
    /// [`Linear::forward`] for whoever adds the bias in a pass of its own: without it, and the bias; or with
    /// it, and nothing, where the product adds it at no cost (on CPUs) or it belongs inside (DoRA).
    pub fn forward_unbiased(&self, x: &Tensor) -> (Tensor, Option<&'a Tensor>) {
        match &self.adapted {
            Adapted::Trained if x.device().is_cuda() => (x.linear(self.weight, None::<&Tensor>), self.bias),
            Adapted::Frozen if x.device().is_cuda() => (frozen(x, self.weight, None), self.bias),
            _ => (self.forward(x), None),
        }
    }

    /// `[.., I]` to `[.., O]`; differentiable in the input and in what is trained.
    pub fn forward(&self, x: &Tensor) -> Tensor {
        let pair = match &self.adapted {
            Adapted::Trained => return x.linear(self.weight, self.bias),
            Adapted::Frozen => return frozen(x, self.weight, self.bias),
            Adapted::Pair(pair) => pair,
        };
        let mut size = x.size();
        // Rows and columns from here on: in-place sums on views would cost copies in the backward pass.
        let x_ni = x.reshape([-1, size.pop().unwrap_or(1)]);
        size.push(self.weight.size()[0]);
        let dropped_ni = match pair.dropout {
            0.0 => x_ni.shallow_clone(),
            probability => x_ni.dropout(probability, true),
        };
        let inner_nr = dropped_ni.mm(&pair.a.tr()) * pair.scaling;
        let y_no = match pair.magnitude {
            None => frozen(&x_ni, self.weight, self.bias).addmm_(&inner_nr, &pair.b.tr()),
            Some(magnitude) => {
                // Near 1 throughout, where bf16 is coarse: in fp32, rounded once at the end.
                let scale_o = magnitude.to_kind(Kind::Float) / tch::no_grad(|| row_norms(self.weight, pair));
                let y_no = if pair.dropout == 0.0 {
                    let y_no = frozen(&x_ni, self.weight, None).addmm_(&inner_nr, &pair.b.tr()) * scale_o;
                    match self.bias {
                        Some(bias) => y_no + bias,
                        None => y_no,
                    }
                } else {
                    // The frozen part sees the whole input, its correction the dropped one.
                    let dropped_no = frozen(&dropped_ni, self.weight, None);
                    frozen(&x_ni, self.weight, self.bias)
                        + dropped_no * (&scale_o - 1.0)
                        + inner_nr.mm(&pair.b.tr()) * scale_o
                };
                y_no.to_kind(x_ni.kind())
            }
        };
        y_no.view(size.as_slice())
    }
}

/// Lengths of the rows of `W + scaling B A`, `[O]`, fp32. No gradient flows through them (section 4.3 of
/// the paper).
fn row_norms(weight: &Tensor, pair: &Pair<'_>) -> Tensor {
    let delta = pair.b.to_kind(Kind::Float).mm(&pair.a.to_kind(Kind::Float)) * pair.scaling;
    (delta + weight).norm_scalaropt_dim(2.0, 1, false)
}

/// # Panics
/// Where libtorch fails, as every operation of tch does; the rank process turns it into an error.
fn frozen(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Tensor {
    frozen_linear(x, weight, bias).unwrap_or_else(|error| panic!("{error}"))
}
