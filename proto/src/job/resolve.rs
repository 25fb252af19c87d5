//! What the user wrote, with defaults, to what is true: ranges and contradictions are checked
//! here, once, and reported at the place of the value.

use std::fmt::Display;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};

use super::diagnostic::{Place, Sink, shown};
use super::file::{
    CollectFile, DataFile, ExportFile, JobFile, ModelFile, SourceFile, TokenizerFile, TrainFile, WorkersFile,
};
use super::filters::default_filters;
use super::location;
use super::read::{At, Field};
use super::spec::*;
use crate::model::ModelConfig;

/// Every byte and each of the 19 special tokens has an entry.
const MIN_VOCAB_SIZE: u32 = 275;
/// More is a slip: the largest models use about a quarter of a million.
const MAX_VOCAB_SIZE: u32 = 1_000_000;
const MAX_STEPS: u64 = 1_000_000_000;
const MAX_RANKS: u32 = 1024;
const MAX_SOURCES: usize = 10_000;

/// The least that is above 0, for ranges that leave 0 out.
const ABOVE_0: f64 = f64::MIN_POSITIVE;
/// The greatest that is below 1, for ranges that leave 1 out.
const BELOW_1: f64 = 1.0 - f64::EPSILON / 2.0;

/// Turns `file` into a [`JobSpec`], or reports why it cannot be; reading went well so far.
pub(super) fn resolve(file: &JobFile, path: &Path, cwd: &Path, sink: &mut Sink) -> Option<JobSpec> {
    let cwd = location::absolute(Path::new("/"), &cwd.to_string_lossy());
    let file_dir = cwd.join(path);
    let file_dir = file_dir.parent().unwrap_or(&cwd).to_owned();
    let mut resolver = Resolver { sink, cwd, file_dir };

    let name = resolver.name(&file.name, path);
    let output = match file.output.given() {
        Some(output) => resolver.path(output),
        None => resolver.file_dir.join("runs").join(&name),
    };
    let dataset = resolver.dataset(file);
    let model = resolver.model(&file.model);
    // A preset's shape bounds other values. Of an existing model nothing is known here.
    let shape = match &model {
        Some(ModelSpec::Init { preset, .. }) => ModelConfig::preset(preset).ok(),
        _ => None,
    };
    let tokenizer = resolver.tokenizer(&file.tokenizer, model.as_ref(), shape.as_ref());
    let data = resolver.data(&file.data.or(DataFile::default()), shape.as_ref());
    let held_out = match &dataset {
        Some(DatasetSpec::Collect(collect)) => collect.validation_fraction > 0.0,
        _ => true,
    };
    let train = resolver.train(&file.train.or(TrainFile::default()), held_out);
    let workers = resolver.workers(&file.workers.or(WorkersFile::default()), train.ranks);
    let export = export(&file.export.or(ExportFile::default()));
    Some(JobSpec {
        name,
        output,
        dataset: dataset?,
        tokenizer: tokenizer?,
        model: model?,
        data,
        train,
        export,
        workers,
    })
}

struct Resolver<'a> {
    sink: &'a mut Sink,
    cwd: PathBuf,
    file_dir: PathBuf,
}

impl Resolver<'_> {
    fn report<T>(&mut self, place: &Place, message: impl Into<String>) -> Option<T> {
        self.sink.report(place, message);
        None
    }

    /// The value if it is within the range, else a report and `default`.
    fn within<T>(&mut self, key: &str, field: &Field<T>, range: RangeInclusive<T>, default: T) -> T
    where
        T: PartialOrd + Display + Copy,
    {
        let Some(At { value, place }) = field.given() else { return default };
        if !range.contains(value) {
            let (low, high) = (bound(range.start()), bound(range.end()));
            self.sink.report(place, format!("{key} must be {low} to {high}, got {value}"));
            return default;
        }
        *value
    }

    /// Relative paths begin at the job file; those of a `--set` argument, where the shell is.
    fn base(&self, place: &Place) -> &Path {
        match place {
            Place::File { .. } => &self.file_dir,
            Place::Override(_) => &self.cwd,
        }
    }

    fn path(&mut self, at: &At<String>) -> PathBuf {
        if at.value.starts_with('~') {
            self.sink.report(&at.place, "write the whole path: only a shell knows what ~ stands for");
        }
        location::absolute(self.base(&at.place), &at.value)
    }

    fn name(&mut self, field: &Field<String>, path: &Path) -> String {
        let stem = path.file_stem().map(|stem| stem.to_string_lossy().into_owned()).unwrap_or_default();
        let (name, place) = match field.given() {
            Some(at) => (at.value.clone(), &at.place),
            None => (stem, &Place::START),
        };
        let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
        if !name.chars().all(allowed)
            || !name.starts_with(|c: char| c.is_ascii_alphanumeric())
            || name.len() > 100
        {
            let rule = "name must begin with a letter or digit and hold at most 100 letters, digits, \
                        \"-\", \"_\" and \".\"";
            let advice = if field.is_absent() { " (taken from the file's name: write a name)" } else { "" };
            self.sink.report(place, format!("{rule}, got {}{advice}", shown(&name)));
        }
        name
    }

    fn dataset(&mut self, file: &JobFile) -> Option<DatasetSpec> {
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
            },
            notebooks: collect.notebooks.or(NotebookMode::CodeCells),
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

    fn model(&mut self, field: &Field<ModelFile>) -> Option<ModelSpec> {
        const NEEDED: &str =
            "model.path (a Hugging Face model directory) or model.init.preset (random weights)";
        let At { value: model, place } = match field {
            Field::Given(model) => model,
            Field::Wrong => return None,
            Field::Absent => return self.report(&Place::START, format!("lacks the model: give {NEEDED}")),
        };
        match (&model.path, &model.init) {
            (Field::Given(path), Field::Given(init)) => self.report(
                &init.place,
                format!("model.init and model.path ({}) contradict each other: keep one", path.place),
            ),
            (Field::Given(path), _) => Some(ModelSpec::Existing(self.path(path))),
            (_, Field::Given(At { value: init, place })) => match &init.preset {
                Field::Given(preset) => {
                    Some(ModelSpec::Init { preset: preset.value.0.to_owned(), seed: init.seed.or(0) })
                }
                Field::Absent => self.report(place, "model.init lacks preset"),
                Field::Wrong => None,
            },
            (Field::Absent, Field::Absent) => self.report(place, format!("lacks the model: give {NEEDED}")),
            _ => None,
        }
    }

    fn tokenizer(
        &mut self,
        field: &Field<TokenizerFile>,
        model: Option<&ModelSpec>,
        shape: Option<&ModelConfig>,
    ) -> Option<TokenizerSpec> {
        let preset_vocab = shape.and_then(|shape| u32::try_from(shape.vocab_size).ok());
        let file = match field {
            Field::Wrong => return None,
            Field::Absent => TokenizerFile::default(),
            Field::Given(at) => at.value.clone(),
        };
        let from_model = file.from_model.given().filter(|at| at.value);
        let ways = [
            file.train.given().map(|at| ("tokenizer.train", &at.place)),
            file.path.given().map(|at| ("tokenizer.path", &at.place)),
            from_model.map(|at| ("tokenizer.from_model", &at.place)),
        ];
        let mut given = ways.into_iter().flatten();
        if let (Some((first, first_place)), Some((second, place))) = (given.next(), given.next()) {
            return self.report(
                place,
                format!("{second} and {first} ({first_place}) contradict each other: keep one"),
            );
        }
        if let Some(path) = file.path.given() {
            return Some(TokenizerSpec::Existing(self.path(path)));
        }
        if let (Some(at), Some(ModelSpec::Init { .. })) = (from_model, model) {
            let rule = "contradicts model.init: random weights come with no tokenizer; give tokenizer.train";
            return self.report(&at.place, format!("tokenizer.from_model {rule}"));
        }
        if let (None, Some(ModelSpec::Existing(_)) | None) = (file.train.given(), model) {
            return Some(TokenizerSpec::FromModel);
        }
        let train = file.train.or(Default::default());
        let default = preset_vocab.unwrap_or(49_152);
        let range = MIN_VOCAB_SIZE..=MAX_VOCAB_SIZE;
        let vocab_size = self.within("tokenizer.train.vocab_size", &train.vocab_size, range, default);
        if let (Some(at), Some(most)) = (train.vocab_size.given(), preset_vocab)
            && vocab_size > most
        {
            let message = format!(
                "tokenizer.train.vocab_size is {vocab_size}, but the preset's embedding has {most} rows: \
                 give at most {most}"
            );
            return self.report(&at.place, message);
        }
        Some(TokenizerSpec::Train { vocab_size })
    }

    fn data(&mut self, data: &DataFile, shape: Option<&ModelConfig>) -> DataSpec {
        let positions = shape.and_then(|shape| u32::try_from(shape.max_positions).ok());
        let default = positions.map_or(2048, |most| most.min(2048));
        let sequence_tokens =
            self.within("data.sequence_tokens", &data.sequence_tokens, 8..=1 << 20, default);
        if let (Some(at), Some(most)) = (data.sequence_tokens.given(), positions)
            && sequence_tokens > most
        {
            let message =
                format!("data.sequence_tokens is {sequence_tokens}, but the preset has {most} positions");
            self.sink.report(&at.place, message);
        }
        let packing = data.packing.or(Packing::Continuous);
        let fim_level = match (packing, data.fim_level.given()) {
            (Packing::SeedCompatible, Some(At { value: FimLevel::Window, place })) => {
                let message = "data.fim_level window contradicts data.packing seed_compatible, whose token \
                               streams rearrange whole documents: write fim_level: document";
                self.sink.report(place, message);
                FimLevel::Document
            }
            (_, Some(at)) => at.value,
            (Packing::SeedCompatible, None) => FimLevel::Document,
            (Packing::Continuous, None) => FimLevel::Window,
        };
        DataSpec {
            sequence_tokens,
            fim_rate: self.within("data.fim_rate", &data.fim_rate, 0.0..=1.0, 0.5),
            fim_spm_rate: self.within("data.fim_spm_rate", &data.fim_spm_rate, 0.0..=1.0, 0.5),
            fim_level,
            packing,
            seed: data.seed.or(0),
        }
    }

    fn train(&mut self, train: &TrainFile, held_out: bool) -> TrainSpec {
        let steps = self.within("train.steps", &train.steps, 1..=MAX_STEPS, 2000);
        let warmup_steps =
            self.within("train.warmup_steps", &train.warmup_steps, 0..=MAX_STEPS, (steps / 10).min(30));
        if let Some(at) = train.warmup_steps.given()
            && warmup_steps > steps
        {
            let steps_are = match train.steps.given() {
                Some(at) => format!("train.steps is {steps} ({})", at.place),
                None => format!("train.steps is {steps} by default"),
            };
            let message =
                format!("train.warmup_steps is {warmup_steps}, but {steps_are}: warm-up would never end");
            self.sink.report(&at.place, message);
        }
        let default = if held_out { 100 } else { 0 };
        let eval_every_steps =
            self.within("train.eval_every_steps", &train.eval_every_steps, 0..=MAX_STEPS, default);
        if let Some(at) = train.eval_every_steps.given()
            && eval_every_steps > 0
            && !held_out
        {
            let message = format!(
                "train.eval_every_steps is {eval_every_steps}, but collect.validation_fraction is 0: no file \
                 is held out to evaluate on"
            );
            self.sink.report(&at.place, message);
        }
        let dropout =
            train.dropout.given().map(|_| self.within("train.dropout", &train.dropout, 0.0..=BELOW_1, 0.0));
        TrainSpec {
            ranks: self.within("train.ranks", &train.ranks, 1..=MAX_RANKS, 1),
            device: train.device.or(DeviceKind::Auto),
            precision: train.precision.or(Precision::Bf16),
            steps,
            micro_batch_sequences: self.within(
                "train.micro_batch_sequences",
                &train.micro_batch_sequences,
                1..=65_536,
                1,
            ),
            accumulate_micro_batches: self.within(
                "train.accumulate_micro_batches",
                &train.accumulate_micro_batches,
                1..=65_536,
                2,
            ),
            learning_rate: self.within("train.learning_rate", &train.learning_rate, ABOVE_0..=1.0, 5e-5),
            schedule: train.schedule.or(Schedule::Cosine),
            warmup_steps,
            weight_decay: self.within("train.weight_decay", &train.weight_decay, 0.0..=1.0, 0.01),
            betas: self.betas(&train.betas),
            epsilon: self.within("train.epsilon", &train.epsilon, ABOVE_0..=1.0, 1e-8),
            max_grad_norm: self.within("train.max_grad_norm", &train.max_grad_norm, 0.0..=1e9, 1.0),
            dropout,
            recompute: train.recompute.or(true),
            seed: train.seed.or(42),
            log_every_steps: self.within("train.log_every_steps", &train.log_every_steps, 1..=MAX_STEPS, 25),
            eval_every_steps,
            eval_sequences: self.within("train.eval_sequences", &train.eval_sequences, 1..=1 << 20, 64),
            checkpoint_every_steps: self.within(
                "train.checkpoint_every_steps",
                &train.checkpoint_every_steps,
                0..=MAX_STEPS,
                500,
            ),
            keep_checkpoints: self.within("train.keep_checkpoints", &train.keep_checkpoints, 1..=1000, 2),
        }
    }

    fn betas(&mut self, field: &Field<[f64; 2]>) -> (f64, f64) {
        let default = (0.9, 0.999);
        let Some(At { value: [beta1, beta2], place }) = field.given() else { return default };
        if ![beta1, beta2].into_iter().all(|beta| (0.0..1.0).contains(beta)) {
            let message = format!("train.betas must each be 0 to below 1, got [{beta1}, {beta2}]");
            self.sink.report(place, message);
            return default;
        }
        (*beta1, *beta2)
    }

    fn workers(&mut self, workers: &WorkersFile, ranks: u32) -> WorkersSpec {
        let coordinator = workers.coordinator.given().map(|At { value, place }| {
            let host = value.strip_prefix("http://").or_else(|| value.strip_prefix("https://"));
            if !host.is_some_and(|host| !host.is_empty() && !host.contains(['@', ' '])) {
                let rule = "must look like http://host:port, with no user or password";
                self.sink.report(place, format!("workers.coordinator {rule}, got {}", shown(value)));
            }
            value.clone()
        });
        let slots =
            workers.slots.given().map(|_| self.within("workers.slots", &workers.slots, 1..=MAX_RANKS, 1));
        if let (Some(at), Some(slots)) = (workers.slots.given(), slots) {
            if let Some(coordinator) = workers.coordinator.given() {
                let message = format!(
                    "workers.slots and workers.coordinator ({}) contradict each other: the control plane's \
                     workers have their own slots",
                    coordinator.place
                );
                self.sink.report(&at.place, message);
            } else if slots < ranks {
                let message = format!(
                    "workers.slots is {slots}, but train.ranks is {ranks}, and each rank needs a slot: give at \
                     least {ranks}"
                );
                self.sink.report(&at.place, message);
            }
        }
        let threads = &workers.threads_per_rank;
        let threads_per_rank =
            threads.given().map(|_| self.within("workers.threads_per_rank", threads, 1..=1024, 1));
        WorkersSpec { coordinator, slots, threads_per_rank }
    }
}

fn export(export: &ExportFile) -> ExportSpec {
    ExportSpec { enabled: export.enabled.or(true), dtype: export.dtype.or(Precision::Bf16) }
}

/// An end of a range, in words where the number is only the neighbour of what is meant.
fn bound<T: Display + PartialOrd>(value: &T) -> String {
    let text = value.to_string();
    match text.parse::<f64>() {
        Ok(number) if number == ABOVE_0 => "above 0".to_owned(),
        Ok(number) if number == BELOW_1 => "below 1".to_owned(),
        _ => text,
    }
}
