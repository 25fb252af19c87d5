//! Which modules a config names, as PEFT decides it: a list matches the end of a name after a dot, a
//! text is a regular expression over the whole name.

use std::collections::BTreeMap;
use std::fmt;

use regex::{Regex, RegexBuilder};
use serde::{Deserialize, Serialize};

use super::Error;

/// Compiled patterns may take so much memory; theirs are a few bytes.
const MAX_PATTERN_BYTES: usize = 1 << 20;
/// PEFT's word for every linear but the output head.
pub(super) const ALL_LINEAR: &str = "all-linear";

/// `target_modules`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Targets {
    /// Ends of names, each after a dot.
    Suffixes(Vec<String>),
    /// A regular expression over whole names, or `all-linear`.
    Pattern(String),
}

impl Targets {
    /// Every linear of the blocks.
    pub fn all_linear() -> Self {
        Targets::Pattern(ALL_LINEAR.to_owned())
    }

    /// From one text, as people write it: names with commas between them, `all-linear`, or a regular
    /// expression. In PEFT's files a text is never a list of names.
    pub fn from_text(text: &str) -> Self {
        let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | ',' | ' ');
        if text == ALL_LINEAR || !text.chars().all(plain) {
            return Targets::Pattern(text.to_owned());
        }
        let names = text.split(',').map(str::trim).filter(|name| !name.is_empty());
        Targets::Suffixes(names.map(str::to_owned).collect())
    }

    pub(super) fn matcher(&self) -> Result<Matcher<'_>, Error> {
        Ok(match self {
            Targets::Suffixes(suffixes) => Matcher::Suffixes(suffixes),
            Targets::Pattern(text) if text == ALL_LINEAR => Matcher::All,
            Targets::Pattern(text) => {
                Matcher::Pattern(compile("target_modules", text, &format!("^(?:{text})$"))?)
            }
        })
    }
}

impl fmt::Display for Targets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Targets::Suffixes(suffixes) => write!(f, "[{}]", suffixes.join(", ")),
            Targets::Pattern(text) => write!(f, "{text:?}"),
        }
    }
}

pub(super) enum Matcher<'a> {
    All,
    Suffixes(&'a [String]),
    Pattern(Regex),
}

impl Matcher<'_> {
    /// Whether a linear of a block is meant.
    pub(super) fn matches(&self, module: &str) -> bool {
        matches!(self, Matcher::All) || self.names(module)
    }

    /// Whether the config itself names the module; `all-linear` names none.
    pub(super) fn names(&self, module: &str) -> bool {
        match self {
            Matcher::All => false,
            Matcher::Suffixes(suffixes) => suffixes.iter().any(|suffix| ends_with_module(module, suffix)),
            Matcher::Pattern(pattern) => pattern.is_match(module),
        }
    }

    /// Suffixes that none of `matched` ends with, each once.
    pub(super) fn unmatched<'m>(&self, matched: impl Iterator<Item = &'m str> + Clone) -> Vec<String> {
        let Matcher::Suffixes(suffixes) = self else { return Vec::new() };
        let mut out: Vec<String> = Vec::new();
        for suffix in *suffixes {
            if !out.contains(suffix) && !matched.clone().any(|module| ends_with_module(module, suffix)) {
                out.push(suffix.clone());
            }
        }
        out
    }
}

/// Whether `module` is `suffix`, or ends with it after a dot.
pub(super) fn ends_with_module(module: &str, suffix: &str) -> bool {
    match module.strip_suffix(suffix) {
        Some("") => true,
        Some(rest) => rest.ends_with('.') && !suffix.is_empty(),
        None => false,
    }
}

/// `rank_pattern` or `alpha_pattern`: a key matches the end of a name, as a regular expression.
pub(super) fn patterns<T: Copy>(
    key: &'static str,
    table: &BTreeMap<String, T>,
) -> Result<Vec<(Regex, T)>, Error> {
    table
        .iter()
        .map(|(text, value)| Ok((compile(key, text, &format!(r"^(?:.*\.)?(?:{text})$"))?, *value)))
        .collect()
}

pub(super) fn first_match<T: Copy>(patterns: &[(Regex, T)], module: &str) -> Option<T> {
    patterns.iter().find(|(pattern, _)| pattern.is_match(module)).map(|(_, value)| *value)
}

fn compile(key: &'static str, shown: &str, text: &str) -> Result<Regex, Error> {
    RegexBuilder::new(text).size_limit(MAX_PATTERN_BYTES).build().map_err(|error| {
        let cause = error.to_string();
        let cause = cause.lines().last().unwrap_or_default().trim_start_matches("error: ").to_owned();
        Error::Pattern { key, pattern: shown.to_owned(), cause }
    })
}
