//! Several adapters, alone and mixed, on several datasets: one loss for each pair, what each adapter wins on its own
//! dataset, and how much of that the mix keeps. A search looks for the weights with which the mix keeps most.
//!
//! The mix is exact (`cat`): the weighted sum of what the adapters add. Where weights are searched for, that is done on
//! one half of the files, and the figures are those of the other.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use serde::Serialize;
use tunefleet_proto::evaluation::FileLoss;

use super::repository::{Exam, Questions};
use super::subject::{Subject, SubjectArgs};
use super::{Error, log, report};
use crate::adapter::combine::{self, Combination, Options, Part};
use crate::adapter::files;
use crate::adapter::prune::MajoritySign;
use crate::generate::adapters::Adapter;

/// What was found, in the results' directory.
const GRID_FILE: &str = "grid.json";
/// Name of the model without adapters, and of all adapters together.
const BASE: &str = "base";
const MIX: &str = "mix";
/// Most mixes that a search tries.
const MAX_MIXES: usize = 1000;

/// Command line of `worker evaluate grid`.
#[derive(Debug, clap::Args)]
#[command(after_help = GRID_HELP)]
pub struct Args {
    #[command(flatten)]
    subject: SubjectArgs,
    /// An adapter that takes part, with its weight in the mix, 1 when absent.
    #[arg(long = "part", value_name = "NAME=DIR[@WEIGHT]", value_parser = crate::serve::parse_adapter, required = true)]
    parts: Vec<(String, PathBuf, f64)>,
    /// A dataset whose held-out rows are asked: files, or conversations.
    #[arg(long = "exam", value_name = "NAME=DIR", value_parser = pair, required = true)]
    exams: Vec<(String, String)>,
    /// The exam on which an adapter's gain is counted.
    #[arg(long = "own", value_name = "PART=EXAM", value_parser = pair)]
    own: Vec<(String, String)>,
    /// Looks for weights among these, the same for every adapter, with which the mix keeps most of every gain.
    #[arg(long, value_delimiter = ',', value_name = "WEIGHTS")]
    search: Vec<f64>,
    /// Rows of each exam, at most.
    #[arg(long, default_value_t = 500, value_parser = clap::value_parser!(u32).range(2..))]
    files: u32,
    /// Tokens of a window of a file, and of a conversation.
    #[arg(long, value_parser = clap::value_parser!(u32).range(8..))]
    window_tokens: Option<u32>,
    /// Directory for the results.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
}

const GRID_HELP: &str = "\
Example:
  worker evaluate grid --model runs/assistant/chat-model \\
    --part copilot=runs/copilot/adapter --part assistant=runs/assistant/adapter \\
    --exam code=runs/copilot/dataset --exam other-code=general --exam chat=runs/assistant/dataset \\
    --own copilot=code --own assistant=chat --search 0.6,0.8,1,1.2 --out grid";

/// What was found.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Grid {
    /// Weight of each adapter in the mix.
    pub weights: BTreeMap<String, f64>,
    /// Mean loss per counted token: model -> exam -> loss.
    pub losses: BTreeMap<String, BTreeMap<String, f64>>,
    /// Of each adapter with an exam of its own.
    pub kept: BTreeMap<String, Kept>,
    /// Every mix that was tried: weights, and the least share that it kept on the searched half.
    pub tried: Vec<(BTreeMap<String, f64>, f64)>,
}

/// What a mix keeps of an adapter.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Kept {
    /// The exam.
    pub exam: String,
    /// By how much the adapter lowers the base's loss there.
    pub gain: f64,
    /// Of that, the share by which the mix lowers it.
    pub share: f64,
}

/// One half of the files, or all of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Half {
    All,
    Searched,
    Told,
}

impl Half {
    fn has(self, number: usize) -> bool {
        match self {
            Half::All => true,
            Half::Searched => number.is_multiple_of(2),
            Half::Told => !number.is_multiple_of(2),
        }
    }

    fn loss(self, files: &[FileLoss]) -> f64 {
        let own = files.iter().enumerate().filter(|(number, _)| self.has(*number));
        let (sum, tokens) =
            own.fold((0.0, 0), |(sum, tokens), (_, file)| (sum + file.loss_sum, tokens + file.tokens));
        sum / (tokens.max(1) as f64)
    }
}

/// Losses of files by exam.
type Answers = BTreeMap<String, Vec<FileLoss>>;

/// Runs the verb.
///
/// # Errors
/// See [`Error`].
pub fn run(args: &Args) -> Result<(), Error> {
    check(args)?;
    let mut asked = Vec::new();
    for (name, dir) in &args.exams {
        let questions = Questions::of_files(Path::new(dir), args.files as usize, args.window_tokens);
        asked.push((name.clone(), Exam::open(&questions)?, questions));
    }
    let mut adapters = Vec::new();
    for (name, dir, _) in &args.parts {
        adapters.push((name.clone(), files::read(dir)?));
    }
    let mut subject = Subject::load(&args.subject)?;
    let mut ask = |name: &str, weights: &[f64]| -> Result<Answers, Error> {
        let parts = adapters.iter().zip(weights).filter(|(_, weight)| **weight != 0.0);
        let parts: Vec<Part> = parts
            .map(|((name, adapter), weight)| Part {
                name: name.clone(),
                adapter: adapter.shallow_clone(),
                weight: *weight,
            })
            .collect();
        let adapter = if parts.is_empty() { None } else { Some(mixed(&parts, &subject)?) };
        subject.take(adapter)?;
        let told = parts.iter().map(|part| format!("{} x {}", part.weight, part.name));
        subject.described.adapter =
            Some(told.collect::<Vec<_>>().join(" + ")).filter(|told| !told.is_empty());
        let mut answers = Answers::new();
        for (of, exam, questions) in &asked {
            let evaluation = exam.hold(questions, &subject, &args.out.join(name).join(of))?;
            answers.insert(of.clone(), evaluation.files);
        }
        tracing::info!("{name}: asked");
        Ok(answers)
    };
    let none = vec![0.0; args.parts.len()];
    let mut models = vec![(BASE.to_owned(), ask(BASE, &none)?)];
    for (at, (name, ..)) in args.parts.iter().enumerate() {
        let alone: Vec<f64> = (0..args.parts.len()).map(|other| f64::from(u8::from(other == at))).collect();
        models.push((name.clone(), ask(name, &alone)?));
    }
    let mut weights: Vec<f64> = args.parts.iter().map(|(_, _, weight)| *weight).collect();
    let (mut tried, mut half) = (Vec::new(), Half::All);
    if !args.search.is_empty() {
        half = Half::Told;
        let mut best: Option<(f64, Vec<f64>)> = None;
        for mix in mixes(&args.search, args.parts.len()) {
            let answers = ask(&format!("{MIX}-{}", shown(&mix)), &mix)?;
            let kept = kept(args, &models, &answers, Half::Searched);
            let least = kept.values().map(|kept| kept.share).fold(f64::INFINITY, f64::min);
            tried.push((by_name(args, &mix), least));
            if best.as_ref().is_none_or(|(before, _)| least > *before) {
                best = Some((least, mix));
            }
        }
        if let Some((_, mix)) = best {
            weights = mix;
        }
    }
    let answers = ask(&format!("{MIX}-{}", shown(&weights)), &weights)?;
    let kept = kept(args, &models, &answers, half);
    models.push((MIX.to_owned(), answers));
    let losses = models.iter().map(|(name, answers)| {
        let of_exams = answers.iter().map(|(exam, files)| (exam.clone(), half.loss(files)));
        (name.clone(), of_exams.collect())
    });
    let grid = Grid { weights: by_name(args, &weights), losses: losses.collect(), kept, tried };
    log::write_json(&args.out.join(GRID_FILE), &grid)?;
    report::print(&table(args, &grid));
    Ok(())
}

fn check(args: &Args) -> Result<(), Error> {
    let refuse = |message: String| Err(Error::Setting(message));
    if args.subject.adapter.is_some() {
        return refuse("--adapter is for one model: name adapters with --part NAME=DIR".to_owned());
    }
    let names: Vec<&String> = args.parts.iter().map(|(name, ..)| name).collect();
    for (at, name) in names.iter().enumerate() {
        if [BASE, MIX].contains(&name.as_str()) || names.iter().take(at).any(|other| other == name) {
            return refuse(format!("--part {name}: the name is taken, choose another"));
        }
        if name.contains(['/', '\\']) || name.starts_with('.') {
            return refuse(format!("--part {name}: the name becomes a directory, and cannot hold a slash"));
        }
    }
    for (part, exam) in &args.own {
        if !names.contains(&part) {
            return refuse(format!("--own {part}={exam}: there is no --part {part}"));
        }
        if !args.exams.iter().any(|(name, _)| name == exam) {
            return refuse(format!("--own {part}={exam}: there is no --exam {exam}"));
        }
    }
    if !args.search.is_empty() && args.own.is_empty() {
        return refuse(
            "--search keeps what adapters win on their own: say with --own PART=EXAM where".to_owned(),
        );
    }
    if let Some(weight) = args.search.iter().find(|weight| !weight.is_finite()) {
        return refuse(format!("--search: {weight} is no number"));
    }
    let count = args.search.len().checked_pow(args.parts.len() as u32).unwrap_or(usize::MAX);
    if count > MAX_MIXES {
        return refuse(format!("--search: {count} mixes are more than {MAX_MIXES}: give fewer weights"));
    }
    Ok(())
}

/// The parts as one adapter of the subject's model.
fn mixed(parts: &[Part], subject: &Subject) -> Result<Adapter, Error> {
    let options = Options {
        combination: Combination::Cat,
        rank: None,
        density: None,
        majority_sign: MajoritySign::Total,
        seed: 0,
        peft_compat: false,
    };
    let adapter = combine::combine(parts, options)?.adapter;
    let names: Vec<&str> = parts.iter().map(|part| part.name.as_str()).collect();
    let name = PathBuf::from(names.join(" + "));
    let plan = files::plan_for(&adapter, &name, &subject.config)?;
    Ok(Adapter::of(&adapter, &plan, &name, 1.0, &subject.config, subject.numerics)?)
}

/// What `answers` of a mix keep of each adapter's gain on its own exam.
fn kept(args: &Args, models: &[(String, Answers)], answers: &Answers, half: Half) -> BTreeMap<String, Kept> {
    let loss = |answers: &Answers, exam: &str| answers.get(exam).map(|files| half.loss(files));
    let of = |name: &str| models.iter().find(|(model, _)| model == name).map(|(_, answers)| answers);
    let entry = |(part, exam): &(String, String)| {
        let base = loss(of(BASE)?, exam)?;
        let (alone, mix) = (loss(of(part)?, exam)?, loss(answers, exam)?);
        let gain = base - alone;
        Some((part.clone(), Kept { exam: exam.clone(), gain, share: (base - mix) / gain }))
    };
    args.own.iter().filter_map(entry).collect()
}

/// Every choice of one weight for each part.
fn mixes(weights: &[f64], parts: usize) -> Vec<Vec<f64>> {
    (0..parts).fold(vec![Vec::new()], |mixes, _| {
        let longer =
            |mix: &Vec<f64>| weights.iter().map(|weight| [mix.as_slice(), &[*weight]].concat()).collect();
        mixes.iter().flat_map(|mix| -> Vec<Vec<f64>> { longer(mix) }).collect()
    })
}

fn by_name(args: &Args, weights: &[f64]) -> BTreeMap<String, f64> {
    args.parts.iter().map(|(name, ..)| name.clone()).zip(weights.iter().copied()).collect()
}

fn shown(weights: &[f64]) -> String {
    weights.iter().map(|weight| weight.to_string()).collect::<Vec<_>>().join("-")
}

fn table(args: &Args, grid: &Grid) -> String {
    let mut text = format!("{:<16}", "loss");
    for (exam, _) in &args.exams {
        let _ = write!(text, "  {exam:>14}");
    }
    text.push('\n');
    let names = std::iter::once(BASE).chain(args.parts.iter().map(|(name, ..)| name.as_str())).chain([MIX]);
    for name in names {
        let _ = write!(text, "{name:<16}");
        for (exam, _) in &args.exams {
            let loss = grid.losses.get(name).and_then(|of| of.get(exam)).copied().unwrap_or(f64::NAN);
            let _ = write!(text, "  {loss:>14.4}");
        }
        text.push('\n');
    }
    let weights = grid.weights.iter().map(|(name, weight)| format!("{weight} x {name}"));
    let _ = writeln!(text, "mix: {}", weights.collect::<Vec<_>>().join(" + "));
    for (part, Kept { exam, gain, share }) in &grid.kept {
        let percent = 100.0 * share;
        let _ = writeln!(text, "{part}: gains {gain:.4} on {exam}, of which the mix keeps {percent:.1}%");
    }
    if !grid.tried.is_empty() {
        let _ = writeln!(
            text,
            "weights were searched on half of the rows ({} mixes), and the figures are those of the other half",
            grid.tried.len()
        );
    }
    text
}

/// `NAME=VALUE`
fn pair(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((name, value)) if !name.is_empty() && !value.is_empty() => {
            Ok((name.to_owned(), value.to_owned()))
        }
        _ => Err(format!("`{text}` must look like NAME=VALUE")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(loss_sum: f64, tokens: u64) -> FileLoss {
        let (id, language, repository) = (String::new(), String::new(), String::new());
        FileLoss { id, language, repository, loss_sum, tokens }
    }

    #[test]
    fn halves_do_not_overlap_and_losses_are_means_over_tokens() {
        let files = [file(10.0, 10), file(40.0, 10), file(20.0, 10), file(60.0, 30)];
        assert_eq!(Half::Searched.loss(&files), 1.5);
        assert_eq!(Half::Told.loss(&files), 2.5);
        assert_eq!(Half::All.loss(&files), 130.0 / 60.0);
    }

    #[test]
    fn every_choice_of_weights_is_tried_once() {
        let all = mixes(&[0.5, 1.0], 2);
        assert_eq!(all, [[0.5, 0.5], [0.5, 1.0], [1.0, 0.5], [1.0, 1.0]]);
    }
}
