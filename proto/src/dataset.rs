//! The dataset directory: Arrow or Parquet segments and `manifest.json`.
//!
//! Columns of a segment, in this order: `repo_id` (Utf8), `file_path` (Utf8, inside the
//! repository), `content` (LargeUtf8), `commit` (Utf8), `size_bytes` (UInt64).

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// Version of [`Manifest`] that this build writes.
pub const MANIFEST_VERSION: u32 = 1;
/// File name of the manifest.
pub const MANIFEST_FILE: &str = "manifest.json";
/// Rows of a full segment.
pub const SEGMENT_ROWS: usize = 10_000;

/// What the parts of a structured notebook begin with: the whole, text, code, output, and in place of an output that
/// there is not. StarCoder's tokenizer has a token for each.
pub const NOTEBOOK_MARKS: [&str; 5] =
    ["<jupyter_start>", "<jupyter_text>", "<jupyter_code>", "<jupyter_output>", "<empty_output>"];

/// Everything that is known of a dataset.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// [`MANIFEST_VERSION`].
    pub version: u32,
    /// Program and version that wrote it.
    pub written_by: String,
    /// The `CollectSpec` that it came from.
    pub settings: serde_json::Value,
    /// Repositories in the order of the job file.
    pub repositories: Vec<Repository>,
    /// Segments of the training split, in reading order.
    pub train: Vec<Segment>,
    /// Segments of the validation split, in reading order.
    pub validation: Vec<Segment>,
    /// Files dropped, by reason.
    pub dropped: BTreeMap<String, u64>,
    /// Keys, passwords and addresses of people that were found, by kind.
    #[serde(default)]
    pub found: BTreeMap<String, u64>,
}

/// One repository, pinned.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Repository {
    /// `org/name` where the location tells it, else the last path component.
    pub repo_id: String,
    /// Where it came from, without credentials.
    pub location: String,
    /// Commit, 40 hex digits; of a dataset's files on disk the SHA-256 over their contents.
    pub commit: String,
    /// Licences found in its top directory, by SPDX identifiers.
    #[serde(default)]
    pub licenses: Vec<String>,
    /// Files kept.
    pub files: u64,
    /// Bytes of text kept.
    pub bytes: u64,
}

/// One file of rows.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Segment {
    /// File name inside the dataset directory.
    pub file: String,
    /// Rows.
    pub rows: u64,
    /// Size of the file.
    pub bytes: u64,
    /// SHA-256 of the file, hex.
    pub sha256: String,
}

impl Manifest {
    /// SHA-256 over the segments' hashes: what the tokens depend on, and nothing else.
    pub fn digest(&self) -> String {
        let mut parts = Vec::new();
        for segment in self.train.iter().chain(&self.validation) {
            parts.push(segment.sha256.as_str());
        }
        crate::digest_hex(parts.join("\n").as_bytes())
    }
}
