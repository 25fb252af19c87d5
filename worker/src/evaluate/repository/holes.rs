//! Holes in a file, as an editor meets them: a line, several lines, any span, and the arguments of a call.

use std::ops::Range;

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use sha2::{Digest, Sha256};

/// Shortest line, without white space at its ends, that is asked for.
const MIN_LINE_CHARS: usize = 8;
/// Longest hole.
const MAX_HOLE_BYTES: usize = 600;
/// Lines of a hole of several.
const LINES: Range<usize> = 2..6;
/// Longest random span.
const MAX_SPAN_CHARS: usize = 120;
/// Longest arguments.
const MAX_ARGUMENT_BYTES: usize = 200;
/// Names before a bracket that call nothing.
const NO_CALLS: [&str; 22] = [
    "if", "elif", "for", "while", "switch", "match", "catch", "return", "def", "fn", "func", "function",
    "class", "with", "and", "or", "not", "in", "print", "assert", "except", "yield",
];
/// Names before a name that define it.
const DEFINITIONS: [&str; 6] = ["def", "fn", "func", "function", "class", "struct"];

/// What is left out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum HoleKind {
    /// One line, from its first character that is no white space.
    SingleLine,
    /// Two to five lines.
    MultiLine,
    /// Any run of characters.
    RandomSpan,
    /// What stands between the brackets of a call.
    CallArguments,
}

impl HoleKind {
    /// Every kind.
    pub const ALL: [HoleKind; 4] =
        [HoleKind::SingleLine, HoleKind::MultiLine, HoleKind::RandomSpan, HoleKind::CallArguments];

    /// As it is written in results.
    pub fn name(self) -> &'static str {
        match self {
            HoleKind::SingleLine => "single_line",
            HoleKind::MultiLine => "multi_line",
            HoleKind::RandomSpan => "random_span",
            HoleKind::CallArguments => "call_arguments",
        }
    }
}

/// Draws that belong to one file: the same whatever other files there are.
pub struct Draws {
    random: StdRng,
    /// Which files come first when there are too many; looks drawn at random.
    pub priority: u64,
}

impl Draws {
    /// Of a file.
    pub fn of(seed: u64, repo_id: &str, file_path: &str) -> Self {
        let mut hasher = Sha256::new();
        hasher.update(seed.to_le_bytes());
        hasher.update(repo_id.as_bytes());
        hasher.update([0]);
        hasher.update(file_path.as_bytes());
        let digest: [u8; 32] = hasher.finalize().into();
        let word = |at: usize| {
            let bytes = digest.get(at..at + 8).and_then(|bytes| bytes.try_into().ok());
            u64::from_le_bytes(bytes.unwrap_or_default())
        };
        Draws { random: StdRng::seed_from_u64(word(0)), priority: word(8) }
    }

    fn below(&mut self, end: usize) -> Option<usize> {
        (end > 0).then(|| self.random.random_range(0..end))
    }

    fn choose<T: Clone>(&mut self, among: &[T]) -> Option<T> {
        let at = self.below(among.len())?;
        among.get(at).cloned()
    }
}

/// One hole of a kind in `text`, by bytes; `None` where it has no place for one.
pub fn draw(kind: HoleKind, text: &str, draws: &mut Draws) -> Option<Range<usize>> {
    match kind {
        HoleKind::SingleLine => {
            let lines: Vec<_> = lines(text).filter(|line| is_worth_it(text, line)).collect();
            draws.choose(&lines)
        }
        HoleKind::MultiLine => {
            let lines: Vec<_> = lines(text).collect();
            let first = draws.below(lines.len())?;
            let count = LINES.start + draws.below(LINES.len())?;
            let (begin, end) = (lines.get(first)?, lines.get(first + count - 1)?);
            let hole = begin.start..end.end;
            let holds_enough = is_worth_it(text, begin) && !end.is_empty() && hole.len() <= MAX_HOLE_BYTES;
            holds_enough.then_some(hole)
        }
        HoleKind::RandomSpan => {
            let starts: Vec<usize> = text.char_indices().map(|(at, _)| at).collect();
            let begin = draws.below(starts.len())?;
            let count = 1 + draws.below(MAX_SPAN_CHARS)?;
            let hole = *starts.get(begin)?..starts.get(begin + count).copied().unwrap_or(text.len());
            (!text.get(hole.clone())?.trim().is_empty()).then_some(hole)
        }
        HoleKind::CallArguments => draws.choose(&call_arguments(text)),
    }
}

/// Lines without the white space at their ends.
fn lines(text: &str) -> impl Iterator<Item = Range<usize>> + '_ {
    let mut begin = 0;
    text.split_inclusive('\n').map(move |line| {
        let start = begin;
        begin += line.len();
        let trimmed = line.trim_end();
        let indent = trimmed.len() - trimmed.trim_start().len();
        start + indent..start + trimmed.len()
    })
}

fn is_worth_it(text: &str, line: &Range<usize>) -> bool {
    let line = text.get(line.clone()).unwrap_or_default();
    line.chars().count() >= MIN_LINE_CHARS
        && line.len() <= MAX_HOLE_BYTES
        && line.chars().any(char::is_alphanumeric)
}

/// What stands between the brackets of calls: after a name, and not empty.
fn call_arguments(text: &str) -> Vec<Range<usize>> {
    let bytes = text.as_bytes();
    let is_name = |byte: &u8| byte.is_ascii_alphanumeric() || *byte == b'_';
    let word_before = |end: usize| {
        let start = (0..end).rev().take_while(|at| bytes.get(*at).is_some_and(is_name)).last().unwrap_or(end);
        (start, text.get(start..end).unwrap_or_default())
    };
    let mut found = Vec::new();
    for (open, _) in text.match_indices('(') {
        let (start, name) = word_before(open);
        let before = text.get(..start).unwrap_or_default().trim_end_matches(' ');
        let (_, keyword) = word_before(before.len());
        if name.is_empty() || NO_CALLS.contains(&name) || DEFINITIONS.contains(&keyword) {
            continue;
        }
        let inside = open + 1;
        let mut end = (inside + MAX_ARGUMENT_BYTES).min(text.len());
        while !text.is_char_boundary(end) {
            end -= 1;
        }
        let rest = text.get(inside..end).unwrap_or_default();
        let arguments = super::super::text::to_closing_bracket(rest);
        // What was not closed has no end here.
        if arguments.len() < rest.len()
            && arguments.trim().len() > 1
            && rest.get(arguments.len()..).is_some_and(|c| c.starts_with(')'))
        {
            found.push(inside..inside + arguments.len());
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const CODE: &str = "def area(width, height):\n    if (width > 0):\n        return multiply(width, height)\n\n\
                        model = load_model(\"(a)\", device=select(0))\nempty()\n";

    #[test]
    fn arguments_of_calls_are_found_and_nothing_else() {
        let found: Vec<&str> = call_arguments(CODE).into_iter().map(|hole| &CODE[hole]).collect();
        assert_eq!(found, ["width, height", "\"(a)\", device=select(0)"]);
    }

    #[test]
    fn lines_begin_after_their_indentation() {
        let found: Vec<&str> = lines(CODE).map(|line| &CODE[line]).collect();
        assert_eq!(found[1..4], ["if (width > 0):", "return multiply(width, height)", ""]);
    }

    #[test]
    fn a_file_has_the_same_holes_each_time() {
        let holes = || {
            let mut draws = Draws::of(7, "a/b", "c.py");
            HoleKind::ALL.map(|kind| draw(kind, CODE, &mut draws))
        };
        assert_eq!(holes(), holes());
        assert!(holes().iter().flatten().count() >= 2, "{:?}", holes());
        assert_ne!(Draws::of(7, "a/b", "c.py").priority, Draws::of(8, "a/b", "c.py").priority);
    }

    proptest! {
        #[test]
        fn any_text_is_cut_at_characters(text in ".{0,400}", seed in any::<u64>()) {
            let mut draws = Draws::of(seed, "r", "f");
            for kind in HoleKind::ALL {
                for _ in 0..4 {
                    if let Some(hole) = draw(kind, &text, &mut draws) {
                        prop_assert!(text.get(hole).is_some_and(|hole| !hole.is_empty()));
                    }
                }
            }
        }
    }
}
