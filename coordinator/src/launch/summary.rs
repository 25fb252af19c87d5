//! What is said when a job has ended: the result on stdout, a failure on stderr, and in both
//! cases what to type next.

use std::io::Write;

use tunefleet_proto::job::{JobSpec, MergeBase};
use tunefleet_proto::rpc::{Failure, Stage};

use crate::compare;

use super::screen::{Totals, grouped};
use crate::control::{METRICS_LOG_FILE, listed_ranks};
use crate::job_file::JobArgs;

/// How this job is launched again.
pub struct Command<'a> {
    /// The job file and its overrides.
    pub job: &'a JobArgs,
    /// The coordinator that it was submitted to.
    pub coordinator: Option<&'a str>,
}

impl Command<'_> {
    /// The command line with one more flag.
    pub fn launch(&self, flag: &str) -> String {
        let mut line = format!("coordinator launch --config {}", self.job.config.display());
        for set in &self.job.set {
            line += &format!(" --set '{set}'");
        }
        if let Some(url) = self.coordinator {
            line += &format!(" --coordinator {url}");
        }
        if !flag.is_empty() {
            line += &format!(" {flag}");
        }
        line
    }
}

/// Tells of a job that is complete.
pub fn completed(job: &str, spec: &JobSpec, totals: &Totals, again: &Command<'_>) {
    let mut text = format!("{job} is complete\n");
    if let Some(step) = &totals.last_step {
        text += &format!("  train loss   {:.4} at step {}\n", step.loss, step.step);
    }
    if !totals.evaluations.is_empty() {
        let list: Vec<String> =
            totals.evaluations.iter().map(|(step, loss)| format!("{loss:.4} at step {step}")).collect();
        text += &format!("  eval loss    {}\n", list.join(", "));
    }
    if let Some(rate) = median(&totals.rates) {
        text += &format!("  throughput   {} tokens/s\n", grouped(rate));
    }
    let trains = spec.train.steps > 0;
    if trains {
        text += &format!("  checkpoints  {}\n", spec.checkpoints_dir().display());
    }
    let merged = spec.adapter.is_none() || spec.export.merge != MergeBase::None;
    if spec.export.enabled && spec.adapter.is_some() {
        text += &format!("  adapter      {}\n", spec.adapter_dir().display());
    }
    if spec.export.enabled && merged {
        text += &format!("  model        {}\n", spec.export_dir().display());
    }
    if trains {
        text += &format!("  values       {}\n", spec.output.join(METRICS_LOG_FILE).display());
    }
    if spec.evaluate.is_some() {
        text += &format!("  evaluations  {}\n", spec.evaluations_dir().display());
    }
    text += "next:\n";
    if spec.export.enabled {
        let model = match merged {
            true => spec.export_dir().display().to_string(),
            false => format!("{} --adapter {}", spec.model_dir().display(), spec.adapter_dir().display()),
        };
        text += &match spec.data.chat {
            Some(_) => format!("  worker chat --model {model}\n"),
            None => {
                format!("  worker generate --model {model} --prompt 'def add(a, b): <FILL_ME> return c'\n")
            }
        };
    }
    text += &format!("  {}\n", compare::command(&spec.output));
    if !trains {
        // A reader that has gone away wants no more.
        let _ = std::io::stdout().write_all(text.as_bytes());
        return;
    }
    text += &format!("  coordinator plan --config {}\n", again.job.config.display());
    let twice = spec.train.steps.saturating_mul(2);
    text += &format!("  {}\n", again.launch(&format!("--fresh --set train.steps={twice}")));
    // A reader that has gone away wants no more.
    let _ = std::io::stdout().write_all(text.as_bytes());
}

/// Tells why a job failed.
pub fn failed(job: &str, failure: &Failure, has_checkpoint: bool, again: &Command<'_>) {
    let stage = failure.stage();
    let mut text = format!("error: {job} failed in {}: ", stage.name());
    match failure.rank {
        Some(rank) if stage == Stage::Train => {
            text += &format!("rank {rank} on worker {}: {}", failure.worker, failure.cause);
        }
        _ => text += &failure.cause,
    }
    if !failure.exit.is_empty() && !failure.cause.contains(&failure.exit) {
        text += &format!(" ({})", failure.exit);
    }
    text.push('\n');
    if !failure.aborted_ranks.is_empty() {
        text += &format!("{}: aborted by peer\n", listed_ranks(&failure.aborted_ranks));
    }
    if !failure.last_lines.is_empty() {
        text += &format!("last lines of {}:\n", failure.log_path);
        for line in &failure.last_lines {
            text += &format!("  {line}\n");
        }
    } else if !failure.log_path.is_empty() {
        text += &format!("log: {} (empty)\n", failure.log_path);
    }
    // Without a rank to blame, the cause itself says what to do.
    if failure.rank.is_some() {
        let flag = if stage == Stage::Train && has_checkpoint { "--resume" } else { "" };
        text += &format!("next: {}\n", again.launch(flag));
    }
    eprint!("{text}");
}

fn median(values: &[f64]) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted.get(sorted.len() / 2).copied()
}
