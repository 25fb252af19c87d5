//! Final norm and output head, with the chunked loss: logits exist for a few hundred rows at a
//! time, and their gradient overwrites them.

use tch::{Device, Kind, Tensor};

use super::numerics::Numerics;

/// Targets with this value do not count, as in transformers.
pub const IGNORED: i64 = -100;

/// Rows of logits at a time on the CPU: 128 x 49,152 fp32 are 25 MB, which the allocator keeps for
/// the next chunk (see `kernels::device::keep_freed_memory`).
const CPU_CHUNK_ROWS: i64 = 128;
/// Rows whose gradients of the logits are multiplied at once on the CPU: 100 MB in bf16.
const CPU_GROUP_ROWS: i64 = 1024;
/// On a GPU: products large enough to keep it busy, and 1,024 x 49,152 fp32 are 201 MB.
const CUDA_CHUNK_ROWS: i64 = 1024;

/// The head's weights.
pub struct HeadParams<'a> {
    /// Final norm, `[D]`.
    pub norm_weight: &'a Tensor,
    /// Final norm, `[D]`.
    pub norm_bias: &'a Tensor,
    /// Output embedding; the token embedding where they are tied.
    pub weight_vd: &'a Tensor,
}

/// The final norm; differentiable.
pub fn norm(params: &HeadParams<'_>, x_btd: &Tensor, epsilon: f64) -> Tensor {
    let width = params.norm_weight.size()[0];
    x_btd.layer_norm([width], Some(params.norm_weight), Some(params.norm_bias), epsilon, true)
}

/// Logits in fp32, `[.., V]`, of normed states.
pub fn logits(numerics: Numerics, weight_vd: &Tensor, h_btd: &Tensor) -> Tensor {
    let kind = numerics.product_kind;
    h_btd.to_kind(kind).matmul(&weight_vd.to_kind(kind).tr()).to_kind(Kind::Float)
}

/// Sum of the cross-entropy over rows that count (fp64 scalar on the device).
pub fn loss_sum(numerics: Numerics, weight_vd: &Tensor, h_nd: &Tensor, targets_n: &Tensor) -> Tensor {
    let weight_vd = weight_vd.to_kind(numerics.product_kind);
    let mut sum = Tensor::zeros([], (Kind::Double, numerics.device));
    for chunk in chunks(numerics, h_nd, targets_n) {
        let log_probs_cv = logits(numerics, &weight_vd, &chunk.h_cd).log_softmax(-1, Kind::Float);
        sum += chunk.loss(&log_probs_cv);
    }
    sum
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
pub fn loss_sum_and_grads(
    numerics: Numerics,
    weight_vd: &Tensor,
    h_nd: &Tensor,
    targets_n: &Tensor,
    scale: &Tensor,
    dweight_vd: Option<&Tensor>,
    scratch: &mut Scratch,
) -> (Tensor, Tensor) {
    let kind = numerics.product_kind;
    let weight_vd = weight_vd.to_kind(kind);
    let (rows, vocab) = (h_nd.size()[0], weight_vd.size()[0]);
    let mut sum = Tensor::zeros([], (Kind::Double, numerics.device));
    let mut dh_groups = Vec::new();
    let minus_one = Tensor::full([1, 1], -1.0, (Kind::Float, numerics.device));
    for first in (0..rows).step_by(group_rows(numerics) as usize) {
        let len = group_rows(numerics).min(rows - first);
        let (h_gd, targets_g) = (h_nd.narrow(0, first, len), targets_n.narrow(0, first, len));
        let dlogits_gv = scratch.take(len, vocab, kind, numerics.device);
        let mut row = 0;
        for chunk in chunks(numerics, &h_gd, &targets_g) {
            let mut log_probs_cv = logits(numerics, &weight_vd, &chunk.h_cd).log_softmax(-1, Kind::Float);
            sum += chunk.loss(&log_probs_cv);
            // d(loss)/d(logits) = softmax - onehot, in place.
            let mut dlogits_cv = log_probs_cv.exp_();
            let ones = minus_one.expand_as(&chunk.targets_c1);
            let dlogits_cv = dlogits_cv.scatter_add_(1, &chunk.targets_c1, &ones);
            let count = chunk.h_cd.size()[0];
            dlogits_gv.narrow(0, row, count).copy_(&dlogits_cv);
            row += count;
        }
        // The row weight (0 where ignored) and the scale go onto the narrow side.
        let row_scale_g1 = targets_g.ne(IGNORED).to_kind(Kind::Float).unsqueeze(1) * scale;
        // Once a group: the weight's gradient is the largest tensor here, and is read and written whole.
        if let Some(dweight_vd) = dweight_vd {
            let scaled_h_gd = (h_gd.to_kind(Kind::Float) * &row_scale_g1).to_kind(kind);
            let mut dweight_vd = dweight_vd.shallow_clone();
            if kind == Kind::Float {
                let _ = dweight_vd.addmm_(&dlogits_gv.tr(), &scaled_h_gd);
            } else {
                let _ = dweight_vd.g_add_(&dlogits_gv.tr().mm(&scaled_h_gd));
            }
        }
        dh_groups.push((dlogits_gv.mm(&weight_vd) * row_scale_g1).to_kind(kind));
    }
    (sum, Tensor::cat(&dh_groups, 0))
}

/// Rows whose gradients of the logits exist at a time.
fn group_rows(numerics: Numerics) -> i64 {
    if numerics.device == Device::Cpu { CPU_GROUP_ROWS } else { CUDA_CHUNK_ROWS }
}

struct Chunk {
    h_cd: Tensor,
    /// Ignored rows point at token 0 and count 0.
    targets_c1: Tensor,
    /// 1 where the row counts, else 0 (fp32).
    counts_c1: Tensor,
}

impl Chunk {
    fn loss(&self, log_probs_cv: &Tensor) -> Tensor {
        let picked_c1 = log_probs_cv.gather(1, &self.targets_c1, false);
        -(picked_c1 * &self.counts_c1).sum(Kind::Double)
    }
}

fn chunks(numerics: Numerics, h_nd: &Tensor, targets_n: &Tensor) -> impl Iterator<Item = Chunk> {
    let rows = h_nd.size()[0];
    let step = if numerics.device == Device::Cpu { CPU_CHUNK_ROWS } else { CUDA_CHUNK_ROWS };
    let (h_nd, targets_n) = (h_nd.shallow_clone(), targets_n.shallow_clone());
    (0..rows).step_by(step as usize).map(move |first| {
        let len = step.min(rows - first);
        let targets_c1 = targets_n.narrow(0, first, len).unsqueeze(1);
        Chunk {
            h_cd: h_nd.narrow(0, first, len),
            counts_c1: targets_c1.ne(IGNORED).to_kind(Kind::Float),
            targets_c1: targets_c1.clamp_min(0),
        }
    })
}
