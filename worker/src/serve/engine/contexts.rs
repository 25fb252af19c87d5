//! Contexts that are kept: a prompt that begins like an earlier one goes on from there.

use super::request::Request;
use super::{AdapterId, DEFAULT_CONTEXTS, Settings};
use crate::generate::decoder::{Context, Decoder};

/// Fewer tokens are computed again sooner than a context is taken for them.
const MIN_KNOWN_TOKENS: usize = 8;

/// A context at rest.
pub struct Kept {
    /// What was computed.
    pub context: Context,
    /// The tokens that it has been shown.
    pub tokens: Vec<u32>,
    /// Of those, so many in steps that began at multiples of a step's tokens.
    pub stepped: usize,
    /// What was added to the base then.
    pub adapter: Option<AdapterId>,
}

/// All contexts that no completion has at the moment, the latest last.
pub struct Contexts {
    settings: Settings,
    /// Tokens of all contexts, at most.
    most_tokens: usize,
    max_positions: usize,
    kept: Vec<Kept>,
    /// Tokens that completions under way may have.
    taken_tokens: usize,
}

impl Contexts {
    pub fn new(settings: Settings, max_positions: usize) -> Self {
        let most_tokens = settings.cache_tokens.unwrap_or(DEFAULT_CONTEXTS * max_positions);
        Contexts { settings, most_tokens, max_positions, kept: Vec::new(), taken_tokens: 0 }
    }

    /// Tokens in memory.
    pub fn tokens(&self) -> usize {
        self.taken_tokens + self.kept.iter().map(|kept| kept.tokens.len()).sum::<usize>()
    }

    /// A context for a request, and how many tokens of its prompt it has been shown; `None` where there is no room
    /// until others are complete.
    pub fn take(&mut self, request: &Request, decoder: &Decoder) -> Option<(Context, usize)> {
        let wanted = (request.prompt.len() + request.max_new_tokens).min(self.max_positions);
        if self.taken_tokens > 0 && self.taken_tokens + wanted > self.most_tokens {
            return None;
        }
        self.taken_tokens += wanted;
        let best = (0..self.kept.len())
            .map(|at| (self.known(at, request), at))
            .max()
            .filter(|(known, _)| *known > 0);
        let taken = best.map(|(known, at)| (self.kept.remove(at), known));
        while self.tokens() > self.most_tokens && !self.kept.is_empty() {
            self.kept.remove(0);
        }
        Some(match taken {
            Some((Kept { mut context, .. }, known)) => {
                context.truncate(known);
                (context, known)
            }
            None => (decoder.context(wanted), 0),
        })
    }

    /// Takes back what a completion had room for, and its context, which the next may go on from.
    pub fn give_back(&mut self, (kept, wanted): (Kept, usize)) {
        self.taken_tokens = self.taken_tokens.saturating_sub(wanted.min(self.max_positions));
        if self.settings.prefix_cache && kept.tokens.len() >= MIN_KNOWN_TOKENS {
            self.kept.push(kept);
        }
        while self.tokens() > self.most_tokens && !self.kept.is_empty() {
            self.kept.remove(0);
        }
    }

    /// Forgets everything.
    pub fn clear(&mut self) {
        self.kept.clear();
        self.taken_tokens = 0;
    }

    /// Tokens of a prompt that a kept context has been shown. The last one is always shown anew: what follows it is asked.
    fn known(&self, at: usize, request: &Request) -> usize {
        let Some(kept) = self.kept.get(at) else { return 0 };
        if kept.adapter != request.adapter {
            return 0;
        }
        let alike = kept.tokens.iter().zip(&request.prompt).take_while(|(one, other)| one == other).count();
        let mut known = alike.min(request.prompt.len().saturating_sub(1));
        if self.settings.batch_invariant {
            // In the same steps as without it.
            known = known.min(kept.stepped) / self.settings.prefill_tokens * self.settings.prefill_tokens;
        }
        if known < MIN_KNOWN_TOKENS { 0 } else { known }
    }
}
