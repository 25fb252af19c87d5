//! PEFT's settings of a combined adapter: its targets, ranks and alphas.

use std::collections::BTreeMap;

use tunefleet_proto::adapter::{LoraConfig, Targets};

use super::combine::{Combination, ModuleOutcome, Options, Part};

/// PEFT's settings for the result: its ranks, and alphas that make its scalings what they must be.
pub(super) fn of_result(
    parts: &[Part],
    outcomes: &[ModuleOutcome],
    options: &Options,
    notes: &mut Vec<String>,
) -> LoraConfig {
    let configs: Vec<&LoraConfig> = parts.iter().map(|part| &part.adapter.config).collect();
    let base_model = configs.first().and_then(|config| config.base_model.clone());
    let other = configs.iter().find(|config| config.base_model != base_model);
    if let Some(other) = other {
        let name = |name: &Option<String>| name.clone().unwrap_or_else(|| "an unnamed model".to_owned());
        notes.push(format!(
            "trained on {} and {}: the result names the first",
            name(&base_model),
            name(&other.base_model)
        ));
    }
    let mut count = BTreeMap::<u64, usize>::new();
    outcomes.iter().for_each(|outcome| *count.entry(outcome.rank).or_default() += 1);
    let rank = count.iter().max_by_key(|(rank, count)| (**count, **rank)).map_or(1, |(rank, _)| *rank);
    let scaling = match options.peft_compat && configs.first().is_some_and(|config| config.rslora) {
        true => (peft_rank(&configs, options) as f64).sqrt(),
        false => 1.0,
    };
    let rank_pattern = rank_pattern(outcomes, rank);
    LoraConfig {
        rank,
        alpha: scaling * rank as f64,
        dropout: configs.first().map_or(0.0, |config| config.dropout),
        rslora: false,
        dora: false,
        targets: targets(&configs, outcomes),
        modules_to_save: configs
            .iter()
            .find(|config| !config.modules_to_save.is_empty() && !options.peft_compat)
            .map(|config| config.modules_to_save.clone())
            .unwrap_or_default(),
        alpha_pattern: rank_pattern.iter().map(|(key, rank)| (key.clone(), scaling * *rank as f64)).collect(),
        rank_pattern,
        token_rows: Vec::new(),
        untied_tokens: None,
        base_model,
    }
}

/// The one rank that PEFT would give to all modules.
fn peft_rank(configs: &[&LoraConfig], options: &Options) -> u64 {
    let ranks = configs.iter().map(|c| c.rank_pattern.values().copied().fold(c.rank, u64::max));
    match options.combination {
        Combination::Cat => ranks.sum(),
        _ => options.rank.unwrap_or_else(|| ranks.max().unwrap_or(1)),
    }
}

/// Ends of names where they say enough, else whole names.
fn rank_pattern(outcomes: &[ModuleOutcome], usual: u64) -> BTreeMap<String, u64> {
    let mut pattern = BTreeMap::new();
    for outcome in outcomes.iter().filter(|outcome| outcome.rank != usual) {
        let numbered = outcome.module.match_indices('.').map(|(at, _)| at).rfind(|at| {
            let before = outcome.module[..*at].rsplit('.').next().unwrap_or_default();
            before.parse::<u64>().is_ok()
        });
        let end = numbered.map_or(&*outcome.module, |at| &outcome.module[at + 1..]);
        let matched =
            |module: &str| module == end || module.strip_suffix(end).is_some_and(|m| m.ends_with('.'));
        let says_enough = outcomes.iter().all(|o| !matched(&o.module) || o.rank == outcome.rank);
        let key = if says_enough { end } else { &*outcome.module };
        pattern.insert(key.to_owned(), outcome.rank);
    }
    pattern
}

/// The union: of lists as a list; else every module by name.
fn targets(configs: &[&LoraConfig], outcomes: &[ModuleOutcome]) -> Targets {
    let mut union: Vec<String> = Vec::new();
    for config in configs {
        let Targets::Suffixes(suffixes) = &config.targets else {
            return Targets::Suffixes(outcomes.iter().map(|outcome| outcome.module.clone()).collect());
        };
        for suffix in suffixes {
            if !union.contains(suffix) {
                union.push(suffix.clone());
            }
        }
    }
    Targets::Suffixes(union)
}
