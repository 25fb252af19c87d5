//! The argument string of the original: that of `train.py`, and before it, where it was given, that of
//! `accelerate launch`. Split as a shell does; read as Python's argparse does.

use std::iter::Peekable;
use std::vec::IntoIter;

use tunefleet_proto::job::tree::Value;
use tunefleet_proto::job::{did_you_mean, shown};

use super::keys::{Key, SWITCHES, Takes, config_keys, launch_keys, script_keys};
use super::note::{Faults, Notes};
use super::settings::{Given, Settings};
use super::value::{self, brief_text};

/// Longest argument string, in bytes.
const MAX_BYTES: usize = 1 << 20;
/// The place of what stands in the argument string.
const PLACE: &str = "--args";

/// What an argument string says.
#[derive(Debug, Default)]
pub struct Command {
    /// Settings of accelerate's config that the launcher was told.
    pub config: Settings,
    /// Other settings that the launcher was told.
    pub launch: Settings,
    /// Whether `accelerate launch` stands there.
    pub launched: bool,
    /// Settings of train.py.
    pub script: Settings,
}

/// Reads an argument string.
pub fn read(text: &str, ignore_unknown: bool, notes: &mut Notes, faults: &mut Faults) -> Command {
    let mut command = Command::default();
    if text.len() > MAX_BYTES {
        faults.report(PLACE, format!("holds at most {MAX_BYTES} bytes, this has {}", text.len()));
        return command;
    }
    // A shell removes a backslash at the end of a line, and the line's end, before it looks for words.
    let text = text.replace("\r\n", "\n").replace("\\\n", "");
    let Some(words) = shlex::split(&text) else {
        faults.report(PLACE, "cannot be split into words: a quote is not closed");
        return command;
    };
    let mut words = Words { words: words.into_iter().peekable(), ignore_unknown, notes, faults };
    if words.launcher(&mut command) {
        words.script(&mut command.script);
    }
    command
}

struct Words<'a> {
    words: Peekable<IntoIter<String>>,
    ignore_unknown: bool,
    notes: &'a mut Notes,
    faults: &'a mut Faults,
}

impl Words<'_> {
    /// Reads up to the script's own arguments. False where they cannot be found.
    fn launcher(&mut self, command: &mut Command) -> bool {
        while let Some(word) = self.words.next_if(|word| is_assignment(word)) {
            self.notes.ignored(PLACE, &brief_text(&word), "a variable of the environment");
        }
        let Some(first) = self.words.peek() else { return true };
        if first.starts_with("--") {
            return true;
        }
        let program = first.rsplit('/').next().unwrap_or_default().to_owned();
        if is_script(&program) {
            self.words.next();
            return true;
        }
        match program.as_str() {
            "accelerate" => {
                self.words.next();
                if self.words.next_if_eq("launch").is_none() {
                    self.faults.report(PLACE, "after accelerate, expected launch");
                    return false;
                }
                command.launched = true;
                self.launch_arguments(command);
            }
            python if python.starts_with("python") => {
                self.words.next();
                while let Some(word) = self.words.next_if(|word| word.starts_with('-')) {
                    self.notes.ignored(PLACE, &brief_text(&word), "for Python, which is not needed");
                }
            }
            _ => {
                let message = format!(
                    "begins with {}: expected the arguments of train.py, or those behind accelerate launch, \
                     python or train.py",
                    shown(&program)
                );
                self.faults.report(PLACE, message);
                return false;
            }
        }
        match self.words.next() {
            Some(script) if is_script(&script) => true,
            Some(word) => {
                self.faults.report(PLACE, format!("expected the name of a script, got {}", shown(&word)));
                false
            }
            None => true,
        }
    }

    fn launch_arguments(&mut self, command: &mut Command) {
        while let Some(word) = self.words.next_if(|word| word.starts_with('-')) {
            let (name, inline) = split(&word);
            // accelerate takes hyphens for underscores.
            let name = format!("--{}", name.trim_start_matches('-').replace('-', "_"));
            let config = config_keys().find(|key| is_argument_of(key, &name));
            let launch = launch_keys().find(|key| key.name == name);
            match (config, launch) {
                (Some(key), _) => {
                    let no_value = SWITCHES.contains(&key.name);
                    self.argument(key, no_value, &name, inline, &mut command.config);
                }
                (None, Some(key)) => {
                    let no_value = matches!(key.takes, Takes::Switch);
                    self.argument(key, no_value, &name, inline, &mut command.launch);
                }
                (None, None) => {
                    let names = config_keys().filter_map(|key| key.name.rsplit('.').next());
                    let names = names.chain(launch_keys().map(|key| key.name.trim_start_matches('-')));
                    self.unknown(&name, names.collect(), inline.is_none());
                }
            }
        }
    }

    fn script(&mut self, settings: &mut Settings) {
        while let Some(word) = self.words.next() {
            if !word.starts_with("--") || word == "--" {
                self.faults
                    .report(PLACE, format!("the word {} belongs to no argument of train.py", shown(&word)));
                continue;
            }
            let (name, inline) = split(&word);
            // argparse takes the beginning of a name where it is the beginning of one alone.
            let exact = script_keys().find(|key| key.name == name);
            let mut begun = script_keys().filter(|key| key.name.starts_with(name));
            match exact.or_else(|| begun.next().filter(|_| begun.next().is_none())) {
                Some(key) => {
                    let no_value = matches!(key.takes, Takes::Switch);
                    self.argument(key, no_value, key.name, inline, settings);
                }
                None => {
                    let names = script_keys().map(|key| key.name.trim_start_matches('-')).collect();
                    self.unknown(name, names, inline.is_none());
                }
            }
        }
    }

    /// Reads the value of `key`, if it has one. Given twice, the last counts.
    fn argument(
        &mut self,
        key: &'static Key,
        no_value: bool,
        name: &str,
        inline: Option<&str>,
        settings: &mut Settings,
    ) {
        let value = match (no_value, inline) {
            (true, Some(value)) => {
                return self.faults.report(PLACE, format!("{name} takes no value, got {}", shown(value)));
            }
            (true, None) => {
                let (place, written) = (PLACE.to_owned(), name.to_owned());
                settings.put(key, Given { scalar: value::Scalar::Bool(true), place, written });
                return;
            }
            (false, Some(value)) => value.to_owned(),
            (false, None) => match self.words.next_if(|word| !word.starts_with("--")) {
                Some(value) => value,
                None => return self.faults.report(PLACE, format!("{name} lacks its value")),
            },
        };
        let value = Value::Text(value);
        match value::read(&value, &key.takes) {
            Ok(scalar) => {
                let written = format!("{name} {}", value::brief(&value));
                settings.put(key, Given { scalar, place: PLACE.to_owned(), written });
            }
            Err(rule) => {
                self.faults.report(PLACE, format!("{name}: expected {rule}, got {}", value.found()));
            }
        }
    }

    fn unknown(&mut self, name: &str, known: Vec<&'static str>, swallow: bool) {
        if self.ignore_unknown {
            self.notes.ignored(PLACE, &brief_text(name), "unknown");
            while swallow && self.words.next_if(|word| !word.starts_with("--") && !is_script(word)).is_some()
            {
            }
            return;
        }
        let advice = did_you_mean(name.trim_start_matches('-'), known);
        let advice = match advice.strip_prefix(" (did you mean \"") {
            Some(nearest) => format!(" (did you mean \"--{nearest}"),
            None => "; --ignore-unknown leaves it out".to_owned(),
        };
        self.faults.report(PLACE, format!("unknown argument {}{advice}", shown(name)));
        // Its value is not another fault.
        while swallow && self.words.next_if(|word| !word.starts_with("--") && !is_script(word)).is_some() {}
    }
}

/// Whether `accelerate launch` takes the setting `key` by the argument `name`.
fn is_argument_of(key: &Key, name: &str) -> bool {
    let own = key.name.rsplit('.').next().unwrap_or_default();
    !matches!(key.takes, Takes::Section) && name.strip_prefix("--") == Some(own)
}

/// `--name=value` in two.
fn split(word: &str) -> (&str, Option<&str>) {
    match word.split_once('=') {
        Some((name, value)) => (name, Some(value)),
        None => (word, None),
    }
}

fn is_script(word: &str) -> bool {
    word.ends_with(".py")
}

/// `NAME=value`, before a command.
fn is_assignment(word: &str) -> bool {
    word.split_once('=').is_some_and(|(name, _)| {
        !name.is_empty() && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_')
    })
}
