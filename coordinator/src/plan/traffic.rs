//! What travels between ranks in a step, and how long it takes beside what is computed meanwhile.

use tunefleet_proto::job::{JobSpec, Residency};
use tunefleet_proto::shard_plan::ShardPlan;

use super::memory::bytes_of;

/// Seconds of one block's parts of a micro-batch.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct BlockSeconds {
    /// Its forward pass.
    pub forward: f64,
    /// Its backward pass, without what is computed again.
    pub backward: f64,
}

/// Traffic of one step of a rank.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Traffic {
    /// Gathers, seconds.
    pub gather_seconds: f64,
    /// Reductions, seconds.
    pub reduce_seconds: f64,
    /// What of them nothing hides.
    pub exposed_seconds: f64,
}

/// The traffic of `spec`'s steps over links of `bytes_per_second`, beside blocks that take so long. Bytes of
/// a frozen base that are gathered with each block come in `base_bytes`.
pub fn of_step(
    spec: &JobSpec,
    plan: &ShardPlan,
    base_bytes: f64,
    block_seconds: BlockSeconds,
    bytes_per_second: f64,
) -> Traffic {
    let train = &spec.train;
    let blocks = plan.units.len().saturating_sub(1);
    let (ranks, copies) = (f64::from(plan.world), f64::from(train.ranks / plan.world.max(1)));
    let travels = |bytes: f64, world: f64| bytes * (world - 1.0) / world / bytes_per_second;
    let elements = |unit: usize| plan.units.get(unit).map_or(0.0, |unit| unit.elements as f64);
    let kind = if spec.adapter.is_some() { 4.0 } else { bytes_of(train.precision) as f64 };
    let wire = bytes_of(train.reduce_precision) as f64;
    let residency = Residency::of(train, blocks);
    let micro_batches = f64::from(train.accumulate_micro_batches);
    // When a pass turns round, the blocks that it met last are still in the shared buffers.
    let shared: Vec<usize> = (0..blocks).filter(|i| !residency.resident[*i]).collect();
    let slots = residency.shared_slots.min(shared.len());
    let (first, last) = (&shared[..slots], &shared[shared.len() - slots..]);

    let mut traffic = Traffic::default();
    for i in 0..blocks {
        let gather = travels(kind * elements(i + 1) + base_bytes, ranks);
        let reduce = travels(wire * elements(i + 1), ranks);
        // A shard's sum over the copies goes there and back, in the last micro-batch.
        let copy = 2.0 * travels(wire * elements(i + 1) / ranks, copies);
        let BlockSeconds { forward, backward } = block_seconds;
        let backward = backward + if residency.recomputed[i] { forward } else { 0.0 };
        let stays = residency.resident[i];
        let onwards = if stays || first.contains(&i) { 1.0 } else { micro_batches };
        let is_again = !stays && !last.contains(&i);
        let again = if is_again { gather } else { 0.0 };
        traffic.gather_seconds += onwards * gather + micro_batches * again;
        traffic.reduce_seconds += micro_batches * reduce + copy;
        traffic.exposed_seconds += onwards * (gather - forward).max(0.0);
        traffic.exposed_seconds += (micro_batches - 1.0) * (again + reduce - backward).max(0.0)
            + (again + reduce + copy - backward).max(0.0);
    }
    // The embeddings, once a step each way, with nothing beside them.
    let gather = travels(kind * elements(0), ranks);
    let reduce = travels(4.0 * elements(0), ranks) + 2.0 * travels(wire * elements(0) / ranks, copies);
    traffic.gather_seconds += gather;
    traffic.reduce_seconds += reduce;
    traffic.exposed_seconds += gather + reduce;
    traffic
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use tunefleet_proto::job;
    use tunefleet_proto::model::ModelConfig;

    use super::*;

    fn starcoder(overrides: &[&str], gb_per_second: f64) -> Traffic {
        let text = "dataset: d\nmodel: {init: {preset: starcoder}}\n\
                    train: {ranks: 8, accumulate_micro_batches: 1}\n";
        let overrides: Vec<String> = overrides.iter().map(|&text| text.to_owned()).collect();
        let spec = job::load(Path::new("/j.yaml"), text, &overrides, Path::new("/")).unwrap();
        let plan = spec.shard_plan(&ModelConfig::preset("starcoder").unwrap()).unwrap();
        // A block's forward pass of 2,048 tokens at 60% of an A100's peak.
        let block = BlockSeconds { forward: 0.0083, backward: 0.0166 };
        of_step(&spec, &plan, 0.0, block, gb_per_second * 1e9)
    }

    /// By hand: bf16 weights of 31 GB, of which a rank lacks seven eighths, twice; gradients in fp32.
    #[test]
    fn eight_ranks_of_starcoder_gather_twice_and_reduce_once() {
        let traffic = starcoder(&[], 200.0);
        assert!((traffic.gather_seconds - 2.0 * 27.15 / 200.0).abs() < 0.01, "{traffic:?}");
        assert!((traffic.reduce_seconds - 54.3 / 200.0).abs() < 0.01, "{traffic:?}");
        // All but the embeddings' is hidden behind the blocks.
        assert!(traffic.exposed_seconds < 0.02, "{traffic:?}");
        let slow = starcoder(&[], 15.0);
        assert!(slow.exposed_seconds > 0.6 * (slow.gather_seconds + slow.reduce_seconds), "{slow:?}");
    }

    #[test]
    fn what_stays_gathered_is_gathered_once_and_narrow_gradients_travel_faster() {
        let kept = starcoder(&["train.strategy=shard_grad_op"], 200.0);
        assert!((kept.gather_seconds - 27.15 / 200.0).abs() < 0.01, "{kept:?}");
        let narrow = starcoder(&["train.reduce_precision=bf16"], 200.0);
        assert!((narrow.reduce_seconds - 27.5 / 200.0).abs() < 0.01, "{narrow:?}");
        let copies = starcoder(&["train.strategy=no_shard"], 200.0);
        assert_eq!(copies.gather_seconds, 0.0);
        assert!((copies.reduce_seconds - 2.0 * 54.3 / 200.0).abs() < 0.01, "{copies:?}");
        assert_eq!(starcoder(&["train.ranks=1"], 200.0), Traffic::default());
    }
}
