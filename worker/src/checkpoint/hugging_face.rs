//! Shards from a Hugging Face model directory: each rank reads only its own slices.
//!
//! Weights are in safetensors files, or where there are none, in those that transformers wrote before.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::path::{Path, PathBuf};

use tch::{Device, Kind, Tensor};
use tunefleet_proto::ids::Rank;
use tunefleet_proto::model::ModelConfig;
use tunefleet_proto::shard_plan::{ShardPlan, Unit};

use super::{Error, safetensors, torch_zip};
use crate::comm::{Communicator, Mesh, Tag};
use crate::model::numerics::Numerics;
use crate::train::units::Shard;

/// The file of a model that is not split.
pub const WEIGHTS_FILE: &str = "model.safetensors";
/// The index of a model that is.
pub const INDEX_FILE: &str = "model.safetensors.index.json";
/// The same two of a model that `torch.save` wrote.
pub const TORCH_WEIGHTS_FILE: &str = "pytorch_model.bin";
/// As [`INDEX_FILE`].
pub const TORCH_INDEX_FILE: &str = "pytorch_model.bin.index.json";
/// Where a model's shape stands.
pub const CONFIG_FILE: &str = "config.json";

/// All weights files of a model directory.
pub struct ModelFiles {
    readers: Vec<WeightsFile>,
    /// Tensor name -> index into `readers`.
    tensors: BTreeMap<String, usize>,
}

/// A weights file in one of the formats that are read.
pub(crate) enum WeightsFile {
    Safetensors(safetensors::Reader),
    Torch(torch_zip::Reader),
}

impl WeightsFile {
    fn open(path: &Path, format: Format) -> Result<Self, Error> {
        Ok(match format {
            Format::Safetensors => WeightsFile::Safetensors(safetensors::Reader::open(path)?),
            Format::Torch => WeightsFile::Torch(torch_zip::Reader::open(path)?),
        })
    }

    fn path(&self) -> &Path {
        match self {
            WeightsFile::Safetensors(reader) => reader.path(),
            WeightsFile::Torch(reader) => reader.path(),
        }
    }

    /// Names of all tensors, sorted.
    fn names(&self) -> Vec<String> {
        match self {
            WeightsFile::Safetensors(reader) => reader.names(),
            WeightsFile::Torch(reader) => reader.names().map(str::to_owned).collect(),
        }
    }

    fn shape(&self, name: &str) -> Option<Vec<u64>> {
        match self {
            WeightsFile::Safetensors(reader) => {
                Some(reader.info(name)?.shape.iter().map(|&n| n as u64).collect())
            }
            WeightsFile::Torch(reader) => reader.shape(name).map(<[u64]>::to_vec),
        }
    }

    /// Elements `range` of a tensor, flattened, as fp32, in pieces: `take(first, values)`.
    pub(crate) fn read_f32(
        &self,
        name: &str,
        range: Range<u64>,
        take: impl FnMut(u64, &[f32]),
    ) -> Result<(), Error> {
        match self {
            WeightsFile::Safetensors(reader) => reader.read_f32(name, range, take),
            WeightsFile::Torch(reader) => reader.read_f32(name, range, take),
        }
    }
}

#[derive(Clone, Copy)]
enum Format {
    Safetensors,
    Torch,
}

/// Reads a directory's `config.json`.
///
/// # Errors
/// [`Error::Format`] with the rule that it breaks.
pub fn read_config(dir: &Path) -> Result<ModelConfig, Error> {
    let path = dir.join(CONFIG_FILE);
    let text = std::fs::read_to_string(&path).map_err(Error::io(&path))?;
    ModelConfig::from_json(&text).map_err(|e| Error::format(&path, e.to_string()))
}

/// Makes `place` a link to the model directory `dir`; a link that is there is replaced.
///
/// # Errors
/// Something else in that place.
pub fn link(dir: &Path, place: &Path) -> Result<(), Error> {
    if let Some(parent) = place.parent() {
        std::fs::create_dir_all(parent).map_err(Error::io(parent))?;
    }
    match std::fs::symlink_metadata(place) {
        Ok(found) if found.is_symlink() => std::fs::remove_file(place).map_err(Error::io(place))?,
        Ok(_) => {
            let rule = "is no link to a model of the hub: move it away, or set another `output`";
            return Err(Error::format(place, rule));
        }
        Err(_) => {}
    }
    std::os::unix::fs::symlink(dir, place).map_err(Error::io(place))
}

impl ModelFiles {
    /// Opens the file, or all files that the index names; safetensors where both formats are there.
    ///
    /// # Errors
    /// Files that are absent, truncated or name a tensor twice.
    pub fn open(dir: &Path) -> Result<Self, Error> {
        let formats = [
            (Format::Safetensors, INDEX_FILE, WEIGHTS_FILE),
            (Format::Torch, TORCH_INDEX_FILE, TORCH_WEIGHTS_FILE),
        ];
        let is_there = |(_, index, weights): &(Format, &str, &str)| {
            dir.join(index).exists() || dir.join(weights).exists()
        };
        let (format, index, weights) = formats.into_iter().find(is_there).unwrap_or(formats[0]);
        let index = dir.join(index);
        let map = if index.exists() { Some(indexed(&index)?) } else { None };
        let names: BTreeSet<String> = match &map {
            Some(map) => map.values().cloned().collect(),
            None => [weights.to_owned()].into(),
        };
        let mut files = ModelFiles { readers: Vec::new(), tensors: BTreeMap::new() };
        for name in names {
            if name.contains(['/', '\\']) {
                return Err(Error::format(&index, format!("file name {name:?} leaves the directory")));
            }
            let path = dir.join(&name);
            let reader = WeightsFile::open(&path, format)?;
            for tensor in reader.names() {
                // The index has the last word of a tensor that stands in several files.
                let elsewhere = map.as_ref().and_then(|map| map.get(&tensor)).filter(|file| **file != name);
                if elsewhere.is_some_and(|file| !file.contains(['/', '\\'])) {
                    continue;
                }
                if files.tensors.insert(tensor.clone(), files.readers.len()).is_some() {
                    return Err(Error::tensor(&path, &tensor, "stands in two files"));
                }
            }
            files.readers.push(reader);
        }
        Ok(files)
    }

    pub(crate) fn reader(&self, name: &str) -> Option<&WeightsFile> {
        self.readers.get(*self.tensors.get(name)?)
    }

    fn shape(&self, name: &str) -> Option<Vec<u64>> {
        self.reader(name)?.shape(name)
    }

    /// The files, in the order of their names.
    pub fn paths(&self) -> impl Iterator<Item = &Path> {
        self.readers.iter().map(WeightsFile::path)
    }

    /// Every tensor, and the file that it is read from.
    pub fn places(&self) -> impl Iterator<Item = (&str, &Path)> {
        self.tensors.iter().filter_map(|(name, at)| Some((name.as_str(), self.readers.get(*at)?.path())))
    }

    /// Whether the files are safetensors.
    pub fn is_safetensors(&self) -> bool {
        self.readers.iter().all(|reader| matches!(reader, WeightsFile::Safetensors(_)))
    }

    /// The index of files in the old format, where there is one.
    pub fn torch_index(&self, dir: &Path) -> Option<PathBuf> {
        Some(dir.join(TORCH_INDEX_FILE)).filter(|index| index.exists())
    }

    /// Every parameter of `config` is there in its shape, and nothing else is.
    ///
    /// # Errors
    /// The first tensor that is missing, extra or misshapen, by name.
    pub fn check(&self, dir: &Path, config: &ModelConfig) -> Result<(), Error> {
        check_names(dir, self, &ShardPlan::new(config, 1))
    }

    /// A whole tensor in fp32 on the CPU, flat; `look` sees its values on the way.
    ///
    /// # Errors
    /// A value that is not finite; whatever the file breaks.
    pub fn read(&self, dir: &Path, name: &str, mut look: impl FnMut(&[f32])) -> Result<Tensor, Error> {
        let absent = || Error::tensor(dir, name, "is in none of the files");
        let reader = self.reader(name).ok_or_else(absent)?;
        let elements: u64 = self.shape(name).ok_or_else(absent)?.iter().product();
        let out = Tensor::zeros([elements as i64], (Kind::Float, Device::Cpu));
        let mut finite = true;
        reader.read_f32(name, 0..elements, |first, values| {
            finite &= values.iter().all(|v| v.is_finite());
            look(values);
            out.narrow(0, first as i64, values.len() as i64).copy_(&Tensor::from_slice(values));
        })?;
        if finite { Ok(out) } else { Err(Error::tensor(dir, name, NOT_FINITE)) }
    }
}

/// Of each tensor that an index names, the file.
fn indexed(index: &Path) -> Result<BTreeMap<String, String>, Error> {
    let text = std::fs::read_to_string(index).map_err(Error::io(index))?;
    let value: serde_json::Value =
        serde_json::from_str(&text).map_err(|e| Error::format(index, e.to_string()))?;
    let map = value["weight_map"].as_object();
    let map = map.ok_or_else(|| Error::format(index, "lacks the object weight_map"))?;
    Ok(map.iter().filter_map(|(name, file)| Some((name.clone(), file.as_str()?.to_owned()))).collect())
}

const NOT_FINITE: &str = "holds a value that is not finite";

/// Fills this rank's `shards` with the weights in `dir`; moments stay as they are. Collective: where there are
/// several copies of the weights, ranks that hold the same shard read a part of it each and share these, so
/// that every byte is read once.
///
/// # Errors
/// A missing, extra or misshapen tensor, by name; a value that is not finite.
pub fn load(dir: &Path, plan: &ShardPlan, mesh: Mesh<'_>, shards: &[Shard]) -> Result<(), Error> {
    let files = ModelFiles::open(dir)?;
    check_names(dir, &files, plan)?;
    let own = mesh.shards.rank();
    for (index, (unit, shard)) in plan.units.iter().zip(shards).enumerate() {
        let whole = |into: &Tensor| fill(dir, &files, unit, own.rank, own.world, into);
        let Some(replicas) = mesh.replicas.filter(|replicas| parts(unit, own, *replicas).is_some()) else {
            whole(&shard.master)?;
            continue;
        };
        let (part, of) = (replicas.rank().rank, replicas.rank().world);
        let len = shard.master.size()[0] / i64::from(of);
        let into = shard.master.narrow(0, i64::from(part) * len, len);
        fill(dir, &files, unit, own.rank * of + part, own.world * of, &into)?;
        let tag = Tag { unit: Some(index as u32), what: "load" };
        // Where the communicator works: offloaded weights are elsewhere.
        let there = shard.grad.zeros_like();
        there.shallow_clone().copy_(&shard.master);
        replicas.all_gather(&there, tag)?.wait()?;
        shard.master.shallow_clone().copy_(&there);
    }
    Ok(())
}

/// Into how many equal parts the copies can cut their shards of `unit`; `None` where they cannot.
fn parts(unit: &Unit, shards: Rank, replicas: &dyn Communicator) -> Option<u64> {
    let parts = u64::from(shards.world) * u64::from(replicas.rank().world);
    (parts > 0 && unit.elements.is_multiple_of(parts)).then_some(parts)
}

/// All weights in `dir` for computing with: one flat buffer per unit of a plan for one rank, in
/// the dtype of `numerics`.
///
/// # Errors
/// As [`load`].
pub fn load_weights(dir: &Path, plan: &ShardPlan, numerics: Numerics) -> Result<Vec<Tensor>, Error> {
    let files = ModelFiles::open(dir)?;
    check_names(dir, &files, plan)?;
    let mut buffers = Vec::with_capacity(plan.units.len());
    for unit in &plan.units {
        let buffer = Tensor::zeros([unit.elements as i64], (numerics.kind, numerics.device));
        fill(dir, &files, unit, 0, 1, &buffer)?;
        buffers.push(buffer);
    }
    Ok(buffers)
}

/// Reads a rank's pieces of `unit` into its shard, casting on the way.
fn fill(
    dir: &Path,
    files: &ModelFiles,
    unit: &Unit,
    rank: u32,
    world: u32,
    into: &Tensor,
) -> Result<(), Error> {
    for piece in unit.pieces(rank, world) {
        let name = &piece.slot.hf_name;
        let reader = files.reader(name).ok_or_else(|| Error::tensor(dir, name, "is in none of the files"))?;
        let mut finite = true;
        reader.read_f32(name, piece.range.clone(), |first, values| {
            finite &= values.iter().all(|v| v.is_finite());
            let offset = piece.shard_offset + (first - piece.range.start);
            into.narrow(0, offset as i64, values.len() as i64).copy_(&Tensor::from_slice(values));
        })?;
        if !finite {
            return Err(Error::tensor(dir, name, NOT_FINITE));
        }
    }
    Ok(())
}

/// Every parameter is there in its shape, and nothing else is.
pub(crate) fn check_names(dir: &Path, files: &ModelFiles, plan: &ShardPlan) -> Result<(), Error> {
    let mut unused: BTreeSet<&str> = files.tensors.keys().map(String::as_str).collect();
    for slot in plan.units.iter().flat_map(|unit| &unit.parameters) {
        let shape = files.shape(&slot.hf_name);
        let shape = shape.ok_or_else(|| Error::tensor(dir, &slot.hf_name, "is missing"))?;
        if shape != slot.shape {
            let rule = format!("has shape {shape:?}, config.json asks for {:?}", slot.shape);
            return Err(Error::tensor(dir, &slot.hf_name, rule));
        }
        unused.remove(slot.hf_name.as_str());
    }
    // Written by some versions: the tied head once more, causal masks, and turns of rotary positions.
    let follows = [".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq"];
    unused.retain(|name| *name != "lm_head.weight" && !follows.iter().any(|end| name.ends_with(end)));
    match unused.first() {
        Some(name) => Err(Error::tensor(dir, name, "is not a parameter of this model")),
        None => Ok(()),
    }
}
