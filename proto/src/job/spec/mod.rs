//! What is true of a job, after defaults, overrides and checks. Everything downstream of
//! the job file takes these types; they travel to the ranks as JSON.

mod collect;
mod evaluate;
mod train;

use std::net::SocketAddr;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::adapter::{self, AdapterPlan, LoraConfig};
use crate::base_plan::{BasePlan, PartDtype, QuantKind, Quantization};
use crate::evaluation::EVALUATIONS_DIR;
use crate::model::ModelConfig;
use crate::shard_plan::ShardPlan;

pub use collect::*;
pub use evaluate::*;
pub use train::*;

/// A whole job. A stage that is absent was not asked for.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct JobSpec {
    /// Name of the job, unique on a control plane.
    pub name: String,
    /// Directory that holds everything the job makes (absolute).
    pub output: PathBuf,
    /// Where the files to learn from come from.
    pub dataset: DatasetSpec,
    /// Where the tokenizer comes from.
    pub tokenizer: TokenizerSpec,
    /// Where the weights come from.
    pub model: ModelSpec,
    /// How files become batches.
    pub data: DataSpec,
    /// What is trained in place of all weights.
    pub adapter: Option<AdapterSpec>,
    /// How batches become weights.
    pub train: TrainSpec,
    /// How weights leave.
    pub export: ExportSpec,
    /// What is asked of them.
    #[serde(default)]
    pub evaluate: Option<EvaluateSpec>,
    /// How completions are served from them.
    #[serde(default)]
    pub serve: Option<ServeSpec>,
    /// Where ranks run.
    pub workers: WorkersSpec,
    /// Which of several waiting jobs gets slots first: the highest, then the oldest; 0 to 100.
    #[serde(default = "default_priority")]
    pub priority: u8,
    /// Longest time from submission to the end; then it stops with a checkpoint, and has failed.
    #[serde(default)]
    pub deadline_seconds: Option<u64>,
    /// What happens when an attempt fails.
    #[serde(default)]
    pub restart: RestartSpec,
}

/// What happens when an attempt fails.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct RestartSpec {
    /// New attempts after failures that count; a preemption does not.
    pub max_restarts: u32,
    /// Pause before the first new attempt; it doubles with each that fails without progress.
    pub backoff_seconds: f64,
    /// Longest pause.
    pub max_backoff_seconds: f64,
    /// So many attempts in a row that saved no further step end the job.
    pub max_attempts_without_progress: u32,
    /// So many failures of ranks on a worker leave it out, where other workers have room for the job.
    pub max_failures_per_worker: u32,
    /// Time that ranks have to save a checkpoint when they are told to stop.
    pub stop_grace_seconds: u64,
    /// A rank that shows no progress for so long, and for ten times as long as it ever took before, hangs.
    pub hang_after_seconds: f64,
    /// As `hang_after_seconds`, where there is no earlier time to compare with.
    pub first_hang_after_seconds: f64,
}

impl Default for RestartSpec {
    fn default() -> Self {
        RestartSpec {
            max_restarts: 5,
            backoff_seconds: 5.0,
            max_backoff_seconds: 300.0,
            max_attempts_without_progress: 3,
            max_failures_per_worker: 2,
            stop_grace_seconds: 600,
            hang_after_seconds: 300.0,
            first_hang_after_seconds: 3600.0,
        }
    }
}

fn default_priority() -> u8 {
    50
}

/// Repositories to collect, or a dataset that exists.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DatasetSpec {
    /// A directory written by `coordinator collect`.
    Existing(PathBuf),
    /// Collect into `<output>/dataset`.
    Collect(Box<CollectSpec>),
}

/// Where the tokenizer comes from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TokenizerSpec {
    /// A `tokenizer.json`, or a directory that holds one.
    Existing(PathBuf),
    /// Train one on the dataset into `<output>/tokenizer`.
    Train {
        /// Size of the vocabulary, special tokens included.
        vocab_size: u32,
    },
    /// The one beside the model's weights.
    FromModel,
}

/// Where the weights come from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ModelSpec {
    /// A Hugging Face model directory.
    Existing(PathBuf),
    /// A model of the Hugging Face hub, linked to as `<output>/model`.
    Hub {
        /// `OWNER/NAME`.
        repo: String,
        /// Branch, tag or commit; `main` where none is named.
        revision: Option<String>,
    },
    /// Random weights into `<output>/model`.
    Init {
        /// Name of a preset, see [`crate::model::PRESETS`].
        preset: String,
        /// Seed of the weights.
        seed: u64,
    },
}

impl ModelSpec {
    /// What people call it, and adapters their base.
    pub fn name(&self) -> String {
        match self {
            ModelSpec::Existing(dir) => dir.display().to_string(),
            ModelSpec::Hub { repo, .. } => repo.clone(),
            ModelSpec::Init { preset, .. } => preset.clone(),
        }
    }
}

/// How files become batches.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct DataSpec {
    /// Tokens of one sequence (input; the target is shifted by one).
    pub sequence_tokens: u32,
    /// Probability that a document (or window) is rearranged for infilling, 0 to 1.
    pub fim_rate: f64,
    /// Of those, the share in suffix-prefix-middle order, 0 to 1.
    pub fim_spm_rate: f64,
    /// Before packing (as the original) or per window.
    pub fim_level: FimLevel,
    /// How documents are cut into sequences.
    pub packing: Packing,
    /// Whether repository and path stand before each file.
    #[serde(default)]
    pub metadata_prefix: bool,
    /// Whether documents of a sequence do not see each other, and positions begin anew with each.
    #[serde(default)]
    pub document_mask: bool,
    /// How conversations become tokens; `None` where the rows are code.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub chat: Option<ChatSpec>,
    /// Seed of order and FIM.
    pub seed: u64,
}

/// Where the fill-in-the-middle transform is applied.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FimLevel {
    /// On whole documents, before packing.
    Document,
    /// On each document part inside a packed window, so that no infill is cut apart.
    Window,
}

/// How documents are cut into sequences.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Packing {
    /// One stream over all documents; nothing is dropped; new order each epoch; resuming seeks.
    Continuous,
    /// The original's buffers, dropped tails and repeated random stream, token for token.
    SeedCompatible,
    /// Each document whole in one sequence, as many in each as fit; what is longer than a sequence is cut at its end.
    Whole,
}

/// How conversations become tokens.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChatSpec {
    /// How turns are laid out.
    pub template: ChatTemplate,
    /// What is learnt.
    pub loss: ChatLoss,
    /// What the system says in conversations where it says nothing.
    pub system: Option<String>,
    /// Control tokens that the template needs and the vocabulary may lack.
    pub special_tokens: Vec<String>,
}

/// How turns are laid out.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ChatTemplate {
    /// One of [`crate::chat::BUILT_IN`], by its name.
    BuiltIn(String),
    /// A Jinja file, as Hugging Face tokenizers have it (absolute).
    File(PathBuf),
    /// The one beside the model's tokenizer.
    FromModel,
}

/// Which tokens of a conversation are targets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ChatLoss {
    /// What the assistant says, and how it ends.
    Assistant,
    /// All.
    All,
}

/// A LoRA adapter on frozen weights.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct AdapterSpec {
    /// What is trained.
    pub lora: LoraConfig,
    /// How the frozen linears are held.
    pub quantization: Quantization,
}

/// What an adapter is merged into at the end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MergeBase {
    /// No merged model.
    None,
    /// The weights as they were.
    Original,
    /// The weights as they were dequantised in training.
    Dequantized,
}

/// How weights leave.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExportSpec {
    /// Write `<output>/export` after training.
    pub enabled: bool,
    /// Dtype of the exported model's weights.
    pub dtype: Precision,
    /// What an adapter is merged into.
    pub merge: MergeBase,
}

/// How completions are served.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServeSpec {
    /// Address on the worker.
    pub listen: SocketAddr,
    /// File with tokens of which requests must bear one.
    pub token_file: Option<PathBuf>,
    /// How linears are held.
    pub quantization: Quantization,
    /// Completions under way at once.
    pub max_batch: u16,
}

/// Where ranks run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct WorkersSpec {
    /// A running control plane (`http://host:port`); embedded when absent.
    pub coordinator: Option<String>,
    /// Slots of an embedded local worker; one per GPU, or `train.ranks` on CPU, when absent.
    pub slots: Option<u32>,
    /// Torch threads of each CPU rank; cores / ranks when absent.
    pub threads_per_rank: Option<u32>,
    /// Price of an hour of all workers together, in any currency.
    pub price_per_hour: Option<f64>,
}

impl JobSpec {
    /// What is trained: `full`, `lora`, or `qlora` on a quantised base.
    pub fn method(&self) -> &'static str {
        match &self.adapter {
            None => "full",
            Some(adapter) if adapter.quantization.kind == QuantKind::None => "lora",
            Some(_) => "qlora",
        }
    }

    /// `<output>/dataset`, or the existing one.
    pub fn dataset_dir(&self) -> PathBuf {
        match &self.dataset {
            DatasetSpec::Existing(dir) => dir.clone(),
            DatasetSpec::Collect(_) => self.output.join("dataset"),
        }
    }

    /// Directory of the tokenizer (holds `tokenizer.json`), with what a chat adds to it.
    pub fn tokenizer_dir(&self) -> PathBuf {
        if self.data.chat.is_some() { self.model_dir() } else { self.base_tokenizer_dir() }
    }

    /// Directory of the tokenizer as it was before.
    pub fn base_tokenizer_dir(&self) -> PathBuf {
        match &self.tokenizer {
            TokenizerSpec::Existing(path) => path.clone(),
            TokenizerSpec::Train { .. } => self.output.join("tokenizer"),
            TokenizerSpec::FromModel => self.base_model_dir(),
        }
    }

    /// Directory of the initial weights in Hugging Face layout, with what a chat adds to them.
    pub fn model_dir(&self) -> PathBuf {
        if self.data.chat.is_some() { self.output.join("chat-model") } else { self.base_model_dir() }
    }

    /// Directory of the weights as they were before.
    pub fn base_model_dir(&self) -> PathBuf {
        match &self.model {
            ModelSpec::Existing(dir) => dir.clone(),
            ModelSpec::Hub { .. } | ModelSpec::Init { .. } => self.output.join("model"),
        }
    }

    /// Directory of checkpoints, one `step-NNNNNNNN` each.
    pub fn checkpoints_dir(&self) -> PathBuf {
        self.output.join("checkpoints")
    }

    /// Directory of the exported model.
    pub fn export_dir(&self) -> PathBuf {
        self.output.join("export")
    }

    /// Directory of the exported adapter.
    pub fn adapter_dir(&self) -> PathBuf {
        self.output.join("adapter")
    }

    /// Directory of evaluations, those of others' asking included.
    pub fn evaluations_dir(&self) -> PathBuf {
        self.output.join(EVALUATIONS_DIR)
    }

    /// Directory of the quantised base.
    pub fn base_dir(&self) -> PathBuf {
        self.output.join("base")
    }

    /// What the job's adapter trains of `model`; `None` where all weights are trained.
    ///
    /// # Errors
    /// Settings that do not fit the model.
    pub fn adapter_plan(&self, model: &ModelConfig) -> Result<Option<AdapterPlan>, adapter::Error> {
        self.adapter.as_ref().map(|adapter| adapter.lora.with_added_tokens(model).plan(model)).transpose()
    }

    /// Who holds which elements of what is trained.
    ///
    /// # Errors
    /// An adapter's settings that do not fit the model.
    pub fn shard_plan(&self, model: &ModelConfig) -> Result<ShardPlan, adapter::Error> {
        let shards = self.train.shard_ranks;
        Ok(match self.adapter_plan(model)? {
            Some(adapter) => ShardPlan::of_adapter(&adapter, model, shards),
            None => ShardPlan::new(model, shards),
        })
    }

    /// How the frozen weights lie; `None` where all weights are trained.
    pub fn base_plan(&self, model: &ModelConfig) -> Option<BasePlan> {
        let plain = match self.train.precision {
            Precision::Fp32 => PartDtype::F32,
            Precision::Bf16 => PartDtype::Bf16,
        };
        self.adapter.as_ref().map(|adapter| BasePlan::new(model, adapter.quantization, plain))
    }

    /// Sequences of one step, over all ranks.
    pub fn step_sequences(&self) -> u64 {
        u64::from(self.train.ranks)
            * u64::from(self.train.micro_batch_sequences)
            * u64::from(self.train.accumulate_micro_batches)
    }

    /// How the job contradicts the model that it trains, which its file alone does not tell.
    pub fn misfit(&self, model: &ModelConfig) -> Option<String> {
        let vocab_size = match self.tokenizer {
            TokenizerSpec::Train { vocab_size } => vocab_size,
            TokenizerSpec::Existing(_) | TokenizerSpec::FromModel => 0,
        };
        let adapter_misfit = || self.adapter_plan(model).err().map(|error| format!("adapter: {error}"));
        // A model that is only asked is shown no more than it has positions for.
        let trained = Some(self.data.sequence_tokens).filter(|_| self.train.steps > 0);
        trained
            .and_then(|sequence_tokens| sequence_misfit(sequence_tokens, model))
            .or_else(|| vocab_misfit(vocab_size, model))
            .or_else(adapter_misfit)
    }
}

pub(super) fn sequence_misfit(sequence_tokens: u32, model: &ModelConfig) -> Option<String> {
    let most = model.max_positions;
    (u64::from(sequence_tokens) > most)
        .then(|| format!("data.sequence_tokens is {sequence_tokens}, but the model has {most} positions"))
}

pub(super) fn vocab_misfit(vocab_size: u32, model: &ModelConfig) -> Option<String> {
    let most = model.vocab_size;
    (u64::from(vocab_size) > most).then(|| {
        format!("tokenizer.train.vocab_size is {vocab_size}, but the model's embedding has {most} rows")
    })
}
