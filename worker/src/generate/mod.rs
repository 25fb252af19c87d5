//! `worker generate`: completions from a Hugging Face model directory, with a KV cache.

/// Adapters beside one base.
pub mod adapters;
/// A whole model on one device.
pub mod decoder;
/// From text to tokens.
pub mod prompt;
/// From logits to the next token.
pub mod sampling;

use std::io::{Read, Write};
use std::path::PathBuf;

use tch::Device;
use tunefleet_proto::job::Precision;

use crate::data::tokenizer::{self, Tokenizer};
use crate::model::numerics::Numerics;
use decoder::Decoder;
use prompt::Prompt;
use sampling::{Sampler, Sampling};

/// Command line of `worker generate`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// A Hugging Face model directory with its tokenizer.
    #[arg(long)]
    model: PathBuf,
    /// A LoRA adapter to merge into the model as it is loaded.
    #[arg(long)]
    adapter: Option<PathBuf>,
    /// Use the adapter even where the model is not the one that it was trained on.
    #[arg(long, requires = "adapter")]
    any_base: bool,
    /// Text to continue, or text with `<FILL_ME>` where the completion belongs; `-` reads stdin.
    #[arg(long)]
    prompt: String,
    /// Tokens to make at most.
    #[arg(long, default_value_t = 60)]
    max_new_tokens: usize,
    /// 0 always takes the likeliest token.
    #[arg(long, default_value_t = 0.2)]
    temperature: f64,
    /// Draw from the smallest set of tokens with at least this probability.
    #[arg(long, default_value_t = 0.95)]
    top_p: f64,
    /// Seed of the draws.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Dtype of weights and activations; fp32 on a CPU and bf16 on a GPU when absent.
    #[arg(long, value_parser = crate::export::parse_dtype)]
    dtype: Option<Precision>,
    /// Print the completion alone, without the text around it.
    #[arg(long)]
    completion_only: bool,
}

/// What can go wrong.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The model's files.
    #[error(transparent)]
    Model(#[from] crate::checkpoint::Error),
    /// The adapter.
    #[error(transparent)]
    Adapter(#[from] crate::adapter::Error),
    /// The tokenizer.
    #[error(transparent)]
    Tokenizer(#[from] tokenizer::Error),
    /// The prompt.
    #[error(transparent)]
    Prompt(#[from] prompt::Error),
    /// Standard input.
    #[error("reading the prompt from standard input: {0}")]
    Stdin(#[from] std::io::Error),
    /// A sampling setting out of range.
    #[error("{0}")]
    Setting(String),
}

/// Runs the verb: the completion in its place on stdout.
///
/// # Errors
/// See [`Error`].
pub fn run(args: Args) -> Result<(), Error> {
    if !(args.temperature >= 0.0 && args.temperature.is_finite()) {
        return Err(Error::Setting(format!("--temperature ({}) must be 0 or more", args.temperature)));
    }
    if !(args.top_p > 0.0 && args.top_p <= 1.0) {
        return Err(Error::Setting(format!("--top-p ({}) must be above 0 and at most 1", args.top_p)));
    }
    let text = if args.prompt == "-" {
        let mut text = String::new();
        std::io::stdin().read_to_string(&mut text)?;
        text
    } else {
        args.prompt
    };
    let tokenizer = Tokenizer::load(&args.model)?;
    let prompt = Prompt::new(&text, &tokenizer)?;
    let device = Device::cuda_if_available();
    let default = if device == Device::Cpu { Precision::Fp32 } else { Precision::Bf16 };
    let numerics = Numerics::new(device, args.dtype.unwrap_or(default));
    let decoder = match &args.adapter {
        Some(adapter) => Decoder::load_merged(&args.model, adapter, args.any_base, None, numerics)?,
        None => Decoder::load(&args.model, numerics)?,
    };
    if let Some(misfit) = tokenizer.misfit(decoder.config().vocab_size) {
        return Err(Error::Setting(misfit));
    }
    prompt.check_room(args.max_new_tokens, decoder.config().max_positions)?;
    let sampling =
        Sampling { temperature: args.temperature, top_p: args.top_p, seed: args.seed, ..Sampling::default() };
    let ends = tokenizer.ends_of_completions();
    let tokens = complete(&decoder, &prompt.tokens, args.max_new_tokens, &ends, sampling);
    let completion = tokenizer.decode_middle(&tokens, true)?;
    let (before, after) = if args.completion_only { ("", "") } else { (&*prompt.before, &*prompt.after) };
    // A reader that has gone away wants no more.
    let _ = writeln!(std::io::stdout(), "{before}{completion}{after}");
    Ok(())
}

/// Up to `max_new_tokens` after `prompt`; ends before any of `ends`.
pub fn complete(
    decoder: &Decoder,
    prompt: &[u32],
    max_new_tokens: usize,
    ends: &[u32],
    sampling: Sampling,
) -> Vec<u32> {
    let mut sampler = Sampler::new(sampling);
    let mut context = decoder.context(prompt.len() + max_new_tokens);
    let mut tokens = prompt.to_vec();
    while tokens.len() - prompt.len() < max_new_tokens {
        let shown = tokens.get(context.tokens()..).unwrap_or_default();
        let next = sampler.next(&decoder.next_logits(&mut context, shown), &tokens);
        if ends.contains(&next) {
            break;
        }
        tokens.push(next);
    }
    tokens.split_off(prompt.len())
}
