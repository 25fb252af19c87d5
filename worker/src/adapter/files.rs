//! PEFT's adapter directories: `adapter_config.json` beside `adapter_model.safetensors`.
//!
//! What is written loads in PEFT with no missing and no unexpected key; what PEFT saved in fp32, bf16 or
//! fp16 is read. Everything is checked before it is used: names, shapes, ranks, and that values are finite.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use tch::{Device, Kind, Tensor};
use tunefleet_proto::adapter::{
    AdapterPlan, CONFIG_FILE, HEAD_ROWS, KEY_PREFIX, LoraConfig, TOKEN_ROWS, TOKEN_ROWS_SUFFIX, WEIGHTS_FILE,
};
use tunefleet_proto::model::ModelConfig;

use super::Error;
use super::delta::Pair;
use crate::checkpoint::base_digest::{BASE_DIGEST_KEY, BASE_DTYPE_KEY, BASE_QUANTIZATION_KEY};
use crate::checkpoint::model_dir::{TOKENIZER_FILES, copy_tokenizer};
use crate::checkpoint::safetensors::{Entry, Reader, WriteDtype, Writer};
use crate::checkpoint::{self, place};

/// Ends of the keys of a pair.
const A: &str = ".lora_A.weight";
const B: &str = ".lora_B.weight";
const MAGNITUDE: &str = ".lora_magnitude_vector";
/// Longest dimension that is believed.
const MAX_DIMENSION: usize = 1 << 32;
/// Elements copied at a time.
const CHUNK_ELEMENTS: i64 = 1 << 20;

/// An adapter in memory, its values in fp32 on the CPU.
#[derive(Debug)]
pub struct Adapter {
    /// PEFT's settings.
    pub config: LoraConfig,
    /// By PEFT's own keys.
    pub tensors: BTreeMap<String, Tensor>,
    /// What the weights file says beside its tensors, such as the base's digest.
    pub metadata: BTreeMap<String, String>,
}

/// Whether values that are not finite are refused or left for [`inspect`](super::inspect) to tell of.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Values {
    Finite,
    Any,
}

/// Reads an adapter directory by itself: its tensors are checked against each other and its config.
///
/// # Errors
/// The file, tensor or key, and the rule that it breaks.
pub fn read(dir: &Path) -> Result<Adapter, Error> {
    read_as(dir, Values::Finite)
}

/// As [`read`], and every tensor is what the config asks for on `model`: none missing, extra or misshapen.
///
/// # Errors
/// As [`read`]; a tensor by name with both shapes.
pub fn read_for(dir: &Path, model: &ModelConfig) -> Result<(Adapter, AdapterPlan), Error> {
    let adapter = read_as(dir, Values::Finite)?;
    let plan = plan_for(&adapter, dir, model)?;
    Ok((adapter, plan))
}

/// What an adapter trains of `model`; every tensor is what the config asks for: none missing, extra or misshapen.
///
/// # Errors
/// A tensor by name with both shapes; `dir` is what errors call the adapter.
pub fn plan_for(adapter: &Adapter, dir: &Path, model: &ModelConfig) -> Result<AdapterPlan, Error> {
    let plan = adapter.config.plan(model).map_err(Error::config(dir))?;
    for target in &plan.unmatched {
        tracing::warn!("{}: target_modules {target:?} matches no linear of this model", dir.display());
    }
    let path = dir.join(WEIGHTS_FILE);
    let refuse = |name: &str, rule: String| Err(checkpoint::Error::tensor(&path, name, rule).into());
    let blocks = (0..model.layers).flat_map(|block| plan.block_parameters(block));
    let expected: BTreeMap<String, Vec<u64>> =
        plan.embed_parameters().into_iter().chain(blocks).map(|p| (p.hf_name, p.shape)).collect();
    for (name, wanted) in &expected {
        let Some(tensor) = adapter.tensors.get(name) else {
            return refuse(name, "is missing: adapter_config.json and the model ask for it".to_owned());
        };
        let shape = shape_of(tensor);
        if shape.len() != wanted.len() {
            let (is, must) = (shape.len(), wanted.len());
            return refuse(
                name,
                format!("has {is} dimensions, {shape:?}; the model needs {must}, {wanted:?}"),
            );
        }
        if shape != *wanted {
            let rule =
                format!("has shape {shape:?}, the model needs {wanted:?}: it belongs to another model");
            return refuse(name, rule);
        }
    }
    match adapter.tensors.keys().find(|name| !expected.contains_key(*name)) {
        Some(extra) => refuse(extra, "belongs to no module of this model that is a target".to_owned()),
        None => Ok(plan),
    }
}

pub(super) fn read_as(dir: &Path, values: Values) -> Result<Adapter, Error> {
    let path = dir.join(CONFIG_FILE);
    if !path.exists() {
        let rule = format!("holds no {CONFIG_FILE}{}", hint(dir));
        return Err(checkpoint::Error::format(dir, rule).into());
    }
    let text = fs::read_to_string(&path).map_err(checkpoint::Error::io(&path))?;
    let config = LoraConfig::from_peft_json(&text).map_err(Error::config(dir))?;
    let path = dir.join(WEIGHTS_FILE);
    if !path.exists() && dir.join("adapter_model.bin").exists() {
        let rule = format!(
            "holds adapter_model.bin, which is a pickle and can run anything: load it with PEFT and save it \
             again, for {WEIGHTS_FILE}"
        );
        return Err(checkpoint::Error::format(dir, rule).into());
    }
    let reader = Reader::open(&path)?;
    let mut tensors = BTreeMap::new();
    for name in reader.names() {
        let tensor = read_tensor(&reader, &path, &name, values)?;
        tensors.insert(name, tensor);
    }
    let known = [BASE_DIGEST_KEY, BASE_QUANTIZATION_KEY, BASE_DTYPE_KEY].into_iter();
    let metadata = known.filter_map(|key| Some((key.to_owned(), reader.metadata(key)?.to_owned()))).collect();
    let adapter = Adapter { config, tensors, metadata };
    adapter.check(&path)?;
    Ok(adapter)
}

/// What a person may have meant by a directory without a config.
fn hint(dir: &Path) -> String {
    let inner = fs::read_dir(dir).into_iter().flatten().flatten().map(|entry| entry.path());
    match inner.into_iter().find(|path| path.join(CONFIG_FILE).exists()) {
        Some(path) => {
            format!("; PEFT keeps adapters with a name of their own in folders: try {}", path.display())
        }
        None if !dir.exists() => ": there is no such directory".to_owned(),
        None => ": it is not an adapter".to_owned(),
    }
}

fn read_tensor(reader: &Reader, path: &Path, name: &str, values: Values) -> Result<Tensor, Error> {
    let refuse = |rule: String| Error::from(checkpoint::Error::tensor(path, name, rule));
    let info = reader.info(name).ok_or_else(|| refuse("is not in the file".to_owned()))?;
    let shape = &info.shape;
    if !(1..=2).contains(&shape.len()) || shape.iter().any(|n| !(1..=MAX_DIMENSION).contains(n)) {
        return Err(refuse(format!("has shape {shape:?}: an adapter's tensors are matrices and vectors")));
    }
    let elements: usize = shape.iter().product();
    let dims: Vec<i64> = shape.iter().map(|&n| n as i64).collect();
    let flat = Tensor::zeros([elements as i64], (Kind::Float, Device::Cpu));
    let mut finite = true;
    reader.read_f32(name, 0..elements as u64, |first, piece| {
        finite &= piece.iter().all(|v| v.is_finite());
        flat.narrow(0, first as i64, piece.len() as i64).copy_(&Tensor::from_slice(piece));
    })?;
    if !finite && values == Values::Finite {
        return Err(refuse("holds a value that is not finite: its training diverged".to_owned()));
    }
    Ok(flat.view(&dims[..]))
}

impl Adapter {
    /// The same adapter; tensors are shared.
    pub fn shallow_clone(&self) -> Self {
        let tensors = self.tensors.iter().map(|(name, tensor)| (name.clone(), tensor.shallow_clone()));
        Adapter { config: self.config.clone(), tensors: tensors.collect(), metadata: self.metadata.clone() }
    }

    /// All pairs by module, in the order of blocks.
    ///
    /// # Errors
    /// A config whose patterns cannot be compiled, or pairs that do not fit it.
    pub fn pairs(&self) -> Result<Vec<(String, Pair<'_>)>, Error> {
        let path = Path::new(WEIGHTS_FILE);
        let modules = self.config.modules().map_err(Error::config(path))?;
        let mut pairs = Vec::new();
        for (key, a) in &self.tensors {
            let Some(module) = key.strip_prefix(KEY_PREFIX).and_then(|key| key.strip_suffix(A)) else {
                continue;
            };
            let name = format!("{KEY_PREFIX}{module}{B}");
            let b = self.tensors.get(&name).ok_or_else(|| missing(path, &name))?;
            let shape = modules.pair(module).ok_or_else(|| not_a_target(path, key, &self.config))?;
            let magnitude = self.tensors.get(&format!("{KEY_PREFIX}{module}{MAGNITUDE}"));
            pairs.push((module.to_owned(), Pair { a, b, scaling: shape.scaling, magnitude }));
        }
        pairs.sort_by_cached_key(|(module, _)| natural(module));
        Ok(pairs)
    }

    /// What is trained whole: its key in the file, and its name in the base.
    pub fn saved(&self) -> impl Iterator<Item = (&str, &str, &Tensor)> {
        self.tensors.iter().filter_map(|(key, tensor)| {
            let base = key.strip_prefix(KEY_PREFIX)?;
            let is_other = [A, B, MAGNITUDE, TOKEN_ROWS_SUFFIX].iter().any(|end| base.ends_with(end));
            (!is_other).then_some((&**key, base, tensor))
        })
    }

    /// Values of the rows of the tables of tokens that are trained (`token_rows` of the config), `[n, D]`: by the module
    /// of the table, [`TOKEN_ROWS`] or [`HEAD_ROWS`].
    pub fn token_rows(&self) -> impl Iterator<Item = (&'static str, &str, &Tensor)> {
        self.tensors.iter().filter_map(|(key, tensor)| {
            let module = key.strip_prefix(KEY_PREFIX)?.strip_suffix(TOKEN_ROWS_SUFFIX)?;
            Some((if module == "lm_head" { HEAD_ROWS } else { TOKEN_ROWS }, module, tensor))
        })
    }

    /// Whether the pairs and the config fit each other; `path` is the file to name.
    fn check(&self, path: &Path) -> Result<(), Error> {
        let refuse = |name: &str, rule: String| Err(checkpoint::Error::tensor(path, name, rule).into());
        let modules = self.config.modules().map_err(Error::config(path))?;
        for (key, tensor) in &self.tensors {
            let Some(base) = key.strip_prefix(KEY_PREFIX) else {
                return refuse(
                    key,
                    format!("is not an adapter's tensor: their names begin with {KEY_PREFIX}"),
                );
            };
            let shape = shape_of(tensor);
            if base.ends_with(TOKEN_ROWS_SUFFIX) {
                let rows = self.config.token_rows.len() as u64;
                if shape.len() != 2 || shape.first() != Some(&rows) {
                    let rule = format!(
                        "has shape {shape:?}, and adapter_config.json names {rows} rows in trainable_token_indices"
                    );
                    return refuse(key, rule);
                }
                continue;
            }
            let split = [A, B, MAGNITUDE].iter().find_map(|end| Some((base.strip_suffix(end)?, *end)));
            let Some((module, end)) = split else {
                let module = base.rsplit_once('.').map_or(base, |(module, _)| module);
                if base.contains(".lora_") {
                    return refuse(key, "is not supported: only lora_A and lora_B of linears are".to_owned());
                }
                if !modules.is_saved(module) {
                    return refuse(key, "is neither part of a pair nor in modules_to_save".to_owned());
                }
                continue;
            };
            let Some(pair) = modules.pair(module) else {
                return Err(not_a_target(path, key, &self.config));
            };
            if end == MAGNITUDE && !self.config.dora {
                return refuse(
                    key,
                    "is a magnitude, but adapter_config.json says use_dora: false".to_owned(),
                );
            }
            let parts: &[&str] = if self.config.dora { &[A, B, MAGNITUDE] } else { &[A, B] };
            for part in parts {
                let name = format!("{KEY_PREFIX}{module}{part}");
                let Some(other) = self.tensors.get(&name) else { return Err(missing(path, &name)) };
                let wanted = if *part == MAGNITUDE { 1 } else { 2 };
                let shape = shape_of(other);
                if shape.len() != wanted {
                    return refuse(&name, format!("has shape {shape:?}, needed are {wanted} dimensions"));
                }
            }
            let rank = if end == A { shape.first() } else { shape.get(1) };
            if end != MAGNITUDE && rank != Some(&pair.rank) {
                let (rank, config) = (rank.copied().unwrap_or_default(), pair.rank);
                let rule =
                    format!("has shape {shape:?} and so rank {rank}, adapter_config.json says {config}");
                return refuse(key, rule);
            }
            let b = self.tensors.get(&format!("{KEY_PREFIX}{module}{B}"));
            if end == MAGNITUDE && b.is_some_and(|b| shape_of(b).first() != shape.first()) {
                let rule =
                    format!("has shape {shape:?}, its pair has {} outputs", b.map_or(0, |b| b.size()[0]));
                return refuse(key, rule);
            }
        }
        if !self.tensors.keys().any(|key| key.ends_with(A)) {
            return Err(
                checkpoint::Error::format(path, "holds no pair: nothing that an adapter could do").into()
            );
        }
        Ok(())
    }

    /// Writes `out`, replacing an adapter that is there; the directory appears whole or not at all.
    ///
    /// # Errors
    /// A value that is not finite, or whatever the file system refuses; `out` is then as it was.
    pub fn write(&self, out: &Path, dtype: WriteDtype) -> Result<(), Error> {
        self.write_with(out, dtype, None)
    }

    /// As [`write`](Self::write), with the tokenizer that lies in a directory, and its chat template, beside it.
    ///
    /// # Errors
    /// As [`write`](Self::write).
    pub fn write_with(&self, out: &Path, dtype: WriteDtype, tokenizer: Option<&Path>) -> Result<(), Error> {
        let path = out.join(WEIGHTS_FILE);
        self.check(&path)?;
        for (name, tensor) in &self.tensors {
            if !is_finite(tensor) {
                return Err(
                    checkpoint::Error::tensor(&path, name, "would hold a value that is not finite").into()
                );
            }
        }
        check_replaceable(out)?;
        place::whole(out, |incomplete| {
            self.fill(incomplete, dtype)?;
            tokenizer.map_or(Ok(()), |tokenizer| copy_tokenizer(tokenizer, incomplete))
        })?;
        Ok(())
    }

    pub(super) fn fill(&self, dir: &Path, dtype: WriteDtype) -> Result<(), checkpoint::Error> {
        let path = dir.join(CONFIG_FILE);
        let text = serde_json::to_vec_pretty(&self.config.to_peft_json())
            .map_err(|e| checkpoint::Error::format(&path, e.to_string()))?;
        fs::write(&path, text).map_err(checkpoint::Error::io(&path))?;
        place::sync(&path)?;
        let entries: Vec<Entry> =
            self.tensors.iter().map(|(name, t)| Entry { name: name.clone(), shape: shape_of(t) }).collect();
        let path = dir.join(WEIGHTS_FILE);
        let mut writer = Writer::create_with(&path, &entries, dtype, &self.metadata)?;
        for tensor in self.tensors.values() {
            each_chunk(tensor, |values| writer.values(values))?;
        }
        writer.finish().map(|_| ())
    }
}

/// Values of a tensor in order, in pieces.
pub(super) fn each_chunk<E>(tensor: &Tensor, mut take: impl FnMut(&[f32]) -> Result<(), E>) -> Result<(), E> {
    let flat = tensor.to_kind(Kind::Float).contiguous().view([-1]);
    let elements = flat.size1().unwrap_or(0);
    let mut first = 0;
    while first < elements {
        let count = CHUNK_ELEMENTS.min(elements - first);
        take(&Vec::<f32>::try_from(flat.narrow(0, first, count)).unwrap_or_default())?;
        first += count;
    }
    Ok(())
}

pub(super) fn is_finite(tensor: &Tensor) -> bool {
    tensor.isfinite().all().int64_value(&[]) != 0
}

pub(super) fn shape_of(tensor: &Tensor) -> Vec<u64> {
    tensor.size().iter().map(|&n| n as u64).collect()
}

/// Keys of a module's pair.
pub(super) fn pair_keys(module: &str) -> (String, String) {
    (format!("{KEY_PREFIX}{module}{A}"), format!("{KEY_PREFIX}{module}{B}"))
}

/// Numbers in a name count as numbers: `h.2` comes before `h.10`.
pub(super) fn natural(module: &str) -> Vec<(u64, String)> {
    module
        .split('.')
        .map(|part| part.parse().map_or_else(|_| (u64::MAX, part.to_owned()), |n| (n, String::new())))
        .collect()
}

fn missing(path: &Path, name: &str) -> Error {
    checkpoint::Error::tensor(path, name, "is missing: its pair is incomplete").into()
}

fn not_a_target(path: &Path, key: &str, config: &LoraConfig) -> Error {
    let rule = format!("belongs to no module that target_modules {} name", config.targets);
    checkpoint::Error::tensor(path, key, rule).into()
}

/// Whether `out` is free, or holds nothing but an adapter: somebody's other files are not replaced.
fn check_replaceable(out: &Path) -> Result<(), checkpoint::Error> {
    let entries = match fs::read_dir(out) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(checkpoint::Error::io(out)(error)),
    };
    for entry in entries {
        let name = entry.map_err(checkpoint::Error::io(out))?.file_name();
        let name = name.to_string_lossy();
        if name != CONFIG_FILE && name != WEIGHTS_FILE && !TOKENIZER_FILES.contains(&&*name) {
            let rule = format!("holds {name}, which would be lost: choose another place or move it away");
            return Err(checkpoint::Error::format(out, rule));
        }
    }
    Ok(())
}

#[cfg(test)]
#[path = "files_tests.rs"]
mod tests;
