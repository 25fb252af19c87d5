//! `worker adapter merge`: which base, and what it costs in loss.

use std::path::PathBuf;

use tch::{Device, Kind, Tensor};
use tunefleet_proto::base_plan::{QuantKind, Quantization};
use tunefleet_proto::job::Precision;

use super::cli::say;
use super::{Error, files, loss, merge};
use crate::base::encode;
use crate::checkpoint;
use crate::checkpoint::base_digest::{BASE_DTYPE_KEY, BASE_QUANTIZATION_KEY};
use crate::export::parse_dtype;

pub(super) const HELP: &str = "\
Examples:
  worker adapter merge --adapter copilot --model starcoderbase-1b --out merged
  worker adapter merge --adapter copilot --model starcoderbase-1b --out merged --base dequantized
  worker adapter merge --adapter copilot --model starcoderbase-1b --out merged --dataset runs/copilot/dataset";

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Directory of the adapter.
    #[arg(long)]
    adapter: PathBuf,
    /// Directory of the base model; its tokenizer is copied where it has one.
    #[arg(long)]
    model: PathBuf,
    /// Directory to write.
    #[arg(long)]
    out: PathBuf,
    /// Dtype of the weights: fp32 or bf16.
    #[arg(long, default_value = "bf16", value_parser = crate::export::parse_dtype)]
    dtype: Precision,
    /// Which weights to add to: the model's own, or what quantisation makes of them, as training saw them.
    #[arg(long, value_enum, default_value_t = Base::Original)]
    base: Base,
    /// How the base was held in training, such as nf4-64-double, fp4-128 or int8; what the adapter says
    /// when absent.
    #[arg(long, value_parser = parse_quantization)]
    quantize: Option<Quantization>,
    /// Merge even where the base is not the one that the adapter was trained on.
    #[arg(long)]
    any_base: bool,
    /// A dataset: on its held-out files the loss of the merged model is compared with that of the adapter
    /// on the base as training saw it.
    #[arg(long)]
    dataset: Option<PathBuf>,
    /// Tokenizer of the dataset's text; the model's own when absent.
    #[arg(long, requires = "dataset")]
    tokenizer: Option<PathBuf>,
    /// Most held-out sequences.
    #[arg(long, default_value_t = 16, requires = "dataset", value_parser = clap::value_parser!(u32).range(1..))]
    sequences: u32,
    /// Tokens of a sequence; as many as the model has positions, up to 2048, when absent.
    #[arg(long, requires = "dataset")]
    sequence_tokens: Option<u32>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(super) enum Base {
    /// The model's own weights.
    Original,
    /// What quantisation makes of the linears of the blocks.
    Dequantized,
}

fn parse_quantization(text: &str) -> Result<Quantization, String> {
    let settings = Quantization::from_name(text).filter(|settings| settings.kind != QuantKind::None);
    settings.ok_or_else(|| "expected nf4-64-double, nf4-64, fp4-64-double, int8 or the like".to_owned())
}

pub(super) fn run(args: &Args) -> Result<(), Error> {
    let metadata = files::read(&args.adapter)?.metadata;
    let recorded = metadata.get(BASE_QUANTIZATION_KEY).and_then(|name| Quantization::from_name(name));
    let precision = metadata.get(BASE_DTYPE_KEY).and_then(|name| parse_dtype(name).ok());
    let precision = precision.unwrap_or(Precision::Bf16);
    let trained_on = args.quantize.or(recorded).filter(|settings| settings.kind != QuantKind::None);
    let closure = trained_on.map(|settings| move |weight: &Tensor| dequantized(settings, precision, weight));
    let closure = closure.as_ref().map(|closure| closure as &merge::Dequantized<'_>);
    let merged_into = match (args.base, closure) {
        (Base::Original, _) => None,
        (Base::Dequantized, Some(closure)) => Some(closure),
        (Base::Dequantized, None) => {
            return Err(Error::Refused(format!(
                "{} does not say how its base was quantised: give --quantize, such as nf4-64-double",
                args.adapter.display()
            )));
        }
    };
    let summary = merge::merge(&merge::Request {
        base: &args.model,
        adapter: &args.adapter,
        out: &args.out,
        dtype: args.dtype,
        any_base: args.any_base,
        dequantized: merged_into,
    })?;
    let base = match trained_on.filter(|_| merged_into.is_some()) {
        None => "original weights".to_owned(),
        Some(settings) => format!("weights as {} keeps them", settings.name()),
    };
    say(&format!(
        "{}: {} of {}, {} linears changed (largest {:.3e}, rms {:.3e}), {} parameters replaced",
        args.out.display(),
        base,
        args.model.display(),
        summary.linears,
        summary.largest,
        summary.rms,
        summary.replaced
    ));
    if let Some(dataset) = &args.dataset {
        let losses = loss::compare(&loss::Request {
            merged: &args.out,
            base: &args.model,
            adapter: &args.adapter,
            trained_on: closure,
            dataset,
            tokenizer: args.tokenizer.as_deref().unwrap_or(&args.model),
            sequences: args.sequences,
            sequence_tokens: args.sequence_tokens,
            device: Device::cuda_if_available(),
            dtype: args.dtype,
        })?;
        say(&format!(
            "loss on {} held-out tokens: {:.5} merged, {:.5} as it was trained, difference {:+.5}",
            losses.tokens,
            losses.merged,
            losses.trained,
            losses.merged - losses.trained
        ));
    }
    Ok(())
}

/// What quantisation under `settings` makes of a linear's weight, where a model computes in `precision`.
/// Quantised on the CPU: of what a GPU quantised, a few codes may differ.
pub(crate) fn dequantized(
    settings: Quantization,
    precision: Precision,
    weight: &Tensor,
) -> Result<Tensor, Error> {
    let kind = match precision {
        Precision::Fp32 => Kind::Float,
        Precision::Bf16 => Kind::BFloat16,
    };
    let rounded = encode::round_trip(weight, settings, kind).map_err(checkpoint::Error::from)?;
    Ok(rounded.to_kind(Kind::Float))
}
