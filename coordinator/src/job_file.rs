//! The arguments that name a job file, and reading it.

use std::path::PathBuf;

use tunefleet_proto::job::{self, Diagnostics, JobSpec};
use tunefleet_proto::model::ModelConfig;

use crate::convert::recognise::{Foreign, recognise};

/// Which job file, and what to change in it.
#[derive(Debug, Clone, clap::Args)]
pub struct JobArgs {
    /// The job file.
    #[arg(long, value_name = "JOB")]
    pub config: PathBuf,
    /// Set a key of the job file, e.g. train.steps=100; key+=value adds to a list. Relative paths
    /// start at the current directory.
    #[arg(long, value_name = "KEY=VALUE")]
    pub set: Vec<String>,
}

/// Why there is no job.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The job file cannot be read.
    #[error("{path}: {cause}")]
    Read {
        /// The job file.
        path: PathBuf,
        /// What the system said.
        cause: std::io::Error,
    },
    /// The job file is a config of another trainer.
    #[error("{path}: this is {}, and not a job file; make one of it with\n  {}", .foreign.kind, .foreign.command)]
    Foreign {
        /// The file.
        path: PathBuf,
        /// What it is.
        foreign: Foreign,
    },
    /// The job file is wrong.
    #[error(transparent)]
    Faults(#[from] Diagnostics),
    /// The model's config cannot be read.
    #[error("model.path: {path}: {cause}; give a Hugging Face model directory")]
    ReadModel {
        /// The config.
        path: PathBuf,
        /// What the system said.
        cause: std::io::Error,
    },
    /// The model's config cannot be used.
    #[error("model.path: {path}: {cause}")]
    Model {
        /// The config.
        path: PathBuf,
        /// Which rule it breaks.
        cause: tunefleet_proto::model::Error,
    },
    /// The hub does not give the model's shape.
    #[error("model.hub: {0}")]
    Hub(#[from] tunefleet_hub::Error),
    /// The job contradicts the model that it starts from.
    #[error("{0}")]
    Misfit(String),
}

impl JobArgs {
    /// The job that they describe.
    ///
    /// # Errors
    /// Every fault of the file at once, with line and column.
    pub fn load(&self) -> Result<JobSpec, Error> {
        let read = |cause| Error::Read { path: self.config.clone(), cause };
        let text = std::fs::read_to_string(&self.config).map_err(read)?;
        if let Some(foreign) = recognise(&self.config, &text) {
            return Err(Error::Foreign { path: self.config.clone(), foreign });
        }
        let cwd = std::env::current_dir().map_err(read)?;
        Ok(job::load(&self.config, &text, &self.set, &cwd)?)
    }
}

/// The shape of a model of the hub: of the one that the job has fetched, else of the one that is there now.
fn hub_config(spec: &JobSpec, repo: &str, revision: Option<&str>) -> Result<ModelConfig, Error> {
    let fetched = spec.base_model_dir().join("config.json");
    let (path, text) = match std::fs::read_to_string(&fetched) {
        Ok(text) => (fetched, text),
        Err(_) => {
            let model = tunefleet_hub::model::Model { repo, revision };
            // On a thread of its own: its requests wait, which a thread of the runtime may not.
            let asked = std::thread::scope(|scope| scope.spawn(|| model.config()).join());
            let lost = |_| tunefleet_hub::Error::Setting(format!("{repo}: asking for its shape failed"));
            (PathBuf::from(format!("{repo}/config.json")), asked.map_err(lost)??)
        }
    };
    ModelConfig::from_json(&text).map_err(|cause| Error::Model { path, cause })
}

/// The shape of the job's model: its preset's, or what the model's `config.json` says.
///
/// # Errors
/// A config that cannot be read or used, or that the job contradicts.
pub fn model_config(spec: &JobSpec) -> Result<ModelConfig, Error> {
    let config = match &spec.model {
        job::ModelSpec::Init { preset, .. } => ModelConfig::preset(preset)
            .map_err(|cause| Error::Model { path: PathBuf::from(preset), cause })?,
        job::ModelSpec::Hub { repo, revision } => hub_config(spec, repo, revision.as_deref())?,
        job::ModelSpec::Existing(dir) => {
            let path = dir.join("config.json");
            let text = match std::fs::read_to_string(&path) {
                Ok(text) => text,
                Err(cause) => return Err(Error::ReadModel { path, cause }),
            };
            ModelConfig::from_json(&text).map_err(|cause| Error::Model { path, cause })?
        }
    };
    if let Some(misfit) = spec.misfit(&config) {
        return Err(Error::Misfit(misfit));
    }
    // Fresh weights get the vocabulary that is learnt, or less where there is too little text.
    match (&spec.model, &spec.tokenizer) {
        (job::ModelSpec::Init { .. }, job::TokenizerSpec::Train { vocab_size }) => {
            Ok(ModelConfig { vocab_size: u64::from(*vocab_size), ..config })
        }
        _ => Ok(config),
    }
}
