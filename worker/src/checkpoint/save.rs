//! One checkpoint, written by all ranks: shards, then digests, then the manifest, then the rename.

use std::fs;
use std::path::{Path, PathBuf};

use tch::{Device, Tensor};
use tunefleet_proto::checkpoint::{self as proto, AdapterRecord, DataPosition, Manifest, RankFile};
use tunefleet_proto::shard_plan::ShardPlan;

use super::Error;
use super::place;
use super::safetensors::{Entry, WriteDtype, Writer};
use crate::comm::{Communicator, Tag, any_failed};
use crate::train::units::Shard;

/// Names of a shard's tensors in a rank file, after `<unit>.`.
pub const STATE_NAMES: [&str; 3] = ["weight", "exp_avg", "exp_avg_sq"];

/// What a checkpoint says besides its shards.
#[derive(Debug, Clone)]
pub struct State {
    /// Updates done.
    pub step: u64,
    /// Seed of dropout.
    pub seed: u64,
    /// Position in the data.
    pub data: DataPosition,
    /// Loss of the last step.
    pub loss: f64,
    /// What the shards are an adapter of.
    pub adapter: Option<AdapterRecord>,
}

/// Writes `<dir>/step-NNNNNNNN` and removes what is older than the newest `keep`. Collective: all
/// ranks succeed or all return an error. `device` is where the communicator works.
///
/// # Errors
/// [`Error::Save`]; the directory of the checkpoint then does not exist.
pub fn save(
    dir: &Path,
    plan: &ShardPlan,
    shards: &[Shard],
    state: &State,
    keep: usize,
    comm: &dyn Communicator,
    device: Device,
) -> Result<PathBuf, Error> {
    let rank = comm.rank();
    let name = proto::dir_name(state.step);
    let target = dir.join(&name);
    let incomplete = place::incomplete(&target)?;

    let prepared = if rank.rank == 0 { prepare(dir, &incomplete) } else { Ok(()) };
    agree(comm, device, state.step, prepared)?;
    let written = write_rank(&incomplete, rank.rank, plan, shards);
    let digests = share(comm, device, written.as_ref().ok())?;
    let outcome = agree(comm, device, state.step, written.map(|_| ()));
    if outcome.is_ok() {
        let published =
            if rank.rank == 0 { publish(&incomplete, &target, plan, state, digests) } else { Ok(()) };
        agree(comm, device, state.step, published)?;
        if rank.rank == 0 {
            prune(dir, keep, state.step);
        }
        return Ok(target);
    }
    if rank.rank == 0 {
        // Best effort: an incomplete directory is never read, and the next save removes it.
        let _ = fs::remove_dir_all(&incomplete);
    }
    outcome.map(|()| target)
}

/// File name of a rank's shards.
pub fn rank_file(rank: u32) -> String {
    format!("rank-{rank:05}.safetensors")
}

/// Clears what interrupted saves left, of whatever step, and makes room for this one.
fn prepare(dir: &Path, incomplete: &Path) -> Result<(), Error> {
    fs::create_dir_all(dir).map_err(Error::io(dir))?;
    for entry in fs::read_dir(dir).map_err(Error::io(dir))? {
        let path = entry.map_err(Error::io(dir))?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if name.starts_with("step-") && name.contains(place::INCOMPLETE) {
            fs::remove_dir_all(&path).map_err(Error::io(&path))?;
        }
    }
    fs::create_dir(incomplete).map_err(Error::io(incomplete))
}

fn write_rank(dir: &Path, rank: u32, plan: &ShardPlan, shards: &[Shard]) -> Result<(u64, String), Error> {
    let mut entries = Vec::new();
    for unit in &plan.units {
        for state in STATE_NAMES {
            let name = format!("{}.{state}", unit.name);
            entries.push(Entry { name, shape: vec![unit.shard_elements(plan.world)] });
        }
    }
    let mut writer = Writer::create(&dir.join(rank_file(rank)), &entries, WriteDtype::F32)?;
    for shard in shards {
        let [exp_avg, exp_avg_sq] = shard.moments.to_fp32()?;
        for tensor in [&shard.master, &exp_avg, &exp_avg_sq] {
            let host = tensor.to_device(Device::Cpu);
            writer.bytes(tunefleet_kernels::bytes::bytes(&host)?)?;
        }
    }
    writer.finish()
}

/// All ranks' (size, SHA-256), in rank order. One that failed shares zeros.
fn share(
    comm: &dyn Communicator,
    device: Device,
    own: Option<&(u64, String)>,
) -> Result<Vec<(u64, String)>, Error> {
    const WORDS: usize = 5;
    let rank = comm.rank();
    let mut words = vec![0i64; WORDS * rank.world as usize];
    if let Some((bytes, sha256)) = own {
        let mine = &mut words[WORDS * rank.rank as usize..][..WORDS];
        mine[0] = *bytes as i64;
        for (word, hex) in mine[1..].iter_mut().zip(sha256.as_bytes().chunks(16)) {
            let digits = std::str::from_utf8(hex).unwrap_or_default();
            *word = u64::from_str_radix(digits, 16).unwrap_or_default() as i64;
        }
    }
    let tensor = Tensor::from_slice(&words).to_device(device);
    comm.all_reduce(&tensor, Tag { unit: None, what: "checkpoint digests" })?.wait()?;
    let all = Vec::<i64>::try_from(tensor.to_device(Device::Cpu)).unwrap_or_default();
    let hex = |words: &[i64]| words.iter().map(|w| format!("{:016x}", *w as u64)).collect::<String>();
    Ok(all.chunks(WORDS).map(|w| (w[0] as u64, hex(&w[1..]))).collect())
}

/// Turns one rank's failure into everybody's.
fn agree(comm: &dyn Communicator, device: Device, step: u64, own: Result<(), Error>) -> Result<(), Error> {
    let failed = any_failed(comm, device, own.is_err(), "checkpoint agreement")?;
    match own {
        Err(e) => Err(Error::Save { step, cause: e.to_string() }),
        Ok(()) if failed => {
            Err(Error::Elsewhere(format!("saving step {step}: another rank could not write its part")))
        }
        Ok(()) => Ok(()),
    }
}

fn publish(
    incomplete: &Path,
    target: &Path,
    plan: &ShardPlan,
    state: &State,
    digests: Vec<(u64, String)>,
) -> Result<(), Error> {
    let files = digests
        .into_iter()
        .enumerate()
        .map(|(rank, (bytes, sha256))| RankFile { file: rank_file(rank as u32), bytes, sha256 })
        .collect();
    let manifest = Manifest {
        version: proto::MANIFEST_VERSION,
        written_by: concat!("tunefleet ", env!("CARGO_PKG_VERSION")).to_owned(),
        step: state.step,
        shard_plan: plan.clone(),
        adapter: state.adapter.clone(),
        files,
        data: state.data.clone(),
        seed: state.seed,
        loss: state.loss,
    };
    let path = incomplete.join(proto::MANIFEST_FILE);
    let text = serde_json::to_vec_pretty(&manifest).map_err(|e| Error::format(&path, e.to_string()))?;
    fs::write(&path, text).map_err(Error::io(&path))?;
    for synced in [path.as_path(), incomplete] {
        place::sync(synced)?;
    }
    place::place(incomplete, target)
}

/// Removes all but the newest `keep` checkpoints up to `saved`. A failure costs disk, not the run.
/// Later ones were passed over by a resume, as not sound: they count for nothing.
fn prune(dir: &Path, keep: usize, saved: u64) {
    let mut steps = super::load::steps(dir);
    steps.retain(|step| *step <= saved);
    steps.truncate(steps.len().saturating_sub(keep.max(1)));
    for step in steps {
        let path = dir.join(proto::dir_name(step));
        if let Err(error) = fs::remove_dir_all(&path) {
            tracing::warn!(path = %path.display(), %error, "cannot remove an old checkpoint");
        }
    }
}
