//! Final norm and output head, with the chunked loss: logits exist for a few hundred rows at a
//! time, and their gradient overwrites them.

use tch::{Device, Kind, Tensor};
use tunefleet_kernels::{Error, fused};
use tunefleet_proto::model::EmbedLayout;

use super::block::Norm;
use super::embed::TableGrad;
use super::numerics::Numerics;

/// Targets with this value do not count, as in transformers.
pub const IGNORED: i64 = -100;

/// Rows of logits at a time on the CPU: 128 x 49,152 in bf16 are 12 MB, which are still in the caches when
/// their gradient takes their place.
const CPU_CHUNK_ROWS: i64 = 128;
/// Rows whose gradients of the logits are multiplied at once on the CPU: 100 MB in bf16.
const CPU_GROUP_ROWS: i64 = 1024;
/// On a GPU: products large enough to keep it busy, and 1,024 x 49,152 in bf16 are 101 MB.
const CUDA_CHUNK_ROWS: i64 = 1024;

/// The head's weights.
pub struct HeadParams<'a> {
    /// Final norm.
    pub norm: Norm<'a>,
    /// Output embedding; the token embedding where they are tied.
    pub weight_vd: &'a Tensor,
}

impl<'a> HeadParams<'a> {
    /// Among the parameters outside the blocks.
    pub fn of(layout: &EmbedLayout, embed: &'a [Tensor]) -> Self {
        let norm = Norm { weight: &embed[layout.norm_weight], bias: layout.norm_bias.map(|at| &embed[at]) };
        HeadParams { norm, weight_vd: &embed[layout.head] }
    }
}

/// Logits in fp32, `[.., V]`, of normed states.
pub fn logits(numerics: Numerics, weight_vd: &Tensor, h_btd: &Tensor) -> Tensor {
    let kind = numerics.product_kind;
    h_btd.to_kind(kind).matmul(&weight_vd.to_kind(kind).tr()).to_kind(Kind::Float)
}

/// Sum of the cross-entropy over rows that count (fp64 scalar on the device).
///
/// # Errors
/// A target outside the vocabulary, on a CPU.
pub fn loss_sum(
    numerics: Numerics,
    weight_vd: &Tensor,
    h_nd: &Tensor,
    targets_n: &Tensor,
) -> Result<Tensor, Error> {
    let kind = numerics.product_kind;
    let (weight_vd, h_nd) = (weight_vd.to_kind(kind), h_nd.to_kind(kind));
    let mut sum = Tensor::zeros([], (Kind::Double, numerics.device));
    for (first, len) in pieces(h_nd.size()[0], chunk_rows(numerics)) {
        let logits_cv = h_nd.narrow(0, first, len).mm(&weight_vd.tr());
        let losses_c = fused::softmax_cross_entropy_(&logits_cv, &targets_n.narrow(0, first, len), IGNORED)?;
        sum += losses_c.sum(Kind::Double);
    }
    Ok(sum)
}

/// Gradients of the logits of a group of rows, kept between calls: fresh memory would cost more
/// than the arithmetic on it.
#[derive(Debug, Default)]
pub struct Scratch(Option<Tensor>);

impl Scratch {
    fn take(&mut self, rows: i64, vocab: i64, kind: Kind, device: Device) -> Tensor {
        match &self.0 {
            Some(kept) if kept.size()[0] >= rows && kept.size()[1] == vocab => kept.narrow(0, 0, rows),
            _ => self.0.insert(Tensor::zeros([rows, vocab], (kind, device))).shallow_clone(),
        }
    }
}

/// [`loss_sum`], and its gradients times `scale` (fp32 scalar on the device): returns the sum and
/// `dh_nd`, and adds the weight's gradient to `dweight_vd` (fp32), where it is trained.
///
/// # Errors
/// As [`loss_sum`].
pub fn loss_sum_and_grads(
    numerics: Numerics,
    weight_vd: &Tensor,
    h_nd: &Tensor,
    targets_n: &Tensor,
    scale: &Tensor,
    dweight_vd: Option<&TableGrad>,
    scratch: &mut Scratch,
) -> Result<(Tensor, Tensor), Error> {
    let kind = numerics.product_kind;
    let weight_vd = weight_vd.to_kind(kind);
    let (rows, vocab) = (h_nd.size()[0], weight_vd.size()[0]);
    let mut sum = Tensor::zeros([], (Kind::Double, numerics.device));
    let mut dh_groups = Vec::new();
    for (first, len) in pieces(rows, group_rows(numerics)) {
        let (h_gd, targets_g) = (h_nd.narrow(0, first, len), targets_n.narrow(0, first, len));
        let dlogits_gv = scratch.take(len, vocab, kind, numerics.device);
        for (row, count) in pieces(len, chunk_rows(numerics)) {
            // The logits, and in their place d(loss)/d(logits), while they are in the caches.
            let logits_cv = dlogits_gv.narrow(0, row, count);
            let _ = h_gd.narrow(0, row, count).mm_out(&logits_cv, &weight_vd.tr());
            let targets_c = targets_g.narrow(0, row, count);
            sum += fused::softmax_cross_entropy_(&logits_cv, &targets_c, IGNORED)?.sum(Kind::Double);
        }
        // Once a group: the weight's gradient is the largest tensor here, and is read and written whole. The
        // scale goes onto the narrow side.
        if let Some(dweight_vd) = dweight_vd {
            let scaled_h_gd = (h_gd.to_kind(Kind::Float) * scale).to_kind(kind);
            let (mut into, dlogits) = match dweight_vd {
                TableGrad::Whole(into) => (into.shallow_clone(), dlogits_gv.shallow_clone()),
                TableGrad::Rows(rows, into) => (into.shallow_clone(), rows.columns(&dlogits_gv)),
            };
            if kind == Kind::Float {
                let _ = into.addmm_(&dlogits.tr(), &scaled_h_gd);
            } else {
                let _ = into.g_add_(&dlogits.tr().mm(&scaled_h_gd));
            }
        }
        dh_groups.push((dlogits_gv.mm(&weight_vd) * scale).to_kind(kind));
    }
    Ok((sum, Tensor::cat(&dh_groups, 0)))
}

/// Rows whose logits are computed at once.
fn chunk_rows(numerics: Numerics) -> i64 {
    if numerics.device == Device::Cpu { CPU_CHUNK_ROWS } else { CUDA_CHUNK_ROWS }
}

/// Rows whose gradients of the logits exist at a time.
fn group_rows(numerics: Numerics) -> i64 {
    if numerics.device == Device::Cpu { CPU_GROUP_ROWS } else { CUDA_CHUNK_ROWS }
}

/// First row and length of each piece.
fn pieces(rows: i64, step: i64) -> impl Iterator<Item = (i64, i64)> {
    (0..rows).step_by(step as usize).map(move |first| (first, step.min(rows - first)))
}
