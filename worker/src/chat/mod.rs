//! Conversations as tokens: turns -> text by a template -> tokens, of which some are learnt.
//!
//! What people say is text: control tokens spelt out in it stay text, whatever the template.

/// Jinja, as Hugging Face tokenizers have it.
mod template;
/// What a template made: text, control tokens, and what is learnt.
mod rendered;
/// `worker init-chat`: a model with a template beside it.
pub mod model;
/// `worker chat`.
pub mod verb;

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;
use tunefleet_proto::chat::{BUILT_IN, Conversation, Fault, Last, Message, Role, TEMPLATE_FILE};
use tunefleet_proto::job::ChatLoss;

use crate::data::tokenizer::{self, TOKENIZER_CONFIG_FILE, Tokenizer};
use rendered::Marks;
use template::Template;

/// Largest template that is read.
const MAX_TEMPLATE_BYTES: u64 = 1 << 20;

/// Why a conversation has no tokens.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file is missing or unreadable.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// There is no template.
    #[error(
        "{}: there is no chat template, neither as {TEMPLATE_FILE} nor as chat_template in {TOKENIZER_CONFIG_FILE}; \
         `worker init-chat` puts one there",
        dir.display()
    )]
    NoTemplate {
        /// Where was looked.
        dir: PathBuf,
    },
    /// A template that is no Jinja.
    #[error("chat template {name}: {problem}; correct it, or name another in data.chat.template")]
    Template {
        /// Its name or path.
        name: String,
        /// Line and rule.
        problem: String,
    },
    /// A template that did not render.
    #[error("chat template {name}: {problem}")]
    Render {
        /// Its name or path.
        name: String,
        /// What it met.
        problem: String,
    },
    /// A template that does not say what is learnt.
    #[error(
        "chat template {name}: it does not mark what the assistant says, so that this cannot be told from the rest: put \
         {{% generation %}} and {{% endgeneration %}} around it, or write data.chat.loss: all"
    )]
    Unmarked {
        /// Its name or path.
        name: String,
    },
    /// A conversation that breaks a rule.
    #[error(transparent)]
    Conversation(#[from] Fault),
    /// The tokenizer refused.
    #[error(transparent)]
    Tokenizer(#[from] tokenizer::Error),
    /// The model's files.
    #[error(transparent)]
    Model(#[from] crate::checkpoint::Error),
}

/// A token of a conversation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Token {
    /// Its id.
    pub id: u32,
    /// Whether it is learnt.
    pub is_target: bool,
}

/// A template with what it needs of a tokenizer.
#[derive(Debug)]
pub struct Chat {
    template: Template,
    marks: Marks,
    loss: ChatLoss,
    /// Tokens that end what the assistant says.
    ends: Vec<u32>,
}

impl Chat {
    /// The chat whose template lies beside a tokenizer, where one does.
    ///
    /// # Errors
    /// A template that cannot be used.
    pub fn beside(dir: &Path, tokenizer: &Tokenizer, loss: ChatLoss) -> Result<Option<Self>, Error> {
        let dir = directory(dir);
        let Some((path, jinja)) = find(&dir)? else { return Ok(None) };
        Chat::new(path.display().to_string(), &jinja, loss, tokenizer, &dir).map(Some)
    }

    /// As [`beside`](Self::beside), where there must be one.
    ///
    /// # Errors
    /// [`Error::NoTemplate`].
    pub fn of_tokenizer(dir: &Path, tokenizer: &Tokenizer, loss: ChatLoss) -> Result<Self, Error> {
        Self::beside(dir, tokenizer, loss)?.ok_or_else(|| Error::NoTemplate { dir: directory(dir) })
    }

    /// A built-in template for a tokenizer.
    ///
    /// # Errors
    /// A name that is not known.
    pub fn built_in(name: &str, tokenizer: &Tokenizer) -> Result<Self, Error> {
        let known = BUILT_IN.iter().find(|known| known.name == name).ok_or_else(|| Error::Template {
            name: name.to_owned(),
            problem: format!("known are {}", BUILT_IN.map(|known| known.name).join(", ")),
        })?;
        Chat::new(name.to_owned(), known.jinja, ChatLoss::All, tokenizer, Path::new(""))
    }

    fn new(
        name: String,
        jinja: &str,
        loss: ChatLoss,
        tokenizer: &Tokenizer,
        dir: &Path,
    ) -> Result<Self, Error> {
        let config = fs::read(dir.join(TOKENIZER_CONFIG_FILE)).ok();
        let config: Value = config.and_then(|bytes| serde_json::from_slice(&bytes).ok()).unwrap_or_default();
        let template = Template::new(name, jinja, tokenizer.special_names(&config))?;
        let marks = Marks::new(tokenizer);
        let mut chat = Chat { template, marks, loss, ends: Vec::new() };
        if loss == ChatLoss::Assistant && !chat.template.marks_generation() {
            return Err(Error::Unmarked { name: chat.template.name().to_owned() });
        }
        chat.ends = chat.ends_of_answers(tokenizer)?;
        Ok(chat)
    }

    /// Tokens of a conversation, and which of them are learnt.
    ///
    /// # Errors
    /// A template that does not render; a vocabulary that cannot express the text.
    pub fn tokens(&self, conversation: &Conversation, tokenizer: &Tokenizer) -> Result<Vec<Token>, Error> {
        let rendered = self.marks.render(&self.template, conversation.messages(), false)?;
        let mut tokens = rendered.tokens(tokenizer)?;
        if self.loss == ChatLoss::All {
            tokens.iter_mut().for_each(|token| token.is_target = true);
        }
        Ok(tokens)
    }

    /// Tokens of a conversation that ends with a question, up to where the answer begins.
    ///
    /// # Errors
    /// As [`tokens`](Self::tokens).
    pub fn prompt(&self, conversation: &Conversation, tokenizer: &Tokenizer) -> Result<Vec<u32>, Error> {
        let rendered = self.marks.render(&self.template, conversation.messages(), true)?;
        Ok(rendered.tokens(tokenizer)?.into_iter().map(|token| token.id).collect())
    }

    /// The text of a conversation, control tokens spelt out, and the ranges of bytes that the assistant says.
    ///
    /// # Errors
    /// As [`tokens`](Self::tokens).
    pub fn text(&self, conversation: &Conversation) -> Result<(String, Vec<std::ops::Range<usize>>), Error> {
        let rendered = self.marks.render(&self.template, conversation.messages(), false)?;
        Ok((rendered.text, rendered.generated))
    }

    /// Tokens that end an answer.
    pub fn ends(&self) -> &[u32] {
        &self.ends
    }

    /// What the tokens of conversations depend on, besides them and the tokenizer.
    pub fn key(&self) -> String {
        format!("chat\n{:?}\n{}", self.loss, self.template.source())
    }

    /// Puts the template where Hugging Face tokenizers look for it.
    ///
    /// # Errors
    /// A disk that refuses.
    pub fn write(&self, dir: &Path) -> Result<(), Error> {
        let path = dir.join(TEMPLATE_FILE);
        fs::write(&path, self.template.source()).map_err(|source| Error::Io { path: path.clone(), source })
    }

    /// The end of text, and the control tokens that stand behind an answer before the next question.
    fn ends_of_answers(&self, tokenizer: &Tokenizer) -> Result<Vec<u32>, Error> {
        const ANSWER: &str = "an answer";
        let turn = |role, content: &str| Message::new(role, content);
        let messages = vec![
            turn(Role::User, "a question"),
            turn(Role::Assistant, ANSWER),
            turn(Role::User, "another question"),
            turn(Role::Assistant, "another"),
        ];
        let conversation = Conversation::new(messages, Last::Answer)?;
        let rendered = self.marks.render(&self.template, conversation.messages(), false)?;
        let mut ends = vec![tokenizer.eos()];
        if let Some(at) = rendered.text.find(ANSWER) {
            // The first one ends it; what follows begins another turn.
            let behind = rendered.controls.iter().find(|control| control.range.start >= at + ANSWER.len());
            let next =
                rendered.text.get(at..).and_then(|rest| rest.find("another question")).map(|next| at + next);
            ends.extend(
                behind.filter(|control| next.is_none_or(|next| control.range.end <= next)).map(|c| c.id),
            );
        }
        ends.dedup();
        Ok(ends)
    }
}

/// The directory of a tokenizer, which may be named by its file.
fn directory(path: &Path) -> PathBuf {
    match path.is_dir() {
        true => path.to_owned(),
        false => path.parent().map(Path::to_owned).unwrap_or_default(),
    }
}

fn read(path: &Path) -> Result<String, Error> {
    let io = |source| Error::Io { path: path.to_owned(), source };
    let bytes = fs::metadata(path).map_err(io)?.len();
    if bytes > MAX_TEMPLATE_BYTES {
        return Err(Error::Template {
            name: path.display().to_string(),
            problem: format!("it has {bytes} bytes, at most {MAX_TEMPLATE_BYTES} are read"),
        });
    }
    fs::read_to_string(path).map_err(io)
}

/// The template beside a tokenizer: a file of its own, or a text in the tokenizer's settings; of several the default.
fn find(dir: &Path) -> Result<Option<(PathBuf, String)>, Error> {
    let path = dir.join(TEMPLATE_FILE);
    if path.exists() {
        return Ok(Some((path.clone(), read(&path)?)));
    }
    let path = dir.join(TOKENIZER_CONFIG_FILE);
    let Ok(bytes) = fs::read(&path) else { return Ok(None) };
    let config: Value = serde_json::from_slice(&bytes).unwrap_or_default();
    let named = |entry: &Value| {
        (entry.get("name").and_then(Value::as_str) == Some("default")).then(|| entry.get("template").cloned())
    };
    let jinja = match config.get("chat_template") {
        Some(Value::Array(several)) => several.iter().find_map(named).flatten(),
        other => other.cloned(),
    };
    Ok(jinja.and_then(|jinja| jinja.as_str().map(|jinja| (path, jinja.to_owned()))))
}
