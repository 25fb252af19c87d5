//! From the original's own settings to job files, by the real program: value for value, told where
//! anything is lost, and recognised where they are taken for job files.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use tunefleet_proto::adapter::Targets;
use tunefleet_proto::base_plan::QuantKind;
use tunefleet_proto::job::{
    self, DatasetSpec, DeviceKind, FimLevel, JobSpec, MergeBase, Offload, Optimizer, Packing, Precision,
    Recompute, Schedule, Strategy, TokenizerSpec,
};
use tunefleet_tests::process::{Ended, Running};
use tunefleet_tests::programs;

const FAILED: i32 = 1;
const USAGE: i32 = 2;
const BAD_CONFIG: i32 = 78;

fn original(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("data/convert").join(name)
}

fn text_of(name: &str) -> String {
    fs::read_to_string(original(name)).unwrap()
}

fn coordinator(dir: &Path, arguments: &[&str]) -> Ended {
    let mut command = Command::new(programs::coordinator());
    command.args(arguments).current_dir(dir);
    Running::start(command).wait()
}

/// What a config and the arguments of a script become; `None` for no config.
fn converted(config: Option<&str>, script: &str) -> (JobSpec, Ended) {
    let (dir, args) = (tempfile::tempdir().unwrap(), text_of(script));
    let config = config.map(original);
    let mut arguments = vec!["convert", "--args", &args];
    if let Some(config) = &config {
        arguments.extend(["--accelerate", config.to_str().unwrap()]);
    }
    let ended = coordinator(dir.path(), &arguments).expect(0);
    let spec = job::load(Path::new("job.yaml"), &ended.stdout, &[], Path::new("/here")).unwrap();
    (spec, ended)
}

/// What all three of the original's scripts have in common.
fn assert_common(spec: &JobSpec) {
    assert_eq!(spec.dataset, DatasetSpec::Existing("/here/dataset".into()));
    assert_eq!(spec.tokenizer, TokenizerSpec::FromModel);
    assert_eq!(spec.data.sequence_tokens, 2048);
    assert_eq!((spec.data.fim_rate, spec.data.fim_spm_rate), (0.5, 0.5));
    assert_eq!((spec.data.fim_level, spec.data.packing), (FimLevel::Document, Packing::SeedCompatible));
    assert_eq!(spec.data.seed, 0);
    let train = &spec.train;
    assert_eq!(train.device, DeviceKind::Auto);
    assert_eq!(train.precision, Precision::Bf16);
    assert_eq!(train.steps, 2000);
    assert_eq!((train.optimizer, train.betas, train.epsilon), (Optimizer::AdamW, (0.9, 0.999), 1e-8));
    assert_eq!((train.weight_decay, train.max_grad_norm), (0.01, 1.0));
    assert_eq!((train.schedule, train.warmup_steps, train.final_learning_rate), (Schedule::Cosine, 30, 0.0));
    assert_eq!(train.dropout, None);
    assert_eq!(train.recompute, Recompute::All);
    assert_eq!(train.seed, 42);
    assert_eq!((train.log_every_steps, train.eval_every_steps), (25, 100));
    assert!(train.eval_sequences > 100_000, "every held-out sequence counts");
    assert_eq!(u64::from(train.keep_checkpoints), train.steps / train.checkpoint_every_steps);
    assert!(train.early_stopping.is_none() && !train.keep_best);
    assert_eq!((spec.export.enabled, spec.export.merge), (true, MergeBase::None));
    assert_eq!(spec.workers.coordinator, None);
}

#[test]
fn the_original_s_full_fine_tuning_is_converted_value_for_value() {
    let (spec, ended) = converted(Some("fsdp_config.yaml"), "run_fsdp.sh");
    assert_common(&spec);
    assert_eq!(spec.name, "starcoder-personal-copilot-A100-40GB-colab");
    assert_eq!(spec.output, Path::new("/here/starcoder-personal-copilot-A100-40GB-colab"));
    assert_eq!(spec.model.name(), "bigcode/starcoder");
    assert_eq!(spec.adapter, None);
    let train = &spec.train;
    assert_eq!((train.ranks, train.strategy, train.shard_ranks), (8, Strategy::FullShard, 8));
    assert_eq!((train.gather_ahead, train.resident_blocks, train.offload), (1, 0, Offload::None));
    assert_eq!(train.reduce_precision, Precision::Bf16);
    assert_eq!((train.micro_batch_sequences, train.accumulate_micro_batches), (1, 2));
    assert_eq!(train.learning_rate, 5e-5);
    assert_eq!(train.checkpoint_every_steps, 500);
    assert_eq!(spec.step_sequences(), 16);
    assert_eq!(spec.export.dtype, Precision::Bf16);
    // What has no place is told with where it stands, and nothing is told to be a contradiction.
    ended.says(&[
        "fsdp_config.yaml:14:10: tpu_env: []: for TPUs",
        "fsdp_state_dict_type: SHARDED_STATE_DICT: every rank writes its shard",
        "fsdp_sync_module_states: true: ",
        "fsdp_use_orig_params: true: ",
        "--use_flash_attn: attention is always fused",
        "TrainingArguments' 42",
    ]);
}

#[test]
fn the_example_job_is_what_the_original_becomes() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/jobs/fsdp.yaml");
    let text = fs::read_to_string(&path).unwrap();
    let example = job::load(Path::new("fsdp.yaml"), &text, &[], Path::new("/here")).unwrap();
    let (spec, _) = converted(Some("fsdp_config.yaml"), "run_fsdp.sh");
    assert_common(&example);
    assert_eq!((example.name.as_str(), example.train.ranks), ("fsdp", 8));
    // The example takes a directory, so that it can be planned without a network.
    assert!(example.model.name().ends_with("/starcoder"), "{}", example.model.name());
    let JobSpec { name, output, model, .. } = spec.clone();
    assert_eq!(JobSpec { name, output, model, ..example }, spec);
}

#[test]
fn the_original_s_adapter_is_converted_value_for_value() {
    let (spec, ended) = converted(None, "run_peft.sh");
    assert_common(&spec);
    let adapter = spec.adapter.as_ref().unwrap();
    assert_eq!((adapter.lora.rank, adapter.lora.alpha, adapter.lora.dropout), (32, 64.0, 0.0));
    assert!(!adapter.lora.rslora && !adapter.lora.dora && adapter.lora.modules_to_save.is_empty());
    assert_eq!(adapter.lora.targets, Targets::from_text("c_proj,c_attn,q_attn,c_fc,c_proj"));
    assert_eq!((adapter.quantization.kind, adapter.quantization.block), (QuantKind::Nf4, 64));
    assert!(adapter.quantization.double);
    let train = &spec.train;
    assert_eq!(train.ranks, 1);
    assert_eq!((train.micro_batch_sequences, train.accumulate_micro_batches), (4, 4));
    assert_eq!((train.learning_rate, train.checkpoint_every_steps), (5e-4, 100));
    assert_eq!(spec.step_sequences(), 16);
    ended.says(&["the original pushes it to the Hub", "--bnb_4bit_compute_dtype bfloat16: "]);
}

#[test]
fn the_original_s_deepspeed_run_is_converted_value_for_value() {
    let (spec, ended) = converted(Some("deepspeed_config.yaml"), "run_deepspeed.sh");
    assert_common(&spec);
    assert_eq!(spec.adapter, None);
    assert_eq!(spec.model.name(), "bigcode/starcoderbase-1b");
    let train = &spec.train;
    assert_eq!((train.ranks, train.strategy, train.offload), (1, Strategy::FullShard, Offload::All));
    assert_eq!((train.micro_batch_sequences, train.accumulate_micro_batches), (8, 2));
    assert_eq!((train.learning_rate, train.checkpoint_every_steps), (5e-5, 1000));
    ended.says(&["zero3_save_16bit_model: true: ", "zero3_init_flag: true: "]);
}

#[test]
fn the_commented_repositories_collect_when_they_take_the_place_of_the_dataset() {
    let (_, ended) = converted(Some("fsdp_config.yaml"), "run_fsdp.sh");
    let mut collecting = false;
    let text: String = ended
        .stdout
        .lines()
        .filter(|line| !line.starts_with("dataset:"))
        .map(|line| {
            collecting = line == "# collect:" || collecting && line.starts_with("# ");
            let uncommented = line.strip_prefix("# ").filter(|_| collecting);
            format!("{}\n", uncommented.unwrap_or(line))
        })
        .collect();
    let spec = job::load(Path::new("job.yaml"), &text, &[], Path::new("/here")).unwrap();
    let DatasetSpec::Collect(collect) = spec.dataset else { panic!("{text}") };
    assert_eq!(collect.sources.len(), 10);
    assert_eq!((collect.validation_fraction, collect.split_seed), (0.005, 0));
}

#[test]
fn a_job_file_is_written_once_and_plans() {
    let dir = tempfile::tempdir().unwrap();
    let config = original("fsdp_config.yaml");
    let arguments = ["convert", "--accelerate", config.to_str().unwrap(), "--out", "job.yaml"];
    coordinator(dir.path(), &arguments)
        .expect(0)
        .says(&["wrote job.yaml", "coordinator plan --config job.yaml"]);
    let text = fs::read_to_string(dir.path().join("job.yaml")).unwrap();
    let small = ["--set", "model.path=", "--set", "model.init.preset=demo", "--json"];
    let plan = coordinator(dir.path(), &[&["plan", "--config", "job.yaml"], &small[..]].concat());
    plan.expect(0).says(&["\"ranks\""]);
    coordinator(dir.path(), &arguments).expect(FAILED).says(&["job.yaml exists", "--out"]);
    assert_eq!(fs::read_to_string(dir.path().join("job.yaml")).unwrap(), text);
}

#[test]
fn nothing_to_convert_and_files_that_are_not_there_are_named() {
    let dir = tempfile::tempdir().unwrap();
    coordinator(dir.path(), &["convert"]).expect(USAGE).says(&["--accelerate", "--deepspeed", "--args"]);
    coordinator(dir.path(), &["convert", "--accelerate", "x.yaml"]).expect(BAD_CONFIG).says(&["x.yaml"]);
    fs::write(dir.path().join("x.yaml"), "num_procesess: 8\nmixed_precision: [\n").unwrap();
    coordinator(dir.path(), &["convert", "--accelerate", "x.yaml"]).expect(BAD_CONFIG).says(&["x.yaml:"]);
    fs::write(dir.path().join("x.yaml"), "num_procesess: 8\nmixed_precision: bf17\n").unwrap();
    let wrong = ["convert", "--accelerate", "x.yaml", "--args", "--seq_lenght 8", "--out", "job.yaml"];
    coordinator(dir.path(), &wrong).expect(BAD_CONFIG).says(&[
        "x.yaml:1:1: unknown key \"num_procesess\" (did you mean \"num_processes\"?)",
        "x.yaml:2:18: mixed_precision: expected one of no, fp16, bf16, fp8, got \"bf17\"",
        "--args: unknown argument \"--seq_lenght\" (did you mean \"--seq_length\"?)",
    ]);
    assert!(!dir.path().join("job.yaml").exists());
}

/// The command that is printed does what it says, in a shell.
#[test]
fn a_config_given_as_a_job_file_is_recognised_with_the_command_that_converts_it() {
    let dir = tempfile::tempdir().unwrap();
    let deepspeed = "{\"zero_optimization\": {\"stage\": 2}, \"bf16\": {\"enabled\": true}}";
    for (name, text, kind) in [
        ("my config's.yaml", text_of("fsdp_config.yaml"), "an accelerate config"),
        ("ds.json", deepspeed.to_owned(), "a DeepSpeed config"),
    ] {
        fs::write(dir.path().join(name), text).unwrap();
        for verb in ["launch", "validate", "plan", "collect"] {
            let ended = coordinator(dir.path(), &[verb, "--config", name]).expect(BAD_CONFIG);
            ended.says(&[name, kind, "coordinator convert --"]);
        }
        let ended = coordinator(dir.path(), &["validate", "--config", name]);
        let command = ended.output.lines().find_map(|line| line.trim().strip_prefix("coordinator "));
        let command = format!("{} {}", programs::coordinator().display(), command.unwrap());
        let status = Command::new("sh").args(["-c", &command]).current_dir(dir.path()).status().unwrap();
        assert!(status.success(), "{command}");
        let job = format!("{}-job.yaml", name.split('.').next().unwrap());
        let spec = fs::read_to_string(dir.path().join(&job)).unwrap();
        let spec = job::load(&dir.path().join("job.yaml"), &spec, &[], dir.path()).unwrap();
        assert_eq!(spec.train.precision, Precision::Bf16);
    }
}
