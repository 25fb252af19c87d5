//! Checkpoints: saved while training goes on, resumed on other numbers of ranks, killed while written.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use crate::common::*;
use crate::engine::{model, on_mesh, train_range, train_spec};
use tch::{Device, Tensor};
use tunefleet_proto::checkpoint::{self as proto, Validation};
use tunefleet_proto::job::{Offload, Optimizer, Precision, TrainSpec};
use tunefleet_proto::model::Dropout;
use tunefleet_proto::shard_plan::ShardPlan;
use tunefleet_worker::checkpoint::{hugging_face, load, retain, save, verb};
use tunefleet_worker::model::numerics::Numerics;
use tunefleet_worker::train::units;
use tunefleet_worker::train::walk::{Walk, WalkOptions};

/// Sequences of a step, on any number of ranks.
const STEP_SEQUENCES: u32 = 8;

fn spec(ranks: u32, keys: &str) -> TrainSpec {
    train_spec(&format!(
        "ranks: {ranks}, device: cpu, precision: fp32, micro_batch_sequences: {}, \
         accumulate_micro_batches: 1, learning_rate: 1e-3, schedule: constant, warmup_steps: 0, seed: 3{keys}",
        STEP_SEQUENCES / ranks
    ))
}

/// Losses of the steps in `range`, from the checkpoint before them (or the model), with one behind them.
fn go_on(model: &Path, dir: &Path, spec: &TrainSpec, range: std::ops::RangeInclusive<u64>) -> Vec<f64> {
    let losses = on_mesh(spec.ranks, spec.shard_ranks, |mesh| {
        let mut walk = walk(model, Precision::Fp32, mesh, WalkOptions::of(spec), |config| {
            let p = spec.dropout.unwrap_or(0.0);
            config.dropout = Dropout { attention: 0.0, embedding: p, residual: p };
        });
        if *range.start() > 1 {
            let from = dir.join(proto::dir_name(range.start() - 1));
            let manifest = load::verify(&from).unwrap();
            load::load(&from, &manifest, walk.plan(), mesh.shards.rank().rank, walk.shards()).unwrap();
            walk.invalidate();
        }
        let losses = train_range(&mut walk, spec, range.clone());
        let mut saver = saver(dir, 100);
        saver.start(walk.plan(), walk.shards(), state(*range.end()), mesh, Device::Cpu).unwrap();
        saver.finish(mesh, Device::Cpu, *range.end()).unwrap();
        losses
    });
    losses.into_iter().next().unwrap()
}

fn assert_near(a: &[f64], b: &[f64], what: &str) {
    assert_eq!(a.len(), b.len());
    for (step, (a, b)) in a.iter().zip(b).enumerate() {
        assert!((a - b).abs() <= 1e-6 * a.abs(), "{what}: {step} steps on: {a} and {b}");
    }
}

#[test]
fn what_four_ranks_saved_goes_on_with_any_number_of_ranks_and_any_strategy() {
    let (dir, model) = model();
    let undisturbed = go_on(&model, &dir.path().join("whole"), &spec(4, ""), 1..=12);
    let checkpoints = dir.path().join("parts");
    let begun = go_on(&model, &checkpoints, &spec(4, ""), 1..=6);
    assert_eq!(begun, undisturbed[..6]);
    assert_eq!(go_on(&model, &checkpoints, &spec(4, ""), 7..=12), undisturbed[6..], "as many ranks");
    for (ranks, keys) in [
        (1, ""),
        (2, ""),
        (8, ""),
        (2, ", strategy: no_shard"),
        (4, ", strategy: hybrid_shard, shard_ranks: 2"),
        (4, ", strategy: shard_grad_op, recompute: none"),
    ] {
        let resumed = go_on(&model, &checkpoints, &spec(ranks, keys), 7..=12);
        assert_near(&undisturbed[6..], &resumed, &format!("{ranks} ranks{keys}"));
    }
}

#[test]
fn two_resumes_in_a_row_change_no_loss() {
    let (dir, model) = model();
    let of = spec(2, ", strategy: hybrid_shard, shard_ranks: 1");
    let undisturbed = go_on(&model, &dir.path().join("whole"), &of, 1..=9);
    let checkpoints = dir.path().join("parts");
    let mut parts = Vec::new();
    for range in [1..=3, 4..=5, 6..=9] {
        parts.extend(go_on(&model, &checkpoints, &of, range));
    }
    assert_eq!(parts, undisturbed);
}

#[test]
fn a_resume_draws_the_dropout_of_an_undisturbed_run() {
    let (dir, model) = model();
    // One rank: the embeddings' dropout draws from a generator that ranks in threads would share.
    let of = spec(1, ", dropout: 0.1");
    let undisturbed = go_on(&model, &dir.path().join("whole"), &of, 1..=6);
    let checkpoints = dir.path().join("parts");
    let mut parts = go_on(&model, &checkpoints, &of, 1..=4);
    parts.extend(go_on(&model, &checkpoints, &of, 5..=6));
    assert_eq!(parts, undisturbed);
    assert_ne!(parts, go_on(&model, &dir.path().join("without"), &spec(1, ""), 1..=6));
}

/// Bytes that this process has read so far, from files and sockets.
fn bytes_read() -> u64 {
    let io = std::fs::read_to_string("/proc/self/io").unwrap();
    io.lines().find_map(|line| line.strip_prefix("rchar: ")).unwrap().parse().unwrap()
}

#[test]
fn ranks_of_a_node_read_each_byte_of_a_model_once_whatever_the_strategy() {
    let (_dir, model) = model();
    let file = std::fs::metadata(model.join("model.safetensors")).unwrap().len();
    let config = hugging_face::read_config(&model).unwrap();
    for (ranks, shard_ranks) in [(1, 1), (4, 4), (4, 1), (4, 2)] {
        let before = std::sync::Mutex::new(0);
        let read = on_mesh(ranks, shard_ranks, |mesh| {
            let plan = ShardPlan::new(&config, shard_ranks);
            let numerics = Numerics::new(Device::Cpu, Precision::Fp32);
            let own = mesh.shards.rank().rank;
            let shards =
                units::shards(&plan, own, numerics, Optimizer::AdamW, Offload::None, numerics.kind).unwrap();
            mesh.world.barrier().unwrap();
            if mesh.world.rank().rank == 0 {
                *before.lock().unwrap() = bytes_read();
            }
            mesh.world.barrier().unwrap();
            hugging_face::load(&model, &plan, mesh, &shards).unwrap();
            mesh.world.barrier().unwrap();
            bytes_read()
        });
        let read = read.into_iter().max().unwrap() - *before.lock().unwrap();
        // Each copy but one gets its fp32 weights from its peers, a part from each.
        let shared = 4 * ShardPlan::new(&config, 1).shard_elements() * u64::from(ranks / shard_ranks - 1);
        let allowed = file + shared + 200_000;
        assert!(read >= file && read <= allowed, "{ranks} ranks, {shard_ranks} a copy: {read} of {allowed}");
    }
}

fn weights(walk: &Walk<'_>) -> Vec<Tensor> {
    walk.shards().iter().map(|shard| shard.master.copy()).collect()
}

#[test]
fn what_is_saved_is_the_state_of_its_step_although_training_goes_on() {
    let (dir, model) = model();
    let spec = spec(2, "");
    let checkpoints = dir.path().join("checkpoints");
    on_mesh(2, 2, |mesh| {
        let mut walk = walk(&model, Precision::Fp32, mesh, RECOMPUTE, |_| ());
        train_range(&mut walk, &spec, 1..=2);
        let mut saver = saver(&checkpoints, 5);
        saver.start(walk.plan(), walk.shards(), state(2), mesh, Device::Cpu).unwrap();
        let then = weights(&walk);
        train_range(&mut walk, &spec, 3..=5);
        assert!(!then[1].equal(&walk.shards()[1].master), "training went on");
        saver.finish(mesh, Device::Cpu, 5).unwrap().or_else(|| saver.poll().unwrap());
        let path = checkpoints.join(proto::dir_name(2));
        let manifest = load::verify(&path).unwrap();
        load::load(&path, &manifest, walk.plan(), mesh.shards.rank().rank, walk.shards()).unwrap();
        for (shard, then) in walk.shards().iter().zip(&then) {
            assert!(shard.master.equal(then));
        }
    });
}

#[test]
fn the_best_checkpoint_stays_beside_the_newest_and_is_the_result() {
    let (dir, model) = model();
    let dir = dir.path().join("checkpoints");
    let walk = walk(&model, Precision::Fp32, SOLO, RECOMPUTE, |_| ());
    let settings =
        save::Settings { dir: dir.clone(), keep: 1, keep_best: true, asynchronous: false, fence: None };
    let mut saver = save::Saver::new(settings);
    let mut found = None;
    for (step, loss) in [(1, 3.0), (2, 1.0), (3, 2.0), (4, 2.5)] {
        found = Validation::after(found, loss, 0.0);
        let state = save::State { validation: found, finished: step == 4, ..state(step) };
        saver.start(walk.plan(), walk.shards(), state, SOLO, Device::Cpu).unwrap();
        saver.finish(SOLO, Device::Cpu, step).unwrap();
        let result = retain::result(&dir, true, 9).map(|manifest| manifest.step);
        assert_eq!(result.ok(), (step == 4).then_some(2), "an unfinished training has no result");
    }
    assert_eq!(load::steps(&dir), [2, 4]);
    assert_eq!(retain::result(&dir, false, 9).unwrap().step, 4);
}

#[test]
fn the_file_of_another_checkpoint_is_named() {
    let (dir, model) = model();
    let checkpoints = dir.path().join("checkpoints");
    go_on(&model, &checkpoints, &spec(2, ""), 1..=2);
    go_on(&model, &checkpoints, &spec(2, ""), 3..=4);
    let [old, new] = [2, 4].map(|step| checkpoints.join(proto::dir_name(step)));
    let file = save::rank_file(1);
    std::fs::copy(old.join(&file), new.join(&file)).unwrap();
    let message = load::verify(&new).unwrap_err().to_string();
    assert!(message.contains(&file) && message.contains("has changed since it was written"), "{message}");
    let examined = [&old, &new].map(|dir| verb::examine(dir).map_err(|error| error.to_string()));
    assert_eq!(examined[0].as_ref().map(|manifest| manifest.step), Ok(2));
    assert_eq!(examined[1].as_ref().err(), Some(&message));
    // The older one is whole, and is what a resume would take.
    assert_eq!(load::newest_sound(&checkpoints).unwrap().manifest.step, 2);
}

#[test]
fn a_rank_that_cannot_write_fails_the_save_on_all_and_leaves_the_last_checkpoint() {
    let (dir, model) = model();
    let checkpoints = dir.path().join("checkpoints");
    go_on(&model, &checkpoints, &spec(2, ""), 1..=2);
    let errors = on_mesh(2, 2, |mesh| {
        let walk = walk(&model, Precision::Fp32, mesh, RECOMPUTE, |_| ());
        // Rank 1 goes by another path, on which nothing was prepared.
        let own =
            if mesh.world.rank().rank == 1 { dir.path().join("elsewhere") } else { checkpoints.clone() };
        let mut saver = saver(&own, 5);
        saver.start(walk.plan(), walk.shards(), state(3), mesh, Device::Cpu).unwrap();
        saver.finish(mesh, Device::Cpu, 3).unwrap_err().to_string()
    });
    assert!(errors[1].contains(&save::rank_file(1)), "{errors:?}");
    assert!(errors[0].contains("another rank"), "{errors:?}");
    assert_eq!(load::newest_sound(&checkpoints).unwrap().manifest.step, 2);
    let left = std::fs::read_dir(&checkpoints).unwrap().count();
    assert_eq!(left, 1, "what was begun is removed");
}

const CHILD: &str = "TUNEFLEET_TEST_SAVES_IN";

/// What the killing test starts: saves step after step in two ranks, and says so.
#[test]
fn saves_until_it_is_killed() {
    let Some(dir) = std::env::var_os(CHILD).map(PathBuf::from) else { return };
    let model = dir.join("model");
    let checkpoints = dir.join("checkpoints");
    on_mesh(2, 2, |mesh| {
        let walk = walk(&model, Precision::Fp32, mesh, RECOMPUTE, |_| ());
        let first = load::steps(&checkpoints).last().map_or(1, |step| step + 1);
        mesh.world.barrier().unwrap();
        let mut saver = saver(&checkpoints, 2);
        for step in first.. {
            if mesh.world.rank().rank == 0 {
                println!("begins {step}");
            }
            saver.start(walk.plan(), walk.shards(), state(step), mesh, Device::Cpu).unwrap();
            saver.finish(mesh, Device::Cpu, step).unwrap();
            if mesh.world.rank().rank == 0 {
                println!("saved {step}");
            }
        }
    });
}

/// Kills a process that does nothing but save, so many times, at moments spread over its saves.
fn kill_while_saving(times: u64) {
    let (dir, _) = model();
    let checkpoints = dir.path().join("checkpoints");
    let (mut in_the_middle, mut saved_before) = (0, 0);
    for kill in 0..times {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "checkpoints::saves_until_it_is_killed", "--nocapture", "--test-threads=1"])
            .env(CHILD, dir.path())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines().map_while(Result::ok);
        let wanted = 1 + kill % 3;
        let begun = lines.by_ref().filter(|line| line.starts_with("begins")).nth(wanted as usize - 1);
        assert!(begun.is_some(), "the child saves");
        // Into the save by a time of its own for each kill.
        std::thread::sleep(Duration::from_micros(kill * 7919 % 40_000));
        child.kill().unwrap();
        child.wait().unwrap();
        let mut last = [saved_before, saved_before];
        for line in begun.into_iter().chain(lines) {
            for (index, word) in ["begins ", "saved "].into_iter().enumerate() {
                if let Some(step) = line.split(word).nth(1).and_then(|step| step.trim().parse().ok()) {
                    last[index] = step;
                }
            }
        }
        let [begun, saved] = last;
        let sound = load::newest_sound(&checkpoints);
        if saved == 0 && sound.is_err() {
            continue;
        }
        let step = sound.unwrap().manifest.step;
        assert!((saved..=begun).contains(&step), "kill {kill}: begun {begun}, saved {saved}, found {step}");
        assert!(begun - step <= 1, "kill {kill}: more than one interval is lost");
        in_the_middle += u64::from(begun > saved);
        saved_before = step;
    }
    println!("{in_the_middle} of {times} kills were in the middle of a save");
    assert!(in_the_middle > 0, "no kill was in the middle of a save");
}

#[test]
fn a_kill_while_saving_leaves_a_sound_checkpoint() {
    kill_while_saving(6);
}

/// Takes minutes.
mod long {
    #[test]
    fn two_hundred_kills_while_saving_leave_a_sound_checkpoint_each() {
        let sample = std::env::var("TUNEFLEET_LONG_SAMPLE").is_ok_and(|sample| !sample.is_empty());
        super::kill_while_saving(if sample { 15 } else { 200 });
    }
}
