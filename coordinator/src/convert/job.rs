//! The job file under construction: values with what each came from, and their text.

use std::fmt::Display;

use tunefleet_proto::job::tree::{self, Value};

use super::settings::At;
use super::value::number_text;

/// Sections in the order of the file; the first is its top level.
const SECTIONS: [&str; 7] = ["", "model", "data", "adapter", "train", "export", "workers"];

/// A job file under construction.
#[derive(Debug, Default)]
pub struct Job {
    lines: Vec<(&'static str, String)>,
}

impl Job {
    /// Sets `key`, such as `train.steps`, to what `at` says; the comment tells where it came from.
    pub fn set(&mut self, key: &'static str, at: &At<impl Display>) {
        self.set_from(key, &at.value, &at.written);
    }

    /// As [`Job::set`], for a number that may have a fraction.
    pub fn set_number(&mut self, key: &'static str, at: &At<f64>) {
        self.set_from(key, number_text(at.value), &at.written);
    }

    /// As [`Job::set`], for text.
    pub fn set_text(&mut self, key: &'static str, at: &At<String>) {
        self.set_from(key, quoted(&at.value), &at.written);
    }

    /// Sets `key` to `value`, which came from `from`.
    pub fn set_from(&mut self, key: &'static str, value: impl Display, from: &str) {
        let (section, name) = key.rsplit_once('.').unwrap_or(("", key));
        let indent = if section.is_empty() { "" } else { "  " };
        self.lines.push((section, format!("{indent}{name}: {value}  # {from}\n")));
    }

    /// A line of comment at the end of what `section` has so far.
    pub fn comment(&mut self, section: &'static str, text: &str) {
        let indent = if section.is_empty() { "" } else { "  " };
        self.lines.push((section, format!("{indent}# {text}\n")));
    }

    /// The job file, beginning with `header`, which are comments.
    pub fn text(&self, header: &str) -> String {
        let mut text = header.to_owned();
        for section in SECTIONS {
            let mut lines = self.lines.iter().filter(|(of, _)| *of == section).peekable();
            if lines.peek().is_some() && !section.is_empty() {
                text += &format!("\n{section}:\n");
            }
            lines.for_each(|(_, line)| text += line);
        }
        text
    }
}

/// Text as YAML has it: bare where it stays text that way.
pub fn quoted(text: &str) -> String {
    let simple = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.' | '/' | ',');
    let bare = text.starts_with(|c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '/'))
        && text.chars().all(simple)
        && matches!(tree::parse(text), Ok(node) if matches!(&node.value, Value::Text(read) if read == text));
    if bare { text.to_owned() } else { serde_json::Value::from(text).to_string() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_is_bare_only_where_yaml_reads_it_back() {
        for (text, written) in [
            ("starcoder", "starcoder"),
            ("../models/a.b", "../models/a.b"),
            ("c_proj,c_attn", "c_proj,c_attn"),
            ("8", "\"8\""),
            ("1e5", "\"1e5\""),
            ("true", "\"true\""),
            ("a b", "\"a b\""),
            ("a: b # c", "\"a: b # c\""),
            ("-x", "\"-x\""),
            ("\"", "\"\\\"\""),
        ] {
            assert_eq!(quoted(text), written);
            let node = tree::parse(written).unwrap();
            assert!(matches!(&node.value, Value::Text(read) if read == text), "{text}: {node:?}");
        }
    }
}
