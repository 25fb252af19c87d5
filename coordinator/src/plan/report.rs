//! What `coordinator plan` knows about a job; its serde form is what `--json` prints.

use std::path::PathBuf;

use serde::Serialize;
use tunefleet_proto::adapter;
use tunefleet_proto::base_plan::QuantKind;
use tunefleet_proto::job::{DeviceKind, JobSpec, MergeBase, ModelSpec};
use tunefleet_proto::model::{ModelConfig, Parameter};
use tunefleet_proto::shard_plan::ShardPlan;

use super::checks::{self, Warning};
use super::disk::Disk;
use super::gpus::GpuModel;
use super::measure::Measurement;
use super::memory::{self, CHECKPOINT_BYTES, Host, Item, Machine};
use super::time::{self, Times};
use crate::hardware::Hardware;

/// What is known of where a job runs, besides its file and this machine.
#[derive(Debug, Default)]
pub struct Known {
    /// Memory that each rank can have, instead of this machine's.
    pub rank_memory_bytes: Option<u64>,
    /// The kind of GPU, instead of the one found.
    pub gpu: Option<GpuModel>,
    /// What a rank gets from its peers in a second, instead of what is usual for the GPU.
    pub link_bytes_per_second: Option<f64>,
    /// What was measured here.
    pub measurement: Option<Measurement>,
    /// What was chosen to keep `train.memory_budget_gib`.
    pub chosen: Option<String>,
}

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
    /// What `train.memory_budget_gib` led to, in words.
    pub chosen: Option<String>,
    /// How long it takes; absent where nothing is known of it.
    pub times: Option<Times>,
    /// What the workers cost for that time.
    pub cost: Option<f64>,
    /// What was measured.
    pub measurement: Option<Measurement>,
    /// The disk of its output.
    pub disk: Disk,
    /// What is worth a word.
    pub warnings: Vec<Warning>,
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
    /// When it needs most.
    pub when: &'static str,
    /// By item, at that moment.
    pub items: Vec<Item>,
    /// Sum of the items.
    pub needed_bytes: u64,
    /// What of it are tensors: all but the allowance for program and libraries.
    pub tensor_bytes: u64,
    /// What one rank can have; absent where it is not known.
    pub available_bytes: Option<u64>,
    /// Main memory of GPU ranks.
    pub host: Option<Host>,
    /// Main memory of their machine; absent where it is not known.
    pub host_available_bytes: Option<u64>,
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

/// Where a job runs, as far as its file and `hardware` tell.
pub struct Place {
    /// Elsewhere than on this machine.
    pub elsewhere: bool,
    /// On what.
    pub machine: Machine,
}

impl Place {
    /// Of `spec`. Where `rank_memory` is given, the job is thought to run elsewhere.
    pub fn of(spec: &JobSpec, hardware: &Hardware, rank_memory: Option<u64>) -> Self {
        let elsewhere = spec.workers.coordinator.is_some() || rank_memory.is_some();
        let on_gpu = match spec.train.device {
            DeviceKind::Cpu => false,
            DeviceKind::Cuda => true,
            DeviceKind::Auto => elsewhere || !hardware.gpus.is_empty(),
        };
        Place { elsewhere, machine: Machine { on_gpu, bf16_products: elsewhere || hardware.bf16_products } }
    }

    /// Of `spec` on machines that nobody has seen: on GPUs, unless it says CPUs.
    pub fn unseen(spec: &JobSpec) -> Self {
        let on_gpu = spec.train.device != DeviceKind::Cpu;
        Place { elsewhere: true, machine: Machine { on_gpu, bf16_products: true } }
    }
}

impl Report {
    /// Works the job out. Memory is this machine's, unless the job runs elsewhere or `known` says otherwise.
    ///
    /// # Errors
    /// An adapter's settings that do not fit the model.
    pub fn new(
        spec: &JobSpec,
        config: ModelConfig,
        hardware: &Hardware,
        known: &Known,
    ) -> Result<Self, adapter::Error> {
        let train = &spec.train;
        let shard_plan = spec.shard_plan(&config)?;
        let Place { elsewhere, machine } = Place::of(spec, hardware, known.rank_memory_bytes);
        let needs = memory::of_rank(spec, &config, &shard_plan, machine)?;
        let parameters = Parameters::new(spec, &config)?;
        let export_bytes = export_bytes(spec, &parameters);
        let elements = shard_plan.units.iter().map(|unit| unit.elements).sum::<u64>();
        let checkpoint_bytes = CHECKPOINT_BYTES * elements;

        let found = hardware.gpus.first().filter(|_| !elsewhere).map(|gpu| gpu.name.as_str());
        let gpu = known.gpu.or_else(|| match found {
            Some(name) => GpuModel::named(name),
            None => Some(GpuModel::usual()),
        });
        let mut gpu = gpu.filter(|_| machine.on_gpu);
        if let (Some(gpu), Some(link)) = (&mut gpu, known.link_bytes_per_second) {
            gpu.link_bytes_per_second = link;
        }
        let parts = match (&known.measurement, &gpu) {
            (Some(measured), gpu) => Some(measured.parts(spec, &config, &shard_plan, gpu.as_ref())),
            (None, Some(gpu)) => Some(time::assumed(spec, &config, &shard_plan, gpu)),
            (None, None) => None,
        };
        let times = parts.map(|parts| Times::new(spec, &config, parts));
        let price = spec.workers.price_per_hour;
        let cost = times.as_ref().zip(price).map(|(times, price)| times.cost(price));
        let disk = Disk::new(spec, &config, checkpoint_bytes, export_bytes);
        let warnings = checks::warnings(spec, times.as_ref(), &disk, machine.on_gpu);

        let (memory, missing_slots) = Memory::new(spec, needs, hardware, known, (elsewhere, machine));
        let fits = if missing_slots > 0 { Some(false) } else { memory.fits(known.measurement.as_ref()) };
        let per_step = spec.step_sequences() * u64::from(spec.data.sequence_tokens);
        Ok(Report {
            job: spec.name.clone(),
            output: spec.output.clone(),
            model: match &spec.model {
                ModelSpec::Init { preset, .. } => format!("{preset} (random weights)"),
                given => given.name(),
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
            memory,
            chosen: known.chosen.clone(),
            times,
            cost,
            measurement: known.measurement.clone(),
            disk,
            warnings,
            checkpoint_bytes,
            export_bytes,
            missing_slots,
            fits,
            ranks: (0..shard_plan.world).map(|rank| RankShards::new(&shard_plan, rank)).collect(),
            config,
            shard_plan,
        })
    }
}

impl Memory {
    /// What `needs` has on the machine, and how many GPUs are missing.
    fn new(
        spec: &JobSpec,
        needs: memory::Needs,
        hardware: &Hardware,
        known: &Known,
        (elsewhere, machine): (bool, Machine),
    ) -> (Self, u32) {
        let ranks = spec.train.ranks;
        let gpus = u32::try_from(hardware.gpus.len()).unwrap_or(u32::MAX);
        let (available_bytes, slots) = match (elsewhere, machine.on_gpu) {
            (true, _) => (known.rank_memory_bytes, None),
            (false, true) => {
                (hardware.smallest_gpu_bytes(), Some(spec.workers.slots.unwrap_or(gpus).min(gpus)))
            }
            // Ranks of one machine share its memory.
            (false, false) => (hardware.memory_bytes.map(|bytes| bytes / u64::from(ranks)), None),
        };
        let memory::Needs { when, items, needed_bytes, tensor_bytes, host } = needs;
        let host_available_bytes = hardware.memory_bytes.filter(|_| !elsewhere && host.is_some());
        let memory = Memory {
            on_gpu: machine.on_gpu,
            when,
            items,
            needed_bytes,
            tensor_bytes,
            available_bytes,
            host,
            host_available_bytes,
        };
        (memory, slots.map_or(0, |slots| ranks.saturating_sub(slots)))
    }

    /// What a rank needs: what was worked out, or measured where that is more.
    pub fn most_bytes(&self, measurement: Option<&Measurement>) -> u64 {
        let allowance = self.needed_bytes - self.tensor_bytes;
        let measured = measurement.map_or(0, |measurement| measurement.peak_bytes.saturating_add(allowance));
        self.needed_bytes.max(measured)
    }

    /// Whether it is there; `None` where nobody knows.
    fn fits(&self, measurement: Option<&Measurement>) -> Option<bool> {
        let device = self.available_bytes.map(|bytes| self.most_bytes(measurement) <= bytes);
        let host = self.host.as_ref().zip(self.host_available_bytes);
        let host = host.map(|(host, available)| host.machine_bytes <= available);
        match (device, host) {
            (Some(false), _) | (_, Some(false)) => Some(false),
            (device, _) => device,
        }
    }
}

/// Size of what is exported.
fn export_bytes(spec: &JobSpec, parameters: &Parameters) -> u64 {
    let whole = parameters.total * memory::bytes_of(spec.export.dtype);
    match (&parameters.adapter, spec.export.enabled) {
        (_, false) => 0,
        (None, true) => whole,
        // The adapter's file is fp32.
        (Some(adapter), true) => {
            4 * adapter.trainable + if spec.export.merge == MergeBase::None { 0 } else { whole }
        }
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
