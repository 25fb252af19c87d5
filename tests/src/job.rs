//! A job file, its repositories and what the job makes of them.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use tempfile::TempDir;

use crate::metrics::Metrics;
use crate::process::{Ended, Running};
use crate::{programs, repository};

/// A job in a temporary directory. The directory goes with it, but stays when the test fails or
/// TUNEFLEET_KEEP=1.
pub struct Job {
    dir: Option<TempDir>,
    path: PathBuf,
    config: PathBuf,
}

/// Settings of a job; the defaults train the smallest preset on two small repositories.
pub struct Builder {
    dataset: String,
    tokenizer: String,
    model: String,
    ranks: u32,
    steps: u64,
    checkpoint_every: u64,
    train: String,
    learning_rate: String,
    restart: String,
    more: String,
}

impl Job {
    /// Begins a job of 2 ranks.
    pub fn builder() -> Builder {
        Builder {
            // The files of a dialect say nearly the same.
            dataset: "collect: { sources: [repos/first, repos/second], validation_fraction: 0.1, duplicates: keep }"
                .to_owned(),
            tokenizer: "tokenizer: { train: { vocab_size: 400 } }".to_owned(),
            model: "model: { init: { preset: tiny, seed: 1 } }".to_owned(),
            ranks: 2,
            steps: 6,
            checkpoint_every: 0,
            train: String::new(),
            learning_rate: "1e-3".to_owned(),
            // What a failure looks like is seen best when nothing follows it.
            restart: "max_restarts: 0".to_owned(),
            more: String::new(),
        }
    }

    /// Directory of the job file.
    pub fn dir(&self) -> &Path {
        &self.path
    }

    /// The job file.
    pub fn config(&self) -> &Path {
        &self.config
    }

    /// Directory of what the job makes.
    pub fn output(&self) -> PathBuf {
        self.path.join("output")
    }

    /// What it logged so far.
    pub fn metrics(&self) -> Metrics {
        Metrics::read(&self.output())
    }

    /// `coordinator <verb> --config <this job> <arguments>`.
    pub fn command(&self, verb: &str, arguments: &[&str]) -> Command {
        let mut command = Command::new(programs::coordinator());
        command.arg(verb).arg("--config").arg(&self.config).args(arguments);
        command.env("TMPDIR", self.path.join("tmp"));
        command
    }

    /// Starts `coordinator launch`.
    pub fn launch(&self, arguments: &[&str]) -> Running {
        programs::worker();
        Running::start(self.command("launch", arguments))
    }

    /// Runs `coordinator launch` to its end.
    pub fn run(&self, arguments: &[&str]) -> Ended {
        self.launch(arguments).wait()
    }

    /// Steps of the checkpoints that exist, ascending.
    pub fn checkpoints(&self) -> Vec<u64> {
        let entries = std::fs::read_dir(self.output().join("checkpoints")).into_iter().flatten();
        let names = entries.filter_map(Result::ok).filter_map(|entry| entry.file_name().into_string().ok());
        let mut steps: Vec<_> =
            names.filter_map(|name| tunefleet_proto::checkpoint::step_of_dir_name(&name)).collect();
        steps.sort_unstable();
        steps
    }

    /// Directory of the checkpoint after `step`.
    pub fn checkpoint(&self, step: u64) -> PathBuf {
        self.output().join("checkpoints").join(tunefleet_proto::checkpoint::dir_name(step))
    }

    /// Another job with the same file and repositories, where nothing has run.
    pub fn twin(&self) -> Job {
        let twin = Job::fresh();
        std::fs::copy(&self.config, &twin.config).unwrap();
        repositories(&twin.path);
        twin
    }

    fn fresh() -> Job {
        let dir = tempfile::Builder::new().prefix("tunefleet-test-").tempdir().unwrap();
        // Short: the path of a Unix socket is limited.
        std::fs::create_dir(dir.path().join("tmp")).unwrap();
        let path = dir.path().canonicalize().unwrap();
        Job { config: path.join("job.yaml"), path, dir: Some(dir) }
    }
}

fn repositories(dir: &Path) {
    repository::commit(&dir.join("repos/first"), &repository::sources("first", 24));
    repository::commit(&dir.join("repos/second"), &repository::sources("second", 16));
}

impl Drop for Job {
    fn drop(&mut self) {
        let keep = std::thread::panicking() || std::env::var("TUNEFLEET_KEEP").as_deref() == Ok("1");
        if let Some(dir) = self.dir.take().filter(|_| keep) {
            eprintln!("kept: {}", dir.keep().display());
        }
    }
}

impl Builder {
    /// Number of ranks.
    pub fn ranks(mut self, ranks: u32) -> Self {
        self.ranks = ranks;
        self
    }

    /// Number of steps; each is logged.
    pub fn steps(mut self, steps: u64) -> Self {
        self.steps = steps;
        self
    }

    /// Steps between checkpoints.
    pub fn checkpoint_every(mut self, steps: u64) -> Self {
        self.checkpoint_every = steps;
        self
    }

    /// Replaces the `collect` section by other lines.
    pub fn dataset(mut self, yaml: &str) -> Self {
        yaml.clone_into(&mut self.dataset);
        self
    }

    /// Replaces the `tokenizer` section by other lines.
    pub fn tokenizer(mut self, yaml: &str) -> Self {
        yaml.clone_into(&mut self.tokenizer);
        self
    }

    /// Replaces the `model` section by other lines.
    pub fn model(mut self, yaml: &str) -> Self {
        yaml.clone_into(&mut self.model);
        self
    }

    /// Adds a line to the `train` section.
    pub fn train(mut self, yaml: &str) -> Self {
        let _ = writeln!(self.train, "  {yaml}");
        self
    }

    /// Sets the learning rate.
    pub fn learning_rate(mut self, rate: &str) -> Self {
        rate.clone_into(&mut self.learning_rate);
        self
    }

    /// Replaces what the `restart` section says: that nothing is started again.
    pub fn restart(mut self, yaml: &str) -> Self {
        yaml.clone_into(&mut self.restart);
        self
    }

    /// Adds a section.
    pub fn section(mut self, yaml: &str) -> Self {
        let _ = writeln!(self.more, "{yaml}");
        self
    }

    /// Writes it all.
    pub fn build(self) -> Job {
        let job = Job::fresh();
        repositories(&job.path);
        let Builder {
            dataset,
            tokenizer,
            model,
            ranks,
            steps,
            checkpoint_every,
            train,
            learning_rate,
            restart,
            more,
        } = self;
        let text = format!(
            "name: test\noutput: output\n{dataset}\n{tokenizer}\n{model}\n{more}restart: {{ {restart} }}\n\
             data: {{ sequence_tokens: 64 }}\n\
             train:\n  ranks: {ranks}\n  device: cpu\n  precision: fp32\n  steps: {steps}\n  \
             learning_rate: {learning_rate}\n  log_every_steps: 1\n  checkpoint_every_steps: {checkpoint_every}\n{train}\
             workers: {{ threads_per_rank: 1 }}\n"
        );
        std::fs::write(&job.config, text).unwrap();
        job
    }
}
