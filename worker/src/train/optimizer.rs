//! One update: global norm, clipping and AdamW on the shards, without a host synchronisation.

use tch::{Kind, Tensor};
use tunefleet_kernels::optim::{self, AdamW, AdamW8State, AdamWState};
use tunefleet_proto::ids::Rank;
use tunefleet_proto::job::TrainSpec;
use tunefleet_proto::shard_plan::Unit;

use super::Error;
use super::moments::Moments;
use super::units::{self, Run, Shard};
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
    crate::fault::point(crate::fault::Phase::Update);
    tch::no_grad(|| {
        let device = walk.numerics().device;
        // Padding has no gradient, and every element has one owner: the sum needs no exclusions.
        // Pieces, because on the CPU libtorch adds the squares of a tensor in fp32, one after the
        // other: a hundred million of them are off by more than half a per cent.
        let held = walk.shards().iter().filter(|shard| shard.grad.numel() > 0);
        let grads: Vec<Tensor> = held.flat_map(|shard| shard.grad.split(NORM_PIECE, 0)).collect();
        let norms = Tensor::stack(&optim::norms(&grads)?, 0).to_kind(Kind::Double);
        let sums = Tensor::stack(&[loss_sum.shallow_clone(), norms.square().sum(Kind::Double)], 0);
        walk.mesh().world.all_reduce(&sums, Tag { unit: None, what: "loss and norm" })?.wait()?;

        // Every copy of the weights has counted the same gradients.
        let copies = walk.mesh().replicas.map_or(1, |replicas| replicas.rank().world);
        let grad_norm = (sums.get(1) / f64::from(copies)).sqrt();
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
        // Where the master weights are: in main memory, if they are offloaded. The device is waited for then.
        let held = walk.shards().first().map_or(device, |shard| shard.master.device());
        let controls = Controls {
            step,
            step_scalar: Tensor::full([], step as f64, (Kind::Float, held)),
            divisor: divisor.to_kind(Kind::Float).to_device(held),
            found: nonfinite.to_kind(Kind::Float).to_device(held),
        };
        let units: Vec<(&Unit, &Shard)> = walk.plan().units.iter().zip(walk.shards()).collect();
        // All in few launches; or, where gradients are brought over, one unit's at a time.
        let together = if held == device { units.len() } else { 1 };
        let rank = walk.mesh().shards.rank();
        for units in units.chunks(together) {
            let there = |(unit, shard): &(_, &Shard)| (*unit, shard.grad.to_device(held));
            let grads: Vec<(&Unit, Tensor)> = units.iter().map(there).collect();
            for (decays, weight_decay) in [(true, spec.weight_decay), (false, 0.0)] {
                let states = grads.iter().zip(units).map(|((unit, grad), (_, shard))| (*unit, grad, *shard));
                update_runs(states, rank, decays, &controls, options(weight_decay))?;
            }
        }
        walk.invalidate();
        let values = Tensor::stack(&[sums.get(0) / targets, grad_norm, nonfinite.to_kind(Kind::Double)], 0);
        Ok(StepStatus { values })
    })
}

/// What an update is told on the device where it runs.
struct Controls {
    step: u64,
    step_scalar: Tensor,
    /// Gradients are divided by it.
    divisor: Tensor,
    /// Above 0 nothing changes.
    found: Tensor,
}

/// Updates those runs of the shards that decay, or those that do not.
fn update_runs<'t>(
    states: impl Iterator<Item = (&'t Unit, &'t Tensor, &'t Shard)>,
    rank: Rank,
    decays: bool,
    controls: &Controls,
    options: AdamW,
) -> Result<(), Error> {
    let Controls { step, step_scalar, divisor, found } = controls;
    let mut fp32 = Vec::new();
    for (unit, grad, shard) in states {
        let part = |t: &Tensor, run: &Run| t.narrow(0, run.begin, run.end - run.begin);
        match &shard.moments {
            Moments::Fp32 { exp_avg, exp_avg_sq } => {
                let runs = units::runs(unit, rank).into_iter().filter(|run| run.decays == decays);
                fp32.extend(runs.map(|run| AdamWState {
                    param: part(&shard.master, &run),
                    grad: part(grad, &run),
                    exp_avg: part(exp_avg, &run),
                    exp_avg_sq: part(exp_avg_sq, &run),
                }));
            }
            Moments::Bits8 { runs, .. } => {
                for run8 in runs.iter().filter(|run8| run8.run.decays == decays) {
                    let state = AdamW8State {
                        param: &part(&shard.master, &run8.run),
                        grad: &part(grad, &run8.run),
                        exp_avg: &run8.exp_avg.codes,
                        exp_avg_scales: &run8.exp_avg.scales,
                        exp_avg_sq: &run8.exp_avg_sq.codes,
                        exp_avg_sq_scales: &run8.exp_avg_sq.scales,
                        signed8: &run8.exp_avg.code8,
                        unsigned8: &run8.exp_avg_sq.code8,
                    };
                    optim::adamw_8bit(&state, *step, divisor, found, options)?;
                }
            }
        }
    }
    Ok(optim::fused_adamw(&fp32, step_scalar, divisor, found, options)?)
}
