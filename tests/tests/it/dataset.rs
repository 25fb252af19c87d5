//! `coordinator dataset`: what is in a dataset, what differs between two, one to the hub; and datasets that come out the
//! same whatever happened on the way.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::thread::sleep;
use std::time::Duration;

use rand::RngExt;
use serde_json::{Value, json};
use tunefleet_tests::collecting::{Place, git};
use tunefleet_tests::hub_server::{Content, HubServer, TOKEN};
use tunefleet_tests::process::{Ended, Running};
use tunefleet_tests::{programs, repository, skip};

fn run(command: Command) -> Ended {
    Running::start(command).wait()
}

fn dataset(place: &Place, arguments: &[&str]) -> Ended {
    run(place.coordinator(&[&["dataset"], arguments].concat()))
}

/// A dataset `out` of a repository `repo` with some kinds of files.
fn collected(place: &Place) -> String {
    let mut files = repository::sources("x", 20);
    files.push(("README.md".to_owned(), "# About <script>alert(1)</script>\n".to_owned()));
    files.push(("deep/er/a.rs".to_owned(), "fn main() {}\n".to_owned()));
    files.push(("logo.png".to_owned(), "no picture".to_owned()));
    repository::commit(&place.path("repo"), &files);
    let options = ["--validation-fraction", "0.2", "--duplicates", "keep"];
    let mut command = place.coordinator(&["collect"]);
    command.arg(place.path("repo")).arg("--out").arg(place.path("out")).args(options);
    run(command).expect(0);
    place.path("out").display().to_string()
}

#[test]
fn a_dataset_is_inspected_in_words_in_json_and_on_a_page_that_needs_no_other_file() {
    let place = Place::new();
    let out = collected(&place);
    let page = place.path("page.html").display().to_string();
    // A token for each word and each run of signs.
    let words = json!({"version": "1.0", "added_tokens": [], "pre_tokenizer": {"type": "Whitespace"},
        "model": {"type": "WordLevel", "vocab": {"[UNK]": 0}, "unk_token": "[UNK]"}});
    fs::write(place.path("tokenizer.json"), words.to_string()).unwrap();
    let tokenizer = place.dir().display().to_string();
    dataset(&place, &["inspect", &out]).expect(0).says(&["repo", "py", "extension 1", "median", "digest"]);
    let ended = dataset(
        &place,
        &["inspect", &out, "--json", "--html", &page, "--samples", "22", "--tokenizer", &tokenizer],
    )
    .expect(0);
    let report: Value = serde_json::from_str(&ended.stdout).unwrap();
    let files = |part: &str| report[part]["files"].as_u64().unwrap();
    assert_eq!(files("train") + files("validation"), 22);
    assert_eq!(report["extensions"]["py"]["files"], 20);
    assert_eq!(report["dropped"], json!({"extension": 1}));
    let tokens = report["train"]["tokens"].as_u64().unwrap();
    assert!(tokens > 1000 && tokens < report["train"]["content_bytes"].as_u64().unwrap(), "{tokens}");
    assert!(report["file_tokens"]["longest"].as_u64().unwrap() > 100);
    assert!(report["file_tokens"]["by_power"].as_object().unwrap().len() > 1, "files of one length alone");
    assert_eq!(report["samples"].as_array().unwrap().len(), 22);

    let html = fs::read_to_string(&page).unwrap();
    assert!(html.contains("<svg") && html.contains("Text by extension") && html.contains("Tokens of files"));
    assert!(html.contains("&lt;script&gt;") && !html.contains("<script"), "markup of a file got through");
    assert!(!html.contains("http://") && !html.contains("https://") && !html.contains("src="), "{html}");

    let missing = place.path("gone").display().to_string();
    dataset(&place, &["inspect", &missing]).expect(4).says(&["gone", "coordinator collect"]);
    dataset(&place, &["inspect", &out, "--tokenizer", &missing]).expect(1).says(&["gone", "tokenizer.json"]);
    // A byte in the middle of a segment.
    let segment = place.path("out/train-00000.arrow");
    let mut bytes = fs::read(&segment).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(&segment, &bytes).unwrap();
    dataset(&place, &["inspect", &out]).expect(1).says(&["train-00000.arrow", "SHA-256", "damaged"]);
    bytes.truncate(middle);
    fs::write(&segment, &bytes).unwrap();
    dataset(&place, &["inspect", &out]).expect(1).says(&["train-00000.arrow", "the manifest says"]);
}

#[test]
fn what_differs_between_two_datasets_is_named() {
    let place = Place::new();
    let a = collected(&place);
    repository::commit_more(&place.path("repo"), "added.py", "added = 1\n");
    repository::commit_more(&place.path("repo"), "README.md", "# Another\n");
    fs::remove_file(place.path("repo/deep/er/a.rs")).unwrap();
    git(&place.path("repo"), &["rm", "--quiet", "--cached", "deep/er/a.rs"]);
    repository::commit_more(&place.path("repo"), "added.py", "added = 2\n");
    let mut command = place.coordinator(&["collect"]);
    command.arg(place.path("repo")).arg("--out").arg(place.path("b"));
    command.args(["--validation-fraction", "0.2", "--duplicates", "drop_exact"]);
    run(command).expect(0);
    let b = place.path("b").display().to_string();
    dataset(&place, &["diff", &a, &b]).expect(0).says(&[
        "duplicates: \"keep\" -> \"drop_exact\"",
        "1 removed",
        "- repo:deep/er/a.rs",
        "1 added",
        "+ repo:added.py",
        "1 changed",
        "~ repo:README.md",
        "20 the same",
    ]);
    let ended = dataset(&place, &["diff", &a, &a, "--json"]).expect(0);
    let none: Value = serde_json::from_str(&ended.stdout).unwrap();
    assert_eq!((&none["same_files"], &none["settings"]), (&json!(22), &json!({})));
}

#[test]
fn a_pushed_dataset_is_found_by_the_hubs_own_client() {
    let place = Place::new();
    let out = collected(&place);
    let hub = HubServer::start(10_000);
    let push = || {
        let mut command = place.coordinator(&["dataset", "push", &out, "team/code", "--private"]);
        command.env("HF_ENDPOINT", &hub.url).env("HF_TOKEN", TOKEN).env("NO_PROXY", "127.0.0.1,localhost");
        run(command).expect(0)
    };
    push().says(&["/datasets/team/code: commit"]);
    push().says(&["has these files already"]);
    let files = hub.hub().repositories["team/code"].branches["main"].files.clone();
    let names: Vec<&str> = files.keys().map(String::as_str).collect();
    assert_eq!(names, ["README.md", "manifest.json", "train-00000.arrow", "validation-00000.arrow"]);
    assert!(matches!(files["train-00000.arrow"], Content::Stored(_)));
    assert!(!hub.hub().token_leaked);

    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let python = root.join(".venv/bin/python");
    if !python.exists() {
        return skip(
            "the pushed dataset is loaded by Python's `datasets`, which `make setup-tests` installs",
        );
    }
    let mut command = Command::new(python);
    command.arg(root.join("tests/collect/load_from_hub.py")).arg("team/code");
    for name in ["HF_HUB_OFFLINE", "HF_TOKEN_PATH"] {
        command.env_remove(name);
    }
    command.env("HF_HOME", place.path("hf")).env("HF_TOKEN", TOKEN).env("NO_PROXY", "127.0.0.1,localhost");
    let output = command.env("HF_ENDPOINT", &hub.url).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let found: Value = serde_json::from_slice(&output.stdout).unwrap();
    let manifest = place.manifest("out");
    assert_eq!(found["train"], manifest.train[0].rows);
    assert_eq!(found["validation"], manifest.validation[0].rows);

    let refused = place.coordinator(&["dataset", "push", &out, "team/code"]);
    run(refused).expect(1).says(&["no token to push with"]);
}

#[test]
fn a_collection_that_is_killed_at_any_moment_and_run_again_gives_the_same_dataset() {
    let place = Place::new();
    let lines =
        |n: usize| (0..200).map(|line| format!("value_{n}_{line} = {n} * {line}\n")).collect::<String>();
    for name in ["a", "b", "c"] {
        let file = |n: usize| (format!("{name}/f{n}.py"), lines(n));
        repository::commit(&place.path(name), &(0..400).map(file).collect::<Vec<_>>());
    }
    let urls: Vec<String> =
        ["a", "b", "c"].iter().map(|name| format!("file://{}", place.path(name).display())).collect();
    let urls: Vec<&str> = urls.iter().map(String::as_str).collect();
    let options = ["--duplicates", "drop_near"];
    place.collect("whole", &urls, &options).expect(0);
    place.collect("again", &urls, &options).expect(0);
    let (whole, again) = (place.manifest("whole"), place.manifest("again"));
    assert_eq!(whole.train, again.train);
    assert_eq!(whole, again);

    let mut random = rand::rng();
    for number in 0..10 {
        let out = format!("killed-{number}");
        let mut command = Command::new(programs::coordinator());
        command.arg("collect").args(&urls).arg("--out").arg(place.path(&out)).args(options);
        command.args(["--validation-fraction", "0"]).env("HOME", place.path("home"));
        let mut child =
            command.stderr(std::process::Stdio::null()).stdout(std::process::Stdio::null()).spawn().unwrap();
        sleep(Duration::from_millis(random.random_range(5..1500)));
        child.kill().unwrap();
        child.wait().unwrap();
        place.collect(&out, &urls, &options).expect(0);
        assert_eq!(place.manifest(&out), whole, "{out}");
        assert!(!place.path(&format!("{out}.incomplete")).exists());
    }
}
