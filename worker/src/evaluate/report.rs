//! The table of an evaluation, and what differs from another model's on the same tasks.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use serde_json::Value;
use tunefleet_proto::evaluation::statistics::{Difference, difference};
use tunefleet_proto::evaluation::{
    ALL, EVALUATION_FILE, EVALUATION_VERSION, Evaluation, FileLoss, Grouping, Item, Kind, Measure, Subject,
};

use super::{Error, log};

/// The program that writes evaluations.
const WRITTEN_BY: &str = concat!("tunefleet worker ", env!("CARGO_PKG_VERSION"));

/// Where an evaluation is written, and what it is compared with.
#[derive(Debug, Clone, clap::Args)]
pub struct ReportArgs {
    /// Directory for completions and results; an evaluation that was stopped goes on there. Below a job's output,
    /// in `evaluations/NAME`, `coordinator compare` finds it.
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
    /// Directory of another model's evaluation on the same tasks: the paired difference is told.
    #[arg(long, value_name = "DIR")]
    pub against: Option<PathBuf>,
}

/// What an evaluation found.
#[derive(Debug, Default)]
pub struct Found {
    /// Task by task.
    pub items: Vec<Item>,
    /// File by file.
    pub files: Vec<FileLoss>,
    /// What a reader should know of.
    pub notes: BTreeMap<String, u64>,
}

/// Puts an evaluation together.
pub fn evaluation(
    kind: Kind,
    subject: Subject,
    protocol: BTreeMap<String, Value>,
    tasks_digest: String,
    found: Found,
) -> Evaluation {
    let Found { items, files, notes } = found;
    Evaluation {
        version: EVALUATION_VERSION,
        written_by: WRITTEN_BY.to_owned(),
        kind,
        subject,
        protocol,
        tasks_digest,
        items,
        files,
        notes,
    }
}

/// Writes `evaluation.json`, and prints the table.
///
/// # Errors
/// A file that cannot be written; an evaluation to compare with that is none, or of other tasks.
pub fn finish(args: &ReportArgs, evaluation: &Evaluation) -> Result<(), Error> {
    log::write_json(&args.out.join(EVALUATION_FILE), evaluation)?;
    let mut text = table(evaluation);
    if let Some(other) = &args.against {
        text += &compared(other, evaluation)?;
    }
    print(&text);
    Ok(())
}

/// To stdout.
pub fn print(text: &str) {
    // A reader that has gone away wants no more.
    let _ = std::io::Write::write_all(&mut std::io::stdout(), text.as_bytes());
}

/// Numbers with their intervals.
pub fn table(evaluation: &Evaluation) -> String {
    let mut text = String::new();
    let mut heading = Grouping::All;
    for cell in evaluation.cells() {
        if cell.grouping != heading {
            heading = cell.grouping;
            let _ = writeln!(text, "by {}", heading.name());
        }
        let estimate = cell.estimate;
        let unit = if cell.measure == Measure::Loss { "files" } else { "tasks" };
        let name = match cell.group.as_str() {
            ALL => cell.measure.name(),
            group => format!("  {group}: {}", cell.measure.name()),
        };
        let _ = writeln!(
            text,
            "{name:<36} {:>8}  95% interval {} to {}, {} {unit}",
            shown(cell.measure, estimate.value),
            shown(cell.measure, estimate.low),
            shown(cell.measure, estimate.high),
            estimate.tasks
        );
        if (cell.measure, cell.grouping) == (Measure::Loss, Grouping::All) {
            let _ = writeln!(text, "{:<36} {:>8.3}", "perplexity", estimate.value.exp());
        }
    }
    for (note, count) in &evaluation.notes {
        let _ = writeln!(text, "note: {note}: {count}");
    }
    text
}

/// The numbers of all tasks on one line.
pub fn line(evaluation: &Evaluation) -> String {
    let cells = evaluation.cells();
    let whole = cells.iter().filter(|cell| cell.grouping == Grouping::All);
    let numbers =
        whole.map(|cell| format!("{} {}", cell.measure.name(), shown(cell.measure, cell.estimate.value)));
    numbers.collect::<Vec<_>>().join(", ")
}

/// What differs from the evaluation in `dir`, with the paired test of each measure.
fn compared(dir: &Path, evaluation: &Evaluation) -> Result<String, Error> {
    let other = read(dir)?;
    if (other.kind, &other.tasks_digest) != (evaluation.kind, &evaluation.tasks_digest) {
        return Err(Error::Setting(format!(
            "--against {}: it is an evaluation of other tasks, which cannot be compared with these",
            dir.display()
        )));
    }
    let mut text = format!("compared with {}\n", dir.display());
    for measure in evaluation.measures() {
        let pairs = other.paired(evaluation, measure);
        if pairs.is_empty() {
            continue;
        }
        let Difference { estimate, p_value } = difference(&pairs);
        let _ = writeln!(
            text,
            "{:<36} {:>8}  95% interval {} to {}, p = {p_value:.4}",
            measure.name(),
            signed(measure, estimate.value),
            signed(measure, estimate.low),
            signed(measure, estimate.high)
        );
    }
    Ok(text)
}

/// Reads `evaluation.json` of a directory.
///
/// # Errors
/// A file that is missing, or none.
pub fn read(dir: &Path) -> Result<Evaluation, Error> {
    let path = dir.join(EVALUATION_FILE);
    let text = std::fs::read_to_string(&path).map_err(|source| Error::Io { path: path.clone(), source })?;
    serde_json::from_str(&text).map_err(|error| Error::Setting(format!("{}: {error}", path.display())))
}

fn shown(measure: Measure, value: f64) -> String {
    if measure == Measure::Loss { format!("{value:.4}") } else { format!("{:.2}%", value * 100.0) }
}

fn signed(measure: Measure, value: f64) -> String {
    if measure == Measure::Loss { format!("{value:+.4}") } else { format!("{:+.2}%", value * 100.0) }
}
