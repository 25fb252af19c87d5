//! The packing of the original, token for token: buffers of files, a random stream that begins
//! anew in each, windows shuffled within the buffer, and the tail of each buffer dropped.
//!
//! Kept for comparisons with runs of the original; [`packing`](super::packing) has none of
//! these faults. The shuffle's stream is that of Python's `random` after `random.seed(seed)`;
//! each split has its own, where the original's two splits shared one.

use std::sync::{Mutex, PoisonError};

use super::fim::{Cut, Piece, pieces};
use super::mersenne::{PythonRandom, RandomState};
use super::token_cache::TokenFile;
use super::{Error, Settings, Split};

/// Files on which the original measures characters per token.
const RATIO_DOCUMENTS: u64 = 400;

/// When a buffer is full.
#[derive(Debug, Clone, Copy)]
pub struct Buffer {
    /// See [`characters_per_token`].
    pub characters_per_token: f64,
    /// Sequences that it is meant to fill.
    pub sequences: u64,
}

/// Windows of a split.
#[derive(Debug)]
pub struct SeedCompatible {
    tokens: TokenFile,
    settings: Settings,
    /// [`Settings::seed`] as NumPy takes it.
    seed: u32,
    buffer_characters: f64,
    buffers: Mutex<Buffers>,
}

#[derive(Debug)]
struct Buffers {
    marks: Vec<Mark>,
    next: Mark,
    ended: bool,
    /// The buffer read last.
    loaded: Option<Loaded>,
}

/// Where a buffer begins.
#[derive(Debug, Clone)]
struct Mark {
    /// Files read before it, over all passes.
    first_document: u64,
    /// Windows served before it.
    first_window: u64,
    /// The shuffle's stream as this buffer finds it.
    shuffle: PythonRandom,
}

#[derive(Debug)]
struct Loaded {
    buffer: usize,
    tokens: Vec<u32>,
    /// Windows in serving order.
    windows: Vec<u32>,
}

/// Characters per token over the first files of the training split.
pub fn characters_per_token(train: &TokenFile) -> Result<f64, Error> {
    let documents = 0..train.documents().min(RATIO_DOCUMENTS);
    let characters: u64 = documents.clone().map(|document| train.measure(document)).sum();
    let tokens: u64 = documents.map(|document| train.len(document)).sum();
    if characters == 0 || tokens == 0 {
        let problem = "seed_compatible needs text in the first 400 files; use continuous".to_owned();
        return Err(Error::Setting { field: "packing", problem });
    }
    Ok(characters as f64 / tokens as f64)
}

impl SeedCompatible {
    pub fn new(tokens: TokenFile, settings: Settings, buffer: Buffer) -> Result<Self, Error> {
        let seed = u32::try_from(settings.seed).map_err(|_| Error::Setting {
            field: "seed",
            problem: format!("must fit 32 bits with packing: seed_compatible, is {}", settings.seed),
        })?;
        // In the order in which the original multiplies.
        let buffer_characters =
            settings.sequence_tokens as f64 * buffer.characters_per_token * buffer.sequences as f64;
        let next = Mark { first_document: 0, first_window: 0, shuffle: PythonRandom::new(settings.seed) };
        let buffers = Mutex::new(Buffers { marks: Vec::new(), next, ended: false, loaded: None });
        Ok(SeedCompatible { tokens, settings, seed, buffer_characters, buffers })
    }

    /// Windows of the buffers that begin in the first pass.
    pub fn len_per_epoch(&self) -> Result<u64, Error> {
        let mut buffers = self.buffers.lock().unwrap_or_else(PoisonError::into_inner);
        while !buffers.ended && buffers.next.first_document < self.tokens.documents() {
            self.mark_next(&mut buffers)?;
        }
        Ok(buffers.next.first_window)
    }

    /// Tokens of window `index`.
    pub fn window(&self, index: u64) -> Result<Vec<u32>, Error> {
        let mut buffers = self.buffers.lock().unwrap_or_else(PoisonError::into_inner);
        while buffers.next.first_window <= index {
            if buffers.ended {
                let len = buffers.next.first_window;
                return Err(Error::PastEnd { index, split: self.settings.split, len });
            }
            self.mark_next(&mut buffers)?;
        }
        let buffer = buffers.marks.partition_point(|mark| mark.first_window <= index).saturating_sub(1);
        let past_end = || Error::PastEnd { index, split: self.settings.split, len: index };
        let first_window = buffers.marks.get(buffer).map(|mark| mark.first_window).ok_or_else(past_end)?;
        let loaded = match buffers.loaded.take() {
            Some(loaded) if loaded.buffer == buffer => loaded,
            _ => self.load(&buffers, buffer)?,
        };
        let sequence_tokens = self.settings.sequence_tokens as usize;
        let window = loaded.windows.get((index - first_window) as usize);
        let tokens =
            window.and_then(|window| loaded.tokens.chunks_exact(sequence_tokens).nth(*window as usize));
        let tokens = tokens.map(<[u32]>::to_vec).ok_or_else(past_end);
        buffers.loaded = Some(loaded);
        tokens
    }

    /// Walks the next buffer by lengths alone.
    fn mark_next(&self, buffers: &mut Buffers) -> Result<(), Error> {
        let documents = self.tokens.documents();
        let mut mark = buffers.next.clone();
        let mut random = RandomState::new(self.seed);
        let mut characters = 0;
        let mut tokens = 0;
        while (characters as f64) < self.buffer_characters {
            if mark.first_document >= documents && self.settings.split == Split::Validation {
                buffers.ended = true;
                break;
            }
            let document = mark.first_document % documents.max(1);
            characters += self.tokens.measure(document);
            let count = self.settings.markers.count();
            let markers = if self.cut(document, &mut random)?.is_some() { count } else { 0 };
            tokens += self.tokens.len(document) + markers + 1;
            mark.first_document += 1;
        }
        let windows = tokens / self.settings.sequence_tokens;
        mark.shuffle.shuffle(&mut vec![(); windows as usize]);
        mark.first_window += windows;
        let begun = std::mem::replace(&mut buffers.next, mark);
        // A whole pass without a window: the original would read on for ever.
        let idle = buffers.next.first_document - buffers.marks.last().map_or(0, |mark| mark.first_document);
        if windows > 0 {
            buffers.marks.push(begun);
        } else if self.settings.split == Split::Train && idle >= documents {
            return Err(Error::TooFewTokens { sequence_tokens: self.settings.sequence_tokens });
        }
        Ok(())
    }

    /// Reads a marked buffer.
    fn load(&self, buffers: &Buffers, buffer: usize) -> Result<Loaded, Error> {
        let mark = buffers.marks.get(buffer).unwrap_or(&buffers.next);
        let end = buffers.marks.get(buffer + 1).unwrap_or(&buffers.next);
        let Settings { markers, eos, sequence_tokens, .. } = &self.settings;
        let mut random = RandomState::new(self.seed);
        let mut tokens = Vec::new();
        let mut characters = 0;
        for document in mark.first_document..end.first_document {
            // Buffers without a window are not marked, but follow this one all the same.
            if characters as f64 >= self.buffer_characters {
                break;
            }
            let document = document % self.tokens.documents().max(1);
            characters += self.tokens.measure(document);
            let len = self.tokens.len(document);
            match self.cut(document, &mut random)? {
                None => self.tokens.read(document, 0..len, &mut tokens)?,
                Some(cut) => {
                    for piece in pieces(cut, 0..len, markers) {
                        match piece {
                            Piece::Marker(token) => tokens.push(token),
                            Piece::Tokens(range) => self.tokens.read(document, range, &mut tokens)?,
                        }
                    }
                }
            }
            tokens.push(*eos);
        }
        let mut windows: Vec<u32> = (0..(tokens.len() as u64 / sequence_tokens) as u32).collect();
        mark.shuffle.clone().shuffle(&mut windows);
        Ok(Loaded { buffer, tokens, windows })
    }

    /// The original's draws for one file, in its order; none at all when `fim_rate` is 0.
    fn cut(&self, document: u64, random: &mut RandomState) -> Result<Option<Cut>, Error> {
        let rates = &self.settings.rates;
        if rates.fim == 0.0 || !random.coin(rates.fim) {
            return Ok(None);
        }
        let bounds = u32::try_from(self.tokens.len(document) + 1).map_err(|_| Error::Setting {
            field: "packing",
            problem: "seed_compatible takes files below 2^32 tokens; use continuous".to_owned(),
        })?;
        let (a, b) = (u64::from(random.below(bounds)), u64::from(random.below(bounds)));
        Ok(Some(Cut { start: a.min(b), end: a.max(b), spm: random.coin(rates.spm) }))
    }
}
