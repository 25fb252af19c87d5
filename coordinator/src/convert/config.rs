//! An accelerate or DeepSpeed config, YAML or JSON: its keys checked against the table, one by one.

use std::path::Path;

use tunefleet_proto::job::tree::{self, Node, Value};
use tunefleet_proto::job::{Place, did_you_mean, shown};

use super::keys::{Key, Takes};
use super::note::{Faults, Notes};
use super::settings::{Given, Settings};
use super::value::{self, brief};

/// Reads configs whose keys are those of `known`.
pub struct Reader<'a> {
    /// The file, for messages.
    pub path: &'a Path,
    /// Every key.
    pub known: Vec<&'static Key>,
    /// Tell of unknown keys instead of refusing them.
    pub ignore_unknown: bool,
    /// Where such a key is told.
    pub notes: &'a mut Notes,
    /// Where a fault is reported.
    pub faults: &'a mut Faults,
}

impl Reader<'_> {
    /// The settings that `text` gives.
    pub fn read(mut self, text: &str) -> Settings {
        let mut settings = Settings::default();
        match parse(text) {
            Ok(root) => self.section(&root, "", &mut settings),
            Err(fault) => {
                let place = self.place(&fault.place);
                self.faults.report(&place, fault.message);
            }
        }
        settings
    }

    fn place(&self, place: &Place) -> String {
        match place {
            Place::File { line, column } => format!("{}:{line}:{column}", self.path.display()),
            Place::Override(_) => self.path.display().to_string(),
        }
    }

    fn section(&mut self, node: &Node, section: &str, settings: &mut Settings) {
        let Value::Map(entries) = &node.value else {
            let name = if section.is_empty() { "the file" } else { section };
            let message = format!("{name}: expected a mapping of keys to values, got {}", node.value.found());
            let place = self.place(&node.place);
            return self.faults.report(&place, message);
        };
        let mut seen = Vec::new();
        for (key, node) in entries {
            let path = full_name(section, &key.name);
            let place = self.place(&key.place);
            if seen.contains(&path) {
                self.faults.report(&place, format!("key {} is given twice", shown(&key.name)));
                continue;
            }
            match self.known.iter().find(|known| known.name == path).copied() {
                None => self.unknown(&key.name, section, &place, node),
                // Written as nothing: accelerate takes its default.
                Some(_) if matches!(node.value, Value::Null) => {}
                Some(Key { takes: Takes::Section, .. }) => self.section(node, &path, settings),
                Some(known) => self.setting(known, node, &key.name, settings),
            }
            seen.push(path);
        }
    }

    fn setting(&mut self, known: &'static Key, node: &Node, name: &str, settings: &mut Settings) {
        let place = self.place(&node.place);
        match value::read(&node.value, &known.takes) {
            Ok(scalar) => {
                let written = format!("{name}: {}", brief(&node.value));
                settings.put(known, Given { scalar, place, written });
            }
            Err(rule) => {
                let message = format!("{}: expected {rule}, got {}", known.name, node.value.found());
                self.faults.report(&place, message);
            }
        }
    }

    fn unknown(&mut self, name: &str, section: &str, place: &str, node: &Node) {
        if self.ignore_unknown {
            let written = format!("{}: {}", value::brief_text(name), brief(&node.value));
            return self.notes.ignored(place, &written, "unknown");
        }
        let siblings = self.known.iter().filter_map(|key| match key.name.rsplit_once('.') {
            Some((parent, name)) => (parent == section).then_some(name),
            None => section.is_empty().then_some(key.name),
        });
        let advice = match did_you_mean(name, siblings) {
            advice if advice.is_empty() => "; --ignore-unknown leaves it out".to_owned(),
            advice => advice,
        };
        let within = if section.is_empty() { String::new() } else { format!(" in {section}") };
        self.faults.report(place, format!("unknown key {}{within}{advice}", shown(name)));
    }
}

/// The name of a key in the tables: accelerate takes those of `fsdp_config` without `fsdp_` too.
fn full_name(section: &str, name: &str) -> String {
    match section {
        "" => name.to_owned(),
        "fsdp_config" if !name.starts_with("fsdp") => format!("fsdp_config.fsdp_{name}"),
        _ => format!("{section}.{name}"),
    }
}

/// YAML is a superset of JSON but for tabs, which indent some JSON files.
fn parse(text: &str) -> Result<Node, tunefleet_proto::job::Diagnostic> {
    if text.trim_start().starts_with('{') { tree::parse(&text.replace('\t', " ")) } else { tree::parse(text) }
}
