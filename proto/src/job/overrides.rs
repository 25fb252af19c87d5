//! `--set key=value` and `--set key+=value`, laid over the tree before anything is checked.

use super::diagnostic::{Place, Sink, shown};
use super::filters::default_filters;
use super::read::join;
use super::tree::{Key, Node, Value, parse_fragment};

/// Sets `argument`'s key in `root`; what cannot be set is reported.
pub(super) fn apply(root: &mut Node, argument: &str, sink: &mut Sink) {
    let place = Place::Override(argument.to_owned());
    let Some((key, text)) = argument.split_once('=') else {
        sink.report(&place, "must look like key=value, e.g. train.steps=100");
        return;
    };
    let (key, append) = match key.strip_suffix('+') {
        Some(key) => (key, true),
        None => (key, false),
    };
    let names: Vec<&str> = key.split('.').collect();
    if names.iter().any(|name| name.is_empty()) {
        sink.report(&place, format!("{} is not a key: write section.key=value", shown(key)));
        return;
    }
    let Some(slot) = slot(root, &names, &place, sink) else { return };
    let value = value(text, &place);
    if !append {
        *slot = value;
        return;
    }
    if matches!(slot.value, Value::Null) {
        slot.value = Value::List(defaults(key, &place));
    }
    match (&mut slot.value, value) {
        (Value::List(items), Node { value: Value::List(more), .. }) => items.extend(more),
        (Value::List(items), one) => items.push(one),
        (other, _) => sink.report(&place, format!("+= adds to a list, but {key} is {}", other.found())),
    }
}

/// The node at `names`, made where it does not exist.
fn slot<'a>(root: &'a mut Node, names: &[&str], place: &Place, sink: &mut Sink) -> Option<&'a mut Node> {
    let mut node = root;
    let mut path = String::new();
    for name in names {
        if matches!(node.value, Value::Null) {
            node.value = Value::Map(Vec::new());
        }
        let entries = match &mut node.value {
            Value::Map(entries) => entries,
            other => {
                let message = format!("{path} is {}, so it has no key {}", other.found(), shown(name));
                sink.report(place, message);
                return None;
            }
        };
        path = join(&path, name);
        let index = match entries.iter().position(|(key, _)| key.name == *name) {
            Some(index) => index,
            None => {
                let key = Key { place: place.clone(), name: (*name).to_owned() };
                entries.push((key, Node { place: place.clone(), value: Value::Null }));
                entries.len() - 1
            }
        };
        node = entries.get_mut(index).map(|(_, node)| node)?;
    }
    Some(node)
}

/// YAML where it is a single value or begins like a list or mapping, else plain text: a URL or a
/// path needs no quotes on a command line.
fn value(text: &str, place: &Place) -> Node {
    let begins = |c| text.trim_start().starts_with(c);
    let plain = || Node { place: place.clone(), value: Value::Text(text.to_owned()) };
    match parse_fragment(text, place) {
        Ok(Node { value: Value::List(_), .. }) if !begins('[') => plain(),
        Ok(Node { value: Value::Map(_), .. }) if !begins('{') => plain(),
        Ok(node) => node,
        Err(_) => plain(),
    }
}

/// What a list holds before the first `+=` when the file does not name it.
fn defaults(key: &str, place: &Place) -> Vec<Node> {
    let entries = match key {
        "collect.exclude_extensions" => default_filters().exclude_extensions,
        "collect.exclude_path_parts" => default_filters().exclude_path_parts,
        _ => Vec::new(),
    };
    entries.into_iter().map(|text| Node { place: place.clone(), value: Value::Text(text) }).collect()
}
