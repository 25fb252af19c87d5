//! Packing of whole documents: each lies in one sequence, with as many others as fit.
//!
//! An epoch takes the documents in a seeded order and puts each where it leaves the least room (best fit), then serves
//! the sequences in a seeded order. What is longer than a sequence is cut at its end, and a document of which nothing
//! that is learnt is left is not served; both are told, see [`Whole::left_out`]. Where each sequence begins follows from
//! the documents' lengths alone, as in [`packing`](super::packing).

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};

use super::counter::{Draws, Purpose};
use super::render::LEARNT;
use super::token_cache::TokenFile;
use super::{Error, IGNORED, Sequence, Settings, Split};

/// Epochs whose layout is kept.
const RECENT_EPOCHS: usize = 2;

/// Sequences of a split.
#[derive(Debug)]
pub struct Whole {
    tokens: TokenFile,
    settings: Settings,
    /// Documents that are served.
    documents: Vec<u32>,
    epochs: Mutex<Epochs>,
}

#[derive(Debug)]
struct Epochs {
    /// First sequence of each epoch; one more than have been laid out.
    first: Vec<u64>,
    recent: VecDeque<(u64, Arc<Epoch>)>,
}

/// Documents of each sequence, in serving order.
type Epoch = Vec<Vec<u32>>;

impl Whole {
    pub fn new(tokens: TokenFile, settings: Settings) -> Result<Self, Error> {
        let Settings { sequence_tokens, split, .. } = settings;
        let count = u32::try_from(tokens.documents()).unwrap_or(u32::MAX);
        let documents: Vec<u32> =
            (0..count).filter(|document| tokens.measure(u64::from(*document)) < sequence_tokens).collect();
        if documents.is_empty() && (split == Split::Train || count > 0) {
            return Err(Error::NothingLearnt { split, sequence_tokens });
        }
        let epochs = Mutex::new(Epochs { first: vec![0], recent: VecDeque::new() });
        Ok(Whole { tokens, settings, documents, epochs })
    }

    /// Sequences of the first epoch.
    pub fn len_per_epoch(&self) -> u64 {
        if self.documents.is_empty() { 0 } else { self.epoch(0).len() as u64 }
    }

    /// What is not learnt because it is too long, in words.
    pub fn left_out(&self) -> Option<String> {
        let Settings { sequence_tokens, split, .. } = self.settings;
        let lengths = (0..self.tokens.documents()).map(|document| self.tokens.len(document));
        let over: Vec<u64> = lengths
            .filter(|length| *length > sequence_tokens)
            .map(|length| length - sequence_tokens)
            .collect();
        let without = self.tokens.documents() - self.documents.len() as u64;
        (!over.is_empty() || without > 0).then(|| {
            format!(
                "{} of {} conversations of the {} split are longer than data.sequence_tokens ({sequence_tokens}): the \
                 {} tokens at their ends are left out; {without} have nothing to learn before that, and are left out as a \
                 whole",
                over.len(),
                self.tokens.documents(),
                split.name(),
                over.iter().sum::<u64>(),
            )
        })
    }

    /// Sequence `index`, padded with `pad`.
    pub fn sequence(&self, index: u64, pad: u32) -> Result<Sequence, Error> {
        let past_end = || Error::PastEnd { index, split: self.settings.split, len: self.len_per_epoch() };
        if self.documents.is_empty() {
            return Err(past_end());
        }
        let (epoch, place) = self.locate(index).ok_or_else(past_end)?;
        let layout = self.epoch(epoch);
        let sequence_tokens = self.settings.sequence_tokens as usize;
        let mut out = Sequence {
            tokens: Vec::with_capacity(sequence_tokens),
            targets: Vec::with_capacity(sequence_tokens),
            documents: Vec::new(),
        };
        let mut document_tokens = Vec::new();
        for document in layout.get(place as usize).into_iter().flatten() {
            document_tokens.clear();
            self.tokens.read(u64::from(*document), 0..sequence_tokens as u64, &mut document_tokens)?;
            let target = |next: &u32| if next & LEARNT != 0 { i64::from(next & !LEARNT) } else { IGNORED };
            out.targets.extend(document_tokens.iter().skip(1).map(target));
            out.targets.push(IGNORED);
            out.tokens.extend(document_tokens.iter().map(|token| token & !LEARNT));
            out.documents.push(document_tokens.len() as u32);
        }
        let free = sequence_tokens.saturating_sub(out.tokens.len());
        if free > 0 {
            out.documents.push(free as u32);
        }
        out.tokens.resize(sequence_tokens, pad);
        out.targets.resize(sequence_tokens, IGNORED);
        Ok(out)
    }

    /// Epoch of a sequence, and its place there; `None` past the end of a split that has one.
    fn locate(&self, index: u64) -> Option<(u64, u64)> {
        loop {
            let laid_out = {
                let epochs = self.epochs.lock().unwrap_or_else(PoisonError::into_inner);
                let after = epochs.first.partition_point(|first| *first <= index);
                if let (Some(first), true) = (epochs.first.get(after - 1), after < epochs.first.len()) {
                    return Some((after as u64 - 1, index - first));
                }
                epochs.first.len() as u64 - 1
            };
            if self.settings.split == Split::Validation && laid_out > 0 {
                return None;
            }
            self.epoch(laid_out);
        }
    }

    /// The layout of an epoch whose beginning is known.
    fn epoch(&self, epoch: u64) -> Arc<Epoch> {
        let mut epochs = self.epochs.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, layout)) = epochs.recent.iter().find(|(number, _)| *number == epoch) {
            return layout.clone();
        }
        let layout = Arc::new(self.lay_out(epoch));
        if epochs.first.len() as u64 == epoch + 1 {
            let first = epochs.first.last().copied().unwrap_or(0);
            epochs.first.push(first + layout.len() as u64);
        }
        epochs.recent.push_back((epoch, layout.clone()));
        if epochs.recent.len() > RECENT_EPOCHS {
            epochs.recent.pop_front();
        }
        layout
    }

    fn lay_out(&self, epoch: u64) -> Epoch {
        let sequence_tokens = self.settings.sequence_tokens;
        let shuffled = |purpose, count: usize| -> Vec<u32> {
            let count = u32::try_from(count).unwrap_or(u32::MAX);
            match self.settings.split {
                Split::Train => {
                    let key = [self.settings.split as u64, epoch];
                    Draws::new(self.settings.seed, purpose, &key).permutation(count)
                }
                Split::Validation => (0..count).collect(),
            }
        };
        let mut sequences: Epoch = Vec::new();
        // By what is free, the sequences that have that much.
        let mut open: BTreeMap<u64, Vec<usize>> = BTreeMap::new();
        for at in shuffled(Purpose::DocumentOrder, self.documents.len()) {
            let Some(document) = self.documents.get(at as usize).copied() else { continue };
            let length = self.tokens.len(u64::from(document)).min(sequence_tokens);
            let fit = open.range(length..).next().map(|(free, _)| *free);
            let (place, free) = match fit.and_then(|free| Some((open.get_mut(&free)?.pop()?, free))) {
                Some((place, free)) => {
                    if open.get(&free).is_some_and(Vec::is_empty) {
                        open.remove(&free);
                    }
                    (place, free)
                }
                None => {
                    sequences.push(Vec::new());
                    (sequences.len() - 1, sequence_tokens)
                }
            };
            if let Some(sequence) = sequences.get_mut(place) {
                sequence.push(document);
            }
            if free > length {
                open.entry(free - length).or_default().push(place);
            }
        }
        let order = shuffled(Purpose::WindowOrder, sequences.len());
        order.into_iter().filter_map(|at| sequences.get_mut(at as usize).map(std::mem::take)).collect()
    }
}
