//! `worker checkpoint verify`: whether checkpoints are what their manifests say, and can be gone on from.

use std::io::Write;
use std::path::{Path, PathBuf};

use tunefleet_proto::checkpoint::{self as proto, Manifest};

use super::safetensors::Reader;
use super::save::STATE_NAMES;
use super::{Error, load};

/// Command line of `worker checkpoint`.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, clap::Subcommand)]
enum Verb {
    /// Checks digests, layout and values of one checkpoint, or of all in a directory.
    Verify(VerifyArgs),
}

#[derive(Debug, clap::Args)]
struct VerifyArgs {
    /// A checkpoint (`.../step-00000500`), a directory of checkpoints, or the output directory of a job.
    dir: PathBuf,
    /// One JSON object a line.
    #[arg(long)]
    json: bool,
}

/// Why the verb failed.
#[derive(Debug, thiserror::Error)]
pub enum VerbError {
    /// There is nothing to look at.
    #[error("{path}: no checkpoint is there; give .../step-NNNNNNNN, or a directory that holds such", path = path.display())]
    Nothing {
        /// Where was looked.
        path: PathBuf,
    },
    /// Some are not sound; each was told.
    #[error("{unsound} of {all} checkpoints are not sound: remove them, or restore their files")]
    Unsound {
        /// So many.
        unsound: usize,
        /// Of so many.
        all: usize,
    },
}

/// Runs the verb.
///
/// # Errors
/// See [`VerbError`].
pub fn run(args: Args) -> Result<(), VerbError> {
    let Verb::Verify(VerifyArgs { dir, json }) = args.verb;
    let found = checkpoints(&dir);
    if found.is_empty() {
        return Err(VerbError::Nothing { path: dir });
    }
    let mut unsound = 0;
    for path in &found {
        let examined = examine(path);
        unsound += usize::from(examined.is_err());
        let line = if json { as_json(path, &examined).to_string() } else { as_text(path, &examined) };
        // A reader that has gone away wants no more.
        let _ = writeln!(std::io::stdout(), "{line}");
    }
    if unsound > 0 { Err(VerbError::Unsound { unsound, all: found.len() }) } else { Ok(()) }
}

fn checkpoints(dir: &Path) -> Vec<PathBuf> {
    if dir.join(proto::MANIFEST_FILE).is_file() && dir.file_name().is_some_and(is_checkpoint) {
        return vec![dir.to_owned()];
    }
    let of = |dir: &Path| -> Vec<PathBuf> {
        load::steps(dir).into_iter().map(|step| dir.join(proto::dir_name(step))).collect()
    };
    let direct = of(dir);
    if direct.is_empty() { of(&dir.join("checkpoints")) } else { direct }
}

fn is_checkpoint(name: &std::ffi::OsStr) -> bool {
    name.to_str().and_then(proto::step_of_dir_name).is_some()
}

/// Digests against the manifest, tensors against its plan, and that every value is finite.
///
/// # Errors
/// The first thing that is wrong, by file and tensor.
pub fn examine(dir: &Path) -> Result<Manifest, Error> {
    let manifest = load::verify(dir)?;
    let plan = &manifest.shard_plan;
    for file in &manifest.files {
        let path = dir.join(&file.file);
        let reader = Reader::open(&path)?;
        for unit in &plan.units {
            let elements = unit.shard_elements(plan.world);
            for state in STATE_NAMES {
                let name = format!("{}.{state}", unit.name);
                let info = reader.info(&name).ok_or_else(|| Error::tensor(&path, &name, "is missing"))?;
                if info.shape != [elements as usize] {
                    let rule = format!("has shape {:?}, the plan says [{elements}]", info.shape);
                    return Err(Error::tensor(&path, &name, rule));
                }
                let mut finite = true;
                reader.read_f32(&name, 0..elements, |_, values| {
                    finite &= values.iter().all(|value| value.is_finite());
                })?;
                if !finite {
                    return Err(Error::tensor(&path, &name, "holds a value that is not finite"));
                }
            }
        }
        let wanted = plan.units.len() * STATE_NAMES.len();
        if reader.names().len() != wanted {
            let rule = format!("holds {} tensors, the plan says {wanted}", reader.names().len());
            return Err(Error::format(&path, rule));
        }
    }
    Ok(manifest)
}

fn bytes(manifest: &Manifest) -> u64 {
    manifest.files.iter().map(|file| file.bytes).sum()
}

fn as_text(path: &Path, examined: &Result<Manifest, Error>) -> String {
    match examined {
        Ok(manifest) => {
            let evaluated = manifest.validation.and_then(|validation| validation.loss);
            let evaluated = evaluated.map_or_else(String::new, |loss| format!(", validation loss {loss:.4}"));
            let ended = if manifest.finished { ", end of training" } else { "" };
            format!(
                "{}: sound, {} files, {} MB, loss {:.4}{evaluated}{ended}",
                path.display(),
                manifest.files.len(),
                bytes(manifest) / 1_000_000,
                manifest.loss,
            )
        }
        Err(error) => format!("{}: not sound: {error}", path.display()),
    }
}

fn as_json(path: &Path, examined: &Result<Manifest, Error>) -> serde_json::Value {
    let path = path.display().to_string();
    match examined {
        Ok(manifest) => serde_json::json!({
            "path": path, "sound": true, "step": manifest.step, "files": manifest.files.len(),
            "bytes": bytes(manifest), "loss": manifest.loss, "finished": manifest.finished,
            "validation_loss": manifest.validation.and_then(|validation| validation.loss),
        }),
        Err(error) => serde_json::json!({ "path": path, "sound": false, "error": error.to_string() }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_without_checkpoints_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let verb = Verb::Verify(VerifyArgs { dir: dir.path().to_owned(), json: false });
        assert!(run(Args { verb }).unwrap_err().to_string().contains("no checkpoint is there"));
    }
}
