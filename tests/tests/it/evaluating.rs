//! The last stages of a job ask its model what it has learnt, and what it was before.

use std::fs;
use std::path::Path;

use serde_json::{Value, json};
use tunefleet_tests::job::Job;
use tunefleet_tests::process::{Ended, Running};
use tunefleet_tests::{programs, repository};

use crate::serving::free_port;

const TASKS: usize = 5;

/// Tasks that take no knowledge: a model fails them, and the sandbox says so.
fn write_tasks(path: &Path) {
    let task = |number: usize| {
        json!({
            "task_id": format!("t/{number}"), "prompt": format!("def f{number}():\n"), "entry_point": format!("f{number}"),
            "canonical_solution": "    return 1\n", "test": "def check(candidate):\n    assert candidate() == 1",
        })
        .to_string()
            + "\n"
    };
    fs::write(path, (0..TASKS).map(task).collect::<String>()).unwrap();
}

/// A repository whose files say different things.
pub fn commit_varied(dir: &Path) {
    let file = |number: usize| {
        let line = |line: usize| {
            let word = |at: usize| (number * 7919 + line * 104_729 + at * 1_299_709) % 9973;
            format!("    value_{} = call_{}(item_{}, {})\n", word(1), word(2), word(3), word(4))
        };
        let text = format!("def part_{number}():\n{}", (0..12).map(line).collect::<String>());
        (format!("src/part_{number}.py"), text)
    };
    repository::commit(dir, &(0..24).map(file).collect::<Vec<_>>());
}

pub const VARIED: &str = "collect: { sources: [repos/varied], validation_fraction: 0.3 }";

fn evaluation(dir: &Path) -> Value {
    let path = dir.join("evaluation.json");
    serde_json::from_slice(&fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display())))
        .unwrap()
}

#[test]
fn a_job_asks_what_it_trained_and_what_that_was_before_with_all_its_ranks() {
    let job = Job::builder()
        .dataset(VARIED)
        .steps(4)
        .section("adapter: { rank: 4, quantize: nf4 }")
        .section(
            "evaluate: { humaneval: tasks.jsonl, samples_per_task: 2, holes: 6, python: /usr/bin/python3 }",
        )
        .build();
    commit_varied(&job.dir().join("repos/varied"));
    write_tasks(&job.dir().join("tasks.jsonl"));
    let evaluations = job.output().join("evaluations");
    job.run(&[]).expect(0).says(&[
        "evaluate: ",
        &evaluations.display().to_string(),
        "the model, humaneval: pass@1 0.00%",
        "before training, dataset: exact match ",
        "coordinator compare ",
    ]);
    let losses = ["tuned", "base"].map(|of| {
        let found = evaluation(&evaluations.join(of).join("dataset"));
        assert_eq!(found["subject"]["adapter"].is_string(), of == "tuned", "{found}");
        assert_eq!(found["subject"]["quantization"], "nf4-64-double");
        assert!(found["items"].as_array().unwrap().len() >= 12, "{found}");
        let functions = evaluation(&evaluations.join(of).join("humaneval"));
        let items = functions["items"].as_array().unwrap();
        assert_eq!(items.len(), TASKS);
        assert!(items.iter().all(|item| item["samples"] == 2 && item["passed"] == 0), "{functions}");
        for rank in ["rank-0", "rank-1"] {
            let samples =
                fs::read_to_string(evaluations.join(of).join("humaneval").join(rank).join("samples.jsonl"));
            assert!(samples.unwrap().lines().count() >= 4, "{rank} had no share");
        }
        found["files"].as_array().unwrap().iter().map(|file| file["loss_sum"].as_f64().unwrap()).sum::<f64>()
    });
    assert!(losses[0] < losses[1], "{losses:?}: it has learnt nothing");

    // One process alone finds the same.
    let alone = job.dir().join("alone");
    let mut command = std::process::Command::new(programs::worker());
    command
        .args(["evaluate", "repo", "--quantize", "nf4", "--holes", "6", "--model"])
        .arg(job.output().join("model"));
    command
        .arg("--adapter")
        .arg(job.output().join("adapter"))
        .arg("--dataset")
        .arg(job.output().join("dataset"));
    command.arg("--out").arg(&alone);
    command.arg("--against").arg(evaluations.join("base/dataset"));
    Running::start(command).wait().expect(0).says(&["compared with", "p = "]);
    let (alone, together) = (evaluation(&alone), evaluation(&evaluations.join("tuned/dataset")));
    assert_eq!(alone["tasks_digest"], together["tasks_digest"]);
    let sum = |of: &Value| {
        of["files"].as_array().unwrap().iter().map(|file| file["loss_sum"].as_f64().unwrap()).sum::<f64>()
    };
    assert!((sum(&alone) - sum(&together)).abs() < 0.01 * sum(&alone), "{} {}", sum(&alone), sum(&together));

    reports(&job);

    // What was asked is not asked again; other questions are.
    job.run(&[]).expect(0).says(&["evaluate: cached"]);
    job.run(&["--set", "evaluate.holes=2"]).expect(0);
    assert!(evaluation(&evaluations.join("tuned/dataset"))["items"].as_array().unwrap().len() <= 8);
}

fn compare(job: &Job, arguments: &[&str]) -> Ended {
    let mut command = std::process::Command::new(programs::coordinator());
    command.arg("compare").arg(job.output()).arg("--out").arg(job.dir().join("report")).args(arguments);
    Running::start(command).wait()
}

/// The report of a run: curves, both models on both sets of tasks, a server and a recording beside them.
fn reports(job: &Job) {
    let report = job.dir().join("report");
    let prompts = job.dir().join("prompts.jsonl");
    compare(job, &["--samples", "3", "--write-prompts", prompts.to_str().unwrap()])
        .expect(0)
        .says(&["index.html"]);
    let asked = fs::read_to_string(&prompts).unwrap();
    let ids: Vec<Value> =
        asked.lines().map(|line| serde_json::from_str::<Value>(line).unwrap()["id"].clone()).collect();
    assert_eq!(ids.len(), 3);
    let recorded = job.dir().join("recorded.jsonl");
    fs::write(&recorded, json!({"id": ids[0], "completion": "what_another_said"}).to_string() + "\n")
        .unwrap();

    let mut server = std::process::Command::new(programs::worker());
    let port = free_port();
    server
        .args(["serve", "--listen", &format!("127.0.0.1:{port}"), "--model"])
        .arg(job.output().join("model"));
    let server = Running::start(server);
    server.wait_for_line("serving");
    let recording = format!("another={}", recorded.display());
    let served = format!("served=http://127.0.0.1:{port}/v1");
    compare(job, &["--samples", "3", "--against", &recording, "--against", &served]).expect(0);
    let (page, text) = (
        fs::read_to_string(report.join("index.html")).unwrap(),
        fs::read_to_string(report.join("report.md")).unwrap(),
    );
    for expected in [
        "| test | adapter, rank 4, nf4-64-double | 2 | 4 |",
        "## Curves",
        "before training",
        "dataset (held-out files)",
        "humaneval (functions judged by tests)",
        "pass@1",
        "test beside before training, nf4-64-double: loss",
        "single_line: exact match",
        "what_another_said",
        "(not recorded)",
        "\nserved:\n",
    ] {
        assert!(text.contains(expected), "{expected}: {text}");
    }
    assert_eq!(page.matches("<svg ").count(), text.matches(".svg)").count());
    for figure in text.lines().filter_map(|line| line.split_once("](")?.1.strip_suffix(')')) {
        assert!(fs::read_to_string(report.join(figure)).unwrap().starts_with("<svg "), "{figure}");
    }
    assert!(page.contains("what_another_said") && !page.contains("http://127"), "the page asks for nothing");
    drop(server);
    compare(job, &["--against", &served]).expect(1).says(&["error: http://127.0.0.1"]);
    compare(job, &["--against", "nobody=nowhere.jsonl"]).expect(1).says(&["nowhere.jsonl: entity not found"]);
    let mut command = std::process::Command::new(programs::coordinator());
    command.arg("compare").arg(job.dir().join("repos")).arg("--out").arg(&report);
    Running::start(command).wait().expect(1).says(&["holds no metrics.jsonl and no evaluations"]);
}

#[test]
fn a_job_that_trains_nothing_asks_a_model_as_it_is() {
    let made = Job::builder().dataset(VARIED).steps(1).build();
    commit_varied(&made.dir().join("repos/varied"));
    made.run(&[]).expect(0);
    let model = made.output().join("export");
    let job = Job::builder()
        .dataset(&format!("dataset: {:?}", made.output().join("dataset")))
        .tokenizer("")
        .model(&format!("model: {{ path: {model:?} }}"))
        .steps(0)
        .section("evaluate: { holes: 2 }")
        .build();
    // More than the model has positions for, which only training needs.
    let ended = job.run(&["--set", "data.sequence_tokens=100000"]).expect(0);
    assert!(!ended.stdout.contains("checkpoints"), "{}", ended.stdout);
    let found = evaluation(&job.output().join("evaluations/tuned/dataset"));
    assert_eq!(found["subject"]["model"], json!(model));
    assert!(!job.output().join("evaluations/base").exists() && !job.output().join("checkpoints").exists());
    job.run(&["--set", "evaluate.holes=0", "--set", "evaluate.files=0"])
        .expect(78)
        .says(&["evaluate asks for nothing"]);
    // What only the last stage needs is missed at once.
    let missing = Job::builder().section("evaluate: { humaneval: nowhere.jsonl }").build();
    missing.run(&[]).expect(1).says(&["looking for what `evaluate` names:", "nowhere.jsonl: No such file"]);
    assert!(!missing.output().join("dataset").exists());
}
