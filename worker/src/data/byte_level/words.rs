//! Text to words: what GPT-2's regular expression, and the digits that StarCoder sets apart, would find.
//!
//! ```text
//! 's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+
//! ```
//!
//! Read by hand in one pass, since the look-ahead keeps regular expressions slow. Which characters are letters, numbers
//! and spaces is asked of the tables that the expression itself would use.

use regex_syntax::hir::{Class, HirKind};

/// How GPT-2 sees a character. The first three take a space before them into their word.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Other,
    Letter,
    Number,
    Space,
    /// A word of its own, which ends what stands before it.
    Alone,
}

/// The kinds of all characters, by code point.
#[derive(Debug)]
pub struct Splitter {
    kinds: Box<[Kind]>,
}

impl Splitter {
    /// GPT-2's rule; with `digits_alone`, each digit is set apart first. None where the tables are absent.
    pub fn new(digits_alone: bool) -> Option<Self> {
        let mut kinds = vec![Kind::Other; char::MAX as usize + 1].into_boxed_slice();
        for (expression, kind) in [(r"\p{L}", Kind::Letter), (r"\p{N}", Kind::Number), (r"\s", Kind::Space)] {
            let class = regex_syntax::parse(expression).ok()?;
            let HirKind::Class(Class::Unicode(class)) = class.kind() else { return None };
            for range in class.ranges() {
                kinds.get_mut(range.start() as usize..=range.end() as usize)?.fill(kind);
            }
        }
        if digits_alone {
            for digit in (char::MIN..=char::MAX).filter(|c| c.is_numeric()) {
                *kinds.get_mut(digit as usize)? = Kind::Alone;
            }
        }
        Some(Splitter { kinds })
    }

    /// The words of `text`; end to end they are the text.
    pub fn words<'a>(&'a self, text: &'a str) -> impl Iterator<Item = &'a str> {
        let mut begin = 0;
        std::iter::from_fn(move || {
            let end = self.end(text, begin)?;
            let word = text.get(begin..end);
            begin = end;
            word
        })
    }

    /// Kind and bytes of the character at `at`; None at the end.
    fn at(&self, text: &str, at: usize) -> Option<(Kind, usize)> {
        let byte = *text.as_bytes().get(at)?;
        if byte.is_ascii() {
            return Some((*self.kinds.get(usize::from(byte))?, 1));
        }
        let character = text.get(at..)?.chars().next()?;
        Some((*self.kinds.get(character as usize)?, character.len_utf8()))
    }

    /// Where the word ends that begins at `begin`; None at the end of the text.
    fn end(&self, text: &str, begin: usize) -> Option<usize> {
        let (mut kind, mut bytes) = self.at(text, begin)?;
        let first = text.as_bytes().get(begin).copied();
        if first == Some(b'\'')
            && let Some(length) = contraction(text.as_bytes().get(begin + 1..).unwrap_or_default())
        {
            return Some(begin + 1 + length);
        }
        let mut end = begin;
        if first == Some(b' ')
            && let Some((next, next_bytes)) = self.at(text, begin + 1)
            && matches!(next, Kind::Other | Kind::Letter | Kind::Number)
        {
            (kind, bytes, end) = (next, next_bytes, begin + 1);
        }
        end += bytes;
        if kind == Kind::Alone {
            return Some(end);
        }
        loop {
            match self.at(text, end) {
                Some((next, next_bytes)) if next == kind => (end, bytes) = (end + next_bytes, next_bytes),
                // The last of several spaces belongs to what follows.
                Some((next, _)) if kind == Kind::Space && next != Kind::Alone && end - begin > bytes => {
                    return Some(end - bytes);
                }
                _ => return Some(end),
            }
        }
    }
}

/// Bytes of a contraction's ending at the beginning of `rest`, which follows an apostrophe.
fn contraction(rest: &[u8]) -> Option<usize> {
    match rest {
        [b's' | b't' | b'm' | b'd', ..] => Some(1),
        [b'r' | b'v', b'e', ..] | [b'l', b'l', ..] => Some(2),
        _ => None,
    }
}
