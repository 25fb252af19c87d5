//! Before anything runs: a job file for the user's own repositories, and what it needs.

use std::process::Command;

use serde_json::Value;
use tunefleet_tests::job::Job;
use tunefleet_tests::process::{Ended, Running};
use tunefleet_tests::{programs, repository};

fn coordinator(dir: &std::path::Path, arguments: &[&str]) -> Ended {
    let mut command = Command::new(programs::coordinator());
    command.args(arguments).current_dir(dir);
    Running::start(command).wait()
}

#[test]
fn init_writes_a_job_file_that_validates_and_plans_and_is_never_overwritten_unasked() {
    let dir = tempfile::tempdir().unwrap();
    repository::commit(&dir.path().join("src/app"), &repository::sources("app", 3));
    repository::commit(&dir.path().join("src/lib"), &repository::sources("lib", 3));
    let said = coordinator(dir.path(), &["init", "src", "git@example.invalid:team/far"]).expect(0);
    said.says(&["3 repositories", "coordinator plan --config job.yaml"]);
    let text = std::fs::read_to_string(dir.path().join("job.yaml")).unwrap();
    for line in ["src/app", "src/lib", "git@example.invalid:team/far", "# "] {
        assert!(text.contains(line), "{line} is not in\n{text}");
    }
    coordinator(dir.path(), &["validate", "--config", "job.yaml"]).expect(0).says(&["ok"]);
    let plan = coordinator(dir.path(), &["plan", "--config", "job.yaml", "--memory-gib", "64"]).expect(0);
    plan.says(&["parameters", "memory of one rank", "rank 0"]);
    coordinator(dir.path(), &["init", "src"]).expect(1).says(&["job.yaml exists", "--force"]);
    assert_eq!(std::fs::read_to_string(dir.path().join("job.yaml")).unwrap(), text);
    coordinator(dir.path(), &["init", "nowhere", "--output", "x.yaml"]).expect(1).says(&["nowhere"]);
}

#[test]
fn a_plan_counts_starcoder_exactly_and_says_when_it_does_not_fit() {
    let job = Job::builder().model("model: { init: { preset: starcoder } }").tokenizer("").ranks(8).build();
    let mut command = job.command("plan", &["--json", "--memory-gib", "80"]);
    command.args(["--set", "train.precision=bf16"]);
    let plan = Running::start(command).wait().expect(0);
    let plan: Value = serde_json::from_str(&plan.stdout).unwrap();
    assert_eq!(plan["parameters"]["total"], 15_517_456_384u64);
    assert_eq!(plan["ranks"].as_array().unwrap().len(), 8);
    assert_eq!(plan["shard_plan"]["units"].as_array().unwrap().len(), 41);
    let items = plan["memory"]["items"].as_array().unwrap();
    let sum: u64 = items.iter().map(|item| item["bytes"].as_u64().unwrap()).sum();
    assert_eq!(plan["memory"]["needed_bytes"], sum);

    let misfit = Running::start(job.command("plan", &["--memory-gib", "16"])).wait().expect(3);
    misfit.says(&["does not fit", "use more ranks"]);
}

/// The figures of the run that was published with these settings; its list had 0.12 GB of gradients,
/// which its own sum does not have.
#[test]
fn the_published_adapter_job_is_planned_with_its_own_figures() {
    let file = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/jobs/qlora.yaml");
    let shape = ["--set", "model.path=", "--set", "model.init.preset=starcoder"];
    let plan = |more: &[&str]| {
        let mut command = Command::new(programs::coordinator());
        command.arg("plan").arg("--config").arg(&file).args(shape).args(more);
        Running::start(command).wait()
    };
    plan(&["--memory-gib", "24"]).expect(0).says(&[
        "110,428,160 trainable of 15,627,884,544: 0.7066%",
        "nothing matches q_attn",
        "4 micro-batches x 4 sequences x 2,048 tokens = 32,768 tokens",
        "2,000 steps = 65,536,000 tokens",
        "7.76 (base at 4 bits) + 0.22 (adapter, 16 bits) + 0.22 (gradients, 16 bits) + 1.33",
        "= 9.53",
    ]);
    plan(&["--memory-gib", "12"]).expect(3).says(&["does not fit"]);
    let json = plan(&["--json", "--memory-gib", "24"]).expect(0);
    let json: Value = serde_json::from_str(&json.stdout).unwrap();
    assert_eq!(json["parameters"]["adapter"]["percent"], 0.7066097761926236);
}
