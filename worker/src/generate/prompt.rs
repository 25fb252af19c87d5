//! From what a person types to tokens: plain text is continued, `<FILL_ME>` is filled in.

use crate::data::tokenizer::{self, Tokenizer};

/// Marks the hole in a prompt.
pub const FILL_ME: &str = "<FILL_ME>";

/// What can be wrong with a prompt.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// More than one hole.
    #[error("the prompt holds {FILL_ME} {0} times; one hole at a time can be filled")]
    Holes(usize),
    /// A prompt with nothing in it.
    #[error("the prompt is empty: give some text to continue, or {FILL_ME} with text around it")]
    Empty,
    /// No room for a completion.
    #[error(
        "the prompt has {tokens} tokens and {new_tokens} are asked for; the model has positions for {max_positions}"
    )]
    Long {
        /// Of the prompt.
        tokens: usize,
        /// Asked for.
        new_tokens: usize,
        /// Of the model.
        max_positions: u64,
    },
    /// The tokenizer refused.
    #[error(transparent)]
    Tokenizer(#[from] tokenizer::Error),
}

/// A prompt in tokens, and the text around its completion.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Prompt {
    /// What the model is shown.
    pub tokens: Vec<u32>,
    /// Text before the completion.
    pub before: String,
    /// Text after it.
    pub after: String,
}

impl Prompt {
    /// Prefix-suffix-middle order around a hole, plain text otherwise. Special tokens spelt out in
    /// the text around a hole are text.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn new(text: &str, tokenizer: &Tokenizer) -> Result<Self, Error> {
        let parts: Vec<&str> = text.split(FILL_ME).collect();
        let (tokens, before, after) = match parts.as_slice() {
            [only] => (tokenizer.encode_prompt(only)?, *only, ""),
            [before, after] => {
                let fim = tokenizer.fim()?;
                let mut tokens = vec![fim.prefix];
                tokens.extend(tokenizer.encode_document(before)?);
                tokens.push(fim.suffix);
                tokens.extend(tokenizer.encode_document(after)?);
                tokens.push(fim.middle);
                (tokens, *before, *after)
            }
            more => return Err(Error::Holes(more.len() - 1)),
        };
        if tokens.is_empty() {
            return Err(Error::Empty);
        }
        Ok(Prompt { tokens, before: before.to_owned(), after: after.to_owned() })
    }

    /// Whether `new_tokens` fit behind the prompt.
    ///
    /// # Errors
    /// [`Error::Long`].
    pub fn check_room(&self, new_tokens: usize, max_positions: u64) -> Result<(), Error> {
        let tokens = self.tokens.len();
        if tokens.saturating_add(new_tokens) as u64 > max_positions {
            return Err(Error::Long { tokens, new_tokens, max_positions });
        }
        Ok(())
    }
}
