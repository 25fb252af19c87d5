//! What the terminal shows while a job runs: a heading for each stage, a bar while it trains, and
//! plain lines where there is no terminal. All of it goes to stderr.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};
use tunefleet_proto::job::JobSpec;
use tunefleet_proto::rpc::job_event::Body;
use tunefleet_proto::rpc::stage_changed::What;
use tunefleet_proto::rpc::{Stage, StageChanged, StepDone};

use crate::events::blamed;

/// Without a terminal, a line about training comes this often at most.
const LINE_INTERVAL: Duration = Duration::from_secs(5);

/// What is remembered for the summary.
#[derive(Debug, Default)]
pub struct Totals {
    /// The last logged step.
    pub last_step: Option<StepDone>,
    /// Step and loss of each evaluation.
    pub evaluations: Vec<(u64, f64)>,
    /// Tokens per second of each report.
    pub rates: Vec<f64>,
    /// Whether there is something to resume from.
    pub has_checkpoint: bool,
}

/// The terminal, as far as this job uses it.
pub struct Screen {
    steps: u64,
    interactive: bool,
    bar: Option<ProgressBar>,
    last_line: Option<Instant>,
    /// For the summary.
    pub totals: Totals,
}

impl Screen {
    /// Nothing shown yet.
    pub fn new(spec: &JobSpec) -> Self {
        let interactive = std::io::stderr().is_terminal();
        let totals = Totals::default();
        Screen { steps: spec.train.steps, interactive, bar: None, last_line: None, totals }
    }

    /// Shows an event.
    pub fn show(&mut self, body: Body) {
        match body {
            Body::Stage(changed) => self.stage(&changed),
            Body::Note(text) => self.say(&text),
            Body::Waiting(waiting) if waiting.workers == 0 => self.say("waiting for a worker to connect"),
            Body::Waiting(waiting) => {
                let gpu = if waiting.needs_gpu { " with a GPU" } else { "" };
                self.say(&format!(
                    "waiting for {} slots{gpu}: {} of {} are free on {} workers",
                    waiting.needed, waiting.free, waiting.total, waiting.workers
                ));
            }
            Body::Step(step) => self.step(step),
            Body::Evaluated(evaluated) => {
                self.totals.evaluations.push((evaluated.step, evaluated.loss));
                self.say(&format!("step {}/{}  eval loss {:.4}", evaluated.step, self.steps, evaluated.loss));
            }
            Body::Saved(saved) => {
                self.totals.has_checkpoint = true;
                let (step, pause) = (saved.step, saved.pause_seconds);
                self.say(&format!("step {step}/{}  saved {} ({pause:.1} s)", self.steps, saved.path));
            }
            Body::Section(name) => {
                if let Some(bar) = &self.bar {
                    bar.set_prefix(name);
                }
            }
            Body::RankEnded(ended) => {
                self.say(&format!("rank {} on worker {}: {}", ended.rank, ended.worker, ended.how));
            }
            // Ends are told by who attends; the other states are seen from the stages.
            Body::State(_) => {}
            Body::AttemptEnded(ended) => {
                self.close();
                let failure = ended.failure.clone().unwrap_or_default();
                self.say(&format!("the attempt ended: {}", blamed(&failure)));
                self.say(&format!("    {}", ended.decision));
            }
            Body::Worker(seen) => self.say(&format!("worker {}: {}", seen.worker, seen.detail)),
        }
    }

    /// A line of its own, above the bar where there is one.
    pub fn say(&self, line: &str) {
        match &self.bar {
            Some(bar) if self.interactive => bar.println(line),
            _ => eprintln!("{line}"),
        }
    }

    /// Takes the bar away.
    pub fn close(&mut self) {
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
        }
    }

    fn stage(&mut self, changed: &StageChanged) {
        let name = changed.stage().name();
        match changed.what() {
            What::Cached => self.say(&format!("==> {name}: cached ({})", changed.output)),
            What::Started => {
                self.say(&format!("==> {name}: {}", changed.output));
                if changed.stage() == Stage::Train && self.interactive {
                    self.bar = Some(bar(self.steps));
                }
            }
            What::Done => {
                self.close();
                self.say(&format!("    {name}: done in {}", duration(changed.seconds)));
            }
            What::Unspecified => {}
        }
    }

    fn step(&mut self, step: StepDone) {
        let left = self.steps.saturating_sub(step.step) as f64 * step.step_seconds;
        let last_eval = self.totals.evaluations.last();
        let eval = last_eval.map_or_else(String::new, |(_, loss)| format!("  eval {loss:.4}"));
        let line = format!(
            "loss {:.4}{eval}  lr {:.2e}  {} tokens/s  ETA {}",
            step.loss,
            step.learning_rate,
            grouped(step.tokens_per_second),
            duration(left)
        );
        let is_last = step.step >= self.steps;
        match &self.bar {
            Some(bar) => {
                bar.set_position(step.step);
                bar.set_message(line);
            }
            None if is_last || self.last_line.is_none_or(|at| at.elapsed() >= LINE_INTERVAL) => {
                self.last_line = Some(Instant::now());
                self.say(&format!("step {}/{}  {line}", step.step, self.steps));
            }
            None => {}
        }
        self.totals.rates.push(step.tokens_per_second);
        self.totals.last_step = Some(step);
    }
}

fn bar(steps: u64) -> ProgressBar {
    let style = ProgressStyle::with_template("{bar:24} {pos}/{len}  {msg}  {prefix:.dim}");
    let bar = ProgressBar::new(steps).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
    bar.tick();
    bar
}

/// `1h 02m`, `3m 20s`, `4.2 s`.
pub fn duration(seconds: f64) -> String {
    let whole = seconds.max(0.0) as u64;
    match whole {
        0..60 => format!("{seconds:.1} s"),
        60..3600 => format!("{}m {:02}s", whole / 60, whole % 60),
        _ => format!("{}h {:02}m", whole / 3600, whole / 60 % 60),
    }
}

/// `12,345`.
pub fn grouped(number: f64) -> String {
    let digits = format!("{:.0}", number.max(0.0));
    let mut out = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index) % 3 == 0 {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_and_numbers_read_well() {
        assert_eq!(duration(4.25), "4.2 s");
        assert_eq!(duration(200.0), "3m 20s");
        assert_eq!(duration(3725.0), "1h 02m");
        assert_eq!(grouped(0.4), "0");
        assert_eq!(grouped(999.0), "999");
        assert_eq!(grouped(1_234_567.0), "1,234,567");
    }
}
