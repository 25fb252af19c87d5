//! One checkpoint, written by all ranks of one copy of the weights: shards, then digests, then the
//! manifest, then the rename.
//!
//! Training stands still only while the state is copied to main memory (where it is asked to go on);
//! a thread writes the copy. Nothing of that needs a collective: each rank leaves a note beside its file
//! when it is on the disk, and rank 0 gives the directory its name when all notes are there. A rank that
//! cannot write fails at its next step, and its peers with it.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use tch::{Device, Kind, Tensor};
use tunefleet_proto::checkpoint::{
    self as proto, AdapterRecord, DataPosition, Manifest, RankFile, Validation,
};
use tunefleet_proto::shard_plan::ShardPlan;

use super::Error;
use super::fence::Fence;
use super::place;
use super::retain;
use super::safetensors::{Entry, WriteDtype, Writer};
use crate::comm::{Mesh, any_failed};
use crate::train::units::Shard;

/// Names of a shard's tensors in a rank file, after `<unit>.`.
pub const STATE_NAMES: [&str; 3] = ["weight", "exp_avg", "exp_avg_sq"];
/// How often rank 0 looks for the notes of the others.
const LOOK_EVERY: Duration = Duration::from_millis(20);

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
    /// What evaluations found so far.
    pub validation: Option<Validation>,
    /// Whether training ends with it.
    pub finished: bool,
    /// What the shards are an adapter of.
    pub adapter: Option<AdapterRecord>,
}

/// Where and how checkpoints are written.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Holds one directory for each.
    pub dir: PathBuf,
    /// How many of the newest are kept.
    pub keep: usize,
    /// Whether the one with the lowest validation loss is kept as well.
    pub keep_best: bool,
    /// Whether training goes on while one is written.
    pub asynchronous: bool,
    /// Keeps an old attempt from writing.
    pub fence: Option<Fence>,
}

impl Settings {
    /// Where a checkpoint is written before it takes its place: each attempt has its own.
    fn incomplete(&self, target: &Path) -> Result<PathBuf, Error> {
        match &self.fence {
            Some(fence) => {
                let mut name = target.as_os_str().to_owned();
                name.push(format!(".a{}", fence.attempt()));
                place::incomplete(Path::new(&name))
            }
            None => place::incomplete(target),
        }
    }

    fn may_write(&self) -> Result<(), Error> {
        self.fence.as_ref().map_or(Ok(()), Fence::check)
    }
}

/// A checkpoint that exists.
#[derive(Debug, Clone, PartialEq)]
pub struct Saved {
    /// Updates done.
    pub step: u64,
    /// Its directory.
    pub path: PathBuf,
    /// How long training stood still for it.
    pub pause_seconds: f64,
}

/// Writes one checkpoint at a time.
pub struct Saver {
    settings: Settings,
    under_way: Option<UnderWay>,
    /// A state in main memory, kept for the next one: fresh memory costs a page fault for each 4 KiB.
    staged: Option<Staged>,
}

/// fp32 weight and moments of each unit.
pub(crate) type Staged = Vec<[Tensor; 3]>;

struct UnderWay {
    saved: Saved,
    /// Tells when this rank's file and note are on the disk, or why they are not.
    written: Receiver<Result<(), String>>,
    /// What it told.
    told: Option<Result<(), String>>,
    cancelled: Arc<AtomicBool>,
    /// Ends when the directory has its name (rank 0), or this rank's part is written.
    thread: JoinHandle<(Option<Staged>, Result<(), Error>)>,
}

/// All that a thread needs to write and publish.
struct Job {
    settings: Settings,
    plan: ShardPlan,
    state: State,
    ranks: u32,
    rank: u32,
    incomplete: PathBuf,
    target: PathBuf,
}

impl Saver {
    /// One that has written nothing yet.
    pub fn new(settings: Settings) -> Self {
        Saver { settings, under_way: None, staged: None }
    }

    /// Begins to write `<dir>/step-NNNNNNNN`; returns when training may go on. Collective. What was under
    /// way before must have been waited for. `device` is where the communicator works.
    ///
    /// # Errors
    /// [`Error::Save`], on all ranks or none, as far as it is known here; the directory of the checkpoint
    /// then does not exist.
    pub fn start(
        &mut self,
        plan: &ShardPlan,
        shards: &[Shard],
        state: State,
        mesh: Mesh<'_>,
        device: Device,
    ) -> Result<(), Error> {
        let began = Instant::now();
        let target = self.settings.dir.join(proto::dir_name(state.step));
        let incomplete = self.settings.incomplete(&target)?;
        let world = mesh.world.rank();
        let prepare = || self.settings.may_write().and_then(|()| prepare(&self.settings.dir, &incomplete));
        let prepared = if world.rank == 0 { prepare() } else { Ok(()) };
        agree(mesh, device, state.step, prepared.map_err(|error| error.to_string()))?;
        if mesh.copy() > 0 {
            return Ok(());
        }
        let saved = Saved { step: state.step, path: target.clone(), pause_seconds: 0.0 };
        let job = Job {
            settings: self.settings.clone(),
            plan: plan.clone(),
            state,
            ranks: world.world,
            rank: mesh.shards.rank().rank,
            incomplete,
            target,
        };
        let staged = match self.settings.asynchronous {
            true => Some(stage(shards, self.staged.take())?),
            false => None,
        };
        let own_file = match &staged {
            Some(_) => None,
            // Nothing changes while it is written: no copy is needed, but one unit's at a time.
            None => Some(job.write(&mut shards.iter().map(state_of))),
        };
        let (sender, written) = channel();
        let cancelled = Arc::new(AtomicBool::new(false));
        let for_thread = Arc::clone(&cancelled);
        let body = move || job.run(staged, own_file, &sender, &for_thread);
        let thread = std::thread::Builder::new()
            .name("checkpoint".to_owned())
            .spawn(body)
            .map_err(|e| Error::Save { step: saved.step, cause: format!("starting a thread: {e}") })?;
        let saved = Saved { pause_seconds: began.elapsed().as_secs_f64(), ..saved };
        self.under_way = Some(UnderWay { saved, written, told: None, cancelled, thread });
        Ok(())
    }

    /// What a save under way has come to, if it has ended; told once. Not collective: another rank may
    /// not know yet.
    ///
    /// # Errors
    /// [`Error::Save`] when this rank's part, or its publication, failed.
    pub fn poll(&mut self) -> Result<Option<Saved>, Error> {
        let Some(under_way) = &mut self.under_way else { return Ok(None) };
        if under_way.told.is_none() {
            under_way.told = under_way.written.try_recv().ok();
        }
        if let Some(Err(cause)) = &under_way.told {
            return Err(failed(under_way.saved.step, cause));
        }
        if !under_way.thread.is_finished() {
            return Ok(None);
        }
        self.join()
    }

    /// Waits for the save under way. Collective. Tells of it unless [`Saver::poll`] has.
    ///
    /// # Errors
    /// [`Error::Save`] on a rank whose part failed, and [`Error::Elsewhere`] on the others.
    pub fn finish(&mut self, mesh: Mesh<'_>, device: Device, step: u64) -> Result<Option<Saved>, Error> {
        let began = Instant::now();
        let own = match &mut self.under_way {
            Some(under_way) => under_way.wait_written(),
            None => Ok(()),
        };
        // Rank 0 would wait for a note that never comes.
        if let Err(error) = agree(mesh, device, step, own) {
            if let Some(incomplete) = self.cancel().filter(|_| mesh.world.rank().rank == 0) {
                // Best effort: it is never read, and the next save removes it.
                let _ = fs::remove_dir_all(incomplete);
            }
            return Err(error);
        }
        let waited = began.elapsed().as_secs_f64();
        let published = self.join();
        let (saved, outcome) = match published {
            Ok(saved) => (saved, Ok(())),
            Err(Error::Save { cause, .. }) => (None, Err(cause)),
            Err(error) => (None, Err(error.to_string())),
        };
        agree(mesh, device, step, outcome)?;
        Ok(saved.map(|saved| Saved { pause_seconds: saved.pause_seconds + waited, ..saved }))
    }

    fn join(&mut self) -> Result<Option<Saved>, Error> {
        let Some(UnderWay { saved, thread, .. }) = self.under_way.take() else { return Ok(None) };
        match thread.join() {
            Ok((staged, outcome)) => {
                self.staged = staged;
                outcome.map_err(|error| failed(saved.step, &error.to_string()))?;
                Ok(Some(saved))
            }
            Err(_) => Err(failed(saved.step, "the thread that wrote it has panicked")),
        }
    }

    /// Ends what is under way; its directory, which is not whole.
    fn cancel(&mut self) -> Option<PathBuf> {
        let under_way = self.under_way.take()?;
        under_way.cancelled.store(true, Ordering::Release);
        let _ = under_way.thread.join();
        self.settings.incomplete(&under_way.saved.path).ok()
    }
}

impl Drop for Saver {
    /// Waits for nothing: a rank that fails must say so at once, however slow its disk is.
    fn drop(&mut self) {
        if let Some(under_way) = &self.under_way {
            under_way.cancelled.store(true, Ordering::Release);
        }
    }
}

impl UnderWay {
    fn wait_written(&mut self) -> Result<(), String> {
        let panicked = || Err("the thread that writes has panicked".to_owned());
        self.told.get_or_insert_with(|| self.written.recv().unwrap_or_else(|_| panicked())).clone()
    }
}

impl Job {
    /// Writes what is staged (unless it is written), and publishes it on rank 0.
    fn run(
        self,
        staged: Option<Staged>,
        own_file: Option<Result<(), Error>>,
        written: &Sender<Result<(), String>>,
        cancelled: &AtomicBool,
    ) -> (Option<Staged>, Result<(), Error>) {
        let units = staged.iter().flatten();
        let own = own_file.unwrap_or_else(|| {
            let copies = |unit: &[Tensor; 3]| match cancelled.load(Ordering::Acquire) {
                true => Err(Error::Elsewhere("training has ended meanwhile".to_owned())),
                false => Ok(unit.each_ref().map(Tensor::shallow_clone)),
            };
            self.write(&mut units.map(copies))
        });
        let wrote = own.is_ok();
        // Nobody listens when training has failed meanwhile.
        let _ = written.send(own.map_err(|error| error.to_string()));
        let outcome = match wrote {
            // The error has been told.
            false => Ok(()),
            true if self.rank > 0 => Ok(()),
            true => self.publish(cancelled),
        };
        (staged, outcome)
    }

    /// This rank's file and the note of its digest.
    fn write(&self, units: &mut dyn Iterator<Item = Result<[Tensor; 3], Error>>) -> Result<(), Error> {
        crate::fault::at(self.rank, self.state.step);
        crate::fault::point(crate::fault::Phase::Save);
        let mut entries = Vec::new();
        for unit in &self.plan.units {
            for state in STATE_NAMES {
                let name = format!("{}.{state}", unit.name);
                entries.push(Entry { name, shape: vec![unit.shard_elements(self.plan.world)] });
            }
        }
        let file = rank_file(self.rank);
        let mut writer = Writer::create(&self.incomplete.join(&file), &entries, WriteDtype::F32)?;
        for unit in units {
            for tensor in unit? {
                let host = tensor.to_device(Device::Cpu);
                writer.bytes(tunefleet_kernels::bytes::bytes(&host)?)?;
            }
        }
        let (bytes, sha256) = writer.finish()?;
        let note = note(&self.incomplete, self.rank);
        let text = serde_json::to_vec(&RankFile { file, bytes, sha256 })
            .map_err(|e| Error::format(&note, e.to_string()))?;
        // Whole or not at all: rank 0 looks at any moment.
        let begun = note.with_extension("begun");
        fs::write(&begun, text).and_then(|()| fs::rename(&begun, &note)).map_err(Error::io(&note))
    }

    /// Waits for all notes, writes the manifest and gives the directory its name.
    fn publish(&self, cancelled: &AtomicBool) -> Result<(), Error> {
        let mut files = Vec::new();
        for rank in 0..self.plan.world {
            let path = note(&self.incomplete, rank);
            let text = loop {
                match fs::read(&path) {
                    Ok(text) => break text,
                    Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
                    Err(e) => return Err(Error::io(&path)(e)),
                }
                if cancelled.load(Ordering::Acquire) {
                    return Err(Error::Elsewhere(format!("rank {rank} has not written its part")));
                }
                std::thread::sleep(LOOK_EVERY);
            };
            let file: RankFile =
                serde_json::from_slice(&text).map_err(|e| Error::format(&path, e.to_string()))?;
            fs::remove_file(&path).map_err(Error::io(&path))?;
            files.push(file);
        }
        let State { step, seed, data, loss, validation, finished, adapter } = self.state.clone();
        let manifest = Manifest {
            version: proto::MANIFEST_VERSION,
            written_by: concat!("tunefleet ", env!("CARGO_PKG_VERSION")).to_owned(),
            step,
            ranks: self.ranks,
            shard_plan: self.plan.clone(),
            adapter,
            files,
            data,
            seed,
            loss,
            validation,
            finished,
        };
        let path = self.incomplete.join(proto::MANIFEST_FILE);
        let text = serde_json::to_vec_pretty(&manifest).map_err(|e| Error::format(&path, e.to_string()))?;
        fs::write(&path, text).map_err(Error::io(&path))?;
        for synced in [path.as_path(), &self.incomplete] {
            place::sync(synced)?;
        }
        self.settings.may_write()?;
        place::place(&self.incomplete, &self.target)?;
        retain::prune(&self.settings.dir, self.settings.keep, self.settings.keep_best, step);
        Ok(())
    }
}

/// File name of a rank's shards.
pub fn rank_file(rank: u32) -> String {
    format!("rank-{rank:05}.safetensors")
}

fn note(incomplete: &Path, rank: u32) -> PathBuf {
    incomplete.join(format!("rank-{rank:05}.written"))
}

fn state_of(shard: &Shard) -> Result<[Tensor; 3], Error> {
    let [exp_avg, exp_avg_sq] = shard.moments.to_fp32()?;
    Ok([shard.master.shallow_clone(), exp_avg, exp_avg_sq])
}

/// A copy of the state in main memory, in that of the last one where there is one.
pub(crate) fn stage(shards: &[Shard], kept: Option<Staged>) -> Result<Staged, Error> {
    let mut staged = kept.unwrap_or_default();
    for (index, shard) in shards.iter().enumerate() {
        let state = state_of(shard)?;
        if staged.len() <= index {
            let room = |t: &Tensor| {
                let room = Tensor::empty(t.size(), (Kind::Float, Device::Cpu));
                // From pinned memory a GPU copies at the speed of its bus.
                if t.device().is_cuda() && t.numel() > 0 { room.pin_memory(t.device()) } else { room }
            };
            staged.push(state.each_ref().map(room));
        }
        for (into, from) in staged[index].iter_mut().zip(&state) {
            into.copy_(from);
        }
    }
    Ok(staged)
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

/// Turns one rank's failure into everybody's.
fn agree(mesh: Mesh<'_>, device: Device, step: u64, own: Result<(), String>) -> Result<(), Error> {
    let failed_somewhere = any_failed(mesh.world, device, own.is_err(), "checkpoint agreement")?;
    match own {
        Err(cause) => Err(failed(step, &cause)),
        Ok(()) if failed_somewhere => {
            Err(Error::Elsewhere(format!("saving step {step}: another rank could not write its part")))
        }
        Ok(()) => Ok(()),
    }
}

fn failed(step: u64, cause: &str) -> Error {
    Error::Save { step, cause: cause.to_owned() }
}
