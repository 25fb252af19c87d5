//! A job's output directory, as the control plane uses it: one live job in it, a directory of logs for each
//! attempt, `metrics.jsonl`, and the start command that follows from the files there.

use std::fs::File;
use std::path::{Path, PathBuf};

use tunefleet_proto::ids::Attempt;
use tunefleet_proto::job::JobSpec;
use tunefleet_proto::model::ModelConfig;
use tunefleet_proto::rpc::{Stage, StartTask};

use super::fleet::Start;
use super::metrics_log::MetricsLog;
use crate::plan::Flops;

/// Why a directory cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum OutputError {
    /// An operation on it.
    #[error("output {dir}: {cause}")]
    Io {
        /// The directory.
        dir: PathBuf,
        /// What the system said.
        #[source]
        cause: std::io::Error,
    },
    /// Somebody else's.
    #[error("{0}: another job runs in this directory: wait for it, or set another `output`")]
    Taken(PathBuf),
}

/// The directory of an active job: nobody else uses it.
pub struct Output {
    /// Values that are logged.
    pub log: MetricsLog,
    _lock: File,
}

impl Output {
    /// Takes the directory, which is made where it is not there.
    ///
    /// # Errors
    /// See [`OutputError`].
    pub fn open(dir: &Path) -> Result<Self, OutputError> {
        let io = |cause| OutputError::Io { dir: dir.to_owned(), cause };
        let log = MetricsLog::open(dir).map_err(io)?;
        let path = dir.join(".lock");
        let lock = File::create(&path).map_err(io)?;
        match lock.try_lock() {
            Ok(()) => Ok(Output { log, _lock: lock }),
            Err(std::fs::TryLockError::WouldBlock) => Err(OutputError::Taken(path)),
            Err(std::fs::TryLockError::Error(cause)) => Err(io(cause)),
        }
    }
}

/// Number of the newest attempt that has left logs in `output`, 0 when none has: numbers go on where an
/// earlier coordinator stopped.
///
/// # Errors
/// When the directory cannot be read.
pub fn newest_attempt(output: &Path) -> Result<u32, OutputError> {
    let io = |cause| OutputError::Io { dir: output.to_owned(), cause };
    let entries = match std::fs::read_dir(output.join("logs")) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(0),
        Err(error) => return Err(io(error)),
    };
    let mut newest = 0;
    for entry in entries {
        let name = entry.map_err(io)?.file_name();
        let number = name.to_str().and_then(|name| name.strip_prefix("attempt-")?.parse::<u32>().ok());
        newest = newest.max(number.unwrap_or(0));
    }
    Ok(newest)
}

/// Makes the directory of an attempt's logs, with what it was asked to do, for people who look later. It
/// is also the fence: ranks of an older attempt see it, and finish no checkpoint any more.
///
/// # Errors
/// When it cannot be written.
pub fn begin_attempt(spec: &JobSpec, attempt: Attempt) -> Result<(), OutputError> {
    let dir = attempt_dir(&spec.output, attempt);
    let write = || {
        std::fs::create_dir_all(&dir)?;
        std::fs::write(dir.join("job.json"), serde_json::to_vec_pretty(spec)?)
    };
    write().map_err(|cause| OutputError::Io { dir: dir.clone(), cause })
}

/// Where the logs of an attempt's ranks are.
pub fn attempt_dir(output: &Path, attempt: Attempt) -> PathBuf {
    output.join("logs").join(format!("attempt-{}", attempt.0))
}

/// The whole of a start command.
///
/// # Errors
/// In words, when the model's shape cannot be read.
pub fn start_task(spec: &JobSpec, spec_json: &str, start: Start) -> Result<StartTask, String> {
    let Start { task, ranks, world, resume, cuda } = start;
    let (is_train, has_all_ranks) = (task.stage() == Stage::Train, task.stage().has_all_ranks());
    let log_dir = attempt_dir(&spec.output, Attempt(task.attempt)).display().to_string();
    Ok(StartTask {
        task: Some(task),
        spec_json: spec_json.to_owned(),
        shard_plan_json: if is_train { shard_plan(spec)? } else { String::new() },
        world,
        ranks,
        resume,
        log_dir,
        cuda,
        threads: if has_all_ranks { spec.workers.threads_per_rank.unwrap_or(0) } else { 0 },
    })
}

/// The layout of the job's model over its ranks.
fn shard_plan(spec: &JobSpec) -> Result<String, String> {
    let (path, config) = model_config(spec)?;
    let plan = spec.shard_plan(&config).map_err(|error| format!("{}: {error}", path.display()))?;
    serde_json::to_string(&plan).map_err(|error| format!("{}: {error}", path.display()))
}

fn model_config(spec: &JobSpec) -> Result<(PathBuf, ModelConfig), String> {
    let path = spec.model_dir().join("config.json");
    let at = |cause: String| format!("{}: {cause}", path.display());
    let text = std::fs::read_to_string(&path).map_err(|error| at(error.to_string()))?;
    let config = ModelConfig::from_json(&text).map_err(|error| at(error.to_string()))?;
    Ok((path, config))
}

/// Floating-point operations that the model needs for a token of training; nothing while its shape is not known.
pub fn model_flops_per_token(spec: &JobSpec) -> Option<f64> {
    let (_, config) = model_config(spec).ok()?;
    let tokens = f64::from(spec.train.micro_batch_sequences) * f64::from(spec.data.sequence_tokens);
    Some(Flops::new(spec, &config).of_model() / tokens)
}
