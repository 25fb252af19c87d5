//! `coordinator convert`: from an accelerate config, a DeepSpeed config and the arguments of the
//! original train.py to a job file that says the same, value for value.
//!
//! [`config`] and [`command`] read what is given against the tables of [`keys`], into [`settings`];
//! [`map`] turns them into a [`job`], and what it cannot turn, or turns into something else, into
//! [`note`]s.

mod keys;
mod value;
mod settings;
mod note;
mod config;
mod command;
mod job;
mod map;
/// Whether a file that was given as a job file is a config of the original.
pub mod recognise;
#[cfg(test)]
mod tests;

use std::fs::OpenOptions;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use config::Reader;
use map::Original;
use note::{Faults, Notes};
use settings::Settings;
use tunefleet_proto::job::{self as proto_job, Diagnostics, Place};

use crate::cli::exit;

/// Arguments of `coordinator convert`.
#[derive(Debug, clap::Args)]
#[group(id = "original", multiple = true, required = true, args = ["accelerate", "deepspeed", "args"])]
pub struct Args {
    /// An accelerate config, YAML or JSON.
    #[arg(long, value_name = "FILE")]
    accelerate: Option<PathBuf>,
    /// A DeepSpeed config.
    #[arg(long, value_name = "FILE")]
    deepspeed: Option<PathBuf>,
    /// The arguments of train.py as one text, quoted as for a shell; `accelerate launch ...` or
    /// `python train.py` may stand before them, as in "$(cat run_fsdp.sh)".
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    args: Option<String>,
    /// The job file to write; it must not exist. Default: standard output.
    #[arg(long, value_name = "JOB")]
    out: Option<PathBuf>,
    /// Leave settings out that are not known, and tell them, instead of refusing.
    #[arg(long)]
    ignore_unknown: bool,
}

/// Why there is no job file.
#[derive(Debug, thiserror::Error)]
enum Error {
    /// A config cannot be read.
    #[error("{path}: {cause}")]
    Read {
        /// The config.
        path: PathBuf,
        /// What the system said.
        cause: io::Error,
    },
    /// What is given is wrong.
    #[error("{0}")]
    Faults(Faults),
    /// What is given makes no job: lines of the job file that it would be, with the rules that they break.
    #[error("the settings make no sound job:\n{0}")]
    Refused(String),
    /// The job file is there already.
    #[error("{0} exists: give --out another name")]
    Exists(PathBuf),
    /// The job file cannot be written.
    #[error("{path}: {cause}")]
    Write {
        /// The job file.
        path: PathBuf,
        /// What the system said.
        cause: io::Error,
    },
}

/// Writes the job file, and says on stderr what it left out, what differs and what contradicts.
pub fn run(args: Args) -> ExitCode {
    match convert(&args) {
        Ok(notes) => {
            eprint!("{notes}");
            if let Some(out) = &args.out {
                let out = out.display();
                eprintln!("wrote {out}; next: coordinator plan --config {out}");
            }
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::from(match error {
                Error::Faults(_) | Error::Refused(_) | Error::Read { .. } => exit::BAD_CONFIG,
                Error::Exists(_) | Error::Write { .. } => exit::FAILED,
            })
        }
    }
}

fn convert(args: &Args) -> Result<Notes, Error> {
    let accelerate = args.accelerate.as_deref().map(Text::read).transpose()?;
    let deepspeed = args.deepspeed.as_deref().map(Text::read).transpose()?;
    let path = args.out.clone().unwrap_or_else(|| PathBuf::from("job.yaml"));
    let cwd = std::env::current_dir().map_err(|cause| Error::Read { path: PathBuf::from("."), cause })?;
    let given =
        Input { accelerate, deepspeed, args: args.args.as_deref(), ignore_unknown: args.ignore_unknown };
    let (text, notes) = job_file(&given, &path, &cwd)?;
    match &args.out {
        None => io::stdout().write_all(text.as_bytes()),
        Some(out) => OpenOptions::new()
            .write(true)
            .create_new(true)
            .open(out)
            .and_then(|mut file| file.write_all(text.as_bytes())),
    }
    .map_err(|cause| match cause.kind() {
        io::ErrorKind::AlreadyExists => Error::Exists(path.clone()),
        _ => Error::Write { path: path.clone(), cause },
    })?;
    Ok(notes)
}

/// A file and what it holds.
struct Text<'a> {
    path: &'a Path,
    text: String,
}

impl<'a> Text<'a> {
    fn read(path: &'a Path) -> Result<Self, Error> {
        match std::fs::read_to_string(path) {
            Ok(text) => Ok(Text { path, text }),
            Err(cause) => Err(Error::Read { path: path.to_owned(), cause }),
        }
    }
}

/// What is converted.
struct Input<'a> {
    accelerate: Option<Text<'a>>,
    deepspeed: Option<Text<'a>>,
    args: Option<&'a str>,
    ignore_unknown: bool,
}

/// The job file's text, which will be `path`, and what there is to say of it.
fn job_file(given: &Input, path: &Path, cwd: &Path) -> Result<(String, Notes), Error> {
    let (mut notes, mut faults) = (Notes::default(), Faults::default());
    let mut original = Original { out: path.to_owned(), ..Original::default() };
    let mut read = |file: &Option<Text>, known: Vec<_>| match file {
        None => Settings::default(),
        Some(Text { path, text }) => {
            let ignore_unknown = given.ignore_unknown;
            Reader { path, known, ignore_unknown, notes: &mut notes, faults: &mut faults }.read(text)
        }
    };
    original.config = read(&given.accelerate, keys::config_keys().collect());
    original.deepspeed = read(&given.deepspeed, keys::deepspeed_keys().collect());
    original.has_deepspeed = given.deepspeed.is_some();
    original.has_script = given.args.is_some();
    let command =
        command::read(given.args.unwrap_or_default(), given.ignore_unknown, &mut notes, &mut faults);
    original.has_config =
        given.accelerate.is_some() || !command.config.is_empty() || !command.launch.is_empty();
    original.launched_bare = command.launched && given.accelerate.is_none();
    original.config.overlay(command.config, &mut notes);
    original.launch = command.launch;
    original.script = command.script;
    wrong_argument(given, &mut faults);
    other_files(given, &mut original, &mut notes, &mut faults);
    let job = map::map(original, &mut notes, &mut faults);
    if faults.any() {
        return Err(Error::Faults(faults));
    }
    let text = job.text(&header(given));
    // Before anything is written: what convert writes, launch must take.
    proto_job::load(path, &text, &[], cwd).map_err(|faults| Error::Refused(refused(&text, &faults)))?;
    Ok((text, notes))
}

/// A DeepSpeed config given as one of accelerate would be one unknown key after another.
fn wrong_argument(given: &Input, faults: &mut Faults) {
    if let Some(Text { path, text }) = &given.accelerate
        && recognise::recognise(path, text).is_some_and(|foreign| foreign.kind == recognise::DEEPSPEED_CONFIG)
    {
        *faults = Faults::default();
        faults.report(&path.display().to_string(), "this is a DeepSpeed config: give it with --deepspeed");
    }
}

/// Files that the settings name hold settings as well: they must have been given.
fn other_files(given: &Input, original: &mut Original, notes: &mut Notes, faults: &mut Faults) {
    let config = original.launch.take::<String>("--config_file");
    let deepspeed = original.config.take::<String>("deepspeed_config.deepspeed_config_file");
    for (named, argument, is_given) in [
        (config, "--accelerate", given.accelerate.is_some()),
        (deepspeed, "--deepspeed", given.deepspeed.is_some()),
    ] {
        match named {
            Some(at) if is_given => notes.ignored(&at.place, &at.written, &format!("{argument} was given")),
            Some(at) => {
                let rule = format!("that file holds settings as well: give it with {argument}");
                faults.report(&at.place, format!("{}: {rule}", at.written));
            }
            None => {}
        }
    }
}

/// Each fault under its line, whose comment tells what it came from: nobody sees the file itself.
fn refused(text: &str, faults: &Diagnostics) -> String {
    let line_of = |place: &Place| match place {
        Place::File { line, .. } => {
            usize::try_from(*line).ok().and_then(|line| text.lines().nth(line.checked_sub(1)?))
        }
        Place::Override(_) => None,
    };
    let shown = faults.list().iter().map(|fault| match line_of(&fault.place) {
        Some(line) => format!("  {}\n    {}", line.trim(), fault.message),
        None => format!("  {}", fault.message),
    });
    shown.collect::<Vec<_>>().join("\n")
}

fn header(given: &Input) -> String {
    let files = [&given.accelerate, &given.deepspeed].into_iter().flatten();
    let mut sources: Vec<String> = files
        .map(|file| file.path.file_name().unwrap_or_default().to_string_lossy().into_owned())
        .map(|name| value::brief_text(&name))
        .collect();
    sources.extend(given.args.map(|_| "the arguments of train.py".to_owned()));
    format!(
        "# Made by coordinator convert of {}, value for value.\n\
         # Behind a value stands what it came from. Relative paths start at this file's directory.\n\
         # Every key with its meaning and default: coordinator validate --keys\n",
        sources.join(" and ")
    )
}
