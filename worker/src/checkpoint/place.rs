//! A directory gets its name whole: it is written beside its place and takes it in one rename.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, RenameFlags, renameat2};

use super::Error;

/// Ends the name of what is not whole; never read, and removed by the next writer.
pub const INCOMPLETE: &str = ".incomplete";

/// Where `target` is written before it takes its place.
///
/// # Errors
/// A path without a name of its own, as `.` and `..` are.
pub fn incomplete(target: &Path) -> Result<PathBuf, Error> {
    let Some(name) = target.file_name() else {
        return Err(Error::format(target, "has no name of its own: give the path of a new directory"));
    };
    let mut name = name.to_owned();
    name.push(INCOMPLETE);
    Ok(target.with_file_name(name))
}

/// Makes a directory and gives it its name when `fill` has filled it; what an interrupted call left is
/// cleared first, and a failed one leaves nothing.
///
/// # Errors
/// Whatever the file system or `fill` refuses; what was in the place then still is.
pub fn whole(target: &Path, fill: impl FnOnce(&Path) -> Result<(), Error>) -> Result<(), Error> {
    let incomplete = incomplete(target)?;
    if incomplete.exists() {
        fs::remove_dir_all(&incomplete).map_err(Error::io(&incomplete))?;
    }
    fs::create_dir_all(&incomplete).map_err(Error::io(&incomplete))?;
    let outcome =
        fill(&incomplete).and_then(|()| sync(&incomplete)).and_then(|()| place(&incomplete, target));
    if outcome.is_err() {
        // Best effort: it is never read.
        let _ = fs::remove_dir_all(&incomplete);
    }
    outcome
}

/// Gives a whole directory its name. One that has it already changes places with it and is
/// removed: at no moment is there none.
///
/// # Errors
/// Whatever the file system refuses; what was in the place then still is.
pub fn place(incomplete: &Path, target: &Path) -> Result<(), Error> {
    put(incomplete, target).map_err(Error::io(target))?;
    match target.parent().filter(|parent| !parent.as_os_str().is_empty()) {
        Some(parent) => sync(parent),
        None => sync(Path::new(".")),
    }
}

/// Makes a file or the entries of a directory survive a power cut.
///
/// # Errors
/// Whatever the file system refuses.
pub fn sync(path: &Path) -> Result<(), Error> {
    fs::File::open(path).and_then(|file| file.sync_all()).map_err(Error::io(path))
}

fn put(incomplete: &Path, target: &Path) -> io::Result<()> {
    match renameat2(AT_FDCWD, incomplete, AT_FDCWD, target, RenameFlags::RENAME_EXCHANGE) {
        Ok(()) => {
            // Best effort: it is never read.
            let _ = fs::remove_dir_all(incomplete);
            Ok(())
        }
        Err(Errno::ENOENT) => fs::rename(incomplete, target),
        // A file system without exchange: the old one aside, and back if the new one cannot follow.
        Err(Errno::EINVAL | Errno::ENOSYS) if target.exists() => {
            let mut aside = incomplete.as_os_str().to_owned();
            aside.push(".old");
            fs::rename(target, &aside)?;
            if let Err(error) = fs::rename(incomplete, target) {
                fs::rename(&aside, target)?;
                return Err(error);
            }
            let _ = fs::remove_dir_all(&aside);
            Ok(())
        }
        Err(Errno::EINVAL | Errno::ENOSYS) => fs::rename(incomplete, target),
        Err(errno) => Err(errno.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_filling_leaves_what_was_there_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("model");
        whole(&target, |d| fs::write(d.join("file"), "first").map_err(Error::io(d))).unwrap();
        let refused = whole(&target, |d| {
            fs::write(d.join("file"), "second").map_err(Error::io(d))?;
            Err(Error::format(d, "refused"))
        });
        assert!(refused.is_err());
        assert_eq!(fs::read_to_string(target.join("file")).unwrap(), "first");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_directory_takes_a_place_that_is_free_or_taken() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("model");
        for round in ["first", "second"] {
            // A slash at the end changes nothing.
            let incomplete = incomplete(&dir.path().join("model/")).unwrap();
            assert_eq!(incomplete, dir.path().join("model.incomplete"));
            fs::create_dir(&incomplete).unwrap();
            fs::write(incomplete.join("file"), round).unwrap();
            place(&incomplete, &target).unwrap();
            assert_eq!(fs::read_to_string(target.join("file")).unwrap(), round);
            assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
        }
        for nameless in [".", "..", "/"] {
            assert!(incomplete(Path::new(nameless)).is_err(), "{nameless}");
        }
    }
}
