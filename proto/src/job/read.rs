//! From the tree to typed sections: wrong types, unknown keys and repeated keys are reported,
//! and reading goes on.

use super::diagnostic::{Place, Sink, did_you_mean, shown};
use super::tree::{Node, Value};

/// What the job file says about one key.
#[derive(Debug, Clone, Default)]
pub enum Field<T> {
    /// Not written, or written as nothing: the default holds.
    #[default]
    Absent,
    /// Written wrongly, and reported: neither missing nor usable.
    Wrong,
    /// Written.
    Given(At<T>),
}

/// A value and where it was written.
#[derive(Debug, Clone)]
pub struct At<T> {
    /// The value.
    pub value: T,
    /// Where.
    pub place: Place,
}

impl<T> Field<T> {
    /// The value, where one was rightly written.
    pub fn given(&self) -> Option<&At<T>> {
        match self {
            Field::Given(at) => Some(at),
            Field::Absent | Field::Wrong => None,
        }
    }

    /// Whether nothing was written.
    pub fn is_absent(&self) -> bool {
        matches!(self, Field::Absent)
    }

    /// The value, or `default` where none was rightly written.
    pub(super) fn or(&self, default: T) -> T
    where
        T: Clone,
    {
        self.given().map_or(default, |at| at.value.clone())
    }
}

/// One key of the manual.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ManualEntry {
    /// Path of the key, e.g. `train.steps`.
    pub key: String,
    /// What kind of value it takes.
    pub kind: &'static str,
    /// Its meaning, unit, default and reason.
    pub text: String,
}

/// What can be read from a node. `path` names the key in messages.
pub(super) trait FromNode: Sized {
    /// What the value must be, in words.
    const KIND: &'static str;

    fn from_node(node: &Node, path: &str, sink: &mut Sink) -> Option<Self>;

    /// Adds the keys below this one to the manual.
    fn describe(_path: &str, _manual: &mut Vec<ManualEntry>) {}
}

pub(super) fn read<T: FromNode>(node: &Node, path: &str, sink: &mut Sink) -> Field<T> {
    if matches!(node.value, Value::Null) {
        return Field::Absent;
    }
    match T::from_node(node, path, sink) {
        Some(value) => Field::Given(At { value, place: node.place.clone() }),
        None => Field::Wrong,
    }
}

/// Reports that `node` is not what was expected there.
fn expected<T>(kind: &str, node: &Node, path: &str, sink: &mut Sink) -> Option<T> {
    sink.report(&node.place, format!("{path}: expected {kind}, got {}", node.value.found()));
    None
}

pub(super) fn join(path: &str, key: &str) -> String {
    if path.is_empty() { key.to_owned() } else { format!("{path}.{key}") }
}

/// The node of each of `keys`; keys that are not among them, or come twice, are reported.
pub(super) fn entries<'a>(
    node: &'a Node,
    path: &str,
    keys: &[&str],
    sink: &mut Sink,
) -> Option<Vec<Option<&'a Node>>> {
    let Value::Map(written) = &node.value else {
        let name = if path.is_empty() { "the job file" } else { path };
        return expected("a mapping of keys to values", node, name, sink);
    };
    let mut found = vec![None; keys.len()];
    for (key, value) in written {
        match keys.iter().position(|known| *known == key.name) {
            Some(index) => match found.get_mut(index) {
                Some(slot @ None) => *slot = Some(value),
                _ => sink.report(&key.place, format!("key {} is given twice", shown(&key.name))),
            },
            None => {
                let advice = did_you_mean(&key.name, keys.iter().copied());
                let known = if advice.is_empty() { format!("; known: {}", keys.join(", ")) } else { advice };
                let within = if path.is_empty() { String::new() } else { format!(" in {path}") };
                sink.report(&key.place, format!("unknown key {}{within}{known}", shown(&key.name)));
            }
        }
    }
    Some(found)
}

/// Declares a section: a struct of [`Field`]s. The doc comments of its keys are the manual that
/// users read, so they are kept at run time as well.
macro_rules! section {
    (
        $(#[doc = $about:literal])*
        $name:ident { $( $(#[doc = $doc:literal])* $key:ident: $kind:ty, )* }
    ) => {
        $(#[doc = $about])*
        #[derive(Debug, Clone, Default)]
        pub struct $name { $( $(#[doc = $doc])* pub $key: Field<$kind>, )* }

        impl FromNode for $name {
            const KIND: &'static str = "a section";

            fn from_node(node: &Node, path: &str, sink: &mut Sink) -> Option<Self> {
                let found = entries(node, path, &[$(stringify!($key)),*], sink)?;
                let mut found = found.into_iter();
                Some($name { $(
                    $key: match found.next().flatten() {
                        Some(node) => read(node, &join(path, stringify!($key)), sink),
                        None => Field::Absent,
                    },
                )* })
            }

            fn describe(path: &str, manual: &mut Vec<ManualEntry>) {
                $(
                    let key = join(path, stringify!($key));
                    let text = [$($doc.trim()),*].join(" ");
                    manual.push(ManualEntry { key: key.clone(), kind: <$kind>::KIND, text });
                    <$kind>::describe(&key, manual);
                )*
            }
        }
    };
}
pub(super) use section;

/// Declares the words that stand for the values of an enum.
macro_rules! words {
    ($name:ident, $kind:literal { $( $word:literal => $variant:ident, )* }) => {
        impl FromNode for $name {
            const KIND: &'static str = $kind;

            fn from_node(node: &Node, path: &str, sink: &mut Sink) -> Option<Self> {
                let word = one_of(&[$($word),*], node, path, sink)?;
                match word { $( $word => Some($name::$variant), )* _ => None }
            }
        }
    };
}
pub(super) use words;

pub(super) fn one_of<'a>(words: &[&'a str], node: &Node, path: &str, sink: &mut Sink) -> Option<&'a str> {
    if let Value::Text(text) = &node.value {
        if let Some(word) = words.iter().find(|word| *word == text) {
            return Some(word);
        }
        let advice = did_you_mean(text, words.iter().copied());
        let message = format!("{path}: expected one of {}, got {}{advice}", words.join(", "), shown(text));
        sink.report(&node.place, message);
        return None;
    }
    expected(&format!("one of {}", words.join(", ")), node, path, sink)
}

impl FromNode for bool {
    const KIND: &'static str = "true or false";

    fn from_node(node: &Node, path: &str, sink: &mut Sink) -> Option<Self> {
        match node.value {
            Value::Bool(value) => Some(value),
            _ => expected(Self::KIND, node, path, sink),
        }
    }
}

impl FromNode for u64 {
    const KIND: &'static str = "a whole number";

    fn from_node(node: &Node, path: &str, sink: &mut Sink) -> Option<Self> {
        match node.value {
            Value::Integer(value, _) => u64::try_from(value)
                .ok()
                .or_else(|| expected("a whole number from 0 to 18446744073709551615", node, path, sink)),
            _ => expected(Self::KIND, node, path, sink),
        }
    }
}

impl FromNode for u32 {
    const KIND: &'static str = "a whole number";

    fn from_node(node: &Node, path: &str, sink: &mut Sink) -> Option<Self> {
        match node.value {
            Value::Integer(value, _) => u32::try_from(value)
                .ok()
                .or_else(|| expected("a whole number from 0 to 4294967295", node, path, sink)),
            _ => expected(Self::KIND, node, path, sink),
        }
    }
}

impl FromNode for f64 {
    const KIND: &'static str = "a number";

    fn from_node(node: &Node, path: &str, sink: &mut Sink) -> Option<Self> {
        match node.value {
            Value::Float(value, _) if value.is_finite() => Some(value),
            // Whole numbers this small are exact; larger ones are out of every range anyway.
            Value::Integer(value, _) => Some(value as f64),
            _ => expected(Self::KIND, node, path, sink),
        }
    }
}

impl FromNode for String {
    const KIND: &'static str = "text";

    fn from_node(node: &Node, path: &str, sink: &mut Sink) -> Option<Self> {
        match &node.value {
            Value::Text(text) | Value::Integer(_, text) | Value::Float(_, text) => {
                if text.is_empty() || text.contains(['\0', '\n']) {
                    return expected("text on one line", node, path, sink);
                }
                Some(text.clone())
            }
            Value::Bool(_) => expected("text (put quotes around it)", node, path, sink),
            _ => expected(Self::KIND, node, path, sink),
        }
    }
}

impl FromNode for [f64; 2] {
    const KIND: &'static str = "a list of two numbers";

    fn from_node(node: &Node, path: &str, sink: &mut Sink) -> Option<Self> {
        match &node.value {
            Value::List(items) if items.len() == 2 => {
                let mut numbers = items.iter().map(|item| f64::from_node(item, path, sink));
                let (first, second) = (numbers.next()?, numbers.next()?);
                Some([first?, second?])
            }
            _ => expected(Self::KIND, node, path, sink),
        }
    }
}

impl<T: FromNode> FromNode for Vec<At<T>> {
    const KIND: &'static str = "a list";

    fn from_node(node: &Node, path: &str, sink: &mut Sink) -> Option<Self> {
        let Value::List(items) = &node.value else {
            return expected("a list (lines that begin with \"- \")", node, path, sink);
        };
        let mut values = Vec::with_capacity(items.len());
        let mut sound = true;
        for (index, item) in items.iter().enumerate() {
            match T::from_node(item, &format!("{path}[{index}]"), sink) {
                Some(value) => values.push(At { value, place: item.place.clone() }),
                None => sound = false,
            }
        }
        sound.then_some(values)
    }

    fn describe(path: &str, manual: &mut Vec<ManualEntry>) {
        T::describe(&format!("{path}[]"), manual);
    }
}
