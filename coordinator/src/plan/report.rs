//! What `coordinator plan` knows about a job; its serde form is what `--json` prints.

use std::path::PathBuf;

use serde::Serialize;
use tunefleet_proto::job::{DeviceKind, JobSpec, ModelSpec};
use tunefleet_proto::model::{ModelConfig, Parameter};
use tunefleet_proto::shard_plan::ShardPlan;

use super::memory::{self, Item};
use crate::hardware::Hardware;

/// fp32 weight and both Adam moments.
const CHECKPOINT_BYTES_PER_ELEMENT: u64 = 12;

/// A job in numbers.
#[derive(Debug, Serialize)]
pub struct Report {
    /// Name of the job.
    pub job: String,
    /// Where it writes.
    pub output: PathBuf,
    /// Preset, or directory.
    pub model: String,
    /// The model's shape.
    pub config: ModelConfig,
    /// What there is to learn.
    pub parameters: Parameters,
    /// How much is learnt from.
    pub tokens: Tokens,
    /// What one rank needs.
    pub memory: Memory,
    /// Size of one checkpoint, all ranks together.
    pub checkpoint_bytes: u64,
    /// Size of the exported weights; 0 where none are.
    pub export_bytes: u64,
    /// Slots that the job needs and this machine has too few of.
    pub missing_slots: u32,
    /// Whether the job fits; absent where the machines are not known.
    pub fits: Option<bool>,
    /// Where every parameter lies in its unit.
    pub shard_plan: ShardPlan,
    /// Which elements each rank holds.
    pub ranks: Vec<RankShards>,
}

/// Parameter counts; a tied head is counted once.
#[derive(Debug, Serialize)]
pub struct Parameters {
    /// All.
    pub total: u64,
    /// Embeddings and final norm.
    pub embeddings: u64,
    /// One block.
    pub per_block: u64,
}

/// Token counts.
#[derive(Debug, Serialize)]
pub struct Tokens {
    /// Ranks.
    pub ranks: u32,
    /// Sequences of a micro-batch of one rank.
    pub micro_batch_sequences: u32,
    /// Micro-batches of a step.
    pub accumulate_micro_batches: u32,
    /// Tokens of a sequence.
    pub sequence_tokens: u32,
    /// Tokens of a step, over all ranks.
    pub per_step: u64,
    /// Steps.
    pub steps: u64,
    /// Tokens of the job.
    pub total: u64,
}

/// The memory of one rank.
#[derive(Debug, Serialize)]
pub struct Memory {
    /// Whether it is a GPU's.
    pub on_gpu: bool,
    /// By item.
    pub items: Vec<Item>,
    /// Sum of the items.
    pub needed_bytes: u64,
    /// What one rank can have; absent where it is not known.
    pub available_bytes: Option<u64>,
}

/// What one rank holds.
#[derive(Debug, Serialize)]
pub struct RankShards {
    /// Which rank.
    pub rank: u32,
    /// Its fp32 elements, padding included.
    pub elements: u64,
    /// Its pieces, by unit and in shard order.
    pub pieces: Vec<RankPiece>,
}

/// Elements `from..to` of a flattened parameter.
#[derive(Debug, Serialize)]
pub struct RankPiece {
    /// Unit of the shard plan.
    pub unit: String,
    /// Name inside the unit.
    pub parameter: String,
    /// First element.
    pub from: u64,
    /// Past the last element.
    pub to: u64,
    /// Where it begins in the rank's shard of the unit.
    pub shard_offset: u64,
}

impl Report {
    /// Works the job out. `rank_memory` is what a rank can have, where the user says so; else it is
    /// this machine's, unless the job runs elsewhere.
    pub fn new(spec: &JobSpec, config: ModelConfig, hardware: &Hardware, rank_memory: Option<u64>) -> Self {
        let train = &spec.train;
        let shard_plan = ShardPlan::new(&config, train.ranks);
        let elsewhere = spec.workers.coordinator.is_some() || rank_memory.is_some();
        let on_gpu = match train.device {
            DeviceKind::Cpu => false,
            DeviceKind::Cuda => true,
            DeviceKind::Auto => elsewhere || !hardware.gpus.is_empty(),
        };
        let gpus = u32::try_from(hardware.gpus.len()).unwrap_or(u32::MAX);
        let (available_bytes, slots) = match (elsewhere, on_gpu) {
            (true, _) => (rank_memory, None),
            (false, true) => {
                (hardware.smallest_gpu_bytes(), Some(spec.workers.slots.unwrap_or(gpus).min(gpus)))
            }
            // Ranks of one machine share its memory.
            (false, false) => (hardware.memory_bytes.map(|bytes| bytes / u64::from(train.ranks)), None),
        };
        let items = memory::of_rank(spec, &config, &shard_plan, on_gpu);
        let needed_bytes = items.iter().map(|item| item.bytes).sum();
        let missing_slots = slots.map_or(0, |slots| train.ranks.saturating_sub(slots));
        let fits = available_bytes.map(|bytes| needed_bytes <= bytes);
        let fits = if missing_slots > 0 { Some(false) } else { fits };
        let per_step = spec.step_sequences() * u64::from(spec.data.sequence_tokens);
        let parameters = Parameters::new(&config);
        let export_bytes = match spec.export.enabled {
            true => parameters.total * memory::bytes_of(spec.export.dtype),
            false => 0,
        };
        Report {
            job: spec.name.clone(),
            output: spec.output.clone(),
            model: match &spec.model {
                ModelSpec::Existing(dir) => dir.display().to_string(),
                ModelSpec::Init { preset, .. } => format!("{preset} (random weights)"),
            },
            parameters,
            tokens: Tokens {
                ranks: train.ranks,
                micro_batch_sequences: train.micro_batch_sequences,
                accumulate_micro_batches: train.accumulate_micro_batches,
                sequence_tokens: spec.data.sequence_tokens,
                per_step,
                steps: train.steps,
                total: per_step.saturating_mul(train.steps),
            },
            memory: Memory { on_gpu, items, needed_bytes, available_bytes },
            checkpoint_bytes: CHECKPOINT_BYTES_PER_ELEMENT
                * shard_plan.units.iter().map(|unit| unit.elements).sum::<u64>(),
            export_bytes,
            missing_slots,
            fits,
            ranks: (0..train.ranks).map(|rank| RankShards::new(&shard_plan, rank)).collect(),
            config,
            shard_plan,
        }
    }
}

impl Parameters {
    fn new(config: &ModelConfig) -> Self {
        let sum = |list: Vec<Parameter>| list.iter().map(Parameter::elements).sum();
        Parameters {
            total: config.parameter_count(),
            embeddings: sum(config.embed_parameters()),
            per_block: sum(config.block_parameters(0)),
        }
    }
}

impl RankShards {
    fn new(plan: &ShardPlan, rank: u32) -> Self {
        let mut pieces = Vec::new();
        for unit in &plan.units {
            pieces.extend(unit.pieces(rank, plan.world).into_iter().map(|piece| RankPiece {
                unit: unit.name.clone(),
                parameter: piece.slot.name.clone(),
                from: piece.range.start,
                to: piece.range.end,
                shard_offset: piece.shard_offset,
            }));
        }
        RankShards { rank, elements: plan.shard_elements(), pieces }
    }
}
