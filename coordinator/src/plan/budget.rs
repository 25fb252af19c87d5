//! `train.memory_budget_gib`: the fastest settings that keep a rank's memory below it.
//!
//! What costs least time comes first: nothing computed again, then as few blocks as possible, then all
//! with as many as possible kept gathered, and only where nothing of that fits, state in main memory.

use tunefleet_proto::adapter;
use tunefleet_proto::job::{JobSpec, MemoryBudget, Offload, Recompute, Residency, Strategy};
use tunefleet_proto::model::ModelConfig;

use super::memory::{self, Machine};
use super::print::size;

/// Why nothing was chosen.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Nothing that may be chosen is small enough.
    #[error(
        "train.memory_budget_gib: a rank may have {}, but needs {} at least, with {settings}: raise the budget, use \
         more ranks, or fewer tokens in a micro-batch",
        size(*.budget), size(*.least)
    )]
    TooSmall {
        /// The budget.
        budget: u64,
        /// The least that would do.
        least: u64,
        /// With what.
        settings: String,
    },
    /// The adapter does not fit the model.
    #[error("adapter: {0}")]
    Adapter(#[from] adapter::Error),
}

/// What was chosen, in words.
pub type Choice = String;

/// Chooses what `spec` leaves open so that a rank stays within its budget, and records it in `spec`;
/// `None` where there is no budget. Chosen once, nothing is open any more: asked again, it is only seen
/// whether it fits.
///
/// # Errors
/// See [`Error`].
pub fn choose(spec: &mut JobSpec, config: &ModelConfig, machine: Machine) -> Result<Option<Choice>, Error> {
    let Some(budget) = spec.train.memory_budget else { return Ok(None) };
    let plan = spec.shard_plan(config)?;
    let blocks = config.layers as usize;
    let mut least: Option<(u64, Offload, Recompute)> = None;
    for (offload, recompute, resident) in candidates(spec, budget, blocks, machine) {
        let mut train = spec.train.clone();
        (train.offload, train.recompute) = (offload, recompute);
        let mut needs_with = |resident_blocks| -> Result<u64, Error> {
            train.resident_blocks = resident_blocks;
            let candidate = JobSpec { train: train.clone(), ..spec.clone() };
            Ok(memory::of_rank(&candidate, config, &plan, machine)?.needed_bytes)
        };
        // Each resident block adds as much: the most that fit are found by halving.
        let (mut fitting, mut above) = (resident.0, resident.1 + 1);
        let needed = needs_with(fitting)?;
        if least.as_ref().is_none_or(|(bytes, ..)| needed < *bytes) {
            least = Some((needed, offload, recompute));
        }
        if needed > budget.bytes {
            continue;
        }
        while above - fitting > 1 {
            let middle = fitting + (above - fitting) / 2;
            if needs_with(middle)? <= budget.bytes { fitting = middle } else { above = middle }
        }
        train.resident_blocks = fitting;
        train.memory_budget = Some(MemoryBudget {
            bytes: budget.bytes,
            recompute: false,
            resident_blocks: false,
            offload: false,
        });
        let open = budget.recompute || budget.resident_blocks || budget.offload && machine.on_gpu;
        spec.train = train;
        let how = if open { "chosen to fit" } else { "fits" };
        let settings = in_words(offload, recompute, Some(fitting), spec, blocks);
        return Ok(Some(format!("{how} {}: {settings}", size(budget.bytes))));
    }
    let (least, offload, recompute) = least.unwrap_or((u64::MAX, Offload::None, Recompute::All));
    let settings = in_words(offload, recompute, None, spec, blocks);
    Err(Error::TooSmall { budget: budget.bytes, least, settings })
}

/// Fastest first: where state lies, what is computed again, and from how few to how many blocks stay.
fn candidates(
    spec: &JobSpec,
    budget: MemoryBudget,
    blocks: usize,
    machine: Machine,
) -> Vec<(Offload, Recompute, (u32, u32))> {
    let train = &spec.train;
    let offloads = match budget.offload && machine.on_gpu {
        true => vec![Offload::None, Offload::Optimizer, Offload::All],
        false => vec![train.offload],
    };
    let mut recomputes = vec![train.recompute];
    if budget.recompute {
        recomputes = vec![Recompute::None];
        let mut computed_again = 0;
        for n in (2..blocks as u32).rev() {
            let again = (0..blocks).filter(|&i| Recompute::Every(n).applies(i, blocks)).count();
            // Of settings that compute as many again, one will do.
            if again > computed_again {
                computed_again = again;
                recomputes.push(Recompute::Every(n));
            }
        }
        recomputes.push(Recompute::All);
    }
    let all_stay = train.strategy == Strategy::ShardGradOp || train.shard_ranks == 1;
    let resident = |recompute| match (budget.resident_blocks, recompute) {
        (true, Recompute::All) if !all_stay => (0, blocks as u32),
        (true, _) => (0, 0),
        (false, _) => (train.resident_blocks, train.resident_blocks),
    };
    let mut found = Vec::new();
    for offload in offloads {
        found.extend(recomputes.iter().map(|&recompute| (offload, recompute, resident(recompute))));
    }
    found
}

fn in_words(
    offload: Offload,
    recompute: Recompute,
    resident: Option<u32>,
    spec: &JobSpec,
    blocks: usize,
) -> String {
    let again = (0..blocks).filter(|&i| recompute.applies(i, blocks)).count();
    let mut words = match recompute {
        Recompute::All => "recompute all".to_owned(),
        Recompute::Every(n) => format!("recompute every {n} ({again} of {blocks} blocks)"),
        Recompute::None => "recompute none".to_owned(),
    };
    if let Some(resident) = resident {
        let mut train = spec.train.clone();
        (train.recompute, train.resident_blocks) = (recompute, resident);
        let stay = Residency::of(&train, blocks).resident.iter().filter(|stays| **stays).count();
        words += &format!(", {stay} of {blocks} blocks stay gathered");
    }
    match offload {
        Offload::None => {}
        Offload::Optimizer => words += ", offload optimizer",
        Offload::All => words += ", offload all",
    }
    words
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use tunefleet_proto::job;

    use super::*;

    const GPU: Machine = Machine { on_gpu: true, bf16_products: true };

    fn chosen(gib: f64, more: &str, machine: Machine) -> Result<(JobSpec, Choice), Error> {
        let text = format!(
            "dataset: d\nmodel: {{init: {{preset: starcoder}}}}\ntrain: {{ranks: 8, memory_budget_gib: {gib}{more}}}\n"
        );
        let mut spec = job::load(Path::new("/j.yaml"), &text, &[], Path::new("/")).unwrap();
        let config = ModelConfig::preset("starcoder").unwrap();
        let choice = choose(&mut spec, &config, machine)?.unwrap();
        let needs = memory::of_rank(&spec, &config, &spec.shard_plan(&config).unwrap(), machine).unwrap();
        assert!(needs.needed_bytes as f64 <= gib * (1u64 << 30) as f64, "{choice}");
        Ok((spec, choice))
    }

    #[test]
    fn less_memory_means_slower_settings_and_never_more_than_was_allowed() {
        let settings = |gib| {
            let (spec, _) = chosen(gib, "", GPU).unwrap();
            (spec.train.recompute, spec.train.resident_blocks, spec.train.offload)
        };
        assert_eq!(settings(200.0), (Recompute::None, 0, Offload::None));
        let (recompute, _, offload) = settings(75.0);
        assert!(matches!(recompute, Recompute::Every(_)), "{recompute:?}");
        assert_eq!(offload, Offload::None);
        let (recompute, resident, offload) = settings(45.0);
        assert_eq!((recompute, offload), (Recompute::All, Offload::None));
        assert!((1..40).contains(&resident), "{resident}");
        assert_ne!(settings(25.0).2, Offload::None);
    }

    #[test]
    fn what_was_given_stays_and_what_was_chosen_is_chosen_once() {
        let (spec, choice) = chosen(75.0, ", recompute: all, offload: none", GPU).unwrap();
        assert_eq!((spec.train.recompute, spec.train.offload), (Recompute::All, Offload::None));
        assert!(choice.starts_with("chosen to fit 75.0 GiB: recompute all, "), "{choice}");
        let mut again = spec.clone();
        let config = ModelConfig::preset("starcoder").unwrap();
        let choice = choose(&mut again, &config, GPU).unwrap().unwrap();
        assert!(choice.starts_with("fits 75.0 GiB"), "{choice}");
        assert_eq!(again, spec);
    }

    #[test]
    fn the_least_that_would_do_is_named() {
        let error = chosen(5.0, "", GPU).unwrap_err().to_string();
        assert!(error.contains("may have 5.0 GiB, but needs ") && error.contains("offload all"), "{error}");
        // On a CPU there is nowhere to offload to.
        let cpu = Machine { on_gpu: false, bf16_products: true };
        let error = chosen(5.0, "", cpu).unwrap_err().to_string();
        assert!(!error.contains("offload"), "{error}");
    }

    #[test]
    fn without_a_budget_nothing_is_chosen() {
        let text = "dataset: d\nmodel: {init: {preset: tiny}}\n";
        let mut spec = job::load(Path::new("/j.yaml"), text, &[], Path::new("/")).unwrap();
        let before = spec.clone();
        let config = ModelConfig::preset("tiny").unwrap();
        assert_eq!(choose(&mut spec, &config, GPU).unwrap(), None);
        assert_eq!(spec, before);
    }
}
