//! From the original's settings to the keys of a job file.

mod source;
mod adapter;
mod launcher;
mod sharding;
mod precision;
mod schedule;
mod run;

use std::path::PathBuf;

use launcher::{Launcher, Means};

use super::job::Job;
use super::note::{Faults, Notes};
use super::settings::{At, Settings};

/// Whose default a value is, in comments.
const TRAIN_PY: &str = "train.py";
const TRAINER: &str = "TrainingArguments";

/// What was given.
#[derive(Debug, Default)]
pub struct Original {
    /// The job file that will be.
    pub out: PathBuf,
    /// An accelerate config, with what `accelerate launch` was told over it.
    pub config: Settings,
    /// Whether there is an accelerate config, or a launcher that was told something.
    pub has_config: bool,
    /// Whether `accelerate launch` was called without a config, and so decided for itself.
    pub launched_bare: bool,
    /// Other arguments of `accelerate launch`.
    pub launch: Settings,
    /// A DeepSpeed config.
    pub deepspeed: Settings,
    /// Whether there is one.
    pub has_deepspeed: bool,
    /// The arguments of train.py.
    pub script: Settings,
    /// Whether they were given, if only by none.
    pub has_script: bool,
    /// What made an adapter of it, once that was found.
    pub adapter: Option<At<bool>>,
}

/// The job file's values; what is left out, differs or is contradictory is in `notes`.
pub fn map(mut original: Original, notes: &mut Notes, faults: &mut Faults) -> Job {
    let mut job = Job::default();
    source::map(&mut original, &mut job, notes);
    adapter::map(&mut original, &mut job, notes, faults);
    let launcher = launcher::map(&mut original, &mut job, notes, faults);
    let unread = unread(&mut original, &launcher);
    sharding::map(&mut original, &launcher, &mut job, notes, faults);
    precision::map(&mut original, &launcher, &mut job, notes);
    let steps = schedule::map(&mut original, &launcher, &mut job, notes, faults);
    run::map(&mut original, &launcher, steps, &mut job, notes);
    let rest = [original.config, original.launch, original.deepspeed, original.script];
    rest.into_iter().chain(unread).for_each(|rest| rest.tell_rest(notes));
    job
}

/// Settings of means that were not used: accelerate reads the sections of its `distributed_type` alone.
fn unread(original: &mut Original, launcher: &Launcher) -> Vec<Settings> {
    let mut unread = Vec::new();
    if launcher.means != Means::Fsdp {
        unread.extend(
            ["fsdp_config.", "parallelism_config."].map(|section| original.config.set_aside(section)),
        );
    }
    if launcher.means != Means::Zero {
        unread.push(original.config.set_aside("deepspeed_config."));
        unread.push(std::mem::take(&mut original.deepspeed));
    }
    unread
}

/// The first that is given; another that says something else is told.
fn settle<T: PartialEq>(first: Option<At<T>>, second: Option<At<T>>, notes: &mut Notes) -> Option<At<T>> {
    match (first, second) {
        (Some(first), Some(second)) => {
            if first.value != second.value {
                let used = format!("{first} says otherwise, and is used");
                notes.contradiction(&second.place, &second.written, &used);
            }
            Some(first)
        }
        (first, second) => first.or(second),
    }
}
