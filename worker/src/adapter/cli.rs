//! `worker adapter`: its command line, and what it prints.

use std::io::Write;
use std::path::PathBuf;

use clap::Subcommand;
use serde::Serialize;
use tunefleet_proto::chat::TEMPLATE_FILE;
use tunefleet_proto::job::Precision;

use super::combine::{self, Combination, Options, Part};
use super::prune::MajoritySign;
use super::scale::{self, Into};
use super::sibling::{self, Known};
use super::{Error, diff, files, inspect, merge_verb};
use crate::checkpoint::base_digest::BASE_DIGEST_KEY;
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
    #[command(after_help = merge_verb::HELP)]
    Merge(merge_verb::Args),
    /// Tells how far two adapters are apart, linear by linear.
    #[command(after_help = "Example:\n  worker adapter diff copilot copilot-0.8")]
    Diff(DiffArgs),
}

const COMBINE_HELP: &str = "\
Examples:
  worker adapter combine --adapter copilot --adapter assistant --out both
  worker adapter combine --adapter a --weight 0.7 --adapter b --weight -0.3 --combination svd --rank 16 --out c
  worker adapter combine --adapter a --adapter b --combination ties --density 0.5 --out c
  worker adapter combine --adapter copilot --adapter assistant --model sibling --trained-on base --out both

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
    /// The model that the result is for: every adapter must fit it, and how far it is from theirs is told.
    #[arg(long, value_name = "DIR")]
    model: Option<PathBuf>,
    /// A model that one of the adapters was trained on, to be compared with --model; once for each.
    #[arg(long, value_name = "DIR", requires = "model")]
    trained_on: Vec<PathBuf>,
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
        Verb::Merge(args) => merge_verb::run(&args),
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
    let mut combined = combine::combine(&parts, options)?;
    if let Some(model) = &args.model {
        let known = Known::open(model)?;
        let bases = args.trained_on.iter().map(|dir| Known::open(dir)).collect::<Result<Vec<_>, _>>()?;
        combined.notes.extend(sibling::check(&parts, &known, &bases)?);
        combined.adapter.config.base_model = Some(model.display().to_string());
        combined.adapter.metadata.insert(BASE_DIGEST_KEY.to_owned(), known.sha256);
    }
    // A template, and the tokens that it needs, go on with what was trained for them.
    let talking: Vec<&PathBuf> =
        args.adapters.iter().filter(|dir| dir.join(TEMPLATE_FILE).exists()).collect();
    if let [first, _, ..] = talking.as_slice() {
        let shown = first.display();
        combined.notes.push(format!("several have a chat template: the result has that of {shown}"));
    }
    let tokenizer = talking.first().map(|dir| dir.as_path());
    combined.adapter.write_with(&args.out, write_dtype(args.dtype), tokenizer)?;
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
pub(super) fn say(text: &str) {
    let _ = writeln!(std::io::stdout(), "{text}");
}

#[cfg(test)]
#[path = "cli_tests.rs"]
mod tests;
