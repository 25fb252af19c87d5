//! Who holds which elements of which parameter.
//!
//! A *unit* is what is gathered at once: the embeddings (with the final norm), or one block.
//! Its parameters lie end to end in one flat buffer, each at a multiple of [`ALIGN`] elements;
//! rank `r` of `N` holds elements `[r, r + 1) * elements / N`. A gathered buffer therefore *is*
//! the parameters, as views, with no copy; a rank's piece of a parameter is a range.

use serde::{Deserialize, Serialize};

use crate::adapter::AdapterPlan;
use crate::model::{ModelConfig, Parameter};

/// Parameters begin at multiples of this many elements (128 bytes in bf16).
pub const ALIGN: u64 = 64;
/// Version of [`ShardPlan`] that this build writes.
pub const PLAN_VERSION: u32 = 1;

/// Name of the unit that stays gathered for the whole step.
pub const EMBED_UNIT: &str = "embed";

/// The layout of a model over ranks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ShardPlan {
    /// [`PLAN_VERSION`].
    pub version: u32,
    /// Number of ranks.
    pub world: u32,
    /// `embed`, then `block.0` and so on.
    pub units: Vec<Unit>,
}

/// What is gathered at once.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Unit {
    /// `embed` or `block.N`.
    pub name: String,
    /// Elements of the flat buffer, padding included; a multiple of `world * ALIGN`.
    pub elements: u64,
    /// Parameters in the order of their offsets.
    pub parameters: Vec<Slot>,
}

/// Where one parameter lies in its unit.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Slot {
    /// Name inside the unit.
    pub name: String,
    /// Full name in Hugging Face files.
    pub hf_name: String,
    /// Shape of the parameter.
    pub shape: Vec<u64>,
    /// First element in the unit's buffer.
    pub offset: u64,
    /// Whether weight decay applies.
    pub decays: bool,
}

/// A rank's piece of one parameter.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Piece<'a> {
    /// The parameter.
    pub slot: &'a Slot,
    /// First and past-the-last element of the parameter, flattened.
    pub range: std::ops::Range<u64>,
    /// Where the range begins in the rank's shard.
    pub shard_offset: u64,
}

impl ShardPlan {
    /// The plan of `config` over `world` ranks.
    pub fn new(config: &ModelConfig, world: u32) -> Self {
        let world_u64 = u64::from(world.max(1));
        let mut units = vec![Unit::new(EMBED_UNIT.to_owned(), config.embed_parameters(), world_u64)];
        for block in 0..config.layers {
            units.push(Unit::new(format!("block.{block}"), config.block_parameters(block), world_u64));
        }
        ShardPlan { version: PLAN_VERSION, world: world.max(1), units }
    }

    /// The plan of what `adapter` trains of `config`; units may be empty.
    pub fn of_adapter(adapter: &AdapterPlan, config: &ModelConfig, world: u32) -> Self {
        let world_u64 = u64::from(world.max(1));
        let mut units = vec![Unit::new(EMBED_UNIT.to_owned(), adapter.embed_parameters(), world_u64)];
        for block in 0..config.layers {
            units.push(Unit::new(format!("block.{block}"), adapter.block_parameters(block), world_u64));
        }
        ShardPlan { version: PLAN_VERSION, world: world.max(1), units }
    }

    /// fp32 elements that one rank holds, padding included.
    pub fn shard_elements(&self) -> u64 {
        self.units.iter().map(|u| u.shard_elements(self.world)).sum()
    }
}

impl Unit {
    fn new(name: String, parameters: Vec<Parameter>, world: u64) -> Self {
        let mut offset = 0;
        let mut slots = Vec::with_capacity(parameters.len());
        for parameter in parameters {
            let elements = parameter.elements();
            let Parameter { name, hf_name, shape, decays } = parameter;
            slots.push(Slot { name, hf_name, shape, offset, decays });
            offset = (offset + elements).next_multiple_of(ALIGN);
        }
        Unit { name, elements: offset.next_multiple_of(world * ALIGN), parameters: slots }
    }

    /// Elements that each rank holds.
    pub fn shard_elements(&self, world: u32) -> u64 {
        self.elements / u64::from(world)
    }

    /// The pieces of this unit that `rank` of `world` holds, in shard order.
    pub fn pieces(&self, rank: u32, world: u32) -> Vec<Piece<'_>> {
        let len = self.shard_elements(world);
        let (begin, end) = (u64::from(rank) * len, (u64::from(rank) + 1) * len);
        let mut pieces = Vec::new();
        for slot in &self.parameters {
            let (first, last) = (slot.offset, slot.offset + slot.elements());
            let (from, to) = (first.max(begin), last.min(end));
            if from < to {
                pieces.push(Piece { slot, range: from - first..to - first, shard_offset: from - begin });
            }
        }
        pieces
    }
}

impl Slot {
    /// Whether it is a magnitude of DoRA.
    pub fn is_magnitude(&self) -> bool {
        self.name.ends_with(".lora_magnitude_vector")
    }

    /// Number of elements.
    pub fn elements(&self) -> u64 {
        self.shape.iter().product()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_of_all_ranks_cover_each_parameter_once() {
        let config = ModelConfig::preset("tiny").unwrap();
        for world in [1, 2, 3, 4, 7, 8] {
            let plan = ShardPlan::new(&config, world);
            for unit in &plan.units {
                let mut covered: std::collections::BTreeMap<&str, u64> = Default::default();
                for rank in 0..world {
                    for piece in unit.pieces(rank, world) {
                        let next = covered.entry(&piece.slot.name).or_default();
                        assert_eq!(piece.range.start, *next, "gap in {}", piece.slot.name);
                        *next = piece.range.end;
                    }
                }
                for slot in &unit.parameters {
                    assert_eq!(covered[slot.name.as_str()], slot.elements());
                    assert_eq!(slot.offset % ALIGN, 0);
                }
            }
        }
    }
}
