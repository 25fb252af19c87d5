//! `dataset` and `collect`: where the files to learn from come from.

use super::Resolver;
use crate::job::diagnostic::{Place, shown};
use crate::job::file::{CollectFile, JobFile, SourceFile, SplitWord};
use crate::job::filters::default_filters;
use crate::job::read::{At, Field};
use crate::job::spec::{
    CollectSpec, ContentKind, DatasetSpec, DuplicateMode, EncodingMode, FETCH_TIMEOUT_SECONDS, FilterSpec,
    InvalidMode, LicenseSpec, NEAR_DUPLICATE_SIMILARITY, NotebookMode, SecretMode, SegmentFormat, SplitBy,
    VALIDATION_FRACTION, day_start,
};

impl Resolver<'_> {
    pub(super) fn dataset(&mut self, file: &JobFile) -> Option<DatasetSpec> {
        match (&file.dataset, &file.collect) {
            (Field::Given(dataset), Field::Given(collect)) => self.report(
                &dataset.place,
                format!("dataset and collect ({}) contradict each other: keep one", collect.place),
            ),
            (Field::Given(dataset), _) => Some(DatasetSpec::Existing(self.path(dataset))),
            (_, Field::Given(collect)) => {
                self.collect(collect).map(|spec| DatasetSpec::Collect(Box::new(spec)))
            }
            (Field::Absent, Field::Absent) => self.report(
                &Place::START,
                "lacks the code to learn from: give collect.sources (repositories) or dataset (a directory)",
            ),
            _ => None,
        }
    }

    fn collect(&mut self, At { value: collect, place }: &At<CollectFile>) -> Option<CollectSpec> {
        let filters = default_filters();
        let kind = collect.kind.or(ContentKind::Code);
        self.of_other_kind(collect, kind);
        let has_own = kind == ContentKind::Chat && holds_out(&collect.sources);
        let spec = CollectSpec {
            kind,
            sources: self.sources(&collect.sources, place, kind).unwrap_or_default(),
            filters: FilterSpec {
                exclude_extensions: self.extensions(&collect.exclude_extensions, filters.exclude_extensions),
                exclude_path_parts: self.path_parts(&collect.exclude_path_parts, filters.exclude_path_parts),
                max_file_bytes: self.within(
                    "collect.max_file_bytes",
                    &collect.max_file_bytes,
                    1..=1 << 30,
                    filters.max_file_bytes,
                ),
                max_line_chars: self.within(
                    "collect.max_line_chars",
                    &collect.max_line_chars,
                    1..=1 << 30,
                    filters.max_line_chars,
                ),
                max_mean_line_chars: self.within(
                    "collect.max_mean_line_chars",
                    &collect.max_mean_line_chars,
                    1.0..=f64::from(1 << 30),
                    filters.max_mean_line_chars,
                ),
                min_alphanumeric_fraction: self.within(
                    "collect.min_alphanumeric_fraction",
                    &collect.min_alphanumeric_fraction,
                    0.0..=1.0,
                    filters.min_alphanumeric_fraction,
                ),
                keep_generated: collect.keep_generated.or(filters.keep_generated),
                keep_lock_files: collect.keep_lock_files.or(filters.keep_lock_files),
                keep_vendored: collect.keep_vendored.or(filters.keep_vendored),
            },
            encodings: collect.encodings.or(EncodingMode::Drop),
            licenses: LicenseSpec {
                allow: self.licenses("allow_licenses", &collect.allow_licenses),
                deny: self.licenses("deny_licenses", &collect.deny_licenses),
            },
            decontaminate: match collect.decontaminate.given() {
                Some(files) => files.value.iter().map(|file| self.path(file)).collect(),
                None => Vec::new(),
            },
            notebooks: collect.notebooks.or(NotebookMode::CodeCells),
            secrets: collect.secrets.or(SecretMode::Redact),
            keep_email_addresses: collect.keep_email_addresses.or(false),
            duplicates: collect.duplicates.or(match kind {
                ContentKind::Code => DuplicateMode::DropNear,
                // The same question may have several answers.
                ContentKind::Chat => DuplicateMode::DropExact,
            }),
            near_duplicate_similarity: self.within(
                "collect.near_duplicate_similarity",
                &collect.near_duplicate_similarity,
                0.1..=1.0,
                NEAR_DUPLICATE_SIMILARITY,
            ),
            invalid_conversations: collect.invalid_conversations.or(InvalidMode::Error),
            format: collect.format.or(SegmentFormat::Arrow),
            validation_fraction: self.within(
                "collect.validation_fraction",
                &collect.validation_fraction,
                0.0..=0.5,
                if has_own { 0.0 } else { VALIDATION_FRACTION },
            ),
            split_by: self.split_by(collect),
            split_seed: collect.split_seed.or(0),
            parallel_fetches: self.within("collect.parallel_fetches", &collect.parallel_fetches, 1..=64, 8),
            fetch_timeout_seconds: self.within(
                "collect.fetch_timeout_seconds",
                &collect.fetch_timeout_seconds,
                1..=86_400,
                FETCH_TIMEOUT_SECONDS,
            ),
        };
        Some(spec)
    }

    /// Reports keys that say nothing of rows of this kind.
    fn of_other_kind(&mut self, collect: &CollectFile, kind: ContentKind) {
        fn place<T>(field: &Field<T>) -> Option<&Place> {
            field.given().map(|at| &at.place)
        }
        let of_code = [
            ("exclude_extensions", place(&collect.exclude_extensions)),
            ("exclude_path_parts", place(&collect.exclude_path_parts)),
            ("max_line_chars", place(&collect.max_line_chars)),
            ("max_mean_line_chars", place(&collect.max_mean_line_chars)),
            ("min_alphanumeric_fraction", place(&collect.min_alphanumeric_fraction)),
            ("keep_generated", place(&collect.keep_generated)),
            ("keep_lock_files", place(&collect.keep_lock_files)),
            ("keep_vendored", place(&collect.keep_vendored)),
            ("encodings", place(&collect.encodings)),
            ("allow_licenses", place(&collect.allow_licenses)),
            ("deny_licenses", place(&collect.deny_licenses)),
            ("notebooks", place(&collect.notebooks)),
            ("split_by", place(&collect.split_by)),
        ];
        let of_chat = [("invalid_conversations", place(&collect.invalid_conversations))];
        let (others, other) = match kind {
            ContentKind::Code => (&of_chat[..], "chat"),
            ContentKind::Chat => (&of_code[..], "code"),
        };
        for (key, place) in others {
            if let Some(place) = place {
                let message =
                    format!("collect.{key} is of use only with collect.kind: {other}: leave it out");
                self.sink.report(place, message);
            }
        }
    }

    fn split_by(&mut self, collect: &CollectFile) -> SplitBy {
        let word = collect.split_by.or(SplitWord::File);
        match (word, collect.validation_since.given()) {
            (SplitWord::File, None) => SplitBy::File,
            (SplitWord::Repository, None) => SplitBy::Repository,
            (SplitWord::Date, Some(At { value, place })) => {
                if day_start(value).is_none() {
                    let rule = "must be a day as YYYY-MM-DD, from 1970 on";
                    self.sink.report(place, format!("collect.validation_since {rule}, got {}", shown(value)));
                }
                SplitBy::Date(value.clone())
            }
            (SplitWord::Date, None) => {
                if let Field::Given(At { place, .. }) = &collect.split_by {
                    self.sink.report(place, "collect.split_by: date needs collect.validation_since, a day");
                }
                SplitBy::File
            }
            (_, Some(At { place, .. })) => {
                self.sink
                    .report(place, "collect.validation_since is of use only with collect.split_by: date");
                SplitBy::File
            }
        }
    }

    fn licenses(&mut self, key: &str, field: &Field<Vec<At<String>>>) -> Vec<String> {
        let Some(list) = field.given() else { return Vec::new() };
        let is_plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '.' | '+');
        for At { value, place } in &list.value {
            if value.is_empty() || !value.chars().all(is_plain) {
                let rule = "is no SPDX identifier such as Apache-2.0";
                self.sink.report(place, format!("collect.{key}: {} {rule}", shown(value)));
            }
        }
        list.value.iter().map(|at| at.value.clone()).collect()
    }

    fn extensions(&mut self, field: &Field<Vec<At<String>>>, default: Vec<String>) -> Vec<String> {
        let Some(list) = field.given() else { return default };
        let mut entries = Vec::with_capacity(list.value.len());
        for At { value, place } in &list.value {
            let entry = value.strip_prefix('.').unwrap_or(value).to_lowercase();
            if entry.is_empty() || entry.contains(['.', '/', '*']) {
                let rule = "is compared with the text after a file name's last dot";
                let message = format!(
                    "collect.exclude_extensions: {} {rule}: it can hold no \".\", \"/\" or \"*\"",
                    shown(value)
                );
                self.sink.report(place, message);
            }
            entries.push(entry);
        }
        entries
    }

    fn path_parts(&mut self, field: &Field<Vec<At<String>>>, default: Vec<String>) -> Vec<String> {
        let Some(list) = field.given() else { return default };
        let mut entries = Vec::with_capacity(list.value.len());
        for At { value, place } in &list.value {
            let entry = value.strip_suffix('/').unwrap_or(value);
            if entry.is_empty() || entry.contains(['/', '*']) {
                let rule = "is compared with whole names: it can hold no \"/\" or \"*\"";
                self.sink.report(place, format!("collect.exclude_path_parts: {} {rule}", shown(value)));
            }
            entries.push(entry.to_owned());
        }
        entries
    }
}

/// Whether a source brings its own held-out rows.
fn holds_out(sources: &Field<Vec<At<SourceFile>>>) -> bool {
    let sources = sources.given().map(|list| list.value.as_slice()).unwrap_or_default();
    sources.iter().any(|source| match &source.value {
        SourceFile::Table(table) => table.value.held_out.or(false),
        _ => false,
    })
}
