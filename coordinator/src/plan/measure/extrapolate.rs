//! From a few blocks to all: a step is linear in its blocks, of which there are three kinds.

use tunefleet_proto::job::{JobSpec, Recompute, Residency};
use tunefleet_proto::measure::{Measured, Point};
use tunefleet_proto::model::ModelConfig;

/// Depths that are measured; the whole model where it is no deeper.
const SHALLOW: u64 = 2;
const DEEP: u64 = 4;

/// How a block is kept. The last one is kept in any case, and counted with what lies around the blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// Computed again, gathered when it is needed.
    Shared,
    /// Computed again, stays gathered.
    Resident,
    /// Keeps its activations.
    Kept,
}

const KINDS: [Kind; 3] = [Kind::Shared, Kind::Resident, Kind::Kept];

impl Kind {
    /// A model of such blocks.
    fn point(self, layers: u64) -> Point {
        let (recompute, resident_blocks) = match self {
            Kind::Shared => (Recompute::All, 0),
            Kind::Resident => (Recompute::All, u32::MAX),
            Kind::Kept => (Recompute::None, 0),
        };
        Point { layers, recompute, resident_blocks, whole_steps: false }
    }
}

/// How many of `spec`'s blocks are of each kind, all but the last.
fn counts(spec: &JobSpec, layers: u64) -> [f64; 3] {
    let residency = Residency::of(&spec.train, layers as usize);
    let mut counts = [0.0; 3];
    for i in 0..residency.recomputed.len().saturating_sub(1) {
        let kind = match (residency.recomputed[i], residency.resident[i]) {
            (true, false) => Kind::Shared,
            (true, true) => Kind::Resident,
            (false, _) => Kind::Kept,
        };
        counts[kind as usize] += 1.0;
    }
    counts
}

/// The whole model, as the job has it.
pub fn whole(spec: &JobSpec, config: &ModelConfig) -> Point {
    let train = &spec.train;
    let (recompute, resident_blocks) = (train.recompute, train.resident_blocks);
    Point { layers: config.layers, recompute, resident_blocks, whole_steps: true }
}

/// What must be measured to know `spec`'s steps: the most frequent kind of block at two depths, each other
/// one at the larger.
pub fn points(spec: &JobSpec, config: &ModelConfig) -> Vec<Point> {
    if config.layers <= DEEP {
        return vec![whole(spec, config)];
    }
    let counts = counts(spec, config.layers);
    let most = most_frequent(&counts);
    let mut points = vec![most.point(SHALLOW), most.point(DEEP)];
    points.extend(
        KINDS
            .into_iter()
            .filter(|kind| *kind != most && counts[*kind as usize] > 0.0)
            .map(|kind| kind.point(DEEP)),
    );
    points
}

fn most_frequent(counts: &[f64; 3]) -> Kind {
    let mut most = Kind::Shared;
    for kind in KINDS {
        if counts[kind as usize] > counts[most as usize] {
            most = kind;
        }
    }
    most
}

/// Measured points of a model, to be added up to the whole.
pub struct Sum<'a> {
    counts: [f64; 3],
    points: &'a [Measured],
}

impl<'a> Sum<'a> {
    /// Of what [`points`] asked for.
    pub fn new(spec: &JobSpec, config: &ModelConfig, points: &'a [Measured]) -> Self {
        Sum { counts: counts(spec, config.layers), points }
    }

    /// `of` for the whole model.
    pub fn of(&self, of: impl Fn(&Measured) -> f64) -> f64 {
        if let Some(whole) = self.points.iter().find(|measured| measured.point.whole_steps) {
            return of(whole);
        }
        let at = |kind: Kind, layers| self.points.iter().find(|m| m.point == kind.point(layers)).map(&of);
        let most = most_frequent(&self.counts);
        let (Some(shallow), Some(deep)) = (at(most, SHALLOW), at(most, DEEP)) else { return 0.0 };
        let slope = ((deep - shallow) / (DEEP - SHALLOW) as f64).max(0.0);
        // With the last block alone.
        let around = (shallow - slope * (SHALLOW - 1) as f64).max(0.0);
        let of_kind = |kind: Kind| match at(kind, DEEP) {
            Some(deep) if kind != most => ((deep - around) / (DEEP - 1) as f64).max(0.0),
            _ => slope,
        };
        around + KINDS.into_iter().map(|kind| self.counts[kind as usize] * of_kind(kind)).sum::<f64>()
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use tunefleet_proto::job;
    use tunefleet_proto::measure::Seconds;

    use super::*;

    fn spec(train: &str) -> (JobSpec, ModelConfig) {
        let text = format!("dataset: d\nmodel: {{init: {{preset: starcoder}}}}\ntrain: {{{train}}}\n");
        let spec = job::load(Path::new("/j.yaml"), &text, &[], Path::new("/")).unwrap();
        (spec, ModelConfig::preset("starcoder").unwrap())
    }

    /// A machine on which a block takes 10 s computed again, 8 s where it stays gathered as well, 7 s kept,
    /// and everything else with the last block 5 s.
    fn measured(point: Point) -> Measured {
        let of_block = match (point.recompute, point.resident_blocks) {
            (Recompute::None, _) => 7.0,
            (_, 0) => 10.0,
            _ => 8.0,
        };
        let seconds = 5.0 + (point.layers - 1) as f64 * of_block;
        let seconds = Seconds { median: seconds, least: seconds, most: seconds };
        Measured {
            point,
            on_gpu: false,
            first_micro_batch: seconds,
            later_micro_batch: None,
            update: seconds,
            step: seconds,
            evaluation: seconds,
            staging: None,
            shard_elements: 0,
            peak_bytes: 0,
            held_bytes: 0,
            gathered_bytes: 0,
            reduced_bytes: 0,
        }
    }

    fn extrapolated(train: &str) -> (usize, f64) {
        let (spec, config) = spec(train);
        let points: Vec<Measured> = points(&spec, &config).into_iter().map(measured).collect();
        (points.len(), Sum::new(&spec, &config, &points).of(|m| m.first_micro_batch.median))
    }

    #[test]
    fn every_kind_of_block_counts_as_often_as_the_job_has_it() {
        assert_eq!(extrapolated("ranks: 8"), (2, 5.0 + 39.0 * 10.0));
        assert_eq!(extrapolated("ranks: 8, recompute: none"), (2, 5.0 + 39.0 * 7.0));
        assert_eq!(extrapolated("ranks: 8, strategy: no_shard"), (2, 5.0 + 39.0 * 8.0));
        // 39 blocks before the last: every fourth computed again, nine of them.
        assert_eq!(extrapolated("ranks: 8, recompute: every 4"), (3, 5.0 + 9.0 * 10.0 + 30.0 * 7.0));
        let mixed = extrapolated("ranks: 8, recompute: every 2, resident_blocks: 10");
        assert_eq!(mixed, (4, 5.0 + 5.0 * 8.0 + 14.0 * 10.0 + 20.0 * 7.0));
    }

    #[test]
    fn a_model_of_few_blocks_is_measured_whole() {
        let (spec, config) = spec("ranks: 2");
        let config = ModelConfig { layers: 4, ..config };
        assert_eq!(points(&spec, &config), [whole(&spec, &config)]);
    }
}
