//! PEFT's arguments to the `adapter` section.

use super::{Original, TRAIN_PY};
use crate::convert::job::Job;
use crate::convert::note::{Faults, Notes};
use crate::convert::settings::At;

pub(super) fn map(original: &mut Original, job: &mut Job, notes: &mut Notes, faults: &mut Faults) {
    let script = &mut original.script;
    let (four, eight) = (script.switch("--use_4bit_qunatization"), script.switch("--use_8bit_qunatization"));
    let lora = script.switch("--use_peft_lora");
    if !lora.value {
        for quantized in [&four, &eight].into_iter().filter(|at| at.value) {
            let rule = "needs --use_peft_lora: quantised weights cannot be trained";
            faults.report(&quantized.place, format!("{} {rule}", quantized.written));
        }
        return;
    }
    original.adapter = Some(lora.clone());
    let script = &mut original.script;
    if four.value && eight.value {
        let message = "--use_4bit_qunatization and --use_8bit_qunatization contradict each other: keep one";
        faults.report(&four.place, message);
    }
    let rank = script.take::<u64>("--lora_r");
    let alpha = script.take::<u64>("--lora_alpha");
    let targets = script.take::<String>("--lora_target_modules");
    for (name, absent) in [
        ("--lora_r", rank.is_none()),
        ("--lora_alpha", alpha.is_none()),
        ("--lora_target_modules", targets.is_none()),
    ] {
        if absent {
            faults
                .report(&lora.place, format!("--use_peft_lora needs {name}: train.py's default is refused"));
        }
    }
    if let Some(rank) = rank {
        job.set("adapter.rank", &rank);
    }
    if let Some(alpha) = alpha {
        job.set("adapter.alpha", &alpha);
    }
    job.set_number("adapter.dropout", &script.take_or("--lora_dropout", TRAIN_PY, 0.0));
    if let Some(targets) = targets {
        // train.py splits the text at its commas; names that end alike are one list here too.
        job.set_text("adapter.target_modules", &targets);
    }
    if four.value {
        let kind = script.take_or("--bnb_4bit_quant_type", TRAIN_PY, "nf4");
        job.set_from("adapter.quantize", kind.value, &format!("{}, {}", four.written, kind.written));
        job.set("adapter.double_quantize", &script.switch("--use_nested_quant"));
        compute_dtype(script.take_or("--bnb_4bit_compute_dtype", TRAIN_PY, "float16"), notes);
    } else if eight.value {
        job.set_from("adapter.quantize", "int8", &eight.written);
        notes.differs(
            &eight.place,
            &eight.written,
            "a scale per row, and no outliers kept apart: dequantised weights are multiplied, and are exact both ways",
        );
    } else {
        job.set_from("adapter.quantize", "none", "no --use_4bit_qunatization");
    }
}

/// Dequantised weights have the dtype of the computation, which `train.precision` says.
fn compute_dtype(dtype: At<&'static str>, notes: &mut Notes) {
    match dtype.value {
        "bfloat16" => {
            notes.ignored(&dtype.place, &dtype.written, "weights are dequantised into train.precision")
        }
        _ => notes.differs(&dtype.place, &dtype.written, "weights are dequantised into train.precision"),
    }
}
