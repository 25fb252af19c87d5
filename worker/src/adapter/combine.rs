//! Several adapters as one, whose scaling is 1.
//!
//! With `s` an adapter's scaling and `w` its weight:
//!
//! | combination | result | rank |
//! | --- | --- | --- |
//! | `cat` | `A = [w s A ...]`, `B = [B ...]`: exactly `sum w s B A` | sum |
//! | `svd` | the nearest pair to `sum w s B A`; the distance is reported | chosen |
//! | `linear` | `A = sum sign(w s) sqrt(abs(w s)) A`, `B = sum sqrt(abs(w s)) B` | that of all |
//! | `ties`, `dare_linear`, `dare_ties`, `magnitude_prune` | as `linear`, each factor pruned | that of all |
//! | the same with `_svd` | the method on whole differences, then the nearest pair | chosen |
//!
//! What works on factors has cross terms: the product of two sums holds `B_i A_j` as well. That lies in
//! these methods, and PEFT has it too; `cat` and `svd` have none.
//!
//! PEFT 0.21 differs in four ways, which [`Options::peft_compat`] gives:
//!
//! - a single adapter is always scaled, whatever was asked for: no truncation, no pruning;
//! - the result takes rsLoRA from the first adapter, and then is too large by the root of its rank;
//! - what an adapter trains whole (`modules_to_save`) is lost: the result has the base's own values;
//! - TIES elects signs before weights are applied, so that a subtracted adapter votes for what it takes away.

use std::collections::BTreeMap;

use tch::{Kind, Tensor};
use tunefleet_proto::adapter::{KEY_PREFIX, TOKEN_ROWS_SUFFIX};

use super::Error;
use super::delta::Pair;
use super::files::{Adapter, natural, pair_keys};
use super::prune::{self, MajoritySign, Prune, Rule};
use super::scale::refuse_dora;
use super::settings;
use super::svd::{self, relative};
use crate::checkpoint::base_digest::BASE_DIGEST_KEY;

/// How adapters become one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
#[value(rename_all = "snake_case")]
pub enum Combination {
    /// Exactly the weighted sum; its rank is the sum of the ranks.
    Cat,
    /// The weighted sum, cut to a rank; says how much was cut off.
    Svd,
    /// Sums of factors: cheap, and with cross terms; ranks must be equal.
    Linear,
    /// Factors: the largest values, signs elected, the mean of what agrees.
    Ties,
    /// As ties, on whole differences, then cut to a rank.
    TiesSvd,
    /// Factors: random values, enlarged, summed.
    DareLinear,
    /// As dare_linear, on whole differences, then cut to a rank.
    DareLinearSvd,
    /// Factors: random values, enlarged, signs elected, the mean of what agrees.
    DareTies,
    /// As dare_ties, on whole differences, then cut to a rank.
    DareTiesSvd,
    /// Factors: the largest values, summed.
    MagnitudePrune,
    /// As magnitude_prune, on whole differences, then cut to a rank.
    MagnitudePruneSvd,
}

/// How to combine.
#[derive(Debug, Clone, Copy)]
pub struct Options {
    /// The method.
    pub combination: Combination,
    /// Of what is cut to a rank; the largest rank of the adapters when absent.
    pub rank: Option<u64>,
    /// Share of values that pruning keeps.
    pub density: Option<f64>,
    /// How TIES elects signs.
    pub majority_sign: MajoritySign,
    /// Of DARE's draws.
    pub seed: u64,
    /// What PEFT would give, where that is something else.
    pub peft_compat: bool,
}

/// One adapter of several.
#[derive(Debug)]
pub struct Part {
    /// What to call it in messages.
    pub name: String,
    /// It.
    pub adapter: Adapter,
    /// How much of it; may be negative.
    pub weight: f64,
}

/// What became of one module.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct ModuleOutcome {
    /// Its name.
    pub module: String,
    /// Rank of its pair.
    pub rank: u64,
    /// Norm of what was cut off over the norm of the whole; absent where nothing is cut.
    pub truncation_error: Option<f64>,
}

/// The result.
#[derive(Debug)]
pub struct Combined {
    /// The new adapter.
    pub adapter: Adapter,
    /// Each module, in the order of blocks.
    pub modules: Vec<ModuleOutcome>,
    /// As [`ModuleOutcome::truncation_error`], over all modules.
    pub truncation_error: Option<f64>,
    /// What a person should know.
    pub notes: Vec<String>,
}

/// Combines `parts`.
///
/// # Errors
/// Adapters that do not go together, options that the method needs or cannot use.
pub fn combine(parts: &[Part], options: Options) -> Result<Combined, Error> {
    let mut options = options;
    check(parts, &options)?;
    if options.peft_compat && parts.len() == 1 {
        options.combination = Combination::Linear;
    }
    let of_parts: Vec<BTreeMap<String, Pair<'_>>> = parts
        .iter()
        .map(|part| Ok(part.adapter.pairs()?.into_iter().collect()))
        .collect::<Result<_, Error>>()?;
    let mut modules: Vec<&String> = of_parts.iter().flat_map(BTreeMap::keys).collect();
    modules.sort_by_cached_key(|module| natural(module));
    modules.dedup();

    let largest = of_parts.iter().flat_map(BTreeMap::values).map(Pair::rank).max().unwrap_or(1);
    let rank = options.rank.map_or(largest, |rank| rank as i64);
    let mut tensors = BTreeMap::new();
    let mut outcomes = Vec::with_capacity(modules.len());
    let (mut dropped, mut squares, mut cuts) = (0.0, 0.0, false);
    for module in modules {
        let mut terms = Vec::new();
        for (part, pairs) in parts.iter().zip(&of_parts) {
            if let Some(pair) = pairs.get(module) {
                terms.push((part, *pair));
            }
        }
        same_shapes(module, &terms)?;
        let terms: Vec<(f64, Pair<'_>)> = terms.iter().map(|(part, pair)| (part.weight, *pair)).collect();
        let made = module_pair(module, &terms, rank, &options)?;
        let (a_key, b_key) = pair_keys(module);
        let error = made.truncation.map(|(part, whole)| {
            (dropped, squares, cuts) = (dropped + part, squares + whole, true);
            relative(part, whole)
        });
        outcomes.push(ModuleOutcome {
            module: module.clone(),
            rank: made.a.size()[0] as u64,
            truncation_error: error,
        });
        tensors.insert(a_key, made.a);
        tensors.insert(b_key, made.b);
    }
    let mut notes = Vec::new();
    let mut config = settings::of_result(parts, &outcomes, &options, &mut notes);
    let (token_rows, tables) = token_rows(parts)?;
    if !token_rows.is_empty() {
        notes.push(format!(
            "rows of {} tokens stand as they were trained, whatever the weights",
            token_rows.len()
        ));
        config.untied_tokens = parts.iter().find_map(|part| part.adapter.config.untied_tokens.clone());
        config.token_rows = token_rows;
        tensors.extend(tables);
    }
    for (key, _, tensor) in parts.iter().flat_map(|part| part.adapter.saved()) {
        if options.peft_compat {
            notes.push(format!("{key} is left out, as in PEFT"));
        } else {
            tensors.insert(key.to_owned(), tensor.shallow_clone());
        }
    }
    let mut metadata = parts.first().map(|part| part.adapter.metadata.clone()).unwrap_or_default();
    let all_say =
        |key: &str, value: Option<&String>| parts.iter().all(|part| part.adapter.metadata.get(key) == value);
    let same = all_say(BASE_DIGEST_KEY, metadata.get(BASE_DIGEST_KEY));
    // What all agree on: bases of one digest may have been held in different ways.
    metadata.retain(|key, value| all_say(key, Some(value)));
    if !same {
        notes.push("the adapters name different bases, or some name none: the result names none".to_owned());
    }
    let adapter = Adapter { config, tensors, metadata };
    Ok(Combined {
        adapter,
        modules: outcomes,
        truncation_error: cuts.then(|| relative(dropped, squares)),
        notes,
    })
}

type Tables = BTreeMap<String, Tensor>;

/// The rows of tables of tokens that some part trains, with their values; no row is trained by two.
fn token_rows(parts: &[Part]) -> Result<(Vec<u64>, Tables), Error> {
    let mut of_row: BTreeMap<u64, &Part> = BTreeMap::new();
    for part in parts {
        for id in &part.adapter.config.token_rows {
            if let Some(first) = of_row.insert(*id, part) {
                return Err(Error::Refused(format!(
                    "{} and {} both train the row of token {id}: these cannot be combined",
                    first.name, part.name
                )));
            }
        }
    }
    let mut tables: BTreeMap<String, Vec<Tensor>> = BTreeMap::new();
    for (id, part) in &of_row {
        let at = part.adapter.config.token_rows.binary_search(id).unwrap_or_default() as i64;
        for (_, module, rows) in part.adapter.token_rows() {
            tables.entry(format!("{KEY_PREFIX}{module}{TOKEN_ROWS_SUFFIX}")).or_default().push(rows.get(at));
        }
    }
    let tables: Tables = tables.into_iter().map(|(key, rows)| (key, Tensor::stack(&rows, 0))).collect();
    if let Some((key, _)) = tables.iter().find(|(_, rows)| rows.size()[0] != of_row.len() as i64) {
        return Err(Error::Refused(format!(
            "{key}: some of the adapters train rows of this table, and some of another: these cannot be combined"
        )));
    }
    Ok((of_row.into_keys().collect(), tables))
}

struct Made {
    a: Tensor,
    b: Tensor,
    /// Squares that were cut off, and all squares.
    truncation: Option<(f64, f64)>,
}

fn module_pair(module: &str, terms: &[(f64, Pair<'_>)], rank: i64, options: &Options) -> Result<Made, Error> {
    use Combination as C;
    let cut = |truncated: svd::Truncated| Made {
        truncation: Some((truncated.dropped_squares, truncated.squares)),
        a: truncated.a,
        b: truncated.b,
    };
    let rule = rule(options);
    match options.combination {
        C::Cat => {
            let a = terms.iter().map(|(w, pair)| pair.a.to_kind(Kind::Double) * (w * pair.scaling));
            let a = Tensor::cat(&a.collect::<Vec<_>>(), 0).to_kind(Kind::Float);
            let b: Vec<&Tensor> = terms.iter().map(|(_, pair)| pair.b).collect();
            Ok(Made { a, b: Tensor::cat(&b, 1), truncation: None })
        }
        C::Svd => svd::of_pairs(module, terms, rank).map(cut),
        C::Linear | C::Ties | C::DareLinear | C::DareTies | C::MagnitudePrune => {
            let ranks: Vec<i64> = terms.iter().map(|(_, pair)| pair.rank()).collect();
            if ranks.iter().any(|rank| Some(rank) != ranks.first()) {
                return Err(Error::Refused(format!(
                    "{module}: ranks {ranks:?} differ, and this combination adds factors row by row: use cat, \
                     which is exact, or one that ends in svd"
                )));
            }
            let factor = |which: &str| {
                let terms: Vec<(f64, Tensor)> = terms
                    .iter()
                    .map(|(w, pair)| {
                        let ws = w * pair.scaling;
                        let root = ws.abs().sqrt();
                        // The sign goes to one side only.
                        match which {
                            "A" => (root.copysign(ws), pair.a.shallow_clone()),
                            _ => (root, pair.b.shallow_clone()),
                        }
                    })
                    .collect();
                prune::sum(rule, &terms, &[&options.seed.to_string(), module, which])
            };
            Ok(Made { a: factor("A"), b: factor("B"), truncation: None })
        }
        C::TiesSvd | C::DareLinearSvd | C::DareTiesSvd | C::MagnitudePruneSvd => {
            let terms: Vec<(f64, Tensor)> = terms
                .iter()
                .map(|(w, pair)| (*w, pair.rows(&(0..pair.shape().0)).to_kind(Kind::Float)))
                .collect();
            let delta = prune::sum(rule, &terms, &[&options.seed.to_string(), module, "BA"]);
            svd::of_matrix(module, &delta, rank).map(cut)
        }
    }
}

fn rule(options: &Options) -> Rule {
    use Combination as C;
    let random =
        matches!(options.combination, C::DareLinear | C::DareLinearSvd | C::DareTies | C::DareTiesSvd);
    let elects = matches!(options.combination, C::Ties | C::TiesSvd | C::DareTies | C::DareTiesSvd);
    Rule {
        prune: if random { Prune::Random } else { Prune::Magnitude },
        density: if prunes(options.combination) { options.density.unwrap_or(1.0) } else { 1.0 },
        elect: elects.then_some(options.majority_sign),
        unweighted_votes: options.peft_compat,
    }
}

fn prunes(combination: Combination) -> bool {
    !matches!(combination, Combination::Cat | Combination::Svd | Combination::Linear)
}

fn cuts(combination: Combination) -> bool {
    use Combination as C;
    matches!(combination, C::Svd | C::TiesSvd | C::DareLinearSvd | C::DareTiesSvd | C::MagnitudePruneSvd)
}

fn check(parts: &[Part], options: &Options) -> Result<(), Error> {
    let refuse = |message: String| Err(Error::Refused(message));
    if parts.is_empty() {
        return refuse("no adapter to combine: give at least one --adapter".to_owned());
    }
    for part in parts {
        if !part.weight.is_finite() {
            return refuse(format!("{}: weight {} must be a finite number", part.name, part.weight));
        }
        refuse_dora(&part.adapter.config, "combined")
            .map_err(|e| Error::Refused(format!("{}: {e}", part.name)))?;
    }
    let saving: Vec<&Part> = parts.iter().filter(|part| part.adapter.saved().next().is_some()).collect();
    match saving.as_slice() {
        [] => {}
        [one] if one.weight == 1.0 || options.peft_compat => {}
        [one] => {
            return refuse(format!(
                "{}: trains modules whole (modules_to_save {:?}), which only a weight of 1 keeps as they are; \
                 its weight is {}",
                one.name, one.adapter.config.modules_to_save, one.weight
            ));
        }
        [one, two, ..] => {
            return refuse(format!(
                "{} and {} both train modules whole (modules_to_save): these cannot be combined",
                one.name, two.name
            ));
        }
    }
    match options.density {
        Some(density) if !(density > 0.0 && density <= 1.0) => {
            return refuse(format!("--density ({density}) must be above 0 and at most 1"));
        }
        None if prunes(options.combination) => {
            return refuse(
                "this combination prunes: say with --density which share of values stays".to_owned(),
            );
        }
        Some(_) if !prunes(options.combination) => {
            return refuse("--density is for combinations that prune: this one does not".to_owned());
        }
        _ => {}
    }
    match options.rank {
        Some(0) => refuse("--rank (0) must be at least 1".to_owned()),
        Some(_) if !cuts(options.combination) => refuse(
            "--rank is for svd and the combinations that end in it: this one's rank follows".to_owned(),
        ),
        _ => Ok(()),
    }
}

fn same_shapes(module: &str, terms: &[(&Part, Pair<'_>)]) -> Result<(), Error> {
    let Some(((first, pair), rest)) = terms.split_first() else { return Ok(()) };
    match rest.iter().find(|(_, other)| other.shape() != pair.shape()) {
        None => Ok(()),
        Some((part, other)) => Err(Error::Refused(format!(
            "{module}: is {:?} in {}, and {:?} in {}: they belong to different models",
            pair.shape(),
            first.name,
            other.shape(),
            part.name
        ))),
    }
}

#[cfg(test)]
#[path = "combine_tests.rs"]
mod tests;
