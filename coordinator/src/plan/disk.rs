//! What a job leaves on the disk, against what is free there.

use std::path::{Path, PathBuf};

use serde::Serialize;
use tunefleet_proto::dataset::{MANIFEST_FILE, Manifest};
use tunefleet_proto::job::{JobSpec, ModelSpec};
use tunefleet_proto::model::ModelConfig;

use super::memory::Item;

/// Characters of code that a token stands for, about.
const BYTES_PER_TOKEN: u64 = 3;
/// Largest vocabulary whose tokens are kept in 2 bytes.
const NARROW_VOCABULARY: u64 = 1 << 16;

/// The disk under the output directory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Disk {
    /// By item; what was there before is counted as well.
    pub items: Vec<Item>,
    /// Sum of the items.
    pub needed_bytes: u64,
    /// What a user can still write there; absent where it is not known.
    pub free_bytes: Option<u64>,
}

impl Disk {
    /// Of `spec`, whose checkpoints and exports have these sizes.
    pub fn new(spec: &JobSpec, config: &ModelConfig, checkpoint_bytes: u64, export_bytes: u64) -> Self {
        let train = &spec.train;
        // Those that are kept, the best one, and the one that is being written.
        let checkpoints = u64::from(train.keep_checkpoints) + u64::from(train.keep_best) + 1;
        let model = match &spec.model {
            ModelSpec::Init { .. } => 4 * config.parameter_count(),
            // The hub's cache may lie on another disk, and may hold the model already.
            ModelSpec::Existing(_) | ModelSpec::Hub { .. } => 0,
        };
        let base = spec.base_plan(config).map_or(0, |base| base.units.iter().map(|unit| unit.bytes).sum());
        let token = if config.vocab_size <= NARROW_VOCABULARY { 2 } else { 4 };
        let text = text_bytes(&spec.dataset_dir()).unwrap_or(0);
        let item = |what, bytes| Item { what, bytes };
        let items = vec![
            item("checkpoints, with one being written", checkpoints.saturating_mul(checkpoint_bytes)),
            item("random weights to begin with", model),
            item("frozen base, quantised", base),
            item("tokens (about)", text / BYTES_PER_TOKEN * token),
            item("export", export_bytes),
        ];
        let items: Vec<Item> = items.into_iter().filter(|item| item.bytes > 0).collect();
        let needed_bytes = items.iter().fold(0u64, |sum, item| sum.saturating_add(item.bytes));
        // Another machine's disk is not seen from here.
        let elsewhere = spec.workers.coordinator.is_some();
        let free_bytes = if elsewhere { None } else { free_bytes(&spec.output) };
        Disk { items, needed_bytes, free_bytes }
    }
}

/// Text of a dataset that was collected.
fn text_bytes(dataset: &Path) -> Option<u64> {
    let text = std::fs::read_to_string(dataset.join(MANIFEST_FILE)).ok()?;
    let manifest: Manifest = serde_json::from_str(&text).ok()?;
    Some(manifest.repositories.iter().fold(0u64, |sum, repository| sum.saturating_add(repository.bytes)))
}

/// Free bytes of the file system that `path` is or would be on.
fn free_bytes(path: &Path) -> Option<u64> {
    let existing: PathBuf = path.ancestors().find(|dir| dir.exists())?.to_owned();
    let stat = nix::sys::statvfs::statvfs(&existing).ok()?;
    Some(stat.blocks_available().saturating_mul(stat.fragment_size()))
}

#[cfg(test)]
mod tests {
    use tunefleet_proto::job;

    use super::*;

    fn disk(overrides: &[&str]) -> Disk {
        let text = "dataset: d\nmodel: {init: {preset: tiny}}\ntrain: {keep_checkpoints: 3}\n";
        let overrides: Vec<String> = overrides.iter().map(|&text| text.to_owned()).collect();
        let dir = std::env::temp_dir();
        let spec = job::load(&dir.join("j.yaml"), text, &overrides, &dir).unwrap();
        Disk::new(&spec, &ModelConfig::preset("tiny").unwrap(), 1000, 77)
    }

    #[test]
    fn one_checkpoint_more_than_are_kept_must_fit() {
        let disk = disk(&[]);
        let bytes = |what: &str| disk.items.iter().find(|item| item.what.starts_with(what)).map(|i| i.bytes);
        assert_eq!(bytes("checkpoints"), Some(4000));
        assert_eq!(bytes("export"), Some(77));
        assert_eq!(bytes("random weights"), Some(4 * ModelConfig::preset("tiny").unwrap().parameter_count()));
        assert_eq!(disk.needed_bytes, disk.items.iter().map(|item| item.bytes).sum::<u64>());
        assert!(disk.free_bytes.is_some_and(|bytes| bytes > 0));
        assert_eq!(self::disk(&["workers.coordinator=http://far:1"]).free_bytes, None);
    }

    #[test]
    fn an_adapter_needs_room_for_its_base() {
        let with = disk(&["adapter.rank=4"]);
        assert!(with.items.iter().any(|item| item.what == "frozen base, quantised"));
    }
}
