//! Adapters on a model that they were not trained on: what fits, and how far the model is from theirs.
//!
//! An adapter fits a model of the same shapes. What it does there depends on how much the two models have in common,
//! which only a comparison of their weights tells.

use std::path::{Path, PathBuf};

use tch::{Kind, Tensor};
use tunefleet_proto::model::{ModelConfig, Parameter};

use super::Error;
use super::combine::Part;
use super::files;
use crate::checkpoint::base_digest::{self, BASE_DIGEST_KEY, UnitDigest};
use crate::checkpoint::hugging_face::{self, ModelFiles};

/// What is known of a model.
pub struct Known {
    /// Digest of its values.
    pub sha256: String,
    dir: PathBuf,
    config: ModelConfig,
    files: ModelFiles,
}

impl Known {
    /// Reads all of a model once.
    ///
    /// # Errors
    /// Whatever its files break.
    pub fn open(dir: &Path) -> Result<Self, Error> {
        let config = hugging_face::read_config(dir)?;
        let files = ModelFiles::open(dir)?;
        files.check(dir, &config)?;
        let mut units = Vec::new();
        for unit in units_of(&config) {
            let mut digest = UnitDigest::default();
            for parameter in unit {
                digest.parameter(&parameter.hf_name);
                let _ = files.read(dir, &parameter.hf_name, |values| digest.values(values))?;
            }
            units.push(digest.finish());
        }
        Ok(Known { sha256: base_digest::of_units(&units), dir: dir.to_owned(), config, files })
    }
}

/// Whether each part fits `model`, and how far that is from what the part was trained on, where that is among `bases`.
///
/// # Errors
/// A part that does not fit, by its tensor; files that break a rule.
pub fn check(parts: &[Part], model: &Known, bases: &[Known]) -> Result<Vec<String>, Error> {
    let mut notes = Vec::new();
    for part in parts {
        let _ = files::plan_for(&part.adapter, Path::new(&part.name), &model.config)?;
        let own = part.adapter.metadata.get(BASE_DIGEST_KEY);
        notes.push(match (own, bases.iter().find(|base| Some(&base.sha256) == own)) {
            (Some(own), _) if *own == model.sha256 => format!("{} was trained on this model", part.name),
            (Some(_), Some(base)) => {
                format!("{} was trained on {}, a sibling: {}", part.name, base.dir.display(), apart(base, model)?)
            }
            (own, None) | (own @ None, Some(_)) => {
                let called = part.adapter.config.base_model.as_deref().unwrap_or("a model that it does not name");
                let digest = own.map_or("no digest", String::as_str);
                format!(
                    "{} was trained on another model ({called}, {digest}), whose shapes are the same: name it with \
                     --trained-on to see how far the two are apart",
                    part.name
                )
            }
        });
    }
    Ok(notes)
}

/// What differs between two models of the same shapes, in words.
fn apart(base: &Known, model: &Known) -> Result<String, Error> {
    let mut told = Vec::new();
    if base.config.family != model.config.family {
        return Err(Error::Refused(format!(
            "{} and {} are of different families",
            base.dir.display(),
            model.dir.display()
        )));
    }
    if base.config.positions != model.config.positions {
        told.push("positions are told to it in another way".to_owned());
    }
    let (mut squares, mut of_base, mut differ, mut count) = (0.0, 0.0, 0, 0);
    let mut largest = (0.0, String::new());
    for parameter in units_of(&model.config).into_iter().flatten() {
        let name = &parameter.hf_name;
        let (ours, theirs) = (values(model, &parameter)?, values(base, &parameter)?);
        let rows = ours.size()[0].min(theirs.size()[0]);
        if ours.size() != theirs.size() {
            told.push(format!("{name} has {} rows, it had {}", ours.size()[0], theirs.size()[0]));
        }
        let (ours, theirs) = (ours.narrow(0, 0, rows), theirs.narrow(0, 0, rows));
        let square = |t: &Tensor| t.to_kind(Kind::Double).square().sum(Kind::Double).double_value(&[]);
        let (difference, whole) = (square(&(&ours - &theirs)), square(&theirs));
        (squares, of_base, count) = (squares + difference, of_base + whole, count + 1);
        if difference > 0.0 {
            differ += 1;
            let relative = (difference / whole.max(f64::MIN_POSITIVE)).sqrt();
            if relative > largest.0 {
                largest = (relative, name.clone());
            }
        }
    }
    told.push(match differ {
        0 => "every weight is the same".to_owned(),
        _ => format!(
            "{differ} of {count} tensors differ, by {:.1}% of their norm together, most in {} ({:.1}%)",
            100.0 * (squares / of_base).sqrt(),
            largest.1,
            100.0 * largest.0
        ),
    });
    Ok(told.join("; "))
}

/// A parameter, in the shape that the model's files have.
fn values(model: &Known, parameter: &Parameter) -> Result<Tensor, Error> {
    let flat = model.files.read(&model.dir, &parameter.hf_name, |_| {})?;
    let columns: u64 = parameter.shape.iter().skip(1).product();
    Ok(flat.view([-1, columns as i64]))
}

fn units_of(config: &ModelConfig) -> Vec<Vec<Parameter>> {
    let blocks = (0..config.layers).map(|block| config.block_parameters(block));
    std::iter::once(config.embed_parameters()).chain(blocks).collect()
}
