//! `coordinator plan`: what a job needs, before anything runs. No torch; a GPU or a measurement only where
//! `--measure` asks the worker for one.

pub mod budget;
mod checks;
mod disk;
mod flops;
mod gpus;
mod measure;
mod memory;
mod print;
mod report;
mod time;
mod traffic;

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use tunefleet_proto::job::JobSpec;
use tunefleet_proto::model::ModelConfig;

use crate::cli::exit;
use crate::connect::Failure;
use crate::hardware::Hardware;
use crate::job_file::{self, JobArgs};
use crate::launch::find_worker;
pub use flops::Flops;
pub use gpus::GpuModel;
use measure::{Depth, Measurement, Question};
pub use print::{count, size};
pub use report::{Known, Place, Report};

/// Arguments of `coordinator plan`.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    job: JobArgs,
    /// Print everything as JSON, with each rank's range of each parameter.
    #[arg(long)]
    json: bool,
    /// Memory that each rank can have, in GiB, instead of this machine's.
    #[arg(long, value_name = "GIB", value_parser = memory_gib)]
    memory_gib: Option<f64>,
    /// The GPUs that the job runs on, such as A100-80GB or H100, instead of those found.
    #[arg(long, value_name = "NAME", value_parser = GpuModel::parse)]
    gpu: Option<GpuModel>,
    /// What a GPU rank gets from its peers, in GB a second, instead of what is usual.
    #[arg(long, value_name = "GB", value_parser = link_gb)]
    link_gb_per_second: Option<f64>,
    /// Measure memory and times on this machine with random weights: of some blocks, from which all follow,
    /// or `full` of all.
    #[arg(long, value_name = "DEPTH", num_args = 0..=1, require_equals = true, default_missing_value = "quick")]
    measure: Option<Depth>,
    /// The `worker` program that measures; else the one beside this program, else the one on PATH.
    #[arg(long, value_name = "FILE")]
    worker_bin: Option<PathBuf>,
}

/// Prints the plan. Exit code 3 where the job does not fit.
pub fn run(args: Args) -> ExitCode {
    match plan(&args) {
        Ok(code) => ExitCode::from(code),
        Err(Failure { exit_code, message }) => {
            eprintln!("{message}");
            ExitCode::from(exit_code)
        }
    }
}

fn plan(args: &Args) -> Result<u8, Failure> {
    let bad_config = |error: &dyn std::fmt::Display| Failure::new(exit::BAD_CONFIG, error.to_string());
    let mut spec = args.job.load().map_err(|error| bad_config(&error))?;
    let config = job_file::model_config(&spec).map_err(|error| bad_config(&error))?;
    let hardware = Hardware::find();
    let rank_memory_bytes = args.memory_gib.map(|gib| (gib * (1u64 << 30) as f64) as u64);
    let place = Place::of(&spec, &hardware, rank_memory_bytes);
    let chosen = choose(&mut spec, &config, &place)?;
    let measurement = match args.measure {
        Some(depth) => Some(measure(args, &spec, &config, &place, &hardware, depth)?),
        None => None,
    };
    let link_bytes_per_second = args.link_gb_per_second.map(|gb| gb * 1e9);
    let known = Known { rank_memory_bytes, gpu: args.gpu, link_bytes_per_second, measurement, chosen };
    let report = Report::new(&spec, config, &hardware, &known)
        .map_err(|error| bad_config(&format!("adapter: {error}")))?;
    let stdout = &mut std::io::stdout().lock();
    let printed = match args.json {
        true => serde_json::to_string_pretty(&report)
            .map_err(std::io::Error::from)
            .and_then(|text| writeln!(stdout, "{text}")),
        false => print::print(&report, stdout),
    };
    // A reader that has gone away, as with `| head`, is no failure of the plan.
    if printed.is_err_and(|error| error.kind() != std::io::ErrorKind::BrokenPipe) {
        return Ok(exit::FAILED);
    }
    for warning in &report.warnings {
        eprintln!("warning: {}", warning.text);
    }
    match print::misfit(&report) {
        Some(misfit) => Err(Failure::new(exit::NO_CAPACITY, format!("does not fit: {misfit}"))),
        None => Ok(exit::OK),
    }
}

/// Chooses what keeps the memory budget of `spec`, where it has one and leaves something open.
///
/// # Errors
/// With [`exit::NO_CAPACITY`] where nothing fits.
pub fn choose(spec: &mut JobSpec, config: &ModelConfig, place: &Place) -> Result<Option<String>, Failure> {
    budget::choose(spec, config, place.machine).map_err(|error| {
        let code = match error {
            budget::Error::TooSmall { .. } => exit::NO_CAPACITY,
            budget::Error::Adapter(_) => exit::BAD_CONFIG,
        };
        Failure::new(code, error.to_string())
    })
}

fn measure(
    args: &Args,
    spec: &JobSpec,
    config: &ModelConfig,
    place: &Place,
    hardware: &Hardware,
    depth: Depth,
) -> Result<Measurement, Failure> {
    let program = find_worker(args.worker_bin.as_deref())?;
    let on_gpu = place.machine.on_gpu;
    // GPUs are their ranks' own. CPU ranks share this machine, or one of their machines is like it.
    let together = match (on_gpu, place.elsewhere) {
        (true, _) => 1,
        (false, false) => spec.train.ranks,
        (false, true) => {
            spec.train.ranks.min(spec.workers.threads_per_rank.map_or(1, |t| hardware.cores / t).max(1))
        }
    };
    let threads = spec.workers.threads_per_rank.unwrap_or_else(|| (hardware.cores / together).max(1));
    let points = measure::points_of(spec, config, depth);
    let failed = |message: String| Failure::new(exit::FAILED, message);
    if let Some(misfit) =
        measure::misfit(spec, config, &points, together, place.machine, hardware.memory_bytes)
    {
        return Err(Failure::new(exit::NO_CAPACITY, misfit));
    }
    let over_loopback = !on_gpu && spec.train.ranks > 1;
    let question = Question { spec, config, points, ranks: together, threads, over_loopback };
    let asked = measure::ask(&program, &question).map_err(|error| failed(error.to_string()))?;
    Ok(Measurement::new(spec, config, asked))
}

fn memory_gib(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(gib) if (0.01..=1e6).contains(&gib) => Ok(gib),
        _ => Err("expected a number of GiB from 0.01 to 1000000".to_owned()),
    }
}

fn link_gb(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(gb) if (0.001..=1e6).contains(&gb) => Ok(gb),
        _ => Err("expected GB a second from 0.001 to 1000000".to_owned()),
    }
}
