//! Which files are kept, and why the others are not. Every drop has one reason and is counted.

use std::collections::{BTreeMap, HashSet};

use tunefleet_proto::job::{FilterSpec, NotebookMode};

use super::notebook;
use super::secrets::{Found, Secrets};
use super::text::{self, TextRules};
use super::tree::Kind;

/// A NUL in this many first bytes makes a file binary, as in git.
const SNIFF_BYTES: usize = 8 * 1024;
/// First line of every LFS pointer, and the most that a pointer can have.
const LFS_HEADER: &[u8] = b"version https://git-lfs.github.com/spec/";
const LFS_MAX_BYTES: usize = 1024;

/// Why a file is not in the dataset. A file is counted under the first that holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum DropReason {
    /// A link, not a file; its target is collected by itself where it is in the repository.
    Symlink,
    /// The commit of another repository.
    Submodule,
    /// A component is empty, `.`, `..` or holds a control character.
    PathUnsafe,
    /// Longer than a path can be.
    PathTooLong,
    /// Not UTF-8.
    PathNotUtf8,
    /// A component is in `exclude_path_parts`.
    PathPart,
    /// The text after the last dot is in `exclude_extensions`.
    Extension,
    /// Above `max_file_bytes`.
    TooLarge,
    /// Nothing but white space.
    Empty,
    /// The content is in Git LFS.
    LfsPointer,
    /// A NUL in the first 8 KiB.
    Binary,
    /// Text in another encoding.
    InvalidUtf8,
    /// A notebook, and notebooks are not wanted.
    NotebookSkipped,
    /// A notebook that is not one.
    NotebookInvalid,
    /// A list of locked versions.
    LockFile,
    /// It says that a program has written it.
    Generated,
    /// A line is longer than `max_line_chars`.
    LongLine,
    /// Lines are longer than `max_mean_line_chars` on average.
    LongLines,
    /// Fewer letters and digits than `min_alphanumeric_fraction`.
    NotAlphanumeric,
    /// A key or password is in it.
    Secret,
    /// An earlier file has the same content.
    Duplicate,
    /// A file that was kept says nearly the same.
    NearDuplicate,
}

impl DropReason {
    /// Name in the manifest.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Symlink => "symlink",
            Self::Submodule => "submodule",
            Self::PathUnsafe => "path_unsafe",
            Self::PathTooLong => "path_too_long",
            Self::PathNotUtf8 => "path_not_utf8",
            Self::PathPart => "path_part",
            Self::Extension => "extension",
            Self::TooLarge => "too_large",
            Self::Empty => "empty",
            Self::LfsPointer => "lfs_pointer",
            Self::Binary => "binary",
            Self::InvalidUtf8 => "invalid_utf8",
            Self::NotebookSkipped => "notebook_skipped",
            Self::NotebookInvalid => "notebook_invalid",
            Self::LockFile => "lock_file",
            Self::Generated => "generated",
            Self::LongLine => "long_line",
            Self::LongLines => "long_lines",
            Self::NotAlphanumeric => "not_alphanumeric",
            Self::Secret => "secret",
            Self::Duplicate => "duplicate",
            Self::NearDuplicate => "near_duplicate",
        }
    }
}

/// What was not taken as it is.
#[derive(Debug, Default)]
pub struct Counts {
    dropped: BTreeMap<DropReason, u64>,
    found: Found,
}

impl Counts {
    /// Counts a file that is dropped.
    pub fn drop_file(&mut self, reason: DropReason) {
        *self.dropped.entry(reason).or_default() += 1;
    }

    /// Counts what was found in a file.
    pub fn find(&mut self, found: &Found) {
        for (kind, count) in found {
            *self.found.entry(kind).or_default() += count;
        }
    }

    /// Files dropped by reason, and what was found by kind, as the manifest has them.
    pub fn into_manifest(self) -> (BTreeMap<String, u64>, BTreeMap<String, u64>) {
        let dropped = self.dropped.into_iter().map(|(reason, count)| (reason.as_str().to_owned(), count));
        let found = self.found.into_iter().map(|(kind, count)| (kind.to_owned(), count));
        (dropped.collect(), found.collect())
    }
}

/// The filters of a job, ready to use.
pub struct FileFilter {
    extensions: HashSet<String>,
    path_parts: HashSet<String>,
    max_file_bytes: u64,
    notebooks: NotebookMode,
    text: TextRules,
    keep_lock_files: bool,
    secrets: Secrets,
}

impl FileFilter {
    /// The filters that a job asks for.
    pub fn new(spec: &FilterSpec, notebooks: NotebookMode, secrets: Secrets) -> Self {
        Self {
            extensions: spec.exclude_extensions.iter().map(|ext| ext.to_lowercase()).collect(),
            path_parts: spec.exclude_path_parts.iter().cloned().collect(),
            max_file_bytes: spec.max_file_bytes,
            notebooks,
            text: TextRules::new(spec),
            keep_lock_files: spec.keep_lock_files,
            secrets,
        }
    }

    /// Judges by what the tree says; gives the path back as text.
    pub fn path(&self, path: Vec<u8>, kind: Kind) -> Result<String, DropReason> {
        match kind {
            Kind::Symlink => return Err(DropReason::Symlink),
            Kind::Submodule => return Err(DropReason::Submodule),
            Kind::TooDeep => return Err(DropReason::PathTooLong),
            Kind::File => {}
        }
        let path = String::from_utf8(path).map_err(|_| DropReason::PathNotUtf8)?;
        let mut name = "";
        let mut excluded = false;
        for part in path.split('/') {
            if matches!(part, "" | "." | "..") || part.contains(char::is_control) {
                return Err(DropReason::PathUnsafe);
            }
            excluded |= self.path_parts.contains(part);
            name = part;
        }
        if excluded {
            return Err(DropReason::PathPart);
        }
        if !self.keep_lock_files && text::is_lock_file(name) {
            return Err(DropReason::LockFile);
        }
        // By name, before any content: a copy under another name is a file of its own.
        self.text.judge_name(name)?;
        match extension(name) {
            Some(ext) if self.extensions.contains(&ext) => Err(DropReason::Extension),
            Some(ext) if ext == "ipynb" && self.notebooks == NotebookMode::Skip => {
                Err(DropReason::NotebookSkipped)
            }
            _ => Ok(path),
        }
    }

    /// Judges by the size of the blob. A notebook is mostly outputs, which are not kept: it may be larger,
    /// and its code is held against the limit instead.
    pub fn size(&self, path: &str, size: usize) -> Result<(), DropReason> {
        let limit = match is_notebook(path) {
            true => self.max_file_bytes.max(notebook::MAX_BYTES),
            false => self.max_file_bytes,
        };
        match size {
            0 => Err(DropReason::Empty),
            size if size as u64 > limit => Err(DropReason::TooLarge),
            _ => Ok(()),
        }
    }

    /// The text of a file that passed [`Self::path`] and [`Self::size`]; what was found in it is added to `found`.
    pub fn content(&self, path: &str, blob: &[u8], found: &mut Found) -> Result<String, DropReason> {
        if blob.len() <= LFS_MAX_BYTES && blob.starts_with(LFS_HEADER) {
            return Err(DropReason::LfsPointer);
        }
        if blob.iter().take(SNIFF_BYTES).any(|&byte| byte == 0) {
            return Err(DropReason::Binary);
        }
        let text = std::str::from_utf8(blob).map_err(|_| DropReason::InvalidUtf8)?;
        let text = match is_notebook(path) {
            true => notebook::code(text).ok_or(DropReason::NotebookInvalid)?,
            false => text.to_owned(),
        };
        if text.len() as u64 > self.max_file_bytes {
            return Err(DropReason::TooLarge);
        }
        if text.trim_start().is_empty() {
            return Err(DropReason::Empty);
        }
        self.text.judge(&text)?;
        self.secrets.clean(text, found)
    }
}

/// The text after the last dot of a file name, in lower case.
fn extension(name: &str) -> Option<String> {
    name.rsplit_once('.').map(|(_, ext)| ext.to_lowercase())
}

fn is_notebook(path: &str) -> bool {
    path.len() >= 6 && path.get(path.len() - 6..).is_some_and(|end| end.eq_ignore_ascii_case(".ipynb"))
}

#[cfg(test)]
mod tests {
    use tunefleet_proto::job::{SecretMode, default_filters};

    use super::*;

    fn filter() -> FileFilter {
        let spec = FilterSpec {
            exclude_extensions: ["png", "key", "len", "npy"].map(str::to_owned).to_vec(),
            exclude_path_parts: [".git", "__pycache__"].map(str::to_owned).to_vec(),
            max_file_bytes: 100,
            ..default_filters()
        };
        FileFilter::new(&spec, NotebookMode::CodeCells, Secrets::new(SecretMode::Redact, true))
    }

    #[test]
    fn paths_are_judged_by_whole_components_and_the_real_extension() {
        use DropReason::*;
        for (path, expected) in [
            ("src/main.rs", None),
            // The original dropped these by bare suffix and bare substring.
            ("src/monkey", None),
            ("src/foo_len", None),
            (".github/workflows/ci.yml", None),
            (".gitignore", None),
            ("Makefile", None),
            ("a/logo.png", Some(Extension)),
            ("a/LOGO.PNG", Some(Extension)),
            ("a/x.tar.npy", Some(Extension)),
            ("web/package-lock.json", Some(LockFile)),
            ("Cargo.lock", Some(LockFile)),
            ("src/lock.rs", None),
            ("web/app.min.js", Some(Generated)),
            ("png/readme.md", None),
            ("png", None),
            ("a/__pycache__/x.py", Some(PathPart)),
            ("vendor/.git/config", Some(PathPart)),
            ("../etc/passwd", Some(PathUnsafe)),
            ("a/../../b.py", Some(PathUnsafe)),
            ("a//b.py", Some(PathUnsafe)),
            ("/abs.py", Some(PathUnsafe)),
            ("a/new\nline.py", Some(PathUnsafe)),
        ] {
            let found = filter().path(path.as_bytes().to_vec(), Kind::File).err();
            assert_eq!(found, expected, "{path:?}");
        }
        assert_eq!(filter().path(b"a\xff.py".to_vec(), Kind::File), Err(PathNotUtf8));
        assert_eq!(filter().path(b"a.py".to_vec(), Kind::Symlink), Err(Symlink));
        assert_eq!(filter().path(b"a.py".to_vec(), Kind::Submodule), Err(Submodule));
        assert_eq!(filter().path(b"a.py".to_vec(), Kind::TooDeep), Err(PathTooLong));
    }

    #[test]
    fn contents_are_judged_by_their_bytes() {
        use DropReason::*;
        let late_nul = [vec![b'x'; SNIFF_BYTES], vec![0]].concat();
        for (blob, expected) in [
            (&b"fn main() {}\n"[..], None),
            ("d\u{e9}j\u{e0} vu\n".as_bytes(), None),
            (b"\xef\xbb\xbfbom\n", None),
            (b" \n\t\n", Some(Empty)),
            (b"a\0b", Some(Binary)),
            (b"caf\xe9", Some(InvalidUtf8)),
            (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", Some(LfsPointer)),
            (&[b'x'; 101], Some(TooLarge)),
            (&late_nul, Some(TooLarge)),
        ] {
            assert_eq!(
                filter().content("a.py", blob, &mut Found::new()).err(),
                expected,
                "{:?}",
                blob.get(..8)
            );
        }
        assert_eq!(filter().size("a.py", 0), Err(Empty));
        assert_eq!(filter().size("a.py", 101), Err(TooLarge));
        assert_eq!(filter().size("a.ipynb", 101), Ok(()));
        assert_eq!(filter().size("a.IPYNB", 1 << 30), Err(TooLarge));
    }

    #[test]
    fn notebooks_can_be_left_out() {
        let filter =
            FileFilter::new(&default_filters(), NotebookMode::Skip, Secrets::new(SecretMode::Off, false));
        assert_eq!(filter.path(b"a.ipynb".to_vec(), Kind::File), Err(DropReason::NotebookSkipped));
    }
}
