//! Guesses of what comes next, by looking up the last tokens earlier in the text (prompt lookup): code repeats itself.
//! Guesses are checked by the model in one step; what it would not have made is thrown away.

/// Most tokens that are guessed at once.
pub const MAX_GUESS: usize = 8;
/// The longest and the shortest run of last tokens that is looked for.
const LONGEST_RUN: usize = 4;
const SHORTEST_RUN: usize = 2;
/// Guesses that were wrong in a row, after which none are made for a while.
const PATIENCE: u32 = 4;

/// Makes guesses for one sequence.
#[derive(Debug, Default)]
pub struct Guesser {
    wrong_in_a_row: u32,
    pause: u32,
}

impl Guesser {
    /// What may follow `tokens`, at most `most` of them.
    pub fn guess<'a>(&mut self, tokens: &'a [u32], most: usize) -> &'a [u32] {
        if self.pause > 0 {
            self.pause -= 1;
            return &[];
        }
        let most = most.min(MAX_GUESS);
        for run in (SHORTEST_RUN..=LONGEST_RUN).rev() {
            let Some(at) = tokens.len().checked_sub(run) else { continue };
            let (before, last) = tokens.split_at(at);
            // The latest place, since code is most like what is near.
            let found = before.windows(run).rposition(|window| window == last);
            if let Some(found) = found {
                let from = found + run;
                return tokens.get(from..tokens.len().min(from + most)).unwrap_or_default();
            }
        }
        &[]
    }

    /// How many of a guess were right.
    pub fn learn(&mut self, guessed: usize, right: usize) {
        if guessed == 0 {
            return;
        }
        self.wrong_in_a_row = if right == 0 { self.wrong_in_a_row + 1 } else { 0 };
        if self.wrong_in_a_row >= PATIENCE {
            (self.wrong_in_a_row, self.pause) = (0, 16);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_followed_the_same_tokens_is_guessed_from_the_latest_place() {
        let mut guesser = Guesser::default();
        assert_eq!(guesser.guess(&[1, 2, 3, 9, 1, 2, 4, 5, 1, 2], 2), [4, 5]);
        assert_eq!(guesser.guess(&[1, 2, 3, 4, 2, 3, 5, 1, 2, 3], 8), [4, 2, 3, 5, 1, 2, 3]);
        assert!(guesser.guess(&[1, 2, 3], 8).is_empty());
        assert!(guesser.guess(&[], 8).is_empty());
    }

    #[test]
    fn after_wrong_guesses_there_is_a_pause() {
        let mut guesser = Guesser::default();
        let tokens = [1, 2, 3, 1, 2];
        for _ in 0..PATIENCE {
            assert!(!guesser.guess(&tokens, 8).is_empty());
            guesser.learn(3, 0);
        }
        assert!(guesser.guess(&tokens, 8).is_empty());
    }
}
