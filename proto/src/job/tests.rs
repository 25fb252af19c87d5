//! The job file from outside: what is taken, what is refused, and that nothing panics.

use std::path::{Path, PathBuf};

use proptest::prelude::*;

use super::*;

const MINIMAL: &str = "collect: {sources: [a]}\nmodel: {init: {preset: demo}}\n";

fn load_text(text: &str, overrides: &[&str]) -> Result<JobSpec, Diagnostics> {
    let overrides: Vec<String> = overrides.iter().map(|&text| text.to_owned()).collect();
    load(Path::new("jobs/demo.yaml"), text, &overrides, Path::new("/home/ann"))
}

fn faults(text: &str, overrides: &[&str]) -> Vec<String> {
    let diagnostics = load_text(text, overrides).unwrap_err();
    diagnostics.to_string().lines().map(str::to_owned).collect()
}

#[test]
fn a_misspelt_key_a_wrong_type_and_a_contradiction_are_reported_at_once() {
    let text = "\
name: demo
collect:
  sources: [../..]
model:
  init: {preset: demo}
train:
  learing_rate: 1e-3
  steps: many
  warmup_steps: 10
workers:
  coordinator: http://control:7070
  slots: 2
";
    assert_eq!(
        faults(text, &[]),
        [
            "jobs/demo.yaml:7:3: unknown key \"learing_rate\" in train (did you mean \"learning_rate\"?)",
            "jobs/demo.yaml:8:10: train.steps: expected a whole number, got \"many\"",
            "jobs/demo.yaml:12:10: workers.slots and workers.coordinator (line 11) contradict each other: the \
             control plane's workers have their own slots",
        ]
    );
}

#[test]
fn the_smallest_job_file_gets_the_documented_defaults() {
    let spec = load_text(MINIMAL, &[]).unwrap();
    assert_eq!(spec.name, "demo");
    assert_eq!(spec.output, PathBuf::from("/home/ann/jobs/runs/demo"));
    assert_eq!(spec.tokenizer, TokenizerSpec::Train { vocab_size: 4096 });
    assert_eq!(spec.data.sequence_tokens, 1024, "the demo preset's positions");
    assert_eq!((spec.data.fim_rate, spec.data.fim_level), (0.5, FimLevel::Window));
    assert_eq!((spec.train.steps, spec.train.warmup_steps, spec.train.ranks), (2000, 30, 1));
    assert_eq!((spec.train.learning_rate, spec.train.betas), (5e-5, (0.9, 0.999)));
    let DatasetSpec::Collect(collect) = spec.dataset else { panic!("no collect") };
    assert_eq!(collect.filters, default_filters());
    assert_eq!(*collect, CollectSpec::of(vec![SourceSpec::repository("/home/ann/jobs/a")]));
    let spec = load_text("dataset: /d\nmodel: {path: m}\ntrain: {steps: 50}\n", &[]).unwrap();
    assert_eq!(spec.tokenizer, TokenizerSpec::FromModel);
    assert_eq!(spec.tokenizer_dir(), PathBuf::from("/home/ann/jobs/m"));
    assert_eq!((spec.data.sequence_tokens, spec.train.warmup_steps), (2048, 5));
}

#[test]
fn overrides_come_before_the_checks_and_their_paths_start_at_the_current_directory() {
    let overrides = [
        "train.steps=7",
        "collect.sources+=../other",
        "collect.sources+=https://host/org/repo",
        "collect.sources+={location: git@host:org/x, revision: 1.10}",
        "collect.exclude_extensions+=.SVG",
        "train.betas=[0.8, 0.9]",
        "output=out",
    ];
    let spec = load_text(MINIMAL, &overrides).unwrap();
    assert_eq!((spec.train.steps, spec.train.betas), (7, (0.8, 0.9)));
    assert_eq!(spec.output, PathBuf::from("/home/ann/out"));
    let DatasetSpec::Collect(collect) = spec.dataset else { panic!("no collect") };
    let [first, other, url, SourceSpec::Repository(pinned)] = &collect.sources[..] else {
        panic!("{collect:?}")
    };
    for (source, location) in
        [(first, "/home/ann/jobs/a"), (other, "/home/other"), (url, "https://host/org/repo")]
    {
        assert_eq!(*source, SourceSpec::repository(location));
    }
    assert_eq!((pinned.location.as_str(), pinned.revision.as_deref()), ("git@host:org/x", Some("1.10")));
    let mut extensions = default_filters().exclude_extensions;
    extensions.push("svg".to_owned());
    assert_eq!(collect.filters.exclude_extensions, extensions);
    // Nothing written is the default again, so that an override can take a key away.
    let spec = load_text(MINIMAL, &["collect=", "dataset=d"]).unwrap();
    assert_eq!(spec.dataset, DatasetSpec::Existing("/home/ann/d".into()));
}

#[test]
fn faults_of_overrides_name_the_override_and_come_last() {
    let text = "collect: {sources: [a]}\nmodel: {init: {preset: demo}}\nname: 5\nexprot: {}\n";
    let overrides = ["train.steps=2000000000", "train.stepz=4", "name.first=x", "train", "name+=x", ".a=1"];
    assert_eq!(
        faults(text, &overrides),
        [
            "jobs/demo.yaml:4:1: unknown key \"exprot\" (did you mean \"export\"?)",
            "--set .a=1: \".a\" is not a key: write section.key=value",
            "--set name+=x: += adds to a list, but name is \"5\"",
            "--set name.first=x: name is \"5\", so it has no key \"first\"",
            "--set train: must look like key=value, e.g. train.steps=100",
            "--set train.steps=2000000000: train.steps must be 0 to 1000000000, got 2000000000",
            "--set train.stepz=4: unknown key \"stepz\" in train (did you mean \"steps\"?)",
        ]
    );
}

#[test]
fn every_rule_names_its_place_and_the_value() {
    let cases = [
        ("train: {ranks: 0}", "train.ranks must be 1 to 1024, got 0"),
        ("train: {ranks: -1}", "train.ranks: expected a whole number from 0 to 4294967295, got \"-1\""),
        ("train: {ranks: 2.5}", "train.ranks: expected a whole number, got \"2.5\""),
        ("train: {learning_rate: 0}", "train.learning_rate must be above 0 to 1, got 0"),
        ("train: {dropout: 1}", "train.dropout must be 0 to below 1, got 1"),
        ("train: {learning_rate: .nan}", "train.learning_rate: expected a number, got \".nan\""),
        ("train: {betas: [0.9, 1.0]}", "train.betas must each be 0 to below 1, got [0.9, 1]"),
        ("train: {betas: 0.9}", "train.betas: expected a list of two numbers, got \"0.9\""),
        ("train: {schedule: cosin}", "constant, polynomial, got \"cosin\" (did you mean \"cosine\"?)"),
        ("train: {recompute: true}", "train.recompute: expected all, none or every N, got true: write all"),
        ("train: {recompute: every 0}", "all, none or every N (N from 1 to 1024), got \"every 0\""),
        ("train: {strategy: hybrid_shard}", "train.strategy hybrid_shard needs train.shard_ranks"),
        (
            "train: {strategy: hybrid_shard, ranks: 8, shard_ranks: 3}",
            "train.shard_ranks must divide train.ranks (8), got 3",
        ),
        ("train: {shard_ranks: 2, ranks: 4}", "train.shard_ranks is for train.strategy hybrid_shard alone"),
        ("train: {final_learning_rate: 1}", "train.final_learning_rate must be 0 to 0.00005, got 1"),
        ("train: {early_stopping_min_delta: 0.1}", "without train.early_stopping_evaluations"),
        (
            "train: {early_stopping_evaluations: 3, eval_every_steps: 0}",
            "train.early_stopping_evaluations needs evaluations",
        ),
        ("train: {keep_best: true, eval_every_steps: 0}", "train.keep_best needs evaluations"),
        ("train: {steps: 5, warmup_steps: 9}", "train.steps is 5 (line 3): warm-up would never end"),
        ("train: {steps: 5, steps: 6}", "key \"steps\" is given twice"),
        ("train: [1]", "train: expected a mapping of keys to values, got a list"),
        ("data: {sequence_tokens: 2048}", "data.sequence_tokens is 2048, but the model has 1024 positions"),
        (
            "data: {packing: seed_compatible, fim_level: window}",
            "data.fim_level window contradicts data.packing",
        ),
        (
            "data: {packing: seed_compatible, document_mask: true}",
            "data.document_mask contradicts data.packing seed_compatible, whose documents see each other",
        ),
        ("tokenizer: {train: {vocab_size: 5000}}", "the model's embedding has 4096 rows"),
        ("tokenizer: {train: {vocab_size: 10}}", "tokenizer.train.vocab_size must be 275 to 1000000, got 10"),
        ("tokenizer: {train: {}, path: x}", "tokenizer.path and tokenizer.train (line 3) contradict"),
        ("tokenizer: {from_model: true}", "tokenizer.from_model contradicts model.init"),
        ("dataset: d", "dataset and collect (line 1) contradict each other: keep one"),
        ("workers: {slots: 2}\ntrain: {ranks: 4}", "workers.slots is 2, but train.ranks is 4"),
        ("workers: {coordinator: 'host:80'}", "workers.coordinator must look like http://host:port"),
        ("name: ../x", "name must begin with a letter or digit"),
        ("name: true", "name: expected text (put quotes around it), got true"),
        ("output: ~/runs", "write the whole path"),
    ];
    for (text, expected) in cases {
        let lines = faults(&format!("{MINIMAL}{text}\n"), &[]);
        assert_eq!(lines.len(), 1, "{text}: {lines:?}");
        assert!(
            lines[0].starts_with("jobs/demo.yaml:3:") && lines[0].contains(expected),
            "{text}: {lines:?}"
        );
    }
    let cases = [
        ("sources: []", "collect.sources must hold 1 to 10000 repositories, got 0"),
        ("sources: a", "collect.sources: expected a list"),
        ("sources: [a, ./a]", "collect.sources[1]: \"/home/ann/jobs/a\" was given already (line 2)"),
        ("sources: [{revision: x}]", "collect.sources[0]: lacks location"),
        ("sources: ['https://ann:pw@host/x']", "collect.sources[0]: must not hold a user name"),
        ("sources: [a]\n  exclude_extensions: [tar.gz]", "collect.exclude_extensions: \"tar.gz\""),
        ("sources: [a]\n  exclude_path_parts: [a/b]", "collect.exclude_path_parts: \"a/b\""),
        ("max_file_bytes: 1", "collect lacks sources"),
    ];
    for (text, expected) in cases {
        let lines = faults(&format!("collect:\n  {text}\nmodel: {{init: {{preset: demo}}}}\n"), &[]);
        assert_eq!(lines.len(), 1, "{text}: {lines:?}");
        assert!(lines[0].contains(expected), "{text}: {lines:?}");
    }
    let text = format!("{MINIMAL}train: {{eval_every_steps: 5}}\n");
    let lines = faults(&text, &["collect.validation_fraction=0"]);
    assert!(lines[0].contains("no file is held out to evaluate on"), "{lines:?}");
}

#[test]
fn sources_of_every_kind_survive_their_journey_as_json() {
    let sources = "[a, {location: b, revision: c}, {github: {org: o, top: 3, api: 'https://h/api/v1/'}}, \
                   {dataset: {hub: o/n, subset: data}}, {dataset: {path: rows.csv, data_column: text}}]";
    let text = format!(
        "collect: {{sources: {sources}, split_by: date, validation_since: 2026-02-28}}\n\
                        model: {{init: {{preset: demo}}}}\n"
    );
    let spec = load_text(&text, &[]).unwrap();
    let json = serde_json::to_string(&spec).unwrap();
    assert_eq!(serde_json::from_str::<JobSpec>(&json).unwrap(), spec);
    let DatasetSpec::Collect(collect) = spec.dataset else { panic!("no collect") };
    assert_eq!(collect.split_by, SplitBy::Date("2026-02-28".to_owned()));
    let [_, _, SourceSpec::Organization { github }, _, SourceSpec::Table { dataset }] = &collect.sources[..]
    else {
        panic!("{collect:?}")
    };
    assert_eq!((github.top, github.api.as_str()), (Some(3), "https://h/api/v1"));
    assert_eq!((dataset.from.as_str(), dataset.column.as_deref()), ("/home/ann/jobs/rows.csv", Some("text")));
}

#[test]
fn days_are_counted_as_the_calendar_has_them() {
    for (day, seconds) in [
        ("1970-01-01", Some(0)),
        ("1972-03-01", Some(790 * 86_400)),
        ("2000-02-29", Some(951_782_400)),
        ("2026-11-27", Some(1_795_737_600)),
        ("2026-02-29", None),
        ("2026-13-01", None),
        ("1969-12-31", None),
        ("2026-1-1", None),
        ("+026-01-01", None),
        ("2026-01-01T00", None),
        ("", None),
    ] {
        assert_eq!(day_start(day), seconds, "{day}");
    }
}

#[test]
fn an_empty_file_is_told_what_it_lacks() {
    for text in ["", "# nothing\n", "---\n", "{}"] {
        let lines = faults(text, &[]);
        assert_eq!(lines.len(), 2, "{lines:?}");
        assert!(lines.iter().any(|line| line.contains("lacks the code to learn from")), "{lines:?}");
        assert!(lines.iter().any(|line| line.contains("lacks the model")), "{lines:?}");
    }
    assert_eq!(
        faults("- 1\n", &[]),
        ["jobs/demo.yaml:1:1: the job file: expected a mapping of keys to values, got a list"]
    );
}

#[test]
fn anchors_and_aliases_work_and_faults_in_them_have_a_place() {
    let text = format!("{MINIMAL}train: {{steps: &n 12, log_every_steps: *n}}\n");
    let spec = load_text(&text, &[]).unwrap();
    assert_eq!((spec.train.steps, spec.train.log_every_steps), (12, 12));
}

#[test]
fn a_spec_survives_its_journey_as_json() {
    let spec = load_text(MINIMAL, &["train.dropout=0.1"]).unwrap();
    let text = serde_json::to_string(&spec).unwrap();
    assert_eq!(serde_json::from_str::<JobSpec>(&text).unwrap(), spec);
}

proptest! {
    #[test]
    fn arbitrary_text_never_panics(text in "\\PC*", argument in "\\PC*") {
        let _ = load_text(&text, &[&argument]);
    }

    #[test]
    fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
        let _ = load_text(&String::from_utf8_lossy(&bytes), &[]);
    }

    #[test]
    fn mutilated_job_files_never_panic_and_faults_are_one_line_each(
        from in 0usize..400, len in 0usize..40, with in "[a-z:{}\\[\\]&*!|>'\"#,\n -]{0,20}",
    ) {
        let whole = "collect:\n  sources:\n    - {location: a, revision: b}\n    - c\nmodel:\n  init: {preset: tiny}\n\
                     train:\n  steps: 5\n  betas: [0.9, 0.99]\nworkers: {slots: 2}\n";
        let from = from.min(whole.len());
        let to = (from + len).min(whole.len());
        let text = format!("{}{with}{}", &whole[..from], &whole[to..]);
        if let Err(diagnostics) = load_text(&text, &[]) {
            prop_assert_eq!(diagnostics.to_string().lines().count(), diagnostics.list().len());
        }
    }
}
