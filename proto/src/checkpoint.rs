//! The checkpoint directory: one safetensors file per rank and `manifest.json`.
//!
//! A checkpoint is written to `step-NNNNNNNN.incomplete` and renamed: it exists wholly or not
//! at all. Each rank file holds, for every unit of the [`crate::shard_plan::ShardPlan`],
//! `<unit>.weight`, `<unit>.exp_avg` and `<unit>.exp_avg_sq`: this rank's fp32 elements.

use serde::{Deserialize, Serialize};

use crate::adapter::LoraConfig;
use crate::base_plan::Quantization;
use crate::job::Precision;
use crate::shard_plan::ShardPlan;

/// Version of [`Manifest`] that this build writes.
pub const MANIFEST_VERSION: u32 = 1;
/// File name of the manifest.
pub const MANIFEST_FILE: &str = "manifest.json";

/// Everything a resume needs besides the shards themselves.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// [`MANIFEST_VERSION`].
    pub version: u32,
    /// Program and version that wrote it.
    pub written_by: String,
    /// Optimizer updates done.
    pub step: u64,
    /// Ranks that trained it; more than the plan has where there were copies of the weights.
    #[serde(default)]
    pub ranks: u32,
    /// The layout of the rank files.
    pub shard_plan: ShardPlan,
    /// What the shards are an adapter of; absent where they are all weights.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub adapter: Option<AdapterRecord>,
    /// One entry per rank, in rank order.
    pub files: Vec<RankFile>,
    /// Position in the data: batches are a pure function of these and the step.
    pub data: DataPosition,
    /// Seed of dropout; with the step, this is the whole random state.
    pub seed: u64,
    /// Loss of the last step, for people.
    pub loss: f64,
    /// What evaluations found so far; absent before the first.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub validation: Option<Validation>,
    /// Whether training ended with it.
    #[serde(default)]
    pub finished: bool,
}

/// What evaluations found until a checkpoint.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Validation {
    /// Validation loss at this very step; absent where it was not evaluated.
    pub loss: Option<f64>,
    /// The lowest so far.
    pub best: f64,
    /// Evaluations since that brought nothing better.
    pub since: u32,
}

impl Validation {
    /// After an evaluation that found `loss`, which is better when it is lower by more than `min_delta`. One
    /// that is no number is nothing to compare with.
    pub fn after(previous: Option<Validation>, loss: f64, min_delta: f64) -> Option<Self> {
        let found = Some(loss).filter(|loss| loss.is_finite());
        match (previous, found) {
            (Some(Validation { best, since, .. }), found)
                if !found.is_some_and(|loss| loss < best - min_delta) =>
            {
                Some(Validation { loss: found, best, since: since.saturating_add(1) })
            }
            (_, found) => found.map(|loss| Validation { loss: Some(loss), best: loss, since: 0 }),
        }
    }
}

/// The one with the lowest validation loss; of equals the earliest.
pub fn best<'m>(manifests: impl Iterator<Item = &'m Manifest>) -> Option<&'m Manifest> {
    let loss = |manifest: &Manifest| manifest.validation.and_then(|validation| validation.loss);
    let evaluated = manifests.filter_map(|manifest| Some((loss(manifest)?, manifest)));
    evaluated.min_by(|(a, m), (b, n)| a.total_cmp(b).then(m.step.cmp(&n.step))).map(|(_, manifest)| manifest)
}

/// What a training of `steps` updates leaves, of all its checkpoints: the best where that is asked for, else
/// the last. `None` where it has not finished: an older model must not pass for the trained one.
pub fn result(manifests: &[Manifest], keep_best: bool, steps: u64) -> Option<&Manifest> {
    // Later ones may be there that a resume has passed over.
    let ended = manifests.iter().filter(|manifest| manifest.finished || manifest.step == steps);
    let last = ended.max_by_key(|manifest| manifest.step)?;
    let until = |manifest: &&Manifest| manifest.step <= last.step;
    Some(if keep_best { best(manifests.iter().filter(until)).unwrap_or(last) } else { last })
}

/// An adapter, and what it was trained against.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AdapterRecord {
    /// Its settings.
    pub lora: LoraConfig,
    /// How the frozen linears were held.
    pub quantization: Quantization,
    /// Dtype that they were dequantised to.
    pub precision: Precision,
    /// Digest of the base's values.
    pub base_sha256: String,
}

impl AdapterRecord {
    /// How going on as `wanted` would contradict this; where the base lies does not matter.
    pub fn misfit(&self, wanted: &AdapterRecord) -> Option<String> {
        if self.base_sha256 != wanted.base_sha256 {
            return Some(format!(
                "was trained on another base (digest {}, the job's has {})",
                self.base_sha256, wanted.base_sha256
            ));
        }
        let pairs = |record: &AdapterRecord| {
            let LoraConfig { rank, alpha, rslora, dora, .. } = &record.lora;
            format!(
                "rank {rank}, alpha {alpha}, rslora {rslora}, dora {dora}, base {} in {:?}",
                record.quantization.name(),
                record.precision
            )
        };
        let (own, other) = (pairs(self), pairs(wanted));
        (own != other).then(|| format!("was trained with {own}; the job says {other}"))
    }
}

/// One rank's file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RankFile {
    /// File name inside the checkpoint directory.
    pub file: String,
    /// Size of the file.
    pub bytes: u64,
    /// SHA-256 of the file, hex.
    pub sha256: String,
}

/// Where in the data the next step begins.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DataPosition {
    /// [`crate::dataset::Manifest::digest`] of the dataset trained on.
    pub dataset_digest: String,
    /// SHA-256 of the tokenizer file, hex.
    pub tokenizer_digest: String,
    /// Sequences consumed since the beginning of the job.
    pub sequences: u64,
}

/// Directory name of the checkpoint after `step` updates.
pub fn dir_name(step: u64) -> String {
    format!("step-{step:08}")
}

/// The step of a checkpoint directory's name; `None` for anything else.
pub fn step_of_dir_name(name: &str) -> Option<u64> {
    let digits = name.strip_prefix("step-")?;
    (digits.len() >= 8 && digits.bytes().all(|b| b.is_ascii_digit())).then(|| digits.parse().ok())?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_loss_is_better_when_it_is_lower_by_more_than_the_least_difference() {
        let mut found = None;
        let mut since = Vec::new();
        for loss in [3.0, 2.5, 2.45, f64::NAN, 2.39, 2.0] {
            found = Validation::after(found, loss, 0.1);
            since.push(found.map(|found| (found.best, found.since)));
        }
        let wanted = [(3.0, 0), (2.5, 0), (2.5, 1), (2.5, 2), (2.39, 0), (2.0, 0)];
        assert_eq!(since, wanted.map(Some));
        assert_eq!(Validation::after(None, f64::NAN, 0.0), None);
    }
}
