//! The default packing: documents end to end in one endless stream, cut into windows.
//!
//! Each epoch is a seeded permutation of the documents. Windows cross the borders of documents
//! and epochs, so no token is dropped; within an epoch they are served in a seeded permutation,
//! so that rows of a batch come from different files. The validation split is one epoch in
//! order, its last window shorter.
//!
//! Where each window of an epoch begins follows from the documents' lengths alone. That is
//! computed once per epoch, and an epoch needs of the one before only how full its last window
//! was left: reaching epoch `e` costs `e` passes over the lengths, and any window of it one
//! read of its own tokens.
//!
//! Two levels of fill-in-the-middle:
//! - document: a document is rearranged whole and then cut as it comes.
//! - window: what a window takes of a document is a part, and a part is rearranged for itself.
//!   Its markers count against the window, so the part takes as many tokens less of the
//!   document; parts with fewer than [`MIN_INFILL`] tokens stay as they are. What stands between
//!   two documents closes the last part where it fits, else it opens the next window.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use tunefleet_proto::job::FimLevel;

use super::counter::{Draws, Purpose};
use super::fim::{Piece, pieces, slice};
use super::token_cache::TokenFile;
use super::{Error, Settings, Split};

/// Shortest part that is rearranged at level window: of less, markers would be the larger half.
pub const MIN_INFILL: u64 = 4;
/// Epochs whose layout is kept: a window may cross into the next one.
const RECENT_EPOCHS: usize = 3;

/// Windows of a split.
#[derive(Debug)]
pub struct Continuous {
    tokens: TokenFile,
    settings: Settings,
    epochs: Mutex<Epochs>,
}

#[derive(Debug)]
struct Epochs {
    /// Where each epoch begins; one more than have been laid out.
    borders: Vec<Border>,
    recent: VecDeque<(u64, Arc<Epoch>)>,
}

#[derive(Debug, Clone, Copy)]
struct Border {
    /// Windows that begin in earlier epochs.
    first_window: u64,
    /// Tokens that the last of them still lacks.
    free: u64,
}

#[derive(Debug)]
struct Epoch {
    /// Documents in reading order.
    order: Vec<u32>,
    /// Where the windows of this epoch begin.
    starts: Vec<Place>,
    /// Windows in serving order.
    windows: Vec<u32>,
}

/// A place in an epoch's stream.
#[derive(Debug, Clone, Copy)]
struct Place {
    /// Index into the order of documents.
    position: usize,
    /// Tokens of the document consumed so far.
    offset: u64,
}

/// What a window takes next of a document.
#[derive(Debug)]
struct Part {
    /// Tokens of the document that are consumed.
    advance: u64,
    /// Tokens of the window that are filled.
    used: u64,
    /// Whether the document ends here.
    ends: bool,
    /// Which document tokens are rearranged, with the draws to do it.
    infill: Option<(Range<u64>, Draws)>,
}

impl Continuous {
    pub fn new(tokens: TokenFile, settings: Settings) -> Self {
        let epochs = Epochs { borders: vec![Border { first_window: 0, free: 0 }], recent: VecDeque::new() };
        Continuous { tokens, settings, epochs: Mutex::new(epochs) }
    }

    /// Windows that begin in epoch 0.
    pub fn len_per_epoch(&self) -> u64 {
        self.epoch(0).starts.len() as u64
    }

    /// Tokens of window `index`; fewer than a full window only at the end of the validation split.
    pub fn window(&self, index: u64) -> Result<Vec<u32>, Error> {
        let (mut epoch, rank) = self.locate(index)?;
        let mut layout = self.epoch(epoch);
        let start = layout.windows.get(rank as usize).and_then(|window| layout.starts.get(*window as usize));
        // `locate` answers only with windows that exist.
        let Some(mut place) = start.copied() else { return Err(self.past_end(index)) };
        let mut free = self.settings.sequence_tokens;
        let mut out = Vec::with_capacity(free as usize);
        while free > 0 {
            let Some(document) = layout.order.get(place.position).copied().map(u64::from) else {
                if self.settings.split == Split::Validation {
                    break;
                }
                epoch += 1;
                layout = self.epoch(epoch);
                place = Place { position: 0, offset: 0 };
                continue;
            };
            let part = self.part(epoch, document, place.offset, free);
            self.emit(document, place.offset, &part, &mut out)?;
            free -= part.used;
            place.offset += part.advance;
            if part.ends {
                place = Place { position: place.position + 1, offset: 0 };
            }
        }
        Ok(out)
    }

    /// Epoch of window `index`, and its rank in the serving order of that epoch.
    fn locate(&self, index: u64) -> Result<(u64, u64), Error> {
        loop {
            let laid_out = {
                let epochs = self.epochs.lock().unwrap_or_else(PoisonError::into_inner);
                let after = epochs.borders.partition_point(|border| border.first_window <= index);
                let border = after.checked_sub(1).and_then(|i| epochs.borders.get(i));
                if let (Some(border), true) = (border, after < epochs.borders.len()) {
                    return Ok((after as u64 - 1, index - border.first_window));
                }
                epochs.borders.len() as u64 - 1
            };
            if self.settings.split == Split::Validation && laid_out > 0 {
                return Err(self.past_end(index));
            }
            self.epoch(laid_out);
        }
    }

    fn past_end(&self, index: u64) -> Error {
        Error::PastEnd { index, split: self.settings.split, len: self.len_per_epoch() }
    }

    /// The layout of an epoch whose border is known.
    fn epoch(&self, epoch: u64) -> Arc<Epoch> {
        let mut epochs = self.epochs.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, layout)) = epochs.recent.iter().find(|(number, _)| *number == epoch) {
            return layout.clone();
        }
        // A window crosses into at most the next epoch at a time, so this runs at most once more.
        while (epochs.borders.len() as u64) <= epoch {
            let last = epochs.borders.len() as u64 - 1;
            self.lay_out(last, &mut epochs);
        }
        self.lay_out(epoch, &mut epochs)
    }

    /// Computes an epoch from its border, and with it the next border.
    fn lay_out(&self, epoch: u64, epochs: &mut Epochs) -> Arc<Epoch> {
        let border = epochs.borders.get(epoch as usize).copied();
        let Border { first_window, mut free } = border.unwrap_or(Border { first_window: 0, free: 0 });
        let documents = u32::try_from(self.tokens.documents()).unwrap_or(u32::MAX);
        let order = match self.settings.split {
            Split::Train => self.draws(Purpose::DocumentOrder, &[epoch]).permutation(documents),
            Split::Validation => (0..documents).collect(),
        };
        let mut starts = Vec::new();
        for (position, document) in order.iter().enumerate() {
            let mut offset = 0;
            loop {
                if free == 0 {
                    starts.push(Place { position, offset });
                    free = self.settings.sequence_tokens;
                }
                let part = self.part(epoch, u64::from(*document), offset, free);
                free -= part.used;
                offset += part.advance;
                if part.ends {
                    break;
                }
            }
        }
        let count = u32::try_from(starts.len()).unwrap_or(u32::MAX);
        let windows = match self.settings.split {
            Split::Train => self.draws(Purpose::WindowOrder, &[epoch]).permutation(count),
            Split::Validation => (0..count).collect(),
        };
        if epochs.borders.len() as u64 == epoch + 1 {
            epochs.borders.push(Border { first_window: first_window + starts.len() as u64, free });
        }
        let layout = Arc::new(Epoch { order, starts, windows });
        epochs.recent.push_back((epoch, layout.clone()));
        if epochs.recent.len() > RECENT_EPOCHS {
            epochs.recent.pop_front();
        }
        layout
    }

    fn draws(&self, purpose: Purpose, position: &[u64]) -> Draws {
        let mut key = vec![self.settings.split as u64];
        key.extend(position);
        Draws::new(self.settings.seed, purpose, &key)
    }

    /// What a window with `free` tokens takes of a document from `offset` on.
    fn part(&self, epoch: u64, document: u64, offset: u64, free: u64) -> Part {
        let Settings { rates, markers, border, level, .. } = &self.settings;
        let (len, border, markers) = (self.tokens.len(document), border.len() as u64, markers.count());
        match level {
            FimLevel::Document => {
                let mut draws = self.draws(Purpose::Fim, &[epoch, document]);
                let infill = rates.chosen(&mut draws).then_some((0..len, draws));
                let total = len + border + if infill.is_some() { markers } else { 0 };
                let used = (total - offset).min(free);
                Part { advance: used, used, ends: offset + used == total, infill }
            }
            FimLevel::Window => {
                let left = len - offset.min(len);
                let mut draws = self.draws(Purpose::Fim, &[epoch, document, offset]);
                let content = left.min(free.saturating_sub(markers));
                if content >= MIN_INFILL && rates.chosen(&mut draws) {
                    let ends = content == left && content + markers + border <= free;
                    let advance = content + if ends { border } else { 0 };
                    let infill = Some((offset..offset + content, draws));
                    return Part { advance, used: advance + markers, ends, infill };
                }
                let used = (len + border - offset).min(free);
                Part { advance: used, used, ends: offset + used == len + border, infill: None }
            }
        }
    }

    /// Appends the tokens of a part.
    fn emit(&self, document: u64, offset: u64, part: &Part, out: &mut Vec<u32>) -> Result<(), Error> {
        let Settings { rates, markers, border, level, .. } = &self.settings;
        let border = border.iter().copied().map(Piece::Marker);
        let (row, range) = match &part.infill {
            None => {
                let whole =
                    std::iter::once(Piece::Tokens(0..self.tokens.len(document))).chain(border).collect();
                (whole, offset..offset + part.used)
            }
            Some((span, draws)) => {
                let cut = rates.cut(&mut draws.clone(), span.end - span.start);
                let mut row = pieces(cut, span.clone(), markers);
                row.extend(border);
                let from = if *level == FimLevel::Document { offset } else { 0 };
                (row, from..from + part.used)
            }
        };
        for piece in slice(&row, range) {
            match piece {
                Piece::Marker(token) => out.push(token),
                Piece::Tokens(tokens) => self.tokens.read(document, tokens, out)?,
            }
        }
        Ok(())
    }
}
