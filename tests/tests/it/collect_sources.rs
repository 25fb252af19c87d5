//! `coordinator collect` from organisations, from datasets that others made, and with all that can be asked of a
//! repository's files.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tunefleet_tests::collecting::{Place, git, serve_http};
use tunefleet_tests::hub_server::{Fault, FaultKind, HubServer, TOKEN};
use tunefleet_tests::process::{Ended, Running};
use tunefleet_tests::repository;

const SECRET: &str = "ghp_hunter2hunter2";

fn run(command: Command) -> Ended {
    Running::start(command).wait()
}

/// An organisation `acme` with repositories of these names, stars and more; each has its own files.
fn organization(place: &Place, repositories: &[(&str, u64, Value)], more: &Value) {
    let mut listed = Vec::new();
    for (name, stars, extra) in repositories {
        let dir = place.path(&format!("srv/acme/{name}"));
        repository::commit(&dir, &repository::sources(&name.replace('-', "_"), 3));
        let mut entry = json!({"name": name, "stargazers_count": stars, "stars_count": stars});
        entry.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        listed.push(entry);
    }
    let mut forge = json!({"repositories": listed});
    forge.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    fs::write(place.path("srv/acme/forge.json"), forge.to_string()).unwrap();
}

fn collect(github: &Value) -> Value {
    json!({"sources": [{"github": github}], "duplicates": "keep", "validation_fraction": 0})
}

fn names(place: &Place, name: &str) -> Vec<String> {
    place.manifest(&format!("{name}/dataset")).repositories.into_iter().map(|r| r.repo_id).collect()
}

#[test]
fn an_organisation_is_listed_page_by_page_and_its_first_repositories_are_collected() {
    let place = Place::new();
    let none = json!({});
    organization(
        &place,
        &[
            ("small", 3, json!({"updated_at": "2026-03-01T00:00:00Z"})),
            ("fork", 900, json!({"fork": true})),
            ("old", 800, json!({"archived": true})),
            ("large", 50, none.clone()),
            ("unwanted", 40, none.clone()),
            ("equal", 3, none),
        ],
        &json!({"page": 2}),
    );
    let server = serve_http(&place.path("srv"), None);
    for api in ["v3", "v1"] {
        let api = format!("http://127.0.0.1:{}/api/{api}", server.port);
        for (sort, expected) in [
            ("stars", ["acme/large", "acme/equal"]),
            ("updated", ["acme/small", "acme/equal"]),
            ("name", ["acme/equal", "acme/large"]),
        ] {
            let github = json!({"org": "acme", "top": 2, "sort": sort, "exclude": ["unwanted"], "api": api});
            run(place.collect_job("job", &collect(&github))).expect(0);
            assert_eq!(names(&place, "job"), expected, "{api} {sort}");
            fs::remove_dir_all(place.path("job/dataset")).unwrap();
        }
        let all = json!({"org": "acme", "forks": true, "archived": true, "api": api});
        run(place.collect_job("job", &collect(&all))).expect(0);
        assert_eq!(names(&place, "job").len(), 6);
        fs::remove_dir_all(place.path("job/dataset")).unwrap();
    }
    let missing = json!({"org": "nobody", "api": format!("http://127.0.0.1:{}/api/v3", server.port)});
    run(place.collect_job("none", &collect(&missing))).expect(4).says(&["nobody", "GITHUB_TOKEN"]);
}

#[test]
fn a_user_is_one_as_well_and_a_limited_or_failing_api_is_asked_again() {
    let place = Place::new();
    let more = json!({"kind": "users", "faults": ["limit", 502, "cut"]});
    organization(&place, &[("only", 1, json!({}))], &more);
    let server = serve_http(&place.path("srv"), None);
    let github = json!({"org": "acme", "api": format!("http://127.0.0.1:{}/api/v3", server.port)});
    let ended = run(place.collect_job("job", &collect(&github))).expect(0);
    ended.says(&["allows no more requests", "GITHUB_TOKEN raises it"]);
    assert_eq!(names(&place, "job"), ["acme/only"]);
}

#[test]
fn a_token_opens_an_organisation_and_its_repositories_and_is_nowhere_afterwards() {
    let place = Place::new();
    organization(&place, &[("private", 1, json!({"private": true}))], &json!({}));
    let server = serve_http(&place.path("srv"), Some(&format!("x-access-token:{SECRET}")));
    let github = json!({"org": "acme", "api": format!("http://127.0.0.1:{}/api/v3", server.port)});
    run(place.collect_job("refused", &collect(&github))).expect(5).says(&["401", "Bad credentials"]);

    let mut command = place.collect_job("job", &collect(&github));
    command.env("GH_ENTERPRISE_TOKEN", SECRET);
    let ended = run(command).expect(0);
    assert!(!ended.output.contains("hunter2"), "{}", ended.output);
    let found = Command::new("grep").args(["-r", "hunter2"]).arg(place.path("job")).output().unwrap();
    assert!(found.stdout.is_empty(), "{}", String::from_utf8_lossy(&found.stdout));
    assert_eq!(names(&place, "job"), ["acme/private"]);
}

#[test]
fn a_server_that_is_silent_is_given_up_in_time_and_named() {
    let place = Place::new();
    let server = serve_http(&place.path("srv"), None);
    let silent = format!("http://127.0.0.1:{}/silent/repo", server.port);
    let job = json!({"sources": [silent], "fetch_timeout_seconds": 1});
    let began = Instant::now();
    let ended = run(place.collect_job("job", &job)).expect(5);
    ended.says(&["silent/repo", "sent nothing for 1 s", "trying again in 1 s"]);
    assert!(began.elapsed() < Duration::from_secs(60), "{:?}", began.elapsed());
}

#[test]
fn datasets_that_others_made_come_from_files_and_from_the_hub() {
    let place = Place::new();
    let row =
        |repo: &str, path: &str, text: &str| json!({"repo_id": repo, "file_path": path, "content": text});
    let train = [
        row("a/b", "src/x.py", "x = 1\n"),
        row("a/b", "./img.png", "no picture"),
        row("c/d", "../climbs.py", "y = 1\n"),
        row("c/d", "copy.py", "x = 1\n"),
        json!({"content": "unnamed = True\n"}),
    ];
    let lines = |rows: &[Value]| rows.iter().map(|row| format!("{row}\n")).collect::<String>();
    fs::create_dir_all(place.path("set/data")).unwrap();
    fs::write(place.path("set/data/train-0.jsonl"), lines(&train)).unwrap();
    fs::write(place.path("set/data/test-0.jsonl"), lines(&[row("a/b", "t.py", "held = out\n")])).unwrap();
    fs::write(place.path("set/README.md"), "not a table").unwrap();
    let table = |mut dataset: Value| {
        dataset["split"] = "train".into();
        json!({"sources": [{"dataset": dataset}], "duplicates": "drop_exact", "validation_fraction": 0})
    };
    run(place.collect_job("local", &table(json!({"path": place.path("set"), "subset": "data"})))).expect(0);
    let manifest = place.manifest("local/dataset");
    let counted: Vec<(&str, u64)> = manifest.dropped.iter().map(|(why, n)| (why.as_str(), *n)).collect();
    assert_eq!(counted, [("duplicate", 1), ("extension", 1), ("path_unsafe", 1)]);
    assert_eq!((manifest.repositories[0].repo_id.as_str(), manifest.repositories[0].files), ("set", 2));
    if let Some(rows) = place.rows("local/dataset", "arrow") {
        assert_eq!(rows["src/x.py"]["repo_id"], "a/b");
        assert_eq!(rows["data/train-0.jsonl#5"]["repo_id"], "set");
    }
    run(place.collect_job("wrong", &table(json!({"path": place.path("set"), "data_column": "text"}))))
        .expect(1)
        .says(&["train-0.jsonl", "no column \"text\"", "content, file_path, repo_id"]);

    // The same over the hub: it breaks off in the middle, goes on there, and is not asked again for what is here.
    let hub = HubServer::start(100_000);
    let bulk: Vec<Value> =
        (0..2000).map(|n| row("a/b", &format!("bulk_{n}.py"), &format!("bulk_{n} = {n}\n"))).collect();
    let (small, large) = (lines(&train), lines(&bulk));
    hub.hub().commit(
        "team/set",
        "main",
        &[
            ("README.md", b"about"),
            ("data/train-0.jsonl", small.as_bytes()),
            ("data/train-1.jsonl", large.as_bytes()),
            ("other/train.jsonl", b"[]"),
        ],
    );
    let at_hub = |name: &str, token: Option<&str>| {
        let mut command = place.collect_job(name, &table(json!({"hub": "team/set", "subset": "data"})));
        command.env("HF_ENDPOINT", &hub.url).env("NO_PROXY", "127.0.0.1,localhost");
        if let Some(token) = token {
            command.env("HF_TOKEN", token);
        }
        command
    };
    run(at_hub("closed", None)).expect(5).says(&["team/set", "401", "HF_TOKEN"]);
    let cut = Fault { on: "GET /store/".to_owned(), times: 1, kind: FaultKind::HalfAnswer(large.len() / 2) };
    hub.hub().faults.push(cut);
    run(at_hub("hub", Some(TOKEN))).expect(0);
    let manifest = place.manifest("hub/dataset");
    assert_eq!(manifest.repositories[0].repo_id, "team/set");
    assert_eq!(manifest.repositories[0].files, 2002);
    assert_eq!(manifest.repositories[0].commit, format!("{:040x}", 1));
    assert_eq!(hub.hub().count("GET /store/"), 2);
    assert!(!hub.hub().token_leaked);
    let cache = place.path("home/.cache/huggingface/hub/datasets--team--set");
    assert_eq!(fs::read_to_string(cache.join("refs/main")).unwrap(), format!("{:040x}", 1));
    assert_eq!(fs::read_dir(cache.join("blobs")).unwrap().count(), 2);

    let asked = hub.hub().requests.len();
    let mut offline = at_hub("offline", None);
    offline.env("HF_HUB_OFFLINE", "1");
    run(offline).expect(0);
    assert_eq!(place.manifest("offline/dataset").digest(), manifest.digest());
    assert_eq!(hub.hub().requests.len(), asked);
}

#[test]
fn a_download_that_is_not_what_was_promised_is_refused() {
    let place = Place::new();
    let hub = HubServer::start(100_000);
    hub.hub().is_public = true;
    hub.hub().commit("team/set", "main", &[("train.parquet", b"first content")]);
    // The store gives other bytes of the same length.
    let oid = hub.hub().objects.keys().next().unwrap().clone();
    hub.hub().objects.insert(oid, b"other content".to_vec());
    let mut command = place.collect_job("job", &json!({"sources": [{"dataset": {"hub": "team/set"}}]}));
    command.env("HF_ENDPOINT", &hub.url).env("NO_PROXY", "127.0.0.1,localhost");
    run(command).expect(5).says(&["train.parquet", "digest"]);
    let blobs = place.path("home/.cache/huggingface/hub/datasets--team--set/blobs");
    assert_eq!(fs::read_dir(blobs).unwrap().count(), 0);
}

fn commit_on(dir: &Path, day: &str, path: &str, text: &str) {
    fs::write(dir.join(path), text).unwrap();
    git(dir, &["add", "."]);
    let date = format!("{day}T12:00:00Z");
    let mut command = Command::new("git");
    command.arg("-C").arg(dir).args(["-c", "user.name=T", "-c", "user.email=t@example.invalid"]);
    command.args(["commit", "--quiet", "-m", path]).env("GIT_AUTHOR_DATE", &date);
    assert!(command.env("GIT_COMMITTER_DATE", &date).status().unwrap().success());
}

/// Number of rows of (training, validation).
fn parts(place: &Place, name: &str) -> (u64, u64) {
    let manifest = place.manifest(&format!("{name}/dataset"));
    let rows = |segments: &[tunefleet_proto::dataset::Segment]| segments.iter().map(|s| s.rows).sum();
    (rows(&manifest.train), rows(&manifest.validation))
}

#[test]
fn the_split_is_by_repository_by_day_or_by_file_with_those_that_are_alike_together() {
    let place = Place::new();
    for name in ["a", "b", "c", "d"] {
        repository::commit(&place.path(&format!("srv/org/{name}")), &repository::sources(name, 4));
    }
    let paths: Vec<_> =
        ["a", "b", "c", "d"].iter().map(|name| place.path(&format!("srv/org/{name}"))).collect();
    let by_repository = json!({"sources": paths, "duplicates": "keep", "split_by": "repository",
        "validation_fraction": 0.25});
    run(place.collect_job("repository", &by_repository)).expect(0);
    let (train, validation) = parts(&place, "repository");
    assert!(train + validation == 16 && validation > 0 && validation % 4 == 0, "{train} {validation}");

    let repo = place.path("srv/org/a");
    commit_on(&repo, "2026-03-01", "new.py", "new = 1\n");
    commit_on(&repo, "2026-05-01", "newer.py", "newer = 1\n");
    commit_on(&repo, "2026-02-01", "src/a_0.py", "changed = 1\n");
    let server = serve_http(&place.path("srv"), None);
    let url = format!("http://127.0.0.1:{}/org/a/.git", server.port);
    for source in [repo.display().to_string(), url] {
        for (day, expected) in [("2026-04-01", (5, 1)), ("2026-02-01", (3, 3)), ("2027-01-01", (6, 0))] {
            let by_date = json!({"sources": [source], "duplicates": "keep", "split_by": "date",
                "validation_since": day});
            run(place.collect_job("date", &by_date)).expect(0);
            assert_eq!(parts(&place, "date"), expected, "{source} {day}");
        }
    }

    // Forty families of five files each that are alike: no family is on both sides.
    let text = |family: usize, member: usize| {
        let line = |n: usize| format!("value_{family}_{n} = compute_{family}({n}, {})\n", family * n);
        format!("member = {member}\n{}", (0..40).map(line).collect::<String>())
    };
    let family = |n: usize| (format!("f{}/m{}.py", n / 5, n % 5), text(n / 5, n % 5));
    repository::commit(&place.path("alike"), &(0..200).map(family).collect::<Vec<_>>());
    let alike = json!({"sources": [place.path("alike")], "duplicates": "keep", "validation_fraction": 0.3});
    run(place.collect_job("alike", &alike)).expect(0);
    let (train, validation) = parts(&place, "alike");
    assert_eq!((train + validation, train % 5, validation % 5), (200, 0, 0));
    assert!(validation > 0);
}

#[test]
fn wrong_sources_and_splits_are_refused_with_their_places() {
    let place = Place::new();
    let job = json!({
        "sources": [{"github": {"top": 3}}, {"dataset": {"hub": "a/b/c"}}, {"dataset": {}},
            {"github": {"org": "a b", "api": "https://me:secret@host"}},
            {"dataset": {"path": "x", "revision": "main", "split": "../x"}}],
        "split_by": "date", "allow_licenses": ["Apache 2"], "fetch_timeout_seconds": 0,
    });
    let ended = run(place.collect_job("job", &job)).expect(78);
    ended.says(&[
        "sources[0].github lacks org",
        "\"a/b/c\" is no dataset of the hub",
        "needs path or hub",
        "\"a b\" is no name",
        "without credentials",
        "revision is of use only with hub",
        "must be a name inside the dataset",
        "needs collect.validation_since",
        "\"Apache 2\" is no SPDX identifier",
        "fetch_timeout_seconds must be 1 to 86400",
    ]);
    let unknown = json!({"sources": [{"githab": {}}, {"github": {"orgg": "x"}}]});
    run(place.collect_job("unknown", &unknown)).expect(78).says(&[
        "unknown key \"githab\"",
        "lacks location, github or dataset",
        "did you mean \"org\"",
    ]);
    let day = json!({"sources": ["x"], "split_by": "date", "validation_since": "2026-02-30"});
    run(place.collect_job("day", &day)).expect(78).says(&["a day as YYYY-MM-DD", "2026-02-30"]);
}

#[test]
fn attributes_licences_encodings_and_evaluation_tasks_decide_what_is_kept() {
    let place = Place::new();
    let task =
        "Return the sum of all the numbers that are given, however many, and nothing for an empty list.";
    let file = |path: &str, bytes: &[u8]| (path.to_owned(), bytes.to_vec());
    let mit = "Permission is hereby granted, free of charge, to any person obtaining a copy of this software and \
        associated documentation files (the \"Software\"), to deal in the Software without restriction, including \
        without limitation the rights to use, copy, modify, merge, publish, distribute, sublicense, and/or sell \
        copies of the Software, and to permit persons to whom the Software is furnished to do so, subject to the \
        following conditions:\n\nThe above copyright notice and this permission notice shall be included in all \
        copies or substantial portions of the Software.\n\nTHE SOFTWARE IS PROVIDED \"AS IS\", WITHOUT WARRANTY OF \
        ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY, FITNESS FOR A \
        PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR \
        ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM, \
        OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.\n";
    // In lines, as such files are.
    let mut license = String::new();
    for word in mit.split(' ') {
        let line_chars = license.len() - license.rfind('\n').unwrap_or(0);
        license += if line_chars + word.len() > 70 { "\n" } else { " " };
        license += word;
    }
    let notebook = json!({"cells": [{"cell_type": "code", "source": "x = 1", "outputs": []}]}).to_string();
    let files = [
        file("LICENSE", license.as_bytes()),
        file(".gitattributes", b"lib/** linguist-vendored\n*.gen.py linguist-generated\n"),
        file("lib/copied.py", b"copied = 1\n"),
        file("api.gen.py", b"api = 1\n"),
        file("gpl.py", b"# SPDX-License-Identifier: GPL-3.0-only\ngpl = 1\n"),
        file("latin.py", b"name = 'caf\xe9'\n"),
        file("solved.py", format!("def f(n):\n    '''{task}'''\n").as_bytes()),
        file("note.ipynb", notebook.as_bytes()),
        file("own.py", b"own = 1\n"),
    ];
    repository::commit_bytes(&place.path("repo"), &files);
    fs::write(
        place.path("tasks.jsonl"),
        json!({"prompt": format!("def f(n):\n    \"\"\"{task}\"\"\"\n")}).to_string(),
    )
    .unwrap();
    let job = |more: Value| {
        let mut job = json!({"sources": [place.path("repo")], "validation_fraction": 0});
        job.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        job
    };
    let dropped = |name: &str| -> Vec<(String, u64)> {
        place.manifest(&format!("{name}/dataset")).dropped.into_iter().collect()
    };
    let counts =
        |counts: &[(&str, u64)]| counts.iter().map(|(why, n)| ((*why).to_owned(), *n)).collect::<Vec<_>>();
    run(place.collect_job("plain", &job(json!({})))).expect(0);
    assert_eq!(dropped("plain"), counts(&[("generated", 1), ("invalid_utf8", 1), ("vendored", 1)]));
    assert_eq!(place.manifest("plain/dataset").repositories[0].licenses, ["MIT"]);

    let strict = json!({"keep_vendored": true, "keep_generated": true, "encodings": "convert",
        "deny_licenses": ["GPL-3.0"], "decontaminate": [place.path("tasks.jsonl")], "notebooks": "structured"});
    run(place.collect_job("strict", &job(strict))).expect(0);
    assert_eq!(dropped("strict"), counts(&[("contaminated", 1), ("license", 1)]));
    if let Some(rows) = place.rows("strict/dataset", "arrow") {
        assert_eq!(rows["latin.py"]["content"], "name = 'caf\u{e9}'\n");
        let expected = "<jupyter_start><jupyter_text>empty<jupyter_code>x = 1<empty_output>";
        assert_eq!(rows["note.ipynb"]["content"], expected);
    }
    run(place.collect_job("denied", &job(json!({"allow_licenses": ["Apache-2.0"]})))).expect(0);
    assert_eq!(dropped("denied"), counts(&[("license", 9)]));
    let missing = json!({"decontaminate": [place.path("gone.jsonl")]});
    run(place.collect_job("missing", &job(missing))).expect(1).says(&["gone.jsonl", "collect.decontaminate"]);
}
