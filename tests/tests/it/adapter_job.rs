//! A job that trains an adapter over a quantised base, from repositories to a merged model.

use std::path::Path;
use std::process::Command;

use nix::sys::signal::Signal;
use tunefleet_tests::job::{Builder, Job};
use tunefleet_tests::programs;

const ADAPTER: &str =
    "adapter: { rank: 4, dropout: 0.1, target_modules: \"c_proj,c_attn,q_attn,c_fc,c_proj\" }";

fn job(export: &str) -> Builder {
    Job::builder().section(ADAPTER).section(export).train("warmup_steps: 2")
}

fn worker(arguments: &[&str]) -> (bool, String) {
    let output = Command::new(programs::worker()).args(arguments).output().expect("the worker starts");
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (output.status.success(), text(&output.stdout) + &text(&output.stderr))
}

fn utf8(path: &Path) -> &str {
    path.to_str().expect("temporary paths are UTF-8")
}

#[test]
fn an_adapter_job_leaves_an_adapter_and_where_asked_a_merged_model() {
    let job = job("export: { merge: dequantized, dtype: fp32 }").steps(8).build();
    let said = job.run(&[]).expect(0);
    said.says(&[
        "nothing matches q_attn",
        "quantised",
        "nf4-64-double",
        "adapter",
        "worker generate --model",
    ]);
    let (adapter, merged) = (job.output().join("adapter"), job.output().join("export"));
    let model = job.output().join("model");

    let (ok, text) = worker(&["adapter", "inspect", utf8(&adapter), "--json"]);
    assert!(ok, "{text}");
    let report: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert_eq!(report["base_model"], "tiny");

    // The same completion from the merged model as from the two apart, but for quantisation.
    let prompt = ["--prompt", "def first(", "--temperature", "0", "--max-new-tokens", "4", "--dtype", "fp32"];
    let (ok, text) = worker(&[&["generate", "--model", utf8(&merged)], &prompt[..]].concat());
    assert!(ok, "{text}");
    let apart = ["generate", "--model", utf8(&model), "--adapter", utf8(&adapter)];
    let (ok, text) = worker(&[&apart, &prompt[..]].concat());
    assert!(ok, "{text}");

    // Merged into what it was trained against, nothing is lost; into the original, a little.
    let out = job.dir().join("merged");
    let dataset = job.output().join("dataset");
    let tokenizer = job.output().join("tokenizer");
    for (base, most) in [("dequantized", 1e-5), ("original", 0.2)] {
        let (ok, text) = worker(&[
            "adapter",
            "merge",
            "--adapter",
            utf8(&adapter),
            "--model",
            utf8(&model),
            "--out",
            utf8(&out),
            "--dtype",
            "fp32",
            "--base",
            base,
            "--dataset",
            utf8(&dataset),
            "--tokenizer",
            utf8(&tokenizer),
            "--sequence-tokens",
            "64",
        ]);
        assert!(ok, "{text}");
        let difference = text.rsplit("difference ").next().unwrap().split_whitespace().next().unwrap();
        assert!(difference.parse::<f64>().unwrap().abs() <= most, "{base}: {text}");
    }

    // Another base is refused by name, and nothing is left behind.
    let other = job.dir().join("other");
    let (ok, _) = worker(&[
        "init-model",
        "--preset",
        "tiny",
        "--seed",
        "9",
        "--tokenizer",
        utf8(&tokenizer),
        "--out",
        utf8(&other),
    ]);
    assert!(ok);
    let nowhere = job.dir().join("nowhere");
    let (ok, text) = worker(&[
        "adapter",
        "merge",
        "--adapter",
        utf8(&adapter),
        "--model",
        utf8(&other),
        "--out",
        utf8(&nowhere),
    ]);
    assert!(!ok && text.contains("tiny") && !nowhere.exists(), "{text}");
}

#[test]
fn an_interrupted_adapter_job_resumes_with_the_losses_of_an_undisturbed_one() {
    let job = job("export: { enabled: true }").steps(60).checkpoint_every(10).build();
    let mut launch = job.launch(&[]);
    launch.wait_until("step 15", || job.metrics().last_step() >= 15);
    launch.wait_until("a checkpoint", || !job.metrics().saved_steps().is_empty());
    launch.ranks()[1].kill();
    launch.wait().expect(1).says(&["SIGKILL", "--resume"]);
    assert!(job.metrics().last_step() < 60, "it had ended before the kill");
    let mut launch = job.launch(&["--resume"]);
    launch.wait_until("step 25", || job.metrics().attempts() == 2 && job.metrics().last_step() >= 25);
    launch.signal(Signal::SIGTERM);
    launch.wait().expect(143).says(&["--resume"]);
    // A checkpoint holds the adapter alone.
    let step = *job.checkpoints().last().unwrap();
    let files = std::fs::read_dir(job.checkpoint(step)).unwrap();
    let bytes: u64 = files.map(|file| file.unwrap().metadata().unwrap().len()).sum();
    let model = std::fs::metadata(job.output().join("model/model.safetensors")).unwrap().len();
    assert!(bytes < model, "{bytes} bytes of checkpoint, {model} of model");
    // What would not be the same training is refused.
    let alpha = ["--resume", "--set", "adapter.alpha=3"];
    job.run(&alpha).expect(1).says(&["another model, dataset, tokenizer or training settings"]);

    // A damaged quantised base is built anew.
    let base = job.output().join("base/nf4-64-double-fp32-cpu/block.0.bin");
    let mut bytes = std::fs::read(&base).unwrap();
    bytes[7] ^= 1;
    std::fs::write(&base, bytes).unwrap();
    job.run(&["--resume"]).expect(0).says(&["block.0.bin has changed since it was written"]);

    let twin = job.twin();
    twin.run(&[]).expect(0);
    let (disturbed, undisturbed) = (job.metrics().losses(), twin.metrics().losses());
    assert_eq!(undisturbed.len(), 60);
    assert_eq!(disturbed, undisturbed);
    let weights = |job: &Job| std::fs::read(job.output().join("adapter/adapter_model.safetensors")).unwrap();
    assert!(weights(&job) == weights(&twin), "the adapters differ");
}

#[test]
fn adapter_settings_that_cannot_be_are_told_with_their_place() {
    let job = Job::builder()
        .section("adapter:\n  rank: 0\n  target_modules: [q_proj]\n  quantize: int4\n  quantise_block: 64")
        .section("export: { merge: original }")
        .build();
    job.run(&[]).expect(78).says(&[
        "adapter.rank must be 1 to 65536, got 0",
        "adapter.quantize: expected one of nf4, fp4, int8, none",
        "quantise_block",
        "quantize_block",
    ]);
    let job = Job::builder().section("adapter: { target_modules: [q_proj] }").build();
    job.run(&[])
        .expect(78)
        .says(&["[q_proj] match no linear", "attn.c_attn, attn.c_proj, mlp.c_fc, mlp.c_proj"]);
    let job = Job::builder().section("export: { merge: original }").build();
    job.run(&[]).expect(78).says(&["there is no adapter to merge"]);
}
