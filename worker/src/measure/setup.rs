//! A rank with random weights and peers that are made up, set up as a run sets up its own.

use tch::{Device, Kind, Tensor};
use tunefleet_proto::base_plan::BasePlan;
use tunefleet_proto::ids::Rank;
use tunefleet_proto::job::{JobSpec, Offload};
use tunefleet_proto::measure::{Point, Request};
use tunefleet_proto::model::{Dropout, ModelConfig};
use tunefleet_proto::shard_plan::ShardPlan;

use super::Error;
use crate::base::{Base, encode};
use crate::comm::simulated::{Simulated, Traffic};
use crate::comm::{Mesh, Solo};
use crate::model::numerics::Numerics;
use crate::train::adapter::{Frozen, Wiring};
use crate::train::rng::Seeds;
use crate::train::units;
use crate::train::walk::{Walk, WalkOptions};

/// Standard deviation of the random weights, as fresh models of the family have it.
const SPREAD: f64 = 0.02;

/// The job at one point: so many blocks, so kept.
pub(super) fn at(request: &Request, point: Point) -> (JobSpec, ModelConfig) {
    let Request { mut spec, mut config, .. } = request.clone();
    config.layers = point.layers;
    if let Some(p) = spec.train.dropout {
        config.dropout = Dropout { attention: p, embedding: p, residual: p };
    }
    spec.train.recompute = point.recompute;
    spec.train.resident_blocks = point.resident_blocks;
    (spec, config)
}

/// The groups of rank 0, with peers that are made up.
pub(super) struct Peers {
    world: Option<Simulated>,
    shards: Option<Simulated>,
    replicas: Option<Simulated>,
}

impl Peers {
    /// Those of a rank of `spec`.
    pub fn new(spec: &JobSpec, link_bytes_per_second: Option<f64>) -> Self {
        let (ranks, shard_ranks) = (spec.train.ranks, spec.train.shard_ranks.max(1));
        let group =
            |world: u32| (world > 1).then(|| Simulated::new(Rank { rank: 0, world }, link_bytes_per_second));
        Peers { world: group(ranks), shards: group(shard_ranks), replicas: group(ranks / shard_ranks) }
    }

    /// The groups.
    pub fn mesh(&self) -> Mesh<'_> {
        Mesh {
            world: self.world.as_ref().map_or(&Solo as _, |world| world as _),
            shards: self.shards.as_ref().map_or(&Solo as _, |shards| shards as _),
            replicas: self.replicas.as_ref().map(|replicas| replicas as _),
        }
    }

    /// Traffic of weights and gradients since the last call.
    pub fn take_traffic(&self) -> Traffic {
        let mut sum = Traffic { gathered_bytes: 0, reduced_bytes: 0 };
        for group in [&self.shards, &self.replicas].into_iter().flatten() {
            let traffic = group.take_traffic();
            sum.gathered_bytes += traffic.gathered_bytes;
            sum.reduced_bytes += traffic.reduced_bytes;
        }
        sum
    }
}

/// The walk of rank 0 over random weights.
pub(super) fn walk<'a>(
    spec: &JobSpec,
    config: ModelConfig,
    mesh: Mesh<'a>,
    device: Device,
) -> Result<Walk<'a>, Error> {
    let plan = spec.shard_plan(&config)?;
    let numerics = Numerics::new(device, spec.train.precision);
    tch::manual_seed(spec.train.seed as i64);
    let offload = if device == Device::Cpu { Offload::None } else { spec.train.offload };
    let kind = if spec.adapter.is_some() { Kind::Float } else { numerics.kind };
    let shards = units::shards(&plan, 0, numerics, spec.train.optimizer, offload, kind)?;
    for shard in &shards {
        let _ = shard.master.shallow_clone().normal_(0.0, SPREAD);
    }
    let frozen = frozen(spec, &config, &plan, numerics)?;
    let (seeds, options) = (Seeds::new(spec.train.seed), WalkOptions::of(&spec.train));
    let mut walk = Walk::new(config, plan, shards, numerics, mesh, seeds, options);
    walk.invalidate();
    Ok(match frozen {
        Some(frozen) => walk.over(frozen),
        None => walk,
    })
}

/// A random frozen base under an adapter; `None` where all weights are trained.
fn frozen(
    spec: &JobSpec,
    config: &ModelConfig,
    plan: &ShardPlan,
    numerics: Numerics,
) -> Result<Option<Frozen>, Error> {
    let (Some(settings), Some(adapter), Some(base)) =
        (&spec.adapter, spec.adapter_plan(config)?, spec.base_plan(config))
    else {
        return Ok(None);
    };
    let shards = base_shards(&base, plan.world, numerics.device)?;
    let residency = WalkOptions::of(&spec.train).residency(plan.world, plan.units.len() - 1);
    let base = Base::new(base, shards, plan.world, numerics, &residency, false)?;
    Ok(Some(Frozen { base, wiring: Wiring::new(&settings.lora, &adapter, config, plan, numerics.device) }))
}

/// Rank 0's bytes of each unit; all blocks hold the values of the first one.
fn base_shards(base: &BasePlan, world: u32, device: Device) -> Result<Vec<Tensor>, Error> {
    let code8 = tunefleet_kernels::quant::dynamic_code(true, device)?;
    let mut shards: Vec<Tensor> = Vec::with_capacity(base.units.len());
    for (index, unit) in base.units.iter().enumerate() {
        let bytes = unit.padded_bytes(world);
        if let Some(first) = shards.get(1).filter(|_| base.units[1].bytes == unit.bytes && index > 1) {
            shards.push(first.copy());
            continue;
        }
        let buffer = Tensor::zeros([bytes as i64], (Kind::Uint8, device));
        for tensor in &unit.tensors {
            let shape: Vec<i64> = tensor.shape.iter().map(|&n| n as i64).collect();
            let values = Tensor::zeros(shape.as_slice(), (Kind::Float, device)).normal_(0.0, SPREAD);
            encode::encode(tensor, base.quantization, &values, &code8, &buffer)?;
        }
        shards.push(match world {
            1 => buffer,
            _ => buffer.narrow(0, 0, (bytes / u64::from(world)) as i64).copy(),
        });
    }
    Ok(shards)
}
