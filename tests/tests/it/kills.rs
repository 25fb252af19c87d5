//! Processes that die, and what `launch --resume` makes of it.

use std::collections::HashMap;
use std::path::Path;
use std::process::Command;

use nix::sys::signal::Signal;
use tunefleet_tests::job::Job;
use tunefleet_tests::process::Running;
use tunefleet_tests::{repository, skip};

const STEPS: u64 = 60;
const CHECKPOINT_EVERY: u64 = 10;

fn job() -> Job {
    Job::builder().steps(STEPS).checkpoint_every(CHECKPOINT_EVERY).train("dropout: 0.1").build()
}

/// Starts the job and returns once `step` steps are logged.
fn until_step(job: &Job, arguments: &[&str], step: u64) -> Running {
    let mut launch = job.launch(arguments);
    launch.wait_until(&format!("step {step}"), || job.metrics().last_step() >= step);
    launch
}

/// As [`until_step`], and a checkpoint is there: it is written while training goes on.
fn until_saved(job: &Job, step: u64) -> Running {
    let mut launch = until_step(job, &[], step);
    launch.wait_until("a checkpoint", || !job.metrics().saved_steps().is_empty());
    launch
}

/// The job's losses, which must be those of a run that nothing disturbed.
fn assert_as_if_undisturbed(job: &Job) {
    let twin = job.twin();
    twin.run(&[]).expect(0);
    let (disturbed, undisturbed) = (job.metrics().losses(), twin.metrics().losses());
    assert_eq!(undisturbed.len() as u64, STEPS);
    assert_eq!(disturbed, undisturbed);
}

#[test]
fn after_a_killed_rank_and_a_resume_the_losses_are_those_of_an_undisturbed_run() {
    let job = job();
    let launch = until_saved(&job, CHECKPOINT_EVERY + 5);
    let ranks = launch.ranks();
    assert_eq!(ranks.len(), 2, "{ranks:?}");
    ranks[1].kill();
    launch.wait().expect(1).says(&["SIGKILL", "--resume"]);
    assert!(job.metrics().last_step() < STEPS, "it had ended before the kill");

    job.run(&["--resume"]).expect(0);
    assert_as_if_undisturbed(&job);
}

#[test]
fn after_everything_was_killed_twice_the_losses_are_those_of_an_undisturbed_run() {
    let job = job();
    until_saved(&job, CHECKPOINT_EVERY + 5).kill_everything();
    assert!(job.metrics().last_step() < STEPS, "it had ended before the kill");
    let mut second = until_step(&job, &["--resume"], 2 * CHECKPOINT_EVERY + 5);
    second.wait_until("its first step", || job.metrics().attempts() == 2);
    second.kill_everything();
    assert!(job.metrics().last_step() < STEPS, "it had ended before the second kill");

    job.run(&["--resume"]).expect(0);
    assert_as_if_undisturbed(&job);
    assert_eq!(job.metrics().attempts(), 3);
    assert_tensorboard_shows_each_step_once(&job);
}

/// TensorBoard forgets what an attempt logged and a later one did again.
fn assert_tensorboard_shows_each_step_once(job: &Job) {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let python = root.join(".venv/bin/python");
    if !python.exists() {
        return skip("event files are read by TensorBoard, which `make setup-tests` installs");
    }
    let mut command = Command::new(python);
    command.arg(root.join("tests/parity/read_event_files.py")).arg(job.output().join("tensorboard"));
    let output = command.output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let found: HashMap<String, Vec<(u64, f64)>> = serde_json::from_slice(&output.stdout).unwrap();
    let losses = job.metrics().losses().into_iter().map(|(step, bits)| (step, f64::from_bits(bits) as f32));
    let shown = found["train/loss"].iter().map(|(step, loss)| (*step, *loss as f32));
    assert_eq!(shown.collect::<Vec<_>>(), losses.collect::<Vec<_>>());
    assert!(found.contains_key("train/learning_rate") && found.contains_key("checkpoint/pause_seconds"));
}

#[test]
fn ctrl_c_saves_a_checkpoint_and_leaves_nothing_running() {
    let job = job();
    let launch = until_step(&job, &[], 5);
    launch.signal(Signal::SIGINT);
    // It would not return while a descendant holds its output.
    launch.wait().expect(130).says(&["--resume"]);
    let stopped_at = job.metrics().last_step();
    assert!((5..STEPS).contains(&stopped_at), "stopped at step {stopped_at}");
    assert_eq!(job.checkpoints().last(), Some(&stopped_at), "a checkpoint of the last step must exist");

    job.run(&["--resume"]).expect(0);
    assert_as_if_undisturbed(&job);
}

#[test]
fn new_commits_do_not_reach_what_unfinished_checkpoints_were_trained_on() {
    let job = job();
    let launch = until_step(&job, &[], 5);
    launch.signal(Signal::SIGTERM);
    launch.wait().expect(143).says(&["--resume"]);
    repository::commit_more(&job.dir().join("repos/first"), "src/new.py", "new = 1\n");
    let dataset = || std::fs::read(job.output().join("dataset/manifest.json")).unwrap();
    let before = dataset();

    job.run(&[]).expect(1).says(&["--resume", "--fresh"]);
    assert!(dataset() == before, "the dataset of the checkpoints is gone");
    let other = ["--resume", "--set", "collect.max_file_bytes=1000"];
    job.run(&other).expect(1).says(&["another model, dataset, tokenizer or training settings"]);
    // Pinned to the commits that it began with; the twin's repositories have no others.
    job.run(&["--resume"]).expect(0).says(&["collect: cached"]);
    assert_as_if_undisturbed(&job);
}

/// Minutes: CI runs a sample.
mod long {
    use super::*;

    /// Kills everything at a moment of the run that `seed` decides, again and again, until it is through.
    fn killed_at_random(seed: u64) {
        let job = job();
        let mut random = seed;
        let mut kills = 0;
        loop {
            let resume: &[&str] = if job.checkpoints().is_empty() { &["--fresh"] } else { &["--resume"] };
            let mut launch = job.launch(resume);
            // SplitMix64 of the seed; up to 2.5 s, about the length of a run, and longer on a slower machine.
            random = random.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mixed = (random ^ (random >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            let patience = std::time::Duration::from_millis(300 + mixed % (2200 + 200 * kills));
            if launch.ends_within(patience) {
                launch.wait().expect(0);
                break;
            }
            launch.kill_everything();
            kills += 1;
            assert!(kills < 60, "seed {seed}: it never ends");
        }
        eprintln!("seed {seed}: {kills} kills");
        assert_as_if_undisturbed(&job);
    }

    #[test]
    fn kills_at_any_moment_change_no_loss() {
        let sample = std::env::var("TUNEFLEET_LONG_SAMPLE").is_ok_and(|sample| !sample.is_empty());
        for seed in 0..if sample { 2 } else { 25 } {
            killed_at_random(seed);
        }
    }
}
