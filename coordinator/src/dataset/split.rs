//! Which files are held out. Each file's place follows from its own name and the seed alone, so adding a
//! file moves no other.

use sha2::{Digest, Sha256};

/// The held-out part is every file whose key is below a threshold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Split {
    seed: u64,
    threshold: u64,
}

impl Split {
    /// Key of what is held out whatever the split.
    pub const HELD_OUT: u64 = 0;

    /// Holds out about `fraction` of the files.
    pub fn new(fraction: f64, seed: u64) -> Self {
        // Saturates: below 0 (and NaN) nothing, from 1 on everything.
        Self { seed, threshold: (fraction * 2f64.powi(64)) as u64 }
    }

    /// Holds out the files whose key is 0, however many those are.
    pub fn of_marked() -> Self {
        Self { seed: 0, threshold: 1 }
    }

    /// Whether anything is to be held out.
    pub fn is_wanted(&self) -> bool {
        self.threshold > 0
    }

    /// A number that looks drawn at random and depends on nothing but its arguments.
    pub fn key(&self, repo_id: &str, file_path: &str) -> u64 {
        let mut hash = Sha256::new();
        hash.update(self.seed.to_le_bytes());
        // With its length, so that moving a `/` between the two makes another file.
        hash.update((repo_id.len() as u64).to_le_bytes());
        hash.update(repo_id);
        hash.update(file_path);
        let digest = hash.finalize();
        digest.iter().take(8).fold(0, |key, byte| (key << 8) | u64::from(*byte))
    }

    /// Whether the file with this key is held out.
    pub fn holds_out(&self, key: u64) -> bool {
        key < self.threshold || key == Self::HELD_OUT
    }

    /// The split that leaves neither part without a file, if this one did: `keys` are the smallest and the
    /// largest that occurred.
    pub fn mended(&self, keys: (u64, u64), train: u64, validation: u64) -> Option<Self> {
        let threshold = match (train, validation) {
            _ if !self.is_wanted() || *self == Self::of_marked() || train + validation < 2 => return None,
            // A tree that names one file twice: no threshold parts them.
            _ if keys.0 == keys.1 => return None,
            (_, 0) => keys.0.saturating_add(1),
            (0, _) => keys.1,
            _ => return None,
        };
        Some(Self { threshold, ..*self })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_share_is_kept_and_the_seed_matters() {
        let held_out = |seed| -> Vec<u32> {
            let split = Split::new(0.1, seed);
            (0..10_000).filter(|i| split.holds_out(split.key("org/name", &format!("src/{i}.rs")))).collect()
        };
        let first = held_out(1);
        assert!((900..1100).contains(&first.len()), "{}", first.len());
        assert_eq!(first, held_out(1));
        assert_ne!(first, held_out(2));
    }

    #[test]
    fn a_file_is_told_apart_by_repository_and_path() {
        let split = Split::new(0.5, 0);
        assert_ne!(split.key("a/b", "c"), split.key("a", "b/c"));
        assert_ne!(split.key("ab", "c"), split.key("a", "bc"));
    }

    #[test]
    fn extreme_fractions_hold_out_nothing_or_everything() {
        for fraction in [0.0, -1.0, f64::NAN] {
            assert!(!Split::new(fraction, 0).is_wanted());
        }
        assert!(Split::new(1.0, 0).holds_out(u64::MAX - 1));
    }

    #[test]
    fn neither_part_stays_empty_when_there_are_two_files() {
        let split = Split::new(0.1, 0);
        let few = split.mended((7, 9), 2, 0).unwrap();
        assert!(few.holds_out(7) && !few.holds_out(9));
        let many = split.mended((7, 9), 0, 2).unwrap();
        assert!(many.holds_out(7) && !many.holds_out(9));
        assert_eq!(split.mended((7, 9), 1, 1), None);
        assert_eq!(split.mended((7, 7), 1, 0), None);
        assert_eq!(split.mended((7, 7), 2, 0), None);
        assert_eq!(Split::new(0.0, 0).mended((7, 9), 2, 0), None);
    }
}
