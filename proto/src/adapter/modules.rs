//! What a config says of one module, asked by name.

use regex::Regex;

use super::targets::{self, Matcher};
use super::{Error, LoraConfig};

/// A [`LoraConfig`] with its patterns compiled.
pub struct Modules<'a> {
    config: &'a LoraConfig,
    matcher: Matcher<'a>,
    ranks: Vec<(Regex, u64)>,
    alphas: Vec<(Regex, f64)>,
}

/// Rank and scaling of a module's pair.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PairShape {
    /// Inner width.
    pub rank: u64,
    /// What the product of the pair is multiplied by.
    pub scaling: f64,
}

impl LoraConfig {
    /// Compiles what the config says of modules.
    ///
    /// # Errors
    /// [`Error::Pattern`].
    pub fn modules(&self) -> Result<Modules<'_>, Error> {
        Ok(Modules {
            config: self,
            matcher: self.targets.matcher()?,
            ranks: targets::patterns("rank_pattern", &self.rank_pattern)?,
            alphas: targets::patterns("alpha_pattern", &self.alpha_pattern)?,
        })
    }
}

impl Modules<'_> {
    /// The pair that a linear of this name gets, if it is a target.
    pub fn pair(&self, module: &str) -> Option<PairShape> {
        if !self.matcher.matches(module) {
            return None;
        }
        let rank = targets::first_match(&self.ranks, module).unwrap_or(self.config.rank);
        let alpha = targets::first_match(&self.alphas, module).unwrap_or(self.config.alpha);
        Some(PairShape { rank, scaling: self.config.scaling(alpha, rank) })
    }

    /// Whether the config itself names the module; `all-linear` names none.
    pub(super) fn names(&self, module: &str) -> bool {
        self.matcher.names(module)
    }

    /// Entries of `target_modules` that none of `matched` ends with.
    pub(super) fn unmatched<'m>(&self, matched: impl Iterator<Item = &'m str> + Clone) -> Vec<String> {
        self.matcher.unmatched(matched)
    }

    /// Whether a module of this name is trained whole.
    pub fn is_saved(&self, module: &str) -> bool {
        self.config.modules_to_save.iter().any(|name| targets::ends_with_module(module, name))
    }
}
