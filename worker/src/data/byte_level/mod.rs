//! Byte-level byte-pair encoding as `tokenizers` does it, many times faster: words are found by hand, and a word that
//! was met before is not merged again.
//!
//! For vocabularies in the manner of GPT-2 and StarCoder; of any other, [`ByteLevel::of`] makes nothing and `tokenizers`
//! does the work. That both give the same tokens is what this module's tests hold.

/// Words -> tokens.
mod pairs;
#[cfg(test)]
mod tests;
/// Text -> words.
mod words;

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use aho_corasick::AhoCorasick;
use foldhash::fast::RandomState;
use serde_json::Value;

use pairs::{Pairs, Scratch};
use words::Splitter;

/// Longest word that is remembered.
const MAX_KNOWN_BYTES: usize = 48;
/// Words that are remembered, at most: some 10 MB for each thread.
const MAX_KNOWN_WORDS: usize = 1 << 17;

/// A tokenizer without its added tokens.
#[derive(Debug)]
pub struct ByteLevel {
    splitter: Splitter,
    pairs: Pairs,
    /// Added tokens that are never text, and all of them. A text that spells one out is not for us.
    added: [AhoCorasick; 2],
    /// Whether nothing is put before or after a text that is framed.
    has_no_frame: bool,
    /// What threads have learned; as many as have encoded at once.
    idle: Mutex<Vec<Memory>>,
}

/// What one thread knows.
#[derive(Debug, Default)]
struct Memory {
    scratch: Scratch,
    /// Word -> place in `tokens`.
    known: HashMap<Box<[u8]>, (u32, u32), RandomState>,
    tokens: Vec<u32>,
}

/// What becomes of an added token that is spelt out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Added {
    /// Those that are special are text.
    SpecialIsText,
    /// All are tokens.
    IsToken,
}

impl ByteLevel {
    /// From a parsed `tokenizer.json`; None where it is of another kind.
    pub fn of(json: &Value) -> Option<Self> {
        if !json.get("normalizer")?.is_null() {
            return None;
        }
        let splitter = Splitter::new(digits_alone(json.get("pre_tokenizer")?)?)?;
        let pairs = Pairs::of(json.get("model")?)?;
        let added = json.get("added_tokens")?.as_array()?;
        let spelt = |only_plain: bool| {
            let special = |token: &Value| token.get("special").and_then(Value::as_bool).unwrap_or(false);
            let kept = added.iter().filter(|token| !(only_plain && special(token)));
            AhoCorasick::new(kept.filter_map(|token| token.get("content")?.as_str())).ok()
        };
        let frame = json.get("post_processor").unwrap_or(&Value::Null);
        let has_no_frame = frame.is_null() || kind(frame) == Some("ByteLevel");
        let added = [spelt(true)?, spelt(false)?];
        Some(ByteLevel { splitter, pairs, added, has_no_frame, idle: Mutex::default() })
    }

    /// Tokens of a text; None where it spells out an added token, or is to be framed.
    pub fn encode(&self, text: &str, added: Added, frame: bool) -> Option<Vec<u32>> {
        let [plain, all] = &self.added;
        let spelt = if added == Added::SpecialIsText { plain } else { all };
        if (frame && !self.has_no_frame) || spelt.is_match(text) {
            return None;
        }
        let idle = || self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        let mut memory = idle().pop().unwrap_or_default();
        let mut tokens = Vec::with_capacity(text.len() / 3);
        for word in self.splitter.words(text) {
            memory.encode(word.as_bytes(), &self.pairs, &mut tokens);
        }
        idle().push(memory);
        Some(tokens)
    }
}

impl Memory {
    fn encode(&mut self, word: &[u8], pairs: &Pairs, out: &mut Vec<u32>) {
        if let Some((begin, end)) = self.known.get(word) {
            out.extend_from_slice(self.tokens.get(*begin as usize..*end as usize).unwrap_or_default());
            return;
        }
        let merged = pairs.merge(word, &mut self.scratch);
        if word.len() > MAX_KNOWN_BYTES {
            out.extend(merged);
            return;
        }
        if self.known.len() >= MAX_KNOWN_WORDS {
            self.known.clear();
            self.tokens.clear();
        }
        let begin = self.tokens.len();
        self.tokens.extend(merged);
        out.extend_from_slice(self.tokens.get(begin..).unwrap_or_default());
        self.known.insert(word.into(), (begin as u32, self.tokens.len() as u32));
    }
}

fn kind(step: &Value) -> Option<&str> {
    step.get("type")?.as_str()
}

/// Whether digits are set apart first; None where words are found in another way than GPT-2's.
fn digits_alone(pre_tokenizer: &Value) -> Option<bool> {
    let flag = |step: &Value, name: &str| step.get(name).and_then(Value::as_bool);
    let is_gpt2 = |step: &Value| {
        kind(step) == Some("ByteLevel")
            && flag(step, "add_prefix_space") == Some(false)
            && flag(step, "use_regex") != Some(false)
    };
    if is_gpt2(pre_tokenizer) {
        return Some(false);
    }
    match (kind(pre_tokenizer)?, pre_tokenizer.get("pretokenizers")?.as_array()?.as_slice()) {
        ("Sequence", [only]) => is_gpt2(only).then_some(false),
        ("Sequence", [digits, last]) => {
            let alone = kind(digits) == Some("Digits") && flag(digits, "individual_digits") == Some(true);
            (alone && is_gpt2(last)).then_some(true)
        }
        _ => None,
    }
}
