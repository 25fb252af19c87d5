//! The documents are true: links lead somewhere, and the manual is that of the code.

use std::fs;
use std::path::{Path, PathBuf};

use tunefleet_proto::job::{ManualEntry, manual};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

fn documents() -> Vec<PathBuf> {
    let mut found = Vec::new();
    for dir in [root(), root().join("docs"), root().join("tests/parity")] {
        let entries = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
        found.extend(entries.filter(|path| path.extension().is_some_and(|e| e == "md")));
    }
    assert!(found.len() > 8, "{found:?}");
    found
}

#[test]
fn every_link_leads_to_a_file() {
    for document in documents() {
        let text = fs::read_to_string(&document).unwrap();
        for link in text.split("](").skip(1).filter_map(|rest| rest.split_once(')').map(|(link, _)| link)) {
            if link.contains("://") || link.starts_with('#') {
                continue;
            }
            let path = document.parent().unwrap().join(link.split('#').next().unwrap());
            assert!(path.exists(), "{}: {link}", document.display());
        }
    }
}

#[test]
fn the_job_file_page_is_that_of_the_code() {
    let path = root().join("docs/job-file.md");
    let text = page(&manual());
    if std::env::var_os("TUNEFLEET_BLESS").is_some() {
        fs::write(&path, &text).unwrap();
    }
    let found = fs::read_to_string(&path).unwrap_or_default();
    assert!(found == text, "docs/job-file.md is out of date: make docs");
}

fn page(entries: &[ManualEntry]) -> String {
    let mut text =
        "# The job file\n\nGenerated from the comments of `proto/src/job/file.rs` by `make docs`; \
                    `coordinator validate --keys` prints the same.\nRelative paths begin at the job file.\n"
            .to_owned();
    let mut section = None;
    for ManualEntry { key, kind, text: meaning } in entries {
        let own = key.split_once('.').map_or("", |(section, _)| section);
        if section != Some(own) {
            let title = if own.is_empty() { "Top level".to_owned() } else { format!("`{own}`") };
            text += &format!("\n## {title}\n\n| key | value | meaning |\n| --- | --- | --- |\n");
            section = Some(own);
        }
        let meaning = meaning.split_whitespace().collect::<Vec<_>>().join(" ").replace('|', "\\|");
        text += &format!("| `{key}` | {kind} | {meaning} |\n");
    }
    text
}
