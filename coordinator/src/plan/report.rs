//! What `coordinator plan` knows about a job; its serde form is what `--json` prints.

use std::path::PathBuf;

use serde::Serialize;
use tunefleet_proto::adapter;
use tunefleet_proto::base_plan::QuantKind;
use tunefleet_proto::job::{DeviceKind, JobSpec, MergeBase, ModelSpec};
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
    /// What is trained, where it is an adapter.
    pub adapter: Option<AdapterParameters>,
}

/// An adapter in numbers, counted as PEFT counts.
#[derive(Debug, Serialize)]
pub struct AdapterParameters {
    /// Trained elements.
    pub trainable: u64,
    /// The base's and the adapter's together.
    pub all: u64,
    /// Share of the one in the other.
    pub percent: f64,
    /// Linears with a pair.
    pub linears: u64,
    /// Targets that match nothing.
    pub unmatched: Vec<String>,
    /// How the frozen linears are held.
    pub base: String,
    /// What people reckon it takes, activations apart.
    pub rule_of_thumb: Vec<Item>,
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
    ///
    /// # Errors
    /// An adapter's settings that do not fit the model.
    pub fn new(
        spec: &JobSpec,
        config: ModelConfig,
        hardware: &Hardware,
        rank_memory: Option<u64>,
    ) -> Result<Self, adapter::Error> {
        let train = &spec.train;
        let shard_plan = spec.shard_plan(&config)?;
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
        let parameters = Parameters::new(spec, &config)?;
        let whole = parameters.total * memory::bytes_of(spec.export.dtype);
        let export_bytes = match (&parameters.adapter, spec.export.enabled) {
            (_, false) => 0,
            (None, true) => whole,
            // The adapter's file is fp32.
            (Some(adapter), true) => {
                4 * adapter.trainable + if spec.export.merge == MergeBase::None { 0 } else { whole }
            }
        };
        Ok(Report {
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
        })
    }
}

impl Parameters {
    fn new(spec: &JobSpec, config: &ModelConfig) -> Result<Self, adapter::Error> {
        let sum = |list: Vec<Parameter>| list.iter().map(Parameter::elements).sum();
        let total = config.parameter_count();
        let plan = spec.adapter_plan(config)?;
        let adapter = plan.zip(spec.adapter.as_ref()).map(|(plan, settings)| {
            let (trainable, all) = (plan.trainable(), plan.all_parameters(config));
            AdapterParameters {
                trainable,
                all,
                percent: 100.0 * trainable as f64 / all as f64,
                linears: plan.linears.len() as u64,
                base: settings.quantization.name(),
                rule_of_thumb: match settings.quantization.kind {
                    QuantKind::Nf4 | QuantKind::Fp4 => memory::rule_of_thumb(total, trainable),
                    QuantKind::Int8 | QuantKind::None => Vec::new(),
                },
                unmatched: plan.unmatched,
            }
        });
        Ok(Parameters {
            total,
            embeddings: sum(config.embed_parameters()),
            per_block: sum(config.block_parameters(0)),
            adapter,
        })
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
