//! `coordinator validate`: what is wrong with a job file, or with a file of the flags of `serve`.

use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use tunefleet_proto::job::{ManualEntry, manual};

use crate::cli::{self, exit};
use crate::job_file::{self, JobArgs};

/// Width of the manual's lines.
const WIDTH: usize = 96;

/// Arguments of `coordinator validate`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The job file.
    #[arg(long, value_name = "JOB", required_unless_present_any = ["keys", "serve"])]
    config: Option<PathBuf>,
    /// A file of the flags of `coordinator serve`.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["config", "keys", "set"])]
    serve: Option<PathBuf>,
    /// Set a key of the job file before it is checked, e.g. train.steps=100.
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// Explain every key of a job file instead: meaning, unit and default.
    #[arg(long)]
    keys: bool,
}

/// Prints `ok`, or every fault.
pub fn run(args: Args) -> ExitCode {
    let stdout = &mut io::stdout().lock();
    if let Some(config) = args.serve {
        if let Err(error) = cli::check_serve(&config) {
            eprintln!("{error}");
            return ExitCode::from(exit::BAD_CONFIG);
        }
        // A reader that has gone away wants no more.
        let _ = writeln!(stdout, "ok");
        return ExitCode::SUCCESS;
    }
    let printed = match args.config {
        Some(config) if !args.keys => {
            let job = JobArgs { config, set: args.set };
            if let Err(error) = job.load().and_then(|spec| job_file::model_config(&spec)) {
                eprintln!("{error}");
                return ExitCode::from(exit::BAD_CONFIG);
            }
            writeln!(stdout, "ok")
        }
        _ => manual().iter().try_for_each(|entry| explain(entry, stdout)),
    };
    match printed {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => ExitCode::from(exit::FAILED),
        _ => ExitCode::SUCCESS,
    }
}

fn explain(ManualEntry { key, kind, text }: &ManualEntry, out: &mut impl Write) -> io::Result<()> {
    write!(out, "{key}: {kind}")?;
    let mut column = WIDTH;
    for word in text.split_whitespace() {
        if column + 1 + word.len() > WIDTH {
            write!(out, "\n   ")?;
            column = 3;
        }
        write!(out, " {word}")?;
        column += 1 + word.len();
    }
    writeln!(out)
}
