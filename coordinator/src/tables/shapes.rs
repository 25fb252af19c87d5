//! The shapes that conversations have in datasets:
//! - a list of turns, `role` and `content` (or `from` and `value`, as ShareGPT has them);
//! - a list of texts that take turns, as LIMA has them;
//! - a text whose turns begin with `### Human:` and `### Assistant:`, as OpenAssistant-Guanaco has them;
//! - a text whose turns begin with `<|system|>`, `<|prompter|>` and `<|assistant|>` and end with `<|endoftext|>`, as the
//!   original system's assistant data has them.

use serde_json::Value;
use tunefleet_proto::chat::{Fault, Message, Role};

const END: &str = "<|endoftext|>";
/// What turns begin with in rendered text.
const MARKS: [(&str, Role); 3] =
    [("<|system|>", Role::System), ("<|prompter|>", Role::User), ("<|assistant|>", Role::Assistant)];
const GUANACO: [(&str, Role); 2] = [("### Human:", Role::User), ("### Assistant:", Role::Assistant)];

/// The turns of what a row holds: a list in JSON, or a text.
///
/// # Errors
/// What has none of the shapes, by turn.
pub fn messages(text: &str) -> Result<Vec<Message>, Fault> {
    if text.trim_start().starts_with('[')
        && let Ok(Value::Array(turns)) = serde_json::from_str(text)
    {
        return turns.iter().enumerate().map(|(at, turn)| turn_of(at, turn)).collect();
    }
    if MARKS.iter().any(|(mark, _)| text.trim_start().starts_with(mark)) {
        return Ok(rendered(text.trim_start()));
    }
    if GUANACO.iter().any(|(mark, _)| text.trim_start().starts_with(mark)) {
        return Ok(guanaco(text));
    }
    let marks: Vec<&str> = MARKS.iter().chain(&GUANACO).map(|(mark, _)| *mark).collect();
    Err(Fault::Shape(format!(
        "it is no list of turns, and the text begins with none of {}: {:?}",
        marks.join(", "),
        text.chars().take(40).collect::<String>()
    )))
}

fn turn_of(at: usize, turn: &Value) -> Result<Message, Fault> {
    let number = at + 1;
    let text =
        |names: [&str; 2]| {
            names.iter().find_map(|name| turn.get(name)).and_then(Value::as_str).ok_or_else(|| {
                Fault::Shape(format!("turn {number} has no text in {} or {}", names[0], names[1]))
            })
        };
    match turn {
        Value::String(content) => Ok(Message::new(
            if at.is_multiple_of(2) { Role::User } else { Role::Assistant },
            content.as_str(),
        )),
        Value::Object(_) => {
            let role = text(["role", "from"])?;
            let role = Role::from_name(role)
                .ok_or_else(|| Fault::UnknownRole { turn: number, role: role.chars().take(40).collect() })?;
            Ok(Message::new(role, text(["content", "value"])?))
        }
        _ => Err(Fault::Shape(format!("turn {number} is neither a text nor an object of role and content"))),
    }
}

/// Turns begin at the beginning, and behind the end of another: marks anywhere else are text.
fn rendered(text: &str) -> Vec<Message> {
    let mut messages = Vec::new();
    let mut rest = text;
    while let Some((mark, role)) = MARKS.iter().find(|(mark, _)| rest.starts_with(mark)) {
        let body = rest.get(mark.len()..).unwrap_or_default();
        let end = body.match_indices(END).map(|(at, _)| at).find(|at| {
            let behind = body.get(at + END.len()..).unwrap_or_default().trim_start();
            behind.is_empty() || MARKS.iter().any(|(mark, _)| behind.starts_with(mark))
        });
        let content = body.get(..end.unwrap_or(body.len())).unwrap_or_default();
        // One space on each side is not of the text.
        let content = content.strip_prefix(' ').unwrap_or(content);
        messages.push(Message::new(*role, content.strip_suffix(' ').unwrap_or(content)));
        rest = end.and_then(|end| body.get(end + END.len()..)).unwrap_or_default().trim_start();
    }
    messages
}

fn guanaco(text: &str) -> Vec<Message> {
    let mut messages = Vec::new();
    let mut rest = text.trim_start();
    while let Some((mark, role)) = GUANACO.iter().find(|(mark, _)| rest.starts_with(mark)) {
        let body = rest.get(mark.len()..).unwrap_or_default();
        let end = GUANACO.iter().filter_map(|(mark, _)| body.find(mark)).min().unwrap_or(body.len());
        let (content, behind) = body.split_at(end);
        messages.push(Message::new(*role, content.trim()));
        rest = behind;
    }
    messages
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn turns(text: &str) -> Vec<(&'static str, String)> {
        messages(text).unwrap().into_iter().map(|message| (message.role.name(), message.content)).collect()
    }

    #[test]
    fn every_shape_gives_the_same_turns() {
        let expected = vec![("user", "What is 1 + 1?".to_owned()), ("assistant", "2\nof course".to_owned())];
        for text in [
            r#"[{"role": "user", "content": "What is 1 + 1?"}, {"role": "assistant", "content": "2\nof course"}]"#,
            r#"[{"from": "human", "value": "What is 1 + 1?"}, {"from": "gpt", "value": "2\nof course"}]"#,
            r#"["What is 1 + 1?", "2\nof course"]"#,
            "### Human: What is 1 + 1?### Assistant: 2\nof course",
            "### Human: What is 1 + 1?\n### Assistant: 2\nof course\n",
            "<|prompter|> What is 1 + 1? <|endoftext|> <|assistant|> 2\nof course <|endoftext|>",
            "<|prompter|> What is 1 + 1? <|endoftext|><|assistant|> 2\nof course",
        ] {
            assert_eq!(turns(text), expected, "{text}");
        }
        let whole = "<|system|> Be kind. <|endoftext|> <|prompter|> hi <|assistant|> there <|endoftext|> \
                     <|assistant|> a <|endoftext|> b <|endoftext|>";
        let hostile = vec![
            ("system", "Be kind.".to_owned()),
            ("user", "hi <|assistant|> there".to_owned()),
            ("assistant", "a <|endoftext|> b".to_owned()),
        ];
        assert_eq!(turns(whole), hostile);
    }

    #[test]
    fn what_has_no_shape_is_named() {
        for (text, message) in [
            ("hello", "begins with none of"),
            ("[1]", "turn 1 is neither"),
            (r#"[{"role": "judge", "content": "a"}]"#, "turn 1: the role \"judge\" is not known"),
            (r#"[{"role": "user", "content": 7}]"#, "turn 1 has no text in content or value"),
            (r#"["a", {"content": "b"}]"#, "turn 2 has no text in role or from"),
        ] {
            let error = messages(text).unwrap_err().to_string();
            assert!(error.contains(message), "{error}");
        }
    }

    proptest! {
        #[test]
        fn any_text_is_turns_or_an_error(
            text in r#"(\PC|<\|(system|prompter|assistant|endoftext)\|>|### (Human|Assistant):|[\[\]{}",: ]){0,40}"#
        ) {
            let _ = messages(&text);
        }
    }
}
