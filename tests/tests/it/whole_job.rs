//! From git repositories to a trained, exported model by one command.

use std::process::Command;

use tunefleet_proto::model::ModelConfig;
use tunefleet_tests::job::Job;
use tunefleet_tests::process::Running;
use tunefleet_tests::programs;

#[test]
fn one_command_collects_trains_and_exports() {
    let job = Job::builder().steps(8).build();
    job.run(&[]).expect(0);

    let output = job.output();
    let metrics = job.metrics();
    let losses: Vec<f64> = metrics.losses().into_values().map(f64::from_bits).collect();
    assert_eq!(losses.len(), 8);
    assert!(losses[7] < losses[0], "the loss must fall: {losses:?}");
    assert_eq!(metrics.saved_steps(), [8]);
    assert_eq!(job.checkpoints(), [8]);

    let dataset: tunefleet_proto::dataset::Manifest =
        serde_json::from_slice(&std::fs::read(output.join("dataset/manifest.json")).unwrap()).unwrap();
    let files: u64 = dataset.repositories.iter().map(|repository| repository.files).sum();
    assert_eq!(files, 24 + 16);
    let config = std::fs::read_to_string(output.join("export/config.json")).unwrap();
    assert_eq!(ModelConfig::from_json(&config).unwrap().layers, 2);
    for file in ["tokenizer/tokenizer.json", "export/tokenizer.json", "export/model.safetensors"] {
        assert!(output.join(file).is_file(), "{file}");
    }
}

#[test]
fn an_exported_model_fills_a_hole_where_the_prompt_has_it() {
    let job = Job::builder().steps(8).build();
    job.run(&[]).expect(0);
    let generate = |arguments: &[&str]| {
        let mut command = Command::new(programs::worker());
        command.arg("generate").arg("--model").arg(job.output().join("export")).args(arguments);
        Running::start(command).wait()
    };
    let prompt = ["--prompt", "def f(x):\n    return <FILL_ME>\n\nprint(f(2))", "--max-new-tokens", "8"];
    let filled = generate(&prompt).expect(0).stdout;
    assert!(filled.starts_with("def f(x):\n    return "), "{filled}");
    assert!(filled.ends_with("\n\nprint(f(2))"), "{filled}");
    assert_eq!(generate(&prompt).expect(0).stdout, filled, "the same seed draws the same tokens");
    generate(&["--prompt", "<FILL_ME><FILL_ME>"]).expect(1).says(&["one hole at a time"]);
    generate(&["--prompt", "x", "--max-new-tokens", "300"]).expect(1).says(&["positions for 256"]);
}

#[test]
fn a_second_launch_repeats_no_stage() {
    let job = Job::builder().steps(2).build();
    job.run(&[]).expect(0);
    let made = ["dataset/manifest.json", "tokenizer/tokenizer.json", "model/model.safetensors"]
        .map(|file| job.output().join(file));
    let modified = || made.each_ref().map(|path| path.metadata().unwrap().modified().unwrap());
    let before = modified();
    // Finished weights are not thrown away unasked.
    job.run(&["--set", "train.steps=3"]).expect(1).says(&["--fresh"]);
    job.run(&["--set", "train.steps=3", "--fresh"])
        .expect(0)
        .says(&["collect: cached", "init-model: cached"]);
    assert_eq!(modified(), before);
    assert_eq!(job.metrics().last_step(), 3);
}

#[test]
fn runs_of_one_job_are_bit_identical() {
    let job = Job::builder().steps(4).train("dropout: 0.1").build();
    let twin = job.twin();
    job.run(&[]).expect(0);
    twin.run(&[]).expect(0);
    assert_eq!(job.metrics().losses(), twin.metrics().losses());
    let weights = |job: &Job| std::fs::read(job.output().join("export/model.safetensors")).unwrap();
    assert!(weights(&job) == weights(&twin), "the exported weights differ");
}
