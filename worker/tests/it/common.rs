//! What several tests of the engine share.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use tch::{Device, Kind, Tensor};
use tunefleet_proto::checkpoint::DataPosition;
use tunefleet_proto::job::{Offload, Optimizer, Precision, Recompute};
use tunefleet_proto::model::ModelConfig;
use tunefleet_proto::shard_plan::ShardPlan;
use tunefleet_worker::checkpoint::{hugging_face, save};
use tunefleet_worker::comm::{Mesh, Solo};
use tunefleet_worker::model::numerics::Numerics;
use tunefleet_worker::train::rng::Seeds;
use tunefleet_worker::train::units;
use tunefleet_worker::train::walk::{Batch, MicroPosition, Walk, WalkOptions};

/// Root of the checkout.
pub fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

/// The interpreter that `make setup` fills; `None` (after saying so) without one, an error in CI.
pub fn python() -> Option<PathBuf> {
    let python = root().join(".venv/bin/python");
    // Found, not imported: that takes seconds.
    let find = "import importlib.util as u, sys; sys.exit(not all(map(u.find_spec, sys.argv[1:])))";
    let peers = ["torch", "transformers", "safetensors", "peft", "bitsandbytes", "openai"];
    let ready = python.exists()
        && Command::new(&python).args(["-c", find]).args(peers).output().is_ok_and(|o| o.status.success());
    if ready {
        return Some(python);
    }
    assert!(std::env::var_os("CI").is_none(), "no .venv with the tests' peers: run make setup-tests");
    println!(
        "skipped: no .venv with torch, transformers, peft, bitsandbytes and openai; run make setup-tests"
    );
    None
}

/// Runs one of the parity programs and returns its output.
pub fn run_python(python: &Path, arguments: &[&str]) -> String {
    // What the peers write is what they compute on a CPU, on every machine.
    let mut command = Command::new(python);
    let output =
        command.current_dir(root()).args(arguments).env("CUDA_VISIBLE_DEVICES", "").output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{arguments:?}:\n{text}\n{}", String::from_utf8_lossy(&output.stderr));
    text
}

/// The fixtures of `tests/parity/make_fixtures.py`, made where they are not there yet.
pub fn fixtures() -> Option<PathBuf> {
    let python = python()?;
    let dir = root().join("target/parity");
    run_python(&python, &["tests/parity/make_fixtures.py", "--out", dir.to_str().unwrap()]);
    Some(dir)
}

/// The fixtures that a program of `tests/parity` makes, under a name of their own.
pub fn fixtures_of(program: &str, name: &str) -> Option<PathBuf> {
    let python = python()?;
    // Beside the others: each program clears its own directory.
    let dir = root().join(format!("target/parity-{name}"));
    run_python(&python, &[&format!("tests/parity/{program}"), dir.to_str().unwrap()]);
    Some(dir)
}

/// All tensors of a safetensors file.
pub fn tensors(path: &Path) -> HashMap<String, Tensor> {
    Tensor::read_safetensors(path).unwrap().into_iter().collect()
}

/// A fixture's batch.
pub fn batch(fixture: &HashMap<String, Tensor>) -> Batch {
    Batch::new(fixture["ids"].shallow_clone(), fixture["targets"].shallow_clone())
}

/// A world of one.
pub const SOLO: Mesh<'static> = Mesh { world: &Solo, shards: &Solo, replicas: None };
/// Every block computed again, two buffers for them.
pub const RECOMPUTE: WalkOptions = WalkOptions {
    recompute: Recompute::All,
    resident_blocks: 0,
    gather_ahead: 1,
    reduce_precision: Precision::Fp32,
    poison: false,
};
/// No block computed again.
pub const KEEP: WalkOptions = WalkOptions { recompute: Recompute::None, ..RECOMPUTE };

/// A walk over the model in `dir` as a rank of `mesh`.
pub fn walk<'a>(
    dir: &Path,
    precision: Precision,
    mesh: Mesh<'a>,
    options: WalkOptions,
    edit: impl FnOnce(&mut ModelConfig),
) -> Walk<'a> {
    walk_with(dir, precision, mesh, options, Offload::None, edit)
}

/// [`walk`], with its state where `offload` says.
pub fn walk_with<'a>(
    dir: &Path,
    precision: Precision,
    mesh: Mesh<'a>,
    options: WalkOptions,
    offload: Offload,
    edit: impl FnOnce(&mut ModelConfig),
) -> Walk<'a> {
    tunefleet_kernels::device::set_deterministic(true).unwrap();
    let mut config = hugging_face::read_config(dir).unwrap();
    edit(&mut config);
    let rank = mesh.shards.rank();
    let plan = ShardPlan::new(&config, rank.world);
    let numerics = Numerics::new(Device::Cpu, precision);
    let shards = units::shards(&plan, rank.rank, numerics, Optimizer::AdamW, offload, numerics.kind).unwrap();
    hugging_face::load(dir, &plan, mesh, &shards).unwrap();
    let mut walk = Walk::new(config, plan, shards, numerics, mesh, Seeds::new(3), options);
    walk.invalidate();
    walk
}

/// A checkpoint in `checkpoints` of the model in `model`, as if it had been trained for a step.
pub fn checkpoint_of(model: &Path, checkpoints: &Path) {
    let walk = walk(model, Precision::Fp32, SOLO, KEEP, |_| ());
    let mut saver = saver(checkpoints, 1);
    saver.start(walk.plan(), walk.shards(), state(1), SOLO, Device::Cpu).unwrap();
    saver.finish(SOLO, Device::Cpu, 1).unwrap().unwrap();
}

/// Writes the checkpoints in `dir`, and keeps so many.
pub fn saver(dir: &Path, keep: usize) -> save::Saver {
    let dir = dir.to_owned();
    save::Saver::new(save::Settings { dir, keep, keep_best: false, asynchronous: true, fence: None })
}

/// What a checkpoint says after so many updates, all of them.
pub fn state(step: u64) -> save::State {
    let data = DataPosition { dataset_digest: String::new(), tokenizer_digest: String::new(), sequences: 0 };
    save::State { step, seed: 0, data, loss: 0.0, validation: None, finished: true, adapter: None }
}

/// One step's loss and gradients (by Hugging Face name) of one batch in a world of one.
pub fn loss_and_grads(walk: &mut Walk<'_>, batch: &Batch) -> (f64, HashMap<String, Tensor>) {
    loss_and_grads_of_all(walk, std::slice::from_ref(batch))
}

/// [`loss_and_grads`] of several batches in one step.
pub fn loss_and_grads_of_all(walk: &mut Walk<'_>, batches: &[Batch]) -> (f64, HashMap<String, Tensor>) {
    let counts = batches.iter().map(|batch| batch.targets_bt.ne(-100).sum(Kind::Double));
    let count: Tensor = counts.reduce(|a, b| a + b).unwrap();
    walk.begin_step().unwrap();
    let scale = count.reciprocal().to_kind(Kind::Float);
    let mut loss = Tensor::zeros([], (Kind::Double, Device::Cpu));
    for (micro, batch) in (0..).zip(batches) {
        let position = MicroPosition { step: 1, micro, of: batches.len() as u32 };
        loss += walk.train_micro_batch(batch, position, &scale).unwrap();
    }
    walk.finish_step().unwrap();
    let mut grads = HashMap::new();
    for (unit, shard) in walk.plan().units.iter().zip(walk.shards()) {
        for (slot, grad) in unit.parameters.iter().zip(units::views(unit, &shard.grad)) {
            grads.insert(slot.hf_name.clone(), grad.copy());
        }
    }
    ((loss / count).double_value(&[]), grads)
}

/// Frobenius norm, in fp64.
pub fn norm(t: &Tensor) -> f64 {
    t.to_kind(Kind::Double).square().sum(Kind::Double).double_value(&[]).sqrt()
}

/// Norm of a difference, in fp64.
pub fn distance(a: &Tensor, b: &Tensor) -> f64 {
    norm(&(a.to_kind(Kind::Double) - b.to_kind(Kind::Double)))
}

/// Largest absolute difference.
pub fn largest_difference(a: &Tensor, b: &Tensor) -> f64 {
    (a.to_kind(Kind::Double) - b.to_kind(Kind::Double)).abs().max().double_value(&[])
}
