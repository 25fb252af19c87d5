//! Fill-in-the-middle on token ids: a document (or a part of one) becomes a row of pieces.
//!
//! The three spans stand between two cuts; any of them may be empty. Order PSM is
//! `<prefix> p <suffix> s <middle> m`; SPM (variant 2 of the paper) is
//! `<prefix> <suffix> s <middle> p m`.

use std::ops::Range;

use super::counter::Draws;
use super::infill::FimTokens;

/// How a run of tokens is rearranged: the middle is `start..end` of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cut {
    /// First token of the middle.
    pub start: u64,
    /// One past the last token of the middle.
    pub end: u64,
    /// Suffix-prefix-middle instead of prefix-suffix-middle.
    pub spm: bool,
}

/// The probabilities of a job.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rates {
    /// Probability of a rearrangement.
    pub fim: f64,
    /// Share of those in order SPM.
    pub spm: f64,
}

impl Rates {
    /// First draw of a stream: whether to rearrange at all. No token is needed to know it.
    pub fn chosen(&self, draws: &mut Draws) -> bool {
        self.fim > 0.0 && draws.chance(self.fim)
    }

    /// The draws after [`chosen`](Self::chosen): two cuts uniform over `0..=len`, then the order.
    pub fn cut(&self, draws: &mut Draws, len: u64) -> Cut {
        let (a, b) = (draws.below(len + 1), draws.below(len + 1));
        Cut { start: a.min(b), end: a.max(b), spm: draws.chance(self.spm) }
    }
}

/// A run of tokens in a rearranged document.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Piece {
    /// One control token.
    Marker(u32),
    /// These tokens of the document.
    Tokens(Range<u64>),
}

impl Piece {
    fn len(&self) -> u64 {
        match self {
            Piece::Marker(_) => 1,
            Piece::Tokens(range) => range.end.saturating_sub(range.start),
        }
    }
}

/// The tokens `span` of a document under `cut`, whose bounds count from the start of the span.
pub fn pieces(cut: Cut, span: Range<u64>, markers: &FimTokens) -> Vec<Piece> {
    let (start, end) = (span.start + cut.start, span.start + cut.end);
    let prefix = Piece::Tokens(span.start..start);
    let middle = Piece::Tokens(start..end);
    let suffix = Piece::Tokens(end..span.end);
    let [pre, suf, mid] = [markers.prefix, markers.suffix, markers.middle].map(Piece::Marker);
    let row = match cut.spm {
        true => [pre, suf, suffix, mid, prefix, middle],
        false => [pre, prefix, suf, suffix, mid, middle],
    };
    row.into_iter().chain(markers.end.map(Piece::Marker)).collect()
}

/// What the pieces of `row`, laid end to end, hold at positions `range`.
pub fn slice(row: &[Piece], range: Range<u64>) -> impl Iterator<Item = Piece> {
    let mut position = 0;
    row.iter().filter_map(move |piece| {
        let begin = position;
        position += piece.len();
        let (from, to) = (range.start.max(begin), range.end.min(position));
        (from < to).then(|| match piece {
            Piece::Marker(token) => Piece::Marker(*token),
            Piece::Tokens(tokens) => {
                Piece::Tokens(tokens.start + (from - begin)..tokens.start + (to - begin))
            }
        })
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::counter::Purpose;
    use super::*;

    const MARKER_TOKENS: FimTokens =
        FimTokens { prefix: 1, middle: 2, suffix: 3, pad: Some(4), end: None, spm: true };

    fn lay_out(tokens: &[u32], pieces: impl IntoIterator<Item = Piece>) -> Vec<u32> {
        let mut out = Vec::new();
        for piece in pieces {
            match piece {
                Piece::Marker(token) => out.push(token),
                Piece::Tokens(range) => out.extend(&tokens[range.start as usize..range.end as usize]),
            }
        }
        out
    }

    /// Undoes a rearrangement by its markers alone.
    fn restore(rearranged: &[u32]) -> Vec<u32> {
        let at = |marker| rearranged.iter().position(|token| *token == marker).unwrap();
        let (suf, mid) = (at(3), at(2));
        let [before, suffix, after] =
            [&rearranged[1..suf], &rearranged[suf + 1..mid], &rearranged[mid + 1..]];
        // In order SPM nothing stands before the suffix, and prefix and middle follow in one run.
        [before, after, suffix].concat()
    }

    #[test]
    fn both_orders_are_those_of_the_paper() {
        let tokens = [10, 11, 12, 13, 14];
        let psm = Cut { start: 1, end: 3, spm: false };
        assert_eq!(lay_out(&tokens, pieces(psm, 0..5, &MARKER_TOKENS)), [1, 10, 3, 13, 14, 2, 11, 12]);
        let spm = Cut { start: 1, end: 3, spm: true };
        assert_eq!(lay_out(&tokens, pieces(spm, 0..5, &MARKER_TOKENS)), [1, 3, 13, 14, 2, 10, 11, 12]);
    }

    #[test]
    fn a_middle_ends_with_its_mark_where_the_family_has_one() {
        let markers = FimTokens { end: Some(5), ..MARKER_TOKENS };
        let psm = Cut { start: 1, end: 2, spm: false };
        assert_eq!(lay_out(&[10, 11, 12], pieces(psm, 0..3, &markers)), [1, 10, 3, 12, 2, 11, 5]);
        assert_eq!(markers.count(), 4);
    }

    proptest! {
        #[test]
        fn a_rearrangement_can_be_undone(tokens in prop::collection::vec(10u32..1000, 0..60), key: u64) {
            let rates = Rates { fim: 1.0, spm: 0.5 };
            let len = tokens.len() as u64;
            let mut draws = Draws::new(key, Purpose::Fim, &[]);
            prop_assert!(rates.chosen(&mut draws));
            let cut = rates.cut(&mut draws, len);
            let rearranged = lay_out(&tokens, pieces(cut, 0..len, &MARKER_TOKENS));
            prop_assert_eq!(rearranged.len() as u64, len + MARKER_TOKENS.count());
            prop_assert_eq!(restore(&rearranged), tokens);
        }

        #[test]
        fn slices_join_to_the_whole(tokens in prop::collection::vec(10u32..1000, 0..40), key: u64, split in 0u64..50) {
            let len = tokens.len() as u64;
            let cut = Rates { fim: 1.0, spm: 0.5 }.cut(&mut Draws::new(key, Purpose::Fim, &[]), len);
            let all = pieces(cut, 0..len, &MARKER_TOKENS);
            let mut joined = lay_out(&tokens, slice(&all, 0..split));
            joined.extend(lay_out(&tokens, slice(&all, split..u64::MAX)));
            prop_assert_eq!(joined, lay_out(&tokens, all));
        }
    }
}
