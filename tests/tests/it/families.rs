//! Jobs on models of other families than StarCoder's, from a directory and from the hub.

use std::path::Path;
use std::process::Command;

use nix::sys::signal::Signal;
use tunefleet_tests::hub_server::{Fault, FaultKind, HubServer, TOKEN};
use tunefleet_tests::job::{Builder, Job};
use tunefleet_tests::model_files::{small, write};
use tunefleet_tests::process::Running;
use tunefleet_tests::programs;

use crate::evaluating::{VARIED, commit_varied};
use crate::serving::{completion, free_port};

const MODEL: &str = "model: ./model";

fn job(model: &str) -> Builder {
    Job::builder().model(model).steps(4).checkpoint_every(2)
}

fn generate(model: &Path, more: &[&str]) -> String {
    let mut command = Command::new(programs::worker());
    let prompt = ["--prompt", "def first(<FILL_ME>):", "--temperature", "0", "--max-new-tokens", "4"];
    command.arg("generate").arg("--model").arg(model).args(prompt).args(more);
    Running::start(command).wait().expect(0).stdout
}

#[test]
fn a_killed_rank_of_any_family_resumes_bit_for_bit_and_the_export_completes() {
    for preset in ["decicoder-1b", "starcoder2-3b"] {
        let job = job(MODEL).dataset(VARIED).restart("max_restarts: 1, backoff_seconds: 0.1").build();
        let twin = job.twin();
        for dir in [job.dir(), twin.dir()] {
            write(&dir.join("model"), &small(preset));
            commit_varied(&dir.join("repos/varied"));
        }
        programs::worker();
        let mut killed = job.command("launch", &[]);
        killed.env("TUNEFLEET_FAULT", "rank=1,step=4,phase=reduce,do=kill,attempt=1");
        Running::start(killed).wait().expect(0);
        // Both models are asked for what stands in held-out files.
        twin.run(&["--set", "evaluate.holes=2"]).expect(0).says(&["evaluate: done"]);
        assert_eq!((job.metrics().attempts(), twin.metrics().attempts()), (2, 1));
        let losses = job.metrics().losses();
        assert!(
            losses.len() == 4 && losses.values().all(|loss| f64::from_bits(*loss).is_finite()),
            "{losses:?}"
        );
        assert_eq!(losses, twin.metrics().losses(), "{preset}");
        let weights = |job: &Job| std::fs::read(job.output().join("export/model.safetensors")).unwrap();
        assert!(weights(&job) == weights(&twin), "{preset}: the exports differ");
        let export = job.output().join("export");
        assert!(!generate(&export, &["--completion-only"]).is_empty());
        let port = free_port();
        let mut server = Command::new(programs::worker());
        server.arg("serve").arg("--model").arg(&export).args(["--listen", &format!("127.0.0.1:{port}")]);
        let mut server = Running::start(server);
        server.wait_until("an answer", || completion(port, "").is_some());
        server.signal(Signal::SIGINT);
        server.wait().expect(0);
    }
}

#[test]
fn a_model_of_the_hub_is_fetched_once_and_stays_at_its_commit() {
    let job =
        job("model: team/qwen").section("adapter: { rank: 4 }").train("warmup_steps: 1").ranks(1).build();
    let made = job.dir().join("made");
    let hub = HubServer::start(1000);
    let push = |hub: &HubServer, preset: &str| {
        write(&made, &small(preset));
        let file = |name: &str| std::fs::read(made.join(name)).unwrap();
        let (config, weights) = (file("config.json"), file("model.safetensors"));
        hub.hub().commit(
            "team/qwen",
            "main",
            &[("README.md", b"about"), ("config.json", &config), ("model.safetensors", &weights)],
        );
        weights.len()
    };
    let bytes = push(&hub, "qwen2.5-coder-0.5b");
    let launch = |token: Option<&str>, more: &[&str]| {
        let mut command = job.command("launch", more);
        command.env("HF_ENDPOINT", &hub.url).env("NO_PROXY", "127.0.0.1,localhost");
        command.env("HF_HOME", job.dir().join("hf")).env_remove("HF_TOKEN");
        if let Some(token) = token {
            command.env("HF_TOKEN", token);
        }
        programs::worker();
        Running::start(command).wait()
    };
    launch(None, &[]).expect(78).says(&["model.hub", "team/qwen", "401", "HF_TOKEN"]);
    // A connection that breaks is gone on with where it ended.
    hub.hub().faults.push(Fault {
        on: "GET /store/".to_owned(),
        times: 1,
        kind: FaultKind::HalfAnswer(bytes / 2),
    });
    launch(Some(TOKEN), &[]).expect(0);
    assert_eq!(hub.hub().count("GET /store/"), 2);
    let model = job.output().join("model");
    let first = std::fs::read_link(&model).unwrap();
    assert!(first.to_str().unwrap().contains("hf/hub/models--team--qwen/snapshots/"), "{}", first.display());
    assert!(!first.join("README.md").exists());
    let adapter = job.output().join("adapter");
    let config = std::fs::read_to_string(adapter.join("adapter_config.json")).unwrap();
    assert!(config.contains("team/qwen"), "{config}");
    let tokenizer = job.output().join("tokenizer/tokenizer.json");
    std::fs::copy(tokenizer, job.dir().join("tokenizer.json")).unwrap();

    // The branch moves on; the job does not, and asks nobody.
    push(&hub, "decicoder-1b");
    let asked = hub.hub().requests.len();
    launch(Some(TOKEN), &[]).expect(0).says(&["cached"]);
    assert_eq!((std::fs::read_link(&model).unwrap(), hub.hub().requests.len()), (first.clone(), asked));

    // Another job finds what the cache has without the hub, and a commit can be named.
    let commit = first.file_name().unwrap().to_str().unwrap();
    let again = format!("model.revision={commit}");
    let elsewhere = format!("output={}", job.dir().join("elsewhere").display());
    let mut offline = job.command("launch", &["--set", &elsewhere, "--set", "model=null"]);
    offline.args(["--set", "model.hub=team/qwen", "--set", &again]);
    offline.env("HF_HOME", job.dir().join("hf")).env("HF_HUB_OFFLINE", "1");
    Running::start(offline).wait().expect(0);
    assert_eq!(hub.hub().requests.len(), asked);

    // Looked for anew, it is what the branch holds now: another family, whose adapter this is not.
    launch(Some(TOKEN), &["--fresh"]).expect(0);
    assert_ne!(std::fs::read_link(&model).unwrap(), first);
    let config = std::fs::read_to_string(model.join("config.json")).unwrap();
    assert!(config.contains("\"llama\""), "{config}");
}

#[test]
fn a_model_that_cannot_be_one_is_refused_before_anything_runs() {
    let refused = |config: &str, expected: &[&str]| {
        let job = job(MODEL).build();
        write(&job.dir().join("model"), &small("qwen2.5-coder-0.5b"));
        let path = job.dir().join("model/config.json");
        let text = std::fs::read_to_string(&path).unwrap();
        let (from, to) = config.split_once(" -> ").unwrap();
        assert!(text.contains(from), "{text}");
        std::fs::write(&path, text.replacen(from, to, 1)).unwrap();
        job.run(&[]).expect(78).says(expected);
        assert!(!job.output().join("dataset").exists());
    };
    refused("\"qwen2\" -> \"qwen9\"", &["config.json", "model_type \"qwen9\" is not supported", "qwen2"]);
    refused("\"silu\" -> \"relu\"", &["hidden_act = relu: must be silu"]);
    refused(
        "\"num_key_value_heads\":2 -> \"num_key_value_heads\":3",
        &["num_key_value_heads = 3: must divide"],
    );
    // A vocabulary that is larger than the model's.
    let job = job(MODEL).tokenizer("tokenizer: { train: { vocab_size: 600 } }").build();
    write(&job.dir().join("model"), &small("qwen2.5-coder-0.5b"));
    job.run(&[]).expect(78).says(&["600", "512"]);
}
