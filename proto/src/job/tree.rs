//! YAML text to a tree whose every node knows its place.
//!
//! A tree, and not serde structs, because serde stops at the first fault: the tree is walked to
//! the end and every fault is reported.

use std::fmt;

use serde::de::{Deserialize, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_saphyr::options::{DuplicateKeyPolicy, NonFiniteFloatPolicy};
use serde_saphyr::{Location, MessageFormatter, Options, Spanned, UserMessageFormatter};

use super::diagnostic::{Diagnostic, Place};

/// Largest file: a list of ten thousand repositories fits.
const MAX_BYTES: usize = 1 << 20;
/// Values in a file, aliases expanded.
const MAX_NODES: usize = 50_000;
/// Nesting; the schema needs 4.
const MAX_DEPTH: usize = 16;

/// A value and where it was written.
#[derive(Debug, Clone)]
pub struct Node {
    /// Where.
    pub place: Place,
    /// What.
    pub value: Value,
}

/// What YAML can say. Numbers keep their text: where text is expected, `1.10` must not become `1.1`.
#[derive(Debug, Clone)]
pub enum Value {
    /// Nothing.
    Null,
    /// `true` or `false`.
    Bool(bool),
    /// A whole number, and its text.
    Integer(i128, String),
    /// A number, and its text.
    Float(f64, String),
    /// Text.
    Text(String),
    /// A list.
    List(Vec<Node>),
    /// A mapping, in the order of the file.
    Map(Vec<(Key, Node)>),
}

/// A key of a mapping. Keys may repeat in the tree; who walks it reports that.
#[derive(Debug, Clone)]
pub struct Key {
    /// Where.
    pub place: Place,
    /// Its name.
    pub name: String,
}

impl Value {
    /// Kind and value, for messages that say what was found.
    pub fn found(&self) -> String {
        match self {
            Value::Null => "nothing".to_owned(),
            Value::Bool(value) => value.to_string(),
            Value::Integer(_, text) | Value::Float(_, text) => super::diagnostic::shown(text),
            Value::Text(text) => super::diagnostic::shown(text),
            Value::List(_) => "a list".to_owned(),
            Value::Map(_) => "a mapping".to_owned(),
        }
    }
}

/// Reads a whole file.
///
/// # Errors
/// What is not YAML, or is too big or too deep; there is then no tree to go on with.
pub fn parse(text: &str) -> Result<Node, Diagnostic> {
    parse_at(text, &|location| Place::File { line: location.line().max(1), column: location.column().max(1) })
}

/// Reads the value of a `--set` argument: every node has the place `--set ARGUMENT`.
pub(super) fn parse_fragment(text: &str, place: &Place) -> Result<Node, Diagnostic> {
    parse_at(text, &|_| place.clone())
}

fn parse_at(text: &str, place: &dyn Fn(Location) -> Place) -> Result<Node, Diagnostic> {
    let fault = |location, message| Err(Diagnostic { place: place(location), message });
    if text.len() > MAX_BYTES {
        let message = format!("a file holds at most {MAX_BYTES} bytes, this one has {}", text.len());
        return fault(Location::UNKNOWN, message);
    }
    match serde_saphyr::from_str_with_options::<Spanned<Raw>>(text, options()) {
        Ok(raw) => Ok(node(raw, text, place)),
        Err(error) => {
            let location = error.location().unwrap_or(Location::UNKNOWN);
            fault(location, UserMessageFormatter.format_message(&error).into_owned())
        }
    }
}

fn options() -> Options {
    serde_saphyr::options! {
        budget: serde_saphyr::budget! {
            max_depth: MAX_DEPTH,
            max_nodes: MAX_NODES,
            max_events: 4 * MAX_NODES,
            max_documents: 1,
            max_aliases: 1000,
            max_anchors: 1000,
            max_merge_keys: 1000,
            max_total_scalar_bytes: MAX_BYTES,
        },
        alias_limits: serde_saphyr::alias_limits! {
            max_total_replayed_events: MAX_NODES,
            max_replay_stack_depth: MAX_DEPTH,
        },
        duplicate_keys: DuplicateKeyPolicy::PassThrough,
        non_finite_float_policy: NonFiniteFloatPolicy::PassThrough,
        strict_booleans: true,
        with_snippet: false,
    }
}

/// The tree as serde gives it, before places and texts are settled.
enum Raw {
    Null,
    Bool(bool),
    Integer(i128),
    Float(f64),
    Text(String),
    List(Vec<Spanned<Raw>>),
    Map(Vec<(Spanned<String>, Spanned<Raw>)>),
}

fn node(raw: Spanned<Raw>, text: &str, place: &dyn Fn(Location) -> Place) -> Node {
    let written = || {
        let span = raw.defined.span();
        let begin = span.byte_offset().and_then(|begin| usize::try_from(begin).ok());
        let len = span.byte_len().and_then(|len| usize::try_from(len).ok());
        let text = begin.zip(len).and_then(|(begin, len)| text.get(begin..begin.checked_add(len)?));
        text.unwrap_or_default().trim().to_owned()
    };
    let value = match raw.value {
        Raw::Null => Value::Null,
        Raw::Bool(value) => Value::Bool(value),
        Raw::Integer(value) => Value::Integer(value, written()),
        Raw::Float(value) => Value::Float(value, written()),
        Raw::Text(value) => Value::Text(value),
        Raw::List(items) => Value::List(items.into_iter().map(|item| node(item, text, place)).collect()),
        Raw::Map(entries) => {
            let entry = |(key, value): (Spanned<String>, _)| {
                (Key { place: place(key.referenced), name: key.value }, node(value, text, place))
            };
            Value::Map(entries.into_iter().map(entry).collect())
        }
    };
    Node { place: place(raw.referenced), value }
}

impl<'de> Deserialize<'de> for Raw {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(RawVisitor)
    }
}

struct RawVisitor;

impl<'de> Visitor<'de> for RawVisitor {
    type Value = Raw;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a YAML value")
    }

    fn visit_unit<E>(self) -> Result<Raw, E> {
        Ok(Raw::Null)
    }

    fn visit_none<E>(self) -> Result<Raw, E> {
        Ok(Raw::Null)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Raw, E> {
        Ok(Raw::Bool(value))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Raw, E> {
        Ok(Raw::Integer(value.into()))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Raw, E> {
        Ok(Raw::Integer(value.into()))
    }

    fn visit_i128<E>(self, value: i128) -> Result<Raw, E> {
        Ok(Raw::Integer(value))
    }

    fn visit_u128<E>(self, value: u128) -> Result<Raw, E> {
        // No key takes a number this large: which one it is no longer matters.
        Ok(Raw::Integer(i128::try_from(value).unwrap_or(i128::MAX)))
    }

    fn visit_f64<E>(self, value: f64) -> Result<Raw, E> {
        Ok(Raw::Float(value))
    }

    fn visit_str<E>(self, value: &str) -> Result<Raw, E> {
        Ok(Raw::Text(value.to_owned()))
    }

    fn visit_string<E>(self, value: String) -> Result<Raw, E> {
        Ok(Raw::Text(value))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut access: A) -> Result<Raw, A::Error> {
        let mut items = Vec::new();
        while let Some(item) = access.next_element()? {
            items.push(item);
        }
        Ok(Raw::List(items))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut access: A) -> Result<Raw, A::Error> {
        let mut entries = Vec::new();
        while let Some(entry) = access.next_entry()? {
            entries.push(entry);
        }
        Ok(Raw::Map(entries))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_and_number_texts_are_kept() {
        let root = parse("a: 1\nb:\n  - 1.10\n  - 0x10\n  - \"2\"\n").unwrap();
        let Value::Map(entries) = root.value else { panic!("not a mapping") };
        assert_eq!(entries[1].0.place, Place::File { line: 2, column: 1 });
        let Value::List(items) = &entries[1].1.value else { panic!("not a list") };
        assert!(matches!(&items[0].value, Value::Float(_, text) if text == "1.10"), "{items:?}");
        assert!(matches!(&items[1].value, Value::Integer(16, text) if text == "0x10"), "{items:?}");
        assert!(matches!(&items[2].value, Value::Text(text) if text == "2"), "{items:?}");
        assert_eq!(items[0].place, Place::File { line: 3, column: 5 });
    }

    #[test]
    fn an_alias_bomb_a_deep_nest_and_a_large_file_are_refused() {
        let mut bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n".to_owned();
        for level in 1..10 {
            let items = vec![format!("*a{}", level - 1); 10].join(", ");
            bomb.push_str(&format!("a{level}: &a{level} [{items}]\n"));
        }
        for text in [bomb, "[".repeat(10_000), format!("a: {}", "x".repeat(MAX_BYTES))] {
            let fault = parse(&text).unwrap_err();
            assert!(!fault.message.is_empty());
        }
    }

    #[test]
    fn a_syntax_error_has_its_line() {
        let fault = parse("name: x\ntrain: [1, 2\nmodel: {}\n").unwrap_err();
        assert!(matches!(fault.place, Place::File { line: 2.., .. }), "{fault:?}");
        assert!(!fault.message.contains('\n'), "{fault:?}");
    }
}
