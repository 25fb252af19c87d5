//! What users and disks do wrong: each is refused by name, with what to do.

use std::fs::{self, OpenOptions};
use std::net::{Ipv4Addr, TcpListener};
use std::os::unix::fs::FileExt;
use std::process::Command;

use nix::sys::signal::Signal;
use tunefleet_tests::job::Job;
use tunefleet_tests::process::Running;
use tunefleet_tests::programs;

const FAILED: i32 = 1;
const BAD_CONFIG: i32 = 78;

#[test]
fn a_misspelt_key_a_wrong_type_and_a_contradiction_are_reported_at_once() {
    let job = Job::builder().build();
    let text = fs::read_to_string(job.config()).unwrap();
    let text = text.replace("  steps: 6\n", "  stepps: 6\n").replace("  ranks: 2\n", "  ranks: two\n");
    fs::write(job.config(), text + "dataset: elsewhere\n").unwrap();
    let place = |key: &str| {
        let text = fs::read_to_string(job.config()).unwrap();
        let (line, content) = text.lines().enumerate().find(|(_, line)| line.contains(key)).unwrap();
        (line + 1, content.find(key).unwrap() + 1)
    };
    let ended = job.run(&[]).expect(BAD_CONFIG);
    let (line, column) = place("stepps");
    let config = job.config().display();
    let ended = ended.says(&[
        &format!("{config}:{line}:{column}: "),
        "\"stepps\"",
        "did you mean \"steps\"?",
        &format!("{config}:{}:{}: ", place("two").0, place("two").1),
        "contradict",
    ]);
    assert!(!job.output().exists(), "nothing may be made:\n{}", ended.output);
}

#[test]
fn a_missing_repository_is_named() {
    let job = Job::builder().dataset("collect: { sources: [repos/first, repos/nowhere] }").build();
    job.run(&[]).expect(FAILED).says(&["repos/nowhere"]);
    assert!(!job.output().join("dataset/manifest.json").exists(), "half a dataset must not pass for one");
}

#[test]
fn a_truncated_safetensors_file_is_refused_by_name() {
    let first = Job::builder().steps(1).build();
    first.run(&[]).expect(0);
    let weights = first.output().join("model/model.safetensors");
    let length = weights.metadata().unwrap().len();
    OpenOptions::new().write(true).open(&weights).unwrap().set_len(length / 2).unwrap();

    let output = first.output();
    let job = Job::builder()
        .model(&format!("model: {{ path: {} }}", output.join("model").display()))
        .tokenizer(&format!("tokenizer: {{ path: {} }}", output.join("tokenizer").display()))
        .build();
    job.run(&[]).expect(FAILED).says(&["model.safetensors", "truncated"]);
}

#[test]
fn a_tokenizer_without_fim_tokens_is_refused_by_name() {
    let job = Job::builder().tokenizer("tokenizer: { path: plain }").build();
    let plain = job.dir().join("plain");
    fs::create_dir(&plain).unwrap();
    let tokenizer = r#"{ "version": "1.0", "truncation": null, "padding": null,
        "added_tokens": [{ "id": 2, "content": "<|endoftext|>", "single_word": false, "lstrip": false,
                           "rstrip": false, "normalized": false, "special": true }],
        "normalizer": null, "pre_tokenizer": { "type": "ByteLevel", "add_prefix_space": false,
        "trim_offsets": true, "use_regex": true }, "post_processor": null,
        "decoder": { "type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true },
        "model": { "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                   "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false,
                   "vocab": { "a": 0, "b": 1, "<|endoftext|>": 2 }, "merges": [] } }"#;
    fs::write(plain.join("tokenizer.json"), tokenizer).unwrap();
    job.run(&[]).expect(FAILED).says(&["tokenizer.json", "<fim_prefix>"]);
}

#[test]
fn a_checkpoint_with_a_flipped_byte_is_named_and_an_older_sound_one_is_used() {
    const STEPS: u64 = 60;
    let job = Job::builder().steps(STEPS).checkpoint_every(5).build();
    let twin = job.twin();
    let mut launch = job.launch(&[]);
    launch.wait_until("two checkpoints", || job.metrics().last_step() >= 12);
    launch.signal(Signal::SIGINT);
    launch.wait().expect(130);
    let checkpoints = job.checkpoints();
    let [older, newest] = checkpoints[..] else { panic!("two are kept, got {checkpoints:?}") };
    let shard = job.checkpoint(newest).read_dir().unwrap().filter_map(Result::ok).map(|entry| entry.path());
    let shard = shard.filter(|path| path.extension().is_some_and(|e| e == "safetensors")).min().unwrap();
    let file = OpenOptions::new().read(true).write(true).open(&shard).unwrap();
    let (mut byte, middle) = ([0], file.metadata().unwrap().len() / 2);
    file.read_exact_at(&mut byte, middle).unwrap();
    file.write_all_at(&[byte[0] ^ 1], middle).unwrap();

    let shard = shard.file_name().unwrap().to_str().unwrap().to_owned();
    job.run(&["--resume"]).expect(0).says(&[
        &shard,
        &format!("step-{newest:08}"),
        &format!("step-{older:08}"),
    ]);
    twin.run(&[]).expect(0);
    assert_eq!(job.metrics().losses(), twin.metrics().losses());
}

#[test]
fn serving_on_a_port_in_use_names_the_port() {
    let taken = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let state = tempfile::tempdir().unwrap();
    let mut command = Command::new(programs::coordinator());
    command.args(["serve", "--listen", &address]).current_dir(state.path());
    Running::start(command).wait().expect(FAILED).says(&[&address, "in use"]);
}
