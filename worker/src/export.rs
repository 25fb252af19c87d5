//! `worker export`: a checkpoint's shards to a Hugging Face model directory, streamed tensor by
//! tensor: nobody holds the model.

use std::io::Write;
use std::path::{Path, PathBuf};

use tunefleet_proto::checkpoint;
use tunefleet_proto::job::{JobSpec, Precision};

use crate::checkpoint::safetensors::Reader;
use crate::checkpoint::{Error, hugging_face, load, model_dir};

/// Command line of `worker export`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// A checkpoint (`step-NNNNNNNN`), or a directory of them: then the newest sound one.
    #[arg(long)]
    checkpoint: PathBuf,
    /// The model that training began from: its config.json is kept.
    #[arg(long)]
    model: PathBuf,
    /// Tokenizer to put beside the weights; the model's own when absent.
    #[arg(long)]
    tokenizer: Option<PathBuf>,
    /// Directory to write.
    #[arg(long)]
    out: PathBuf,
    /// Dtype of the weights: fp32 or bf16.
    #[arg(long, default_value = "bf16", value_parser = parse_dtype)]
    dtype: Precision,
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
/// Whatever reading the checkpoint or writing the model meets.
pub fn run(args: Args) -> Result<(), Error> {
    let tokenizer = args.tokenizer.unwrap_or_else(|| args.model.clone());
    let step = export(&args.checkpoint, &args.model, &tokenizer, &args.out, args.dtype)?;
    // A reader that has gone away wants no more.
    let _ = writeln!(std::io::stdout(), "{}: weights after {step} steps", args.out.display());
    Ok(())
}

/// Exports the last checkpoint of a job; returns its step.
///
/// # Errors
/// Whatever reading the checkpoint or writing the model meets.
pub fn export_job(spec: &JobSpec) -> Result<u64, Error> {
    // The last one and no other: an older model must not pass for the trained one.
    let last = spec.checkpoints_dir().join(checkpoint::dir_name(spec.train.steps));
    export(&last, &spec.model_dir(), &spec.tokenizer_dir(), &spec.export_dir(), spec.export.dtype)
}

/// Writes `out` from `checkpoint` (or the newest sound one in it); returns its step. The shape
/// comes from `model`.
///
/// # Errors
/// Whatever reading the checkpoint or writing the model meets.
pub fn export(
    checkpoint: &Path,
    model: &Path,
    tokenizer: &Path,
    out: &Path,
    dtype: Precision,
) -> Result<u64, Error> {
    let (dir, manifest) = if checkpoint.join(checkpoint::MANIFEST_FILE).exists() {
        (checkpoint.to_owned(), load::verify(checkpoint)?)
    } else {
        let sound = load::newest_sound(checkpoint)?;
        for error in &sound.passed_over {
            tracing::warn!("{error}; exporting an older checkpoint");
        }
        (sound.path, sound.manifest)
    };
    let config = hugging_face::read_config(model)?;
    let plan = &manifest.shard_plan;
    let readers: Vec<Reader> =
        manifest.files.iter().map(|f| Reader::open(&dir.join(&f.file))).collect::<Result<_, _>>()?;
    model_dir::write(out, &config, dtype, Some(tokenizer), |parameter, sink| {
        let found = plan.units.iter().find(|u| u.parameters.iter().any(|s| s.hf_name == parameter.hf_name));
        let unit = found.ok_or_else(|| {
            Error::tensor(&dir, &parameter.hf_name, "is not in the checkpoint's shard plan")
        })?;
        // Ranks hold consecutive ranges, so their pieces in rank order are the tensor.
        for (rank, reader) in readers.iter().enumerate() {
            for piece in unit.pieces(rank as u32, plan.world) {
                if piece.slot.hf_name != parameter.hf_name {
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
    })?;
    Ok(manifest.step)
}
