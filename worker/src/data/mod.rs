//! Dataset segments -> documents -> tokens -> sequences.
//!
//! A sequence is a pure function of (dataset, tokenizer, settings, index): a resume seeks, it
//! does not replay, and ranks need not talk to each other about data.

/// Dataset segments -> documents.
pub mod documents;
/// Text -> tokens, fast.
mod byte_level;
/// Documents -> tokens, and back.
pub mod tokenizer;
/// `worker tokenizer train`.
pub mod train_tokenizer;
/// Rows as tokens.
pub mod render;
/// The tokens of a split, made once and read by position.
pub mod token_cache;
/// Random numbers by position.
pub mod counter;
/// Rearrangement for infilling.
pub mod fim;
/// How families mark the three spans.
pub mod infill;
/// The default packing: one endless stream.
mod packing;
/// Whole documents, as many in a sequence as fit.
mod whole;
/// The generators of NumPy and Python.
mod mersenne;
/// The original's packing, token for token.
mod seed_compatible;

use std::io::Read;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use sha2::{Digest, Sha256};
use tunefleet_proto::job::{DataSpec, FimLevel, Packing};

use documents::Dataset;
use fim::Rates;
use infill::FimTokens;
use render::{Layout, Markup};
use token_cache::TokenFile;
use tokenizer::Tokenizer;

use crate::chat::Chat;

/// Target that takes no part in the loss.
pub const IGNORED: i64 = -100;
/// Sequences that one buffer of the original is meant to fill.
pub const SEED_BUFFER_SEQUENCES: u64 = 1024;

/// Which files.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Split {
    /// Learned from.
    Train,
    /// Held out.
    Validation,
}

impl Split {
    /// Name in file names and messages.
    pub fn name(self) -> &'static str {
        match self {
            Split::Train => "train",
            Split::Validation => "validation",
        }
    }
}

/// Why there are no sequences.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The dataset cannot be read.
    #[error(transparent)]
    Documents(#[from] documents::Error),
    /// The tokenizer cannot be used.
    #[error(transparent)]
    Tokenizer(#[from] tokenizer::Error),
    /// The token cache cannot be built or read.
    #[error(transparent)]
    TokenCache(#[from] token_cache::Error),
    /// The template of conversations cannot be used.
    #[error(transparent)]
    Chat(#[from] crate::chat::Error),
    /// Conversations, of which none can be learnt from.
    #[error(
        "no conversation of the {} split has anything to learn within {sequence_tokens} tokens; raise data.sequence_tokens,          or correct the template",
        split.name()
    )]
    NothingLearnt {
        /// Which.
        split: Split,
        /// Tokens of a sequence.
        sequence_tokens: u64,
    },
    /// A setting that the job file's checks let through.
    #[error("data.{field}: {problem}")]
    Setting {
        /// Field of the job file.
        field: &'static str,
        /// Rule and value.
        problem: String,
    },
    /// Nothing to learn from.
    #[error("dataset {0}: the training split holds no document; collect again with other filters")]
    NoDocuments(String),
    /// The original's rule drops everything.
    #[error(
        "the training split is too small for packing: seed_compatible: no buffer fills one sequence of \
         {sequence_tokens} tokens; use packing: continuous or lower data.sequence_tokens"
    )]
    TooFewTokens {
        /// Tokens of a sequence.
        sequence_tokens: u64,
    },
    /// A finite split was read past its end.
    #[error("sequence {index} of the {} split does not exist; it has {len}", split.name())]
    PastEnd {
        /// What was asked for.
        index: u64,
        /// Which split.
        split: Split,
        /// What there is.
        len: u64,
    },
}

/// One row of a batch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sequence {
    /// Input, `sequence_tokens` long.
    pub tokens: Vec<u32>,
    /// What follows each input token; [`IGNORED`] after the last one, in padding, and where that is not learnt.
    pub targets: Vec<i64>,
    /// Tokens of each document, padding being one; they fill the sequence.
    pub documents: Vec<u32>,
}

impl Sequence {
    /// Pads `tokens` to `sequence_tokens` and shifts them into targets; where documents are apart, `end` ends one, and
    /// what follows it is no target.
    fn new(mut tokens: Vec<u32>, sequence_tokens: u64, pad: u32, end: Option<u32>) -> Self {
        let target = |pair: &[u32]| match pair {
            [token, next] if Some(*token) != end => i64::from(*next),
            _ => IGNORED,
        };
        let mut targets: Vec<i64> = tokens.windows(2).map(target).collect();
        tokens.resize(sequence_tokens as usize, pad);
        targets.resize(sequence_tokens as usize, IGNORED);
        let documents = match end {
            Some(end) => documents_ended_by(&tokens, end),
            None => vec![tokens.len() as u32],
        };
        Sequence { tokens, targets, documents }
    }
}

/// Tokens of each document, where `end` ends one. Several of those in a row, as padding has them, are one document.
fn documents_ended_by(tokens: &[u32], end: u32) -> Vec<u32> {
    let (mut documents, mut begin) = (Vec::new(), 0);
    for (at, token) in tokens.iter().enumerate() {
        if tokens.get(at + 1).is_none_or(|next| *token == end && *next != end) {
            documents.push((at + 1 - begin) as u32);
            begin = at + 1;
        }
    }
    documents
}

/// What both packings need to know.
#[derive(Debug, Clone)]
struct Settings {
    sequence_tokens: u64,
    rates: Rates,
    level: FimLevel,
    seed: u64,
    split: Split,
    eos: u32,
    /// Between two documents.
    border: Vec<u32>,
    /// Meaningless markers when `rates.fim` is 0.
    markers: FimTokens,
}

/// The sequences of one split. Sequence `i` is the same whenever and wherever it is asked for.
#[derive(Debug)]
pub struct Sequences {
    packed: Packed,
    sequence_tokens: u64,
    pad: u32,
    document_end: Option<u32>,
    /// Whether documents of a sequence do not see each other.
    keeps_apart: bool,
    len_per_epoch: u64,
    dataset_digest: String,
    tokenizer_digest: String,
    vocab_size: u64,
}

#[derive(Debug)]
enum Packed {
    Continuous(packing::Continuous),
    SeedCompatible(seed_compatible::SeedCompatible),
    Whole(whole::Whole),
}

impl Sequences {
    /// Opens a split; the first to open it tokenises it into `cache_dir`, others wait for that.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn open(
        spec: &DataSpec,
        dataset: &Path,
        tokenizer: &Path,
        split: Split,
        cache_dir: &Path,
    ) -> Result<Self, Error> {
        Self::open_with_buffer(spec, dataset, tokenizer, split, cache_dir, SEED_BUFFER_SEQUENCES)
    }

    /// As [`open`](Self::open), with another buffer size for the seed-compatible packing.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn open_with_buffer(
        spec: &DataSpec,
        dataset: &Path,
        tokenizer: &Path,
        split: Split,
        cache_dir: &Path,
        buffer_sequences: u64,
    ) -> Result<Self, Error> {
        check(spec)?;
        let dataset = Dataset::open(dataset)?;
        let place = tokenizer;
        let tokenizer = Tokenizer::load(place)?;
        let chat =
            spec.chat.as_ref().map(|chat| Chat::of_tokenizer(place, &tokenizer, chat.loss)).transpose()?;
        if dataset.is_chat() != chat.is_some() {
            let (holds, needs) = match dataset.is_chat() {
                true => ("conversations", "data.chat.template says how they become tokens: give it"),
                false => ("files", "data.chat is for conversations: leave it out"),
            };
            let dir = dataset.dir().display();
            return Err(Error::Setting { field: "chat", problem: format!("{dir} holds {holds}; {needs}") });
        }
        let eos = tokenizer.eos();
        let markers = if spec.fim_rate > 0.0 {
            tokenizer.fim()?
        } else {
            FimTokens { prefix: eos, middle: eos, suffix: eos, pad: None, end: None, spm: true }
        };
        if split == Split::Train && dataset.len(split) == 0 {
            return Err(Error::NoDocuments(dataset.dir().display().to_string()));
        }
        let settings = Settings {
            sequence_tokens: u64::from(spec.sequence_tokens),
            rates: Rates { fim: spec.fim_rate, spm: spec.fim_spm_rate },
            level: spec.fim_level,
            seed: spec.seed,
            split,
            eos,
            border: tokenizer.border(),
            markers,
        };
        let tokens = |split, markup| {
            let layout = match &chat {
                Some(chat) => Layout::Chat(chat),
                None => Layout::Code { markup, metadata_prefix: spec.metadata_prefix },
            };
            TokenFile::open(&dataset, &tokenizer, split, layout, cache_dir)
        };
        let packed = match spec.packing {
            Packing::Continuous => {
                Packed::Continuous(packing::Continuous::new(tokens(split, Markup::Text)?, settings))
            }
            Packing::SeedCompatible => {
                let train = tokens(Split::Train, Markup::Control)?;
                let characters_per_token = seed_compatible::characters_per_token(&train)?;
                let own = match split {
                    Split::Train => train,
                    Split::Validation => tokens(split, Markup::Control)?,
                };
                let buffer = seed_compatible::Buffer { characters_per_token, sequences: buffer_sequences };
                Packed::SeedCompatible(seed_compatible::SeedCompatible::new(own, settings, buffer)?)
            }
            Packing::Whole => Packed::Whole(whole::Whole::new(tokens(split, Markup::Text)?, settings)?),
        };
        let len_per_epoch = match &packed {
            Packed::Continuous(packed) => packed.len_per_epoch(),
            Packed::SeedCompatible(packed) => packed.len_per_epoch()?,
            Packed::Whole(packed) => packed.len_per_epoch(),
        };
        Ok(Sequences {
            packed,
            sequence_tokens: u64::from(spec.sequence_tokens),
            pad: tokenizer.fim().ok().and_then(|markers| markers.pad).unwrap_or(eos),
            document_end: spec.document_mask.then_some(eos),
            keeps_apart: spec.document_mask,
            len_per_epoch,
            dataset_digest: dataset.digest(),
            tokenizer_digest: tokenizer.digest().to_owned(),
            vocab_size: tokenizer.vocab_size(),
        })
    }

    /// Sequences that begin in the first pass over the files. The training split goes on without
    /// end; of the validation split these are all, the last one padded.
    pub fn len_per_epoch(&self) -> u64 {
        self.len_per_epoch
    }

    /// Sequence `index`, counted from the beginning of the job.
    ///
    /// # Errors
    /// When a finite split ends before `index`, or the token cache cannot be read.
    pub fn sequence(&self, index: u64) -> Result<Sequence, Error> {
        let tokens = match &self.packed {
            Packed::Continuous(packed) => packed.window(index)?,
            Packed::SeedCompatible(packed) => packed.window(index)?,
            Packed::Whole(packed) => return packed.sequence(index, self.pad),
        };
        Ok(Sequence::new(tokens, self.sequence_tokens, self.pad, self.document_end))
    }

    /// Whether documents of a sequence do not see each other.
    pub fn keeps_apart(&self) -> bool {
        self.keeps_apart
    }

    /// What is not learnt of documents that are longer than a sequence, in words.
    pub fn left_out(&self) -> Option<String> {
        match &self.packed {
            Packed::Whole(packed) => packed.left_out(),
            Packed::Continuous(_) | Packed::SeedCompatible(_) => None,
        }
    }

    /// Changes with any file's content.
    pub fn dataset_digest(&self) -> &str {
        &self.dataset_digest
    }

    /// Changes with any byte of `tokenizer.json`.
    pub fn tokenizer_digest(&self) -> &str {
        &self.tokenizer_digest
    }

    /// Highest token id plus one.
    pub fn vocab_size(&self) -> u64 {
        self.vocab_size
    }
}

fn check(spec: &DataSpec) -> Result<(), Error> {
    for (field, rate) in [("fim_rate", spec.fim_rate), ("fim_spm_rate", spec.fim_spm_rate)] {
        if !(0.0..=1.0).contains(&rate) {
            return Err(Error::Setting { field, problem: format!("must lie between 0 and 1, is {rate}") });
        }
    }
    if spec.sequence_tokens < 2 {
        let problem = format!("must be at least 2, is {}", spec.sequence_tokens);
        return Err(Error::Setting { field: "sequence_tokens", problem });
    }
    if spec.packing == Packing::SeedCompatible && spec.fim_level == FimLevel::Window {
        let problem = "the original has no such level: use document, or packing: continuous".to_owned();
        return Err(Error::Setting { field: "fim_level", problem });
    }
    Ok(())
}

/// Turns a panic of a third-party parser into an error: files are untrusted input.
fn guarded<T, E: ToString>(parse: impl FnOnce() -> Result<T, E>) -> Result<T, String> {
    match catch_unwind(AssertUnwindSafe(parse)) {
        Ok(result) => result.map_err(|error| error.to_string()),
        Err(_) => Err("the file is malformed (its parser panicked)".to_owned()),
    }
}

/// Feeds a hasher in bounded memory.
fn hash_stream(mut reader: impl Read, hasher: &mut Sha256) -> std::io::Result<()> {
    let mut buffer = vec![0u8; 1 << 20];
    loop {
        let read = reader.read(&mut buffer)?;
        match buffer.get(..read) {
            Some(bytes) if !bytes.is_empty() => hasher.update(bytes),
            _ => return Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn documents_end_with_their_last_token_and_padding_is_one() {
        for (row, documents) in
            [(&[5, 6, 0, 7, 8, 9], &[3, 3][..]), (&[5, 0, 6, 0, 0, 0], &[2, 4]), (&[5, 6, 7, 8, 9, 5], &[6])]
        {
            assert_eq!(documents_ended_by(row, 0), documents);
        }
    }
}
