//! The model that is evaluated, in the engine of the completion server: a base with or without an adapter beside it.

use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use sha2::{Digest, Sha256};
use tch::Device;
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};
use tunefleet_kernels::device::keep_freed_memory;
use tunefleet_proto::base_plan::Quantization;
use tunefleet_proto::evaluation;
use tunefleet_proto::hex;
use tunefleet_proto::job::Precision;
use tunefleet_proto::model::ModelConfig;

use super::Error;
use crate::data::tokenizer::{TOKENIZER_FILE, Tokenizer};
use crate::generate::adapters::Adapter;
use crate::generate::decoder::Decoder;
use crate::generate::sampling::Sampling;
use crate::model::numerics::Numerics;
use crate::serve::engine::request::{Event, Failure, Reason, Request};
use crate::serve::engine::{self, AdapterId, Handle, Refused, Settings};
use crate::serve::parse_quantization;
use crate::serve::stop::Rules;

/// Completions that wait for each one under way: enough that none waits for us.
const WAITING_FACTOR: usize = 3;
/// Tokens of prompts in one step.
const PREFILL_TOKENS: usize = 512;
/// No completion takes so long.
const PATIENCE: Duration = Duration::from_secs(30 * 24 * 3600);

/// Which model is evaluated, and how it is held.
#[derive(Debug, Clone, clap::Args)]
pub struct SubjectArgs {
    /// A Hugging Face model directory.
    #[arg(long)]
    pub model: PathBuf,
    /// A `tokenizer.json`, or a directory that holds one; the adapter's or the model's own when absent.
    #[arg(long)]
    pub tokenizer: Option<PathBuf>,
    /// An adapter beside it.
    #[arg(long)]
    pub adapter: Option<PathBuf>,
    /// What the adapter's difference is multiplied by.
    #[arg(long, default_value_t = 1.0, requires = "adapter")]
    pub adapter_weight: f64,
    /// Hold the linears of the blocks in 4 bits (nf4, fp4) or 8 (int8).
    #[arg(long, value_name = "KIND", value_parser = parse_quantization)]
    pub quantize: Option<Quantization>,
    /// Dtype of weights and activations; bf16 when absent, but fp32 on a CPU that does not multiply bf16.
    #[arg(long, value_parser = crate::export::parse_dtype)]
    pub dtype: Option<Precision>,
    /// Completions under way at once.
    #[arg(long, default_value_t = 32, value_parser = clap::value_parser!(u16).range(1..))]
    pub max_batch: u16,
    /// Make each completion as if it were alone, to the last bit. Slower.
    #[arg(long)]
    pub batch_invariant: bool,
    /// Where it computes; on the first GPU, where there is one, when absent.
    #[arg(skip)]
    pub device: Option<Device>,
}

/// A model that answers.
pub struct Subject {
    /// Text to tokens, and back.
    pub tokenizer: Arc<Tokenizer>,
    /// Where it lies, and the template of chats beside it.
    pub tokenizer_dir: PathBuf,
    /// Its shape.
    pub config: ModelConfig,
    /// How it is written down.
    pub described: evaluation::Subject,
    /// Where and in which dtype it computes.
    pub numerics: Numerics,
    engine: Handle,
    adapter: Option<AdapterId>,
    max_batch: usize,
}

/// One completion that is wanted.
pub struct Ask {
    /// What the model is shown.
    pub prompt: Vec<u32>,
    /// Tokens to make at most.
    pub max_new_tokens: usize,
    /// How they are chosen.
    pub sampling: Sampling,
    /// Where the text ends.
    pub rules: Rules,
}

/// A completion.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Made {
    /// Its text.
    pub text: String,
    /// Tokens that were made for it.
    pub tokens: usize,
    /// Why it ended.
    pub reason: Reason,
}

impl SubjectArgs {
    fn describe(&self, precision: Precision) -> Result<evaluation::Subject, Error> {
        let shown = |path: &Path| path.display().to_string();
        Ok(evaluation::Subject {
            model: shown(&self.model),
            digest: digest(&self.model)?,
            adapter: self.adapter.as_deref().map(shown),
            adapter_weight: self.adapter.as_ref().map(|_| self.adapter_weight),
            quantization: self.quantize.map(|quantization| quantization.name()),
            precision: match precision {
                Precision::Fp32 => "fp32".to_owned(),
                Precision::Bf16 => "bf16".to_owned(),
            },
        })
    }
}

impl Subject {
    /// Loads model and adapter.
    ///
    /// # Errors
    /// Whatever their files break.
    pub fn load(args: &SubjectArgs) -> Result<Self, Error> {
        keep_freed_memory();
        let own = args.adapter.as_ref().filter(|dir| dir.join(TOKENIZER_FILE).exists());
        let tokenizer_dir = args.tokenizer.as_ref().or(own).unwrap_or(&args.model);
        let tokenizer = Arc::new(Tokenizer::load(tokenizer_dir)?);
        let device = args.device.unwrap_or_else(Device::cuda_if_available);
        let precision = args.dtype.unwrap_or_else(|| Numerics::fast_precision(device));
        let numerics = Numerics::new(device, precision);
        let (dir, quantization) = (args.model.clone(), args.quantize);
        let decoder = move || match quantization {
            None => Ok(Decoder::load(&dir, numerics)?),
            Some(quantization) => Decoder::load_quantized(&dir, quantization, numerics),
        };
        let max_batch = usize::from(args.max_batch);
        let settings = Settings {
            max_batch,
            max_queue: max_batch * (WAITING_FACTOR + 1),
            prefill_tokens: PREFILL_TOKENS,
            cache_tokens: None,
            prefix_cache: true,
            speculate: true,
            batch_invariant: args.batch_invariant,
        };
        let (engine, config) = engine::start(decoder, tokenizer.clone(), settings)?;
        if let Some(misfit) = tokenizer.misfit(config.vocab_size) {
            return Err(Error::Setting(misfit));
        }
        let adapter = match &args.adapter {
            Some(dir) => Some(engine.add(Adapter::load(dir, args.adapter_weight, &config, numerics)?)?),
            None => None,
        };
        let described = args.describe(precision)?;
        let tokenizer_dir = tokenizer_dir.clone();
        Ok(Subject { tokenizer, tokenizer_dir, config, described, numerics, engine, adapter, max_batch })
    }

    /// Gives the adapter another weight.
    ///
    /// # Errors
    /// A model without an adapter.
    pub fn weigh(&mut self, weight: f64) -> Result<(), Error> {
        let known = self.adapter.ok_or_else(|| Error::Setting("there is no adapter to weigh".to_owned()))?;
        let new = self.engine.weigh(known, weight)?;
        self.engine.forget(known)?;
        self.adapter = Some(new);
        self.described.adapter_weight = Some(weight);
        Ok(())
    }

    /// Tokens that the model has positions for.
    pub fn max_tokens(&self) -> usize {
        usize::try_from(self.config.max_positions).unwrap_or(usize::MAX)
    }

    /// Sum of the losses of all of `tokens` but the first.
    ///
    /// # Errors
    /// Whatever the model fails with.
    pub fn loss_sum(&self, tokens: &[u32]) -> Result<f64, Error> {
        let (shown, targets) = (tokens.split_last().map(|(_, shown)| shown), tokens.get(1..));
        let targets = targets.unwrap_or_default().iter().map(|token| i64::from(*token)).collect();
        self.loss_of(shown.unwrap_or_default(), targets)
    }

    /// Sum of the losses of `targets` behind `tokens`; [`crate::data::IGNORED`] ones do not count.
    ///
    /// # Errors
    /// Whatever the model fails with.
    pub fn loss_of(&self, tokens: &[u32], targets: Vec<i64>) -> Result<f64, Error> {
        Ok(self.engine.score(tokens.to_vec(), targets, self.adapter)?)
    }

    /// Asks with another adapter from now on, or with none.
    ///
    /// # Errors
    /// An adapter that does not fit the model.
    pub fn take(&mut self, adapter: Option<Adapter>) -> Result<(), Error> {
        let new = adapter.map(|adapter| self.engine.add(adapter)).transpose()?;
        if let Some(before) = std::mem::replace(&mut self.adapter, new) {
            self.engine.forget(before)?;
        }
        Ok(())
    }

    /// Completes all of `asks`, many at once, and gives each to `take`, in their order.
    ///
    /// # Errors
    /// Whatever the model fails with, and what `take` gives.
    pub fn complete<T>(
        &self,
        asks: impl Iterator<Item = (T, Ask)>,
        mut take: impl FnMut(T, Made) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let mut under_way: VecDeque<(T, UnboundedReceiver<Event>)> = VecDeque::new();
        for (what, ask) in asks {
            if under_way.len() >= self.max_batch * WAITING_FACTOR
                && let Some((what, events)) = under_way.pop_front()
            {
                take(what, whole(events)?)?;
            }
            under_way.push_back((what, self.submit(ask)?));
        }
        for (what, events) in under_way {
            take(what, whole(events)?)?;
        }
        Ok(())
    }

    fn submit(&self, ask: Ask) -> Result<UnboundedReceiver<Event>, Refused> {
        let (sender, events) = unbounded_channel();
        self.engine.submit(Request {
            prompt: ask.prompt,
            max_new_tokens: ask.max_new_tokens,
            sampling: ask.sampling,
            rules: ask.rules,
            keeps_stop: false,
            end_tokens: self.tokenizer.ends_of_completions(),
            adapter: self.adapter,
            top: None,
            asked: Instant::now(),
            deadline: Instant::now() + PATIENCE,
            events: sender,
        })?;
        Ok(events)
    }
}

fn whole(mut events: UnboundedReceiver<Event>) -> Result<Made, Failure> {
    let mut text = String::new();
    loop {
        match events.blocking_recv() {
            Some(Event::Made(made)) => text.extend(made.iter().map(|token| token.text.as_str())),
            Some(Event::Ended(end)) => return Ok(Made { text, tokens: end.made_tokens, reason: end.reason }),
            Some(Event::Failed(failure)) => return Err(failure),
            None => return Err(Failure::Ending),
        }
    }
}

/// Shape of a model, and names and sizes of its weights: another model of the same directory is told from it.
fn digest(dir: &Path) -> Result<String, Error> {
    let io = |source| Error::Io { path: dir.to_owned(), source };
    let mut hasher = Sha256::new();
    hasher.update(std::fs::read(dir.join("config.json")).map_err(io)?);
    let entries: Vec<_> = std::fs::read_dir(dir).map_err(io)?.filter_map(Result::ok).collect();
    let mut weights: Vec<_> = entries
        .iter()
        .filter(|entry| entry.path().extension().is_some_and(|e| e == "safetensors" || e == "bin"))
        .filter_map(|entry| Some((entry.file_name(), entry.metadata().ok()?)))
        .collect();
    weights.sort_by_key(|(name, _)| name.clone());
    for (name, metadata) in weights {
        hasher.update(name.as_encoded_bytes());
        hasher.update(metadata.len().to_le_bytes());
        let changed = metadata.modified().ok().and_then(|at| at.duration_since(std::time::UNIX_EPOCH).ok());
        hasher.update(changed.map_or(0, |since| since.as_nanos()).to_le_bytes());
    }
    Ok(hex(&hasher.finalize()))
}
