//! A directory that replaces another as a whole: readers see the old dataset or the new one, and what is not
//! a dataset of ours is never touched.

use std::fs::{self, File, TryLockError};
use std::io;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, RenameFlags, renameat2};
use tunefleet_proto::dataset::MANIFEST_FILE;

use super::{Error, manifest};

/// `<place>.incomplete`, which becomes `<place>` or nothing.
pub struct Staging {
    place: PathBuf,
    dir: PathBuf,
    /// Held for as long as this run writes.
    _lock: File,
}

impl Staging {
    /// Starts a new dataset beside `place`. Refuses if `place` holds anything but a dataset.
    pub fn begin(place: &Path) -> Result<Self, Error> {
        check_replaceable(place)?;
        let name = place.file_name().ok_or_else(|| not_ours(place, "it has no name of its own"))?;
        let mut incomplete = name.to_owned();
        incomplete.push(".incomplete");
        let dir = place.with_file_name(incomplete);
        fs::create_dir_all(&dir).map_err(Error::io(&dir))?;
        let lock = File::open(&dir).map_err(Error::io(&dir))?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(Error::Busy { path: place.to_owned() }),
            Err(TryLockError::Error(e)) => return Err(Error::io(&dir)(e)),
        }
        let staging = Self { place: place.to_owned(), dir, _lock: lock };
        staging.clear()?;
        Ok(staging)
    }

    /// Where to write.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Removes what was written so far, or what an interrupted run left.
    pub fn clear(&self) -> Result<(), Error> {
        for entry in fs::read_dir(&self.dir).map_err(Error::io(&self.dir))? {
            let path = entry.map_err(Error::io(&self.dir))?.path();
            match is_dataset_file(&path) {
                true => fs::remove_file(&path).map_err(Error::io(&path))?,
                false => return Err(not_ours(&self.dir, &format!("it holds {}", path.display()))),
            }
        }
        Ok(())
    }

    /// Puts the directory in its place in one step and removes what was there.
    pub fn publish(self) -> Result<(), Error> {
        sync_dir(&self.dir)?;
        check_replaceable(&self.place)?;
        let exchange = renameat2(AT_FDCWD, &self.dir, AT_FDCWD, &self.place, RenameFlags::RENAME_EXCHANGE);
        match exchange {
            // `dir` is now the old dataset; dropping `self` removes it.
            Ok(()) => {}
            Err(Errno::ENOENT) => fs::rename(&self.dir, &self.place).map_err(Error::io(&self.place))?,
            // A file system without exchange: remove, then rename.
            Err(Errno::EINVAL | Errno::ENOSYS) => {
                remove_dataset(&self.place).map_err(Error::io(&self.place))?;
                fs::rename(&self.dir, &self.place).map_err(Error::io(&self.place))?;
            }
            Err(e) => return Err(Error::io(&self.place)(e.into())),
        }
        match self.place.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => sync_dir(parent),
            _ => sync_dir(Path::new(".")),
        }
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        // After a failure this frees the disk; what stays behind is cleared by the next run.
        if let Err(e) = remove_dataset(&self.dir)
            && e.kind() != io::ErrorKind::NotFound
        {
            tracing::warn!(path = %self.dir.display(), error = %e, "cannot remove an incomplete dataset");
        }
    }
}

/// Nothing, an empty directory, or a dataset with no files but its own.
fn check_replaceable(place: &Path) -> Result<(), Error> {
    let entries = match fs::read_dir(place) {
        Ok(entries) => entries,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(e) if e.kind() == io::ErrorKind::NotADirectory => return Err(not_ours(place, "it is a file")),
        Err(e) => return Err(Error::io(place)(e)),
    };
    let mut is_empty = true;
    for entry in entries {
        let path = entry.map_err(Error::io(place))?.path();
        if !is_dataset_file(&path) {
            return Err(not_ours(place, &format!("it holds {}", path.display())));
        }
        is_empty = false;
    }
    match is_empty || manifest::is_manifest(&place.join(MANIFEST_FILE)) {
        true => Ok(()),
        false => Err(not_ours(place, &format!("it has no {MANIFEST_FILE}"))),
    }
}

fn not_ours(path: &Path, detail: &str) -> Error {
    Error::NotOurs { path: path.to_owned(), detail: detail.to_owned() }
}

/// The manifest or a segment, complete or not, and a regular file.
fn is_dataset_file(path: &Path) -> bool {
    let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    let name = name.strip_suffix(".incomplete").unwrap_or(name);
    let is_segment = name
        .strip_suffix(".arrow")
        .or_else(|| name.strip_suffix(".parquet"))
        .and_then(|stem| stem.strip_prefix("train-").or_else(|| stem.strip_prefix("validation-")))
        .is_some_and(|number| number.len() >= 5 && number.bytes().all(|b| b.is_ascii_digit()));
    (is_segment || name == MANIFEST_FILE) && path.symlink_metadata().is_ok_and(|meta| meta.is_file())
}

fn remove_dataset(dir: &Path) -> io::Result<()> {
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        if is_dataset_file(&path) {
            fs::remove_file(&path)?;
        }
    }
    // Fails if anything else is in it.
    fs::remove_dir(dir)
}

fn sync_dir(dir: &Path) -> Result<(), Error> {
    File::open(dir).and_then(|dir| dir.sync_all()).map_err(Error::io(dir))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_strangers_directory_is_never_replaced() {
        let temp = tempfile::tempdir().unwrap();
        let place = temp.path().join("data");
        fs::create_dir(&place).unwrap();
        for name in ["notes.txt", "train-00000.arrow", "manifest.json", "train-x.arrow"] {
            fs::write(place.join(name), "{}").unwrap();
            let Err(Error::NotOurs { .. }) = Staging::begin(&place) else { panic!("{name} was accepted") };
            assert!(place.join(name).exists());
            fs::remove_file(place.join(name)).unwrap();
        }
        assert!(Staging::begin(&place).is_ok());
        fs::write(temp.path().join("file"), "").unwrap();
        assert!(matches!(Staging::begin(&temp.path().join("file")), Err(Error::NotOurs { .. })));
    }

    #[test]
    fn two_runs_cannot_write_to_one_place() {
        let temp = tempfile::tempdir().unwrap();
        let place = temp.path().join("data");
        let first = Staging::begin(&place).unwrap();
        assert!(matches!(Staging::begin(&place), Err(Error::Busy { .. })));
        drop(first);
        assert!(Staging::begin(&place).is_ok());
    }

    #[test]
    fn what_an_interrupted_run_left_is_cleared_and_a_failure_leaves_nothing() {
        let temp = tempfile::tempdir().unwrap();
        let place = temp.path().join("data");
        let left = temp.path().join("data.incomplete");
        fs::create_dir(&left).unwrap();
        fs::write(left.join("train-00000.arrow.incomplete"), "half").unwrap();
        let staging = Staging::begin(&place).unwrap();
        assert_eq!(fs::read_dir(staging.dir()).unwrap().count(), 0);
        fs::write(staging.dir().join("train-00000.arrow"), "rows").unwrap();
        drop(staging);
        assert_eq!(fs::read_dir(temp.path()).unwrap().count(), 0);
    }
}
