//! `dataset` and `collect`: where the files to learn from come from.

use super::Resolver;
use crate::job::diagnostic::{Place, shown};
use crate::job::file::{CollectFile, JobFile, SourceFile};
use crate::job::filters::default_filters;
use crate::job::location;
use crate::job::read::{At, Field};
use crate::job::spec::{
    CollectSpec, DatasetSpec, DuplicateMode, FilterSpec, NEAR_DUPLICATE_SIMILARITY, NotebookMode, SecretMode,
    SegmentFormat, SourceSpec,
};

const MAX_SOURCES: usize = 10_000;

impl Resolver<'_> {
    pub(super) fn dataset(&mut self, file: &JobFile) -> Option<DatasetSpec> {
        match (&file.dataset, &file.collect) {
            (Field::Given(dataset), Field::Given(collect)) => self.report(
                &dataset.place,
                format!("dataset and collect ({}) contradict each other: keep one", collect.place),
            ),
            (Field::Given(dataset), _) => Some(DatasetSpec::Existing(self.path(dataset))),
            (_, Field::Given(collect)) => self.collect(collect).map(DatasetSpec::Collect),
            (Field::Absent, Field::Absent) => self.report(
                &Place::START,
                "lacks the code to learn from: give collect.sources (repositories) or dataset (a directory)",
            ),
            _ => None,
        }
    }

    fn collect(&mut self, At { value: collect, place }: &At<CollectFile>) -> Option<CollectSpec> {
        let filters = default_filters();
        let spec = CollectSpec {
            sources: self.sources(&collect.sources, place).unwrap_or_default(),
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
            },
            notebooks: collect.notebooks.or(NotebookMode::CodeCells),
            secrets: collect.secrets.or(SecretMode::Redact),
            keep_email_addresses: collect.keep_email_addresses.or(false),
            duplicates: collect.duplicates.or(DuplicateMode::DropNear),
            near_duplicate_similarity: self.within(
                "collect.near_duplicate_similarity",
                &collect.near_duplicate_similarity,
                0.1..=1.0,
                NEAR_DUPLICATE_SIMILARITY,
            ),
            format: collect.format.or(SegmentFormat::Arrow),
            validation_fraction: self.within(
                "collect.validation_fraction",
                &collect.validation_fraction,
                0.0..=0.5,
                0.005,
            ),
            split_seed: collect.split_seed.or(0),
            parallel_fetches: self.within("collect.parallel_fetches", &collect.parallel_fetches, 1..=64, 8),
        };
        Some(spec)
    }

    fn sources(&mut self, field: &Field<Vec<At<SourceFile>>>, section: &Place) -> Option<Vec<SourceSpec>> {
        let At { value: list, place } = match field {
            Field::Given(list) => list,
            Field::Wrong => return None,
            Field::Absent => return self.report(section, "collect lacks sources: a list of repositories"),
        };
        if list.is_empty() || list.len() > MAX_SOURCES {
            let message =
                format!("collect.sources must hold 1 to {MAX_SOURCES} repositories, got {}", list.len());
            return self.report(place, message);
        }
        let mut sources: Vec<SourceSpec> = Vec::with_capacity(list.len());
        let mut seen = std::collections::HashMap::new();
        for (index, At { value: SourceFile { location: at, revision }, place }) in list.iter().enumerate() {
            let location = match location::resolve(&at.value, self.base(&at.place)) {
                Ok(location) => location,
                Err(rule) => {
                    self.sink.report(&at.place, format!("collect.sources[{index}]: {rule}"));
                    continue;
                }
            };
            let source = SourceSpec { location, revision: revision.given().map(|at| at.value.clone()) };
            let key = (source.location.clone(), source.revision.clone());
            if let Some(first) = seen.insert(key, place) {
                let message = format!(
                    "collect.sources[{index}]: {} was given already ({first})",
                    shown(&source.location)
                );
                self.sink.report(place, message);
            }
            sources.push(source);
        }
        Some(sources)
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
