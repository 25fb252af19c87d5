//! Weights of an adapter, from the base to the whole adapter and beyond: how much is won on the files that it was trained
//! for, and how much is forgotten of others. Weight 0 is the base.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::PathBuf;

use tunefleet_proto::evaluation::statistics::mean;
use tunefleet_proto::evaluation::{EVALUATION_FILE, Evaluation, Grouping, Measure, SWEEP_FILE, SweepRow};

use super::repository::{Exam, Questions};
use super::subject::{Subject, SubjectArgs};
use super::{Error, log, report};

/// Command line of `worker evaluate sweep`.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    subject: SubjectArgs,
    #[command(flatten)]
    questions: Questions,
    /// A dataset of other code, whose held-out files tell what is forgotten.
    #[arg(long, value_name = "DIR")]
    general: Option<PathBuf>,
    /// The weights.
    #[arg(long, value_delimiter = ',', default_value = "0,0.2,0.4,0.6,0.8,1")]
    weights: Vec<f64>,
    /// Directory for the results, one directory for each weight.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
}

/// Runs the verb.
///
/// # Errors
/// See [`Error`].
pub fn run(args: &Args) -> Result<(), Error> {
    if args.subject.adapter.is_none() {
        return Err(Error::Setting("a sweep weighs an adapter: give --adapter DIR".to_owned()));
    }
    if let Some(weight) = args.weights.iter().find(|weight| !weight.is_finite()) {
        return Err(Error::Setting(format!("--weights must be numbers, got {weight}")));
    }
    let exam = Exam::open(&args.questions)?;
    let general = match &args.general {
        Some(dir) => {
            let questions = Questions { dataset: dir.clone(), ..args.questions.clone() };
            Some((Exam::open(&questions)?, questions))
        }
        None => None,
    };
    let mut subject = Subject::load(&args.subject)?;
    let mut rows = Vec::new();
    for weight in &args.weights {
        subject.weigh(*weight)?;
        let hold = |exam: &Exam, questions: &Questions, of: &str| {
            let out = args.out.join(format!("weight-{weight:.2}")).join(of);
            let evaluation = exam.hold(questions, &subject, &out)?;
            log::write_json(&out.join(EVALUATION_FILE), &evaluation)?;
            Ok::<_, Error>(measures(&evaluation))
        };
        let dataset = hold(&exam, &args.questions, "dataset")?;
        let general = match &general {
            Some((exam, questions)) => hold(exam, questions, "general")?,
            None => BTreeMap::new(),
        };
        rows.push(SweepRow { weight: *weight, dataset, general });
    }
    log::write_json(&args.out.join(SWEEP_FILE), &rows)?;
    report::print(&table(&rows));
    Ok(())
}

fn measures(evaluation: &Evaluation) -> BTreeMap<String, f64> {
    let value = |measure: Measure| {
        let scores = evaluation.scores(measure, Grouping::All).into_values().next().unwrap_or_default();
        (measure.name(), mean(&scores.into_values().collect::<Vec<_>>()).value)
    };
    evaluation.measures().into_iter().map(value).collect()
}

fn table(rows: &[SweepRow]) -> String {
    let mut text = String::from("weight");
    let names = |of: &'static str, values: &BTreeMap<String, f64>| {
        values.keys().map(|name| format!("{of}{name}")).collect::<Vec<_>>()
    };
    let first = rows.first();
    let columns: Vec<String> = first
        .map(|row| [names("", &row.dataset), names("general ", &row.general)].concat())
        .unwrap_or_default();
    for name in &columns {
        let _ = write!(text, "  {name:>22}");
    }
    text.push('\n');
    for row in rows {
        let _ = write!(text, "{:>6.2}", row.weight);
        for value in row.dataset.values().chain(row.general.values()) {
            let _ = write!(text, "  {value:>22.4}");
        }
        text.push('\n');
    }
    for (name, is_better_high) in [(Measure::Loss.name(), false), (Measure::Exact.name(), true)] {
        let sign = if is_better_high { -1.0 } else { 1.0 };
        let best = rows
            .iter()
            .filter_map(|row| Some((row.weight, *row.dataset.get(&name)?)))
            .min_by(|a, b| (a.1 * sign).total_cmp(&(b.1 * sign)));
        if let Some((weight, value)) = best {
            let _ = writeln!(text, "best {name}: {value:.4} at weight {weight}");
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_best_weight_is_named() {
        let row = |weight, loss, exact| SweepRow {
            weight,
            dataset: BTreeMap::from([("loss".to_owned(), loss), ("exact match".to_owned(), exact)]),
            general: BTreeMap::from([("loss".to_owned(), loss + 1.0)]),
        };
        let text = table(&[row(0.0, 2.0, 0.1), row(0.6, 1.5, 0.3), row(1.0, 1.6, 0.4)]);
        assert!(text.contains("best loss: 1.5000 at weight 0.6"), "{text}");
        assert!(text.contains("best exact match: 0.4000 at weight 1\n"), "{text}");
        assert_eq!(text.lines().next().unwrap().matches("loss").count(), 2);
    }
}
