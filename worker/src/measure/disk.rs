//! Rates of the writer of checkpoints: a part of a state, written as a rank's file is, hashed and flushed.

use std::path::Path;
use std::time::Instant;

use sha2::{Digest, Sha256};
use tch::{Device, Kind, Tensor};
use tunefleet_proto::measure::Disk;

use super::Error;
use crate::checkpoint::Error as CheckpointError;
use crate::checkpoint::safetensors::{Entry, WriteDtype, Writer};
use crate::checkpoint::save::Staged;

/// Most that is written, in fp32 elements: 256 MB.
const MOST_ELEMENTS: usize = 64_000_000;
/// Least: what a disk takes for a few kilobytes says nothing.
const LEAST_ELEMENTS: usize = 4_000_000;

/// Writes some of `staged` into a directory beside `output` that is removed again.
pub(super) fn measure(output: &Path, staged: Staged) -> Result<Disk, Error> {
    let existing = output.ancestors().find(|dir| dir.is_dir()).unwrap_or_else(|| Path::new("/"));
    let dir = tempfile::Builder::new()
        .prefix(".measure-")
        .tempdir_in(existing)
        .map_err(CheckpointError::io(existing))?;
    let mut tensors = Vec::new();
    let mut elements = 0;
    for tensor in staged.into_iter().flatten().filter(|tensor| tensor.numel() > 0) {
        let left = MOST_ELEMENTS - elements;
        let taken = tensor.numel().min(left);
        if taken > 0 {
            tensors.push(tensor.narrow(0, 0, taken as i64));
            elements += taken;
        }
    }
    if elements < LEAST_ELEMENTS {
        tensors.push(Tensor::ones([(LEAST_ELEMENTS - elements) as i64], (Kind::Float, Device::Cpu)));
    }

    let entry = |(index, tensor): (usize, &Tensor)| Entry {
        name: index.to_string(),
        shape: vec![tensor.numel() as u64],
    };
    let entries: Vec<Entry> = tensors.iter().enumerate().map(entry).collect();
    let began = Instant::now();
    let mut writer = Writer::create(&dir.path().join("state.safetensors"), &entries, WriteDtype::F32)?;
    for tensor in &tensors {
        writer.bytes(tunefleet_kernels::bytes::bytes(tensor)?)?;
    }
    let (bytes, _) = writer.finish()?;
    let write_seconds = began.elapsed().as_secs_f64();

    let began = Instant::now();
    let mut hash = Sha256::new();
    for tensor in &tensors {
        hash.update(tunefleet_kernels::bytes::bytes(tensor)?);
    }
    std::hint::black_box(hash.finalize());
    let hash_seconds = began.elapsed().as_secs_f64();
    let rate = |seconds: f64| bytes as f64 / seconds.max(1e-9);
    Ok(Disk { bytes, write_bytes_per_second: rate(write_seconds), hash_bytes_per_second: rate(hash_seconds) })
}
