//! What the user wrote, with defaults, to what is true: ranges and contradictions are checked
//! here, once, and reported at the place of the value.

mod dataset;
mod sources;
mod model;
mod chat;
mod adapter;
mod train;
mod evaluate;
mod serve;
mod restart;

use std::fmt::Display;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};

use super::diagnostic::{Place, Sink, shown};
use super::file::{DataFile, ExportFile, JobFile, RestartFile, TrainFile, WorkersFile};
use super::location;
use super::read::{At, Field};
use super::spec::{DatasetSpec, JobSpec, ModelSpec, WorkersSpec};
use crate::model::ModelConfig;

const MAX_RANKS: u32 = 1024;

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
        Some(DatasetSpec::Collect(collect)) => collect.holds_out(),
        _ => true,
    };
    resolver.check_kind(file, dataset.as_ref(), &data);
    let adapter = resolver.adapter(&file.adapter, model.as_ref(), shape.as_ref());
    let train = resolver.train(&file.train.or(TrainFile::default()), held_out, adapter.is_some());
    let workers = resolver.workers(&file.workers.or(WorkersFile::default()), train.ranks);
    let mut export = resolver.export(&file.export.or(ExportFile::default()), adapter.as_ref());
    if train.steps == 0 {
        // Nothing is trained: what there is to evaluate is there.
        export.enabled = false;
        resolver.untrained(file);
    }
    let evaluate = resolver.evaluate(&file.evaluate, &train, &data, &export, adapter.as_ref());
    let serve = resolver.serve(&file.serve, &export, adapter.as_ref());
    let (priority, deadline_seconds) = resolver.urgency(file);
    let restart = resolver.restart(&file.restart.or(RestartFile::default()));
    Some(JobSpec {
        name,
        output,
        dataset: dataset?,
        tokenizer: tokenizer?,
        model: model?,
        data,
        adapter,
        train,
        export,
        evaluate,
        serve,
        workers,
        priority,
        deadline_seconds,
        restart,
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

    /// A job that trains nothing evaluates a model, and does nothing else.
    fn untrained(&mut self, file: &JobFile) {
        let place = file.train.given().and_then(|train| train.value.steps.given()).map(|at| at.place.clone());
        let place = place.unwrap_or(Place::START);
        if file.evaluate.given().is_none() {
            self.sink
                .report(&place, "train.steps is 0, and there is no `evaluate`: the job would do nothing");
        }
        if let Some(at) = file.adapter.given() {
            let message = "train.steps is 0: name an adapter that was trained in evaluate.adapter, and leave `adapter` out";
            self.sink.report(&at.place, message);
        }
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

    fn workers(&mut self, workers: &WorkersFile, ranks: u32) -> WorkersSpec {
        let coordinator = workers.coordinator.given().map(|At { value, place }| {
            let host = value.strip_prefix("http://");
            if !host.is_some_and(|host| !host.is_empty() && !host.contains(['@', ' '])) {
                let rule = "must look like http://host:port, with no user or password";
                // What stands before an @ is a secret.
                let got = if value.contains('@') { String::new() } else { format!(", got {}", shown(value)) };
                self.sink.report(place, format!("workers.coordinator {rule}{got}"));
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
        let price = &workers.price_per_hour;
        let price_per_hour =
            price.given().map(|_| self.within("workers.price_per_hour", price, 0.0..=1e6, 0.0));
        WorkersSpec { coordinator, slots, threads_per_rank, price_per_hour }
    }
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
