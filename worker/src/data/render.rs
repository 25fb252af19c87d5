//! A row as tokens: of a file its text, the parts of a notebook behind their marks, and what it is called before it; of a
//! conversation its turns, as a template lays them out.
//!
//! Marks are control tokens where this program has put them, and text where a file spells them out.

use tunefleet_proto::chat::Conversation;
use tunefleet_proto::dataset::NOTEBOOK_MARKS;

use super::documents::{Dataset, Row};
use super::tokenizer::{self, Tokenizer};
use crate::chat::{self, Chat};

/// What stands before a repository's name and a path, as StarCoder learned them.
const NAME_MARKS: [&str; 2] = ["<reponame>", "<filename>"];

/// What a special token spelt out in a file becomes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Markup {
    /// Text.
    Text,
    /// A control token, as in the original.
    Control,
}

/// How rows become tokens.
#[derive(Debug, Clone, Copy)]
pub enum Layout<'a> {
    /// A row is a file.
    Code {
        /// Of files.
        markup: Markup,
        /// Whether repository and path stand before the text.
        metadata_prefix: bool,
    },
    /// A row is a conversation. Tokens that are learnt have the bit [`LEARNT`].
    Chat(&'a Chat),
}

/// On a token of a conversation: it is a target. No vocabulary is so large.
pub const LEARNT: u32 = 1 << 31;

/// Why a row has no tokens.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The vocabulary cannot express it.
    #[error(transparent)]
    Tokenizer(#[from] tokenizer::Error),
    /// A conversation that is none, or whose template did not render.
    #[error("conversation {row}: {source}")]
    Chat {
        /// Its name in the dataset.
        row: String,
        /// Why.
        source: chat::Error,
    },
}

impl Layout<'_> {
    /// What the tokens depend on, besides the rows and the tokenizer.
    pub(super) fn key(self, dataset: &Dataset) -> String {
        let (markup, metadata_prefix) = match self {
            Layout::Code { markup, metadata_prefix } => (markup, metadata_prefix),
            Layout::Chat(chat) => return chat.key(),
        };
        let mut key = format!("{markup:?}");
        for (is_on, name) in [(metadata_prefix, "prefix"), (has_notebooks(dataset), "notebooks")] {
            if is_on {
                key.push('\n');
                key.push_str(name);
            }
        }
        key
    }
}

fn has_notebooks(dataset: &Dataset) -> bool {
    dataset.setting("notebooks").and_then(|value| value.as_str()) == Some("structured")
}

/// Makes rows into tokens.
#[derive(Debug)]
pub struct Renderer<'a> {
    tokenizer: &'a Tokenizer,
    /// Of conversations.
    chat: Option<&'a Chat>,
    markup: Markup,
    /// Of [`NAME_MARKS`], where they are wanted.
    names: Option<[u32; 2]>,
    /// Of [`NOTEBOOK_MARKS`], where notebooks have them.
    notebooks: Option<[u32; 5]>,
}

impl<'a> Renderer<'a> {
    /// A renderer of a dataset's rows.
    ///
    /// # Errors
    /// [`tokenizer::Error::NoMark`] where the vocabulary lacks a mark that is needed.
    pub fn new(
        dataset: &Dataset,
        tokenizer: &'a Tokenizer,
        layout: Layout<'a>,
    ) -> Result<Self, tokenizer::Error> {
        let (markup, metadata_prefix) = match layout {
            Layout::Code { markup, metadata_prefix } => (markup, metadata_prefix),
            Layout::Chat(chat) => {
                let markup = Markup::Text;
                return Ok(Renderer { tokenizer, chat: Some(chat), markup, names: None, notebooks: None });
            }
        };
        let names = match metadata_prefix {
            true => Some(tokenizer.marks(NAME_MARKS, "data.metadata_prefix: true")?),
            false => None,
        };
        let notebooks = match has_notebooks(dataset) {
            true => Some(tokenizer.marks(NOTEBOOK_MARKS, "collect.notebooks: structured")?),
            false => None,
        };
        Ok(Renderer { tokenizer, chat: None, markup, names, notebooks })
    }

    /// Tokens of a row, without the one that ends it.
    ///
    /// # Errors
    /// When the vocabulary cannot express the text; a conversation that is none.
    pub fn tokens(&self, row: Row<'_>) -> Result<Vec<u32>, Error> {
        match self.chat {
            None => Ok(self.file(row)?),
            Some(chat) => {
                let tokens = Conversation::from_json(row.content)
                    .map_err(chat::Error::from)
                    .and_then(|conversation| chat.tokens(&conversation, self.tokenizer));
                let tokens =
                    tokens.map_err(|source| Error::Chat { row: row.file_path.to_owned(), source })?;
                Ok(tokens.iter().map(|token| token.id | if token.is_target { LEARNT } else { 0 }).collect())
            }
        }
    }

    /// What is kept of each row beside its tokens: of a file its characters, of a conversation the place of its first
    /// target.
    pub fn measure(&self, row: Row<'_>, tokens: &[u32]) -> u64 {
        match self.chat {
            None => row.content.chars().count() as u64,
            Some(_) => tokens.iter().position(|token| token & LEARNT != 0).map_or(u64::MAX, |at| at as u64),
        }
    }

    fn file(&self, row: Row<'_>) -> Result<Vec<u32>, tokenizer::Error> {
        let is_notebook = row.file_path.to_ascii_lowercase().ends_with(".ipynb");
        let marks = self.notebooks.filter(|_| is_notebook);
        let Some([repository, path]) = self.names else {
            return match marks {
                Some(marks) => self.parts(row.content, marks),
                None => self.text(row.content),
            };
        };
        let mut tokens = vec![repository];
        tokens.extend(self.text(row.repo_id)?);
        tokens.push(path);
        match marks {
            Some(marks) => {
                tokens.extend(self.text(&format!("{}\n", row.file_path))?);
                tokens.extend(self.parts(row.content, marks)?);
            }
            // In one piece, as a prompt is.
            None => tokens.extend(self.text(&format!("{}\n{}", row.file_path, row.content))?),
        }
        Ok(tokens)
    }

    fn text(&self, text: &str) -> Result<Vec<u32>, tokenizer::Error> {
        match self.markup {
            Markup::Text => self.tokenizer.encode_document(text),
            Markup::Control => self.tokenizer.encode_document_as_seed(text),
        }
    }

    /// What stands between marks, each part for itself.
    fn parts(&self, text: &str, marks: [u32; 5]) -> Result<Vec<u32>, tokenizer::Error> {
        let mut tokens = Vec::new();
        let mut rest = text;
        loop {
            let found = NOTEBOOK_MARKS
                .iter()
                .zip(marks)
                .filter_map(|(mark, token)| Some((rest.find(mark)?, mark.len(), token)));
            let Some((at, length, token)) = found.min() else { break };
            let (before, after) = rest.split_at(at);
            if !before.is_empty() {
                tokens.extend(self.text(before)?);
            }
            tokens.push(token);
            rest = after.get(length..).unwrap_or_default();
        }
        if !rest.is_empty() {
            tokens.extend(self.text(rest)?);
        }
        Ok(tokens)
    }
}
