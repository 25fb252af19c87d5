//! How batches become weights: steps, micro-batches, learning rate and optimizer.

use super::launcher::Launcher;
use super::{Original, TRAIN_PY, TRAINER, settle};
use crate::convert::job::Job;
use crate::convert::note::{Faults, Notes};
use crate::convert::settings::{At, FromScalar, Settings};
use crate::convert::value::number_text;

/// Returns how many steps there are, where that is said.
pub(super) fn map(
    original: &mut Original,
    launcher: &Launcher,
    job: &mut Job,
    notes: &mut Notes,
    faults: &mut Faults,
) -> Option<u64> {
    let steps = own(original, "--max_steps", 10_000);
    let steps = settle(steps, original.deepspeed.take("scheduler.params.total_num_steps"), notes);
    let count = steps.as_ref().map(|steps| steps.value);
    set(job, "train.steps", steps);
    batches(original, launcher, job, notes);
    rates(original, job, notes);
    optimizer(original, job, notes, faults);
    count
}

/// An argument of train.py, or its default; nothing where there is no train.py.
fn own<T: FromScalar>(original: &mut Original, name: &str, default: T) -> Option<At<T>> {
    original.has_script.then(|| original.script.take_or(name, TRAIN_PY, default))
}

/// What TrainingArguments has where train.py does not set it.
fn trainer<T>(original: &Original, default: T) -> Option<At<T>> {
    original.has_script.then(|| At::default_of(TRAINER, default))
}

fn set(job: &mut Job, key: &'static str, at: Option<At<u64>>) {
    if let Some(at) = at {
        job.set(key, &at);
    }
}

fn set_number(job: &mut Job, key: &'static str, at: Option<At<f64>>) {
    if let Some(at) = at {
        job.set_number(key, &at);
    }
}

fn batches(original: &mut Original, launcher: &Launcher, job: &mut Job, notes: &mut Notes) {
    let sequences = own(original, "--batch_size", 2);
    let accumulate = own(original, "--gradient_accumulation_steps", 8);
    let Original { config, deepspeed, .. } = original;
    let sequences = settle(sequences, deepspeed.take("train_micro_batch_size_per_gpu"), notes);
    let accumulate = settle(accumulate, deepspeed.take("gradient_accumulation_steps"), notes);
    let accumulate = settle(accumulate, config.take("deepspeed_config.gradient_accumulation_steps"), notes);
    let rounds = launcher.ranks * accumulate.as_ref().map_or(1, |at| at.value);
    let sequences = match (sequences, deepspeed.take::<u64>("train_batch_size")) {
        (Some(sequences), Some(all)) => {
            let product = rounds * sequences.value;
            if product != all.value {
                let text = format!("ranks, micro-batches and their sequences make {product}, and are used");
                notes.contradiction(&all.place, &all.written, &text);
            }
            Some(sequences)
        }
        (None, Some(all)) => Some(all.map(|all| (all / rounds).clamp(1, 65_536))),
        (sequences, None) => sequences,
    };
    set(job, "train.micro_batch_sequences", sequences);
    set(job, "train.accumulate_micro_batches", accumulate);
}

fn rates(original: &mut Original, job: &mut Job, notes: &mut Notes) {
    let rate = own(original, "--learning_rate", 5e-5);
    let rate = settle(rate, original.deepspeed.take("optimizer.params.lr"), notes);
    let rate = settle(rate, original.deepspeed.take("scheduler.params.warmup_max_lr"), notes);
    let warmup = own(original, "--num_warmup_steps", 100);
    let warmup = settle(warmup, original.deepspeed.take("scheduler.params.warmup_num_steps"), notes);
    let named = own(original, "--lr_scheduler_type", "cosine");
    let schedule = replaced(named, &mut original.deepspeed, notes);
    set_number(job, "train.learning_rate", rate);
    let warmup = match schedule {
        Some(schedule) => of_schedule(&schedule, warmup, job, notes),
        None => warmup,
    };
    set(job, "train.warmup_steps", warmup);
}

/// DeepSpeed's scheduler runs in the place of the one that train.py names, under names of its own.
fn replaced(
    named: Option<At<&'static str>>,
    deepspeed: &mut Settings,
    notes: &mut Notes,
) -> Option<At<&'static str>> {
    let Some(scheduler) = deepspeed.take::<&'static str>("scheduler.type") else { return named };
    let scheduler = scheduler.map(|scheduler| match scheduler {
        "WarmupLR" => "constant_with_warmup",
        "WarmupDecayLR" => "linear",
        _ => "cosine",
    });
    settle(Some(scheduler), named, notes)
}

/// Sets the schedule, and returns the warm-up that it has.
fn of_schedule(
    schedule: &At<&'static str>,
    warmup: Option<At<u64>>,
    job: &mut Job,
    notes: &mut Notes,
) -> Option<At<u64>> {
    let word = match schedule.value {
        "cosine_with_restarts" => "cosine",
        "constant_with_warmup" => "constant",
        word => word,
    };
    job.set_from("train.schedule", word, &schedule.written);
    if word == "polynomial" {
        job.set_from("train.schedule_power", number_text(1.0), "transformers");
        job.set_from("train.final_learning_rate", number_text(1e-7), "transformers");
    }
    if schedule.value != "constant" {
        return warmup;
    }
    if let Some(warmup) = warmup.filter(|warmup| !warmup.place.is_empty()) {
        let text = format!("{} has no warm-up", schedule.written);
        notes.ignored(&warmup.place, &warmup.written, &text);
    }
    Some(At { value: 0, place: String::new(), written: format!("{} has none", schedule.written) })
}

fn optimizer(original: &mut Original, job: &mut Job, notes: &mut Notes, faults: &mut Faults) {
    if let Some(kind) = original.deepspeed.take::<String>("optimizer.type") {
        match kind.value.to_ascii_lowercase().as_str() {
            "adam" | "adamw" => job.set_from("train.optimizer", "adamw", &kind.written),
            _ => {
                let rule = "optimizer.type: expected Adam or AdamW; there is no other optimizer";
                faults.report(&kind.place, format!("{rule}, got {:?}", kind.value));
            }
        }
    } else if let Some(kind) = trainer(original, "adamw") {
        job.set("train.optimizer", &kind);
    }
    let decay = own(original, "--weight_decay", 0.05);
    set_number(
        job,
        "train.weight_decay",
        settle(decay, original.deepspeed.take("optimizer.params.weight_decay"), notes),
    );
    let betas =
        settle(trainer(original, (0.9, 0.999)), original.deepspeed.take("optimizer.params.betas"), notes);
    if let Some(At { value: (first, second), written, .. }) = betas {
        job.set_from("train.betas", format!("[{}, {}]", number_text(first), number_text(second)), &written);
    }
    let epsilon = settle(trainer(original, 1e-8), original.deepspeed.take("optimizer.params.eps"), notes);
    set_number(job, "train.epsilon", epsilon);
    let clip = settle(trainer(original, 1.0), original.deepspeed.take("gradient_clipping"), notes);
    let clip = settle(clip, original.config.take("deepspeed_config.gradient_clipping"), notes);
    set_number(job, "train.max_grad_norm", clip);
}
