//! What a template made of a conversation: text, control tokens, and what the assistant says.
//!
//! Contents are people's: a control token spelt out in one must stay text, and only the template knows where it put
//! which. So before rendering a *guard*, a character that occurs nowhere else, is put before each such spelling in the
//! contents; in what is rendered, a spelling behind a guard is text, and any other is the template's own.

use std::ops::Range;

use aho_corasick::{AhoCorasick, MatchKind};
use tunefleet_proto::chat::Message;

use super::template::{Brackets, Template};
use super::{Error, Token};
use crate::data::tokenizer::{Place, Special, Tokenizer};

/// Characters for private use, of which those that a conversation does not hold serve as marks.
const PRIVATE: [Range<u32>; 3] = [0xe000..0xf900, 0xf_0000..0xf_fffe, 0x10_0000..0x10_fffe];

/// Finds control tokens that are spelt out.
#[derive(Debug)]
pub struct Marks {
    specials: Vec<Special>,
    /// Every spelling, those within others too.
    all: Option<AhoCorasick>,
    /// The first, and of several the longest, as tokenizers look for them.
    longest: Option<AhoCorasick>,
}

/// A control token in a text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Control {
    /// Its bytes, with the white space that it swallows.
    pub range: Range<usize>,
    pub id: u32,
}

/// A text with what is known of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rendered {
    pub text: String,
    pub controls: Vec<Control>,
    /// What the assistant says.
    pub generated: Vec<Range<usize>>,
}

impl Marks {
    pub fn new(tokenizer: &Tokenizer) -> Self {
        let specials = tokenizer.specials();
        let spellings: Vec<&str> = specials.iter().map(|special| special.content.as_str()).collect();
        let search = |kind| AhoCorasick::builder().match_kind(kind).build(&spellings).ok();
        let (all, longest) = (search(MatchKind::Standard), search(MatchKind::LeftmostLongest));
        Marks { specials, all, longest }
    }

    /// Renders `messages` by `template`, up to where an answer begins if it `asks` for one.
    pub fn render(&self, template: &Template, messages: &[Message], asks: bool) -> Result<Rendered, Error> {
        let contents: Vec<String> = messages.iter().map(|message| message.content.clone()).collect();
        let [guard, open, close] = unused(&contents, template)?;
        let brackets = Brackets { open, close };
        let guarded: Vec<String> = contents.iter().map(|content| self.guarded(content, guard)).collect();
        let made = template.render(messages, &guarded, asks, brackets)?;
        if guarded != contents {
            // A template that takes contents apart may have seen the guards.
            let plain = template.render(messages, &contents, asks, brackets)?;
            if made.replace(guard, "") != plain {
                return Err(Error::Render {
                    name: template.name().to_owned(),
                    problem: "a turn spells out a control token, and the template does more with turns than putting them \
                              down: leave the turn out"
                        .to_owned(),
                });
            }
        }
        Ok(self.parsed(&made, guard, brackets))
    }

    /// `content` with a guard before each control token that it spells out.
    fn guarded(&self, content: &str, guard: char) -> String {
        let Some(all) = &self.all else { return content.to_owned() };
        let mut starts: Vec<usize> = all.find_overlapping_iter(content).map(|found| found.start()).collect();
        if starts.is_empty() {
            return content.to_owned();
        }
        starts.sort_unstable();
        starts.dedup();
        let mut out = String::with_capacity(content.len() + starts.len() * guard.len_utf8());
        let mut done = 0;
        for start in starts {
            out.push_str(content.get(done..start).unwrap_or_default());
            out.push(guard);
            done = start;
        }
        out.push_str(content.get(done..).unwrap_or_default());
        out
    }

    /// Takes guards and brackets out of what was rendered.
    fn parsed(&self, made: &str, guard: char, brackets: Brackets) -> Rendered {
        let mut out =
            Rendered { text: String::with_capacity(made.len()), controls: Vec::new(), generated: Vec::new() };
        let mut opened = None;
        let mut plain = |piece: &str, out: &mut Rendered| {
            for character in piece.chars() {
                if character == brackets.open {
                    opened = Some(out.text.len());
                } else if character == brackets.close {
                    out.generated.extend(opened.take().map(|begin| begin..out.text.len()));
                } else if character != guard {
                    out.text.push(character);
                }
            }
        };
        let mut done = 0;
        let found = self.longest.as_ref().map(|longest| longest.find_iter(made));
        for found in found.into_iter().flatten() {
            let before = made.get(done..found.start()).unwrap_or_default();
            plain(before, &mut out);
            let spelling = made.get(found.range()).unwrap_or_default();
            done = found.end();
            let is_text = made.get(..found.start()).is_some_and(|before| before.ends_with(guard));
            match self.specials.get(found.pattern().as_usize()) {
                Some(special) if !is_text => {
                    let begin = out.text.len();
                    out.text.push_str(spelling);
                    let range = begin..out.text.len();
                    out.controls.push(Control { range, id: special.id });
                }
                _ => plain(spelling, &mut out),
            }
        }
        plain(made.get(done..).unwrap_or_default(), &mut out);
        self.swallow(&mut out);
        out
    }

    /// Gives control tokens the white space that they swallow.
    fn swallow(&self, out: &mut Rendered) {
        let mut begin = 0;
        for at in 0..out.controls.len() {
            let next = out.controls.get(at + 1).map_or(out.text.len(), |next| next.range.start);
            let Some(control) = out.controls.get_mut(at) else { break };
            let Some(special) = self.specials.iter().find(|special| special.id == control.id) else {
                continue;
            };
            let before = out.text.get(begin..control.range.start).unwrap_or_default();
            let behind = out.text.get(control.range.end..next).unwrap_or_default();
            if special.takes_space_before {
                control.range.start -= before.len() - before.trim_end().len();
            }
            if special.takes_space_behind {
                control.range.end += behind.len() - behind.trim_start().len();
            }
            begin = control.range.end;
        }
    }
}

impl Rendered {
    /// The tokens; those of which any byte is the assistant's are learnt.
    pub fn tokens(&self, tokenizer: &Tokenizer) -> Result<Vec<Token>, Error> {
        let mut tokens = Vec::new();
        let mut done = 0;
        let is_target = |range: Range<usize>| {
            self.generated.iter().any(|own| range.start < own.end && own.start < range.end)
        };
        let text = |range: Range<usize>, tokens: &mut Vec<Token>| -> Result<(), Error> {
            let piece = self.text.get(range.clone()).unwrap_or_default();
            if piece.is_empty() {
                return Ok(());
            }
            let place = if range.start == 0 { Place::Beginning } else { Place::Behind };
            let mut begin = range.start;
            for (id, at) in tokenizer.encode_with_places(piece, place)? {
                let own = (range.start + at.start).min(begin)..range.start + at.end;
                begin = own.end.max(begin);
                tokens.push(Token { id, is_target: is_target(own) });
            }
            Ok(())
        };
        for control in &self.controls {
            text(done..control.range.start, &mut tokens)?;
            tokens.push(Token { id: control.id, is_target: is_target(control.range.clone()) });
            done = control.range.end;
        }
        text(done..self.text.len(), &mut tokens)?;
        Ok(tokens)
    }
}

/// Three characters that neither `contents` nor the template hold.
fn unused(contents: &[String], template: &Template) -> Result<[char; 3], Error> {
    let is_free = |character: &char| {
        !template.source().contains(*character)
            && !contents.iter().any(|content| content.contains(*character))
    };
    let mut free = PRIVATE.into_iter().flatten().filter_map(char::from_u32).filter(is_free);
    match (free.next(), free.next(), free.next()) {
        (Some(guard), Some(open), Some(close)) => Ok([guard, open, close]),
        _ => Err(Error::Render {
            name: template.name().to_owned(),
            problem: "the conversation holds every character for private use: leave it out".to_owned(),
        }),
    }
}
