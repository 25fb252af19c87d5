//! A dataset to the Hugging Face hub: its segments, its manifest, and a card that says where the splits are and where
//! everything came from.

use std::fmt::Write as _;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

use tunefleet_hub::cli::PushOptions;
use tunefleet_hub::{RepoId, RepoKind};
use tunefleet_proto::dataset::{MANIFEST_FILE, Manifest};

use super::report::{size, summary};
use super::{Error, manifest, reader};

/// Pushes the dataset in `dir`; what was done, in words.
pub fn push(dir: &Path, repo: RepoId, options: &PushOptions) -> Result<String, Error> {
    let target = options.target(RepoKind::Dataset, repo)?;
    let manifest = manifest::read(dir)?;
    // Nothing that is damaged goes out.
    for segment in manifest.train.iter().chain(&manifest.validation) {
        reader::read(dir, segment, |_| {})?;
    }
    let staging = tempfile::tempdir().map_err(Error::io(&std::env::temp_dir()))?;
    let dir = dir.canonicalize().map_err(Error::io(dir))?;
    let segments = manifest.train.iter().chain(&manifest.validation).map(|segment| segment.file.as_str());
    for name in segments.chain([MANIFEST_FILE]) {
        let place = staging.path().join(name);
        symlink(dir.join(name), &place).map_err(Error::io(&place))?;
    }
    let readme = staging.path().join("README.md");
    fs::write(&readme, card(&target.repo.to_string(), &manifest)).map_err(Error::io(&readme))?;
    let pushed = tunefleet_hub::push(staging.path(), &target)?;
    Ok(match pushed.commit {
        Some(commit) => format!("{}: commit {commit}\n", pushed.url),
        None => format!("{}: has these files already\n", pushed.url),
    })
}

/// What the hub shows, and reads the splits from.
fn card(name: &str, manifest: &Manifest) -> String {
    let mut out = String::from("---\nconfigs:\n- config_name: default\n  data_files:\n");
    for (split, segments) in [("train", &manifest.train), ("validation", &manifest.validation)] {
        if let Some((_, extension)) = segments.first().and_then(|segment| segment.file.rsplit_once('.')) {
            let _ = writeln!(out, "  - split: {split}\n    path: {split}-*.{extension}");
        }
    }
    let bytes: u64 = manifest.train.iter().chain(&manifest.validation).map(|segment| segment.bytes).sum();
    let _ = write!(
        out,
        "tags:\n- code\n---\n\n# {name}\n\nFiles of {} repositories, {} of segments, written by {}.\n\n```text\n{}```\n",
        manifest.repositories.len(),
        size(bytes),
        manifest.written_by,
        summary(manifest)
    );
    out
}
