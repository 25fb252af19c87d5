//! What an adapter trains: how its tensors and the frozen base's make up the parameters of a block, and
//! how they begin.

use tch::{Device, Kind, Tensor};
use tunefleet_proto::adapter::{AdapterPlan, HEAD_ROWS, LoraConfig, TOKEN_ROWS};
use tunefleet_proto::model::{ModelConfig, Parameter};
use tunefleet_proto::shard_plan::{ShardPlan, Slot, Unit};

use super::Error;
use super::units::{EMBED, Shard};
use crate::base::Base;
use crate::comm::Communicator;
use crate::data::counter::{Draws, Purpose};
use crate::model::embed::{Rows, TableGrad};
use crate::model::linear::{Adapted, Pair};

/// A frozen base, and how trained tensors join it.
pub struct Frozen {
    /// The base.
    pub base: Base,
    /// The joints.
    pub wiring: Wiring,
}

/// Where each parameter comes from.
pub struct Wiring {
    embed: Vec<Source>,
    /// The first of them, which are looked up.
    tables: usize,
    blocks: Vec<BlockWiring>,
    dropout: f64,
    token_rows: Option<TokenRows>,
}

/// Rows of the tables of tokens that are trained.
struct TokenRows {
    rows: Rows,
    /// For each table its index among the embeddings' parameters, and that of its rows among the trained ones.
    tables: Vec<(usize, usize)>,
}

struct BlockWiring {
    sources: Vec<Source>,
    pairs: Vec<PairWiring>,
}

/// Index among the base's parameters of a unit, or among the trained ones.
#[derive(Clone, Copy)]
enum Source {
    Base(usize),
    Trained(usize),
}

struct PairWiring {
    /// Index of the weight among the block's parameters.
    weight: usize,
    a: usize,
    b: usize,
    magnitude: Option<usize>,
    scaling: f64,
}

impl Wiring {
    /// The wiring of `adapter` on `config`, whose trained tensors `plan` lays out.
    pub fn new(
        lora: &LoraConfig,
        adapter: &AdapterPlan,
        config: &ModelConfig,
        plan: &ShardPlan,
        device: Device,
    ) -> Self {
        let blocks = (0..config.layers).zip(plan.units.iter().skip(1)).map(|(block, unit)| {
            let parameters = config.block_parameters(block);
            let pairs = adapter.linears.iter().filter(|linear| linear.block == block);
            let pairs = pairs.filter_map(|linear| {
                let part = |part: &str| position(unit, &format!("{}.{part}", linear.name));
                Some(PairWiring {
                    weight: parameters.iter().position(|p| p.name == format!("{}.weight", linear.name))?,
                    a: part("lora_A.weight")?,
                    b: part("lora_B.weight")?,
                    magnitude: part("lora_magnitude_vector"),
                    scaling: linear.scaling,
                })
            });
            BlockWiring { pairs: pairs.collect(), sources: sources(&parameters, unit) }
        });
        let layout = config.embed_layout();
        let table = |(name, at): (&str, usize)| Some((at, position(&plan.units[EMBED], name)?));
        let tables: Vec<_> =
            [(TOKEN_ROWS, layout.tokens), (HEAD_ROWS, layout.head)].into_iter().filter_map(table).collect();
        let token_rows = (!tables.is_empty())
            .then(|| TokenRows { rows: Rows::new(&adapter.token_rows, config.vocab_size, device), tables });
        Wiring {
            token_rows,
            embed: sources(&config.embed_parameters(), &plan.units[EMBED]),
            tables: 1 + usize::from(config.embed_layout().positions.is_some()),
            blocks: blocks.collect(),
            dropout: lora.dropout,
        }
    }

    /// Whether anything is trained that the embeddings' own backward pass reaches.
    pub fn trains_embeddings(&self) -> bool {
        self.token_rows.is_some()
            || self.embed.iter().take(self.tables).any(|source| matches!(source, Source::Trained(_)))
    }

    /// Dropout on the inputs of pairs.
    pub fn dropout(&self) -> f64 {
        self.dropout
    }

    /// The embeddings' parameters: `base`'s, or the trained ones in their place.
    pub fn embed(&self, base: &[Tensor], trained: &[Tensor]) -> Vec<Tensor> {
        if let Some(TokenRows { rows, tables }) = &self.token_rows {
            for (table, from) in tables {
                // In its place: nobody reads what the base has there.
                rows.put(&trained[*from], &base[*table]);
            }
        }
        self.embed.iter().map(|source| pick(*source, base, trained).shallow_clone()).collect()
    }

    /// For each of the embeddings' parameters its gradient, where it is trained.
    pub fn embed_grads(&self, grads: &[Tensor]) -> Vec<Option<TableGrad>> {
        let grad = |source: &Source| match source {
            Source::Base(_) => None,
            Source::Trained(index) => Some(TableGrad::Whole(grads[*index].shallow_clone())),
        };
        let mut out: Vec<Option<TableGrad>> = self.embed.iter().map(grad).collect();
        if let Some(TokenRows { rows, tables }) = &self.token_rows {
            for (table, from) in tables {
                out[*table] = Some(TableGrad::Rows(rows.shallow_clone(), grads[*from].shallow_clone()));
            }
        }
        out
    }

    /// A block's parameters, in the order of the model.
    pub fn block<'a>(&self, block: usize, base: &'a [Tensor], trained: &'a [Tensor]) -> Vec<&'a Tensor> {
        self.blocks[block].sources.iter().map(|source| pick(*source, base, trained)).collect()
    }

    /// What stands beside the block's weight of that index.
    pub fn adapted<'a>(
        &self,
        block: usize,
        weight: usize,
        trained: &'a [Tensor],
        training: bool,
    ) -> Adapted<'a> {
        let wiring = &self.blocks[block];
        if let Source::Trained(_) = wiring.sources[weight] {
            return Adapted::Trained;
        }
        match wiring.pairs.iter().find(|pair| pair.weight == weight) {
            None => Adapted::Frozen,
            Some(pair) => Adapted::Pair(Pair {
                a: &trained[pair.a],
                b: &trained[pair.b],
                scaling: pair.scaling,
                dropout: if training { self.dropout } else { 0.0 },
                magnitude: pair.magnitude.map(|index| &trained[index]),
            }),
        }
    }
}

fn pick<'a>(source: Source, base: &'a [Tensor], trained: &'a [Tensor]) -> &'a Tensor {
    match source {
        Source::Base(index) => &base[index],
        Source::Trained(index) => &trained[index],
    }
}

fn sources(parameters: &[Parameter], unit: &Unit) -> Vec<Source> {
    let source = |(index, parameter): (usize, &Parameter)| match position(unit, &parameter.name) {
        Some(trained) => Source::Trained(trained),
        None => Source::Base(index),
    };
    parameters.iter().enumerate().map(source).collect()
}

fn position(unit: &Unit, name: &str) -> Option<usize> {
    unit.parameters.iter().position(|slot| slot.name == name)
}

/// Fills `shards` with what an adapter begins as: `A` uniform within the root of its input's width
/// (PyTorch's default for a linear, as in PEFT), `B` zero, magnitudes the lengths of the base's rows,
/// and copies of what is trained whole. The same values on any number of ranks. Collective.
///
/// # Errors
/// Whatever gathering the base meets.
pub fn init(
    shards: &[Shard],
    plan: &ShardPlan,
    (config, token_rows): (&ModelConfig, &[u64]),
    base: &mut Base,
    comm: &dyn Communicator,
    seed: u64,
) -> Result<(), Error> {
    let rank = comm.rank();
    for (index, (unit, shard)) in plan.units.iter().zip(shards).enumerate() {
        if unit.elements == 0 {
            continue;
        }
        let from_base = |slot: &Slot| !slot.name.contains(".lora_A") && !slot.name.contains(".lora_B");
        // Every rank or none: gathering is collective.
        let (base_tensors, parameters) = match unit.parameters.iter().any(from_base) {
            false => (Vec::new(), Vec::new()),
            true if index == EMBED => (base.embed(comm)?, config.embed_parameters()),
            true => (base.block(index - 1, comm)?, config.block_parameters(index as u64 - 1)),
        };
        let of_base = |name: &str| {
            let position = parameters.iter().position(|parameter| parameter.name == name);
            position.and_then(|position| base_tensors.get(position))
        };
        for piece in unit.pieces(rank.rank, rank.world) {
            let slot = piece.slot;
            let layout = config.embed_layout();
            let table = match slot.name.as_str() {
                TOKEN_ROWS => Some(layout.tokens),
                HEAD_ROWS => Some(layout.head),
                _ => None,
            };
            let values = if let Some(table) = table {
                // As the base has them.
                let ids: Vec<i64> = token_rows.iter().map(|id| *id as i64).collect();
                let table = &base_tensors[table];
                table
                    .index_select(0, &Tensor::from_slice(&ids).to_device(table.device()))
                    .to_kind(Kind::Float)
            } else if slot.name.ends_with(".lora_A.weight") {
                uniform(seed, index, unit, slot)
            } else if slot.name.ends_with(".lora_B.weight") {
                continue;
            } else if let Some(linear) = slot.name.strip_suffix(".lora_magnitude_vector") {
                match of_base(&format!("{linear}.weight")) {
                    Some(weight) => weight.to_kind(Kind::Float).norm_scalaropt_dim(2.0, 1, false),
                    None => continue,
                }
            } else {
                match of_base(&slot.name) {
                    Some(values) => values.to_kind(Kind::Float),
                    None => continue,
                }
            };
            let len = (piece.range.end - piece.range.start) as i64;
            let own = values.reshape([-1]).narrow(0, piece.range.start as i64, len);
            shard.master.narrow(0, piece.shard_offset as i64, len).copy_(&own);
        }
    }
    Ok(())
}

/// `A`'s first values, flat: of the seed and the place in the plan alone.
fn uniform(seed: u64, unit_index: usize, unit: &Unit, slot: &Slot) -> Tensor {
    let place = unit.parameters.iter().position(|other| other.name == slot.name).unwrap_or_default();
    let mut draws = Draws::new(seed, Purpose::AdapterInit, &[unit_index as u64, place as u64]);
    let bound = 1.0 / (slot.shape.last().copied().unwrap_or(1).max(1) as f64).sqrt();
    let values: Vec<f32> =
        (0..slot.elements()).map(|_| ((2.0 * draws.unit() - 1.0) * bound) as f32).collect();
    Tensor::from_slice(&values)
}
