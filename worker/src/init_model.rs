//! `worker init-model`: random weights in the exact Hugging Face layout, streamed, so that a
//! 15.5B model needs the memory of its largest tensor.

use std::io::Write;
use std::path::{Path, PathBuf};

use tch::{Device, Kind, Tensor};
use tunefleet_proto::job::Precision;
use tunefleet_proto::model::{self, ModelConfig, Parameter};

use crate::checkpoint::{Error, model_dir};

/// Values made at a time.
const CHUNK_ELEMENTS: u64 = 1 << 22;

/// Command line of `worker init-model`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Shape: tiny, demo, or that of a published model, such as starcoderbase-1b or qwen2.5-coder-7b; a name that is not
    /// known brings the list.
    #[arg(long)]
    preset: String,
    /// Directory to write.
    #[arg(long)]
    out: PathBuf,
    /// Tokenizer to put beside the weights; decides the size of the vocabulary.
    #[arg(long)]
    tokenizer: Option<PathBuf>,
    /// Seed of the weights.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Dtype of the weights: fp32 or bf16.
    #[arg(long, default_value = "fp32", value_parser = crate::export::parse_dtype)]
    dtype: Precision,
}

/// What can be wrong with the request.
#[derive(Debug, thiserror::Error)]
pub enum InitError {
    /// The shape.
    #[error(transparent)]
    Model(#[from] model::Error),
    /// The tokenizer.
    #[error(transparent)]
    Tokenizer(#[from] crate::data::tokenizer::Error),
    /// The files.
    #[error(transparent)]
    Files(#[from] Error),
}

/// Runs the verb.
///
/// # Errors
/// See [`InitError`].
pub fn run(args: Args) -> Result<(), InitError> {
    let config = init(&args.preset, args.tokenizer.as_deref(), args.seed, args.dtype, &args.out)?;
    // A reader that has gone away wants no more.
    let _ = writeln!(std::io::stdout(), "{}: {} parameters", args.out.display(), config.parameter_count());
    Ok(())
}

/// Writes `out`: the preset's shape, with the tokenizer's vocabulary where one is given.
///
/// # Errors
/// See [`InitError`].
pub fn init(
    preset: &str,
    tokenizer: Option<&Path>,
    seed: u64,
    dtype: Precision,
    out: &Path,
) -> Result<ModelConfig, InitError> {
    let mut config = ModelConfig::preset(preset)?;
    if let Some(path) = tokenizer {
        let tokenizer = crate::data::tokenizer::Tokenizer::load(path)?;
        config.vocab_size = tokenizer.vocab_size();
        config.eos_token_id = Some(tokenizer.eos().into());
        config.bos_token_id = config.eos_token_id;
    }
    let mut index = 0;
    model_dir::write(out, &config, dtype, tokenizer, |parameter, sink| {
        // A seed per parameter: its values do not depend on what was written before it.
        tch::manual_seed(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15).wrapping_add(index) as i64);
        index += 1;
        let mut left = parameter.elements();
        while left > 0 {
            let count = left.min(CHUNK_ELEMENTS);
            sink(&fresh(&config, parameter, count as i64))?;
            left -= count;
        }
        Ok(())
    })?;
    Ok(config)
}

/// GPT-2's scheme: norms 1, biases 0, matrices normal; projections
/// back into the residual stream are narrower by the root of twice the number of blocks.
fn fresh(config: &ModelConfig, parameter: &Parameter, count: i64) -> Vec<f32> {
    let options = (Kind::Float, Device::Cpu);
    let values = if parameter.decays {
        let into_residual = config.linears().iter().any(|linear| {
            linear.role.is_into_residual() && parameter.name.strip_suffix(".weight") == Some(linear.name)
        });
        let narrow = if into_residual { (2.0 * config.layers as f64).sqrt() } else { 1.0 };
        Tensor::randn([count], options) * (config.initializer_range / narrow)
    } else if parameter.name.ends_with(".weight") {
        Tensor::ones([count], options)
    } else {
        Tensor::zeros([count], options)
    };
    Vec::try_from(values).unwrap_or_default()
}
