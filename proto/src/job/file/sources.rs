//! The kinds of sources, told apart by their keys.

use super::super::diagnostic::Sink;
use super::super::read::{At, Field, FromNode, ManualEntry, entries, join, read, section};
use super::super::spec::RepositoryOrder;
use super::super::tree::{Node, Value};

section! {
    /// One repository, with a revision.
    RepositoryKeys {
        /// Path or URL.
        location: String,
        /// Branch, tag or commit. Default: the repository's HEAD.
        revision: String,
    }
}

section! {
    /// The repositories of an organisation or a user, by GitHub's REST API or one of the same shape (GitHub
    /// Enterprise, Gitea, Forgejo). A token comes from `GITHUB_TOKEN` or `GH_TOKEN`, and clones as well.
    OrganizationFile {
        /// Its name. Must be given.
        org: String,
        /// So many at most, the first in the order of `sort`, 1 to 10000. Default: all.
        top: u32,
        /// `stars`, `updated` (last change first) or `name`. Default: `stars`.
        sort: RepositoryOrder,
        /// Copies of others' repositories as well. Default: false.
        forks: bool,
        /// Repositories that are no longer worked on as well. Default: false.
        archived: bool,
        /// Names that are left out. Default: none.
        exclude: Vec<At<String>>,
        /// Clone over SSH. Default: false.
        ssh: bool,
        /// Address of the API: `https://host/api/v3` of GitHub Enterprise, `https://host/api/v1` of Gitea.
        /// Default: that of github.com.
        api: String,
    }
}

section! {
    /// The rows of a dataset that others made: Parquet, Arrow, JSONL or CSV, the last two gzipped or not.
    /// Every row is a file; columns `repo_id` (or `repo_name`) and `file_path` (or `path`) name it.
    TableFile {
        /// A file or a directory. This or `hub` must be given.
        path: String,
        /// A dataset of the Hugging Face hub, `OWNER/NAME`; a token comes from `HF_TOKEN`. This or `path` must be
        /// given.
        hub: String,
        /// Branch, tag or commit on the hub. Default: `main`.
        revision: String,
        /// A directory in it. Default: all.
        subset: String,
        /// Only files whose names, or whose directories' names, begin with this. Default: all.
        split: String,
        /// Column of the texts. Default: `content`; with `kind: chat` the first of `messages`, `conversations`,
        /// `conversation`, `text` and `content` that there is.
        data_column: String,
        /// Hold all its rows out: it is the test set that others made. Default: false.
        held_out: bool,
    }
}

/// A source, as it is written.
#[derive(Debug, Clone)]
pub enum SourceFile {
    /// Text, or [`RepositoryKeys`].
    Repository {
        /// Path or URL.
        location: At<String>,
        /// Branch, tag or commit.
        revision: Field<String>,
    },
    /// `github:`
    Organization(At<OrganizationFile>),
    /// `dataset:`
    Table(At<TableFile>),
}

impl FromNode for SourceFile {
    const KIND: &'static str = "a path, a URL, or a mapping with location, github or dataset";

    fn from_node(node: &Node, path: &str, sink: &mut Sink) -> Option<Self> {
        let Value::Map(written) = &node.value else {
            let value = String::from_node(node, path, sink)?;
            let location = At { value, place: node.place.clone() };
            return Some(SourceFile::Repository { location, revision: Field::Absent });
        };
        for kind in ["github", "dataset"] {
            if !written.iter().any(|(key, _)| key.name == kind) {
                continue;
            }
            let found = entries(node, path, &[kind], sink)?.into_iter().flatten().next()?;
            let path = join(path, kind);
            return match kind {
                "github" => read(found, &path, sink).given().cloned().map(SourceFile::Organization),
                _ => read(found, &path, sink).given().cloned().map(SourceFile::Table),
            };
        }
        let keys = RepositoryKeys::from_node(node, path, sink)?;
        match keys.location {
            Field::Given(location) => Some(SourceFile::Repository { location, revision: keys.revision }),
            Field::Wrong => None,
            Field::Absent => {
                sink.report(&node.place, format!("{path}: lacks location, github or dataset"));
                None
            }
        }
    }

    fn describe(path: &str, manual: &mut Vec<ManualEntry>) {
        RepositoryKeys::describe(path, manual);
        for (kind, describe) in [
            ("github", OrganizationFile::describe as fn(&str, &mut Vec<ManualEntry>)),
            ("dataset", TableFile::describe),
        ] {
            describe(&join(path, kind), manual);
        }
    }
}
