//! Files that say what an earlier file has said: the same blob, or nearly the same text (MinHash with locality-sensitive
//! hashing; Broder 1997, and the parameters of BigCode's deduplication: 5-grams of words, 256 permutations, 0.7).
//!
//! Files are judged in the order of the job file and of the tree, and the first of those that are alike is kept; so what
//! is dropped never depends on threads. A file is held against files that were kept, not against those that were
//! dropped: a chain of small changes does not take away its far end.

use std::collections::{HashMap, HashSet};

use git2::Oid;
use tunefleet_proto::job::DuplicateMode;

/// Words in a row that are compared as one.
const GRAM_WORDS: usize = 5;
/// Hash functions of a sketch. The error of the estimate is at most 1 / (2 * sqrt(256)), about 0.03.
const PERMUTATIONS: usize = 256;
/// Pairs as alike as the threshold are met with at least this probability.
const RECALL: f64 = 0.95;

/// What was seen of a dataset so far.
pub struct Duplicates {
    /// Contents, each as a notebook or as it is.
    blobs: Option<HashSet<(Oid, bool)>>,
    near: Option<Near>,
}

impl Duplicates {
    /// Nothing was seen yet. `threshold` is the Jaccard similarity from which on files are alike, above 0.
    pub fn new(mode: DuplicateMode, threshold: f64) -> Self {
        Duplicates {
            blobs: (mode != DuplicateMode::Keep).then(HashSet::new),
            near: (mode == DuplicateMode::DropNear).then(|| Near::new(threshold)),
        }
    }

    /// Whether no file before had this content. A notebook is read as another text than a file with other endings.
    pub fn is_new_blob(&mut self, oid: Oid, is_notebook: bool) -> bool {
        self.blobs.as_mut().is_none_or(|blobs| blobs.insert((oid, is_notebook)))
    }

    /// What to remember of a text, where that is wanted. For any thread.
    pub fn sketcher(&self) -> Option<Sketcher> {
        self.near.as_ref().map(|near| near.sketcher)
    }

    /// Whether no file that was kept is nearly the same; it is remembered then.
    pub fn is_new_text(&mut self, sketch: Option<&Sketch>) -> bool {
        match (&mut self.near, sketch) {
            (Some(near), Some(sketch)) => near.is_new(sketch),
            _ => true,
        }
    }
}

/// Files that are alike, where all of them are kept: they shall not be parted.
pub struct Clusters {
    near: Near,
    /// By number of the text in `near`, the number of its file.
    file_of: Vec<usize>,
    /// Contents with too few words for a sketch.
    short: HashMap<u64, usize>,
    /// By number of a file, one that it is alike to, or itself.
    leaders: Vec<usize>,
}

impl Clusters {
    /// No file was seen yet.
    pub fn new(threshold: f64) -> Self {
        Clusters {
            near: Near::new(threshold),
            file_of: Vec::new(),
            short: HashMap::new(),
            leaders: Vec::new(),
        }
    }

    /// What to remember of a text. For any thread.
    pub fn sketcher(&self) -> Sketcher {
        self.near.sketcher
    }

    /// Takes in the next file.
    pub fn add(&mut self, text: &str, sketch: Option<&Sketch>) {
        let file = self.leaders.len();
        self.leaders.push(file);
        let Some(sketch) = sketch else {
            let hash = text.bytes().fold(0, |hash, byte| mix(hash ^ u64::from(byte)));
            let first = *self.short.entry(hash).or_insert(file);
            return self.join(first, file);
        };
        let alike: Vec<u32> = self.near.alike(sketch).collect();
        for text in alike {
            if let Some(&other) = self.file_of.get(text as usize) {
                self.join(other, file);
            }
        }
        if self.near.remember(sketch) {
            self.file_of.push(file);
        }
    }

    /// For each file, in their order, the first file of those that it is alike to, directly or through others.
    pub fn leaders(mut self) -> Vec<usize> {
        (0..self.leaders.len()).map(|file| self.leader(file)).collect()
    }

    fn join(&mut self, one: usize, other: usize) {
        let (one, other) = (self.leader(one), self.leader(other));
        if let Some(leader) = self.leaders.get_mut(one.max(other)) {
            *leader = one.min(other);
        }
    }

    fn leader(&mut self, file: usize) -> usize {
        let mut at = file;
        while let Some(&next) = self.leaders.get(at).filter(|next| **next != at) {
            // Each looks past one on the way, so that ways become short.
            let after = self.leaders.get(next).copied().unwrap_or(next);
            if let Some(slot) = self.leaders.get_mut(at) {
                *slot = after;
            }
            at = after;
        }
        at
    }
}

/// What is remembered of a text: of each permutation's least hash 8 bits, and a hash for each band of them.
#[derive(Debug, Clone)]
pub struct Sketch {
    low: [u8; PERMUTATIONS],
    bands: Vec<u32>,
}

/// Makes sketches.
#[derive(Debug, Clone, Copy)]
pub struct Sketcher {
    /// Rows of a band.
    rows: usize,
}

impl Sketcher {
    /// The sketch of a text; `None` where it has fewer words than are compared as one.
    pub fn sketch(self, text: &str) -> Option<Sketch> {
        let mut least = [u32::MAX; PERMUTATIONS];
        let mut has_any = false;
        for gram in grams(text) {
            has_any = true;
            for (least, (factor, summand)) in least.iter_mut().zip(&FUNCTIONS) {
                // Multiply and shift: universal, one multiplication (Dietzfelbinger 1996).
                let hash = (factor.wrapping_mul(gram).wrapping_add(*summand) >> 32) as u32;
                *least = (*least).min(hash);
            }
        }
        let band = |(number, rows): (usize, &[u32])| {
            let start = mix(number as u64);
            mix(rows.iter().fold(start, |hash, row| mix(hash ^ u64::from(*row)))) as u32
        };
        let bands = least.chunks_exact(self.rows).enumerate().map(band).collect();
        has_any.then(|| Sketch { low: least.map(|hash| hash as u8), bands })
    }
}

impl Sketch {
    /// The estimated Jaccard similarity of two texts.
    fn similarity(&self, low: &[u8; PERMUTATIONS]) -> f64 {
        let equal = self.low.iter().zip(low).filter(|(a, b)| a == b).count() as f64 / PERMUTATIONS as f64;
        // Of the hashes that differ, one in 256 has the same 8 bits (Li and Koenig 2010).
        let by_chance = 1.0 / 256.0;
        (equal - by_chance) / (1.0 - by_chance)
    }
}

/// Texts that were kept.
struct Near {
    threshold: f64,
    sketcher: Sketcher,
    /// For each band: its hash, and the first text that has it.
    tables: Vec<HashMap<u32, u32>>,
    texts: Vec<[u8; PERMUTATIONS]>,
}

impl Near {
    fn new(threshold: f64) -> Self {
        let rows = rows_for(threshold);
        let tables = (0..PERMUTATIONS / rows).map(|_| HashMap::new()).collect();
        Near { threshold, sketcher: Sketcher { rows }, tables, texts: Vec::new() }
    }

    fn is_new(&mut self, sketch: &Sketch) -> bool {
        if self.alike(sketch).next().is_some() {
            return false;
        }
        self.remember(sketch);
        true
    }

    /// Texts that are as alike as the threshold.
    fn alike(&self, sketch: &Sketch) -> impl Iterator<Item = u32> {
        let mut looked_at = HashSet::new();
        self.tables.iter().zip(&sketch.bands).filter_map(move |(table, band)| {
            let text = *table.get(band).filter(|text| looked_at.insert(**text))?;
            let alike = self.texts.get(text as usize).map_or(0.0, |low| sketch.similarity(low));
            (alike >= self.threshold).then_some(text)
        })
    }

    /// Whether there was room for it.
    fn remember(&mut self, sketch: &Sketch) -> bool {
        let Ok(number) = u32::try_from(self.texts.len()) else { return false };
        self.texts.push(sketch.low);
        for (table, band) in self.tables.iter_mut().zip(&sketch.bands) {
            table.entry(*band).or_insert(number);
        }
        true
    }
}

/// The most rows for a band with which pairs at the threshold still share one with the probability [`RECALL`]: fewer
/// pairs are looked at in vain.
fn rows_for(threshold: f64) -> usize {
    let met = |rows: &usize| {
        let bands = (PERMUTATIONS / rows) as i32;
        1.0 - (1.0 - threshold.powi(*rows as i32)).powi(bands) >= RECALL
    };
    (1..=PERMUTATIONS).take_while(met).last().unwrap_or(1)
}

/// Hashes of each [`GRAM_WORDS`] words in a row. A word is letters, digits and underscores of ASCII.
fn grams(text: &str) -> impl Iterator<Item = u64> {
    let words =
        text.split(|c: char| !(c.is_ascii_alphanumeric() || c == '_')).filter(|word| !word.is_empty());
    let mut last = [0u64; GRAM_WORDS];
    words.enumerate().filter_map(move |(number, word)| {
        last.rotate_left(1);
        if let Some(newest) = last.last_mut() {
            *newest = word.bytes().fold(0xcbf2_9ce4_8422_2325, |hash: u64, byte| {
                // FNV-1a.
                (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
            });
        }
        (number + 1 >= GRAM_WORDS).then(|| last.iter().fold(0, |hash, word| mix(hash ^ word)))
    })
}

/// SplitMix64's output function: every bit of the input changes half of the output's.
const fn mix(mut value: u64) -> u64 {
    value = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

/// Factor (odd) and summand of each hash function.
static FUNCTIONS: [(u64, u64); PERMUTATIONS] = {
    let mut functions = [(0, 0); PERMUTATIONS];
    let mut index = 0;
    while index < PERMUTATIONS {
        functions[index] = (mix(2 * index as u64) | 1, mix(2 * index as u64 + 1));
        index += 1;
    }
    functions
};

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    const THRESHOLD: f64 = 0.7;

    /// Some lines of made-up code; the same seed gives the same.
    fn code(seed: u64, lines: u64) -> Vec<String> {
        let word = |number: u64| format!("name_{}", mix(number) % 5000);
        let line = |at: u64| {
            let from = seed * 1_000_000 + at * 10;
            format!("let {} = {}({}, {});", word(from), word(from + 1), word(from + 2), word(from + 3))
        };
        (0..lines).map(line).collect()
    }

    fn jaccard(a: &str, b: &str) -> f64 {
        let (a, b): (BTreeSet<u64>, BTreeSet<u64>) = (grams(a).collect(), grams(b).collect());
        a.intersection(&b).count() as f64 / a.union(&b).count() as f64
    }

    /// A pair of texts, of which some lines of the second are others.
    fn pair(seed: u64, changed: u64) -> (String, String) {
        let (first, other) = (code(seed, 60), code(seed + 10_000, 60));
        let second = first.iter().zip(&other).enumerate().map(|(at, (same, other))| {
            if mix(seed ^ at as u64) % 60 < changed { other.as_str() } else { same.as_str() }
        });
        (first.join("\n"), second.collect::<Vec<_>>().join("\n"))
    }

    fn near() -> Duplicates {
        Duplicates::new(DuplicateMode::DropNear, THRESHOLD)
    }

    fn is_new(seen: &mut Duplicates, text: &str) -> bool {
        let sketch = seen.sketcher().and_then(|sketcher| sketcher.sketch(text));
        seen.is_new_text(sketch.as_ref())
    }

    #[test]
    fn what_is_called_alike_is_held_against_exact_jaccard() {
        let (mut right, mut missed, mut wrong) = (0, 0, 0);
        for seed in 0..600 {
            let (first, second) = pair(seed, seed % 20);
            let exact = jaccard(&first, &second);
            let mut seen = near();
            assert!(is_new(&mut seen, &first));
            match (exact >= THRESHOLD, is_new(&mut seen, &second)) {
                (true, false) => right += 1,
                (true, true) => missed += 1,
                (false, false) => wrong += 1,
                (false, true) => {}
            }
        }
        let (precision, recall) =
            (f64::from(right) / f64::from(right + wrong), f64::from(right) / f64::from(right + missed));
        eprintln!("precision {precision:.3}, recall {recall:.3}, of {} alike", right + missed);
        assert!(right > 100, "{right}");
        assert!(precision > 0.9 && recall > 0.9, "{precision} {recall}");
    }

    #[test]
    fn an_estimate_is_close_to_the_exact_similarity() {
        let sketcher = Sketcher { rows: rows_for(THRESHOLD) };
        let mut errors: Vec<f64> = (0..200)
            .map(|seed| {
                let (first, second) = pair(seed, seed % 60);
                let (a, b) = (sketcher.sketch(&first).unwrap(), sketcher.sketch(&second).unwrap());
                (a.similarity(&b.low) - jaccard(&first, &second)).abs()
            })
            .collect();
        errors.sort_by(f64::total_cmp);
        assert!(errors[100] < 0.03 && errors[199] < 0.13, "{} {}", errors[100], errors[199]);
    }

    #[test]
    fn white_space_and_signs_make_no_difference_and_short_texts_are_all_new() {
        let mut seen = near();
        let text = code(1, 20).join("\n");
        assert!(is_new(&mut seen, &text));
        assert!(!is_new(&mut seen, &text.replace('\n', "\r\n\t").replace(';', " ;")));
        for _ in 0..2 {
            assert!(is_new(&mut seen, "one two three four"));
        }
    }

    #[test]
    fn files_that_are_alike_have_one_leader_directly_or_through_others() {
        let (first, other) = (code(1, 60), code(2, 60));
        // Each is alike to the one before; the last is not to the first.
        let mixed = |from_other: usize| [&other[..from_other], &first[from_other..]].concat().join("\n");
        let texts = [
            mixed(0),
            "x = 1\n".to_owned(),
            mixed(6),
            code(3, 60).join("\n"),
            mixed(12),
            "x = 1\n".to_owned(),
        ];
        assert!(jaccard(&texts[0], &texts[4]) < THRESHOLD && jaccard(&texts[2], &texts[4]) > THRESHOLD);
        let mut clusters = Clusters::new(THRESHOLD);
        for text in &texts {
            let sketch = clusters.sketcher().sketch(text);
            clusters.add(text, sketch.as_ref());
        }
        assert_eq!(clusters.leaders(), [0, 1, 0, 3, 0, 1]);
    }

    #[test]
    fn the_same_blob_is_seen_once_unless_all_are_kept() {
        let oid = Oid::from_bytes(&[7; 20]).unwrap();
        for (mode, again) in
            [(DuplicateMode::Keep, true), (DuplicateMode::DropExact, false), (DuplicateMode::DropNear, false)]
        {
            let mut seen = Duplicates::new(mode, THRESHOLD);
            assert!(seen.is_new_blob(oid, false) && seen.is_new_blob(oid, true));
            assert_eq!(seen.is_new_blob(oid, false), again, "{mode:?}");
            assert_eq!(seen.sketcher().is_some(), mode == DuplicateMode::DropNear);
        }
    }

    #[test]
    fn bands_are_as_long_as_the_recall_allows() {
        assert_eq!(rows_for(0.7), 7);
        assert_eq!(rows_for(1.0), PERMUTATIONS);
        assert_eq!(rows_for(0.01), 1);
    }
}
