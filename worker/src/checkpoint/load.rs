//! The newest sound checkpoint, onto any number of ranks.

use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};
use tch::Tensor;
use tunefleet_proto::checkpoint::{self as proto, Manifest};
use tunefleet_proto::ids::Rank;
use tunefleet_proto::shard_plan::{PLAN_VERSION, ShardPlan};

use super::Error;
use super::safetensors::Reader;
use super::save::{STATE_NAMES, rank_file};
use crate::train::units::Shard;

/// Steps of all checkpoints under `dir`, ascending; sound or not.
pub fn steps(dir: &Path) -> Vec<u64> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    let mut steps: Vec<u64> =
        entries.filter_map(|e| proto::step_of_dir_name(e.file_name().to_str()?)).collect();
    steps.sort_unstable();
    steps
}

/// A checkpoint to go on from.
#[derive(Debug)]
pub struct Sound {
    /// Its directory.
    pub path: PathBuf,
    /// Its manifest; every file is as it says.
    pub manifest: Manifest,
    /// Newer ones that are not sound, and why: people want to know.
    pub passed_over: Vec<Error>,
}

/// The newest checkpoint under `dir` whose every file is as its manifest says.
///
/// # Errors
/// [`Error::NoCheckpoint`] when none is sound.
pub fn newest_sound(dir: &Path) -> Result<Sound, Error> {
    let mut passed_over = Vec::new();
    for step in steps(dir).into_iter().rev() {
        let path = dir.join(proto::dir_name(step));
        match verify(&path) {
            Ok(manifest) => return Ok(Sound { path, manifest, passed_over }),
            Err(error) => passed_over.push(error),
        }
    }
    let detail = passed_over.iter().map(|error| format!("; {error}")).collect();
    Err(Error::NoCheckpoint { path: dir.to_owned(), detail })
}

/// Reads a checkpoint's manifest, and nothing else.
///
/// # Errors
/// [`Error::Format`] with the rule that it breaks.
pub fn read_manifest(dir: &Path) -> Result<Manifest, Error> {
    let path = dir.join(proto::MANIFEST_FILE);
    let text = fs::read_to_string(&path).map_err(Error::io(&path))?;
    let manifest: Manifest =
        serde_json::from_str(&text).map_err(|e| Error::format(&path, format!("unreadable manifest: {e}")))?;
    if manifest.version != proto::MANIFEST_VERSION {
        let rule = format!(
            "manifest version {}; this program reads version {}",
            manifest.version,
            proto::MANIFEST_VERSION
        );
        return Err(Error::format(&path, rule));
    }
    let plan = &manifest.shard_plan;
    if plan.version != PLAN_VERSION || plan.world == 0 {
        let rule = format!(
            "shard plan of version {} for {} ranks; this program reads version {PLAN_VERSION}",
            plan.version, plan.world
        );
        return Err(Error::format(&path, rule));
    }
    if manifest.files.len() != plan.world as usize {
        return Err(Error::format(&path, "number of files differs from the number of ranks"));
    }
    Ok(manifest)
}

/// [`read_manifest`], and checks every file's digest against it.
///
/// # Errors
/// [`Error::Format`] with the file and the rule that it breaks.
pub fn verify(dir: &Path) -> Result<Manifest, Error> {
    verify_share(dir, Rank::SOLE)
}

/// As [`verify`], of every `world`-th file: together, the ranks check all.
///
/// # Errors
/// [`Error::Format`] with the file and the rule that it breaks.
pub fn verify_share(dir: &Path, share: Rank) -> Result<Manifest, Error> {
    let manifest = read_manifest(dir)?;
    let path = dir.join(proto::MANIFEST_FILE);
    let own = manifest.files.iter().enumerate().skip(share.rank as usize).step_by(share.world as usize);
    for (rank, file) in own {
        if file.file != rank_file(rank as u32) {
            return Err(Error::format(&path, format!("unexpected file name {:?}", file.file)));
        }
        let path = dir.join(&file.file);
        let sha256 = digest(&path)?;
        if sha256 != file.sha256 {
            let rule = format!(
                "has changed since it was written: its SHA-256 is {sha256}, the manifest says {}; \
                 remove this checkpoint or restore the file",
                file.sha256
            );
            return Err(Error::format(&path, rule));
        }
    }
    Ok(manifest)
}

fn digest(path: &Path) -> Result<String, Error> {
    let mut file = File::open(path).map_err(Error::io(path))?;
    let mut hash = Sha256::new();
    let mut chunk = vec![0; 1 << 20];
    loop {
        match file.read(&mut chunk).map_err(Error::io(path))? {
            0 => return Ok(tunefleet_proto::hex(&hash.finalize())),
            n => hash.update(&chunk[..n]),
        }
    }
}

/// Fills `rank`'s `shards` under `plan` from a checkpoint that may have been written by another number
/// of ranks. Bit-equal where the number is the same.
///
/// # Errors
/// A checkpoint of another model, by the first parameter that differs.
pub fn load(
    dir: &Path,
    manifest: &Manifest,
    plan: &ShardPlan,
    rank: u32,
    shards: &[Shard],
) -> Result<(), Error> {
    let saved = &manifest.shard_plan;
    check_same_model(dir, saved, plan)?;
    let readers: Vec<Reader> =
        manifest.files.iter().map(|f| Reader::open(&dir.join(&f.file))).collect::<Result<_, _>>()?;
    for ((unit, saved_unit), shard) in plan.units.iter().zip(&saved.units).zip(shards) {
        let moments = shard.moments.to_fp32()?;
        for piece in unit.pieces(rank, plan.world) {
            for (source, reader) in readers.iter().enumerate() {
                for held in saved_unit.pieces(source as u32, saved.world) {
                    let from = piece.range.start.max(held.range.start);
                    let to = piece.range.end.min(held.range.end);
                    if held.slot.name != piece.slot.name || from >= to {
                        continue;
                    }
                    let into = piece.shard_offset + (from - piece.range.start);
                    let begin = held.shard_offset + (from - held.range.start);
                    for (name, tensor) in STATE_NAMES.iter().zip([&shard.master, &moments[0], &moments[1]]) {
                        let name = format!("{}.{name}", unit.name);
                        reader.read_f32(&name, begin..begin + (to - from), |first, values| {
                            let offset = into + (first - begin);
                            let source = Tensor::from_slice(values);
                            tensor.narrow(0, offset as i64, values.len() as i64).copy_(&source);
                        })?;
                    }
                }
            }
        }
        shard.moments.restore(&moments)?;
    }
    Ok(())
}

fn check_same_model(dir: &Path, saved: &ShardPlan, plan: &ShardPlan) -> Result<(), Error> {
    let slots = |plan: &ShardPlan| -> Vec<(String, Vec<u64>)> {
        plan.units.iter().flat_map(|u| &u.parameters).map(|s| (s.hf_name.clone(), s.shape.clone())).collect()
    };
    let (saved, wanted) = (slots(saved), slots(plan));
    for (a, b) in saved.iter().zip(&wanted) {
        if a != b {
            let rule =
                format!("the checkpoint holds {} {:?}, the job's model has {} {:?}", a.0, a.1, b.0, b.1);
            return Err(Error::tensor(dir, &a.0, rule));
        }
    }
    if saved.len() != wanted.len() {
        let rule = format!("holds {} parameters, the job's model has {}", saved.len(), wanted.len());
        return Err(Error::format(dir, rule));
    }
    Ok(())
}
