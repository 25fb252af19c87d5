//! `worker adapter`: its command line, and what it prints.

use std::io::Write;
use std::path::PathBuf;

use clap::{Subcommand, ValueEnum};
use serde::Serialize;
use tch::Tensor;
use tunefleet_proto::base_plan::{BLOCKS, QuantKind, Quantization};
use tunefleet_proto::job::Precision;

use super::combine::{self, Combination, Options, Part};
use super::prune::MajoritySign;
use super::scale::{self, Into};
use super::{Error, diff, files, inspect, merge};
use crate::checkpoint::safetensors::WriteDtype;

/// Command line of `worker adapter`.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Tells what an adapter is: settings, sizes, and the norm of what it adds to each linear.
    #[command(after_help = "Example:\n  worker adapter inspect copilot --json")]
    Inspect(InspectArgs),
    /// Makes an adapter weaker or stronger.
    #[command(
        after_help = "Example:\n  worker adapter scale --adapter copilot --weight 0.8 --out copilot-0.8"
    )]
    Scale(ScaleArgs),
    /// Makes one adapter of several; the result's scaling is 1.
    #[command(after_long_help = COMBINE_HELP)]
    Combine(CombineArgs),
    /// Writes an adapter into its base: a full model, streamed.
    #[command(after_help = MERGE_HELP)]
    Merge(MergeArgs),
    /// Tells how far two adapters are apart, linear by linear.
    #[command(after_help = "Example:\n  worker adapter diff copilot copilot-0.8")]
    Diff(DiffArgs),
}

const COMBINE_HELP: &str = "\
Examples:
  worker adapter combine --adapter copilot --adapter assistant --out both
  worker adapter combine --adapter a --weight 0.7 --adapter b --weight -0.3 --combination svd --rank 16 --out c
  worker adapter combine --adapter a --adapter b --combination ties --density 0.5 --out c

cat is exactly the weighted sum of what the adapters do; svd is the nearest adapter of a chosen rank and says how
near, without forming the differences. The others are heuristics; those that end in svd form and decompose whole
differences, which takes minutes for large models. Those that work on factors (linear, ties, dare_linear, dare_ties,
magnitude_prune) multiply two sums, so A of one adapter meets B of another: such cross terms are part of these
methods, here as in PEFT.

--peft-compat gives what PEFT 0.21 gives where that is something else:
  - a single adapter is always scaled, whatever the combination: nothing is cut or pruned
  - with rsLoRA in the first adapter the result is too large by the root of its rank
  - what an adapter trains whole (modules_to_save) is lost: the result has the base's own values
  - ties elects signs before weights are applied, so a subtracted adapter votes for what it takes away";

const MERGE_HELP: &str = "\
Examples:
  worker adapter merge --adapter copilot --model starcoderbase-1b --out merged
  worker adapter merge --adapter copilot --model starcoderbase-1b --out merged --base dequantized --quantize nf4";

#[derive(Debug, clap::Args)]
struct InspectArgs {
    /// Directory of the adapter.
    adapter: PathBuf,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, clap::Args)]
struct ScaleArgs {
    /// Directory of the adapter.
    #[arg(long)]
    adapter: PathBuf,
    /// What its effect is multiplied by; may be negative.
    #[arg(long, allow_negative_numbers = true)]
    weight: f64,
    /// Directory to write.
    #[arg(long)]
    out: PathBuf,
    /// Multiply the tensors (B) instead of lora_alpha, for programs that do not read it.
    #[arg(long)]
    bake: bool,
    /// Dtype of the tensors: fp32 or bf16.
    #[arg(long, default_value = "fp32", value_parser = crate::export::parse_dtype)]
    dtype: Precision,
}

#[derive(Debug, clap::Args)]
struct CombineArgs {
    /// Directory of an adapter; once for each.
    #[arg(long = "adapter", required = true)]
    adapters: Vec<PathBuf>,
    /// Weight of each adapter, in the same order; may be negative. 1 for all when absent.
    #[arg(long = "weight", allow_negative_numbers = true)]
    weights: Vec<f64>,
    /// How they become one.
    #[arg(long, value_enum, default_value_t = Combination::Cat)]
    combination: Combination,
    /// Rank of the result, for svd and what ends in it; the largest rank of the adapters when absent.
    #[arg(long)]
    rank: Option<u64>,
    /// Share of values that pruning keeps, above 0 and at most 1.
    #[arg(long)]
    density: Option<f64>,
    /// How ties and dare_ties elect the sign of each value.
    #[arg(long, value_enum, default_value_t = MajoritySign::Total)]
    majority_sign_method: MajoritySign,
    /// Seed of the random values of dare.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Give what PEFT gives, where that is something else; see below.
    #[arg(long)]
    peft_compat: bool,
    /// Directory to write.
    #[arg(long)]
    out: PathBuf,
    /// Dtype of the tensors: fp32 or bf16.
    #[arg(long, default_value = "fp32", value_parser = crate::export::parse_dtype)]
    dtype: Precision,
}

#[derive(Debug, clap::Args)]
struct DiffArgs {
    /// Directory of the first adapter.
    first: PathBuf,
    /// Directory of the second.
    second: PathBuf,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, clap::Args)]
struct MergeArgs {
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
    /// Which weights to add to: the model's own, or what quantisation makes of them, as QLoRA saw them.
    #[arg(long, value_enum, default_value_t = Base::Original)]
    base: Base,
    /// How the base was quantised in training, with --base dequantized.
    #[arg(long, value_enum, required_if_eq("base", "dequantized"))]
    quantize: Option<Quantize>,
    /// Weights that shared a scale, for nf4 and fp4.
    #[arg(long, default_value_t = 64)]
    block: u32,
    /// Whether the scales were quantised as well, for nf4 and fp4.
    #[arg(long)]
    double: bool,
    /// Merge even where the base is not the one that the adapter was trained on.
    #[arg(long)]
    any_base: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Base {
    /// The model's own weights.
    Original,
    /// What quantisation makes of the linears of the blocks.
    Dequantized,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Quantize {
    /// 4-bit codes spaced for normally distributed weights.
    Nf4,
    /// 4-bit floats.
    Fp4,
    /// 8-bit integers with one scale per row.
    Int8,
}

/// Runs the verb.
///
/// # Errors
/// See [`Error`].
pub fn run(args: Args) -> Result<(), Error> {
    match args.verb {
        Verb::Inspect(args) => {
            let report = inspect::inspect(&args.adapter)?;
            show(args.json, &report, || report.table())
        }
        Verb::Diff(args) => {
            let (first, second) = (files::read(&args.first)?, files::read(&args.second)?);
            let report = diff::diff(&first, &second)?;
            show(args.json, &report, || report.table())
        }
        Verb::Scale(args) => {
            let into = if args.bake { Into::B } else { Into::Alpha };
            let scaled = scale::scale(files::read(&args.adapter)?, args.weight, into)?;
            scaled.write(&args.out, write_dtype(args.dtype))?;
            say(&format!("{}: {} times {}", args.out.display(), args.weight, args.adapter.display()));
            Ok(())
        }
        Verb::Combine(args) => run_combine(args),
        Verb::Merge(args) => run_merge(&args),
    }
}

fn run_combine(args: CombineArgs) -> Result<(), Error> {
    let weights = match args.weights.len() {
        0 => vec![1.0; args.adapters.len()],
        n if n == args.adapters.len() => args.weights,
        n => {
            let adapters = args.adapters.len();
            return Err(Error::Refused(format!(
                "{n} --weight for {adapters} --adapter: give one for each, or none"
            )));
        }
    };
    let mut parts = Vec::new();
    for (path, weight) in args.adapters.iter().zip(weights) {
        parts.push(Part { name: path.display().to_string(), adapter: files::read(path)?, weight });
    }
    let options = Options {
        combination: args.combination,
        rank: args.rank,
        density: args.density,
        majority_sign: args.majority_sign_method,
        seed: args.seed,
        peft_compat: args.peft_compat,
    };
    let combined = combine::combine(&parts, options)?;
    combined.adapter.write(&args.out, write_dtype(args.dtype))?;
    let mut ranks: Vec<u64> = combined.modules.iter().map(|module| module.rank).collect();
    ranks.sort_unstable();
    ranks.dedup();
    let mut text = format!("{}: {} modules, rank {ranks:?}", args.out.display(), combined.modules.len());
    for module in &combined.modules {
        if let Some(error) = module.truncation_error {
            text += &format!("\n{}: rank {}, truncation error {error:.3e}", module.module, module.rank);
        }
    }
    if let Some(error) = combined.truncation_error {
        text += &format!("\noverall truncation error {error:.3e} of the norm");
    }
    for note in &combined.notes {
        text += &format!("\nnote: {note}");
    }
    say(&text);
    Ok(())
}

fn run_merge(args: &MergeArgs) -> Result<(), Error> {
    let quantization = match (args.base, args.quantize) {
        (Base::Dequantized, Some(quantize)) => Some(quantization(quantize, args.block, args.double)?),
        (Base::Original, Some(_)) => {
            return Err(Error::Refused(
                "--quantize is for --base dequantized: give both or neither".to_owned(),
            ));
        }
        _ => None,
    };
    let closure = quantization.map(|settings| move |weight: &Tensor| dequantized(settings, weight));
    let summary = merge::merge(&merge::Request {
        base: &args.model,
        adapter: &args.adapter,
        out: &args.out,
        dtype: args.dtype,
        any_base: args.any_base,
        dequantized: closure.as_ref().map(|closure| closure as &merge::Dequantized<'_>),
    })?;
    let base = match quantization {
        None => "original weights".to_owned(),
        Some(Quantization { kind: QuantKind::Int8, .. }) => "weights as int8 keeps them".to_owned(),
        Some(Quantization { kind, block, double }) => {
            let double = if double { ", double quantisation" } else { "" };
            format!("weights as {kind:?} keeps them, blocks of {block}{double}").to_lowercase()
        }
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
    Ok(())
}

fn quantization(quantize: Quantize, block: u32, double: bool) -> Result<Quantization, Error> {
    let kind = match quantize {
        Quantize::Nf4 => QuantKind::Nf4,
        Quantize::Fp4 => QuantKind::Fp4,
        Quantize::Int8 => QuantKind::Int8,
    };
    if kind == QuantKind::Int8 && double {
        return Err(Error::Refused("--double is for nf4 and fp4: int8 has one scale per row".to_owned()));
    }
    if !BLOCKS.contains(&block) {
        return Err(Error::Refused(format!("--block ({block}) must be one of {BLOCKS:?}")));
    }
    Ok(Quantization { kind, block, double })
}

/// What quantisation under `settings` makes of a linear's weight.
fn dequantized(settings: Quantization, _weight: &Tensor) -> Result<Tensor, Error> {
    Err(Error::Refused(format!("--base dequantized ({:?}) is not wired yet", settings.kind)))
}

fn write_dtype(dtype: Precision) -> WriteDtype {
    match dtype {
        Precision::Fp32 => WriteDtype::F32,
        Precision::Bf16 => WriteDtype::Bf16,
    }
}

fn show(json: bool, report: &impl Serialize, table: impl FnOnce() -> String) -> Result<(), Error> {
    let text = if json {
        serde_json::to_string_pretty(report).map_err(|e| Error::Refused(format!("writing JSON: {e}")))?
    } else {
        table()
    };
    say(text.trim_end());
    Ok(())
}

/// A reader that has gone away wants no more.
fn say(text: &str) {
    let _ = writeln!(std::io::stdout(), "{text}");
}

#[cfg(test)]
#[path = "cli_tests.rs"]
mod tests;
