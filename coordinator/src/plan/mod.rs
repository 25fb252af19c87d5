//! `coordinator plan`: what a job needs, before anything runs. No torch, no GPU.

mod memory;
mod report;
mod print;

use std::io::Write;
use std::process::ExitCode;

use crate::cli::exit;
use crate::hardware::Hardware;
use crate::job_file::{self, JobArgs};
pub use print::{count, size};
pub use report::Report;

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
}

/// Prints the plan. Exit code 3 where the job does not fit.
pub fn run(args: Args) -> ExitCode {
    let loaded = args.job.load().and_then(|spec| job_file::model_config(&spec).map(|config| (spec, config)));
    let (spec, config) = match loaded {
        Ok(loaded) => loaded,
        Err(error) => {
            eprintln!("{error}");
            return ExitCode::from(exit::BAD_CONFIG);
        }
    };
    let rank_memory = args.memory_gib.map(|gib| (gib * (1u64 << 30) as f64) as u64);
    let report = match Report::new(&spec, config, &Hardware::find(), rank_memory) {
        Ok(report) => report,
        Err(error) => {
            eprintln!("adapter: {error}");
            return ExitCode::from(exit::BAD_CONFIG);
        }
    };
    let stdout = &mut std::io::stdout().lock();
    let printed = match args.json {
        true => serde_json::to_string_pretty(&report)
            .map_err(std::io::Error::from)
            .and_then(|text| writeln!(stdout, "{text}")),
        false => print::print(&report, stdout),
    };
    // A reader that has gone away, as with `| head`, is no failure of the plan.
    if printed.is_err_and(|error| error.kind() != std::io::ErrorKind::BrokenPipe) {
        return ExitCode::from(exit::FAILED);
    }
    match print::misfit(&report) {
        Some(misfit) => {
            eprintln!("does not fit: {misfit}");
            ExitCode::from(exit::NO_CAPACITY)
        }
        None => ExitCode::SUCCESS,
    }
}

fn memory_gib(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(gib) if (0.01..=1e6).contains(&gib) => Ok(gib),
        _ => Err("expected a number of GiB from 0.01 to 1000000".to_owned()),
    }
}
