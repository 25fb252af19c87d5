//! What happens while it trains, and after: recomputation, progress, evaluations, checkpoints, export.

use super::launcher::{Launcher, Means};
use super::{Original, TRAIN_PY, TRAINER};
use crate::convert::job::Job;
use crate::convert::note::Notes;
use crate::convert::settings::At;

/// Most checkpoints that are kept.
const MOST_KEPT: u64 = 1000;
/// Most sequences of an evaluation: more than any dataset holds out.
const ALL_HELD_OUT: u64 = 1 << 20;

pub(super) fn map(
    original: &mut Original,
    launcher: &Launcher,
    steps: Option<u64>,
    job: &mut Job,
    notes: &mut Notes,
) {
    recompute(original, job);
    if !original.has_script {
        return;
    }
    job.set("train.seed", &At::default_of(TRAINER, 42));
    let script = &mut original.script;
    job.set("train.log_every_steps", &script.take_or("--log_freq", TRAIN_PY, 1u64));
    job.set("train.eval_every_steps", &script.take_or("--eval_freq", TRAIN_PY, 1000u64));
    job.set_from("train.eval_sequences", ALL_HELD_OUT, "all that are held out");
    let save = script.take_or("--save_freq", TRAIN_PY, 1000u64);
    job.set("train.checkpoint_every_steps", &save);
    let kept = steps.unwrap_or(1).div_ceil(save.value.max(1)).clamp(1, MOST_KEPT);
    job.set_from("train.keep_checkpoints", kept, "all: TrainingArguments has no save_total_limit by default");
    if let (true, Some(at)) = (launcher.means == Means::Zero, &original.adapter) {
        let text = "checkpoints are saved; the original saves none of an adapter with DeepSpeed";
        notes.differs(&at.place, &at.written, text);
    }
    if original.adapter.is_none() {
        job.set_from("export.dtype", "bf16", "shard_checkpoint.py, of models above 10 GB");
    }
    let push = original.script.switch("--push_to_hub");
    for at in [push, original.adapter.take().unwrap_or_else(|| At::default_of(TRAIN_PY, false))] {
        if at.value {
            let text =
                "what is exported stays in the job's output directory; the original pushes it to the Hub";
            notes.differs(&at.place, &at.written, text);
        }
    }
}

/// Either train.py or FSDP turned it on.
fn recompute(original: &mut Original, job: &mut Job) {
    let fsdp = original.config.take::<bool>("fsdp_config.fsdp_activation_checkpointing");
    let own = original.has_script.then(|| {
        let off = original.script.switch("--no_gradient_checkpointing");
        off.map(|off| !off)
    });
    let on = [&own, &fsdp].into_iter().flatten().find(|at| at.value);
    match (on, own.as_ref().or(fsdp.as_ref())) {
        (Some(on), _) => job.set_from("train.recompute", "all", &on.written),
        (None, Some(off)) => job.set_from("train.recompute", "none", &off.written),
        (None, None) => {}
    }
}
