//! What is trained on what: name, output, dataset, model and batches.

use super::{Original, TRAIN_PY};
use crate::convert::job::{Job, quoted};
use crate::convert::note::Notes;
use crate::convert::settings::At;
use crate::convert::value::{brief_text, number_text};

/// The dataset of the original, and the repositories that it was made of.
const ORIGINAL_DATASET: &str = "smangrul/hf-stack-v1";
const REPOSITORIES: [&str; 10] = [
    "transformers",
    "pytorch-image-models",
    "datasets",
    "diffusers",
    "peft",
    "tokenizers",
    "accelerate",
    "text-generation-inference",
    "chat-ui",
    "deep-rl-class",
];
/// Longest name of a job.
const LONGEST_NAME: usize = 100;

pub(super) fn map(original: &mut Original, job: &mut Job, notes: &mut Notes) {
    if !original.has_script {
        let stem = original.out.file_stem().unwrap_or_default().to_string_lossy();
        job.set_from("name", quoted(&name(&stem)), "this file");
        job.comment("", "The settings name no dataset and no model: name yours.");
        job.set_from("dataset", "dataset", "a directory that coordinator collect wrote");
        job.set_from("model.path", "model", "a directory with config.json and safetensors files");
        return;
    }
    let script = &mut original.script;
    let output = script.take_or("--output_dir", TRAIN_PY, "./checkpoints".to_owned());
    job.set_text("name", &At { value: name(&output.value), ..output.clone() });
    job.set_text("output", &output);
    dataset(original, job);
    model(original, job);
    data(original, job, notes);
}

/// The last part of a path, as the name of a job.
fn name(output: &str) -> String {
    let last = output.trim_end_matches('/').rsplit('/').next().unwrap_or_default();
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    let name: String = last.chars().map(|c| if allowed(c) { c } else { '-' }).take(LONGEST_NAME).collect();
    let name = name.trim_start_matches(['-', '_', '.']);
    if name.is_empty() { "job".to_owned() } else { name.to_owned() }
}

fn dataset(original: &mut Original, job: &mut Job) {
    let script = &mut original.script;
    let dataset = script.take_or("--dataset_name", TRAIN_PY, ORIGINAL_DATASET.to_owned());
    let fraction = script.take_or("--test_size", TRAIN_PY, 0.005);
    let is_original = dataset.value == ORIGINAL_DATASET;
    job.set_from("dataset", "dataset", &format!("{}; coordinator collect writes it", dataset.written));
    let name = brief_text(&dataset.value);
    match is_original {
        true => job
            .comment("", &format!("{name} holds these repositories. To collect them here, as they are now,")),
        false => job.comment("", &format!("To collect repositories in the place of {name},")),
    }
    job.comment("", "write this in the place of dataset:");
    job.comment("", "collect:");
    job.comment("", "  sources:");
    match is_original {
        true => {
            for repository in REPOSITORIES {
                job.comment("", &format!("    - https://github.com/huggingface/{repository}"));
            }
        }
        false => job.comment("", "    - path/to/repository"),
    }
    let fraction_text = number_text(fraction.value);
    job.comment("", &format!("  validation_fraction: {fraction_text}  # {}", fraction.written));
}

fn model(original: &mut Original, job: &mut Job) {
    let model = original.script.take_or("--model_path", TRAIN_PY, "bigcode/starcoderplus".to_owned());
    // A name on the hub has an owner and no more parts, a few old ones none; all else is taken for a path.
    let owner = model.value.split_once('/').filter(|(_, name)| !name.is_empty() && !name.contains('/'));
    match owner.map(|(owner, _)| owner) {
        Some(owner) if !owner.is_empty() && !owner.starts_with('.') => job.set_text("model.hub", &model),
        None if !model.value.contains('/') => {
            let name = brief_text(&model.value);
            job.comment("model", &format!("Download {name} into this directory first."));
            job.set_text("model.path", &model);
        }
        _ => job.set_text("model.path", &model),
    }
}

fn data(original: &mut Original, job: &mut Job, notes: &mut Notes) {
    let script = &mut original.script;
    job.set("data.sequence_tokens", &script.take_or("--seq_length", TRAIN_PY, 8192u64));
    job.set_number("data.fim_rate", &script.take_or("--fim_rate", TRAIN_PY, 0.0));
    job.set_number("data.fim_spm_rate", &script.take_or("--fim_spm_rate", TRAIN_PY, 0.0));
    job.comment(
        "data",
        "The buffers of train.py, token for token. What suits new jobs better is fim_level: window",
    );
    job.comment("data", "with packing: continuous, which cuts no infill apart and drops nothing.");
    job.set_from("data.fim_level", "document", TRAIN_PY);
    job.set_from("data.packing", "seed_compatible", TRAIN_PY);
    let seed = script.take_or("--seed", TRAIN_PY, 0u64);
    job.set("data.seed", &seed);
    job.comment("", &format!("  split_seed: {}  # {}", seed.value, seed.written));
    if seed.value != 42 {
        notes.differs(
            &seed.place,
            "data.seed",
            "it shuffles the sequences of a buffer as well as rearranging documents; the original shuffled by \
             TrainingArguments' 42: the same sequences in another order",
        );
    }
    if let Some(split) = script.take::<String>("--split") {
        match split.value == "train" {
            true => notes.ignored(&split.place, &split.written, "files that are not held out are trained on"),
            false => notes.differs(
                &split.place,
                &split.written,
                "a dataset has no splits by name: collect the files of this one alone",
            ),
        }
    }
    if let Some(column) = script.take::<String>("--data_column") {
        match column.value == "content" {
            true => notes.ignored(&column.place, &column.written, "text is always in the column content"),
            false => {
                notes.differs(
                    &column.place,
                    &column.written,
                    "text is in the column content: collect writes it there",
                );
            }
        }
    }
    let streaming = script.switch("--streaming");
    if streaming.value {
        notes.differs(
            &streaming.place,
            &streaming.written,
            "the files held out are collect.validation_fraction of all, and not the first --size_valid_set; training \
             takes the files in their order, and not through a --shuffle_buffer",
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_output_directory_gives_a_name_that_a_job_may_have() {
        for (output, expected) in [
            ("./checkpoints", "checkpoints"),
            ("/a/b c/", "b-c"),
            ("..", "job"),
            ("", "job"),
            ("peft-lora-starcoder15B-v2", "peft-lora-starcoder15B-v2"),
        ] {
            assert_eq!(name(output), expected);
        }
        assert_eq!(name(&"x".repeat(200)).len(), LONGEST_NAME);
    }
}
