//! From a source in the job file to table files on this machine, pinned to a state.

use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};
use tunefleet_hub::RepoKind;
use tunefleet_hub::download::Remote;
use tunefleet_proto::job::TableSpec;

use super::Error;
use super::rows::Format;

/// What stands before a dataset of the hub.
const HUB: &str = "hub:";
/// Deeper directories cannot have been meant.
const MAX_DEPTH: u32 = 32;
/// Hashed at a time.
const CHUNK_BYTES: usize = 1 << 20;

/// A source that is a dataset.
#[derive(Debug, Clone)]
pub struct Table {
    spec: TableSpec,
    /// `OWNER/NAME` on the hub, or the last part of the path.
    pub name: String,
}

/// Its files on this machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Located {
    /// What rows without a repository are said to be of.
    pub name: String,
    /// Where it came from.
    pub location: String,
    /// The hub's commit, or the SHA-256 over names and contents.
    pub state: String,
    /// Column of the texts; of conversations, one of the usual ones where none is named.
    pub column: Option<String>,
    /// Whether all its rows are held out.
    pub held_out: bool,
    /// Names within the dataset, and where the files are, in reading order.
    pub files: Vec<(String, PathBuf)>,
}

impl Table {
    /// The dataset that `spec` names.
    pub fn new(spec: &TableSpec) -> Self {
        let name = match spec.from.strip_prefix(HUB) {
            Some(repo) => repo.to_owned(),
            None => {
                let path = Path::new(&spec.from);
                path.file_stem().map(|stem| stem.to_string_lossy().into_owned()).unwrap_or_default()
            }
        };
        Table { spec: spec.clone(), name }
    }

    /// Where it is.
    pub fn location(&self) -> &str {
        &self.spec.from
    }

    /// What the rows will follow from.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn state(&self) -> Result<String, Error> {
        match self.remote()? {
            Some(remote) => Ok(remote.commit()?),
            None => hash(&self.local()?),
        }
    }

    /// Brings the files to this machine.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn locate(&self) -> Result<Located, Error> {
        let (state, files) = match self.remote()? {
            Some(remote) => {
                let snapshot = remote.snapshot(|file| self.is_wanted(file))?;
                if snapshot.files.is_empty() {
                    return Err(self.nothing());
                }
                let place = |file: String| (file.clone(), snapshot.dir.join(file));
                (snapshot.commit, snapshot.files.into_iter().map(place).collect())
            }
            None => {
                let files = self.local()?;
                (hash(&files)?, files)
            }
        };
        Ok(Located {
            name: self.name.clone(),
            location: self.spec.from.clone(),
            state,
            column: self.spec.column.clone(),
            held_out: self.spec.held_out,
            files,
        })
    }

    fn remote(&self) -> Result<Option<Remote>, Error> {
        let Some(repo) = self.spec.from.strip_prefix(HUB) else { return Ok(None) };
        Ok(Some(Remote::from_environment(RepoKind::Dataset, repo, self.spec.revision.as_deref())?))
    }

    /// The wanted files of a path, in order.
    fn local(&self) -> Result<Vec<(String, PathBuf)>, Error> {
        let root = Path::new(&self.spec.from);
        let io = |source| Error::Io { path: root.to_owned(), source };
        if fs::metadata(root).map_err(io)?.is_file() {
            return Ok(vec![(self.name.clone(), root.to_owned())]);
        }
        let mut files = Vec::new();
        list(root, "", 0, &mut files)?;
        files.retain(|(name, _)| self.is_wanted(name));
        files.sort();
        if files.is_empty() { Err(self.nothing()) } else { Ok(files) }
    }

    /// Whether a file is a table of the subset and split that are asked for.
    fn is_wanted(&self, file: &str) -> bool {
        let file = match &self.spec.subset {
            None => file,
            Some(subset) => {
                match file.strip_prefix(subset.as_str()).and_then(|rest| rest.strip_prefix('/')) {
                    Some(rest) => rest,
                    None => return false,
                }
            }
        };
        let of_split = |split: &String| file.split('/').any(|part| part.starts_with(split.as_str()));
        Format::of(file).is_some() && self.spec.split.as_ref().is_none_or(of_split)
    }

    fn nothing(&self) -> Error {
        let TableSpec { from, subset, split, .. } = &self.spec;
        let named = [("subset", subset), ("split", split)];
        let wanted = named.iter().filter_map(|(what, name)| Some(format!(" of {what} {:?}", name.as_ref()?)));
        Error::Nothing { place: from.clone(), wanted: wanted.collect() }
    }
}

fn list(dir: &Path, prefix: &str, depth: u32, files: &mut Vec<(String, PathBuf)>) -> Result<(), Error> {
    let io = |source| Error::Io { path: dir.to_owned(), source };
    for entry in fs::read_dir(dir).map_err(io)? {
        let entry = entry.map_err(io)?;
        let file_name = entry.file_name();
        let Some(name) = file_name.to_str().filter(|name| !name.starts_with('.')) else { continue };
        let name = format!("{prefix}{name}");
        // Through links: caches are made of them.
        let metadata = fs::metadata(entry.path()).map_err(io)?;
        if metadata.is_dir() && depth < MAX_DEPTH {
            list(&entry.path(), &format!("{name}/"), depth + 1, files)?;
        } else if metadata.is_file() {
            files.push((name, entry.path()));
        }
    }
    Ok(())
}

/// SHA-256 over names and contents.
fn hash(files: &[(String, PathBuf)]) -> Result<String, Error> {
    let mut whole = Sha256::new();
    let mut chunk = vec![0; CHUNK_BYTES];
    for (name, path) in files {
        let io = |source| Error::Io { path: path.clone(), source };
        let mut file = File::open(path).map_err(io)?;
        whole.update((name.len() as u64).to_le_bytes());
        whole.update(name);
        whole.update(file.metadata().map_err(io)?.len().to_le_bytes());
        loop {
            let count = file.read(&mut chunk).map_err(io)?;
            if count == 0 {
                break;
            }
            whole.update(chunk.get(..count).unwrap_or_default());
        }
    }
    Ok(tunefleet_proto::hex(&whole.finalize()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(from: &Path, subset: Option<&str>, split: Option<&str>) -> Table {
        Table::new(&TableSpec {
            from: from.display().to_string(),
            revision: None,
            subset: subset.map(str::to_owned),
            split: split.map(str::to_owned),
            column: Some("content".to_owned()),
            held_out: false,
        })
    }

    #[test]
    fn subset_and_split_pick_among_the_tables_of_a_directory() {
        let dir = tempfile::tempdir().unwrap();
        for file in
            ["README.md", "data/train-00000.parquet", "data/test-00000.parquet", "other/train/a.jsonl.gz"]
        {
            let path = dir.path().join(file);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, file).unwrap();
        }
        let names = |subset, split| {
            let files = table(dir.path(), subset, split).local();
            files.map(|files| files.into_iter().map(|(name, _)| name).collect::<Vec<_>>())
        };
        let all = ["data/test-00000.parquet", "data/train-00000.parquet", "other/train/a.jsonl.gz"];
        assert_eq!(names(None, None).unwrap(), all);
        assert_eq!(names(Some("data"), None).unwrap(), all[..2]);
        assert_eq!(names(None, Some("train")).unwrap(), all[1..]);
        assert_eq!(names(Some("data"), Some("train")).unwrap(), all[1..2]);
        let none = names(Some("nothing"), Some("train")).unwrap_err();
        assert!(none.to_string().contains("of subset \"nothing\" of split \"train\""), "{none}");
        assert!(none.is_not_found());
        let missing = table(&dir.path().join("gone"), None, None).state().unwrap_err();
        assert!(missing.is_not_found() && missing.to_string().contains("gone"));
    }

    #[test]
    fn the_state_changes_with_a_byte_and_with_a_name() {
        let dir = tempfile::tempdir().unwrap();
        let (a, b) = (dir.path().join("a.csv"), dir.path().join("b.csv"));
        fs::write(&a, "content\n1\n").unwrap();
        let state = || table(dir.path(), None, None).state().unwrap();
        let first = state();
        assert_eq!(first, state());
        fs::write(&a, "content\n2\n").unwrap();
        let second = state();
        fs::rename(&a, &b).unwrap();
        assert!(first != second && second != state() && first.len() == 64);
    }
}
