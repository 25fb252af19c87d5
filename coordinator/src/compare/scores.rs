//! Evaluations of several models on the same tasks, in one table: numbers with their intervals, and whether two differ.

use tunefleet_proto::evaluation::statistics::{Estimate, difference};
use tunefleet_proto::evaluation::{ALL, Evaluation, Grouping, Kind, Measure};

use super::document::Block;

/// Groups of one grouping that are shown.
const MAX_GROUPS: usize = 20;

/// A model, and what it did with one set of tasks.
pub struct Column<'a> {
    /// The model.
    pub name: &'a str,
    /// Whether it is one before training.
    pub is_base: bool,
    /// What it did.
    pub evaluation: &'a Evaluation,
}

/// Tables of one set of tasks.
pub fn blocks(name: &str, columns: &[Column<'_>]) -> Vec<Block> {
    let Some(first) = columns.first() else { return Vec::new() };
    let mut blocks = vec![Block::Subheading(format!("{name} ({})", kind(first.evaluation.kind)))];
    blocks.push(Block::Text(protocol(first.evaluation)));
    let measures = measures(columns);
    let head = |first: &str| {
        std::iter::once(first.to_owned()).chain(columns.iter().map(|column| column.name.to_owned())).collect()
    };
    let mut rows = Vec::new();
    for measure in &measures {
        let cells = columns.iter().map(|column| cell(column.evaluation, *measure, Grouping::All, ALL));
        rows.push(std::iter::once(measure.name()).chain(cells).collect());
    }
    blocks.push(Block::Table { head: head("measure"), rows });
    blocks.extend(differences(columns, &measures));
    for grouping in [Grouping::Kind, Grouping::Language, Grouping::Repository] {
        let mut rows = Vec::new();
        for measure in &measures {
            let groups = first.evaluation.scores(*measure, grouping);
            if groups.len() < 2 {
                continue;
            }
            // The largest first: small groups say little.
            let mut names: Vec<(&String, usize)> = groups.iter().map(|(name, of)| (name, of.len())).collect();
            names.sort_by_key(|(name, tasks)| (std::cmp::Reverse(*tasks), (*name).clone()));
            for (group, _) in names.into_iter().take(MAX_GROUPS) {
                let cells = columns.iter().map(|column| cell(column.evaluation, *measure, grouping, group));
                rows.push(std::iter::once(format!("{group}: {}", measure.name())).chain(cells).collect());
            }
        }
        if !rows.is_empty() {
            blocks.push(Block::Table { head: head(&format!("by {}", grouping.name())), rows });
        }
    }
    let notes = columns.iter().flat_map(|column| {
        column.evaluation.notes.iter().map(|(note, count)| format!("{}: {note}: {count}.", column.name))
    });
    let notes: Vec<String> = notes.collect();
    if !notes.is_empty() {
        blocks.push(Block::Text(notes.join(" ")));
    }
    blocks
}

/// What was trained beside what that was before (the first column), and each run beside the one before it.
fn differences(columns: &[Column<'_>], measures: &[Measure]) -> Option<Block> {
    let base = columns.first().filter(|column| column.is_base);
    let trained: Vec<&Column<'_>> = columns.iter().filter(|column| !column.is_base).collect();
    let helped = base.into_iter().flat_map(|base| trained.iter().map(move |run| (base, *run)));
    let beside = trained.windows(2).filter_map(|pair| Some((*pair.first()?, *pair.last()?)));
    let mut rows = Vec::new();
    for (a, b) in helped.chain(beside) {
        for measure in measures {
            let pairs = a.evaluation.paired(b.evaluation, *measure);
            if pairs.is_empty() {
                continue;
            }
            let found = difference(&pairs);
            let Estimate { value, low, high, tasks } = found.estimate;
            let better = if measure.is_better_high() { value > 0.0 } else { value < 0.0 };
            let verdict = match (found.p_value < 0.05, better) {
                (false, _) => "not told apart",
                (true, true) => "better",
                (true, false) => "worse",
            };
            rows.push(vec![
                format!("{} beside {}: {}", b.name, a.name, measure.name()),
                signed(*measure, value),
                format!("{} to {}", signed(*measure, low), signed(*measure, high)),
                format!("{:.4}", found.p_value),
                tasks.to_string(),
                verdict.to_owned(),
            ]);
        }
    }
    let head = ["difference", "value", "95% interval", "p", "tasks", "at 5%"].map(str::to_owned).to_vec();
    (!rows.is_empty()).then_some(Block::Table { head, rows })
}

fn measures(columns: &[Column<'_>]) -> Vec<Measure> {
    let mut measures: Vec<Measure> = columns.iter().flat_map(|column| column.evaluation.measures()).collect();
    measures.sort();
    measures.dedup();
    measures
}

fn cell(evaluation: &Evaluation, measure: Measure, grouping: Grouping, group: &str) -> String {
    match evaluation.scores(measure, grouping).remove(group) {
        Some(scores) => {
            let Estimate { value, low, high, .. } =
                measure.estimate(&scores.into_values().collect::<Vec<_>>());
            format!("{} ({} to {})", shown(measure, value), shown(measure, low), shown(measure, high))
        }
        None => "-".to_owned(),
    }
}

fn kind(kind: Kind) -> &'static str {
    match kind {
        Kind::Humaneval => "functions judged by tests",
        Kind::Infilling => "holes in solutions",
        Kind::Repository => "held-out files",
    }
}

/// How it was asked, on one line.
fn protocol(evaluation: &Evaluation) -> String {
    // Where it lay says nothing, and the table has its name.
    let settings = evaluation.protocol.iter().filter(|(name, _)| *name != "dataset").map(|(name, value)| {
        match value.as_str() {
            Some(text) => format!("{name} {text}"),
            None => format!("{name} {value}"),
        }
    });
    format!("Asked with {}.", settings.collect::<Vec<_>>().join(", "))
}

fn shown(measure: Measure, value: f64) -> String {
    if measure == Measure::Loss { format!("{value:.4}") } else { format!("{:.1}%", value * 100.0) }
}

fn signed(measure: Measure, value: f64) -> String {
    if measure == Measure::Loss { format!("{value:+.4}") } else { format!("{:+.1}%", value * 100.0) }
}
