//! Where a person would stop: at the end of the line or of the open construct, before what stands after the cursor, and
//! before the same lines come again. Never inside of a bracket or string that the completion itself has opened.
//!
//! All rules are functions of the text so far: completions are short.

/// Brackets, quotes and comments.
mod scan;

use scan::{Event, Scanner};

/// Shortest line, without white space, that is recognised as the one after the cursor, or as a repetition.
const MIN_LINE_CHARS: usize = 4;
/// Lines in a row that are recognised when they come again.
const MAX_REPEATED_LINES: usize = 8;
/// What goes on with a construct on a line of its own, as far out as the construct.
const CONTINUATIONS: [&str; 8] = ["else", "elif", "except", "finally", "catch", "rescue", "ensure", "when"];

/// How far a completion goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Shape {
    /// Until the model ends it.
    #[default]
    Free,
    /// To the end of the line.
    Line,
    /// To the end of the construct that the cursor is in.
    Block,
}

/// Where a completion ends.
#[derive(Debug, Clone, Default)]
pub struct Rules {
    shape: Shape,
    /// Strings that end it wherever they come.
    strings: Vec<String>,
    /// White space that the cursor's line begins with, and whether there is anything else before the cursor.
    indent: usize,
    is_amid_line: bool,
    /// What follows the cursor on its line, and the first line after it that is not blank.
    rest: String,
    next_line: String,
}

/// Where a text ends, and what ended it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct End {
    /// Bytes that are kept.
    pub at: usize,
    /// The string that ended it, which begins there; `None` where a shape did.
    pub string: Option<usize>,
}

impl Shape {
    /// What suits a cursor between these texts: a line where there is something on it, else a block.
    pub fn of(prefix: &str, suffix: &str) -> Self {
        let (line, rest) = (last_line(prefix), first_line(suffix));
        if line.trim().is_empty() && rest.trim().is_empty() { Shape::Block } else { Shape::Line }
    }
}

impl Rules {
    /// Strings alone.
    pub fn strings(strings: Vec<String>) -> Self {
        Rules { strings: without_empty(strings), ..Rules::default() }
    }

    /// Of a completion between two texts.
    pub fn between(shape: Shape, strings: Vec<String>, prefix: &str, suffix: &str) -> Self {
        let line = last_line(prefix);
        let next_line = suffix.lines().skip(1).find(|line| !line.trim().is_empty()).unwrap_or_default();
        Rules {
            shape,
            strings: without_empty(strings),
            indent: indent(line),
            is_amid_line: !line.trim().is_empty(),
            rest: first_line(suffix).trim_end().to_owned(),
            next_line: next_line.trim().to_owned(),
        }
    }

    /// The string of that number.
    pub fn string(&self, number: usize) -> &str {
        self.strings.get(number).map_or("", String::as_str)
    }

    /// Where `text` ends, if it does; `is_whole` says that nothing will follow.
    pub fn end(&self, text: &str, is_whole: bool) -> Option<End> {
        let by_shape = self.shape_end(text, is_whole).map(|at| End { at, string: None });
        let by_string = self
            .strings
            .iter()
            .enumerate()
            .filter_map(|(number, string)| Some(End { at: text.find(string)?, string: Some(number) }));
        by_string.chain(by_shape).min_by_key(|end| end.at)
    }

    /// How much of a text that has not ended can be shown: no rule will take it back.
    pub fn settled(&self, text: &str) -> usize {
        let lines = match self.shape {
            Shape::Free => text.len(),
            // A line is judged as a whole.
            Shape::Line | Shape::Block => {
                text.rfind('\n').map_or(0, |at| if self.shape == Shape::Line { 0 } else { at })
            }
        };
        // What may become one of the strings.
        let begun = self.strings.iter().filter_map(|string| {
            let longest = text.len().min(string.len() - 1);
            let tails = (1..=longest).rev().filter(|bytes| text.is_char_boundary(text.len() - bytes));
            tails
                .map(|bytes| text.len() - bytes)
                .find(|at| text.get(*at..).is_some_and(|tail| string.starts_with(tail)))
        });
        begun.chain([lines]).min().unwrap_or(0)
    }

    fn shape_end(&self, text: &str, is_whole: bool) -> Option<usize> {
        if self.shape == Shape::Free {
            return None;
        }
        let mut scanner = Scanner::default();
        let mut line = Line { begin: 0, is_inside: false };
        let mut closes = false;
        let mut characters = text.char_indices().peekable();
        while let Some((at, character)) = characters.next() {
            let next = characters.peek().map(|(_, next)| *next);
            if next.is_none() && !is_whole {
                // What it is depends on what follows.
                return None;
            }
            match scanner.push(character, next) {
                // The editor has closed it already.
                Event::ClosesOuter if self.rest.trim_start().starts_with(character) => return Some(at),
                Event::ClosesOuter if self.has_closed_below(text, line.begin, at, character) => {
                    return Some(text.get(..line.begin).unwrap_or_default().trim_end_matches('\n').len());
                }
                Event::ClosesOuter => closes = true,
                Event::LineEnd | Event::Nothing => {}
            }
            if character != '\n' && next.is_some() {
                continue;
            }
            let end = if character == '\n' { at } else { text.len() };
            if let Some(end) = self.line_end(text, line, end, closes) {
                return Some(end);
            }
            if character == '\n' {
                line = Line { begin: at + 1, is_inside: scanner.is_inside() };
            }
        }
        None
    }

    /// Where the text ends, if it does with the line that ends at `end`.
    fn line_end(&self, text: &str, line: Line, end: usize, closes: bool) -> Option<usize> {
        let before = text.get(..line.begin).unwrap_or_default();
        let whole = text.get(line.begin..end).unwrap_or_default();
        let cut = before.trim_end_matches('\n').len();
        let is_first = before.trim().is_empty();
        if whole.trim().is_empty() {
            // Two blank lines in a row part what is no longer asked for.
            let parts =
                self.shape == Shape::Block && !line.is_inside && !is_first && before.ends_with("\n\n");
            return parts.then_some(cut);
        }
        let is_judged = !is_first && !line.is_inside;
        if is_judged && (self.is_next(whole) || repeats(before, whole)) {
            return Some(cut);
        }
        if is_judged && self.shape == Shape::Block && self.is_outside(text, whole) {
            return Some(cut);
        }
        let ends_here = text.get(end..).is_some_and(|rest| rest.starts_with('\n'));
        if ends_here && (inside_at(text, end) || self.shape == Shape::Block && !closes) {
            return None;
        }
        let kept = line.begin + self.without_rest(whole);
        if kept < end {
            return Some(kept);
        }
        // A line that is put before another one brings its own end.
        let brings_end = !self.is_amid_line && !self.rest.trim().is_empty();
        ends_here.then_some(if brings_end { end + 1 } else { end })
    }

    /// Whether the bracket that closes the cursor's construct, on a line of its own, stands below the cursor already.
    fn has_closed_below(&self, text: &str, line: usize, at: usize, bracket: char) -> bool {
        let is_alone = text.get(line..at).is_some_and(|before| before.trim().is_empty());
        is_alone && line > 0 && self.rest.trim().is_empty() && self.next_line.starts_with(bracket)
    }

    /// Bytes of a line without the end that stands behind the cursor already.
    fn without_rest(&self, line: &str) -> usize {
        let rest = self.rest.trim();
        if !self.is_amid_line || rest.is_empty() {
            return line.len();
        }
        line.trim_end().strip_suffix(rest).map_or(line.len(), str::len)
    }

    fn is_next(&self, line: &str) -> bool {
        let next =
            if self.rest.trim().is_empty() || self.is_amid_line { &self.next_line } else { &self.rest };
        let next = next.trim();
        next.chars().count() >= MIN_LINE_CHARS && line.trim() == next
    }

    /// Whether a line lies outside of the construct in which the completion began.
    fn is_outside(&self, text: &str, line: &str) -> bool {
        let content = line.trim_start();
        let goes_on = |word: &str| {
            content
                .strip_prefix(word)
                .is_some_and(|rest| !rest.starts_with(|c: char| c.is_alphanumeric() || c == '_'))
        };
        let continues =
            content.starts_with([')', ']', '}']) || CONTINUATIONS.iter().any(|word| goes_on(word));
        match self.is_amid_line {
            true => indent(line) <= self.indent && !continues,
            false => {
                let first = text.lines().find(|line| !line.trim().is_empty()).unwrap_or_default();
                let is_on_cursors_line = !text.trim_start_matches([' ', '\t']).starts_with('\n');
                let begun = indent(first) + if is_on_cursors_line { self.indent } else { 0 };
                indent(line) < begun && !content.starts_with([')', ']', '}'])
            }
        }
    }
}

/// A line of a completion.
#[derive(Debug, Clone, Copy)]
struct Line {
    begin: usize,
    /// Whether it begins inside of something that the completion has opened.
    is_inside: bool,
}

fn inside_at(text: &str, end: usize) -> bool {
    let mut scanner = Scanner::default();
    let mut characters = text.get(..end).unwrap_or_default().chars().peekable();
    while let Some(character) = characters.next() {
        scanner.push(character, characters.peek().copied());
    }
    // The end of the line closes what only lives to its end.
    scanner.push('\n', None);
    scanner.is_inside()
}

/// Whether a line, or lines that end with it, have just been there.
fn repeats(before: &str, line: &str) -> bool {
    // The first one lacks the white space that stands before the cursor.
    let mut lines: Vec<&str> = before.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    lines.push(line.trim());
    let is_long = |lines: &[&str]| lines.iter().any(|line| line.chars().count() >= MIN_LINE_CHARS);
    // One line may well be there twice.
    let times = |count: usize| if count == 1 { 3 } else { 2 };
    (1..=MAX_REPEATED_LINES).any(|count| {
        let Some(first) = lines.len().checked_sub(count * times(count)) else { return false };
        let mut parts = lines.get(first..).unwrap_or_default().chunks(count);
        let one = parts.next().unwrap_or_default();
        is_long(one) && parts.all(|part| part == one)
    })
}

fn without_empty(strings: Vec<String>) -> Vec<String> {
    strings.into_iter().filter(|string| !string.is_empty()).collect()
}

fn last_line(text: &str) -> &str {
    text.rsplit('\n').next().unwrap_or_default()
}

fn first_line(text: &str) -> &str {
    text.split('\n').next().unwrap_or_default()
}

/// Columns of white space at the beginning; a tab is worth four.
fn indent(line: &str) -> usize {
    line.chars().take_while(|c| *c == ' ' || *c == '\t').map(|c| if c == '\t' { 4 } else { 1 }).sum()
}

#[cfg(test)]
mod tests;
