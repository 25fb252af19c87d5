//! What runs cost, and how they went: losses over steps, time and price, learning rate and throughput.

use super::document::Block;
use super::plot::{Line, Plot};
use super::runs::{Run, Step};

/// One value of a run as it went.
#[derive(Debug, Clone, Copy)]
enum Curve {
    TrainLoss,
    EvalLoss,
    LearningRate,
    Throughput,
}

impl Curve {
    /// What it is called, and its unit.
    fn names(self) -> (&'static str, &'static str) {
        match self {
            Curve::TrainLoss => ("Train loss", "loss per token"),
            Curve::EvalLoss => ("Eval loss", "loss per token"),
            Curve::LearningRate => ("Learning rate", "learning rate"),
            Curve::Throughput => ("Throughput", "tokens per second"),
        }
    }

    /// Step, seconds and value.
    fn values(self, run: &Run) -> Vec<(u64, f64, f64)> {
        let of_steps = |value: fn(&Step) -> f64| {
            run.steps.iter().map(|step| (step.step, step.seconds, value(step))).collect()
        };
        match self {
            Curve::TrainLoss => of_steps(|step| step.loss),
            Curve::EvalLoss => {
                run.evals.iter().map(|point| (point.step, point.seconds, point.value)).collect()
            }
            Curve::LearningRate => of_steps(|step| step.learning_rate),
            Curve::Throughput => of_steps(|step| step.tokens_per_second),
        }
    }
}

/// What each run took.
pub fn costs(runs: &[Run]) -> Vec<Block> {
    let mut rows = Vec::new();
    for run in runs.iter().filter(|run| !run.steps.is_empty()) {
        let (Some(last), rates) = (run.steps.last(), rates(&run.steps)) else { continue };
        let best = run.evals.iter().min_by(|a, b| a.value.total_cmp(&b.value));
        let peak = run.steps.iter().map(|step| step.peak_memory_bytes).max().filter(|bytes| *bytes > 0);
        let price = run.price_per_hour().map(|price| price * last.seconds / 3600.0);
        let spec = run.spec.as_ref();
        let what = match spec.and_then(|spec| spec.adapter.as_ref()) {
            Some(adapter) => format!("adapter, rank {}, {}", adapter.lora.rank, adapter.quantization.name()),
            None => "all weights".to_owned(),
        };
        let or_none = |value: Option<String>| value.unwrap_or_else(|| "-".to_owned());
        rows.push(vec![
            run.name.clone(),
            what,
            or_none(spec.map(|spec| spec.train.ranks.to_string())),
            last.step.to_string(),
            last.tokens.to_string(),
            duration(last.seconds),
            or_none(price.map(|price| format!("{price:.4}"))),
            or_none(rates.map(|rate| format!("{rate:.0}"))),
            or_none(peak.map(|bytes| format!("{:.2} GB", bytes as f64 / 1e9))),
            format!("{:.4}", last.loss),
            or_none(run.evals.last().map(|point| format!("{:.4}", point.value))),
            or_none(best.map(|point| format!("{:.4} at step {}", point.value, point.step))),
        ]);
    }
    if rows.is_empty() {
        return Vec::new();
    }
    let head = [
        "run",
        "trained",
        "ranks",
        "steps",
        "tokens",
        "time",
        "price",
        "tokens/s",
        "peak memory of a rank",
        "train loss",
        "eval loss",
        "best eval loss",
    ];
    vec![
        Block::Heading("Costs".to_owned()),
        Block::Table { head: head.map(str::to_owned).to_vec(), rows },
        Block::Text(
            "Time is that of the attempts, evaluations and checkpoints included, waiting between attempts not. Price is \
             workers.price_per_hour for that time; tokens/s is the median of the logged values; memory is that of live \
             tensors. An eval loss that has risen since its best is over-fitting: train.keep_best keeps the weights of \
             that step."
                .to_owned(),
        ),
    ]
}

/// The median.
fn rates(steps: &[Step]) -> Option<f64> {
    let mut rates: Vec<f64> = steps.iter().map(|step| step.tokens_per_second).collect();
    rates.sort_by(f64::total_cmp);
    rates.get(rates.len() / 2).copied()
}

/// Losses over steps, time and price; learning rate and throughput over steps.
pub fn blocks(runs: &[Run]) -> Vec<Block> {
    let longest = runs.iter().filter_map(|run| run.steps.last()).map(|step| step.seconds).fold(0.0, f64::max);
    let (unit, unit_seconds) = match longest {
        seconds if seconds > 3.0 * 3600.0 => ("hours", 3600.0),
        seconds if seconds > 300.0 => ("minutes", 60.0),
        _ => ("seconds", 1.0),
    };
    let have_prices = runs.iter().all(|run| run.price_per_hour().is_some());
    let mut plots = Vec::new();
    for curve in [Curve::TrainLoss, Curve::EvalLoss, Curve::LearningRate, Curve::Throughput] {
        let (name, y) = curve.names();
        let plot = |over: &str, x: &str, place: &dyn Fn(&Run, u64, f64) -> f64| {
            let line = |(colour, run): (usize, &Run)| Line {
                name: run.name.clone(),
                points: curve
                    .values(run)
                    .into_iter()
                    .map(|(step, s, value)| (place(run, step, s), value))
                    .collect(),
                colour,
            };
            let lines: Vec<Line> =
                runs.iter().enumerate().map(line).filter(|line| !line.points.is_empty()).collect();
            Plot { title: format!("{name} over {over}"), x: x.to_owned(), y: y.to_owned(), lines }
        };
        plots.push(plot("steps", "steps", &|_, step, _| step as f64));
        if matches!(curve, Curve::TrainLoss | Curve::EvalLoss) {
            plots.push(plot("time", unit, &|_, _, seconds| seconds / unit_seconds));
            if have_prices {
                let price = |run: &Run, _: u64, seconds: f64| {
                    run.price_per_hour().unwrap_or_default() * seconds / 3600.0
                };
                plots.push(plot("price", "price", &price));
            }
        }
    }
    let figures: Vec<Block> = plots.into_iter().filter(|plot| !plot.is_empty()).map(Block::Figure).collect();
    if figures.is_empty() { figures } else { [vec![Block::Heading("Curves".to_owned())], figures].concat() }
}

fn duration(seconds: f64) -> String {
    let seconds = seconds.round() as u64;
    match (seconds / 3600, seconds / 60 % 60, seconds % 60) {
        (0, 0, s) => format!("{s} s"),
        (0, m, s) => format!("{m} min {s} s"),
        (h, m, _) => format!("{h} h {m} min"),
    }
}
