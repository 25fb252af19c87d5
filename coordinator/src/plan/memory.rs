//! The memory of one rank, item by item, as the block walk of the worker allocates it.
//!
//! Names: S = a rank's fp32 elements, E and K = elements of the embeddings' unit and of the largest
//! block, c = bytes of a computed element, B x T = sequences x tokens of a micro-batch.

use serde::Serialize;
use tunefleet_proto::base_plan::{BasePlan, BaseUnit};
use tunefleet_proto::job::{JobSpec, Optimizer, Precision, Recompute};
use tunefleet_proto::model::ModelConfig;
use tunefleet_proto::shard_plan::ShardPlan;

/// Rows of logits that exist at once; the worker computes the loss in chunks of so many tokens.
const LOGITS_ROWS_CPU: u64 = 128;
/// Rows whose gradients of the logits are kept, in the dtype of products.
const GRADIENT_ROWS_CPU: u64 = 1024;
const LOGITS_ROWS_CUDA: u64 = 1024;
/// Gathered blocks at once: one is computed with while the other fills.
const GATHER_SLOTS: u64 = 2;
/// Gradient buffers at once: one travels while the other is filled.
const REDUCE_LANES: u64 = 2;
/// Program, libraries, allocator; a CUDA context with its kernels takes more. Measured, rounded up.
const ALLOWANCE_CPU: u64 = 400 << 20;
const ALLOWANCE_CUDA: u64 = 3 << 29;

/// One item.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Item {
    /// What it holds.
    pub what: &'static str,
    /// Its size.
    pub bytes: u64,
}

/// All items of one rank of `spec`; every rank has the same.
pub fn of_rank(spec: &JobSpec, config: &ModelConfig, plan: &ShardPlan, on_gpu: bool) -> Vec<Item> {
    let world = u64::from(plan.world);
    let alone = world == 1;
    let train = &spec.train;
    let recompute = train.recompute != Recompute::None;
    let c: u64 = bytes_of(train.precision);
    let shard = plan.shard_elements();
    let elements: Vec<u64> = plan.units.iter().map(|unit| unit.elements).collect();
    let (embed, blocks) = elements.split_first().map_or((0, &[][..]), |(embed, blocks)| (*embed, blocks));
    let block = blocks.iter().copied().max().unwrap_or(0);
    let block_count = blocks.len() as u64;

    // What an adapter trains is gathered in fp32.
    let (c_gathered, precision) = match spec.adapter {
        Some(_) => (4, Precision::Fp32),
        None => (c, train.precision),
    };
    let gathered = match (alone, precision) {
        // Alone and in fp32, the master weights are what is computed with.
        (true, Precision::Fp32) => 0,
        (true, Precision::Bf16) => c_gathered * elements.iter().sum::<u64>(),
        (false, _) if recompute => c_gathered * (embed + GATHER_SLOTS.min(block_count) * block),
        // Kept activations refer to the gathered weights until the backward pass.
        (false, _) => c_gathered * (embed + blocks.iter().sum::<u64>()),
    };
    let in_flight = if alone { 0 } else { REDUCE_LANES * 4 * (block + block / world) + 4 * embed };

    let tokens = u64::from(train.micro_batch_sequences) * u64::from(spec.data.sequence_tokens);
    let (d, inner) = (config.hidden_size, config.intermediate_size);
    // Both norms, QKV, attention, its projection, both sums, and the MLP before and after its
    // activation.
    let kept_per_token = 7 * d + 2 * config.kv_heads * config.head_dim() + 2 * inner;
    // In the backward pass, a gradient of the widest layer and one of the residual stream besides.
    let backward_per_token = 2 * (inner + d);
    let adapted = adapted(spec, config);
    let graphs = if recompute { 1 } else { block_count };

    let rows = tokens.min(if on_gpu { LOGITS_ROWS_CUDA } else { LOGITS_ROWS_CPU });
    let gradient_rows = tokens.min(if on_gpu { LOGITS_ROWS_CUDA } else { GRADIENT_ROWS_CPU });
    // Log-probabilities and logits in fp32, with a copy where products are in less; the gradients.
    let logit_bytes = rows * if train.precision == Precision::Fp32 { 8 } else { 10 } + gradient_rows * c;

    let moments = match train.optimizer {
        Optimizer::AdamW => ("Adam moments, fp32", 8 * shard),
        // A byte each, and an fp32 scale for 256 of them.
        Optimizer::AdamW8bit => ("Adam moments, 8 bits", 2 * shard + shard / 32),
        // What does not fit a GPU stays in main memory.
        Optimizer::AdamWPaged => ("Adam moments, paged", if on_gpu { 0 } else { 8 * shard }),
    };
    let base = spec.base_plan(config).map(|base| Frozen::new(&base, world, recompute, c));
    let base = base.unwrap_or_default();

    let item = |what, bytes| Item { what, bytes };
    let items = vec![
        item("frozen base", base.held),
        item("frozen base, gathered", base.gathered),
        item("frozen base, one block dequantised", base.scratch),
        item("master weights, fp32", 4 * shard),
        item(moments.0, moments.1),
        item("gradient shard, fp32", 4 * shard),
        item("gathered weights", gathered),
        item("gradients of one block", c * block),
        item("gradients being reduced, fp32", in_flight),
        item("block inputs", block_count * tokens * d * c),
        item("activations of blocks (estimate)", tokens * c * graphs * kept_per_token),
        item("dropped inputs of pairs", tokens * (c + 1) * graphs * adapted.dropped_per_token),
        item("lengths of rows, fp32", 12 * adapted.largest_magnitude),
        // The one is gone before the other begins.
        item(
            "logits, or a block's backward pass",
            (config.vocab_size * logit_bytes).max(tokens * c * backward_per_token),
        ),
        item("program and libraries (allowance)", if on_gpu { ALLOWANCE_CUDA } else { ALLOWANCE_CPU }),
    ];
    items.into_iter().filter(|item| item.bytes > 0).collect()
}

/// Bytes of a frozen base on one rank.
#[derive(Default)]
struct Frozen {
    held: u64,
    gathered: u64,
    scratch: u64,
}

impl Frozen {
    fn new(base: &BasePlan, world: u64, recompute: bool, c: u64) -> Self {
        let ranks = u32::try_from(world).unwrap_or(u32::MAX);
        let padded: Vec<u64> = base.units.iter().map(|unit| unit.padded_bytes(ranks)).collect();
        let (embed, blocks) = padded.split_first().map_or((0, &[][..]), |(embed, blocks)| (*embed, blocks));
        let largest = blocks.iter().copied().max().unwrap_or(0);
        let gathered = match (world, recompute) {
            // Alone, what is held is what is computed with.
            (1, _) => 0,
            (_, true) => embed + GATHER_SLOTS.min(blocks.len() as u64) * largest,
            (_, false) => padded.iter().sum(),
        };
        let scratch = base.units.iter().map(BaseUnit::quantized_elements).max().unwrap_or(0);
        Frozen { held: padded.iter().sum::<u64>() / world, gathered, scratch: c * scratch }
    }
}

/// What pairs keep besides their inputs, which the linears beside them keep as well.
#[derive(Default)]
struct Adapted {
    /// Values of one block that dropout passes on, per token.
    dropped_per_token: u64,
    /// Elements of the largest weight whose rows have a magnitude.
    largest_magnitude: u64,
}

fn adapted(spec: &JobSpec, config: &ModelConfig) -> Adapted {
    let (Some(settings), Ok(Some(plan))) = (&spec.adapter, spec.adapter_plan(config)) else {
        return Adapted::default();
    };
    let of_block = |block| plan.linears.iter().filter(move |linear| linear.block == block);
    let inputs = |block| of_block(block).map(|linear| linear.in_features).sum::<u64>();
    let dropped = (0..config.layers).map(inputs).max().unwrap_or(0);
    let weights = plan.linears.iter().map(|linear| linear.out_features * linear.in_features);
    Adapted {
        dropped_per_token: if settings.lora.dropout > 0.0 { dropped } else { 0 },
        largest_magnitude: if settings.lora.dora { weights.max().unwrap_or(0) } else { 0 },
    }
}

/// What people reckon an adapter's training takes, activations apart: half a byte for each parameter
/// of the base, and for each trained one 2 bytes of weight, 2 of gradient and 12 of optimizer.
pub fn rule_of_thumb(base_parameters: u64, trained: u64) -> Vec<Item> {
    let item = |what, bytes| Item { what, bytes };
    vec![
        item("base at 4 bits", base_parameters / 2),
        item("adapter, 16 bits", 2 * trained),
        item("gradients, 16 bits", 2 * trained),
        item("optimizer, fp32 copy and moments", 12 * trained),
    ]
}

/// Bytes of one element.
pub fn bytes_of(precision: Precision) -> u64 {
    match precision {
        Precision::Fp32 => 4,
        Precision::Bf16 => 2,
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use tunefleet_proto::job;

    use super::*;

    fn starcoder(overrides: &[&str]) -> Vec<Item> {
        let text = "dataset: d\nmodel: {init: {preset: starcoder}}\ntrain: {ranks: 8}\n";
        let overrides: Vec<String> = overrides.iter().map(|&text| text.to_owned()).collect();
        let spec = job::load(Path::new("/j.yaml"), text, &overrides, Path::new("/")).unwrap();
        let config = ModelConfig::preset("starcoder").unwrap();
        of_rank(&spec, &config, &spec.shard_plan(&config).unwrap(), true)
    }

    fn bytes(items: &[Item], what: &str) -> f64 {
        items.iter().filter(|item| item.what.starts_with(what)).map(|item| item.bytes as f64).sum()
    }

    #[test]
    fn starcoder_on_eight_gpus_needs_what_was_worked_out_by_hand() {
        let items = starcoder(&[]);
        let gb = |what| bytes(&items, what) / 1e9;
        assert!((gb("master weights") + gb("Adam moments") - 23.28).abs() < 0.03);
        assert!((gb("gradient shard") - 7.76).abs() < 0.01);
        // The embeddings, and two blocks of 0.76 GB.
        assert!((gb("gathered weights") - (0.70 + 2.0 * 0.755)).abs() < 0.02);
        assert!((gb("block inputs") - 1.007).abs() < 0.001);
        let total: f64 = items.iter().map(|item| item.bytes as f64).sum::<f64>() / 1e9;
        assert!((36.0..46.0).contains(&total), "{total} GB: fits 80 GB with room");
    }

    #[test]
    fn more_ranks_shrink_the_state_and_keeping_activations_costs() {
        let (eight, four) = (starcoder(&[]), starcoder(&["train.ranks=4"]));
        let ratio = bytes(&four, "Adam moments") / bytes(&eight, "Adam moments");
        assert!((ratio - 2.0).abs() < 1e-4);
        let kept = starcoder(&["train.recompute=none"]);
        assert!(bytes(&kept, "activations") > 10.0 * bytes(&eight, "activations"));
        assert!(bytes(&kept, "gathered") > 10.0 * bytes(&eight, "gathered"));
    }

    #[test]
    fn a_4_bit_adapter_of_starcoder_needs_what_was_worked_out_by_hand() {
        let alone = ["train.ranks=1", "adapter.rank=32", "train.micro_batch_sequences=4"];
        let items = starcoder(&alone);
        let gb = |what| bytes(&items, what) / 1e9;
        // 15.16 billion weights at 4.127 bits, the other 0.36 billion parameters at 16.
        assert!((bytes(&items[..1], "frozen base") / 1e9 - (7.822 + 0.710)).abs() < 0.01);
        assert!((gb("frozen base, one block") - 0.758).abs() < 0.001);
        // 110,428,160 trained elements.
        assert!((gb("master weights") - 0.4417).abs() < 0.001);
        assert!((gb("Adam moments") - 0.8834).abs() < 0.001);
        let total = items.iter().map(|item| item.bytes).sum::<u64>() - ALLOWANCE_CUDA;
        assert!(total < 18_000_000_000, "{total} bytes of tensors");
        let eight = starcoder(&["train.ranks=1", "adapter.rank=32", "train.optimizer=adamw_8bit"]);
        assert!(bytes(&eight, "Adam moments") < 0.3 * bytes(&items, "Adam moments"));
        let shared = starcoder(&["train.ranks=8", "adapter.rank=32"]);
        assert!(bytes(&shared[..1], "frozen base") < 0.126 * bytes(&items[..1], "frozen base"));
    }

    #[test]
    fn the_rule_of_thumb_of_the_published_run_is_9_51_gb() {
        let items = rule_of_thumb(15_517_456_384, 110_428_160);
        let gb: Vec<String> = items.iter().map(|item| format!("{:.2}", item.bytes as f64 / 1e9)).collect();
        assert_eq!(gb, ["7.76", "0.22", "0.22", "1.33"]);
        let total = items.iter().map(|item| item.bytes).sum::<u64>() as f64 / 1e9;
        assert!((total - 9.515).abs() < 0.02, "{total}");
    }
}
