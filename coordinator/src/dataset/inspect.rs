//! `coordinator dataset`: what is in a dataset, and whether it is whole.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use serde::Serialize;
use tunefleet_proto::dataset::{Manifest, Segment};

use super::{Error, manifest, reader};
use crate::cli::exit;

/// Arguments of `coordinator dataset`.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, clap::Subcommand)]
enum Verb {
    /// Reads every row against the manifest and shows totals, languages and what was dropped.
    Inspect {
        /// The dataset.
        dir: PathBuf,
        /// Prints JSON.
        #[arg(long)]
        json: bool,
    },
}

/// Runs the verb.
pub fn run(args: Args) -> ExitCode {
    let Verb::Inspect { dir, json } = args.verb;
    match inspect(&dir) {
        Ok((_, report)) if json => {
            to_stdout(&(serde_json::to_string_pretty(&report).unwrap_or_default() + "\n"))
        }
        Ok((manifest, report)) => to_stdout(&(summary(&manifest) + &report.languages_table())),
        Err(error) => {
            eprintln!("error: {error}");
            match error {
                Error::Absent { .. } => ExitCode::from(exit::NOT_FOUND),
                _ => ExitCode::from(exit::FAILED),
            }
        }
    }
}

/// What the rows say.
#[derive(Debug, Serialize)]
struct Report {
    /// Digest of the contents.
    digest: String,
    train: Part,
    validation: Part,
    /// By extension, both splits together.
    extensions: BTreeMap<String, Part>,
    /// By reason.
    dropped: BTreeMap<String, u64>,
    /// Keys, passwords and addresses, by kind.
    found: BTreeMap<String, u64>,
}

#[derive(Debug, Default, Serialize)]
struct Part {
    files: u64,
    content_bytes: u64,
}

impl Part {
    fn add(&mut self, content: &str) {
        self.files += 1;
        self.content_bytes += content.len() as u64;
    }
}

/// Reads everything; the first segment that is not as recorded ends it.
fn inspect(dir: &Path) -> Result<(Manifest, Report), Error> {
    let manifest = manifest::read(dir)?;
    let mut extensions: BTreeMap<String, Part> = BTreeMap::new();
    let mut read = |segments: &[Segment]| -> Result<Part, Error> {
        let mut part = Part::default();
        for segment in segments {
            reader::read(dir, segment, |row| {
                part.add(row.content);
                let name = row.file_path.rsplit('/').next().unwrap_or_default();
                let extension = name.rsplit_once('.').map(|(_, ext)| ext.to_lowercase()).unwrap_or_default();
                extensions.entry(extension).or_default().add(row.content);
            })?;
        }
        Ok(part)
    };
    let (train, validation) = (read(&manifest.train)?, read(&manifest.validation)?);
    let (dropped, found) = (manifest.dropped.clone(), manifest.found.clone());
    let report = Report { digest: manifest.digest(), train, validation, extensions, dropped, found };
    Ok((manifest, report))
}

impl Report {
    fn languages_table(&self) -> String {
        let mut extensions: Vec<_> = self.extensions.iter().collect();
        extensions.sort_by_key(|(name, part)| (std::cmp::Reverse(part.content_bytes), name.as_str()));
        let mut out = String::from("extension      files     content\n");
        for (name, part) in extensions.iter().take(20) {
            let name = if name.is_empty() { "(none)" } else { name };
            let _ = writeln!(out, "{name:<12} {:>7} {:>11}", part.files, size(part.content_bytes));
        }
        if extensions.len() > 20 {
            let _ = writeln!(out, "and {} more", extensions.len() - 20);
        }
        out
    }
}

/// A manifest in a few lines.
pub fn summary(manifest: &Manifest) -> String {
    let width = manifest.repositories.iter().map(|r| r.repo_id.chars().count()).max().unwrap_or(0).max(10);
    let mut out = format!("{:<width$} {:<12} {:>7} {:>11}\n", "repository", "commit", "files", "content");
    for repository in &manifest.repositories {
        let commit = repository.commit.get(..12).unwrap_or(&repository.commit);
        let (files, bytes) = (repository.files, size(repository.bytes));
        let _ = writeln!(out, "{:<width$} {commit:<12} {files:>7} {bytes:>11}", repository.repo_id);
    }
    let counts = |of: &BTreeMap<String, u64>| match of.is_empty() {
        true => "none".to_owned(),
        false => of.iter().map(|(what, count)| format!("{what} {count}")).collect::<Vec<_>>().join(", "),
    };
    let _ = writeln!(out, "train        {}", split_line(&manifest.train));
    let _ = writeln!(out, "validation   {}", split_line(&manifest.validation));
    let _ = writeln!(out, "dropped      {}", counts(&manifest.dropped));
    let _ = writeln!(out, "secrets      {}", counts(&manifest.found));
    let _ = writeln!(out, "digest       {}", manifest.digest());
    out
}

fn split_line(segments: &[Segment]) -> String {
    let rows: u64 = segments.iter().map(|s| s.rows).sum();
    let bytes: u64 = segments.iter().map(|s| s.bytes).sum();
    let plural = if segments.len() == 1 { "" } else { "s" };
    format!("{rows} files in {} segment{plural}, {}", segments.len(), size(bytes))
}

/// Bytes for people.
fn size(bytes: u64) -> String {
    match bytes {
        0..10_000 => format!("{bytes} B"),
        10_000..10_000_000 => format!("{:.1} kB", bytes as f64 / 1e3),
        10_000_000..10_000_000_000 => format!("{:.1} MB", bytes as f64 / 1e6),
        _ => format!("{:.1} GB", bytes as f64 / 1e9),
    }
}

/// Writes to stdout; a reader that went away (`| head`) is no error.
pub fn to_stdout(text: &str) -> ExitCode {
    match std::io::stdout().lock().write_all(text.as_bytes()) {
        Err(e) if e.kind() != std::io::ErrorKind::BrokenPipe => {
            eprintln!("error: standard output: {e}");
            ExitCode::from(exit::FAILED)
        }
        _ => ExitCode::SUCCESS,
    }
}
