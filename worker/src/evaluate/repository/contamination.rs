//! Held-out files that a model has seen: files most of which stand, run of words for run of words, in files that it was
//! trained on.
//!
//! Memory holds the runs of the held-out files; the others only pass by.

use std::collections::HashMap;
use std::hash::BuildHasher;

use foldhash::fast::FixedState;

/// Words in a row that are compared.
const RUN_WORDS: usize = 10;
/// A file of whose runs this share was seen is left out.
const MOST_SEEN: f64 = 0.5;

/// Runs of words of held-out files, and which of them were seen elsewhere.
#[derive(Debug, Default)]
pub struct Seen {
    /// For each run, the files that have it, with multiplicity; emptied when it is seen.
    files_of_run: HashMap<u64, Vec<u32>, FixedState>,
    /// For each file, its runs, and those that were seen.
    counts: Vec<(u32, u32)>,
}

impl Seen {
    /// Adds a held-out file; its number comes back.
    pub fn hold_out(&mut self, text: &str) -> usize {
        let number = self.counts.len();
        let mut runs_of_file = 0;
        for run in runs(text) {
            self.files_of_run.entry(run).or_default().push(number as u32);
            runs_of_file += 1;
        }
        self.counts.push((runs_of_file, 0));
        number
    }

    /// A file that was trained on.
    pub fn pass_by(&mut self, text: &str) {
        for run in runs(text) {
            if let Some(files) = self.files_of_run.get_mut(&run) {
                for file in files.drain(..) {
                    if let Some((_, seen)) = self.counts.get_mut(file as usize) {
                        *seen += 1;
                    }
                }
            }
        }
    }

    /// Whether too much of a held-out file was seen.
    pub fn is_contaminated(&self, number: usize) -> bool {
        let (runs, seen) = self.counts.get(number).copied().unwrap_or_default();
        runs > 0 && f64::from(seen) > MOST_SEEN * f64::from(runs)
    }
}

fn runs(text: &str) -> impl Iterator<Item = u64> + '_ {
    let state = FixedState::default();
    let words: Vec<&str> =
        text.split(|c: char| !c.is_alphanumeric() && c != '_').filter(|word| !word.is_empty()).collect();
    let last = words.len().saturating_sub(RUN_WORDS - 1);
    (0..last).map(move |at| state.hash_one(words.get(at..at + RUN_WORDS).unwrap_or_default()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(words: std::ops::Range<u32>) -> String {
        words.map(|word| format!("w{word} ")).collect()
    }

    #[test]
    fn a_file_that_mostly_stands_elsewhere_is_found() {
        let mut seen = Seen::default();
        let copy = seen.hold_out(&text(0..100));
        let half = seen.hold_out(&text(60..200));
        let own = seen.hold_out(&text(1000..1100));
        let short = seen.hold_out("a few words");
        seen.pass_by(&format!("// moved\n{}", text(0..98).replace(' ', ",\n")));
        let found = [copy, half, own, short].map(|number| seen.is_contaminated(number));
        assert_eq!(found, [true, false, false, false]);
    }
}
