//! Completions of tasks, and what comes of them: kept as they come, by one process or by several that share the tasks.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::channel;

use serde_json::{Value, json};
use tunefleet_proto::evaluation::{self, Item, Kind};
use tunefleet_sandbox::{Isolation, Limits};

use super::JudgeArgs;
use super::protocol::{Drawing, Protocol};
use crate::evaluate::log::{self, Judged, Log, SAMPLES_FILE, Sample, VERDICTS_FILE};
use crate::evaluate::progress::Progress;
use crate::evaluate::python::{Python, Verdict};
use crate::evaluate::report::Found;
use crate::evaluate::subject::{Ask, Made, Subject};
use crate::evaluate::tasks::{self, Task, Tasks};
use crate::evaluate::{Error, text};
use crate::serve::engine::request::Reason;

/// Which tasks are one process's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Share {
    /// Which process.
    pub rank: usize,
    /// Of so many.
    pub world: usize,
}

impl Share {
    /// All of them.
    pub const WHOLE: Share = Share { rank: 0, world: 1 };

    /// Whether task `number` is in it.
    pub fn has(&self, number: usize) -> bool {
        number % self.world == self.rank
    }
}

/// Tasks and what judges them.
pub struct Work {
    /// What is judged.
    pub kind: Kind,
    /// In the order of the file.
    pub tasks: Vec<Task>,
    /// Of the file.
    pub digest: String,
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

    /// Everything that decides the numbers.
    pub fn settings(&self, mut protocol: BTreeMap<String, Value>) -> BTreeMap<String, Value> {
        protocol.insert("tasks".to_owned(), json!(self.tasks.len()));
        protocol.insert("python".to_owned(), json!(self.python.version()));
        protocol
    }

    /// Begins in a directory, or goes on where an earlier start with the same settings ended.
    ///
    /// # Errors
    /// One with other settings.
    pub fn begin(
        &self,
        dir: &Path,
        settings: &BTreeMap<String, Value>,
        subject: &evaluation::Subject,
    ) -> Result<(), Error> {
        let mut settings = settings.clone();
        settings.insert("tasks_digest".to_owned(), json!(self.digest));
        settings.insert("subject".to_owned(), json!(subject));
        log::begin(dir, &settings)
    }

    /// Completions of a share of the tasks, and what comes of them, kept in `dir`.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn answer(
        &self,
        dir: &Path,
        share: Share,
        subject: &Subject,
        protocol: Protocol,
        drawing: Drawing,
    ) -> Result<(), Error> {
        self.begin(dir, &self.settings(protocol.settings(&drawing)), &subject.described)?;
        let samples = self.complete(dir, share, subject, protocol, drawing)?;
        self.judge(dir, &samples, protocol)?;
        Ok(())
    }

    /// What is kept in all of `dirs`, task by task.
    ///
    /// # Errors
    /// Files that are not what was written.
    pub fn gather(&self, dirs: &[&Path]) -> Result<Found, Error> {
        let (mut samples, mut judged) = (Vec::new(), Vec::new());
        for dir in dirs {
            samples.extend(Log::<Sample>::open(&dir.join(SAMPLES_FILE))?.1);
            judged.extend(Log::<Judged>::open(&dir.join(VERDICTS_FILE))?.1);
        }
        Ok(self.count(&samples, &judged))
    }

    fn complete(
        &self,
        dir: &Path,
        share: Share,
        subject: &Subject,
        protocol: Protocol,
        drawing: Drawing,
    ) -> Result<Vec<Sample>, Error> {
        let (mut log, mut samples) = Log::<Sample>::open(&dir.join(SAMPLES_FILE))?;
        let known: HashSet<(&str, u64)> =
            samples.iter().map(|sample| (sample.task_id.as_str(), sample.sample)).collect();
        let mut wanted = Vec::new();
        let mut without_room = Vec::new();
        for (number, task) in (0u64..).zip(&self.tasks).filter(|(number, _)| share.has(*number as usize)) {
            let (prompt, room, rules) = protocol.ask(subject, task)?;
            for sample in 0..u64::from(drawing.samples_per_task) {
                if known.contains(&(task.task_id.as_str(), sample)) {
                    continue;
                }
                if room == 0 || prompt.is_empty() {
                    without_room.push((task, sample));
                    continue;
                }
                let ask = Ask {
                    prompt: prompt.clone(),
                    max_new_tokens: room,
                    sampling: drawing.sampling(number, sample),
                    rules: rules.clone(),
                };
                wanted.push(((task, sample), ask));
            }
        }
        let progress = Progress::new("completions", wanted.len() + samples.len(), samples.len());
        let mut keep = |(task, sample): (&Task, u64), completion: &str, tokens: usize, ended: &str| {
            let sample = Sample {
                task_id: task.task_id.clone(),
                sample,
                completion: completion.to_owned(),
                tokens: tokens as u64,
                ended: ended.to_owned(),
            };
            log.append(&sample)?;
            samples.push(sample);
            Ok(())
        };
        for which in without_room {
            keep(which, "", 0, "no_room")?;
        }
        subject.complete(wanted.into_iter(), |which, made: Made| {
            progress.advance();
            let ended = match made.reason {
                Reason::Length => "length",
                Reason::EndToken => "end_token",
                Reason::Stop => "stop",
            };
            keep(which, protocol.cut(&made.text), made.tokens, ended)
        })?;
        Ok(samples)
    }

    /// Runs every completion that has not been judged yet, several at once.
    ///
    /// # Errors
    /// A program that could not be run; whatever a program does is a verdict.
    pub fn judge(&self, dir: &Path, samples: &[Sample], protocol: Protocol) -> Result<Vec<Judged>, Error> {
        let (mut log, mut judged) = Log::<Judged>::open(&dir.join(VERDICTS_FILE))?;
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
                        let program = task.program(protocol.shown(task), &sample.completion);
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
    pub fn count(&self, samples: &[Sample], judged: &[Judged]) -> Found {
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
        let timed_out = judged.iter().filter(|judged| judged.result == "timed out").count();
        if timed_out > 0 {
            found.notes.insert("programs that timed out".to_owned(), timed_out as u64);
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
