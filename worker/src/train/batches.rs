//! Which sequences a rank sees when: a pure function of the step, so that resuming seeks.

use tch::{Device, Kind, Tensor};
use tunefleet_proto::ids::Rank;
use tunefleet_proto::job::TrainSpec;

use super::Error;
use super::walk::Batch;
use crate::data::{Sequence, Sequences};
use crate::model::documents::Documents;
use crate::model::head::IGNORED;

/// The training stream of one rank.
pub struct Batches<'a> {
    sequences: &'a Sequences,
    rank: Rank,
    micro_batch: u64,
    accumulate: u64,
    device: Device,
}

impl<'a> Batches<'a> {
    /// The stream of `rank`.
    pub fn new(sequences: &'a Sequences, spec: &TrainSpec, rank: Rank, device: Device) -> Self {
        Batches {
            sequences,
            rank,
            micro_batch: spec.micro_batch_sequences.into(),
            accumulate: spec.accumulate_micro_batches.into(),
            device,
        }
    }

    /// Sequences of one step, over all ranks.
    pub fn step_sequences(&self) -> u64 {
        self.micro_batch * self.accumulate * u64::from(self.rank.world)
    }

    /// This rank's micro-batches of the step that begins at sequence `first`, and how many of
    /// their targets count. Ranks interleave by micro-batch, so that the sequences of a step do
    /// not depend on the number of ranks.
    ///
    /// # Errors
    /// Whatever reading the data meets.
    pub fn step(&self, first: u64) -> Result<(Vec<Batch>, i64), Error> {
        let (mut batches, mut targets) = (Vec::new(), 0);
        for micro in 0..self.accumulate {
            let first =
                first + (micro * u64::from(self.rank.world) + u64::from(self.rank.rank)) * self.micro_batch;
            let rows: Vec<Sequence> = (first..first + self.micro_batch)
                .map(|index| self.sequences.sequence(index))
                .collect::<Result<_, _>>()?;
            targets += counted(&rows);
            batches.push(batch(&rows, self.sequences.keeps_apart(), self.device));
        }
        Ok((batches, targets))
    }
}

/// This rank's share of the first `limit` validation sequences, in rounds in which every rank has
/// a batch, with its number of counted targets; missing rows count nothing. Each is read when it is
/// asked for.
pub fn validation(
    sequences: &Sequences,
    limit: u64,
    micro_batch: u64,
    rank: Rank,
    device: Device,
) -> impl Iterator<Item = Result<(Batch, i64), Error>> + '_ {
    let total = limit.min(sequences.len_per_epoch());
    let per_round = micro_batch * u64::from(rank.world);
    (0..total.div_ceil(per_round)).map(move |round| {
        let first = round * per_round + u64::from(rank.rank) * micro_batch;
        let mut rows = Vec::new();
        for index in first..first + micro_batch {
            // A row past the end repeats the first one without counting it.
            let mut row = sequences.sequence(if index < total { index } else { 0 })?;
            if index >= total {
                row.targets.fill(IGNORED);
            }
            rows.push(row);
        }
        let targets = counted(&rows);
        Ok((batch(&rows, sequences.keeps_apart(), device), targets))
    })
}

fn counted(rows: &[Sequence]) -> i64 {
    rows.iter().flat_map(|row| &row.targets).filter(|&&t| t != IGNORED).count() as i64
}

fn batch(rows: &[Sequence], keeps_apart: bool, device: Device) -> Batch {
    let tokens: Vec<i64> = rows.iter().flat_map(|row| row.tokens.iter().map(|&t| i64::from(t))).collect();
    let targets: Vec<i64> = rows.iter().flat_map(|row| row.targets.iter().copied()).collect();
    let shape = [rows.len() as i64, -1];
    let tensor = |values: &[i64]| {
        let host = Tensor::from_slice(values).view(shape);
        if device == Device::Cpu {
            return host;
        }
        // From pinned memory the copy is only queued: the host does not wait for the device.
        host.pin_memory(device).to_device_(device, Kind::Int64, true, false)
    };
    let documents =
        keeps_apart.then(|| Documents::new(rows.iter().map(|row| row.documents.as_slice()), device));
    Batch { tokens_bt: tensor(&tokens), targets_bt: tensor(&targets), documents }
}
