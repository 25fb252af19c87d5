//! Task files: one JSON object in a line, plain or gzip, in the form of openai/human-eval (`prompt`, `entry_point`, `test`)
//! and of openai/human-eval-infilling (`suffix` as well).

use std::collections::HashSet;
use std::fs::File;
use std::io::{BufReader, Read};
use std::path::{Path, PathBuf};

use flate2::read::MultiGzDecoder;
use serde::Deserialize;
use tunefleet_proto::digest_hex;

/// Longest task file that is read, unpacked: far above any real one.
const MAX_FILE_BYTES: u64 = 256 << 20;
const GZIP_MAGIC: [u8; 2] = [0x1f, 0x8b];

/// One task.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Task {
    /// Its name.
    pub task_id: String,
    /// What stands before the completion.
    pub prompt: String,
    /// What stands after it.
    #[serde(default)]
    pub suffix: Option<String>,
    /// The function that is tested.
    #[serde(default)]
    pub entry_point: String,
    /// What stood there.
    #[serde(default)]
    pub canonical_solution: Option<String>,
    /// Defines `check(candidate)`.
    #[serde(default)]
    pub test: String,
}

/// All tasks of a file.
#[derive(Debug, Clone)]
pub struct Tasks {
    /// In the order of the file.
    pub tasks: Vec<Task>,
    /// SHA-256 of its text.
    pub digest: String,
}

/// Why a file of tasks or samples cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file.
    #[error("{path}: {source}", path = path.display())]
    Io {
        /// Which file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A line of it.
    #[error("{path}:{line}: {problem}", path = path.display())]
    Line {
        /// Which file.
        path: PathBuf,
        /// Which line, from 1.
        line: usize,
        /// What rule it breaks.
        problem: String,
    },
    /// The whole.
    #[error("{path}: {problem}", path = path.display())]
    File {
        /// Which file.
        path: PathBuf,
        /// What rule it breaks.
        problem: String,
    },
}

impl Task {
    /// What is run: the completion in its place, the tests, and the call of them. `prompt` is what the model was shown.
    pub fn program(&self, prompt: &str, completion: &str) -> String {
        let (suffix, test, entry_point) =
            (self.suffix.as_deref().unwrap_or_default(), &self.test, &self.entry_point);
        format!("{prompt}{completion}{suffix}\n{test}\ncheck({entry_point})")
    }

    fn problem(&self, infilling: Option<bool>) -> Option<String> {
        let id = &self.task_id;
        if id.is_empty() {
            return Some("`task_id` is empty".to_owned());
        }
        if !is_identifier(&self.entry_point) {
            let found = &self.entry_point;
            return Some(match found.is_empty() {
                true => format!("{id}: no `entry_point`: name the function that `test` checks"),
                false => format!("{id}: `entry_point` must be a Python name, got `{found}`"),
            });
        }
        if !self.test.contains("check") {
            return Some(format!("{id}: `test` must define `check(candidate)`"));
        }
        match (infilling, &self.suffix, &self.canonical_solution) {
            (Some(true), None, _) => Some(format!("{id}: no `suffix`: this is no infilling task")),
            (Some(true), _, None) => Some(format!("{id}: no `canonical_solution` to compare with")),
            (Some(false), Some(_), _) => {
                Some(format!("{id}: it has a `suffix`: use `worker evaluate infilling` for it"))
            }
            _ => None,
        }
    }
}

/// Reads a task file; `infilling` says of which form its tasks must be, if of one.
///
/// # Errors
/// The first line that is no such task; a file without any.
pub fn read(path: &Path, infilling: Option<bool>) -> Result<Tasks, Error> {
    let text = read_text(path)?;
    let mut tasks: Vec<Task> = Vec::new();
    let mut seen = HashSet::new();
    for (line, task) in lines::<Task>(path, &text) {
        let task = task?;
        let at = |problem| Error::Line { path: path.to_owned(), line, problem };
        if let Some(problem) = task.problem(infilling) {
            return Err(at(problem));
        }
        if !seen.insert(task.task_id.clone()) {
            return Err(at(format!("task `{}` is there twice", task.task_id)));
        }
        tasks.push(task);
    }
    if tasks.is_empty() {
        return Err(Error::File { path: path.to_owned(), problem: "holds no tasks".to_owned() });
    }
    Ok(Tasks { tasks, digest: digest_hex(text.as_bytes()) })
}

/// The text of a file, unpacked where it is packed.
pub(super) fn read_text(path: &Path) -> Result<String, Error> {
    let io = |source| Error::Io { path: path.to_owned(), source };
    let mut reader = BufReader::new(File::open(path).map_err(io)?);
    let mut bytes = Vec::new();
    let head = std::io::BufRead::fill_buf(&mut reader).map_err(io)?;
    if head.starts_with(&GZIP_MAGIC) {
        MultiGzDecoder::new(reader).take(MAX_FILE_BYTES + 1).read_to_end(&mut bytes)
    } else {
        reader.take(MAX_FILE_BYTES + 1).read_to_end(&mut bytes)
    }
    .map_err(io)?;
    let problem = |problem: String| Error::File { path: path.to_owned(), problem };
    if bytes.len() as u64 > MAX_FILE_BYTES {
        return Err(problem(format!("larger than {MAX_FILE_BYTES} bytes")));
    }
    String::from_utf8(bytes).map_err(|error| problem(format!("not UTF-8: {error}")))
}

/// Objects of a text by their lines, from 1; blank lines are none.
pub(super) fn lines<T: for<'de> Deserialize<'de>>(
    path: &Path,
    text: &str,
) -> impl Iterator<Item = (usize, Result<T, Error>)> {
    let filled = (1..).zip(text.lines()).filter(|(_, line)| !line.trim().is_empty());
    filled.map(move |(line, text)| {
        let parsed = serde_json::from_str(text).map_err(|error| Error::Line {
            path: path.to_owned(),
            line,
            problem: error.to_string(),
        });
        (line, parsed)
    })
}

fn is_identifier(name: &str) -> bool {
    let begins = name.chars().next().is_some_and(|c| c == '_' || c.is_alphabetic());
    begins && name.chars().all(|c| c == '_' || c.is_alphanumeric())
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use proptest::prelude::*;

    use super::*;

    const TASK: &str =
        r#"{"task_id": "a/0", "prompt": "def f():\n", "entry_point": "f", "test": "def check(f):\n  f()"}"#;

    fn refusal(text: &[u8], infilling: bool) -> String {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(text).unwrap();
        let error = read(file.path(), Some(infilling)).unwrap_err().to_string();
        error.replace(&file.path().display().to_string(), "tasks")
    }

    #[test]
    fn what_is_no_task_is_told_with_its_line() {
        let without = TASK.replace(r#""entry_point": "f", "#, "");
        for (text, infilling, expected) in [
            (format!("{TASK}\n\n{without}"), false, "tasks:3: a/0: no `entry_point`: name the function"),
            (TASK.replace("\"f\"", "\"f(); x\""), false, "tasks:1: a/0: `entry_point` must be a Python name"),
            (format!("{TASK}\n{TASK}"), false, "tasks:2: task `a/0` is there twice"),
            (format!("{TASK}\n{{\"task_id\": 3}}"), false, "tasks:2: invalid type: integer `3`"),
            (format!("{TASK}\n{{\"task"), false, "tasks:2: EOF while parsing"),
            (TASK.to_owned(), true, "tasks:1: a/0: no `suffix`"),
            (TASK.replace("check", "chick"), false, "tasks:1: a/0: `test` must define `check(candidate)`"),
            ("\n\n".to_owned(), false, "tasks: holds no tasks"),
        ] {
            let found = refusal(text.as_bytes(), infilling);
            assert!(found.starts_with(expected), "{found}\n{expected}");
        }
        assert!(refusal(b"\x1f\x8b\x08\x00broken", false).starts_with("tasks: "));
        assert!(refusal(b"\xff\xfe", false).starts_with("tasks: not UTF-8"));
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..400), packed in any::<bool>()) {
            let mut file = tempfile::NamedTempFile::new().unwrap();
            if packed {
                file.write_all(&GZIP_MAGIC).unwrap();
            }
            file.write_all(&bytes).unwrap();
            let _ = read(file.path(), None);
        }

        #[test]
        fn altered_tasks_never_panic(at in 0usize..TASK.len(), with in "\\PC{0,4}") {
            let mut file = tempfile::NamedTempFile::new().unwrap();
            file.write_all(format!("{}{with}{}", &TASK[..at], &TASK[at..]).as_bytes()).unwrap();
            let _ = read(file.path(), Some(true));
        }
    }

    #[test]
    fn packed_and_plain_files_are_the_same_tasks() {
        let mut packed = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        packed.write_all(TASK.as_bytes()).unwrap();
        let digests = [TASK.as_bytes().to_vec(), packed.finish().unwrap()].map(|bytes| {
            let mut file = tempfile::NamedTempFile::new().unwrap();
            file.write_all(&bytes).unwrap();
            let Tasks { tasks, digest } = read(file.path(), None).unwrap();
            assert_eq!(tasks[0].program("P", "C"), "PC\ndef check(f):\n  f()\ncheck(f)");
            digest
        });
        assert_eq!(digests[0], digests[1]);
    }
}
