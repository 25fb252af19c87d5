//! What is collected: sources, filters, duplicates, what is held out.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// What `coordinator collect` does.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct CollectSpec {
    /// What a row is.
    #[serde(default, skip_serializing_if = "ContentKind::is_code")]
    pub kind: ContentKind,
    /// Where files come from, in the order given.
    pub sources: Vec<SourceSpec>,
    /// Which files are kept.
    pub filters: FilterSpec,
    /// What becomes of text that is not UTF-8.
    #[serde(default)]
    pub encodings: EncodingMode,
    /// Which licences a repository may, and may not, be under.
    #[serde(default)]
    pub licenses: LicenseSpec,
    /// Files of evaluation tasks, whose texts no file may hold (absolute).
    #[serde(default)]
    pub decontaminate: Vec<PathBuf>,
    /// What becomes of notebooks.
    pub notebooks: NotebookMode,
    /// What becomes of keys and passwords.
    #[serde(default)]
    pub secrets: SecretMode,
    /// Whether addresses of people stay.
    #[serde(default)]
    pub keep_email_addresses: bool,
    /// What becomes of files that are alike.
    #[serde(default)]
    pub duplicates: DuplicateMode,
    /// Jaccard similarity of their 5-grams of words from which on files are alike.
    #[serde(default = "near_duplicate_similarity")]
    pub near_duplicate_similarity: f64,
    /// What becomes of conversations that break a rule.
    #[serde(default, skip_serializing_if = "InvalidMode::is_error")]
    pub invalid_conversations: InvalidMode,
    /// Segment format.
    pub format: SegmentFormat,
    /// Share of files held out for evaluation, 0 to 0.5; at least one file when above 0.
    pub validation_fraction: f64,
    /// What is held out as one.
    #[serde(default)]
    pub split_by: SplitBy,
    /// Seed of the split; of no meaning by date.
    pub split_seed: u64,
    /// Repositories fetched at once.
    pub parallel_fetches: u32,
    /// A repository that sends nothing for so long is asked again.
    #[serde(default = "fetch_timeout_seconds")]
    pub fetch_timeout_seconds: u64,
}

impl CollectSpec {
    /// What is collected from `sources` where nothing else is asked for.
    pub fn of(sources: Vec<SourceSpec>) -> Self {
        CollectSpec {
            kind: ContentKind::Code,
            sources,
            filters: FilterSpec::default(),
            encodings: EncodingMode::default(),
            licenses: LicenseSpec::default(),
            decontaminate: Vec::new(),
            notebooks: NotebookMode::CodeCells,
            secrets: SecretMode::default(),
            keep_email_addresses: false,
            duplicates: DuplicateMode::default(),
            near_duplicate_similarity: NEAR_DUPLICATE_SIMILARITY,
            invalid_conversations: InvalidMode::Error,
            format: SegmentFormat::Arrow,
            validation_fraction: VALIDATION_FRACTION,
            split_by: SplitBy::default(),
            split_seed: 0,
            parallel_fetches: 8,
            fetch_timeout_seconds: FETCH_TIMEOUT_SECONDS,
        }
    }

    /// Whether anything is to be held out.
    pub fn holds_out(&self) -> bool {
        let has_own = || {
            self.sources
                .iter()
                .any(|source| matches!(source, SourceSpec::Table { dataset } if dataset.held_out))
        };
        self.validation_fraction > 0.0 || matches!(self.split_by, SplitBy::Date(_)) || has_own()
    }
}

/// Default of [`CollectSpec::validation_fraction`], that of the original.
pub const VALIDATION_FRACTION: f64 = 0.005;
/// Default of [`CollectSpec::fetch_timeout_seconds`].
pub const FETCH_TIMEOUT_SECONDS: u64 = 60;

fn fetch_timeout_seconds() -> u64 {
    FETCH_TIMEOUT_SECONDS
}

/// What is held out as one.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SplitBy {
    /// A file; files that are alike stay together.
    #[default]
    File,
    /// A repository.
    Repository,
    /// Files that were last changed on this day (UTC, `YYYY-MM-DD`) or later, however many.
    Date(String),
}

/// The second, counted from 1970, at which a day begins (UTC); `None` for what is no day, or an earlier one.
pub fn day_start(day: &str) -> Option<i64> {
    let [year, month, date] = day.splitn(3, '-').collect::<Vec<_>>()[..] else { return None };
    let number = |text: &str, digits: usize| {
        (text.len() == digits && text.bytes().all(|b| b.is_ascii_digit()))
            .then(|| text.parse::<i64>().ok())?
    };
    let (year, month, date) = (number(year, 4)?, number(month, 2)?, number(date, 2)?);
    let is_leap = year % 4 == 0 && (year % 100 != 0 || year % 400 == 0);
    let longest = match month {
        2 => 28 + i64::from(is_leap),
        4 | 6 | 9 | 11 => 30,
        1..=12 => 31,
        _ => return None,
    };
    if year < 1970 || !(1..=longest).contains(&date) {
        return None;
    }
    // Days since 1 March of year 0: a leap day is then the last of its year.
    let (year, month) = if month > 2 { (year, month - 3) } else { (year - 1, month + 9) };
    let days = year * 365 + year / 4 - year / 100 + year / 400 + (153 * month + 2) / 5 + date - 1;
    Some((days - 719_468) * 86_400)
}

/// What a row of a dataset is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ContentKind {
    /// A file of code.
    #[default]
    Code,
    /// A conversation, in JSON (see [`crate::chat`]).
    Chat,
}

impl ContentKind {
    fn is_code(&self) -> bool {
        *self == ContentKind::Code
    }
}

/// What becomes of a conversation that breaks a rule.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum InvalidMode {
    /// Nothing is collected, and it is named.
    #[default]
    Error,
    /// It is left out, and counted.
    Drop,
}

impl InvalidMode {
    fn is_error(&self) -> bool {
        *self == InvalidMode::Error
    }
}

/// What becomes of text that is not UTF-8.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EncodingMode {
    /// The file is left out.
    #[default]
    Drop,
    /// The encoding is guessed, and the text converted.
    Convert,
}

/// Which licences a repository may be under, by SPDX identifiers.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct LicenseSpec {
    /// Where not empty: a repository without one of these is left out.
    pub allow: Vec<String>,
    /// A repository with one of these is left out, and so is a file that names one.
    pub deny: Vec<String>,
}

/// What becomes of keys and passwords.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SecretMode {
    /// They are replaced.
    #[default]
    Redact,
    /// The file is left out.
    Drop,
    /// They are counted, and stay.
    Report,
    /// They are not looked for.
    Off,
}

/// Default of [`CollectSpec::near_duplicate_similarity`], that of BigCode's deduplication.
pub const NEAR_DUPLICATE_SIMILARITY: f64 = 0.7;

fn near_duplicate_similarity() -> f64 {
    NEAR_DUPLICATE_SIMILARITY
}

/// What becomes of files that are alike, across repositories.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
#[value(rename_all = "snake_case")]
pub enum DuplicateMode {
    /// The first of those that say nearly the same is kept.
    #[default]
    DropNear,
    /// The first of those with the same content is kept.
    DropExact,
    /// All are kept.
    Keep,
}

/// Where files come from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum SourceSpec {
    /// The repositories of an organisation or a user.
    Organization {
        /// Which, and which of theirs.
        github: OrganizationSpec,
    },
    /// The rows of a dataset that others made.
    Table {
        /// Where it is, and what of it.
        dataset: TableSpec,
    },
    /// One repository.
    Repository(RepositorySpec),
}

impl SourceSpec {
    /// The repository at `location`, at its head.
    pub fn repository(location: impl Into<String>) -> Self {
        SourceSpec::Repository(RepositorySpec { location: location.into(), revision: None })
    }
}

/// One repository.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RepositorySpec {
    /// `https://`, `ssh://`, `git@host:org/repo`, `file://` or a local path (absolute after resolution).
    pub location: String,
    /// Branch, tag or commit; the remote's HEAD when absent.
    pub revision: Option<String>,
}

/// Repositories of one owner, by GitHub's REST API or one of the same shape.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct OrganizationSpec {
    /// Organisation or user.
    pub org: String,
    /// So many at most, the first in the order of `sort`; all where absent.
    pub top: Option<u32>,
    /// Which are the first.
    pub sort: RepositoryOrder,
    /// Copies of other repositories as well.
    pub forks: bool,
    /// Repositories that are no longer worked on as well.
    pub archived: bool,
    /// Names that are left out.
    pub exclude: Vec<String>,
    /// Clones over SSH.
    pub ssh: bool,
    /// Address of the API, without a slash at its end.
    pub api: String,
}

/// Which of several repositories are the first. Those that are equal come by name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RepositoryOrder {
    /// Most stars.
    Stars,
    /// Changed last.
    Updated,
    /// By name.
    Name,
}

/// A dataset that others made: rows of texts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TableSpec {
    /// A file or a directory (absolute), or `hub:OWNER/NAME`.
    pub from: String,
    /// Branch, tag or commit of the hub's repository.
    pub revision: Option<String>,
    /// Part of the dataset: a directory in it.
    pub subset: Option<String>,
    /// Files whose names, or whose directories' names, begin with this.
    pub split: Option<String>,
    /// Column of the texts; of conversations, the first of the usual ones where none is named.
    pub column: Option<String>,
    /// Whether all its rows are held out.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub held_out: bool,
}

/// Which files are kept; see `docs/collect.md` for the defaults and their reasons.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct FilterSpec {
    /// Extensions that drop a file: no dot, lower case; compared with the text after the last dot.
    pub exclude_extensions: Vec<String>,
    /// Path components that drop a file when one equals the entry.
    pub exclude_path_parts: Vec<String>,
    /// Files above this size are dropped.
    pub max_file_bytes: u64,
    /// Files with a line of more characters are dropped.
    pub max_line_chars: u64,
    /// Files whose lines have more characters on average are dropped.
    pub max_mean_line_chars: f64,
    /// Files with a smaller share of letters and digits are dropped.
    pub min_alphanumeric_fraction: f64,
    /// Files that a program has written are kept.
    pub keep_generated: bool,
    /// Lists of locked versions are kept.
    pub keep_lock_files: bool,
    /// What `.gitattributes` calls vendored is kept.
    pub keep_vendored: bool,
}

/// What becomes of `.ipynb` files.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum NotebookMode {
    /// Code cells, joined by a blank line.
    CodeCells,
    /// Text, code and outputs between the marks that StarCoder learned.
    Structured,
    /// Dropped.
    Skip,
}

/// On-disk form of a segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SegmentFormat {
    /// Arrow IPC file (Feather v2) with zstd, named `.arrow`.
    Arrow,
    /// Parquet with zstd.
    Parquet,
}
