//! In which dtype is computed, and in which gradients travel.

use super::launcher::{Launcher, Means};
use super::{Original, settle};
use crate::convert::job::Job;
use crate::convert::note::Notes;
use crate::convert::settings::At;

const INSTEAD_OF_FP16: &str = "bf16, which has the range of fp32, so no loss is scaled";

pub(super) fn map(original: &mut Original, launcher: &Launcher, job: &mut Job, notes: &mut Notes) {
    let outside = outside(original, notes);
    let precision = if original.has_script { of_script(original, outside, notes) } else { outside };
    let Some(precision) = precision else { return };
    let written = precision.written.clone();
    let word = match precision.value {
        "no" => "fp32",
        "bf16" => "bf16",
        _ => {
            notes.differs(&precision.place, &precision.written, INSTEAD_OF_FP16);
            "bf16"
        }
    };
    job.set_from("train.precision", word, &written);
    reductions(original, launcher, word, job, notes);
}

/// What accelerate and DeepSpeed say, in accelerate's words.
fn outside(original: &mut Original, notes: &mut Notes) -> Option<At<&'static str>> {
    let config = &mut original.config;
    let older = config.take::<bool>("fp16").map(|older| older.map(|older| if older { "fp16" } else { "no" }));
    let said = settle(config.take::<&'static str>("mixed_precision"), older, notes);
    let deepspeed = &mut original.deepspeed;
    let mut enabled = |name, word: &'static str| {
        let at = deepspeed.take::<bool>(name)?;
        Some(at.map(|enabled| if enabled { word } else { "no" }))
    };
    let both = [
        enabled("bf16.enabled", "bf16"),
        enabled("bfloat16.enabled", "bf16"),
        enabled("fp16.enabled", "fp16"),
    ];
    // A dtype that is turned off says nothing of the others.
    let (on, off): (Vec<_>, Vec<_>) = both.into_iter().flatten().partition(|at| at.value != "no");
    let on = on.into_iter().fold(None, |first, next| settle(first, Some(next), notes));
    match settle(on, said, notes) {
        None if !original.has_config => off.into_iter().next(),
        said => {
            for at in off {
                notes.ignored(&at.place, &at.written, "what is turned off says nothing of other dtypes");
            }
            said.or_else(|| Some(At::default_of("accelerate", "no")).filter(|_| original.has_config))
        }
    }
}

/// train.py says it in two arguments, and comes before what is said outside.
fn of_script(
    original: &mut Original,
    outside: Option<At<&'static str>>,
    notes: &mut Notes,
) -> Option<At<&'static str>> {
    let (bf16, no_fp16) = (original.script.switch("--bf16"), original.script.switch("--no_fp16"));
    let place = if bf16.value { &bf16.place } else { &no_fp16.place };
    let at = |value, written: String| At { value, place: place.clone(), written };
    let own = match (bf16.value, no_fp16.value) {
        (true, true) => at("bf16", "--bf16 --no_fp16".to_owned()),
        (true, false) => {
            let text =
                "without --no_fp16 the original has fp16 on as well, and refuses to start; bf16 is used";
            notes.contradiction(&bf16.place, &bf16.written, text);
            at("bf16", bf16.written.clone())
        }
        (false, false) => at("fp16", "no --no_fp16".to_owned()),
        (false, true) => return Some(outside.unwrap_or_else(|| at("no", no_fp16.written.clone()))),
    };
    let outside = outside.filter(|outside| !outside.place.is_empty());
    settle(Some(own), outside, notes)
}

/// FSDP and DeepSpeed send gradients in the dtype of the computation; replicas, in that of the weights.
fn reductions(
    original: &mut Original,
    launcher: &Launcher,
    computed: &'static str,
    job: &mut Job,
    notes: &mut Notes,
) {
    if launcher.ranks == 1 {
        return;
    }
    let said = original.deepspeed.take::<&'static str>("communication_data_type");
    match (launcher.means, said) {
        (Means::Zero, Some(said)) => {
            if said.value == "fp16" {
                notes.differs(&said.place, &said.written, "bf16, which has the range of fp32");
            }
            job.set("train.reduce_precision", &said.map(|said| if said == "fp32" { "fp32" } else { "bf16" }));
        }
        (Means::Zero | Means::Fsdp, _) => {
            let from = "as the original reduces; fp32 is more exact, for twice the traffic";
            let from = if computed == "bf16" { from } else { "as the original reduces" };
            job.set_from("train.reduce_precision", computed, from);
        }
        _ => {}
    }
}
