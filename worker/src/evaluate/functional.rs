//! Tasks that are judged by tests: HumanEval, and holes in its solutions.
//!
//! The protocol of HumanEval is that of bigcode-evaluation-harness: the prompt without white space at its ends, draws at
//! temperature 0.2 with top-p 0.95, prompt and completion in 512 tokens together, a cut at the first of its stop strings.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::channel;

use serde_json::{Value, json};
use tunefleet_proto::evaluation::{self, Item, Kind};
use tunefleet_sandbox::{Isolation, Limits};

use super::Error;
use super::log::{self, Judged, Log, SAMPLES_FILE, Sample, VERDICTS_FILE};
use super::progress::Progress;
use super::python::{Python, Verdict};
use super::report::{self, Found, ReportArgs};
use super::subject::{Ask, Made, Subject, SubjectArgs};
use super::tasks::{self, Task, Tasks};
use super::text;
use crate::data::tokenizer;
use crate::generate::prompt::{InfillOrder, infill};
use crate::generate::sampling::Sampling;
use crate::serve::engine::request::Reason;
use crate::serve::stop::Rules;

/// What ends a function in bigcode's protocol.
const STOPS: [&str; 8] = ["\nclass", "\ndef", "\n#", "\n@", "\nprint", "\nif", "\n```", "<file_sep>"];
/// Draws of one task are this far apart from those of the next.
const SEED_STRIDE: u64 = 1_000_003;

/// Command line of `worker evaluate humaneval`.
#[derive(Debug, clap::Args)]
pub struct HumanevalArgs {
    #[command(flatten)]
    subject: SubjectArgs,
    #[command(flatten)]
    judge: JudgeArgs,
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
    #[command(flatten)]
    judge: JudgeArgs,
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
    #[command(flatten)]
    judge: JudgeArgs,
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

/// Runs HumanEval.
///
/// # Errors
/// See [`Error`].
pub fn humaneval(args: &HumanevalArgs) -> Result<(), Error> {
    check_sampling(args.temperature, args.top_p)?;
    let work = Work::open(&args.judge, Kind::Humaneval, Some(false))?;
    let subject = Subject::load(&args.subject)?;
    let protocol = BTreeMap::from([
        ("samples_per_task".to_owned(), json!(args.samples_per_task)),
        ("temperature".to_owned(), json!(args.temperature)),
        ("top_p".to_owned(), json!(args.top_p)),
        ("max_tokens".to_owned(), json!(args.max_tokens)),
        ("seed".to_owned(), json!(args.seed)),
        ("stripped".to_owned(), json!(!args.unstripped)),
        ("stops".to_owned(), json!(STOPS)),
    ]);
    let most = subject.max_tokens().min(args.max_tokens as usize);
    let shown = |task: &Task| prompt_of(task, !args.unstripped).to_owned();
    let ask = |task: &Task| {
        let prompt = subject.tokenizer.encode_document(&shown(task))?;
        let room = most.saturating_sub(prompt.len());
        Ok((prompt, room, Rules::strings(STOPS.map(str::to_owned).to_vec())))
    };
    let drawing = Drawing {
        samples_per_task: args.samples_per_task,
        temperature: args.temperature,
        top_p: args.top_p,
        seed: args.seed,
    };
    let cut = |_: &Task, made: &str| made.to_owned();
    let evaluation = work.run(&args.report.out, &subject, protocol, drawing, &ask, &cut, &shown)?;
    report::finish(&args.report, &evaluation)
}

/// Runs an infilling set.
///
/// # Errors
/// See [`Error`].
pub fn infilling(args: &InfillingArgs) -> Result<(), Error> {
    check_sampling(args.temperature, args.top_p)?;
    let work = Work::open(&args.judge, Kind::Infilling, Some(true))?;
    let subject = Subject::load(&args.subject)?;
    let is_one_line =
        |task: &Task| task.canonical_solution.as_deref().unwrap_or_default().trim_end().lines().count() <= 1;
    // A property of the set, which says nothing of a single task.
    let by_line = work.tasks.iter().all(is_one_line);
    let order = if args.order == InfillOrder::Psm { "psm" } else { "spm" };
    let protocol = BTreeMap::from([
        ("samples_per_task".to_owned(), json!(args.samples_per_task)),
        ("temperature".to_owned(), json!(args.temperature)),
        ("top_p".to_owned(), json!(args.top_p)),
        ("max_new_tokens".to_owned(), json!(args.max_new_tokens)),
        ("seed".to_owned(), json!(args.seed)),
        ("order".to_owned(), json!(order)),
        ("cut".to_owned(), json!(if by_line { "first line" } else { "none" })),
    ]);
    let new_tokens = args.max_new_tokens as usize;
    let most = subject.max_tokens().saturating_sub(new_tokens);
    let ask = |task: &Task| {
        let suffix = task.suffix.as_deref().unwrap_or_default();
        let prompt = infill(&subject.tokenizer, &task.prompt, suffix, args.order, most)?;
        Ok((prompt, if most > 0 { new_tokens } else { 0 }, Rules::default()))
    };
    let cut =
        |_: &Task, made: &str| if by_line { text::first_line(made).to_owned() } else { made.to_owned() };
    let drawing = Drawing {
        samples_per_task: args.samples_per_task,
        temperature: args.temperature,
        top_p: args.top_p,
        seed: args.seed,
    };
    let shown = |task: &Task| task.prompt.clone();
    let evaluation = work.run(&args.report.out, &subject, protocol, drawing, &ask, &cut, &shown)?;
    report::finish(&args.report, &evaluation)
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
    let known: HashSet<&str> = work.tasks.iter().map(|task| task.task_id.as_str()).collect();
    let mut numbers: HashMap<String, u64> = HashMap::new();
    let mut samples = Vec::new();
    for (line, sample) in tasks::lines::<Sample>(&args.samples, &text) {
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
    let described = evaluation::Subject {
        model: args.samples.display().to_string(),
        digest: tunefleet_proto::digest_hex(text.as_bytes()),
        adapter: None,
        adapter_weight: None,
        quantization: None,
        precision: String::new(),
    };
    let protocol = BTreeMap::from([("samples_digest".to_owned(), json!(described.digest))]);
    let protocol = work.begin(&args.report.out, protocol, &described)?;
    let judged = work.judge(&args.report.out, &samples, &|task: &Task| task.prompt.clone())?;
    let found = work.count(&samples, &judged);
    let evaluation = report::evaluation(work.kind, described, protocol, work.digest.clone(), found);
    report::finish(&args.report, &evaluation)
}

/// What the model is shown of a HumanEval task.
fn prompt_of(task: &Task, stripped: bool) -> &str {
    if stripped { task.prompt.trim() } else { &task.prompt }
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

/// How completions are drawn.
#[derive(Debug, Clone, Copy)]
pub struct Drawing {
    /// Completions of each task.
    pub samples_per_task: u32,
    /// 0 is greedy.
    pub temperature: f64,
    /// The nucleus.
    pub top_p: f64,
    /// Seed of the draws.
    pub seed: u64,
}

/// Prompt, tokens that there is room for, and rules of a task.
type Asked = (Vec<u32>, usize, Rules);

/// Tasks and what judges them.
pub struct Work {
    kind: Kind,
    tasks: Vec<Task>,
    digest: String,
    python: Python,
    parallel: usize,
}

impl Work {
    /// Reads the tasks and finds the interpreter, before a model is loaded.
    ///
    /// # Errors
    /// Tasks that are none; a machine on which no program can be run.
    pub fn open(args: &JudgeArgs, kind: Kind, infilling: Option<bool>) -> Result<Self, Error> {
        if !(args.timeout_seconds > 0.0 && args.timeout_seconds <= 86400.0) {
            let value = args.timeout_seconds;
            return Err(Error::Setting(format!(
                "--timeout-seconds ({value}) must be above 0 and at most 86400"
            )));
        }
        let Tasks { mut tasks, digest } = tasks::read(&args.tasks, infilling)?;
        tasks.truncate(args.limit.unwrap_or(usize::MAX));
        if tasks.is_empty() {
            return Err(Error::Setting("--limit 0 leaves no tasks".to_owned()));
        }
        let isolation = if args.allow_unisolated { Isolation::LimitsOnly } else { Isolation::Full };
        let limits = Limits { wall_seconds: args.timeout_seconds, ..Limits::default() };
        let python = Python::find(args.python.as_deref(), isolation, limits)?;
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let parallel = args.parallel.map_or(cores, usize::from);
        Ok(Work { kind, tasks, digest, python, parallel })
    }

    /// All protocol that decides the numbers, held against what an earlier start of the same evaluation wrote.
    fn begin(
        &self,
        out: &Path,
        mut protocol: BTreeMap<String, Value>,
        subject: &evaluation::Subject,
    ) -> Result<BTreeMap<String, Value>, Error> {
        protocol.insert("tasks".to_owned(), json!(self.tasks.len()));
        protocol.insert("python".to_owned(), json!(self.python.version()));
        let mut settings = protocol.clone();
        settings.insert("tasks_digest".to_owned(), json!(self.digest));
        settings.insert("subject".to_owned(), json!(subject));
        log::begin(out, &settings)?;
        Ok(protocol)
    }

    /// Completions of all tasks, and what came of them.
    ///
    /// # Errors
    /// See [`Error`].
    #[expect(clippy::too_many_arguments, reason = "what differs between the two protocols, each once")]
    fn run(
        &self,
        out: &Path,
        subject: &Subject,
        protocol: BTreeMap<String, Value>,
        drawing: Drawing,
        ask: &dyn Fn(&Task) -> Result<Asked, tokenizer::Error>,
        cut: &dyn Fn(&Task, &str) -> String,
        shown: &(dyn Fn(&Task) -> String + Sync),
    ) -> Result<evaluation::Evaluation, Error> {
        let protocol = self.begin(out, protocol, &subject.described)?;
        let samples = self.complete(out, subject, drawing, ask, cut)?;
        let judged = self.judge(out, &samples, shown)?;
        let found = self.count(&samples, &judged);
        Ok(report::evaluation(self.kind, subject.described.clone(), protocol, self.digest.clone(), found))
    }

    fn complete(
        &self,
        out: &Path,
        subject: &Subject,
        drawing: Drawing,
        ask: &dyn Fn(&Task) -> Result<Asked, tokenizer::Error>,
        cut: &dyn Fn(&Task, &str) -> String,
    ) -> Result<Vec<Sample>, Error> {
        let (mut log, mut samples) = Log::<Sample>::open(&out.join(SAMPLES_FILE))?;
        let known: HashSet<(&str, u64)> =
            samples.iter().map(|sample| (sample.task_id.as_str(), sample.sample)).collect();
        let mut wanted = Vec::new();
        let mut without_room = Vec::new();
        for (number, task) in (0u64..).zip(&self.tasks) {
            let (prompt, room, rules) = ask(task)?;
            for sample in 0..u64::from(drawing.samples_per_task) {
                if known.contains(&(task.task_id.as_str(), sample)) {
                    continue;
                }
                if room == 0 || prompt.is_empty() {
                    without_room.push((task, sample));
                    continue;
                }
                let seed = drawing.seed.wrapping_add(number.wrapping_mul(SEED_STRIDE)).wrapping_add(sample);
                let sampling = Sampling {
                    temperature: drawing.temperature,
                    top_p: drawing.top_p,
                    seed,
                    ..Sampling::default()
                };
                let ask =
                    Ask { prompt: prompt.clone(), max_new_tokens: room, sampling, rules: rules.clone() };
                wanted.push(((task, sample), ask));
            }
        }
        let progress = Progress::new("completions", wanted.len() + samples.len(), samples.len());
        let mut keep = |(task, sample): (&Task, u64), completion: String, tokens: usize, ended: &str| {
            let sample = Sample {
                task_id: task.task_id.clone(),
                sample,
                completion,
                tokens: tokens as u64,
                ended: ended.to_owned(),
            };
            log.append(&sample)?;
            samples.push(sample);
            Ok(())
        };
        for which in without_room {
            keep(which, String::new(), 0, "no_room")?;
        }
        subject.complete(wanted.into_iter(), |which, made: Made| {
            progress.advance();
            let ended = match made.reason {
                Reason::Length => "length",
                Reason::EndToken => "end_token",
                Reason::Stop => "stop",
            };
            keep(which, cut(which.0, &made.text), made.tokens, ended)
        })?;
        Ok(samples)
    }

    /// Runs every completion that has not been judged yet, several at once.
    fn judge(
        &self,
        out: &Path,
        samples: &[Sample],
        shown: &(dyn Fn(&Task) -> String + Sync),
    ) -> Result<Vec<Judged>, Error> {
        let (mut log, mut judged) = Log::<Judged>::open(&out.join(VERDICTS_FILE))?;
        let known: HashSet<(&str, u64)> =
            judged.iter().map(|judged| (judged.task_id.as_str(), judged.sample)).collect();
        let tasks: HashMap<&str, &Task> =
            self.tasks.iter().map(|task| (task.task_id.as_str(), task)).collect();
        let open: Vec<(&Task, &Sample)> = samples
            .iter()
            .filter(|sample| !known.contains(&(sample.task_id.as_str(), sample.sample)))
            .filter_map(|sample| Some((*tasks.get(sample.task_id.as_str())?, sample)))
            .collect();
        let progress = Progress::new("programs", samples.len(), samples.len() - open.len());
        let (sender, verdicts) = channel();
        let next = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for _ in 0..self.parallel.min(open.len()) {
                let (sender, open, next) = (sender.clone(), &open, &next);
                scope.spawn(move || {
                    while let Some((task, sample)) = open.get(next.fetch_add(1, Ordering::Relaxed)) {
                        let program = task.program(&shown(task), &sample.completion);
                        if sender.send((*sample, self.python.run(&program))).is_err() {
                            return;
                        }
                    }
                });
            }
            drop(sender);
            for (sample, verdict) in verdicts {
                let Verdict { passed, result } = verdict?;
                let verdict =
                    Judged { task_id: sample.task_id.clone(), sample: sample.sample, passed, result };
                log.append(&verdict)?;
                judged.push(verdict);
                progress.advance();
            }
            Ok(judged)
        })
    }

    /// Task by task, in the order of the file.
    fn count(&self, samples: &[Sample], judged: &[Judged]) -> Found {
        let passed: HashSet<(&str, u64)> = judged
            .iter()
            .filter(|judged| judged.passed)
            .map(|judged| (judged.task_id.as_str(), judged.sample))
            .collect();
        let mut found = Found::default();
        let mut by_task: HashMap<&str, Vec<&Sample>> = HashMap::new();
        for sample in samples {
            by_task.entry(&sample.task_id).or_default().push(sample);
            for (is_so, note) in [
                (sample.completion.trim().is_empty(), "completions that are empty"),
                (sample.ended == "no_room", "prompts that left no room for a completion"),
                (sample.ended == "length", "completions that were cut for their length"),
            ] {
                if is_so {
                    *found.notes.entry(note.to_owned()).or_default() += 1;
                }
            }
        }
        for verdict in judged.iter().filter(|judged| judged.result == "timed out") {
            let _ = verdict;
            *found.notes.entry("programs that timed out".to_owned()).or_default() += 1;
        }
        for task in &self.tasks {
            let Some(samples) = by_task.get(task.task_id.as_str()) else { continue };
            let is_passed = |sample: &&&Sample| passed.contains(&(sample.task_id.as_str(), sample.sample));
            let truth = task.canonical_solution.as_deref().filter(|_| self.kind == Kind::Infilling);
            let exact = |truth: &str| {
                samples.iter().filter(|sample| text::is_exact(&sample.completion, truth)).count() as u64
            };
            found.items.push(Item {
                id: task.task_id.clone(),
                kind: String::new(),
                language: String::new(),
                repository: String::new(),
                samples: samples.len() as u64,
                passed: Some(samples.iter().filter(is_passed).count() as u64),
                exact: truth.map(exact),
                similarity: None,
            });
        }
        found
    }
}
