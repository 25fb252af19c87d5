//! What is wrong with a job file: all of it at once, each fault with its place.

use std::fmt;

/// Where a value was written.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Place {
    /// In the job file; both count from 1.
    File {
        /// Line.
        line: u64,
        /// Column, in characters.
        column: u64,
    },
    /// In a `--set` argument, kept as given.
    Override(String),
}

impl Place {
    /// Where the job file begins: the place of what is missing from it.
    pub const START: Place = Place::File { line: 1, column: 1 };
}

/// For use inside a message about another place.
impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Place::File { line, .. } => write!(f, "line {line}"),
            Place::Override(argument) => write!(f, "--set {}", shown_argument(argument)),
        }
    }
}

/// A `--set` argument as a message shows it: without its value where that may hold a password.
fn shown_argument(argument: &str) -> &str {
    match argument.split_once('=') {
        Some((key, value)) if value.contains('@') => key,
        _ => argument,
    }
}

/// One fault.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Diagnostic {
    /// Where.
    pub place: Place,
    /// The rule and the value that breaks it.
    pub message: String,
}

/// Every fault of a job file, in the order of the file, `--set` arguments last.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Diagnostics {
    file: String,
    list: Vec<Diagnostic>,
}

impl Diagnostics {
    /// The faults, never none.
    pub fn list(&self) -> &[Diagnostic] {
        &self.list
    }
}

/// One line per fault: `demo.yaml:12:5: unknown key "stpes" (did you mean "steps"?)`.
impl fmt::Display for Diagnostics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, Diagnostic { place, message }) in self.list.iter().enumerate() {
            if index > 0 {
                writeln!(f)?;
            }
            match place {
                Place::File { line, column } => write!(f, "{}:{line}:{column}: {message}", self.file)?,
                Place::Override(argument) => write!(f, "--set {}: {message}", shown_argument(argument))?,
            }
        }
        Ok(())
    }
}

impl std::error::Error for Diagnostics {}

/// Collects faults while the file is read; reading goes on after each.
#[derive(Debug, Default)]
pub(crate) struct Sink {
    list: Vec<Diagnostic>,
}

/// Faults beyond this many are not kept: nobody reads them, and a hostile file can have many.
const MAX_DIAGNOSTICS: usize = 100;

impl Sink {
    pub(crate) fn report(&mut self, place: &Place, message: impl Into<String>) {
        if self.list.len() < MAX_DIAGNOSTICS {
            self.list.push(Diagnostic { place: place.clone(), message: message.into() });
        }
    }

    /// `value` when nothing was reported, else every fault in order.
    pub(crate) fn finish<T>(mut self, file: String, value: Option<T>) -> Result<T, Diagnostics> {
        match value {
            Some(value) if self.list.is_empty() => Ok(value),
            _ => {
                self.list.sort_by(|a, b| a.place.cmp(&b.place));
                self.list.dedup();
                Err(Diagnostics { file, list: self.list })
            }
        }
    }
}

/// A value as a message shows it: quoted, on one line, not too long.
pub fn shown(text: &str) -> String {
    const LONGEST: usize = 60;
    match text.char_indices().nth(LONGEST) {
        None => format!("{text:?}"),
        Some((end, _)) => format!("{:?}...", text.get(..end).unwrap_or_default()),
    }
}

/// ` (did you mean "x"?)` when a candidate is near enough to be a slip of the hand, else nothing.
pub fn did_you_mean<'a>(given: &str, candidates: impl IntoIterator<Item = &'a str>) -> String {
    let given = given.to_lowercase().replace('-', "_");
    if given.chars().count() > 64 {
        return String::new();
    }
    candidates
        .into_iter()
        .map(|candidate| (strsim::osa_distance(&given, candidate), candidate))
        .filter(|&(distance, candidate)| distance <= 1 + candidate.len() / 4)
        .min_by_key(|&(distance, _)| distance)
        .map(|(_, candidate)| format!(" (did you mean \"{candidate}\"?)"))
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_override_that_may_hold_a_password_is_shown_by_its_key() {
        let place = |argument: &str| Place::Override(argument.to_owned()).to_string();
        assert_eq!(place("train.steps=x"), "--set train.steps=x");
        assert_eq!(place("collect.sources+=https://me:hunter2@host/x"), "--set collect.sources+");
        let mut sink = Sink::default();
        sink.report(&Place::Override("a.b=me:hunter2@host".to_owned()), "no such key");
        let shown = sink.finish::<()>("job.yaml".to_owned(), None).unwrap_err().to_string();
        assert_eq!(shown, "--set a.b: no such key");
    }

    #[test]
    fn slips_are_recognised_and_strangers_are_not() {
        let keys = ["learning_rate", "steps", "warmup_steps"];
        assert_eq!(did_you_mean("learing_rate", keys), " (did you mean \"learning_rate\"?)");
        assert_eq!(did_you_mean("Warmup-Steps", keys), " (did you mean \"warmup_steps\"?)");
        assert_eq!(did_you_mean("stesp", keys), " (did you mean \"steps\"?)");
        assert_eq!(did_you_mean("optimizer", keys), "");
        assert_eq!(did_you_mean(&"s".repeat(1 << 20), keys), "");
    }

    #[test]
    fn values_are_shown_on_one_line_and_shortened() {
        assert_eq!(shown("a\nb"), "\"a\\nb\"");
        assert_eq!(shown(&"\u{e9}".repeat(61)), format!("\"{}\"...", "\u{e9}".repeat(60)));
    }
}
