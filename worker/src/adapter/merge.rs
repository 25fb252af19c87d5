//! An adapter written into its base: `W + s B A` in fp32, cast once at the end; DoRA's
//! `m (W + s B A) / |W + s B A|` by rows; what was trained whole replaces its parameter. Streamed parameter
//! by parameter: nobody holds the model.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use tch::{Kind, Tensor};
use tunefleet_proto::adapter::{AdaptedLinear, KEY_PREFIX};
use tunefleet_proto::job::Precision;
use tunefleet_proto::model::ModelConfig;
use tunefleet_proto::shard_plan::ShardPlan;

use super::Error;
use super::delta::{Pair, row_blocks};
use super::files::{self, Adapter, each_chunk, pair_keys};
use crate::checkpoint;
use crate::checkpoint::base_digest::{self, BASE_DIGEST_KEY, UnitDigest};
use crate::checkpoint::hugging_face::{self, ModelFiles};
use crate::checkpoint::model_dir::{self, Sink};
use crate::model::numerics::Numerics;

/// What quantisation makes of a linear's fp32 weight, as fp32 of the same shape.
pub type Dequantized<'d> = dyn Fn(&Tensor) -> Result<Tensor, Error> + 'd;

/// What a merge did.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Summary {
    /// Linears with a pair.
    pub linears: usize,
    /// Parameters that were replaced.
    pub replaced: usize,
    /// Largest absolute change of a weight of those linears.
    pub largest: f64,
    /// Root of the mean square change of the weights of those linears.
    pub rms: f64,
}

/// The digest that the base must have, and what was read of it so far.
struct Expected {
    sha256: String,
    unit: UnitDigest,
    units: Vec<[u8; 32]>,
    /// Full names of the parameters that end a unit.
    ends: BTreeSet<String>,
}

/// A base and an adapter, read as one model.
pub struct Merged<'d> {
    base: PathBuf,
    files: ModelFiles,
    adapter: Adapter,
    linears: BTreeMap<String, AdaptedLinear>,
    quantised: BTreeSet<String>,
    dequantized: Option<&'d Dequantized<'d>>,
    /// What the base must be, and what was read so far; absent where any base will do.
    digest: Option<Expected>,
    summary: Summary,
    squares: f64,
    elements: f64,
}

impl<'d> Merged<'d> {
    /// Opens both, and checks that they fit. Unless `any_base`, [`finish`](Self::finish) checks that the
    /// base is the one that the adapter names by its digest. With `dequantized`, the linears of the blocks
    /// are what that makes of them.
    ///
    /// # Errors
    /// Whatever the files break, by name.
    pub fn open(
        base: &Path,
        config: &ModelConfig,
        adapter: &Path,
        any_base: bool,
        dequantized: Option<&'d Dequantized<'d>>,
    ) -> Result<Self, Error> {
        let (adapter, plan) = files::read_for(adapter, config)?;
        let files = ModelFiles::open(base)?;
        hugging_face::check_names(base, &files, &ShardPlan::new(config, 1))?;
        let expected = adapter.metadata.get(BASE_DIGEST_KEY).filter(|_| !any_base);
        let digest = expected.map(|sha256| Expected {
            sha256: sha256.clone(),
            unit: UnitDigest::default(),
            units: Vec::new(),
            ends: unit_ends(config),
        });
        let blocks = (0..config.layers).flat_map(|block| config.block_parameters(block));
        let quantised = blocks.filter(|p| p.shape.len() == 2).map(|p| p.hf_name).collect();
        let linears = plan.linears.into_iter().map(|l| (format!("{}.weight", l.module), l)).collect();
        Ok(Merged {
            base: base.to_owned(),
            files,
            adapter,
            linears,
            quantised,
            dequantized,
            digest,
            summary: Summary::default(),
            squares: 0.0,
            elements: 0.0,
        })
    }

    /// The values of one parameter of the merged model, in order. Parameters are asked for once each, in
    /// model order.
    ///
    /// # Errors
    /// A value that is not finite, or whatever the files or `sink` refuse.
    pub fn parameter(&mut self, hf_name: &str, shape: &[u64], sink: &mut Sink<'_>) -> Result<(), Error> {
        if let Some(digest) = &mut self.digest {
            digest.unit.parameter(hf_name);
        }
        self.values(hf_name, shape, sink)?;
        if let Some(Expected { unit, units, ends, .. }) = &mut self.digest
            && ends.contains(hf_name)
        {
            units.push(std::mem::take(unit).finish());
        }
        Ok(())
    }

    fn values(&mut self, hf_name: &str, shape: &[u64], sink: &mut Sink<'_>) -> Result<(), Error> {
        let elements: u64 = shape.iter().product();
        let linear = self.linears.get(hf_name).cloned();
        let saved = self.adapter.tensors.get(&format!("{KEY_PREFIX}{hf_name}")).map(Tensor::shallow_clone);
        let quantised = self.dequantized.filter(|_| self.quantised.contains(hf_name) && saved.is_none());
        let module = hf_name.trim_end_matches(".weight");
        let own = self.adapter.token_rows().find(|(_, table, _)| *table == module);
        if let Some(rows) = own.map(|(_, _, rows)| rows.shallow_clone()) {
            return self.replace_rows(hf_name, shape, &rows, sink);
        }
        if linear.is_none() && saved.is_none() && quantised.is_none() {
            return self.read(hf_name, 0..elements, sink);
        }
        if let Some(saved) = saved {
            if self.digest.is_some() {
                self.read(hf_name, 0..elements, &mut |_| Ok(()))?;
            }
            self.summary.replaced += 1;
            return Ok(each_chunk(&saved, sink)?);
        }
        let (rows, columns) = (shape[0] as i64, shape.iter().skip(1).product::<u64>() as i64);
        // Scales of quantised weights span rows, so such a linear is held whole.
        let whole = match quantised {
            Some(dequantized) => Some(dequantized(&self.read_rows(hf_name, &(0..rows), columns)?)?),
            None => None,
        };
        for block in row_blocks(rows, columns) {
            let base = match &whole {
                Some(whole) => whole.narrow(0, block.start, block.end - block.start),
                None => self.read_rows(hf_name, &block, columns)?,
            };
            let merged = match &linear {
                Some(linear) => self.merge(linear, &base, &block)?,
                None => base,
            };
            if !files::is_finite(&merged) {
                let rule = "would hold a value that is not finite after merging";
                return Err(checkpoint::Error::tensor(&self.base, hf_name, rule).into());
            }
            each_chunk(&merged, &mut *sink)?;
        }
        self.summary.linears += usize::from(linear.is_some());
        Ok(())
    }

    /// A table of tokens with the adapter's rows in their places.
    fn replace_rows(
        &mut self,
        hf_name: &str,
        shape: &[u64],
        rows: &Tensor,
        sink: &mut Sink<'_>,
    ) -> Result<(), Error> {
        let ids = self.adapter.config.token_rows.clone();
        let (count, columns) = (shape[0] as i64, shape.iter().skip(1).product::<u64>() as i64);
        for block in row_blocks(count, columns) {
            let values = self.read_rows(hf_name, &block, columns)?;
            for (at, id) in ids.iter().enumerate().filter(|(_, id)| block.contains(&(**id as i64))) {
                values.get(*id as i64 - block.start).copy_(&rows.get(at as i64));
            }
            each_chunk(&values, &mut *sink)?;
        }
        self.summary.replaced += 1;
        Ok(())
    }

    /// Whether the base was the right one, and what was done.
    ///
    /// # Errors
    /// [`Error::WrongBase`].
    pub fn finish(&mut self) -> Result<Summary, Error> {
        if let Some(Expected { sha256: expected, units, .. }) = self.digest.take() {
            let found = base_digest::of_units(&units);
            if found != expected {
                let name = self.adapter.config.base_model.clone();
                let name = name.unwrap_or_else(|| "a model that it does not name".to_owned());
                return Err(Error::WrongBase { base: self.base.clone(), found, name, expected });
            }
        }
        self.summary.rms = (self.squares / self.elements.max(1.0)).sqrt();
        Ok(self.summary)
    }

    /// Rows of `W + s B A`, or of DoRA's form of it.
    fn merge(
        &mut self,
        linear: &AdaptedLinear,
        base: &Tensor,
        rows: &std::ops::Range<i64>,
    ) -> Result<Tensor, Error> {
        let (a, b) = pair_keys(&linear.module);
        let get = |key: &str| {
            let missing = || checkpoint::Error::tensor(&self.base, key, "is not in the adapter");
            self.adapter.tensors.get(key).ok_or_else(missing)
        };
        let magnitude = if self.adapter.config.dora {
            Some(get(&format!("{KEY_PREFIX}{}.lora_magnitude_vector", linear.module))?)
        } else {
            None
        };
        let pair = Pair { a: get(&a)?, b: get(&b)?, scaling: linear.scaling, magnitude };
        let mut merged = base + pair.rows(rows).to_kind(Kind::Float);
        if let Some(magnitude) = pair.magnitude {
            let magnitude = magnitude.narrow(0, rows.start, rows.end - rows.start).to_kind(Kind::Double);
            let norm = merged.to_kind(Kind::Double).square().sum_dim_intlist(1, false, Kind::Double).sqrt();
            merged *= (magnitude / norm).to_kind(Kind::Float).unsqueeze(1);
        }
        let change = (&merged - base).to_kind(Kind::Double);
        self.summary.largest = self.summary.largest.max(change.abs().max().double_value(&[]));
        self.squares += change.square().sum(Kind::Double).double_value(&[]);
        self.elements += change.numel() as f64;
        Ok(merged)
    }

    fn read_rows(
        &mut self,
        hf_name: &str,
        rows: &std::ops::Range<i64>,
        columns: i64,
    ) -> Result<Tensor, Error> {
        let range = (rows.start * columns) as u64..(rows.end * columns) as u64;
        let mut values = Vec::with_capacity((range.end - range.start) as usize);
        self.read(hf_name, range, &mut |piece| {
            values.extend_from_slice(piece);
            Ok(())
        })?;
        Ok(Tensor::from_slice(&values).view([rows.end - rows.start, columns]))
    }

    /// Values of the base as they are, seen by the digest.
    fn read(&mut self, hf_name: &str, range: std::ops::Range<u64>, sink: &mut Sink<'_>) -> Result<(), Error> {
        let refuse = |rule: &str| checkpoint::Error::tensor(&self.base, hf_name, rule);
        let reader = self.files.reader(hf_name).ok_or_else(|| refuse("is in none of the files"))?;
        let (mut finite, mut outcome) = (true, Ok(()));
        reader.read_f32(hf_name, range, |_, values| {
            finite &= values.iter().all(|v| v.is_finite());
            if let Some(digest) = &mut self.digest {
                digest.unit.values(values);
            }
            if finite && outcome.is_ok() {
                outcome = sink(values);
            }
        })?;
        if !finite {
            return Err(refuse("holds a value that is not finite").into());
        }
        Ok(outcome?)
    }
}

/// Full names of the last parameters of the model's units.
fn unit_ends(config: &ModelConfig) -> BTreeSet<String> {
    let units = (0..config.layers).map(|block| config.block_parameters(block));
    std::iter::once(config.embed_parameters())
        .chain(units)
        .filter_map(|mut unit| unit.pop())
        .map(|p| p.hf_name)
        .collect()
}

/// What to merge, and how to write it.
pub struct Request<'a> {
    /// The base model.
    pub base: &'a Path,
    /// The adapter.
    pub adapter: &'a Path,
    /// The directory to write.
    pub out: &'a Path,
    /// Dtype of the weights.
    pub dtype: Precision,
    /// Merge into a base that the adapter was not trained on, too.
    pub any_base: bool,
    /// Merge into what quantisation makes of the base's linears.
    pub dequantized: Option<&'a Dequantized<'a>>,
}

/// Writes a full model, with the tokenizer that lies beside the base.
///
/// # Errors
/// Whatever the files break; a base that is not the adapter's. Nothing is left behind then.
pub fn merge(request: &Request<'_>) -> Result<Summary, Error> {
    let config = hugging_face::read_config(request.base)?;
    let Request { base, adapter, out, dtype, any_base, dequantized } = *request;
    let same = |a: &Path, b: &Path| matches!((a.canonicalize(), b.canonicalize()), (Ok(a), Ok(b)) if a == b);
    if same(base, out) {
        return Err(Error::Refused(format!(
            "{}: is the base itself, which the merged model would replace: give another directory",
            out.display()
        )));
    }
    let mut merged = Merged::open(base, &config, adapter, any_base, dequantized)?;
    let last = config.block_parameters(config.layers.saturating_sub(1)).pop().map(|p| p.hf_name);
    let (mut summary, mut refusal) = (Summary::default(), None);
    // Their rows are trained now.
    let trained = ModelConfig { added_tokens: Vec::new(), ..config.clone() };
    let written = model_dir::write(out, &trained, dtype, Some(base), |parameter, sink| {
        let mut values = || -> Result<(), Error> {
            merged.parameter(&parameter.hf_name, &parameter.shape, sink)?;
            // Before the directory gets its name.
            if Some(&parameter.hf_name) == last.as_ref() {
                summary = merged.finish()?;
            }
            Ok(())
        };
        values().map_err(|error| match error {
            Error::Files(error) => error,
            other => {
                let told = checkpoint::Error::Elsewhere(other.to_string());
                refusal = Some(other);
                told
            }
        })
    });
    match refusal {
        Some(refusal) => Err(refusal),
        None => Ok(written.map(|()| summary)?),
    }
}

/// All weights of the merged model for computing with, as
/// [`hugging_face::load_weights`] gives those of a base.
///
/// # Errors
/// As [`merge`].
pub fn load_weights(
    base: &Path,
    config: &ModelConfig,
    adapter: &Path,
    any_base: bool,
    dequantized: Option<&Dequantized<'_>>,
    plan: &ShardPlan,
    numerics: Numerics,
) -> Result<Vec<Tensor>, Error> {
    let mut merged = Merged::open(base, config, adapter, any_base, dequantized)?;
    let mut buffers = Vec::with_capacity(plan.units.len());
    for unit in &plan.units {
        let buffer = Tensor::zeros([unit.elements as i64], (numerics.kind, numerics.device));
        for slot in &unit.parameters {
            let mut offset = slot.offset as i64;
            merged.parameter(&slot.hf_name, &slot.shape, &mut |values| {
                let piece = Tensor::from_slice(values);
                buffer.narrow(0, offset, values.len() as i64).copy_(&piece);
                offset += values.len() as i64;
                Ok(())
            })?;
        }
        buffers.push(buffer);
    }
    merged.finish()?;
    Ok(buffers)
}

#[cfg(test)]
#[path = "merge_tests.rs"]
mod tests;
