//! Texts of evaluation tasks, which no training file may hold: what a model has read it need not know.
//!
//! The method is that of BigCode's decontamination: descriptions and solutions are looked for as they stand, white
//! space aside.

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};

use aho_corasick::{AhoCorasick, MatchKind};
use flate2::read::MultiGzDecoder;
use serde_json::Value;

/// Shorter texts are in many files by chance.
const MIN_CHARS: usize = 60;
/// Of an evaluation file, and of one task.
const MAX_FILE_BYTES: u64 = 1 << 30;
const MAX_LINE_BYTES: u64 = 16 << 20;
/// How a task's description is marked in its prompt.
const QUOTES: [&str; 2] = ["\"\"\"", "'''"];

/// An evaluation file that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It cannot be read.
    #[error("evaluation file {}: {source}; correct the path in collect.decontaminate", .path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A line of it is no task.
    #[error("evaluation file {}:{line}: {detail}; each line must be a JSON object", .path.display())]
    Line {
        /// The file.
        path: PathBuf,
        /// Counted from 1.
        line: u64,
        /// What is wrong.
        detail: String,
    },
    /// Too many texts to look for.
    #[error("evaluation files cannot be looked for: {0}")]
    Build(#[from] aho_corasick::BuildError),
}

/// Looks for the texts of evaluation tasks.
pub struct Contamination {
    texts: Option<AhoCorasick>,
}

impl Contamination {
    /// Reads JSONL files, gzipped or not: HumanEval's, MBPP's, and those of the infilling benchmarks.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn of_files(paths: &[PathBuf]) -> Result<Self, Error> {
        let mut texts = Vec::new();
        for path in paths {
            read(path, &mut texts)?;
        }
        texts.sort();
        texts.dedup();
        let texts = match texts.is_empty() {
            true => None,
            false => Some(AhoCorasick::builder().match_kind(MatchKind::Standard).build(&texts)?),
        };
        Ok(Contamination { texts })
    }

    /// Whether `text` holds one of them.
    pub fn is_in(&self, text: &str) -> bool {
        self.texts.as_ref().is_some_and(|texts| texts.is_match(&plain(text)))
    }
}

fn read(path: &Path, texts: &mut Vec<String>) -> Result<(), Error> {
    let io = |source| Error::Io { path: path.to_owned(), source };
    let file = File::open(path).map_err(io)?;
    let is_packed = path.extension().is_some_and(|extension| extension == "gz");
    let bytes: Box<dyn Read> = match is_packed {
        true => Box::new(MultiGzDecoder::new(file)),
        false => Box::new(file),
    };
    let mut lines = BufReader::new(bytes.take(MAX_FILE_BYTES));
    for line in 1.. {
        let mut text = Vec::new();
        let count = (&mut lines).take(MAX_LINE_BYTES).read_until(b'\n', &mut text).map_err(io)?;
        if count == 0 {
            break;
        }
        if text.trim_ascii().is_empty() {
            continue;
        }
        let broken = |detail: String| Error::Line { path: path.to_owned(), line, detail };
        match serde_json::from_slice(&text) {
            Ok(Value::Object(task)) => task.values().for_each(|value| gather(value, texts)),
            Ok(_) => return Err(broken("it is JSON, but no object".to_owned())),
            Err(error) => return Err(broken(error.to_string())),
        }
    }
    Ok(())
}

/// All texts of a task that are long enough to say something: whole, and the description in a prompt.
fn gather(value: &Value, texts: &mut Vec<String>) {
    match value {
        Value::String(text) => {
            let mut add = |text: &str| {
                let text = plain(text);
                if text.chars().count() >= MIN_CHARS {
                    texts.push(text);
                }
            };
            add(text);
            for quote in QUOTES {
                if let Some((description, _)) =
                    text.split_once(quote).and_then(|(_, rest)| rest.split_once(quote))
                {
                    add(description);
                }
            }
        }
        Value::Array(values) => values.iter().for_each(|value| gather(value, texts)),
        _ => {}
    }
}

/// With a single space for white space, and none at the ends.
fn plain(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for word in text.split_whitespace() {
        if !out.is_empty() {
            out.push(' ');
        }
        out.push_str(word);
    }
    out
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use flate2::Compression;
    use flate2::write::GzEncoder;

    use super::*;

    const TASK: &str = r#"{"task_id": "T/0", "prompt": "def add(numbers):\n    \"\"\"Add up all of the numbers that are given, however many there are.\n    An empty list gives 0.\"\"\"\n", "canonical_solution": "    total = 0\n    for number in numbers:\n        total = total + number\n    return total\n"}"#;

    #[test]
    fn descriptions_and_solutions_are_found_whatever_the_white_space() {
        let dir = tempfile::tempdir().unwrap();
        let (plain, packed) = (dir.path().join("a.jsonl"), dir.path().join("b.jsonl.gz"));
        std::fs::write(&plain, format!("{TASK}\n\n")).unwrap();
        let mut out = GzEncoder::new(File::create(&packed).unwrap(), Compression::fast());
        out.write_all(TASK.as_bytes()).unwrap();
        out.finish().unwrap();
        for path in [plain, packed] {
            let contamination = Contamination::of_files(&[path]).unwrap();
            for text in [
                "x = 1\ndef f(numbers):\n\ttotal = 0\n\tfor number in numbers:\n\t\ttotal = total + number\n\treturn total\n",
                "# Copied\n'''Add up all of the numbers that are given,\n\nhowever many there are. An empty list gives 0.'''",
            ] {
                assert!(contamination.is_in(text), "{text}");
            }
            for text in ["def add(numbers):\n    return sum(numbers)\n", "T/0", ""] {
                assert!(!contamination.is_in(text), "{text}");
            }
        }
        assert!(!Contamination::of_files(&[]).unwrap().is_in("anything"));
    }

    #[test]
    fn what_is_no_evaluation_file_is_refused_with_its_line() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.jsonl");
        assert!(matches!(Contamination::of_files(std::slice::from_ref(&path)), Err(Error::Io { .. })));
        for (text, line) in [("{}\n{\"a\": ", "a.jsonl:2"), ("[1]\n", "a.jsonl:1"), ("\u{0}", "a.jsonl:1")] {
            std::fs::write(&path, text).unwrap();
            let error = Contamination::of_files(std::slice::from_ref(&path)).err().unwrap().to_string();
            assert!(error.contains(line), "{error}");
        }
    }
}
