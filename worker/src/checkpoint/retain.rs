//! Which checkpoints stay: the newest, and where it is asked for, the best.

use std::fs;
use std::path::Path;

use tunefleet_proto::checkpoint::{self as proto, Manifest};

use super::Error;
use super::load;

/// Removes all but the newest `keep` checkpoints up to step `saved`, and the best where `keep_best` is set. A
/// failure costs disk, not the run. Later ones were passed over by a resume, as not sound: they count for
/// nothing.
pub fn prune(dir: &Path, keep: usize, keep_best: bool, saved: u64) {
    let mut steps = load::steps(dir);
    steps.retain(|step| *step <= saved);
    let best = if keep_best { best(dir, &steps).map(|manifest| manifest.step) } else { None };
    steps.truncate(steps.len().saturating_sub(keep.max(1)));
    for step in steps.into_iter().filter(|step| Some(*step) != best) {
        let path = dir.join(proto::dir_name(step));
        if let Err(error) = fs::remove_dir_all(&path) {
            tracing::warn!(path = %path.display(), %error, "cannot remove an old checkpoint");
        }
    }
}

/// The checkpoint that a training of `steps` updates leaves: the best one where `keep_best` is set, else the last.
///
/// # Errors
/// [`Error::NoCheckpoint`] where training has not finished.
pub fn result(dir: &Path, keep_best: bool, steps: u64) -> Result<Manifest, Error> {
    let manifests: Vec<Manifest> =
        load::steps(dir).into_iter().filter_map(|step| manifest(dir, step)).collect();
    proto::result(&manifests, keep_best, steps).cloned().ok_or_else(|| Error::NoCheckpoint {
        path: dir.to_owned(),
        detail: "; training has not come to its end: launch --resume".to_owned(),
    })
}

fn best(dir: &Path, steps: &[u64]) -> Option<Manifest> {
    let manifests: Vec<Manifest> = steps.iter().filter_map(|step| manifest(dir, *step)).collect();
    proto::best(manifests.iter()).cloned()
}

fn manifest(dir: &Path, step: u64) -> Option<Manifest> {
    load::read_manifest(&dir.join(proto::dir_name(step))).ok()
}
