//! The command line of `coordinator collect`.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use tunefleet_proto::dataset::Manifest;
use tunefleet_proto::job::{
    CollectSpec, DatasetSpec, DuplicateMode, RepositorySpec, SegmentFormat, SourceSpec,
};

use super::{Error, SourceError};
use crate::cli::exit;
use crate::dataset::inspect;
use crate::job_file::JobArgs;
use crate::progress;

/// Arguments of `coordinator collect`.
#[derive(Debug, clap::Args)]
#[command(group = clap::ArgGroup::new("what").required(true).args(["config", "sources"]))]
pub struct Args {
    /// Job file whose `collect` section says what to collect; the dataset goes to `<output>/dataset`.
    #[arg(long, value_name = "JOB")]
    config: Option<PathBuf>,
    /// Changes a value of the job file before it is checked.
    #[arg(long = "set", value_name = "KEY=VALUE", requires = "config")]
    overrides: Vec<String>,
    /// Repositories, with the default filters: URLs, `git@host:org/repo` or paths; `#REVISION` at the end
    /// picks a branch, tag or commit.
    #[arg(value_name = "SOURCE", requires = "out", conflicts_with = "config")]
    sources: Vec<String>,
    /// Directory of the dataset; remote repositories are kept beside it in `<DIR>.repos`.
    #[arg(long, value_name = "DIR", conflicts_with = "config")]
    out: Option<PathBuf>,
    /// Share of files held out for evaluation.
    #[arg(long, value_name = "FRACTION", default_value_t = 0.005, conflicts_with = "config", value_parser = fraction)]
    validation_fraction: f64,
    /// What becomes of files that are alike, across repositories.
    #[arg(long, value_enum, value_name = "WHAT", default_value_t, conflicts_with = "config")]
    duplicates: DuplicateMode,
    /// Writes Parquet instead of Arrow.
    #[arg(long, conflicts_with = "config")]
    parquet: bool,
    /// Prints the manifest.
    #[arg(long)]
    json: bool,
}

/// Runs the verb.
pub fn run(args: Args) -> ExitCode {
    match plan(&args) {
        Ok((spec, cache_dir, out_dir)) => {
            let progress = progress::on_stderr();
            match super::collect(&spec, &cache_dir, &out_dir, progress.as_ref()) {
                Ok(manifest) => print(&manifest, &out_dir, args.json),
                Err(error) => {
                    eprintln!("error: {error}");
                    ExitCode::from(exit_code(&error))
                }
            }
        }
        Err(code) => code,
    }
}

/// What to collect, where remotes are kept, and where the dataset goes.
fn plan(args: &Args) -> Result<(CollectSpec, PathBuf, PathBuf), ExitCode> {
    if let Some(config) = &args.config {
        let args = JobArgs { config: config.clone(), set: args.overrides.clone() };
        let job = args.load().map_err(|error| {
            eprintln!("{error}");
            ExitCode::from(exit::BAD_CONFIG)
        })?;
        let (cache_dir, out_dir) = (job.output.join("repos"), job.dataset_dir());
        return match job.dataset {
            DatasetSpec::Collect(spec) => Ok((*spec, cache_dir, out_dir)),
            DatasetSpec::Existing(dir) => {
                eprintln!(
                    "error: {} uses the dataset {}; there is nothing to collect",
                    config.display(),
                    dir.display()
                );
                Err(ExitCode::from(exit::BAD_CONFIG))
            }
        };
    }
    // Without a slash at the end, which would put the cache into the dataset.
    let out_dir: PathBuf = args.out.iter().flat_map(|out| out.components()).collect();
    let mut cache_dir = out_dir.clone().into_os_string();
    cache_dir.push(".repos");
    let spec = CollectSpec {
        duplicates: args.duplicates,
        format: if args.parquet { SegmentFormat::Parquet } else { SegmentFormat::Arrow },
        validation_fraction: args.validation_fraction,
        ..CollectSpec::of(args.sources.iter().map(|source| source_spec(source)).collect())
    };
    Ok((spec, cache_dir.into(), out_dir))
}

fn source_spec(source: &str) -> SourceSpec {
    match source.rsplit_once('#') {
        // A path may hold a `#`.
        Some((location, revision)) if !revision.is_empty() && !Path::new(source).exists() => {
            let revision = Some(revision.to_owned());
            SourceSpec::Repository(RepositorySpec { location: location.to_owned(), revision })
        }
        _ => SourceSpec::repository(source),
    }
}

fn fraction(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(fraction) if (0.0..=0.5).contains(&fraction) => Ok(fraction),
        _ => Err("expected a number from 0 to 0.5".to_owned()),
    }
}

fn exit_code(error: &Error) -> u8 {
    match error {
        Error::Sources(errors) if errors.iter().all(SourceError::is_not_found) => exit::NOT_FOUND,
        Error::Sources(errors) if errors.iter().any(SourceError::is_unreachable) => exit::UNREACHABLE,
        _ => exit::FAILED,
    }
}

fn print(manifest: &Manifest, out_dir: &Path, json: bool) -> ExitCode {
    let text = match json {
        true => serde_json::to_string_pretty(manifest).unwrap_or_default() + "\n",
        false => format!("{}\n{}", out_dir.display(), inspect::summary(manifest)),
    };
    inspect::to_stdout(&text)
}
