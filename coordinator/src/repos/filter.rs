//! Which files are kept, and why the others are not. Every drop has one reason and is counted.

use std::collections::{BTreeMap, HashSet};

use tunefleet_proto::job::{CollectSpec, EncodingMode, NotebookMode};

use super::attributes::Marks;
use super::contamination::Contamination;
use super::licenses::Licenses;
use super::secrets::{Found, Secrets};
use super::text::{self, TextRules};
pub use super::tree::Kind;
use super::{Error, encoding, notebook};

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
    /// A clone with a filter has left it out.
    NotFetched,
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
    /// It says that a program has written it, or `.gitattributes` does.
    Generated,
    /// `.gitattributes` says that it was written elsewhere, or is documentation.
    Vendored,
    /// The repository's licence, or its own, is not wanted.
    License,
    /// A line is longer than `max_line_chars`.
    LongLine,
    /// Lines are longer than `max_mean_line_chars` on average.
    LongLines,
    /// Fewer letters and digits than `min_alphanumeric_fraction`.
    NotAlphanumeric,
    /// A text of an evaluation task is in it.
    Contaminated,
    /// A key or password is in it.
    Secret,
    /// An earlier file has the same content.
    Duplicate,
    /// A file that was kept says nearly the same.
    NearDuplicate,
    /// A conversation that breaks a rule.
    InvalidConversation,
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
            Self::NotFetched => "not_fetched",
            Self::TooLarge => "too_large",
            Self::Empty => "empty",
            Self::LfsPointer => "lfs_pointer",
            Self::Binary => "binary",
            Self::InvalidUtf8 => "invalid_utf8",
            Self::NotebookSkipped => "notebook_skipped",
            Self::NotebookInvalid => "notebook_invalid",
            Self::LockFile => "lock_file",
            Self::Generated => "generated",
            Self::Vendored => "vendored",
            Self::License => "license",
            Self::LongLine => "long_line",
            Self::LongLines => "long_lines",
            Self::NotAlphanumeric => "not_alphanumeric",
            Self::Contaminated => "contaminated",
            Self::Secret => "secret",
            Self::Duplicate => "duplicate",
            Self::NearDuplicate => "near_duplicate",
            Self::InvalidConversation => "invalid_conversation",
        }
    }
}

/// What was not taken as it is.
#[derive(Debug, Default)]
pub struct Counts {
    dropped: BTreeMap<DropReason, u64>,
    found: Found,
    /// The first conversation that broke a rule, in words.
    pub first_invalid: Option<String>,
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
    encodings: EncodingMode,
    text: TextRules,
    keep_lock_files: bool,
    keep_generated: bool,
    keep_vendored: bool,
    /// Which licences are wanted.
    pub licenses: Licenses,
    contamination: Contamination,
    secrets: Secrets,
}

impl FileFilter {
    /// The filters that a job asks for.
    ///
    /// # Errors
    /// Evaluation tasks that cannot be read.
    pub fn new(spec: &CollectSpec) -> Result<Self, Error> {
        let CollectSpec { filters, .. } = spec;
        Ok(Self {
            extensions: filters.exclude_extensions.iter().map(|ext| ext.to_lowercase()).collect(),
            path_parts: filters.exclude_path_parts.iter().cloned().collect(),
            max_file_bytes: filters.max_file_bytes,
            notebooks: spec.notebooks,
            encodings: spec.encodings,
            text: TextRules::new(filters),
            keep_lock_files: filters.keep_lock_files,
            keep_generated: filters.keep_generated,
            keep_vendored: filters.keep_vendored,
            licenses: Licenses::new(&spec.licenses),
            contamination: Contamination::of_files(&spec.decontaminate)?,
            secrets: Secrets::new(spec.secrets, !spec.keep_email_addresses),
        })
    }

    /// Judges by what the tree says; gives the path back as text.
    ///
    /// # Errors
    /// The first reason that drops it.
    pub fn path(&self, path: Vec<u8>, kind: Kind, marks: Marks) -> Result<String, DropReason> {
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
        if !self.keep_vendored && (marks.vendored == Some(true) || marks.documentation == Some(true)) {
            return Err(DropReason::Vendored);
        }
        if !self.keep_lock_files && text::is_lock_file(name) {
            return Err(DropReason::LockFile);
        }
        match (self.keep_generated, marks.generated) {
            (true, _) | (_, Some(false)) => {}
            (false, Some(true)) => return Err(DropReason::Generated),
            // By name, before any content: a copy under another name is a file of its own.
            (false, None) => self.text.judge_name(name)?,
        }
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
    ///
    /// # Errors
    /// The first reason that drops it.
    pub fn content(
        &self,
        path: &str,
        marks: Marks,
        blob: &[u8],
        found: &mut Found,
    ) -> Result<String, DropReason> {
        if blob.len() <= LFS_MAX_BYTES && blob.starts_with(LFS_HEADER) {
            return Err(DropReason::LfsPointer);
        }
        self.text(path, marks, encoding::text(blob, self.encodings)?, found)
    }

    /// As [`content`](Self::content), of what is text already.
    ///
    /// # Errors
    /// The first reason that drops it.
    pub fn text(
        &self,
        path: &str,
        marks: Marks,
        text: String,
        found: &mut Found,
    ) -> Result<String, DropReason> {
        let text = match (is_notebook(path), self.notebooks) {
            (true, NotebookMode::Structured) => {
                notebook::structured(&text).ok_or(DropReason::NotebookInvalid)?
            }
            (true, _) => notebook::code(&text).ok_or(DropReason::NotebookInvalid)?,
            (false, _) => text,
        };
        if text.len() as u64 > self.max_file_bytes {
            return Err(DropReason::TooLarge);
        }
        if text.trim_start().is_empty() {
            return Err(DropReason::Empty);
        }
        if !self.licenses.takes_file(&text) {
            return Err(DropReason::License);
        }
        self.text.judge(&text, marks.generated)?;
        self.turn(text, found)
    }

    /// What is said in a turn of a conversation, as it is kept.
    ///
    /// # Errors
    /// The first reason that drops it.
    pub fn turn(&self, text: String, found: &mut Found) -> Result<String, DropReason> {
        if self.contamination.is_in(&text) {
            return Err(DropReason::Contaminated);
        }
        self.secrets.clean(text, found)
    }
}

/// The text after the last dot of a file name, in lower case.
fn extension(name: &str) -> Option<String> {
    name.rsplit_once('.').map(|(_, ext)| ext.to_lowercase())
}

/// Whether a file of this name is read as a notebook.
pub fn is_notebook(path: &str) -> bool {
    path.len() >= 6 && path.get(path.len() - 6..).is_some_and(|end| end.eq_ignore_ascii_case(".ipynb"))
}

#[cfg(test)]
mod tests {
    use tunefleet_proto::job::{FilterSpec, default_filters};

    use super::*;

    fn filter() -> FileFilter {
        let spec = FilterSpec {
            exclude_extensions: ["png", "key", "len", "npy"].map(str::to_owned).to_vec(),
            exclude_path_parts: [".git", "__pycache__"].map(str::to_owned).to_vec(),
            max_file_bytes: 100,
            ..default_filters()
        };
        FileFilter::new(&CollectSpec { filters: spec, ..CollectSpec::of(Vec::new()) }).unwrap()
    }

    fn path_of(path: &[u8], kind: Kind) -> Result<String, DropReason> {
        filter().path(path.to_vec(), kind, Marks::default())
    }

    #[test]
    fn what_gitattributes_says_is_heard_unless_it_is_to_be_kept() {
        use DropReason::*;
        let marks = |vendored, generated, documentation| Marks { vendored, generated, documentation };
        for (path, marks, expected) in [
            ("a.c", marks(Some(true), None, None), Some(Vendored)),
            ("a.md", marks(None, None, Some(true)), Some(Vendored)),
            ("a.c", marks(None, Some(true), None), Some(Generated)),
            ("a.min.js", marks(None, Some(false), None), None),
            ("a.c", marks(Some(false), Some(false), Some(false)), None),
        ] {
            let of = |filter: &FileFilter| filter.path(path.as_bytes().to_vec(), Kind::File, marks).err();
            assert_eq!(of(&filter()), expected, "{path} {marks:?}");
            let filters = FilterSpec { keep_vendored: true, keep_generated: true, ..default_filters() };
            let keeps = FileFilter::new(&CollectSpec { filters, ..CollectSpec::of(Vec::new()) }).unwrap();
            assert_eq!(of(&keeps), None, "{path} {marks:?}");
        }
        let says = "// @generated\nint x;\n".to_owned();
        let of = |generated| {
            filter().text("a.c", marks(None, generated, None), says.clone(), &mut Found::new()).err()
        };
        assert_eq!((of(None), of(Some(false))), (Some(Generated), None));
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
            let found = path_of(path.as_bytes(), Kind::File).err();
            assert_eq!(found, expected, "{path:?}");
        }
        assert_eq!(path_of(b"a\xff.py", Kind::File), Err(PathNotUtf8));
        assert_eq!(path_of(b"a.py", Kind::Symlink), Err(Symlink));
        assert_eq!(path_of(b"a.py", Kind::Submodule), Err(Submodule));
        assert_eq!(path_of(b"a.py", Kind::TooDeep), Err(PathTooLong));
    }

    #[test]
    fn contents_are_judged_by_their_bytes() {
        use DropReason::*;
        let late_nul = [vec![b'x'; 8 * 1024], vec![0]].concat();
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
                filter().content("a.py", Marks::default(), blob, &mut Found::new()).err(),
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
        let spec = CollectSpec { notebooks: NotebookMode::Skip, ..CollectSpec::of(Vec::new()) };
        let path = FileFilter::new(&spec).unwrap().path(b"a.ipynb".to_vec(), Kind::File, Marks::default());
        assert_eq!(path, Err(DropReason::NotebookSkipped));
    }
}
