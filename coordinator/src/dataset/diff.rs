//! What differs between two datasets: what was asked for, which commits it came from, which files are in it.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::path::Path;

use serde::Serialize;
use serde_json::Value;
use sha2::{Digest, Sha256};
use tunefleet_proto::dataset::{Manifest, Segment};

use super::{Error, manifest, reader};

/// Names that are shown of each list.
const SHOWN: usize = 20;

/// What differs.
#[derive(Debug, Default, Serialize)]
pub struct Difference {
    /// Settings with another value, by name: in one and in the other.
    settings: BTreeMap<String, (Value, Value)>,
    /// Repositories at another commit, by location; absent in one, `null`.
    commits: BTreeMap<String, (Option<String>, Option<String>)>,
    /// Counts of dropped files that differ, by reason.
    dropped: BTreeMap<String, (u64, u64)>,
    /// In the first alone.
    only_in_a: Vec<String>,
    /// In the second alone.
    only_in_b: Vec<String>,
    /// With another text.
    changed: Vec<String>,
    /// On the other side of the split.
    moved: Vec<String>,
    /// In both, and the same.
    same_files: u64,
}

/// Of a file: a hash of its text, and whether it is held out.
type Mark = ([u8; 32], bool);

/// Compares two datasets. Memory holds a name and a hash for each file of the first.
pub fn between(a: &Path, b: &Path) -> Result<Difference, Error> {
    let (manifest_a, manifest_b) = (manifest::read(a)?, manifest::read(b)?);
    let mut difference = Difference {
        settings: settings(&manifest_a.settings, &manifest_b.settings),
        commits: commits(&manifest_a, &manifest_b),
        ..Difference::default()
    };
    let reasons = manifest_a.dropped.keys().chain(manifest_b.dropped.keys());
    for reason in reasons {
        let of = |manifest: &Manifest| manifest.dropped.get(reason).copied().unwrap_or(0);
        let counts = (of(&manifest_a), of(&manifest_b));
        if counts.0 != counts.1 {
            difference.dropped.insert(reason.clone(), counts);
        }
    }
    let mut files: HashMap<String, Mark> = HashMap::new();
    each_file(a, &manifest_a, |name, mark| {
        files.insert(name, mark);
    })?;
    each_file(b, &manifest_b, |name, mark| match files.remove(&name) {
        None => difference.only_in_b.push(name),
        Some(before) if before == mark => difference.same_files += 1,
        Some(before) => {
            if before.1 != mark.1 {
                difference.moved.push(name.clone());
            }
            if before.0 != mark.0 {
                difference.changed.push(name);
            }
        }
    })?;
    difference.only_in_a = files.into_keys().collect();
    for list in
        [&mut difference.only_in_a, &mut difference.only_in_b, &mut difference.changed, &mut difference.moved]
    {
        list.sort();
    }
    Ok(difference)
}

fn each_file(dir: &Path, manifest: &Manifest, mut each: impl FnMut(String, Mark)) -> Result<(), Error> {
    let mut of = |segments: &[Segment], is_held_out: bool| -> Result<(), Error> {
        for segment in segments {
            reader::read(dir, segment, |row| {
                let digest: [u8; 32] = Sha256::digest(row.content.as_bytes()).into();
                each(format!("{}:{}", row.repo_id, row.file_path), (digest, is_held_out));
            })?;
        }
        Ok(())
    };
    of(&manifest.train, false)?;
    of(&manifest.validation, true)
}

/// Leaves that differ, by their paths.
fn settings(a: &Value, b: &Value) -> BTreeMap<String, (Value, Value)> {
    let mut found = BTreeMap::new();
    compare("", a, b, &mut found);
    found
}

fn compare(path: &str, a: &Value, b: &Value, found: &mut BTreeMap<String, (Value, Value)>) {
    match (a, b) {
        (Value::Object(of_a), Value::Object(of_b)) => {
            for key in of_a.keys().chain(of_b.keys().filter(|key| !of_a.contains_key(*key))) {
                let path = if path.is_empty() { key.clone() } else { format!("{path}.{key}") };
                let null = Value::Null;
                compare(&path, of_a.get(key).unwrap_or(&null), of_b.get(key).unwrap_or(&null), found);
            }
        }
        _ if a != b => drop(found.insert(path.to_owned(), (a.clone(), b.clone()))),
        _ => {}
    }
}

fn commits(a: &Manifest, b: &Manifest) -> BTreeMap<String, (Option<String>, Option<String>)> {
    let of = |manifest: &Manifest| -> BTreeMap<String, String> {
        manifest.repositories.iter().map(|r| (r.location.clone(), r.commit.clone())).collect()
    };
    let (of_a, of_b) = (of(a), of(b));
    let locations = of_a.keys().chain(of_b.keys());
    let pair = |location: &String| {
        let commits = (of_a.get(location).cloned(), of_b.get(location).cloned());
        (commits.0 != commits.1).then(|| (location.clone(), commits))
    };
    locations.filter_map(pair).collect()
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (name, (a, b)) in &self.settings {
            writeln!(f, "setting      {name}: {a} -> {b}")?;
        }
        let short = |commit: &Option<String>| match commit {
            Some(commit) => commit.get(..12).unwrap_or(commit).to_owned(),
            None => "absent".to_owned(),
        };
        for (location, (a, b)) in &self.commits {
            writeln!(f, "repository   {location}: {} -> {}", short(a), short(b))?;
        }
        for (reason, (a, b)) in &self.dropped {
            writeln!(f, "dropped      {reason}: {a} -> {b}")?;
        }
        for (what, sign, list) in [
            ("removed", '-', &self.only_in_a),
            ("added", '+', &self.only_in_b),
            ("changed", '~', &self.changed),
            ("on the other side of the split", '|', &self.moved),
        ] {
            writeln!(f, "{} {what}", list.len())?;
            for name in list.iter().take(SHOWN) {
                writeln!(f, "  {sign} {name}")?;
            }
            if list.len() > SHOWN {
                writeln!(f, "  and {} more (--json lists all)", list.len() - SHOWN)?;
            }
        }
        writeln!(f, "{} the same", self.same_files)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn settings_are_compared_leaf_by_leaf() {
        let a = json!({"filters": {"max": 1, "keep": true}, "sources": ["x"]});
        let b = json!({"filters": {"max": 2, "keep": true}, "sources": ["x"], "new": null, "more": 1});
        let found = settings(&a, &b);
        assert_eq!(found.keys().collect::<Vec<_>>(), ["filters.max", "more"]);
        assert_eq!(found["filters.max"], (json!(1), json!(2)));
    }
}
