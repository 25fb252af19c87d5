//! The text of a job file: choices that fit the machine, each with its reason.

use std::path::Path;

use tunefleet_proto::job::{self, JobSpec};
use tunefleet_proto::model::{ModelConfig, PRESETS};

use crate::hardware::Hardware;
use crate::plan::{Known, Report, count, size};

/// Largest preset that random weights are worth: larger ones need more code than a team has.
const LARGEST_FRESH: &str = "starcoderbase-1b";

/// A job file that learns from `sources` on `hardware`.
pub fn job_file(sources: &[String], hardware: &Hardware) -> String {
    let choice = Choice::new(hardware);
    let sources: String = sources.iter().map(|source| format!("    - {}\n", quoted(source))).collect();
    let name = ("{name}", quoted(&name(&sources)));
    // The sources come last: whatever looks like a mark in a path stays.
    let choices = choice.marks().into_iter().chain([name, ("{sources}", sources)]);
    choices.fold(TEMPLATE.to_owned(), |text, (mark, value)| text.replace(mark, &value))
}

const TEMPLATE: &str = r##"# Job file of Tunefleet. Relative paths start at this file's directory.
# Every key with its meaning and default: coordinator validate --keys

name: {name}

# Repositories: paths, https://..., ssh://..., git@host:org/repo. The committed files are collected,
# so commit first. To pin one: - {location: ..., revision: v1.2}
collect:
  sources:
{sources}  # Share of files held out to measure what was learnt.
  validation_fraction: 0.02

model:
{model}
data:
  # {sequence_reason}
  sequence_tokens: {sequence_tokens}
  # Half of the documents are rearranged so that the model learns to fill in the middle, of which
  # half give the suffix first.
  fim_rate: 0.5
  fim_spm_rate: 0.5

train:
{train}  # A step learns from ranks x micro_batch_sequences x accumulate_micro_batches sequences. Where
  # memory is short, halve the first and double the second: the result is the same.
  micro_batch_sequences: {micro_batch_sequences}
  accumulate_micro_batches: 2
  # {steps_reason}
  steps: {steps}
  # Random weights want a large learning rate; for a trained model, 5e-5.
  learning_rate: {learning_rate}
  warmup_steps: {warmup_steps}
  log_every_steps: 10
  eval_every_steps: 50
  checkpoint_every_steps: 200

# {memory}
"##;

/// What fits the machine.
struct Choice {
    on_gpu: bool,
    preset: &'static str,
    model: String,
    train: String,
    memory: String,
}

impl Choice {
    fn new(hardware: &Hardware) -> Self {
        match hardware.gpus.len() {
            0 => Self::for_cpu(hardware),
            _ => Self::for_gpus(hardware),
        }
    }

    fn for_cpu(hardware: &Hardware) -> Self {
        let cores = hardware.cores;
        let ranks = (cores / 4).clamp(1, 4);
        let train = format!(
            "  # No NVIDIA GPU was found. Ranks of about four of the {cores} cores share the work better than one\n  \
             # with all.\n  \
             ranks: {ranks}\n  \
             device: cpu\n  \
             # Few CPUs compute in bf16; fp32 is exact, and a model this small has the memory for it.\n  \
             precision: fp32\n"
        );
        let model = "  # Random weights of about 5 million parameters: what a CPU can train while you wait. It learns\n  \
                     # the habits of your code, not programming. For a model that was trained before, write\n  \
                     #   path: /path/to/starcoderbase-1b    # config.json and safetensors files\n  \
                     # in the place of init, and run on a GPU.\n  \
                     init: {preset: demo}\n";
        Self { on_gpu: false, preset: "demo", model: model.to_owned(), train, memory: String::new() }
            .with_memory(hardware, ranks)
    }

    fn for_gpus(hardware: &Hardware) -> Self {
        let ranks = u32::try_from(hardware.gpus.len()).unwrap_or(1);
        let name = hardware.gpus.first().map_or("", |gpu| gpu.name.as_str());
        let memory = hardware.smallest_gpu_bytes().map_or_else(|| "memory unknown".to_owned(), size);
        let train = format!(
            "  # One rank for each GPU found: {ranks} x {} ({memory}).\n  \
             ranks: {ranks}\n  \
             device: cuda\n  \
             # Master weights and optimizer stay fp32.\n  \
             precision: bf16\n",
            one_line(name)
        );
        let fitting: Vec<&str> = PRESETS
            .into_iter()
            .filter(|preset| fits(preset, ranks, hardware).unwrap_or(*preset == "demo"))
            .collect();
        let fresh = PRESETS.iter().position(|preset| *preset == LARGEST_FRESH).unwrap_or_default();
        let preset =
            PRESETS[..=fresh].iter().rev().find(|preset| fitting.contains(preset)).copied().unwrap_or("demo");
        let parameters =
            |preset: &&&str| ModelConfig::preset(preset).map_or(0, |config| config.parameter_count());
        let largest = match fitting.iter().max_by_key(parameters) {
            Some(largest) => format!("Up to the size of {largest}, all weights can be trained here."),
            None => "Even small models are a tight fit here: see coordinator plan.".to_owned(),
        };
        let model = format!(
            "  # Random weights: they learn your code alone. For a model that was trained before, write\n  \
             #   hub: bigcode/starcoderbase-1b    # or another model of the Hugging Face hub,\n  \
             #   path: /path/to/model             # or config.json and safetensors files\n  \
             # in the place of init. {largest}\n  \
             init: {{preset: {preset}}}\n"
        );
        Self { on_gpu: true, preset, model, train, memory: String::new() }.with_memory(hardware, ranks)
    }

    fn with_memory(mut self, hardware: &Hardware, ranks: u32) -> Self {
        self.memory = match report(self.preset, ranks, self.on_gpu, hardware) {
            Some(report) => {
                let available = match report.memory.available_bytes {
                    Some(bytes) => format!("of {}", size(bytes)),
                    None => "(what there is, is not known)".to_owned(),
                };
                format!(
                    "{} parameters; each rank needs about {} {available}. coordinator plan --config shows the sum.",
                    count(report.parameters.total),
                    size(report.memory.needed_bytes),
                )
            }
            None => "coordinator plan --config shows what this needs.".to_owned(),
        };
        self
    }

    fn marks(self) -> [(&'static str, String); 10] {
        let sequence_tokens = sequence_tokens(self.preset, self.on_gpu).to_string();
        let (sequence_reason, sequences, steps, steps_reason, learning_rate, warmup) = match self.on_gpu {
            false => (
                "Longer sequences let the model see more around the cursor, and cost time.",
                "8",
                "500",
                "Enough to see the loss fall; more learns more.",
                "1e-3",
                "50",
            ),
            true => (
                "About a tenth as many lines of code around the cursor.",
                "1",
                "2000",
                "A first run; the loss on held-out files tells when to stop.",
                "3e-4",
                "100",
            ),
        };
        [
            ("{model}", self.model),
            ("{train}", self.train),
            ("{memory}", self.memory),
            ("{sequence_tokens}", sequence_tokens),
            ("{sequence_reason}", sequence_reason.to_owned()),
            ("{micro_batch_sequences}", sequences.to_owned()),
            ("{steps}", steps.to_owned()),
            ("{steps_reason}", steps_reason.to_owned()),
            ("{learning_rate}", learning_rate.to_owned()),
            ("{warmup_steps}", warmup.to_owned()),
        ]
    }
}

/// Whether all weights of a preset can be trained; `None` where the memory is not known.
fn fits(preset: &str, ranks: u32, hardware: &Hardware) -> Option<bool> {
    report(preset, ranks, true, hardware)?.fits
}

fn report(preset: &str, ranks: u32, on_gpu: bool, hardware: &Hardware) -> Option<Report> {
    let spec = sketch(preset, ranks, on_gpu)?;
    Report::new(&spec, ModelConfig::preset(preset).ok()?, hardware, &Known::default()).ok()
}

/// The chosen job without its sources: all that memory depends on.
fn sketch(preset: &str, ranks: u32, on_gpu: bool) -> Option<JobSpec> {
    let (device, precision, sequences) = if on_gpu { ("cuda", "bf16", 1) } else { ("cpu", "fp32", 8) };
    let tokens = sequence_tokens(preset, on_gpu);
    let text = format!(
        "dataset: d\nmodel: {{init: {{preset: {preset}}}}}\ndata: {{sequence_tokens: {tokens}}}\n\
         train: {{ranks: {ranks}, device: {device}, precision: {precision}, micro_batch_sequences: {sequences}}}\n"
    );
    job::load(Path::new("/sketch.yaml"), &text, &[], Path::new("/")).ok()
}

/// As many as the machine affords and the preset has positions for.
fn sequence_tokens(preset: &str, on_gpu: bool) -> u64 {
    let afforded = if on_gpu { 2048 } else { 256 };
    ModelConfig::preset(preset).map_or(afforded, |config| config.max_positions.min(afforded))
}

/// The last path component of the first source, in the letters that a job's name may have.
fn name(sources: &str) -> String {
    let first = sources.lines().next().unwrap_or_default().trim_end_matches(['"', '/']);
    let last = first.rsplit(['/', ':']).next().unwrap_or_default().trim_end_matches(".git");
    let safe: String = last
        .chars()
        .map(|c| if c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.') { c } else { '-' })
        .collect();
    let safe: String = safe.trim_start_matches(['-', '_', '.']).chars().take(60).collect();
    if safe.is_empty() { "my-code".to_owned() } else { safe }
}

/// JSON's strings are YAML's double-quoted ones.
fn quoted(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}

/// For a comment: what a driver calls itself must not end the line.
fn one_line(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use tunefleet_proto::job::{DatasetSpec, SourceSpec};

    use super::*;
    use crate::hardware::Gpu;

    fn machine(cores: u32, memory: Option<u64>, gpus: &[Option<u64>]) -> Hardware {
        let gpu = |memory: &Option<u64>| Gpu {
            name: "NVIDIA Test\n- x".into(),
            memory_bytes: memory.map(|gib| gib << 30),
        };
        Hardware {
            cores,
            memory_bytes: memory.map(|gib| gib << 30),
            bf16_products: true,
            gpus: gpus.iter().map(gpu).collect(),
        }
    }

    #[test]
    fn what_is_written_loads_and_fits_on_every_machine() {
        let sources =
            ["/home/ann/it's \"odd\": # {name} {model}\\x".to_owned(), "git@host:org/repo.git".to_owned()];
        for hardware in [
            machine(1, Some(2), &[]),
            machine(2, Some(16), &[]),
            machine(64, None, &[]),
            machine(16, Some(64), &[Some(24)]),
            machine(96, Some(512), &[Some(80); 8]),
            machine(16, Some(64), &[None]),
        ] {
            let text = job_file(&sources, &hardware);
            let spec = job::load(Path::new("/home/ann/job.yaml"), &text, &[], Path::new("/"))
                .unwrap_or_else(|faults| panic!("{faults}\n{text}"));
            let DatasetSpec::Collect(collect) = &spec.dataset else { panic!("no collect") };
            let location = |source: &SourceSpec| match source {
                SourceSpec::Repository(repository) => repository.location.clone(),
                other => panic!("{other:?}"),
            };
            let locations: Vec<_> = collect.sources.iter().map(location).collect();
            assert_eq!(locations, sources);
            let job::ModelSpec::Init { preset, .. } = &spec.model else { panic!("no init") };
            let report =
                Report::new(&spec, ModelConfig::preset(preset).unwrap(), &hardware, &Known::default())
                    .unwrap();
            assert_ne!(report.fits, Some(false), "{text}");
        }
    }

    #[test]
    fn the_choice_follows_the_machine() {
        let sources = ["/srv/app".to_owned()];
        let cpu = job_file(&sources, &machine(8, Some(16), &[]));
        for line in ["name: \"app\"", "device: cpu", "ranks: 2", "precision: fp32", "preset: demo"] {
            assert!(cpu.contains(line), "{line}: {cpu}");
        }
        let gpus = job_file(&sources, &machine(96, Some(512), &[Some(80); 8]));
        for line in [
            "device: cuda",
            "ranks: 8",
            "precision: bf16",
            "preset: starcoderbase-1b",
            "size of codellama-34b,",
        ] {
            assert!(gpus.contains(line), "{line}: {gpus}");
        }
        let one = job_file(&sources, &machine(16, Some(64), &[Some(8)]));
        assert!(one.contains("preset: demo"), "{one}");
    }
}
