//! The quantised base on disk: one file of raw bytes per unit, as it is gathered, and a manifest.
//!
//! An entry belongs to settings (its directory's name) and to a base (the manifest holds what the
//! model's files looked like, and the digest of their values). Files are checked against their digests
//! before they are used; what does not fit is built anew, never trusted. Ranks share both works, unit
//! by unit.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use tch::{Device, Kind, Tensor};
use tunefleet_kernels::{bytes, quant};
use tunefleet_proto::base_plan::{BasePlan, BaseUnit, PartDtype, QuantKind};
use tunefleet_proto::hex;
use tunefleet_proto::ids::Rank;
use tunefleet_proto::model::ModelConfig;

use super::{device_name, encode};
use crate::checkpoint::Error;
use crate::checkpoint::base_digest::{self, UnitDigest};
use crate::checkpoint::hugging_face::ModelFiles;
use crate::checkpoint::place;
use crate::comm::{Communicator, Mesh, Tag, any_failed};

const MANIFEST_FILE: &str = "manifest.json";
const MANIFEST_VERSION: u32 = 1;

/// What an entry says of itself.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Manifest {
    version: u32,
    written_by: String,
    /// Where the bytes were quantised, `cpu` or `cuda`.
    device: String,
    /// Digest of the base's values, see [`base_digest`].
    base_sha256: String,
    /// The model's files, as they were read.
    sources: Vec<Source>,
    plan: BasePlan,
    /// SHA-256 of each unit's file, hex.
    units: Vec<String>,
}

/// What a file looks like without reading it: any change shows in one of these.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Source {
    path: PathBuf,
    bytes: u64,
    inode: u64,
    modified_ns: i64,
    changed_ns: i64,
}

/// SHA-256 of a unit's file, and the digest of its values.
type UnitDigests = [[u8; 32]; 2];

/// An opened base.
pub struct Opened {
    /// This rank's bytes of each unit, on its device.
    pub shards: Vec<Tensor>,
    /// Digest of the base's values.
    pub base_sha256: String,
    /// Whether it was built now, and why: on the first rank that knows the reason.
    pub built: Option<String>,
}

/// This rank's share of the base in `model_dir` (of one of the mesh's copies), laid out by `plan`, from the entry under `cache_dir`,
/// which is built where it is absent, of another base, or damaged. An unquantised base is not kept on
/// disk a second time. Collective.
///
/// # Errors
/// A model whose files break a rule or hold a value that is not finite; a disk that is full.
pub fn open(
    cache_dir: &Path,
    model_dir: &Path,
    config: &ModelConfig,
    plan: &BasePlan,
    mesh: Mesh<'_>,
    device: Device,
) -> Result<Opened, Error> {
    let (comm, rank) = (mesh.world, mesh.shards.rank());
    let files = ModelFiles::open(model_dir)?;
    files.check(model_dir, config)?;
    if plan.quantization.kind == QuantKind::None {
        return unquantized(model_dir, &files, plan, rank, device);
    }
    let plain = if plan.plain == PartDtype::F32 { "fp32" } else { "bf16" };
    let name = format!("{}-{plain}-{}", plan.quantization.name(), device_name(device));
    let entry = cache_dir.join(name);
    let sources = sources(&files)?;
    let (manifest, built) = match find(&entry, plan, &sources, comm, device)? {
        Ok(manifest) => (manifest, None),
        Err(why) => (build(&entry, model_dir, &files, sources, plan, comm, device)?, why),
    };
    let shards = plan.units.iter().map(|unit| read_shard(&entry, unit, rank, device));
    Ok(Opened { shards: shards.collect::<Result<_, _>>()?, base_sha256: manifest.base_sha256, built })
}

/// The whole base in `model_dir`, laid out by `plan`, the bytes of each unit on `device`; nothing is kept on disk.
///
/// # Errors
/// As [`open`].
pub fn whole(
    model_dir: &Path,
    config: &ModelConfig,
    plan: &BasePlan,
    device: Device,
) -> Result<Vec<Tensor>, Error> {
    let files = ModelFiles::open(model_dir)?;
    files.check(model_dir, config)?;
    let units = plan.units.iter();
    units.map(|unit| Ok(encode_unit(model_dir, &files, plan, unit, device)?.0)).collect()
}

/// The entry's manifest where the entry is sound, for all ranks or none. Else why it is not, on the first
/// rank that found it so.
fn find(
    entry: &Path,
    plan: &BasePlan,
    sources: &[Source],
    comm: &dyn Communicator,
    device: Device,
) -> Result<Result<Manifest, Option<String>>, Error> {
    let Rank { rank, world } = comm.rank();
    let own = check(entry, plan, sources, comm.rank(), device);
    let mut unsound = vec![0i64; world as usize];
    unsound[rank as usize] = i64::from(own.is_err());
    let unsound = Tensor::from_slice(&unsound).to_device(device);
    comm.all_reduce(&unsound, Tag { unit: None, what: "base check" })?.wait()?;
    let unsound = Vec::<i64>::try_from(unsound.to_device(Device::Cpu)).unwrap_or_default();
    let first = unsound.iter().position(|&found| found > 0);
    Ok(match (own, first) {
        (Ok(manifest), None) => Ok(manifest),
        (Err(why), Some(first)) if first == rank as usize => Err(Some(why)),
        _ => Err(None),
    })
}

fn check(
    entry: &Path,
    plan: &BasePlan,
    sources: &[Source],
    share: Rank,
    device: Device,
) -> Result<Manifest, String> {
    let path = entry.join(MANIFEST_FILE);
    let text = fs::read(&path).map_err(|_| "there was none".to_owned())?;
    let manifest: Manifest =
        serde_json::from_slice(&text).map_err(|error| format!("{}: {error}", path.display()))?;
    if manifest.version != MANIFEST_VERSION
        || manifest.plan != *plan
        || manifest.device != device_name(device)
        || manifest.units.len() != plan.units.len()
    {
        return Err(format!("{} is of another version or layout", entry.display()));
    }
    if manifest.sources != sources {
        return Err("the model's files have changed since".to_owned());
    }
    for (index, unit) in plan.units.iter().enumerate().filter(|(index, _)| is_own(*index, share)) {
        let path = entry.join(file_name(unit));
        let sha256 = fs::read(&path).map(|bytes| hex(&Sha256::digest(bytes)));
        match sha256 {
            Err(error) => return Err(format!("{}: {error}", path.display())),
            Ok(sha256) if sha256 != manifest.units[index] => {
                return Err(format!("{} has changed since it was written", path.display()));
            }
            Ok(_) => {}
        }
    }
    Ok(manifest)
}

/// Quantises the base unit by unit, each rank its own units, and publishes the entry whole.
fn build(
    entry: &Path,
    model_dir: &Path,
    files: &ModelFiles,
    sources: Vec<Source>,
    plan: &BasePlan,
    comm: &dyn Communicator,
    device: Device,
) -> Result<Manifest, Error> {
    let incomplete = place::incomplete(entry)?;
    let prepared = if comm.rank().rank == 0 { prepare(&incomplete) } else { Ok(()) };
    agree(comm, device, prepared)?;

    let own = || -> Result<Vec<(usize, UnitDigests)>, Error> {
        let mut out = Vec::new();
        for (index, unit) in plan.units.iter().enumerate().filter(|(index, _)| is_own(*index, comm.rank())) {
            let (buffer, values) = encode_unit(model_dir, files, plan, unit, device)?;
            let host = buffer.to_device(Device::Cpu);
            let content = bytes::bytes(&host)?;
            let path = incomplete.join(file_name(unit));
            fs::write(&path, content).map_err(Error::io(&path))?;
            place::sync(&path)?;
            out.push((index, [Sha256::digest(content).into(), values]));
        }
        Ok(out)
    };
    let own = own();
    let digests = share(comm, device, plan.units.len(), own.as_deref().unwrap_or_default())?;
    if let Err(error) = agree(comm, device, own.map(|_| ())) {
        if comm.rank().rank == 0 {
            // Best effort: it is never read, and would only fill the disk.
            let _ = fs::remove_dir_all(&incomplete);
        }
        return Err(error);
    }

    let of_values: Vec<[u8; 32]> = digests.iter().map(|[_, values]| *values).collect();
    let manifest = Manifest {
        version: MANIFEST_VERSION,
        written_by: concat!("tunefleet ", env!("CARGO_PKG_VERSION")).to_owned(),
        device: device_name(device).to_owned(),
        base_sha256: base_digest::of_units(&of_values),
        sources,
        plan: plan.clone(),
        units: digests.iter().map(|[file, _]| hex(file)).collect(),
    };
    let published = if comm.rank().rank == 0 { publish(&incomplete, entry, &manifest) } else { Ok(()) };
    agree(comm, device, published)?;
    Ok(manifest)
}

/// A unit's bytes on `device`, and the digest of its values.
fn encode_unit(
    model_dir: &Path,
    files: &ModelFiles,
    plan: &BasePlan,
    unit: &BaseUnit,
    device: Device,
) -> Result<(Tensor, [u8; 32]), Error> {
    let buffer = Tensor::zeros([unit.bytes as i64], (Kind::Uint8, device));
    let code8 = quant::dynamic_code(true, device)?;
    let mut values_digest = UnitDigest::default();
    for tensor in &unit.tensors {
        values_digest.parameter(&tensor.hf_name);
        let values = files.read(model_dir, &tensor.hf_name, |piece| values_digest.values(piece))?;
        let shape: Vec<i64> = tensor.shape.iter().map(|&n| n as i64).collect();
        let values = values.view(shape.as_slice()).to_device(device);
        encode::encode(tensor, plan.quantization, &values, &code8, &buffer)?;
    }
    Ok((buffer, values_digest.finish()))
}

/// Every rank reads all units, and keeps its bytes of each.
fn unquantized(
    model_dir: &Path,
    files: &ModelFiles,
    plan: &BasePlan,
    rank: Rank,
    device: Device,
) -> Result<Opened, Error> {
    let mut shards = Vec::with_capacity(plan.units.len());
    let mut digests = Vec::with_capacity(plan.units.len());
    for unit in &plan.units {
        let (buffer, values) = encode_unit(model_dir, files, plan, unit, Device::Cpu)?;
        let own = own_bytes(unit, rank);
        let shard = Tensor::zeros([(own.end - own.start) as i64], (Kind::Uint8, Device::Cpu));
        let held = (own.end.min(unit.bytes) as i64 - own.start as i64).max(0);
        shard.narrow(0, 0, held).copy_(&buffer.narrow(0, own.start.min(unit.bytes) as i64, held));
        shards.push(shard.to_device(device));
        digests.push(values);
    }
    Ok(Opened { shards, base_sha256: base_digest::of_units(&digests), built: None })
}

/// A rank's bytes of a unit; the last may end in padding.
fn own_bytes(unit: &BaseUnit, rank: Rank) -> std::ops::Range<u64> {
    let len = unit.padded_bytes(rank.world) / u64::from(rank.world);
    u64::from(rank.rank) * len..(u64::from(rank.rank) + 1) * len
}

fn read_shard(entry: &Path, unit: &BaseUnit, rank: Rank, device: Device) -> Result<Tensor, Error> {
    let own = own_bytes(unit, rank);
    let mut shard = Tensor::zeros([(own.end - own.start) as i64], (Kind::Uint8, Device::Cpu));
    let held = own.end.min(unit.bytes).saturating_sub(own.start) as usize;
    let path = entry.join(file_name(unit));
    let file = File::open(&path).map_err(Error::io(&path))?;
    let into = &mut bytes::bytes_mut(&mut shard)?[..held];
    file.read_exact_at(into, own.start).map_err(Error::io(&path))?;
    Ok(shard.to_device(device))
}

fn sources(files: &ModelFiles) -> Result<Vec<Source>, Error> {
    let look = |path: &Path| {
        let metadata = fs::metadata(path).map_err(Error::io(path))?;
        let nanoseconds =
            |seconds: i64, rest: i64| seconds.saturating_mul(1_000_000_000).saturating_add(rest);
        Ok(Source {
            path: path.to_owned(),
            bytes: metadata.len(),
            inode: metadata.ino(),
            modified_ns: nanoseconds(metadata.mtime(), metadata.mtime_nsec()),
            changed_ns: nanoseconds(metadata.ctime(), metadata.ctime_nsec()),
        })
    };
    files.paths().map(look).collect()
}

fn prepare(incomplete: &Path) -> Result<(), Error> {
    if incomplete.exists() {
        fs::remove_dir_all(incomplete).map_err(Error::io(incomplete))?;
    }
    fs::create_dir_all(incomplete).map_err(Error::io(incomplete))
}

fn publish(incomplete: &Path, entry: &Path, manifest: &Manifest) -> Result<(), Error> {
    let path = incomplete.join(MANIFEST_FILE);
    let text = serde_json::to_vec_pretty(manifest).map_err(|e| Error::format(&path, e.to_string()))?;
    fs::write(&path, text).map_err(Error::io(&path))?;
    place::sync(&path)?;
    place::sync(incomplete)?;
    place::place(incomplete, entry)
}

fn file_name(unit: &BaseUnit) -> String {
    format!("{}.bin", unit.name)
}

fn is_own(index: usize, share: Rank) -> bool {
    index as u64 % u64::from(share.world) == u64::from(share.rank)
}

/// All ranks' digests of the units, two each: every unit is one rank's.
fn share(
    comm: &dyn Communicator,
    device: Device,
    units: usize,
    own: &[(usize, UnitDigests)],
) -> Result<Vec<UnitDigests>, Error> {
    const WORDS: usize = 8;
    let mut words = vec![0i64; WORDS * units];
    for (index, digests) in own {
        let bytes = digests.as_flattened().as_chunks::<8>().0;
        for (word, bytes) in words[index * WORDS..].iter_mut().zip(bytes) {
            *word = i64::from_le_bytes(*bytes);
        }
    }
    let tensor = Tensor::from_slice(&words).to_device(device);
    comm.all_reduce(&tensor, Tag { unit: None, what: "base digests" })?.wait()?;
    let words = Vec::<i64>::try_from(tensor.to_device(Device::Cpu)).unwrap_or_default();
    let mut out = vec![[[0; 32]; 2]; units];
    for (unit, words) in out.iter_mut().zip(words.chunks_exact(WORDS)) {
        for (bytes, word) in unit.as_flattened_mut().as_chunks_mut::<8>().0.iter_mut().zip(words) {
            *bytes = word.to_le_bytes();
        }
    }
    Ok(out)
}

/// Turns one rank's failure into everybody's.
fn agree(comm: &dyn Communicator, device: Device, own: Result<(), Error>) -> Result<(), Error> {
    let failed = any_failed(comm, device, own.is_err(), "base agreement")?;
    own?;
    match failed {
        false => Ok(()),
        true => Err(Error::Elsewhere("another rank could not build its part of the base".to_owned())),
    }
}
