//! Tokens to text as they come: a character of several tokens is told when it is whole.

use crate::data::tokenizer::{Error, Tokenizer};

/// Tokens whose text has been told are kept so far back: the text of a token may depend on those before it.
const CONTEXT_TOKENS: usize = 6;

/// The text of a growing sequence of tokens.
#[derive(Debug, Default)]
pub struct Text {
    tokens: Vec<u32>,
    /// From here on tokens are decoded together.
    begin: usize,
    /// Up to here their text is in `text`.
    done: usize,
    text: String,
}

impl Text {
    /// All text that is whole.
    pub fn as_str(&self) -> &str {
        &self.text
    }

    /// Appends a token.
    ///
    /// # Errors
    /// When the tokenizer refuses it.
    pub fn push(&mut self, token: u32, tokenizer: &Tokenizer) -> Result<(), Error> {
        self.tokens.push(token);
        let all = tokenizer.decode_middle(self.tokens.get(self.begin..).unwrap_or_default(), false)?;
        if all.ends_with(char::REPLACEMENT_CHARACTER) {
            return Ok(());
        }
        let known =
            tokenizer.decode_middle(self.tokens.get(self.begin..self.done).unwrap_or_default(), false)?;
        self.text.push_str(all.strip_prefix(known.as_str()).unwrap_or_default());
        self.done = self.tokens.len();
        self.begin = self.begin.max(self.done.saturating_sub(CONTEXT_TOKENS));
        Ok(())
    }

    /// Appends what is left, broken characters as U+FFFD.
    ///
    /// # Errors
    /// As [`push`](Self::push).
    pub fn finish(&mut self, tokenizer: &Tokenizer) -> Result<(), Error> {
        let all = tokenizer.decode_middle(self.tokens.get(self.begin..).unwrap_or_default(), false)?;
        let known =
            tokenizer.decode_middle(self.tokens.get(self.begin..self.done).unwrap_or_default(), false)?;
        self.text.push_str(all.strip_prefix(known.as_str()).unwrap_or_default());
        self.done = self.tokens.len();
        Ok(())
    }
}
