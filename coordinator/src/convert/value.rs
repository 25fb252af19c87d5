//! What a setting says, read from a tree's value or from a word of the argument string, by the rule
//! of its key.

use std::fmt::Write;

use tunefleet_proto::job::tree::Value;

use super::keys::Takes;

/// What a setting says.
#[derive(Debug, Clone, PartialEq)]
pub enum Scalar {
    Bool(bool),
    Count(u64),
    Number(f64),
    Pair(f64, f64),
    Text(String),
    Word(&'static str),
    /// To be taken from elsewhere.
    Auto,
    /// It does not matter what.
    Anything,
}

/// Longest value that a comment or a message shows, in characters.
const LONGEST_SHOWN: usize = 60;

/// What `value` says where `takes` is the rule.
///
/// # Errors
/// The rule, in words, that `value` breaks.
pub fn read(value: &Value, takes: &Takes) -> Result<Scalar, String> {
    match takes {
        Takes::Anything => Ok(Scalar::Anything),
        Takes::Section => Err("a mapping of keys to values".to_owned()),
        Takes::Bool | Takes::Switch => {
            yes_or_no(value).map(Scalar::Bool).ok_or_else(|| "true or false".to_owned())
        }
        Takes::Count(low, high) => count(value)
            .filter(|count| (low..=high).contains(&count))
            .map(Scalar::Count)
            .ok_or_else(|| format!("a whole number from {low} to {high}")),
        Takes::Number(low, high) => number(value)
            .filter(|number| (low..=high).contains(&number))
            .map(Scalar::Number)
            .ok_or_else(|| format!("a number from {low} to {high}")),
        Takes::Pair(low, high) => pair(value)
            .filter(|(first, second)| [first, second].iter().all(|number| (low..=high).contains(number)))
            .map(|(first, second)| Scalar::Pair(first, second))
            .ok_or_else(|| format!("a list of two numbers from {low} to {high}")),
        Takes::Text => text(value)
            .filter(|text| !text.is_empty() && !text.contains(char::is_control))
            .map(Scalar::Text)
            .ok_or_else(|| "text on one line".to_owned()),
        Takes::Word(words, numbered) => word(value, words, *numbered)
            .map(Scalar::Word)
            .ok_or_else(|| format!("one of {}", words.join(", "))),
        Takes::Auto(takes) => match value {
            Value::Text(text) if text == "auto" => Ok(Scalar::Auto),
            _ => read(value, takes).map_err(|rule| format!("{rule}, or auto")),
        },
    }
}

/// `value` as comments and messages show it: on one line, without control characters, not too long.
pub fn brief(value: &Value) -> String {
    let text = match value {
        Value::Null => "null".to_owned(),
        Value::Bool(value) => value.to_string(),
        Value::Integer(_, text) | Value::Float(_, text) | Value::Text(text) => text.clone(),
        Value::List(items) if items.is_empty() => "[]".to_owned(),
        Value::Map(entries) if entries.is_empty() => "{}".to_owned(),
        Value::List(_) => "[...]".to_owned(),
        Value::Map(_) => "{...}".to_owned(),
    };
    brief_text(&text)
}

/// As [`brief`], of text.
pub fn brief_text(text: &str) -> String {
    let mut shown = String::new();
    for (index, c) in text.chars().enumerate() {
        if index == LONGEST_SHOWN {
            shown.push_str("...");
            break;
        }
        match c {
            c if c.is_control() || matches!(c, '\u{2028}' | '\u{2029}' | '\u{feff}') => shown.push(' '),
            c => shown.push(c),
        }
    }
    shown
}

/// A number as a job file has it: short, and exact.
pub fn number_text(number: f64) -> String {
    let size = number.abs();
    let mut text = String::new();
    let written = if size == 0.0 || (1e-3..1e6).contains(&size) {
        write!(text, "{number}")
    } else {
        write!(text, "{number:e}")
    };
    debug_assert!(written.is_ok(), "text takes all that is written");
    text
}

fn yes_or_no(value: &Value) -> Option<bool> {
    match value {
        Value::Bool(value) => Some(*value),
        Value::Integer(0, _) => Some(false),
        Value::Integer(1, _) => Some(true),
        Value::Text(text) => match text.to_ascii_lowercase().as_str() {
            "true" | "yes" | "on" | "y" | "t" | "1" => Some(true),
            "false" | "no" | "off" | "n" | "f" | "0" => Some(false),
            _ => None,
        },
        _ => None,
    }
}

fn count(value: &Value) -> Option<u64> {
    match value {
        Value::Integer(value, _) => u64::try_from(*value).ok(),
        // JSON files say 5e8; within these bounds a whole float is exact.
        Value::Float(value, _) if value.fract() == 0.0 && (0.0..9e15).contains(value) => Some(*value as u64),
        Value::Text(text) => text.trim().parse().ok(),
        _ => None,
    }
}

fn number(value: &Value) -> Option<f64> {
    let number = match value {
        Value::Integer(value, _) => *value as f64,
        Value::Float(value, _) => *value,
        Value::Text(text) => text.trim().parse().ok()?,
        _ => return None,
    };
    number.is_finite().then_some(number)
}

fn pair(value: &Value) -> Option<(f64, f64)> {
    let Value::List(items) = value else { return None };
    let [first, second] = items.as_slice() else { return None };
    Some((number(&first.value)?, number(&second.value)?))
}

fn text(value: &Value) -> Option<String> {
    match value {
        Value::Text(text) | Value::Integer(_, text) | Value::Float(_, text) => Some(text.clone()),
        Value::Bool(value) => Some(value.to_string()),
        _ => None,
    }
}

/// Words are compared with case aside, as accelerate does. YAML 1.1 reads a bare `no` as false.
fn word(value: &Value, words: &'static [&'static str], numbered: usize) -> Option<&'static str> {
    let find = |text: &str| words.iter().find(|word| word.eq_ignore_ascii_case(text)).copied();
    match value {
        Value::Bool(value) => find(&value.to_string()).or_else(|| find(if *value { "yes" } else { "no" })),
        Value::Integer(..) | Value::Text(_) => {
            let text = text(value)?;
            find(&text).or_else(|| {
                let number: usize = text.parse().ok()?;
                words.get(..numbered)?.get(number.checked_sub(1)?).copied()
            })
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use tunefleet_proto::job::tree;

    use super::*;

    fn says(yaml: &str, takes: &Takes) -> Result<Scalar, String> {
        let node = tree::parse(yaml).unwrap();
        read(&node.value, takes)
    }

    #[test]
    fn words_are_taken_in_any_case_by_number_and_as_yaml_1_1_has_them() {
        let strategy = Takes::Word(&["FULL_SHARD", "SHARD_GRAD_OP", "true"], 2);
        for yaml in ["1", "\"1\"", "FULL_SHARD", "full_shard"] {
            assert_eq!(says(yaml, &strategy), Ok(Scalar::Word("FULL_SHARD")), "{yaml}");
        }
        assert_eq!(says("true", &strategy), Ok(Scalar::Word("true")));
        for yaml in ["0", "3", "4", "-1", "FULL", "[1]", "1.0"] {
            assert_eq!(
                says(yaml, &strategy).unwrap_err(),
                "one of FULL_SHARD, SHARD_GRAD_OP, true",
                "{yaml}"
            );
        }
        let precision = Takes::Word(&["no", "bf16"], 0);
        for yaml in ["no", "'no'", "false"] {
            assert_eq!(says(yaml, &precision), Ok(Scalar::Word("no")), "{yaml}");
        }
    }

    #[test]
    fn numbers_are_taken_as_text_and_within_their_bounds() {
        let count = Takes::Count(1, 1024);
        assert_eq!(says("8", &count), Ok(Scalar::Count(8)));
        assert_eq!(says("\"8\"", &count), Ok(Scalar::Count(8)));
        assert_eq!(says("8.0", &count), Ok(Scalar::Count(8)));
        for yaml in ["0", "1025", "-1", "8.5", "eight", "1e300", ".nan", "[]"] {
            assert_eq!(says(yaml, &count).unwrap_err(), "a whole number from 1 to 1024", "{yaml}");
        }
        let rate = Takes::Number(0.0, 1.0);
        assert_eq!(says("5e-5", &rate), Ok(Scalar::Number(5e-5)));
        for yaml in ["inf", ".inf", "nan", "2"] {
            assert_eq!(says(yaml, &rate).unwrap_err(), "a number from 0 to 1", "{yaml}");
        }
        let auto = Takes::Auto(&Takes::Count(1, 4));
        assert_eq!(says("auto", &auto), Ok(Scalar::Auto));
        assert_eq!(says("5", &auto).unwrap_err(), "a whole number from 1 to 4, or auto");
    }

    #[test]
    fn what_is_shown_is_short_and_on_one_line() {
        assert_eq!(brief_text("a\nb\r\u{2028}c\u{85}"), "a b  c ");
        assert_eq!(brief_text(&"x".repeat(61)), format!("{}...", "x".repeat(60)));
    }

    #[test]
    fn numbers_are_written_short_and_read_back_the_same() {
        for (number, text) in
            [(5e-5, "5e-5"), (0.01, "0.01"), (1.0, "1"), (0.0, "0"), (1e-8, "1e-8"), (1e9, "1e9")]
        {
            assert_eq!(number_text(number), text);
            assert_eq!(text.parse::<f64>().unwrap(), number);
        }
    }
}
