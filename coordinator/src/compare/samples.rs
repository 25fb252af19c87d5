//! Completions of the same holes side by side, also those of an OpenAI-compatible server, or of a file in which somebody
//! recorded another assistant's.

use std::collections::BTreeMap;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;
use serde_json::{Value, json};
use tunefleet_proto::digest_hex;
use tunefleet_proto::evaluation::Filled;

use super::Error;
use super::document::Sample;
use super::runs::json_lines;

/// Environment variable with the token that a server asks for.
pub const TOKEN_VARIABLE: &str = "TUNEFLEET_COMPARE_TOKEN";
/// Lines around a hole that are shown.
const SHOWN_LINES: usize = 8;
/// Tokens of an asked completion.
const MAX_TOKENS: u32 = 128;
const PATIENCE: Duration = Duration::from_secs(60);
/// Longest answer that is read.
const MAX_ANSWER_BYTES: usize = 4 << 20;

/// Another assistant.
#[derive(Debug, Clone, PartialEq)]
pub struct Other {
    /// What it is called.
    pub name: String,
    /// Where its completions come from.
    pub from: From,
}

/// Where completions come from.
#[derive(Debug, Clone, PartialEq)]
pub enum From {
    /// `http(s)://host/v1` of a server that completes between `prompt` and `suffix`.
    Url(String),
    /// A file with `{"id", "completion"}` in each line.
    File(PathBuf),
}

/// `NAME=URL` or `NAME=FILE`.
pub fn parse_other(text: &str) -> Result<Other, String> {
    let (name, from) = text
        .split_once('=')
        .filter(|(name, from)| !name.is_empty() && !from.is_empty())
        .ok_or_else(|| format!("`{text}` must look like NAME=URL or NAME=FILE"))?;
    let is_url = from.starts_with("http://") || from.starts_with("https://");
    let from =
        if is_url { From::Url(from.trim_end_matches('/').to_owned()) } else { From::File(from.into()) };
    Ok(Other { name: name.to_owned(), from })
}

/// A recorded completion.
#[derive(Debug, Deserialize)]
struct Recorded {
    id: String,
    completion: String,
}

/// The holes that are shown: of each kind alike, the same ones each time, of those that all models were asked.
pub fn choose(columns: &[(String, BTreeMap<String, Filled>)], count: usize) -> Vec<String> {
    let Some((_, first)) = columns.first() else { return Vec::new() };
    let mut by_kind: BTreeMap<&str, Vec<(String, &String)>> = BTreeMap::new();
    for (id, hole) in first {
        if columns.iter().all(|(_, holes)| holes.contains_key(id)) {
            by_kind.entry(&hole.kind).or_default().push((digest_hex(id.as_bytes()), id));
        }
    }
    by_kind.values_mut().for_each(|holes| holes.sort());
    let mut chosen = Vec::new();
    for round in 0.. {
        let before = chosen.len();
        for holes in by_kind.values() {
            if let (Some((_, id)), true) = (holes.get(round), chosen.len() < count) {
                chosen.push((*id).clone());
            }
        }
        if chosen.len() == before {
            break;
        }
    }
    chosen
}

/// What another assistant makes of the chosen holes, by their names.
///
/// # Errors
/// A file that is none, a server that does not answer.
pub fn of_other(other: &Other, holes: &[&Filled]) -> Result<BTreeMap<String, String>, Error> {
    match &other.from {
        From::File(path) => {
            if !path.is_file() {
                let source = std::io::ErrorKind::NotFound.into();
                return Err(Error::Io { path: path.clone(), source });
            }
            let recorded = json_lines::<Recorded>(path)?;
            Ok(recorded.into_iter().map(|line| (line.id, line.completion)).collect())
        }
        From::Url(url) => {
            let client = reqwest::blocking::Client::builder().timeout(PATIENCE).build();
            let client = client.map_err(|error| asked(url, &error))?;
            holes.iter().map(|hole| Ok((hole.id.clone(), ask(&client, url, hole)?))).collect()
        }
    }
}

fn ask(client: &reqwest::blocking::Client, url: &str, hole: &Filled) -> Result<String, Error> {
    let body = json!({
        "prompt": hole.before, "suffix": hole.after, "max_tokens": MAX_TOKENS, "temperature": 0,
        "stop": if hole.kind == "single_line" { json!(["\n"]) } else { Value::Null },
    });
    let mut request = client.post(format!("{url}/completions")).json(&body);
    if let Ok(token) = std::env::var(TOKEN_VARIABLE) {
        request = request.bearer_auth(token);
    }
    let answer = request.send().map_err(|error| asked(url, &error))?;
    let status = answer.status();
    let text = answer.text().map_err(|error| asked(url, &error))?;
    let problem = |problem: String| Error::Server { url: url.to_owned(), problem };
    if !status.is_success() || text.len() > MAX_ANSWER_BYTES {
        return Err(problem(format!("{status}: {}", text.chars().take(300).collect::<String>())));
    }
    let answer: Value = serde_json::from_str(&text).map_err(|error| problem(error.to_string()))?;
    let completion = answer.pointer("/choices/0/text").and_then(Value::as_str);
    completion.map(str::to_owned).ok_or_else(|| problem("an answer without choices[0].text".to_owned()))
}

fn asked(url: &str, error: &reqwest::Error) -> Error {
    let mut problem = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(inner) = cause {
        problem = format!("{problem}: {inner}");
        cause = inner.source();
    }
    Error::Server { url: url.to_owned(), problem }
}

/// Writes the chosen holes, for whoever records another assistant's completions of them.
///
/// # Errors
/// A file that cannot be written.
pub fn write_prompts(path: &Path, holes: &[&Filled]) -> Result<(), Error> {
    let write = || {
        let mut file = std::fs::File::create(path)?;
        for hole in holes {
            let line = json!({"id": hole.id, "path": hole.path, "before": hole.before, "after": hole.after});
            writeln!(file, "{line}")?;
        }
        Ok(())
    };
    write().map_err(|source| Error::Io { path: path.to_owned(), source })
}

/// A hole with what everybody made of it.
pub fn sample(hole: &Filled, completions: Vec<(String, Option<String>)>) -> Sample {
    let mut sides = vec![("what stood there".to_owned(), hole.truth.clone(), false)];
    for (who, completion) in completions {
        let is_right = completion.as_deref().is_some_and(|text| text.trim() == hole.truth.trim());
        sides.push((who, completion.unwrap_or_else(|| "(not recorded)".to_owned()), is_right));
    }
    let before: Vec<&str> = hole.before.split_inclusive('\n').collect();
    Sample {
        title: format!("{} in {} of {}", hole.kind.replace('_', " "), hole.path, hole.repository),
        before: before.get(before.len().saturating_sub(SHOWN_LINES)..).unwrap_or_default().concat(),
        after: hole.after.split_inclusive('\n').take(SHOWN_LINES).collect(),
        sides,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hole(id: &str, kind: &str) -> Filled {
        Filled {
            id: id.to_owned(),
            kind: kind.to_owned(),
            repository: "org/repo".to_owned(),
            path: "a.py".to_owned(),
            before: (0..20).map(|line| format!("line {line}\n")).collect(),
            truth: "x = 1".to_owned(),
            completion: "x = 2".to_owned(),
            after: "\nend\n".to_owned(),
        }
    }

    #[test]
    fn each_kind_has_its_share_of_what_is_shown() {
        let holes: BTreeMap<String, Filled> = (0..10)
            .map(|n| (format!("{n}"), hole(&format!("{n}"), if n < 8 { "line" } else { "span" })))
            .collect();
        let mut fewer = holes.clone();
        fewer.remove("9");
        let columns = [("a".to_owned(), holes), ("b".to_owned(), fewer)];
        let chosen = choose(&columns, 4);
        assert_eq!(chosen.len(), 4);
        assert_eq!(chosen.iter().filter(|id| *id == "8").count(), 1, "{chosen:?}");
        assert!(!chosen.contains(&"9".to_owned()) && choose(&columns, 4) == chosen);
        assert_eq!(choose(&columns, 100).len(), 9);
    }

    #[test]
    fn another_assistant_is_a_url_or_a_file() {
        assert_eq!(parse_other("x=http://h/v1/").unwrap().from, From::Url("http://h/v1".to_owned()));
        assert_eq!(parse_other("x=a=b").unwrap().from, From::File("a=b".into()));
        assert!(parse_other("x").is_err() && parse_other("=y").is_err());
    }

    #[test]
    fn a_sample_shows_what_is_near() {
        let shown = sample(
            &hole("1", "single_line"),
            vec![("m".to_owned(), Some(" x = 1\n".to_owned())), ("n".to_owned(), None)],
        );
        assert!(shown.before.starts_with("line 12\n"));
        assert_eq!(shown.sides.iter().map(|side| side.2).collect::<Vec<_>>(), [false, true, false]);
    }
}
