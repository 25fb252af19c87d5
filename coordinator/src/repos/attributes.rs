//! What `.gitattributes` says of a path: `linguist-vendored`, `-generated` and `-documentation`, as GitHub reads them.
//!
//! Only files of the commit count; the last line that matches wins, and a deeper file over one above it.

use std::path::Path;

use gix_attributes::search::{MetadataCollection, Outcome};
use gix_attributes::{Search, StateRef};

/// Name of the file.
pub const FILE_NAME: &str = ".gitattributes";
/// Larger ones say nothing.
pub const MAX_BYTES: usize = 1 << 20;
/// What is looked for, in the order of [`Marks`].
const NAMES: [&str; 3] = ["linguist-vendored", "linguist-generated", "linguist-documentation"];

/// What is said of a path; `None` where nothing is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Marks {
    /// Written elsewhere.
    pub vendored: Option<bool>,
    /// Written by a program.
    pub generated: Option<bool>,
    /// No code.
    pub documentation: Option<bool>,
}

/// The attributes files from the top of a tree down to where a walk is.
#[derive(Default)]
pub struct Attributes {
    search: Search,
    names: MetadataCollection,
    outcome: Outcome,
}

impl Attributes {
    /// Goes down into a directory with a file of this content.
    pub fn enter(&mut self, directory: &[u8], content: &[u8]) {
        let directory = String::from_utf8_lossy(directory);
        let source = Path::new("/").join(directory.trim_end_matches('/')).join(FILE_NAME);
        let is_top = directory.is_empty();
        // Lines that are none are passed over, as git does.
        let added =
            self.search.add_patterns_buffer(content, source, Some(Path::new("/")), &mut self.names, is_top);
        if added.is_ok() {
            self.outcome.initialize_with_selection(&self.names, NAMES);
        }
    }

    /// Leaves a directory that was [entered](Self::enter).
    pub fn leave(&mut self) {
        self.search.pop_pattern_list();
    }

    /// What is said of a path.
    pub fn of(&mut self, path: &[u8]) -> Marks {
        let mut marks = Marks::default();
        if self.search.num_pattern_lists() == 0 {
            return marks;
        }
        self.outcome.reset();
        let case = gix_attributes::glob::pattern::Case::Sensitive;
        self.search.pattern_matching_relative_path(path.into(), case, Some(false), &mut self.outcome);
        for found in self.outcome.iter_selected() {
            let is_set = match found.assignment.state {
                StateRef::Set => Some(true),
                StateRef::Unset => Some(false),
                StateRef::Value(value) => Some(!value.as_bstr().eq_ignore_ascii_case(b"false")),
                StateRef::Unspecified => None,
            };
            match found.assignment.name.as_str() {
                "linguist-vendored" => marks.vendored = is_set,
                "linguist-generated" => marks.generated = is_set,
                "linguist-documentation" => marks.documentation = is_set,
                _ => {}
            }
        }
        marks
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_last_line_that_matches_wins_and_a_deeper_file_over_one_above() {
        let mut attributes = Attributes::default();
        assert_eq!(attributes.of(b"a.py"), Marks::default());
        let top = "# comment\n*.pb.go linguist-generated\nthird_party/** linguist-vendored\n\
                   third_party/own.c -linguist-vendored\n/docs/* linguist-documentation=true\n\
                   *.keep linguist-generated=false\n\"broken";
        attributes.enter(b"", top.as_bytes());
        let marks = |vendored, generated, documentation| Marks { vendored, generated, documentation };
        for (path, expected) in [
            ("a/b.pb.go", marks(None, Some(true), None)),
            ("third_party/x/y.c", marks(Some(true), None, None)),
            ("third_party/own.c", marks(Some(false), None, None)),
            ("docs/a.md", marks(None, None, Some(true))),
            ("sub/docs/a.md", Marks::default()),
            ("x.keep", marks(None, Some(false), None)),
        ] {
            assert_eq!(attributes.of(path.as_bytes()), expected, "{path}");
        }
        attributes.enter(b"sub/", b"*.pb.go !linguist-generated\nlocal/** linguist-vendored\n");
        assert_eq!(attributes.of(b"sub/b.pb.go"), Marks::default());
        assert_eq!(attributes.of(b"sub/local/x.c").vendored, Some(true));
        assert_eq!(attributes.of(b"local/x.c").vendored, None);
        attributes.leave();
        assert_eq!(attributes.of(b"sub/b.pb.go").generated, Some(true));
        attributes.leave();
        assert_eq!(attributes.of(b"a/b.pb.go"), Marks::default());
    }

    proptest! {
        #[test]
        fn any_bytes_are_taken(content in proptest::collection::vec(any::<u8>(), 0..200), path in "[a-z/.*\\[]{1,20}") {
            let mut attributes = Attributes::default();
            attributes.enter(b"", &content);
            attributes.enter(b"a/", &content);
            let _ = attributes.of(path.as_bytes());
        }
    }
}
