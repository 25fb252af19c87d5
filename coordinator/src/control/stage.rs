//! Whether a stage has to run: each leaves `<output>/stages/<stage>.json`, with the digest of its
//! settings and of its inputs' content. Digests chain: a new dataset means a new tokenizer.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use tunefleet_proto::chat::TEMPLATE_FILE;
use tunefleet_proto::evaluation::{self, EVALUATION_FILE};
use tunefleet_proto::job::{
    AdapterSpec, ChatTemplate, DatasetSpec, Exam, JobSpec, MergeBase, ModelSpec, Optimizer, Precision,
    Schedule, TokenizerSpec,
};
use tunefleet_proto::model::ModelConfig;
use tunefleet_proto::rpc::{Continuation, Stage};
use tunefleet_proto::{adapter, checkpoint, dataset};

use super::job::Verdict;

/// Directory of the stages' records inside the job's output.
const RECORDS_DIR: &str = "stages";
const RECORD_VERSION: u32 = 1;
/// Directories of a job's own evaluations: of what it trained, and of what that was before.
const JOB_EVALUATIONS: [&str; 2] = [evaluation::TUNED, evaluation::BASE];
/// Of a weights file, so many pieces of so many bytes are hashed, spread evenly from its beginning
/// to its end: whole files are too large to read at every launch.
const SAMPLES: u64 = 32;
const SAMPLE_BYTES: u64 = 1 << 20;

/// Why a stage cannot be judged or begun.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// An operation on a file.
    #[error("{what} {path}: {cause}")]
    Io {
        /// What was being done.
        what: &'static str,
        /// To which file.
        path: PathBuf,
        /// What the system said.
        #[source]
        cause: std::io::Error,
    },
    /// A file that should be ours and is not.
    #[error("{path}: not readable as {what}: {cause}")]
    Format {
        /// Which file.
        path: PathBuf,
        /// What it should be.
        what: &'static str,
        /// What the parser said.
        cause: String,
    },
    /// A preset that does not exist.
    #[error(transparent)]
    Model(#[from] tunefleet_proto::model::Error),
    /// The repositories could not be looked at.
    #[error("{0}")]
    Collect(#[from] crate::collect::Error),
    /// Training stopped before its last step.
    #[error(
        "{dir} holds the unfinished training of an earlier attempt (step {step} of {steps}): \
         pass --resume to continue it, or --fresh to discard it"
    )]
    Unfinished {
        /// The checkpoints.
        dir: PathBuf,
        /// Updates done.
        step: u64,
        /// Updates asked for.
        steps: u64,
    },
    /// Checkpoints of other settings or other data.
    #[error(
        "{dir} holds checkpoints of another model, dataset, tokenizer or training settings: \
         pass --fresh to discard them, or set another `output`"
    )]
    Foreign {
        /// The checkpoints.
        dir: PathBuf,
    },
    /// A stage said that it is done and its output is not there.
    #[error("{stage} ended without its output {path}")]
    NoOutput {
        /// Which stage.
        stage: &'static str,
        /// What is missing.
        path: PathBuf,
    },
}

#[derive(Debug, Serialize, Deserialize)]
struct Record {
    version: u32,
    stage: String,
    digest: String,
    complete: bool,
}

/// Decides whether the stage has to run, and clears the way when it has: from then on, until
/// [`record`], its output does not count as done.
///
/// # Errors
/// See [`Error`].
pub fn prepare(spec: &JobSpec, continuation: Continuation, stage: Stage) -> Result<Verdict, Error> {
    if stage == Stage::Collect {
        // What only the last stages need is missed before hours of training, and not after.
        look_for_questions(spec)?;
    }
    if !is_asked_for(spec, stage) {
        return Ok(Verdict::Absent);
    }
    if stage == Stage::Serve {
        // Never done, and never refused for what is there.
        return Ok(Verdict::Run { resume: false });
    }
    let dir = output_dir(spec, stage);
    if stage == Stage::Train && continuation == Continuation::Fresh && dir.exists() {
        std::fs::remove_dir_all(&dir).map_err(io("removing", &dir))?;
    }
    let found = read_record(spec, stage)?;
    if stage == Stage::Collect && continuation == Continuation::Resume && is_training(spec)? {
        // What is being trained on stays pinned, whatever has been pushed since.
        if found.as_ref().is_some_and(|found| found.complete) && missing_output(spec, stage).is_none() {
            return match collected_as_asked(spec)? {
                true => Ok(Verdict::Cached),
                false => Err(Error::Foreign { dir: spec.checkpoints_dir() }),
            };
        }
    }
    let digest = digest(spec, stage)?;
    // What was fetched stays what it was, until it is asked to be looked for anew.
    let looks_again = stage == Stage::InitModel
        && continuation == Continuation::Fresh
        && matches!(spec.model, ModelSpec::Hub { .. });
    let same = !looks_again && found.as_ref().is_some_and(|found| found.digest == digest);
    let complete = found.as_ref().is_some_and(|found| found.complete);
    if same && complete && missing_output(spec, stage).is_none() {
        return Ok(Verdict::Cached);
    }
    if stage < Stage::Train && continuation != Continuation::Fresh {
        keep_what_is_trained_on(spec, continuation, same)?;
    }
    let mut resume = false;
    if stage == Stage::Train
        && let Some(step) = newest_checkpoint(&dir)?
    {
        if !same {
            return Err(Error::Foreign { dir });
        }
        if continuation != Continuation::Resume {
            return Err(Error::Unfinished { dir, step, steps: spec.train.steps });
        }
        resume = true;
    }
    if stage == Stage::Evaluate && !same {
        // Of another model, or other questions: nothing of it is kept.
        for of in JOB_EVALUATIONS {
            let dir = dir.join(of);
            if dir.exists() {
                std::fs::remove_dir_all(&dir).map_err(io("removing", &dir))?;
            }
        }
    }
    write_record(spec, stage, digest, false)?;
    Ok(Verdict::Run { resume })
}

/// Refuses to make anew what unfinished or finished checkpoints were trained on: they could never be
/// resumed, or would lie beside a tokenizer that is not theirs.
fn keep_what_is_trained_on(spec: &JobSpec, continuation: Continuation, same: bool) -> Result<(), Error> {
    let dir = spec.checkpoints_dir();
    let Some(step) = newest_checkpoint(&dir)? else { return Ok(()) };
    if continuation == Continuation::Unspecified && is_training(spec)? {
        return Err(Error::Unfinished { dir, step, steps: spec.train.steps });
    }
    if same { Ok(()) } else { Err(Error::Foreign { dir }) }
}

/// Whether the dataset that is there was collected with the job's settings, whatever its commits.
fn collected_as_asked(spec: &JobSpec) -> Result<bool, Error> {
    match &spec.dataset {
        DatasetSpec::Collect(collect) => {
            let manifest = dataset_manifest(&spec.dataset_dir())?;
            Ok(crate::collect::was_asked_for(collect, &manifest)?)
        }
        DatasetSpec::Existing(_) => Ok(true),
    }
}

/// Notes that the stage is complete, after a look at its output.
///
/// # Errors
/// [`Error::NoOutput`] when it is not there, and see [`Error`].
pub fn record(spec: &JobSpec, stage: Stage) -> Result<(), Error> {
    if stage == Stage::Serve {
        return Ok(());
    }
    if let Some(path) = missing_output(spec, stage) {
        return Err(Error::NoOutput { stage: stage.name(), path });
    }
    // The digest of the inputs that it began with, which a later change must not rewrite.
    let digest = match read_record(spec, stage)? {
        Some(begun) => begun.digest,
        None => digest(spec, stage)?,
    };
    write_record(spec, stage, digest, true)
}

/// Where a stage leaves its output.
pub fn output_dir(spec: &JobSpec, stage: Stage) -> PathBuf {
    match stage {
        Stage::Collect => spec.dataset_dir(),
        Stage::Tokenizer => spec.base_tokenizer_dir(),
        Stage::InitModel => spec.model_dir(),
        Stage::Train => spec.checkpoints_dir(),
        Stage::Export if spec.adapter.is_some() => spec.adapter_dir(),
        Stage::Export => spec.export_dir(),
        Stage::Evaluate => spec.evaluations_dir(),
        Stage::Serve | Stage::Unspecified => spec.output.clone(),
    }
}

fn is_asked_for(spec: &JobSpec, stage: Stage) -> bool {
    match stage {
        Stage::Collect => matches!(spec.dataset, DatasetSpec::Collect(_)),
        Stage::Tokenizer => matches!(spec.tokenizer, TokenizerSpec::Train { .. }),
        Stage::InitModel => {
            spec.data.chat.is_some() || matches!(spec.model, ModelSpec::Hub { .. } | ModelSpec::Init { .. })
        }
        Stage::Train => spec.train.steps > 0,
        Stage::Export => spec.export.enabled,
        Stage::Evaluate => spec.evaluate.is_some(),
        Stage::Serve => spec.serve.is_some(),
        Stage::Unspecified => false,
    }
}

/// The first evaluation that was asked for and is not there.
fn missing_evaluation(spec: &JobSpec) -> Option<PathBuf> {
    let evaluate = spec.evaluate.as_ref()?;
    let exams = evaluate.exams(spec.dataset_dir());
    let [tuned, base] = JOB_EVALUATIONS;
    let of = [tuned].into_iter().chain(evaluate.base.then_some(base));
    let files = of.flat_map(|of| {
        exams.iter().map(move |(name, _)| spec.evaluations_dir().join(of).join(name).join(EVALUATION_FILE))
    });
    files.into_iter().find(|file| !file.is_file())
}

/// Whether the tasks and datasets of a job's evaluations are there.
fn look_for_questions(spec: &JobSpec) -> Result<(), Error> {
    for (_, exam) in spec.evaluate.iter().flat_map(|evaluate| evaluate.exams(spec.dataset_dir())) {
        let path = match exam {
            Exam::Humaneval(tasks) | Exam::Infilling(tasks) => tasks,
            Exam::Files(_, true) => continue,
            Exam::Files(dataset, false) => dataset.join(dataset::MANIFEST_FILE),
        };
        std::fs::metadata(&path).map_err(io("looking for what `evaluate` names:", &path))?;
    }
    Ok(())
}

/// What a job's evaluations follow from: its model, and what is asked.
fn evaluated(spec: &JobSpec) -> Result<Vec<String>, Error> {
    let mut inputs =
        vec![serde_json::to_string(&spec.evaluate).unwrap_or_default(), model_digest(&spec.model_dir())?];
    let adapters = spec.evaluate.as_ref().and_then(|evaluate| evaluate.adapter.clone());
    if let Some(dir) = adapters {
        inputs.push(file_digest(&dir.join(adapter::CONFIG_FILE))?);
        inputs.push(file_digest(&dir.join(adapter::WEIGHTS_FILE))?);
    }
    if spec.train.steps > 0 {
        inputs.push(digest(spec, Stage::Export)?);
    }
    for (_, exam) in spec.evaluate.iter().flat_map(|evaluate| evaluate.exams(spec.dataset_dir())) {
        inputs.push(match exam {
            Exam::Humaneval(tasks) | Exam::Infilling(tasks) => file_digest(&tasks)?,
            Exam::Files(dataset, _) => dataset_manifest(&dataset)?.digest(),
        });
    }
    Ok(inputs)
}

/// The first file of a complete output that is not there.
fn missing_output(spec: &JobSpec, stage: Stage) -> Option<PathBuf> {
    let dir = output_dir(spec, stage);
    let file = match stage {
        Stage::Collect => dir.join(dataset::MANIFEST_FILE),
        Stage::Tokenizer => dir.join("tokenizer.json"),
        Stage::Export if spec.adapter.is_some() => dir.join(adapter::CONFIG_FILE),
        Stage::InitModel | Stage::Export => dir.join("config.json"),
        Stage::Train => match trained(spec) {
            Some(_) => return None,
            None => dir.join(checkpoint::dir_name(spec.train.steps)).join(checkpoint::MANIFEST_FILE),
        },
        Stage::Evaluate => return missing_evaluation(spec),
        Stage::Serve | Stage::Unspecified => return None,
    };
    if !file.is_file() {
        return Some(file);
    }
    let is_weights = |path: &PathBuf| path.extension().is_some_and(|e| e == "safetensors" || e == "bin");
    let weights_missing = matches!(stage, Stage::InitModel | Stage::Export)
        && !entries(&dir).is_ok_and(|files| files.iter().any(is_weights));
    let segments_missing = || {
        let manifest = dataset_manifest(&dir).ok()?;
        let segments = manifest.train.iter().chain(&manifest.validation);
        segments.map(|segment| dir.join(&segment.file)).find(|path| !path.is_file())
    };
    let merged = spec.export_dir().join("config.json");
    match stage {
        _ if weights_missing => Some(dir.join("*.safetensors")),
        Stage::Export if spec.export.merge != MergeBase::None && !merged.is_file() => Some(merged),
        Stage::Collect => segments_missing(),
        _ => None,
    }
}

/// Whether an earlier attempt left checkpoints of a training that is not complete.
fn is_training(spec: &JobSpec) -> Result<bool, Error> {
    let complete = read_record(spec, Stage::Train)?.is_some_and(|record| record.complete);
    Ok(!complete && newest_checkpoint(&spec.checkpoints_dir())?.is_some())
}

/// What the stage's output follows from.
fn digest(spec: &JobSpec, stage: Stage) -> Result<String, Error> {
    match stage {
        Stage::Collect => match &spec.dataset {
            DatasetSpec::Collect(collect) => Ok(chain(stage, &crate::collect::input_digest(collect)?)),
            DatasetSpec::Existing(dir) => Ok(dataset_manifest(dir)?.digest()),
        },
        Stage::Tokenizer => {
            Ok(chain(stage, &(&spec.tokenizer, dataset_manifest(&spec.dataset_dir())?.digest())))
        }
        Stage::InitModel => {
            let base = match &spec.model {
                ModelSpec::Init { preset, seed } => {
                    let tokenizer = match spec.tokenizer {
                        TokenizerSpec::FromModel => None,
                        _ => Some(file_digest(&base_tokenizer_file(spec))?),
                    };
                    chain(stage, &(ModelConfig::preset(preset)?.to_json(""), seed, tokenizer))
                }
                ModelSpec::Hub { repo, revision } => chain(stage, &(repo, revision)),
                ModelSpec::Existing(dir) => model_digest(dir)?,
            };
            let Some(chat) = &spec.data.chat else { return Ok(base) };
            let tokenizer = match spec.tokenizer {
                // It comes with the model.
                TokenizerSpec::FromModel => None,
                _ => Some(file_digest(&base_tokenizer_file(spec))?),
            };
            let template = match &chat.template {
                ChatTemplate::File(path) => Some(file_digest(path)?),
                ChatTemplate::BuiltIn(_) | ChatTemplate::FromModel => None,
            };
            Ok(chain(stage, &(base, tokenizer, chat, template)))
        }
        Stage::Train => {
            let inputs = (
                dataset_manifest(&spec.dataset_dir())?.digest(),
                file_digest(&tokenizer_file(spec))?,
                model_digest(&spec.model_dir())?,
            );
            let template =
                spec.data.chat.as_ref().map(|_| file_digest(&spec.model_dir().join(TEMPLATE_FILE)));
            match template.transpose()? {
                None => Ok(chain(stage, &(inputs, &spec.data, TrainIdentity::of(spec)))),
                Some(template) => Ok(chain(stage, &(inputs, template, &spec.data, TrainIdentity::of(spec)))),
            }
        }
        Stage::Export => {
            let last = checkpoint::dir_name(trained(spec).unwrap_or(spec.train.steps));
            let weights = file_digest(&spec.checkpoints_dir().join(last).join(checkpoint::MANIFEST_FILE))?;
            Ok(chain(stage, &(weights, file_digest(&tokenizer_file(spec))?, &spec.export)))
        }
        Stage::Evaluate => Ok(chain(stage, &evaluated(spec)?)),
        Stage::Serve | Stage::Unspecified => Ok(String::new()),
    }
}

/// The training settings that decide the weights. How often something is logged or saved, on how
/// many ranks and in how many pieces a step is computed may change between attempts.
#[derive(Serialize)]
struct TrainIdentity {
    step_sequences: u64,
    steps: u64,
    precision: Precision,
    learning_rate: f64,
    schedule: Schedule,
    #[serde(skip_serializing_if = "Option::is_none")]
    schedule_end: Option<(f64, f64)>,
    warmup_steps: u64,
    weight_decay: f64,
    betas: (f64, f64),
    epsilon: f64,
    max_grad_norm: f64,
    dropout: Option<f64>,
    seed: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    reduce_precision: Option<Precision>,
    #[serde(skip_serializing_if = "Option::is_none")]
    optimizer: Option<Optimizer>,
    #[serde(skip_serializing_if = "Option::is_none")]
    adapter: Option<AdapterSpec>,
}

impl TrainIdentity {
    fn of(spec: &JobSpec) -> Self {
        let train = &spec.train;
        TrainIdentity {
            step_sequences: spec.step_sequences(),
            steps: train.steps,
            precision: train.precision,
            learning_rate: train.learning_rate,
            schedule: train.schedule,
            schedule_end: Some((train.final_learning_rate, train.schedule_power))
                .filter(|end| *end != (0.0, 1.0)),
            warmup_steps: train.warmup_steps,
            weight_decay: train.weight_decay,
            betas: train.betas,
            epsilon: train.epsilon,
            max_grad_norm: train.max_grad_norm,
            dropout: train.dropout,
            seed: train.seed,
            // Paged moments are the same numbers elsewhere.
            reduce_precision: Some(train.reduce_precision).filter(|precision| *precision != Precision::Fp32),
            optimizer: Some(train.optimizer).filter(|optimizer| *optimizer == Optimizer::AdamW8bit),
            adapter: spec.adapter.clone().map(|mut adapter| {
                // For people; the model's own digest is part of the inputs.
                adapter.lora.base_model = None;
                adapter
            }),
        }
    }
}

fn chain(stage: Stage, inputs: &impl Serialize) -> String {
    // Plain data with string keys: this cannot fail, and an empty text would only cause a rerun.
    let json = serde_json::to_string(inputs).unwrap_or_default();
    tunefleet_proto::digest_hex(format!("{}\n{json}", stage.name()).as_bytes())
}

fn tokenizer_file(spec: &JobSpec) -> PathBuf {
    file_of_tokenizer(spec.tokenizer_dir())
}

fn base_tokenizer_file(spec: &JobSpec) -> PathBuf {
    file_of_tokenizer(spec.base_tokenizer_dir())
}

fn file_of_tokenizer(path: PathBuf) -> PathBuf {
    if path.is_file() { path } else { path.join("tokenizer.json") }
}

fn dataset_manifest(dir: &Path) -> Result<dataset::Manifest, Error> {
    let path = dir.join(dataset::MANIFEST_FILE);
    let text = std::fs::read_to_string(&path).map_err(io("reading", &path))?;
    serde_json::from_str(&text).map_err(|e| Error::Format {
        path,
        what: "a dataset manifest",
        cause: e.to_string(),
    })
}

fn file_digest(path: &Path) -> Result<String, Error> {
    Ok(tunefleet_proto::digest_hex(&std::fs::read(path).map_err(io("reading", path))?))
}

/// Shape and weights of a Hugging Face directory.
fn model_digest(dir: &Path) -> Result<String, Error> {
    let mut hasher = Sha256::new();
    hasher.update(file_digest(&dir.join("config.json"))?);
    for path in weight_files(dir)? {
        hasher.update(path.file_name().unwrap_or_default().as_encoded_bytes());
        let sample = || -> std::io::Result<Vec<u8>> {
            let mut file = File::open(&path)?;
            let bytes = file.metadata()?.len();
            let mut sample = bytes.to_le_bytes().to_vec();
            let last = bytes.saturating_sub(SAMPLE_BYTES);
            for piece in 0..SAMPLES {
                let begin = u128::from(last) * u128::from(piece) / u128::from(SAMPLES - 1);
                file.seek(SeekFrom::Start(begin as u64))?;
                Read::by_ref(&mut file).take(SAMPLE_BYTES).read_to_end(&mut sample)?;
            }
            Ok(sample)
        };
        hasher.update(sample().map_err(io("reading", &path))?);
    }
    Ok(tunefleet_proto::hex(&hasher.finalize()))
}

/// The files that a worker reads weights from: safetensors, or where there are none, PyTorch's.
fn weight_files(dir: &Path) -> Result<Vec<PathBuf>, Error> {
    let mut files = entries(dir)?;
    files.sort();
    let ends_in = |path: &Path, extension: &str| path.extension().is_some_and(|e| e == extension);
    let is_torch = |path: &Path| {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        name.starts_with("pytorch_model") && ends_in(path, "bin")
    };
    // As the worker decides; what else ends so, an adapter's file say, decides nothing.
    let safetensors = ["model.safetensors", "model.safetensors.index.json"];
    if safetensors.iter().any(|name| dir.join(name).exists()) {
        files.retain(|path| ends_in(path, "safetensors"));
    } else {
        files.retain(|path| is_torch(path));
    }
    Ok(files)
}

/// Updates in the checkpoint that the finished training has come to.
fn trained(spec: &JobSpec) -> Option<u64> {
    let entries = std::fs::read_dir(spec.checkpoints_dir()).ok()?;
    let manifest = |entry: std::io::Result<std::fs::DirEntry>| -> Option<checkpoint::Manifest> {
        let path = entry.ok()?.path();
        checkpoint::step_of_dir_name(path.file_name()?.to_str()?)?;
        serde_json::from_slice(&std::fs::read(path.join(checkpoint::MANIFEST_FILE)).ok()?).ok()
    };
    let manifests: Vec<_> = entries.filter_map(manifest).collect();
    checkpoint::result(&manifests, spec.train.keep_best, spec.train.steps).map(|result| result.step)
}

/// Updates in the newest complete checkpoint.
fn newest_checkpoint(dir: &Path) -> Result<Option<u64>, Error> {
    if !dir.exists() {
        return Ok(None);
    }
    let complete = |path: &PathBuf| path.join(checkpoint::MANIFEST_FILE).is_file();
    let steps = entries(dir)?.into_iter().filter(complete);
    Ok(steps.filter_map(|path| checkpoint::step_of_dir_name(path.file_name()?.to_str()?)).max())
}

fn entries(dir: &Path) -> Result<Vec<PathBuf>, Error> {
    let list = || -> std::io::Result<Vec<PathBuf>> {
        std::fs::read_dir(dir)?.map(|entry| Ok(entry?.path())).collect()
    };
    list().map_err(io("listing", dir))
}

fn record_path(spec: &JobSpec, stage: Stage) -> PathBuf {
    spec.output.join(RECORDS_DIR).join(format!("{}.json", stage.name()))
}

fn read_record(spec: &JobSpec, stage: Stage) -> Result<Option<Record>, Error> {
    let path = record_path(spec, stage);
    match std::fs::read_to_string(&path) {
        Ok(text) => {
            // A damaged record says nothing: the stage is judged as if it had never run.
            let record = serde_json::from_str::<Record>(&text).ok();
            Ok(record.filter(|record| record.version == RECORD_VERSION))
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(io("reading", &path)(error)),
    }
}

fn write_record(spec: &JobSpec, stage: Stage, digest: String, complete: bool) -> Result<(), Error> {
    let record = Record { version: RECORD_VERSION, stage: stage.name().to_owned(), digest, complete };
    let text = serde_json::to_string_pretty(&record).unwrap_or_default() + "\n";
    let path = record_path(spec, stage);
    let incomplete = path.with_extension("json.incomplete");
    let write = || {
        std::fs::create_dir_all(spec.output.join(RECORDS_DIR))?;
        let mut file = File::create(&incomplete)?;
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        std::fs::rename(&incomplete, &path)
    };
    write().map_err(io("writing", &path))
}

fn io(what: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> Error {
    let path = path.to_owned();
    move |cause| Error::Io { what, path, cause }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn other_weights_of_either_format_are_another_model() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| std::fs::write(dir.path().join(name), text).unwrap();
        let digest = || model_digest(dir.path()).unwrap();
        write("config.json", "{}");
        write("adapter_model.safetensors", "no weights of a model");
        write("pytorch_model-00001-of-00001.bin", "weights");
        let torch = digest();
        write("training_args.bin", "no weights");
        assert_eq!(digest(), torch);
        write("pytorch_model-00001-of-00001.bin", "others");
        assert_ne!(digest(), torch);

        // A worker reads safetensors where both are there.
        write("model.safetensors", "weights");
        let safetensors = digest();
        write("pytorch_model-00001-of-00001.bin", "weights");
        assert_eq!(digest(), safetensors);
        write("model.safetensors", "others");
        assert_ne!(digest(), safetensors);
    }
}
