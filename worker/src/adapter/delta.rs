//! One pair and its difference `s B A`: by rows where elements are needed, by Gram matrices where a norm is.

use std::ops::Range;

use tch::{Kind, Tensor};

/// Elements of a difference that are held at a time.
const BLOCK_ELEMENTS: i64 = 1 << 20;

/// What an adapter adds to one linear.
#[derive(Debug, Clone, Copy)]
pub struct Pair<'a> {
    /// `[rank, in]`.
    pub a: &'a Tensor,
    /// `[out, rank]`.
    pub b: &'a Tensor,
    /// What the product is multiplied by.
    pub scaling: f64,
    /// DoRA's magnitude per output row, where there is one.
    pub magnitude: Option<&'a Tensor>,
}

impl Pair<'_> {
    /// Inner width.
    pub fn rank(&self) -> i64 {
        self.a.size()[0]
    }

    /// Rows and columns of the difference.
    pub fn shape(&self) -> (i64, i64) {
        (self.b.size()[0], self.a.size()[1])
    }

    /// Some rows of the difference, accumulated in fp64.
    pub fn rows(&self, rows: &Range<i64>) -> Tensor {
        let b = self.b.narrow(0, rows.start, rows.end - rows.start).to_kind(Kind::Double);
        (b * self.scaling).matmul(&self.a.to_kind(Kind::Double))
    }

    /// Frobenius norm of the difference: the trace of `(B^T B)(A A^T)`, so no difference is formed.
    pub fn norm(&self) -> f64 {
        let (a, b) = (self.a.to_kind(Kind::Double), self.b.to_kind(Kind::Double));
        let trace = (b.tr().matmul(&b) * a.matmul(&a.tr())).sum(Kind::Double).double_value(&[]);
        // Not `max`, which would make 0 of what is not a number.
        self.scaling.abs() * if trace < 0.0 { 0.0 } else { trace.sqrt() }
    }
}

/// Ranges of rows that cover a matrix, each of few enough elements to be held.
pub fn row_blocks(rows: i64, columns: i64) -> impl Iterator<Item = Range<i64>> {
    let step = (BLOCK_ELEMENTS / columns.max(1)).max(1);
    (0..rows).step_by(step as usize).map(move |first| first..(first + step).min(rows))
}

#[cfg(test)]
mod tests {
    use tch::Device;

    use super::*;

    #[test]
    fn rows_and_norm_are_those_of_the_whole_difference() {
        let options = (Kind::Float, Device::Cpu);
        let (a, b) = (Tensor::randn([5, 33], options), Tensor::randn([17, 5], options));
        let pair = Pair { a: &a, b: &b, scaling: -0.5, magnitude: None };
        let whole = b.to_kind(Kind::Double).matmul(&a.to_kind(Kind::Double)) * -0.5;
        let parts = Tensor::cat(&[pair.rows(&(0..4)), pair.rows(&(4..17))], 0);
        assert!((&parts - &whole).abs().max().double_value(&[]) < 1e-12);
        let norm = whole.square().sum(Kind::Double).sqrt().double_value(&[]);
        assert!((pair.norm() - norm).abs() < 1e-9 * norm);
        assert_eq!(pair.shape(), (17, 33));
    }

    #[test]
    fn blocks_cover_all_rows_once() {
        for (rows, columns) in [(1, 1), (7, 1 << 21), (5, 1 << 23), (4096, 1024)] {
            let blocks: Vec<_> = row_blocks(rows, columns).collect();
            assert_eq!((blocks[0].start, blocks[blocks.len() - 1].end), (0, rows));
            assert!(blocks.windows(2).all(|w| w[0].end == w[1].start));
        }
    }
}
