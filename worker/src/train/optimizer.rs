//! One update: global norm, clipping and AdamW on the shards, without a host synchronisation.

use tch::{Kind, Tensor};
use tunefleet_kernels::optim::{self, AdamW, AdamWState};
use tunefleet_proto::job::TrainSpec;
use tunefleet_proto::shard_plan::Unit;

use super::Error;
use super::units::Shard;
use super::walk::Walk;
use crate::comm::Tag;

/// Elements whose squares are added up in fp32; the rest is added in fp64.
const NORM_PIECE: i64 = 1 << 20;

/// What an update found, still on the device: reading it waits for the step.
pub struct StepStatus {
    /// `[mean loss, gradient norm, 1 where either is not finite]`, fp64, the same on all ranks.
    values: Tensor,
}

/// [`StepStatus`] on the host.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StepValues {
    /// Mean loss over the counted targets of all ranks.
    pub loss: f64,
    /// Global gradient norm before clipping.
    pub grad_norm: f64,
    /// Whether the update was withheld, on all ranks alike.
    pub nonfinite: bool,
}

impl StepStatus {
    /// Waits for the step.
    pub fn read(&self) -> StepValues {
        let values = self.values.to_device(tch::Device::Cpu);
        StepValues {
            loss: values.double_value(&[0]),
            grad_norm: values.double_value(&[1]),
            nonfinite: values.double_value(&[2]) != 0.0,
        }
    }
}

/// Updates the shards of `walk` with the gradients they hold. `loss_sum` is this rank's, `targets`
/// the number of counted targets of all ranks (fp64 scalars on the device). Where loss or norm is
/// not finite on any rank, no rank changes anything.
///
/// # Errors
/// Whatever the collective meets.
pub fn update(
    walk: &mut Walk<'_>,
    spec: &TrainSpec,
    step: u64,
    learning_rate: f64,
    loss_sum: &Tensor,
    targets: &Tensor,
) -> Result<StepStatus, Error> {
    tch::no_grad(|| {
        let device = walk.numerics().device;
        // Padding has no gradient, and every element has one owner: the sum needs no exclusions.
        // Pieces, because on the CPU libtorch adds the squares of a tensor in fp32, one after the
        // other: a hundred million of them are off by more than half a per cent.
        let grads: Vec<Tensor> = walk.shards().iter().flat_map(|s| s.grad.split(NORM_PIECE, 0)).collect();
        let norms = Tensor::stack(&optim::norms(&grads)?, 0).to_kind(Kind::Double);
        let sums = Tensor::stack(&[loss_sum.shallow_clone(), norms.square().sum(Kind::Double)], 0);
        walk.comm().all_reduce(&sums, Tag { unit: None, what: "loss and norm" })?.wait()?;

        let grad_norm = sums.get(1).sqrt();
        let nonfinite = sums.get(0).isfinite().logical_and(&grad_norm.isfinite()).logical_not();
        let divisor = if spec.max_grad_norm > 0.0 {
            // torch.nn.utils.clip_grad_norm_: the coefficient max_norm / (norm + 1e-6), at most 1.
            ((&grad_norm + 1e-6) / spec.max_grad_norm).clamp_min(1.0)
        } else {
            Tensor::ones([], (Kind::Double, device))
        };
        let options = |weight_decay| AdamW {
            learning_rate,
            beta1: spec.betas.0,
            beta2: spec.betas.1,
            weight_decay,
            epsilon: spec.epsilon,
        };
        let step_scalar = Tensor::full([], step as f64, (Kind::Float, device));
        let divisor = divisor.to_kind(Kind::Float);
        let found = nonfinite.to_kind(Kind::Float);
        let world = walk.plan().world;
        let rank = walk.comm().rank().rank;
        for (decays, weight_decay) in [(true, spec.weight_decay), (false, 0.0)] {
            let mut states = Vec::new();
            for (unit, shard) in walk.plan().units.iter().zip(walk.shards()) {
                states.extend(runs(unit, shard, rank, world, decays));
            }
            optim::fused_adamw(&states, &step_scalar, &divisor, &found, options(weight_decay))?;
        }
        walk.invalidate();
        let values = Tensor::stack(&[sums.get(0) / targets, grad_norm, nonfinite.to_kind(Kind::Double)], 0);
        Ok(StepStatus { values })
    })
}

/// The parts of a shard whose parameters decay (or do not), neighbours joined: at most two.
fn runs(unit: &Unit, shard: &Shard, rank: u32, world: u32, decays: bool) -> Vec<AdamWState> {
    let mut ranges: Vec<(i64, i64)> = Vec::new();
    let mut previous_decays = None;
    for piece in unit.pieces(rank, world) {
        let end = (piece.shard_offset + piece.range.end - piece.range.start) as i64;
        if piece.slot.decays == decays {
            match ranges.last_mut() {
                // The padding between two neighbours is zero and stays zero.
                Some(last) if previous_decays == Some(decays) => last.1 = end,
                _ => ranges.push((piece.shard_offset as i64, end)),
            }
        }
        previous_decays = Some(piece.slot.decays);
    }
    ranges
        .into_iter()
        .map(|(begin, end)| {
            let part = |t: &Tensor| t.narrow(0, begin, end - begin);
            AdamWState {
                param: part(&shard.master),
                grad: part(&shard.grad),
                exp_avg: part(&shard.exp_avg),
                exp_avg_sq: part(&shard.exp_avg_sq),
            }
        })
        .collect()
}
