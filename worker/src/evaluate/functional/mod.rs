//! Tasks that are judged by tests: HumanEval, and holes in its solutions.
//!
//! The protocol of HumanEval is that of bigcode-evaluation-harness: the prompt without white space at its ends, draws at
//! temperature 0.2 with top-p 0.95, prompt and completion in 512 tokens together, a cut at the first of its stop strings.

/// How a model is asked.
pub mod protocol;
/// Completions, and what comes of them.
pub mod work;

use std::collections::{HashMap, HashSet};
use std::path::PathBuf;

use tunefleet_proto::evaluation::{self, Kind};

use super::log::Sample;
use super::report::{self, ReportArgs};
use super::subject::{Subject, SubjectArgs};
use super::tasks::Task;
use super::{Error, tasks};
use crate::generate::prompt::InfillOrder;
use protocol::{Drawing, Protocol};
use work::{Share, Work};

/// Command line of `worker evaluate humaneval`.
#[derive(Debug, clap::Args)]
pub struct HumanevalArgs {
    #[command(flatten)]
    subject: SubjectArgs,
    /// How completions are judged.
    #[command(flatten)]
    pub judge: JudgeArgs,
    #[command(flatten)]
    report: ReportArgs,
    /// Completions of each task.
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..))]
    samples_per_task: u32,
    /// 0 always takes the likeliest token: one completion of each task is enough then.
    #[arg(long, default_value_t = 0.2)]
    temperature: f64,
    /// Draw from the smallest set of tokens with at least this probability.
    #[arg(long, default_value_t = 0.95)]
    top_p: f64,
    /// Tokens of prompt and completion together, at most.
    #[arg(long, default_value_t = 512, value_parser = clap::value_parser!(u32).range(1..))]
    max_tokens: u32,
    /// Seed of the draws.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Leave the white space at the end of prompts, as openai/human-eval does.
    #[arg(long)]
    unstripped: bool,
}

/// Command line of `worker evaluate infilling`.
#[derive(Debug, clap::Args)]
pub struct InfillingArgs {
    #[command(flatten)]
    subject: SubjectArgs,
    /// How completions are judged.
    #[command(flatten)]
    pub judge: JudgeArgs,
    #[command(flatten)]
    report: ReportArgs,
    /// How prompts are laid out.
    #[arg(long, value_enum, default_value = "psm")]
    order: InfillOrder,
    /// Completions of each task.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    samples_per_task: u32,
    /// 0 always takes the likeliest token.
    #[arg(long, default_value_t = 0.0)]
    temperature: f64,
    /// Draw from the smallest set of tokens with at least this probability.
    #[arg(long, default_value_t = 0.95)]
    top_p: f64,
    /// Tokens of a completion, at most.
    #[arg(long, default_value_t = 128, value_parser = clap::value_parser!(u32).range(1..))]
    max_new_tokens: u32,
    /// Seed of the draws.
    #[arg(long, default_value_t = 0)]
    seed: u64,
}

/// Command line of `worker evaluate samples`.
#[derive(Debug, clap::Args)]
pub struct SamplesArgs {
    /// Completions: a JSON object with `task_id` and `completion` in each line, plain or gzip.
    #[arg(long)]
    samples: PathBuf,
    /// How completions are judged.
    #[command(flatten)]
    pub judge: JudgeArgs,
    #[command(flatten)]
    report: ReportArgs,
}

/// How completions are judged.
#[derive(Debug, Clone, clap::Args)]
pub struct JudgeArgs {
    /// The tasks: HumanEval.jsonl.gz of openai/human-eval, or a set of openai/human-eval-infilling.
    #[arg(long, value_name = "FILE")]
    pub tasks: PathBuf,
    /// Only the first so many tasks.
    #[arg(long)]
    pub limit: Option<usize>,
    /// Interpreter that programs run with; python3 on PATH, or the system's, when absent.
    #[arg(long, value_name = "PATH")]
    pub python: Option<PathBuf>,
    /// Time that a program may take.
    #[arg(long, default_value_t = 3.0)]
    pub timeout_seconds: f64,
    /// Programs that run at once; one for each core when absent.
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..))]
    pub parallel: Option<u16>,
    /// Run generated code even where it cannot be kept apart: with limits, but with this user's files and rights.
    #[arg(long)]
    pub allow_unisolated: bool,
}

impl HumanevalArgs {
    /// How tasks are asked, and completions drawn.
    pub fn protocol(&self) -> (Protocol, Drawing) {
        let HumanevalArgs { samples_per_task, temperature, top_p, seed, .. } = *self;
        let protocol =
            Protocol::Humaneval { stripped: !self.unstripped, max_tokens: self.max_tokens as usize };
        (protocol, Drawing { samples_per_task, temperature, top_p, seed })
    }
}

impl InfillingArgs {
    /// How these tasks are asked, and completions drawn.
    pub fn protocol(&self, tasks: &[Task]) -> (Protocol, Drawing) {
        let InfillingArgs { samples_per_task, temperature, top_p, seed, .. } = *self;
        let protocol = Protocol::infilling(tasks, self.order, self.max_new_tokens as usize);
        (protocol, Drawing { samples_per_task, temperature, top_p, seed })
    }
}

/// Runs HumanEval.
///
/// # Errors
/// See [`Error`].
pub fn humaneval(args: &HumanevalArgs) -> Result<(), Error> {
    check_sampling(args.temperature, args.top_p)?;
    let (protocol, drawing) = args.protocol();
    let work = Work::open(&args.judge, Kind::Humaneval, Some(false))?;
    alone(&work, protocol, drawing, &args.subject, &args.report)
}

/// Runs an infilling set.
///
/// # Errors
/// See [`Error`].
pub fn infilling(args: &InfillingArgs) -> Result<(), Error> {
    check_sampling(args.temperature, args.top_p)?;
    let work = Work::open(&args.judge, Kind::Infilling, Some(true))?;
    let (protocol, drawing) = args.protocol(&work.tasks);
    alone(&work, protocol, drawing, &args.subject, &args.report)
}

/// All of the work in this process.
fn alone(
    work: &Work,
    protocol: Protocol,
    drawing: Drawing,
    subject: &SubjectArgs,
    to: &ReportArgs,
) -> Result<(), Error> {
    let subject = Subject::load(subject)?;
    work.answer(&to.out, Share::WHOLE, &subject, protocol, drawing)?;
    let found = work.gather(&[&to.out])?;
    let settings = work.settings(protocol.settings(&drawing));
    let evaluation = report::evaluation(work.kind, subject.described, settings, work.digest.clone(), found);
    report::finish(to, &evaluation)
}

/// Judges completions that something else made.
///
/// # Errors
/// See [`Error`].
pub fn samples(args: &SamplesArgs) -> Result<(), Error> {
    let mut work = Work::open(&args.judge, Kind::Humaneval, None)?;
    if work.tasks.iter().any(|task| task.suffix.is_some()) {
        work.kind = Kind::Infilling;
    }
    let text = tasks::read_text(&args.samples)?;
    let samples = given(args, &work, &text)?;
    let described = evaluation::Subject {
        model: args.samples.display().to_string(),
        digest: tunefleet_proto::digest_hex(text.as_bytes()),
        adapter: None,
        adapter_weight: None,
        quantization: None,
        precision: String::new(),
    };
    let settings = work.settings(Default::default());
    work.begin(&args.report.out, &settings, &described)?;
    let judged = work.judge(&args.report.out, &samples, Protocol::Given)?;
    let found = work.count(&samples, &judged);
    let evaluation = report::evaluation(work.kind, described, settings, work.digest, found);
    report::finish(&args.report, &evaluation)
}

/// The completions of a file, numbered by task.
fn given(args: &SamplesArgs, work: &Work, text: &str) -> Result<Vec<Sample>, Error> {
    let known: HashSet<&str> = work.tasks.iter().map(|task| task.task_id.as_str()).collect();
    let mut numbers: HashMap<String, u64> = HashMap::new();
    let mut samples = Vec::new();
    for (line, sample) in tasks::lines::<Sample>(&args.samples, text) {
        let mut sample = sample?;
        if !known.contains(sample.task_id.as_str()) {
            if args.judge.limit.is_some() {
                continue;
            }
            let problem = format!("there is no task `{}` in {}", sample.task_id, args.judge.tasks.display());
            return Err(tasks::Error::Line { path: args.samples.clone(), line, problem }.into());
        }
        let next = numbers.entry(sample.task_id.clone()).or_default();
        sample.sample = *next;
        *next += 1;
        samples.push(sample);
    }
    if samples.is_empty() {
        let problem = "holds no completions".to_owned();
        return Err(tasks::Error::File { path: args.samples.clone(), problem }.into());
    }
    Ok(samples)
}

fn check_sampling(temperature: f64, top_p: f64) -> Result<(), Error> {
    let problem = if !(temperature >= 0.0 && temperature.is_finite()) {
        format!("--temperature ({temperature}) must be 0 or more")
    } else if !(top_p > 0.0 && top_p <= 1.0) {
        format!("--top-p ({top_p}) must be above 0 and at most 1")
    } else {
        return Ok(());
    };
    Err(Error::Setting(problem))
}
