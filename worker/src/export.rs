//! `worker export`: a checkpoint's shards to a Hugging Face model directory, streamed tensor by
//! tensor: nobody holds the model. Of an adapter's checkpoint, the adapter as PEFT has it.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};

use tch::Tensor;
use tunefleet_hub as hub;
use tunefleet_proto::chat::TEMPLATE_FILE;
use tunefleet_proto::checkpoint::{self, AdapterRecord, Manifest, RankFile};
use tunefleet_proto::job::{JobSpec, MergeBase, Precision};
use tunefleet_proto::shard_plan::ShardPlan;

use crate::adapter::files::Adapter;
use crate::adapter::{merge, merge_verb};
use crate::checkpoint::base_digest::{BASE_DIGEST_KEY, BASE_DTYPE_KEY, BASE_QUANTIZATION_KEY};
use crate::checkpoint::model_dir::Sink;
use crate::checkpoint::safetensors::{Reader, WriteDtype};
use crate::checkpoint::{Error, hugging_face, load, model_dir, retain};

/// Command line of `worker export`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// A checkpoint (`step-NNNNNNNN`), or a directory of them: then the newest sound one. Without it,
    /// `--push` sends what an earlier export or merge wrote to `--out`.
    #[arg(long, required_unless_present = "push", requires = "model")]
    checkpoint: Option<PathBuf>,
    /// The model that training began from: its config.json is kept.
    #[arg(long, requires = "checkpoint")]
    model: Option<PathBuf>,
    /// Tokenizer to put beside the weights; the model's own when absent.
    #[arg(long, requires = "checkpoint")]
    tokenizer: Option<PathBuf>,
    /// Directory to write.
    #[arg(long)]
    out: PathBuf,
    /// Dtype of the model's weights: fp32 or bf16.
    #[arg(long, default_value = "bf16", value_parser = parse_dtype)]
    dtype: Precision,
    #[command(flatten)]
    hub: hub::cli::PushArgs,
}

/// What the verb can meet.
#[derive(Debug, thiserror::Error)]
pub enum VerbError {
    /// Reading the checkpoint, or writing the model.
    #[error(transparent)]
    Export(#[from] ExportError),
    /// Pushing what was written.
    #[error(transparent)]
    Push(#[from] hub::Error),
}

/// `fp32` or `bf16`.
///
/// # Errors
/// For anything else, naming both.
pub fn parse_dtype(text: &str) -> Result<Precision, String> {
    match text {
        "fp32" => Ok(Precision::Fp32),
        "bf16" => Ok(Precision::Bf16),
        other => Err(format!("{other:?} is neither fp32 nor bf16")),
    }
}

/// Runs the verb.
///
/// # Errors
/// Whatever reading the checkpoint, writing the model or pushing it meets.
pub fn run(args: Args) -> Result<(), VerbError> {
    // What cannot be pushed is said before anything is written.
    let target = args.hub.target()?;
    if let (Some(checkpoint), Some(model)) = (&args.checkpoint, &args.model) {
        let tokenizer = args.tokenizer.as_ref().unwrap_or(model);
        let step = export(checkpoint, model, tokenizer, &args.out, args.dtype)?;
        // A reader that has gone away wants no more.
        let _ = writeln!(std::io::stdout(), "{}: weights after {step} steps", args.out.display());
    }
    if let Some(target) = &target {
        hub::cli::push_and_tell(&args.out, target)?;
    }
    Ok(())
}

/// The name that [`parse_dtype`] reads.
pub fn dtype_name(precision: Precision) -> &'static str {
    match precision {
        Precision::Fp32 => "fp32",
        Precision::Bf16 => "bf16",
    }
}

/// What an export can meet.
pub type ExportError = crate::adapter::Error;

/// Exports the last checkpoint of a job; returns its step. An adapter goes to `spec.adapter_dir()`, and
/// where the job asks for it, merged, to `spec.export_dir()`.
///
/// # Errors
/// Whatever reading the checkpoint or writing the model meets.
pub fn export_job(spec: &JobSpec) -> Result<u64, ExportError> {
    let checkpoints = spec.checkpoints_dir();
    let result =
        retain::result(&checkpoints, spec.train.keep_best, spec.train.steps).map_err(ExportError::from)?;
    let last = checkpoints.join(checkpoint::dir_name(result.step));
    let Some(adapter) = &spec.adapter else {
        return export(
            &last,
            &spec.model_dir(),
            &spec.tokenizer_dir(),
            &spec.export_dir(),
            spec.export.dtype,
        );
    };
    let out = spec.adapter_dir();
    let step = export(&last, &spec.model_dir(), &spec.tokenizer_dir(), &out, spec.export.dtype)?;
    let (settings, precision) = (adapter.quantization, spec.train.precision);
    let closure = |weight: &Tensor| merge_verb::dequantized(settings, precision, weight);
    let dequantized: Option<&merge::Dequantized<'_>> = match spec.export.merge {
        MergeBase::None => return Ok(step),
        MergeBase::Original => None,
        MergeBase::Dequantized => Some(&closure),
    };
    merge::merge(&merge::Request {
        base: &spec.model_dir(),
        adapter: &out,
        out: &spec.export_dir(),
        dtype: spec.export.dtype,
        any_base: false,
        dequantized,
    })?;
    Ok(step)
}

/// Writes `out` from `checkpoint` (or the newest sound one in it); returns its step. The shape
/// comes from `model`. An adapter is written in fp32.
///
/// # Errors
/// Whatever reading the checkpoint or writing the model meets.
pub fn export(
    checkpoint: &Path,
    model: &Path,
    tokenizer: &Path,
    out: &Path,
    dtype: Precision,
) -> Result<u64, ExportError> {
    let (dir, manifest) = if checkpoint.join(checkpoint::MANIFEST_FILE).exists() {
        (checkpoint.to_owned(), load::verify(checkpoint)?)
    } else {
        let sound = load::newest_sound(checkpoint)?;
        for error in &sound.passed_over {
            tracing::warn!("{error}; exporting an older checkpoint");
        }
        (sound.path, sound.manifest)
    };
    let shards = Shards::open(dir, &manifest)?;
    match &manifest.adapter {
        Some(record) => write_adapter(&shards, record, tokenizer, out)?,
        None => {
            let mut config = hugging_face::read_config(model)?;
            // Their rows are trained now.
            config.added_tokens.clear();
            model_dir::write(out, &config, dtype, Some(tokenizer), |parameter, sink| {
                shards.read(&parameter.hf_name, sink)
            })?;
        }
    }
    Ok(manifest.step)
}

/// An adapter of conversations takes its template and its tokens with it.
fn write_adapter(
    shards: &Shards<'_>,
    record: &AdapterRecord,
    tokenizer: &Path,
    out: &Path,
) -> Result<(), ExportError> {
    let mut tensors = BTreeMap::new();
    for slot in shards.plan.units.iter().flat_map(|unit| &unit.parameters) {
        let mut values = Vec::with_capacity(slot.elements() as usize);
        shards.read(&slot.hf_name, &mut |piece| {
            values.extend_from_slice(piece);
            Ok(())
        })?;
        let shape: Vec<i64> = slot.shape.iter().map(|&n| n as i64).collect();
        tensors.insert(slot.hf_name.clone(), Tensor::from_slice(&values).view(shape.as_slice()));
    }
    let metadata = [
        (BASE_DIGEST_KEY.to_owned(), record.base_sha256.clone()),
        (BASE_QUANTIZATION_KEY.to_owned(), record.quantization.name()),
        (BASE_DTYPE_KEY.to_owned(), dtype_name(record.precision).to_owned()),
    ];
    let adapter = Adapter { config: record.lora.clone(), tensors, metadata: metadata.into() };
    let talks = tokenizer.join(TEMPLATE_FILE).exists();
    adapter.write_with(out, WriteDtype::F32, talks.then_some(tokenizer))
}

/// All ranks' files of a checkpoint.
struct Shards<'a> {
    dir: PathBuf,
    plan: &'a ShardPlan,
    readers: Vec<Reader>,
}

impl<'a> Shards<'a> {
    fn open(dir: PathBuf, manifest: &'a Manifest) -> Result<Self, Error> {
        let open = |file: &RankFile| Reader::open(&dir.join(&file.file));
        let readers = manifest.files.iter().map(open).collect::<Result<_, _>>()?;
        Ok(Shards { plan: &manifest.shard_plan, readers, dir })
    }

    /// A parameter's values, in order.
    fn read(&self, hf_name: &str, sink: &mut Sink<'_>) -> Result<(), Error> {
        let found = self.plan.units.iter().find(|u| u.parameters.iter().any(|s| s.hf_name == hf_name));
        let unit = found
            .ok_or_else(|| Error::tensor(&self.dir, hf_name, "is not in the checkpoint's shard plan"))?;
        // Ranks hold consecutive ranges, so their pieces in rank order are the tensor.
        for (rank, reader) in self.readers.iter().enumerate() {
            for piece in unit.pieces(rank as u32, self.plan.world) {
                if piece.slot.hf_name != hf_name {
                    continue;
                }
                let len = piece.range.end - piece.range.start;
                let range = piece.shard_offset..piece.shard_offset + len;
                let mut outcome = Ok(());
                reader.read_f32(&format!("{}.weight", unit.name), range, |_, values| {
                    if outcome.is_ok() {
                        outcome = sink(values);
                    }
                })?;
                outcome?;
            }
        }
        Ok(())
    }
}
