//! `coordinator compare`: runs beside each other, as a page and as Markdown.
//!
//! output directories -> what they hold (`runs`) -> costs and lines (`curves`, `plot`), tables with intervals (`scores`),
//! completions side by side (`samples`) -> blocks, and their two forms (`document`)

mod runs;
mod curves;
mod scores;
mod plot;
mod samples;
mod document;

use std::collections::BTreeMap;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use tunefleet_proto::evaluation::{Kind, SweepRow};

use crate::cli::exit;
use document::Block;
use plot::{Line, Plot};
use runs::{Found, Run};
use samples::Other;
use scores::Column;

/// Arguments of `coordinator compare`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Output directories of jobs; in tables, differences are from the first.
    #[arg(value_name = "RUN", required = true)]
    runs: Vec<PathBuf>,
    /// Directory of the report: `index.html`, `report.md` and its figures.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Another assistant beside them: `NAME=URL` of an OpenAI-compatible server (`http://host/v1`, its token in
    /// TUNEFLEET_COMPARE_TOKEN), or `NAME=FILE` with `{"id", "completion"}` in each line.
    #[arg(long, value_name = "NAME=URL|FILE", value_parser = samples::parse_other)]
    against: Vec<Other>,
    /// Completions that are shown side by side.
    #[arg(long, value_name = "N", default_value_t = 8)]
    samples: usize,
    /// Writes the places that are shown, to record another assistant's completions of them.
    #[arg(long, value_name = "FILE")]
    write_prompts: Option<PathBuf>,
}

/// What keeps a report from being written.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// An operation on a file.
    #[error("{path}: {source}", path = path.display())]
    Io {
        /// Which file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A file that is not what it should be.
    #[error("{path}: {problem}", path = path.display())]
    Format {
        /// Which file.
        path: PathBuf,
        /// What is wrong.
        problem: String,
    },
    /// A directory of something else.
    #[error("{}: holds no metrics.jsonl and no evaluations: name the `output` directory of a job", .0.display())]
    NoRun(PathBuf),
    /// Another assistant's server.
    #[error("{url}: {problem}")]
    Server {
        /// Which server.
        url: String,
        /// What it said.
        problem: String,
    },
}

/// Runs the verb.
pub fn run(args: Args) -> ExitCode {
    match report(&args) {
        Ok(page) => {
            // A reader that has gone away wants no more.
            let _ = writeln!(std::io::stdout(), "{}", page.display());
            ExitCode::from(exit::OK)
        }
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::from(exit::FAILED)
        }
    }
}

fn report(args: &Args) -> Result<PathBuf, Error> {
    let mut runs = args.runs.iter().map(|dir| Run::read(dir)).collect::<Result<Vec<_>, _>>()?;
    distinct(&mut runs);
    let names: Vec<&str> = runs.iter().map(|run| run.name.as_str()).collect();
    let title = format!("Compared: {}", names.join(", "));
    let mut blocks = curves::costs(&runs);
    blocks.extend(curves::blocks(&runs));
    blocks.extend(evaluations(&runs));
    blocks.extend(sweeps(&runs));
    blocks.extend(completions(args, &runs)?);
    let write = |name: &str, text: &str| {
        let path = args.out.join(name);
        std::fs::write(&path, text).map_err(|source| Error::Io { path: path.clone(), source }).map(|()| path)
    };
    std::fs::create_dir_all(&args.out).map_err(|source| Error::Io { path: args.out.clone(), source })?;
    for block in &blocks {
        if let Block::Figure(plot) = block {
            write(&plot.file_name(), &plot.svg())?;
        }
    }
    write("report.md", &document::markdown(&title, &blocks))?;
    write("index.html", &document::page(&title, &blocks))
}

/// Runs of one name are told apart by their directories.
fn distinct(runs: &mut [Run]) {
    let mut seen: BTreeMap<String, usize> = BTreeMap::new();
    runs.iter().for_each(|run| *seen.entry(run.name.clone()).or_default() += 1);
    for run in runs.iter_mut().filter(|run| seen.get(&run.name).is_some_and(|count| *count > 1)) {
        run.name = run.dir.display().to_string();
    }
}

/// A model of the report.
struct Model<'a> {
    name: String,
    is_base: bool,
    found: &'a Found,
}

/// Evaluations by tasks: the models before training first, then the runs.
fn evaluated<'a>(runs: &'a [Run]) -> BTreeMap<(Kind, String, &'a str), Vec<Model<'a>>> {
    let mut sets: BTreeMap<(Kind, String, &str), Vec<Model<'a>>> = BTreeMap::new();
    for is_base_wanted in [true, false] {
        for run in runs {
            for (path, found) in &run.evaluations {
                let (is_base, name) = runs::whose(path);
                if is_base != is_base_wanted {
                    continue;
                }
                let evaluation = &found.evaluation;
                let set =
                    sets.entry((evaluation.kind, name.to_owned(), &evaluation.tasks_digest)).or_default();
                let is_same = |model: &Model<'_>| {
                    model.found.evaluation.subject == evaluation.subject
                        && model.found.evaluation.items == evaluation.items
                };
                // Runs that began with the same model show it once.
                if is_base && set.iter().any(is_same) {
                    continue;
                }
                let name = match (is_base, &evaluation.subject.quantization) {
                    (false, _) => run.name.clone(),
                    (true, None) => "before training".to_owned(),
                    (true, Some(held_as)) => format!("before training, {held_as}"),
                };
                let is_taken = set.iter().any(|model| model.name == name);
                let name = if is_taken { format!("before {}", run.name) } else { name };
                set.push(Model { name, is_base, found });
            }
        }
    }
    sets
}

fn evaluations(runs: &[Run]) -> Vec<Block> {
    let mut blocks = Vec::new();
    for ((_, name, _), models) in evaluated(runs) {
        let columns: Vec<Column<'_>> = models
            .iter()
            .map(|model| Column {
                name: &model.name,
                is_base: model.is_base,
                evaluation: &model.found.evaluation,
            })
            .collect();
        blocks.extend(scores::blocks(&name, &columns));
    }
    if !blocks.is_empty() {
        let intervals = "In brackets: where 95 of 100 other draws of as many tasks would lie (bootstrap over tasks; \
                         3 / tasks where all went the same way). A \
                         difference is tested task by task, by random exchange of the two models.";
        blocks.insert(0, Block::Heading("Evaluations".to_owned()));
        blocks.insert(1, Block::Text(intervals.to_owned()));
    }
    blocks
}

/// Weights of adapters.
fn sweeps(runs: &[Run]) -> Vec<Block> {
    let mut blocks = Vec::new();
    for run in runs {
        for (path, rows) in &run.sweeps {
            let Some(first) = rows.first() else { continue };
            let measures: Vec<(bool, &String)> = first
                .dataset
                .keys()
                .map(|name| (false, name))
                .chain(first.general.keys().map(|name| (true, name)))
                .collect();
            let named = |(is_general, name): &(bool, &String)| {
                if *is_general { format!("{name}, other code") } else { (*name).clone() }
            };
            let head = std::iter::once("weight".to_owned()).chain(measures.iter().map(named)).collect();
            let value = |row: &SweepRow, (is_general, name): &(bool, &String)| {
                let of = if *is_general { &row.general } else { &row.dataset };
                of.get(*name).copied()
            };
            let cell =
                |value: Option<f64>| value.map_or_else(|| "-".to_owned(), |value| format!("{value:.4}"));
            let rows_shown = rows.iter().map(|row| {
                let cells = measures.iter().map(|measure| cell(value(row, measure)));
                std::iter::once(format!("{}", row.weight)).chain(cells).collect()
            });
            blocks.push(Block::Subheading(format!("{}: {path}", run.name)));
            blocks.push(Block::Table { head, rows: rows_shown.collect() });
            let lines = measures.iter().filter(|(_, name)| *name == "loss").enumerate();
            let lines = lines.map(|(colour, measure)| Line {
                name: if measure.0 {
                    "other code".to_owned()
                } else {
                    "code that it was trained for".to_owned()
                },
                points: rows.iter().filter_map(|row| Some((row.weight, value(row, measure)?))).collect(),
                colour,
            });
            let plot = Plot {
                title: format!("Loss over the weight of the adapter of {}", run.name),
                x: "weight".to_owned(),
                y: "loss per token".to_owned(),
                lines: lines.collect(),
            };
            if !plot.is_empty() {
                blocks.push(Block::Figure(plot));
            }
        }
    }
    if !blocks.is_empty() {
        blocks.insert(0, Block::Heading("Weights of adapters".to_owned()));
    }
    blocks
}

/// Completions side by side: of the first set of held-out files that all models were asked.
fn completions(args: &Args, runs: &[Run]) -> Result<Vec<Block>, Error> {
    let sets = evaluated(runs);
    let Some((_, models)) = sets
        .iter()
        .filter(|((kind, ..), _)| *kind == Kind::Repository)
        .max_by_key(|((_, name, _), models)| (models.len(), name == "dataset"))
    else {
        return Ok(Vec::new());
    };
    let columns = models
        .iter()
        .map(|model| Ok((model.name.clone(), runs::holes(&model.found.dir)?)))
        .collect::<Result<Vec<_>, Error>>()?;
    let chosen = samples::choose(&columns, args.samples);
    let Some((_, first)) = columns.first() else { return Ok(Vec::new()) };
    let holes: Vec<_> = chosen.iter().filter_map(|id| first.get(id)).collect();
    if let Some(path) = &args.write_prompts {
        samples::write_prompts(path, &holes)?;
    }
    if holes.is_empty() {
        return Ok(Vec::new());
    }
    let others = args
        .against
        .iter()
        .map(|other| Ok((other.name.clone(), samples::of_other(other, &holes)?)))
        .collect::<Result<Vec<_>, Error>>()?;
    let mut blocks = vec![Block::Heading("Completions side by side".to_owned())];
    for hole in holes {
        let of_models = columns
            .iter()
            .map(|(name, holes)| (name.clone(), holes.get(&hole.id).map(|hole| hole.completion.clone())));
        let of_others =
            others.iter().map(|(name, completions)| (name.clone(), completions.get(&hole.id).cloned()));
        blocks.push(Block::Sample(samples::sample(hole, of_models.chain(of_others).collect())));
    }
    Ok(blocks)
}

/// The command that reports on a run.
pub fn command(output: &Path) -> String {
    format!("coordinator compare {} --out report", output.display())
}
