//! The bytes of a word to tokens: neighbours are merged, the earliest learned pair first, the leftmost of equal ones.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};

use foldhash::fast::RandomState;
use serde_json::Value;

/// No neighbour.
const NONE: u32 = u32::MAX;

/// The merges of a vocabulary.
#[derive(Debug)]
pub struct Pairs {
    /// Token of each byte; StarCoder lacks some that hardly a text has, and leaves them out.
    bytes: [Option<u32>; 256],
    /// Two tokens -> when the pair was learned, and what it becomes.
    merges: HashMap<(u32, u32), (u32, u32), RandomState>,
}

/// Room for one word.
#[derive(Debug, Default)]
pub struct Scratch {
    parts: Vec<Part>,
    /// (when learned, place of the left part, what it becomes), the first one on top.
    queue: BinaryHeap<Reverse<(u32, u32, u32)>>,
}

/// A part of the word, in a list by place.
#[derive(Debug, Clone, Copy)]
struct Part {
    token: u32,
    before: u32,
    after: u32,
    /// Whether it was merged into the one before.
    is_gone: bool,
}

impl Pairs {
    /// From `model` of a `tokenizer.json`; None where it does more than merge bytes.
    pub fn of(model: &Value) -> Option<Self> {
        let absent =
            |name: &str| model.get(name).is_none_or(|value| value.is_null() || value == "" || value == false);
        let is_plain =
            ["dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback", "ignore_merges"];
        if model.get("type")? != "BPE" || !is_plain.into_iter().all(absent) {
            return None;
        }
        let vocab = model.get("vocab")?.as_object()?;
        let token = |text: &str| u32::try_from(vocab.get(text)?.as_u64()?).ok();
        let mut bytes = [None; 256];
        for (character, place) in byte_characters().zip(&mut bytes) {
            *place = token(character.encode_utf8(&mut [0; 4]));
        }
        if bytes.contains(&None) && !absent("unk_token") {
            return None;
        }
        let mut merges = HashMap::default();
        for (rank, pair) in model.get("merges")?.as_array()?.iter().enumerate() {
            let (left, right) = match (pair.as_str(), pair.as_array().map(Vec::as_slice)) {
                (Some(pair), _) => pair.split_once(' ')?,
                (None, Some([left, right])) => (left.as_str()?, right.as_str()?),
                _ => return None,
            };
            let merged = (u32::try_from(rank).ok()?, token(&format!("{left}{right}"))?);
            merges.insert((token(left)?, token(right)?), merged);
        }
        Some(Pairs { bytes, merges })
    }

    /// Tokens of a word.
    pub fn merge<'a>(&self, word: &[u8], scratch: &'a mut Scratch) -> impl Iterator<Item = u32> + use<'a> {
        let Scratch { parts, queue } = scratch;
        parts.clear();
        queue.clear();
        let tokens = word.iter().filter_map(|byte| self.bytes[usize::from(*byte)]);
        parts.extend(tokens.zip(0u32..).map(|(token, at)| {
            let before = at.checked_sub(1).unwrap_or(NONE);
            Part { token, before, after: at + 1, is_gone: false }
        }));
        if let Some(last) = parts.last_mut() {
            last.after = NONE;
        }
        for left in 0..parts.len() as u32 {
            self.consider(parts, left, queue);
        }
        while let Some(Reverse((_, left, becomes))) = queue.pop() {
            let Some(part) = parts.get(left as usize).copied().filter(|part| !part.is_gone) else { continue };
            let Some(next) = parts.get(part.after as usize).copied() else { continue };
            // One of the two has become something else since.
            if self.merges.get(&(part.token, next.token)).is_none_or(|(_, now)| *now != becomes) {
                continue;
            }
            if let Some(gone) = parts.get_mut(part.after as usize) {
                gone.is_gone = true;
            }
            if let Some(after) = parts.get_mut(next.after as usize) {
                after.before = left;
            }
            if let Some(part) = parts.get_mut(left as usize) {
                (part.token, part.after) = (becomes, next.after);
            }
            self.consider(parts, part.before, queue);
            self.consider(parts, left, queue);
        }
        parts.iter().filter(|part| !part.is_gone).map(|part| part.token)
    }

    /// Queues the pair whose left part is at `left`, if there is such a merge.
    fn consider(&self, parts: &[Part], left: u32, queue: &mut BinaryHeap<Reverse<(u32, u32, u32)>>) {
        let Some(part) = parts.get(left as usize) else { return };
        let Some(next) = parts.get(part.after as usize) else { return };
        if let Some((rank, becomes)) = self.merges.get(&(part.token, next.token)) {
            queue.push(Reverse((*rank, left, *becomes)));
        }
    }
}

/// The characters that stand for the bytes 0 to 255 in a vocabulary (GPT-2's `bytes_to_unicode`).
fn byte_characters() -> impl Iterator<Item = char> {
    let mut next_unprintable = 256;
    (0..=255u8).map(move |byte| match byte {
        b'!'..=b'~' | 0xa1..=0xac | 0xae.. => char::from(byte),
        _ => {
            next_unprintable += 1;
            char::from_u32(next_unprintable - 1).unwrap_or_default()
        }
    })
}
