//! From what a person types to tokens: plain text is continued, `<FILL_ME>` is filled in.

use crate::data::infill::FimTokens;
use crate::data::tokenizer::{self, Tokenizer};

/// A window's beginning moves by so many tokens at once: what is typed meanwhile finds the rest where it was.
const ANCHOR_TOKENS: usize = 256;
/// Of a prompt that is too long, the part after the cursor keeps this share.
const SUFFIX_SHARE: usize = 4;

/// How prompts with a hole are laid out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum InfillOrder {
    /// Prefix, suffix, middle.
    Psm,
    /// Suffix, prefix, middle: what is typed is added at the end, and nothing before it is computed again.
    Spm,
}

impl InfillOrder {
    /// What completions of `tokenizer`'s models are laid out as: what is typed is best added at the end, where the
    /// family has learnt that.
    pub fn of(tokenizer: &Tokenizer) -> Self {
        if tokenizer.fim().is_ok_and(|fim| fim.spm) { InfillOrder::Spm } else { InfillOrder::Psm }
    }

    /// As it is written in results.
    pub fn name(self) -> &'static str {
        match self {
            InfillOrder::Psm => "psm",
            InfillOrder::Spm => "spm",
        }
    }
}

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
                (infill(tokenizer, before, after, InfillOrder::Psm, usize::MAX)?, *before, *after)
            }
            more => return Err(Error::Holes(more.len() - 1)),
        };
        if text.is_empty() {
            return Err(Error::Empty);
        }
        let tokens = tokenizer.begun(tokens);
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

/// A prompt with a hole, in at most `most` tokens: what is nearest to the hole stays.
///
/// # Errors
/// A vocabulary without the markers, or that cannot express the text.
pub fn infill(
    tokenizer: &Tokenizer,
    prefix: &str,
    suffix: &str,
    order: InfillOrder,
    most: usize,
) -> Result<Vec<u32>, tokenizer::Error> {
    let FimTokens { prefix: pre, middle: mid, suffix: suf, .. } = tokenizer.fim()?;
    // In either order the prefix begins a text, as Code Llama has it; the suffix never does.
    let (before, mut after) = (tokenizer.encode_document(prefix)?, tokenizer.encode_middle(suffix)?);
    let most = most.saturating_sub(3 + usize::from(tokenizer.bos().is_some()));
    after.truncate((most / SUFFIX_SHARE).max(most.saturating_sub(before.len())));
    let before = before.split_at(anchored(before.len(), most.saturating_sub(after.len()))).1;
    Ok(tokenizer.begun(match order {
        InfillOrder::Psm => [&[pre][..], before, &[suf], &after, &[mid]].concat(),
        InfillOrder::Spm => [&[pre, suf][..], &after, &[mid], before].concat(),
    }))
}

/// How many of `tokens` are left out at the beginning so that at most `most` stay: a multiple of [`ANCHOR_TOKENS`].
pub fn anchored(tokens: usize, most: usize) -> usize {
    let over = tokens.saturating_sub(most);
    over.div_ceil(ANCHOR_TOKENS).saturating_mul(ANCHOR_TOKENS).min(tokens)
}
