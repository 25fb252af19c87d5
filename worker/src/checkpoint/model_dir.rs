//! Writes a Hugging Face model directory: config, tokenizer and weights, streamed tensor by
//! tensor into files of at most 5 GB. The directory appears whole or not at all.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use serde_json::json;
use tunefleet_proto::chat::TEMPLATE_FILE;
use tunefleet_proto::job::Precision;
use tunefleet_proto::model::{ModelConfig, Parameter};

use super::Error;
use super::hugging_face::{CONFIG_FILE, INDEX_FILE, WEIGHTS_FILE};
use super::place;
use super::safetensors::{Entry, WriteDtype, Writer};

/// Largest weights file; transformers' own default.
const MAX_FILE_BYTES: u64 = 5_000_000_000;
/// What belongs to a tokenizer, where it is there.
pub(crate) const TOKENIZER_FILES: [&str; 4] =
    ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", TEMPLATE_FILE];

/// Takes a parameter's values in order, in pieces of any size.
pub type Sink<'s> = dyn FnMut(&[f32]) -> Result<(), Error> + 's;

/// Writes `out`, replacing it where it exists. `values` is asked once per parameter.
///
/// # Errors
/// Whatever the file system or `values` refuses; `out` is then as it was, and nothing stands beside it.
pub fn write(
    out: &Path,
    config: &ModelConfig,
    dtype: Precision,
    tokenizer: Option<&Path>,
    values: impl FnMut(&Parameter, &mut Sink<'_>) -> Result<(), Error>,
) -> Result<(), Error> {
    check_replaceable(out)?;
    place::whole(out, |incomplete| fill(incomplete, config, dtype, tokenizer, values))
}

fn fill(
    incomplete: &Path,
    config: &ModelConfig,
    dtype: Precision,
    tokenizer: Option<&Path>,
    mut values: impl FnMut(&Parameter, &mut Sink<'_>) -> Result<(), Error>,
) -> Result<(), Error> {
    let (write_dtype, dtype_name) = match dtype {
        Precision::Fp32 => (WriteDtype::F32, "float32"),
        Precision::Bf16 => (WriteDtype::Bf16, "bfloat16"),
    };
    write_json(&incomplete.join(CONFIG_FILE), &config.to_json(dtype_name))?;
    if let Some(dir) = tokenizer {
        copy_tokenizer(dir, incomplete)?;
    }

    let files = split(config, write_dtype);
    let names: Vec<String> = if files.len() == 1 {
        vec![WEIGHTS_FILE.to_owned()]
    } else {
        (1..=files.len()).map(|i| format!("model-{i:05}-of-{:05}.safetensors", files.len())).collect()
    };
    let mut weight_map = BTreeMap::new();
    let mut total_bytes = 0;
    for (name, parameters) in names.iter().zip(&files) {
        let entries: Vec<Entry> =
            parameters.iter().map(|p| Entry { name: p.hf_name.clone(), shape: p.shape.clone() }).collect();
        let mut writer = Writer::create(&incomplete.join(name), &entries, write_dtype)?;
        for parameter in parameters {
            values(parameter, &mut |piece| writer.values(piece))?;
            weight_map.insert(parameter.hf_name.clone(), name.clone());
            total_bytes += parameter.elements() * write_dtype.bytes();
        }
        writer.finish()?;
    }
    if files.len() > 1 {
        let index = json!({ "metadata": { "total_size": total_bytes }, "weight_map": weight_map });
        write_json(&incomplete.join(INDEX_FILE), &index)?;
    }
    Ok(())
}

/// Whether `out` is free, or holds nothing but a model: somebody's other files are not replaced.
pub(crate) fn check_replaceable(out: &Path) -> Result<(), Error> {
    let entries = match fs::read_dir(out) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(Error::io(out)(error)),
    };
    for entry in entries {
        let name = entry.map_err(Error::io(out))?.file_name();
        let name = name.to_string_lossy();
        let ours = name == CONFIG_FILE
            || name == INDEX_FILE
            || name.ends_with(".safetensors")
            || name.starts_with("pytorch_model")
            || TOKENIZER_FILES.contains(&&*name);
        if !ours {
            let rule =
                format!("holds {name}, which is not part of a model: choose another place or move it away");
            return Err(Error::format(out, rule));
        }
    }
    Ok(())
}

/// All parameters in file order, cut where a file would grow past its limit.
fn split(config: &ModelConfig, dtype: WriteDtype) -> Vec<Vec<Parameter>> {
    let blocks = (0..config.layers).flat_map(|block| config.block_parameters(block));
    let mut files: Vec<Vec<Parameter>> = vec![Vec::new()];
    let mut file_bytes = 0;
    for parameter in config.embed_parameters().into_iter().chain(blocks) {
        let bytes = parameter.elements() * dtype.bytes();
        if file_bytes > 0 && file_bytes + bytes > MAX_FILE_BYTES {
            files.push(Vec::new());
            file_bytes = 0;
        }
        file_bytes += bytes;
        if let Some(file) = files.last_mut() {
            file.push(parameter);
        }
    }
    files
}

pub(crate) fn copy_tokenizer(from: &Path, into: &Path) -> Result<(), Error> {
    let copy = |path: &Path, name: &str| -> Result<(), Error> {
        let copied = into.join(name);
        fs::copy(path, &copied).map_err(Error::io(path))?;
        place::sync(&copied)
    };
    // A tokenizer given as a file has its companions beside it.
    let (dir, file) = match from.is_file() {
        true => (from.parent().unwrap_or_else(|| Path::new("")), from.to_owned()),
        false => (from, from.join(TOKENIZER_FILES[0])),
    };
    if file.exists() {
        copy(&file, TOKENIZER_FILES[0])?;
    }
    for name in &TOKENIZER_FILES[1..] {
        let path = dir.join(name);
        if path.exists() {
            copy(&path, name)?;
        }
    }
    Ok(())
}

pub(crate) fn write_json(path: &Path, value: &serde_json::Value) -> Result<(), Error> {
    let text = serde_json::to_vec_pretty(value).map_err(|e| Error::format(path, e.to_string()))?;
    fs::write(path, text).map_err(Error::io(path))?;
    place::sync(path)
}
