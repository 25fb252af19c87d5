//! A row as tokens: its text, the parts of a notebook behind their marks, and what it is called before it.
//!
//! Marks are control tokens where this program has put them, and text where a file spells them out.

use tunefleet_proto::dataset::NOTEBOOK_MARKS;

use super::documents::{Dataset, Row};
use super::tokenizer::{self, Tokenizer};

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
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Layout {
    /// Of files.
    pub markup: Markup,
    /// Whether repository and path stand before the text.
    pub metadata_prefix: bool,
}

impl Layout {
    /// What the tokens depend on, besides the rows and the tokenizer.
    pub(super) fn key(self, dataset: &Dataset) -> String {
        let mut key = format!("{:?}", self.markup);
        for (is_on, name) in [(self.metadata_prefix, "prefix"), (has_notebooks(dataset), "notebooks")] {
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
        layout: Layout,
    ) -> Result<Self, tokenizer::Error> {
        let Layout { markup, metadata_prefix } = layout;
        let names = match metadata_prefix {
            true => Some(tokenizer.marks(NAME_MARKS, "data.metadata_prefix: true")?),
            false => None,
        };
        let notebooks = match has_notebooks(dataset) {
            true => Some(tokenizer.marks(NOTEBOOK_MARKS, "collect.notebooks: structured")?),
            false => None,
        };
        Ok(Renderer { tokenizer, markup, names, notebooks })
    }

    /// Tokens of a row, without the one that ends it.
    ///
    /// # Errors
    /// When the vocabulary cannot express the text.
    pub fn tokens(&self, row: Row<'_>) -> Result<Vec<u32>, tokenizer::Error> {
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
