//! Conversations: who says what, and the rules that one keeps.
//!
//! In a dataset of conversations the `content` of a row is one in JSON: `[{"role": "user", "content": "..."}, ...]`.

mod templates;

use serde::{Deserialize, Serialize};

pub use templates::{BUILT_IN, BuiltIn};

/// Where a template stands beside a tokenizer, as Hugging Face's tools look for it.
pub const TEMPLATE_FILE: &str = "chat_template.jinja";
/// Most turns of a conversation.
pub const MAX_TURNS: usize = 4096;

/// Who speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// Who says how to answer.
    System,
    /// Who asks.
    User,
    /// Who answers.
    Assistant,
}

impl Role {
    /// By any of the names that datasets have for it.
    pub fn from_name(name: &str) -> Option<Self> {
        match name.trim().to_ascii_lowercase().as_str() {
            "system" | "developer" => Some(Role::System),
            "user" | "human" | "prompter" => Some(Role::User),
            "assistant" | "gpt" | "bot" | "model" => Some(Role::Assistant),
            _ => None,
        }
    }

    /// The name that templates know.
    pub fn name(self) -> &'static str {
        match self {
            Role::System => "system",
            Role::User => "user",
            Role::Assistant => "assistant",
        }
    }
}

/// One turn.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// Whose it is.
    pub role: Role,
    /// What is said.
    pub content: String,
}

impl Message {
    /// What `role` says.
    pub fn new(role: Role, content: impl Into<String>) -> Self {
        Message { role, content: content.into() }
    }
}

/// Whose turn comes last.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Last {
    /// The assistant's: there is an answer to learn.
    Answer,
    /// The user's: an answer is asked for.
    Question,
}

/// The rule that a conversation breaks.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    /// There is no turn.
    #[error("it has no turns; give at least a question{}", if *.0 == Last::Answer { " and an answer" } else { "" })]
    NoTurns(Last),
    /// There are too many.
    #[error("it has {0} turns; at most {MAX_TURNS} are read")]
    TooManyTurns(usize),
    /// Somebody who is not known.
    #[error(
        "turn {turn}: the role {role:?} is not known; known are system, user and assistant (also human, prompter, gpt, bot, model, developer)"
    )]
    UnknownRole {
        /// Counted from 1.
        turn: usize,
        /// As it is written.
        role: String,
    },
    /// A turn out of order.
    #[error("turn {turn} is the {}'s; {}", found.name(), expected.words())]
    OutOfOrder {
        /// Counted from 1.
        turn: usize,
        /// Whose it is.
        found: Role,
        /// Whose it must be.
        expected: Expected,
    },
    /// A turn that says nothing.
    #[error("turn {turn}, the {}'s, is empty; give it a text, or leave the conversation out", role.name())]
    EmptyTurn {
        /// Counted from 1.
        turn: usize,
        /// Whose it is.
        role: Role,
    },
    /// It ends with a question, and there is nothing to learn behind it.
    #[error("it ends with the {}'s turn {turn}; the last turn must be the assistant's, which is what is learnt", role.name())]
    Unanswered {
        /// Counted from 1.
        turn: usize,
        /// Whose it is.
        role: Role,
    },
    /// It ends with an answer, and there is nothing to answer.
    #[error("it ends with the {}'s turn {turn}; the last turn must be the user's, which is what is answered", role.name())]
    Answered {
        /// Counted from 1.
        turn: usize,
        /// Whose it is.
        role: Role,
    },
    /// Something that is no conversation.
    #[error("{0}")]
    Shape(String),
}

/// Whose turn it must be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Expected {
    /// At the beginning, and behind an answer.
    User,
    /// Behind a question.
    Assistant,
}

impl Expected {
    fn words(self) -> &'static str {
        match self {
            Expected::User => {
                "it must be the user's: a system's turn stands only at the beginning, then user and assistant alternate"
            }
            Expected::Assistant => "it must be the assistant's: user and assistant alternate",
        }
    }
}

/// A conversation that keeps the rules: the system's turn at the beginning or not at all, then the user's and the
/// assistant's alternate, and none is empty.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(transparent)]
pub struct Conversation(Vec<Message>);

impl Conversation {
    /// Takes turns that keep the rules.
    ///
    /// # Errors
    /// The first rule that is broken, and where.
    pub fn new(messages: Vec<Message>, last: Last) -> Result<Self, Fault> {
        if messages.len() > MAX_TURNS {
            return Err(Fault::TooManyTurns(messages.len()));
        }
        let mut expected = Expected::User;
        for (at, message) in messages.iter().enumerate() {
            let turn = at + 1;
            expected = match (message.role, expected) {
                (Role::System, _) if at == 0 => Expected::User,
                (Role::User, Expected::User) => Expected::Assistant,
                (Role::Assistant, Expected::Assistant) => Expected::User,
                (found, expected) => return Err(Fault::OutOfOrder { turn, found, expected }),
            };
            if message.content.trim().is_empty() {
                return Err(Fault::EmptyTurn { turn, role: message.role });
            }
        }
        let Some(Message { role, .. }) = messages.last() else { return Err(Fault::NoTurns(last)) };
        let (turn, role) = (messages.len(), *role);
        match (last, role) {
            (Last::Answer, Role::Assistant) | (Last::Question, Role::User) => Ok(Conversation(messages)),
            (Last::Answer, _) => Err(Fault::Unanswered { turn, role }),
            (Last::Question, _) => Err(Fault::Answered { turn, role }),
        }
    }

    /// Reads what a dataset's row holds.
    ///
    /// # Errors
    /// What is no JSON of that shape, or breaks a rule.
    pub fn from_json(text: &str) -> Result<Self, Fault> {
        let messages: Vec<Message> = serde_json::from_str(text)
            .map_err(|error| Fault::Shape(format!("it is no list of turns: {error}")))?;
        Conversation::new(messages, Last::Answer)
    }

    /// As a dataset's row holds it.
    pub fn to_json(&self) -> String {
        serde_json::to_string(self).unwrap_or_default()
    }

    /// The turns.
    pub fn messages(&self) -> &[Message] {
        &self.0
    }

    /// With `system` at the beginning, where nothing of that kind stands there.
    pub fn or_system(mut self, system: Option<&str>) -> Self {
        if let Some(system) = system
            && self.0.first().is_none_or(|first| first.role != Role::System)
        {
            self.0.insert(0, Message::new(Role::System, system));
        }
        self
    }

    /// Without the oldest question and its answer; `None` where only one question is left.
    pub fn without_oldest(mut self) -> Option<Self> {
        let first = usize::from(self.0.first().is_some_and(|first| first.role == Role::System));
        if self.0.len() < first + 3 {
            return None;
        }
        self.0.drain(first..first + 2);
        Some(self)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn of(turns: &[(Role, &str)], last: Last) -> Result<Conversation, Fault> {
        Conversation::new(turns.iter().map(|(role, content)| Message::new(*role, *content)).collect(), last)
    }

    #[test]
    fn turns_alternate_and_every_rule_that_is_broken_is_named() {
        use Role::{Assistant, System, User};
        let answer = |turns| of(turns, Last::Answer).map_err(|fault| fault.to_string());
        assert!(answer(&[(User, "a"), (Assistant, "b")]).is_ok());
        assert!(
            answer(&[(System, "s"), (User, "a"), (Assistant, "b"), (User, "c"), (Assistant, "d")]).is_ok()
        );
        for (turns, message) in [
            (&[][..], "no turns"),
            (&[(Assistant, "b")], "turn 1 is the assistant's; it must be the user's"),
            (&[(User, "a"), (User, "b")], "turn 2 is the user's; it must be the assistant's"),
            (
                &[(User, "a"), (System, "s"), (Assistant, "b")],
                "turn 2 is the system's; it must be the assistant's",
            ),
            (&[(User, "a"), (Assistant, " \n")], "turn 2, the assistant's, is empty"),
            (&[(User, "a")], "ends with the user's turn 1; the last turn must be the assistant's"),
            (&[(System, "a")], "ends with the system's turn 1"),
        ] {
            let error = answer(turns).unwrap_err();
            assert!(error.contains(message), "{error}");
        }
        let question = of(&[(User, "a"), (Assistant, "b")], Last::Question).unwrap_err().to_string();
        assert!(question.contains("must be the user's, which is what is answered"), "{question}");
        let many = vec![Message::new(User, "a"); MAX_TURNS + 1];
        assert_eq!(Conversation::new(many, Last::Answer), Err(Fault::TooManyTurns(MAX_TURNS + 1)));
        for (text, message) in [
            ("{}", "no list of turns"),
            (r#"[{"role": "judge", "content": "a"}]"#, "unknown variant `judge`"),
            (r#"[{"role": "user"}]"#, "missing field `content`"),
        ] {
            let error = Conversation::from_json(text).unwrap_err().to_string();
            assert!(error.contains(message), "{error}");
        }
    }

    #[test]
    fn what_is_oldest_goes_first_and_the_system_stays() {
        use Role::{Assistant, System, User};
        let whole = of(&[(System, "s"), (User, "a"), (Assistant, "b"), (User, "c")], Last::Question).unwrap();
        let shorter = whole.without_oldest().unwrap();
        assert_eq!(shorter, of(&[(System, "s"), (User, "c")], Last::Question).unwrap());
        assert_eq!(shorter.without_oldest(), None);
        let asked = of(&[(User, "a")], Last::Question).unwrap().or_system(Some("be kind"));
        assert_eq!(asked.messages()[0], Message::new(System, "be kind"));
        assert_eq!(asked.clone().or_system(Some("other")), asked);
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(contents in prop::collection::vec("\\PC*[a-z]\\PC*", 1..6), has_system: bool) {
            let mut messages = if has_system { vec![Message::new(Role::System, "s")] } else { Vec::new() };
            for content in contents {
                messages.extend([Message::new(Role::User, content.clone()), Message::new(Role::Assistant, content)]);
            }
            let conversation = Conversation::new(messages, Last::Answer).unwrap();
            prop_assert_eq!(Conversation::from_json(&conversation.to_json()).unwrap(), conversation);
        }

        #[test]
        fn any_text_is_a_conversation_or_an_error(text in "\\PC{0,200}") {
            let _ = Conversation::from_json(&text);
        }
    }
}
