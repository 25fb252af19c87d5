//! What an adapter is: its settings, sizes and the norm of what it adds to each linear.

use std::fmt::Write;
use std::path::Path;

use serde::Serialize;
use tunefleet_proto::adapter::WEIGHTS_FILE;

use super::Error;
use super::files::{self, Values, is_finite, shape_of};
use crate::checkpoint::base_digest::BASE_DIGEST_KEY;

/// Everything about an adapter.
#[derive(Debug, Serialize)]
pub struct Report {
    /// The model that it was trained on, as its config calls it.
    pub base_model: Option<String>,
    /// Digest of that model's values, where it is known.
    pub base_sha256: Option<String>,
    /// Inner widths, each once, ascending.
    pub ranks: Vec<u64>,
    /// `lora_alpha`.
    pub alpha: f64,
    /// Scaling by the root of the rank.
    pub rslora: bool,
    /// Magnitudes per row.
    pub dora: bool,
    /// `target_modules`.
    pub targets: String,
    /// `modules_to_save`.
    pub modules_to_save: Vec<String>,
    /// Trained values.
    pub parameters: u64,
    /// Size of the weights file.
    pub bytes: u64,
    /// Frobenius norm of all differences together.
    pub norm: f64,
    /// Each pair, in the order of blocks.
    pub modules: Vec<Module>,
    /// What replaces a parameter of the base.
    pub saved: Vec<Saved>,
}

/// One pair.
#[derive(Debug, Serialize)]
pub struct Module {
    /// Name of the linear.
    pub module: String,
    /// Outputs and inputs.
    pub shape: (i64, i64),
    /// Inner width.
    pub rank: i64,
    /// What the product is multiplied by.
    pub scaling: f64,
    /// Frobenius norm of `s B A`; of a DoRA adapter, before rows are normalised.
    pub norm: f64,
    /// What is odd about it.
    pub note: Option<String>,
}

/// One parameter that is trained whole.
#[derive(Debug, Serialize)]
pub struct Saved {
    /// Its name in the base.
    pub name: String,
    /// Its shape.
    pub shape: Vec<u64>,
    /// What is odd about it.
    pub note: Option<String>,
}

/// Looks at an adapter; values that are not finite are told of, not refused.
///
/// # Errors
/// As [`files::read`].
pub fn inspect(dir: &Path) -> Result<Report, Error> {
    let adapter = files::read_as(dir, Values::Any)?;
    let bytes = std::fs::metadata(dir.join(WEIGHTS_FILE)).map_or(0, |metadata| metadata.len());
    let not_finite = "holds values that are not finite";
    let mut modules = Vec::new();
    let mut squares = 0.0;
    for (module, pair) in adapter.pairs()? {
        let norm = pair.norm();
        squares += norm * norm;
        let all_finite = [Some(pair.a), Some(pair.b), pair.magnitude].into_iter().flatten().all(is_finite);
        let zero = |tensor: &tch::Tensor| tensor.any().int64_value(&[]) == 0;
        let note = if !all_finite {
            Some(not_finite)
        } else if zero(pair.b) || zero(pair.a) {
            Some("adds nothing: a factor is all zero")
        } else {
            None
        };
        let (shape, rank, scaling, note) = (pair.shape(), pair.rank(), pair.scaling, note.map(str::to_owned));
        modules.push(Module { module, shape, rank, scaling, norm, note });
    }
    let saved = adapter.saved().map(|(_, name, tensor)| Saved {
        name: name.to_owned(),
        shape: shape_of(tensor),
        note: (!is_finite(tensor)).then(|| not_finite.to_owned()),
    });
    let saved = saved.collect();
    let mut ranks: Vec<u64> = modules.iter().map(|module| module.rank as u64).collect();
    ranks.sort_unstable();
    ranks.dedup();
    let config = &adapter.config;
    Ok(Report {
        base_model: config.base_model.clone(),
        base_sha256: adapter.metadata.get(BASE_DIGEST_KEY).cloned(),
        ranks,
        alpha: config.alpha,
        rslora: config.rslora,
        dora: config.dora,
        targets: config.targets.to_string(),
        modules_to_save: config.modules_to_save.clone(),
        parameters: adapter.tensors.values().map(|tensor| tensor.numel() as u64).sum(),
        bytes,
        norm: squares.sqrt(),
        modules,
        saved,
    })
}

impl Report {
    /// As a table.
    pub fn table(&self) -> String {
        let mut out = String::new();
        let mut line = |name: &str, value: String| {
            let _ = writeln!(out, "{name:<16} {value}");
        };
        line("base model", self.base_model.clone().unwrap_or_else(|| "not named".to_owned()));
        if let Some(digest) = &self.base_sha256 {
            line("base sha256", digest.clone());
        }
        let kind = match (self.dora, self.rslora) {
            (true, true) => "DoRA, rsLoRA",
            (true, false) => "DoRA",
            (false, true) => "rsLoRA",
            (false, false) => "LoRA",
        };
        line("kind", kind.to_owned());
        let ranks: Vec<String> = self.ranks.iter().map(u64::to_string).collect();
        line("rank", ranks.join(", "));
        line("alpha", self.alpha.to_string());
        line("target modules", self.targets.clone());
        if !self.modules_to_save.is_empty() {
            line("trained whole", self.modules_to_save.join(", "));
        }
        line("parameters", self.parameters.to_string());
        line("bytes", self.bytes.to_string());
        line("norm", format!("{:.6}", self.norm));
        let width = self.modules.iter().map(|module| module.module.len()).max().unwrap_or(0).max(6);
        let _ = writeln!(
            out,
            "\n{:<width$} {:>13} {:>5} {:>9} {:>12}",
            "module", "out x in", "rank", "scaling", "norm"
        );
        for module in &self.modules {
            let shape = format!("{}x{}", module.shape.0, module.shape.1);
            let note = module.note.as_ref().map(|note| format!("  {note}")).unwrap_or_default();
            let _ = writeln!(
                out,
                "{:<width$} {shape:>13} {:>5} {:>9.4} {:>12.6}{note}",
                module.module, module.rank, module.scaling, module.norm
            );
        }
        for saved in &self.saved {
            let note = saved.note.as_ref().map(|note| format!("  {note}")).unwrap_or_default();
            let _ = writeln!(out, "{:<width$} {:?} trained whole{note}", saved.name, saved.shape);
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::super::support::{adapter, config, deltas, norm};
    use super::*;
    use crate::checkpoint::safetensors::WriteDtype;

    #[test]
    fn settings_sizes_norms_and_oddities_are_told() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        let mut one = adapter(config(4, 8.0, &["c_attn", "c_fc"]));
        let key = "base_model.model.transformer.h.1.mlp.c_fc.lora_B.weight";
        one.tensors.insert(key.to_owned(), one.tensors[key].zeros_like());
        one.write(&path, WriteDtype::F32).unwrap();
        let report = inspect(&path).unwrap();
        assert_eq!((report.ranks.as_slice(), report.alpha, report.modules.len()), (&[4][..], 8.0, 4));
        assert_eq!(report.parameters, 2 * 4 * ((64 + 96) + (64 + 256)));
        for (module, delta) in deltas(&one) {
            let found = report.modules.iter().find(|m| m.module == module).unwrap();
            assert!((found.norm - norm(&delta)).abs() <= 1e-9 * norm(&delta));
            assert_eq!(found.note.is_some(), module.contains("h.1.mlp"), "{module}");
        }
        assert!(report.table().contains("adds nothing"));
        assert!(report.table().contains("transformer.h.0.attn.c_attn"));
    }

    #[test]
    fn values_that_are_not_finite_are_told_of() {
        let dir = tempfile::tempdir().unwrap();
        let mut one = adapter(config(4, 8.0, &["c_attn"]));
        let key = "base_model.model.transformer.h.1.attn.c_attn.lora_A.weight";
        one.tensors.insert(key.to_owned(), &one.tensors[key] * f64::NAN);
        one.fill(dir.path(), WriteDtype::F32).unwrap();
        let report = inspect(dir.path()).unwrap();
        assert_eq!(report.modules[0].note, None);
        assert!(report.modules[1].note.as_ref().unwrap().contains("not finite"));
        assert!(report.modules[1].norm.is_nan() && report.norm.is_nan());
        assert!(serde_json::to_string(&report).unwrap().contains("\"norm\":null"));
    }
}
