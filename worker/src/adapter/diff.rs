//! How far two adapters are apart, by what they add to each linear. Elements are compared by rows, in fp64.

use std::collections::BTreeMap;
use std::fmt::Write;

use serde::Serialize;
use tch::{Kind, Tensor};

use super::Error;
use super::delta::{Pair, row_blocks};
use super::files::{Adapter, natural};

/// Distance of two differences, or of two tensors that are trained whole.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Distance {
    /// Name of the module or parameter.
    pub name: String,
    /// Norm of the difference of both over the norm of the first; absent where the first is zero and the
    /// second is not.
    pub relative: Option<f64>,
    /// Cosine of the angle between both; absent where one is zero.
    pub cosine: Option<f64>,
    /// Largest absolute difference of two elements.
    pub largest: f64,
    /// That only one of both has it.
    pub note: Option<String>,
}

/// All distances.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Report {
    /// Each module, in the order of blocks, then what is trained whole.
    pub modules: Vec<Distance>,
    /// Over all of them.
    pub overall: Distance,
    /// What a person should know.
    pub notes: Vec<String>,
}

#[derive(Default, Clone, Copy)]
struct Sums {
    first: f64,
    second: f64,
    product: f64,
    difference: f64,
    largest: f64,
}

/// Compares `first` and `second`; what one lacks counts as zero.
///
/// # Errors
/// Modules whose shapes differ.
pub fn diff(first: &Adapter, second: &Adapter) -> Result<Report, Error> {
    let pairs: [BTreeMap<String, Pair<'_>>; 2] =
        [first.pairs()?.into_iter().collect(), second.pairs()?.into_iter().collect()];
    let mut names: Vec<&String> = pairs.iter().flat_map(BTreeMap::keys).collect();
    names.sort_by_cached_key(|name| natural(name));
    names.dedup();
    let (mut modules, mut all) = (Vec::new(), Sums::default());
    for name in names {
        let both = [pairs[0].get(name), pairs[1].get(name)];
        let shapes: Vec<(i64, i64)> = both.iter().flatten().map(|pair| pair.shape()).collect();
        let Some(&(rows, columns)) = shapes.first() else { continue };
        same(name, &shapes)?;
        let mut sums = Sums::default();
        for block in row_blocks(rows, columns) {
            let [a, b] = both.map(|pair| pair.map(|pair| pair.rows(&block)));
            sums.add(a, b);
        }
        all.join(sums);
        modules.push(sums.distance(name, both.map(|pair| pair.is_some())));
    }
    let saved: [BTreeMap<&str, &Tensor>; 2] =
        [first, second].map(|adapter| adapter.saved().map(|(_, name, tensor)| (name, tensor)).collect());
    let mut names: Vec<&&str> = saved.iter().flat_map(BTreeMap::keys).collect();
    names.sort_unstable();
    names.dedup();
    for name in names {
        let both = [saved[0].get(*name), saved[1].get(*name)];
        let shapes: Vec<Vec<i64>> = both.iter().flatten().map(|tensor| tensor.size()).collect();
        same(name, &shapes)?;
        let mut sums = Sums::default();
        let [a, b] = both.map(|tensor| tensor.map(|tensor| tensor.to_kind(Kind::Double)));
        sums.add(a, b);
        all.join(sums);
        modules.push(sums.distance(name, both.map(|tensor| tensor.is_some())));
    }
    let mut notes = Vec::new();
    if first.config.dora || second.config.dora {
        notes.push("a DoRA adapter's pairs are compared without its magnitudes".to_owned());
    }
    if first.config.base_model != second.config.base_model {
        notes.push("the adapters name different base models".to_owned());
    }
    Ok(Report { modules, overall: all.distance("overall", [true, true]), notes })
}

fn same<T: PartialEq + std::fmt::Debug>(name: &str, shapes: &[T]) -> Result<(), Error> {
    match shapes {
        [a, b] if a != b => Err(Error::Refused(format!(
            "{name}: is {a:?} in the first adapter and {b:?} in the second: they belong to different models"
        ))),
        _ => Ok(()),
    }
}

impl Sums {
    fn add(&mut self, a: Option<Tensor>, b: Option<Tensor>) {
        let sum = |t: Tensor| t.sum(Kind::Double).double_value(&[]);
        let largest = |t: &Tensor| t.abs().max().double_value(&[]);
        match (a, b) {
            (Some(a), Some(b)) => {
                let difference = &a - &b;
                self.first += sum(a.square());
                self.second += sum(b.square());
                self.product += sum(&a * &b);
                self.largest = self.largest.max(largest(&difference));
                self.difference += sum(difference.square());
            }
            (Some(one), None) => {
                self.largest = self.largest.max(largest(&one));
                self.first += sum(one.square());
                self.difference += sum(one.square());
            }
            (None, Some(one)) => {
                self.largest = self.largest.max(largest(&one));
                self.second += sum(one.square());
                self.difference += sum(one.square());
            }
            (None, None) => {}
        }
    }

    fn join(&mut self, other: Sums) {
        self.first += other.first;
        self.second += other.second;
        self.product += other.product;
        self.difference += other.difference;
        self.largest = self.largest.max(other.largest);
    }

    fn distance(self, name: &str, present: [bool; 2]) -> Distance {
        let relative = match (self.first > 0.0, self.difference > 0.0) {
            (true, _) => Some((self.difference / self.first).sqrt()),
            (false, false) => Some(0.0),
            (false, true) => None,
        };
        let lengths = (self.first * self.second).sqrt();
        let note = match present {
            [true, false] => Some("only in the first"),
            [false, true] => Some("only in the second"),
            _ => None,
        };
        Distance {
            name: name.to_owned(),
            relative,
            cosine: (lengths > 0.0).then(|| (self.product / lengths).clamp(-1.0, 1.0)),
            largest: self.largest,
            note: note.map(str::to_owned),
        }
    }
}

impl Report {
    /// As a table.
    pub fn table(&self) -> String {
        let mut out = String::new();
        let width = self.modules.iter().map(|module| module.name.len()).max().unwrap_or(0).max(7);
        let _ = writeln!(out, "{:<width$} {:>12} {:>10} {:>12}", "module", "relative", "cosine", "largest");
        for module in self.modules.iter().chain([&self.overall]) {
            let number = |x: Option<f64>| x.map_or_else(|| "-".to_owned(), |x| format!("{x:.6}"));
            let relative = module.relative.map_or_else(|| "-".to_owned(), |x| format!("{x:.3e}"));
            let note = module.note.as_ref().map(|note| format!("  {note}")).unwrap_or_default();
            let _ = writeln!(
                out,
                "{:<width$} {relative:>12} {:>10} {:>12.3e}{note}",
                module.name,
                number(module.cosine),
                module.largest
            );
        }
        for note in &self.notes {
            let _ = writeln!(out, "note: {note}");
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::super::scale::{Into, scale};
    use super::super::support::{adapter, config};
    use super::*;

    #[test]
    fn distances_of_scaled_and_absent_modules_are_as_they_must_be() {
        let first = adapter(config(4, 8.0, &["c_attn", "c_fc"]));
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        first.write(&path, crate::checkpoint::safetensors::WriteDtype::F32).unwrap();
        let read = || super::super::files::read(&path).unwrap();
        let same = diff(&first, &read()).unwrap();
        assert_eq!((same.overall.relative, same.overall.largest), (Some(0.0), 0.0));
        let opposite = diff(&first, &scale(read(), -0.5, Into::Alpha).unwrap()).unwrap();
        assert_eq!(opposite.modules.len(), 4);
        for module in &opposite.modules {
            assert!((module.relative.unwrap() - 1.5).abs() < 1e-9);
            assert!((module.cosine.unwrap() + 1.0).abs() < 1e-9);
        }
        let mut less = read();
        less.tensors.retain(|key, _| !key.contains("c_fc"));
        let report = diff(&first, &less).unwrap();
        let of = |report: &Report, end: &str| {
            report.modules.iter().find(|m| m.name.ends_with(end)).cloned().unwrap()
        };
        assert_eq!(of(&report, "c_fc").note.as_deref(), Some("only in the first"));
        assert_eq!((of(&report, "c_fc").relative, of(&report, "c_fc").cosine), (Some(1.0), None));
        let report = diff(&less, &first).unwrap();
        assert_eq!(of(&report, "c_fc").relative, None);
        assert!(report.table().contains("only in the second"));
    }
}
