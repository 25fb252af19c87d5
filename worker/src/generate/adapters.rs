//! Adapters beside one base: pairs in the dtype and on the device of the model, chosen by request.

use std::path::Path;

use tch::Tensor;
use tunefleet_proto::adapter::{AdapterPlan, TOKEN_ROWS};
use tunefleet_proto::model::ModelConfig;

use crate::adapter::{self, files};
use crate::model::linear::Pair;
use crate::model::numerics::Numerics;

/// One adapter with its weight. Another weight is another adapter, with the same tensors.
#[derive(Debug)]
pub struct Adapter {
    /// What its difference is multiplied by.
    weight: f64,
    /// For each block, the pair beside each of its linears.
    blocks: Vec<Vec<Option<Held>>>,
    /// Rows of the tables of tokens that it has of its own, whatever its weight.
    rows: Option<OwnRows>,
}

/// Rows of the tables of tokens in place of the base's.
#[derive(Debug)]
pub struct OwnRows {
    ids: Vec<u32>,
    /// `[n]`, int64, on the device.
    ids_n: Tensor,
    /// `[n, D]` of the token embedding.
    tokens_nd: Tensor,
    /// `[n, D]` of the output head, in the dtype of products.
    head_nd: Option<Tensor>,
}

impl OwnRows {
    /// Of tokens, those that have rows: their places, and the rows' numbers.
    pub fn of(&self, tokens: &[u32]) -> (Vec<i64>, Vec<i64>) {
        let row = |(at, token): (usize, &u32)| Some((at as i64, self.ids.binary_search(token).ok()? as i64));
        tokens.iter().enumerate().filter_map(row).unzip()
    }

    /// `[n, D]` of the token embedding.
    pub fn tokens_nd(&self) -> &Tensor {
        &self.tokens_nd
    }

    /// Replaces their columns of logits `[R, V]` by what they make of states `[R, D]`.
    pub fn relogit(&self, logits_rv: &Tensor, h_rd: &Tensor) {
        let Some(head_nd) = &self.head_nd else { return };
        let own_rn = h_rd.matmul(&head_nd.tr()).to_kind(logits_rv.kind());
        let there = logits_rv.device();
        let _ =
            logits_rv.shallow_clone().index_copy_(1, &self.ids_n.to_device(there), &own_rn.to_device(there));
    }

    /// Both tables with the rows in their places.
    pub fn tables(&self, tokens_vd: &Tensor, head_vd: &Tensor) -> (Tensor, Tensor) {
        let with = |table: &Tensor, rows: Option<&Tensor>| match rows {
            Some(rows) => table.index_copy(0, &self.ids_n, &rows.to_kind(table.kind())),
            None => table.shallow_clone(),
        };
        (with(tokens_vd, Some(&self.tokens_nd)), with(head_vd, self.head_nd.as_ref()))
    }
}

#[derive(Debug)]
struct Held {
    a: Tensor,
    b: Tensor,
    scaling: f64,
}

impl Adapter {
    /// Reads an adapter for a model.
    ///
    /// # Errors
    /// Files that are none, that do not fit the model or match nothing of it, and adapters that train more than pairs.
    pub fn load(
        dir: &Path,
        weight: f64,
        config: &ModelConfig,
        numerics: Numerics,
    ) -> Result<Self, adapter::Error> {
        let (adapter, plan) = files::read_for(dir, config)?;
        Self::of(&adapter, &plan, dir, weight, config, numerics)
    }

    /// An adapter that is in memory; `dir` is what errors call it.
    ///
    /// # Errors
    /// As [`load`](Self::load).
    pub fn of(
        adapter: &files::Adapter,
        plan: &AdapterPlan,
        dir: &Path,
        weight: f64,
        config: &ModelConfig,
        numerics: Numerics,
    ) -> Result<Self, adapter::Error> {
        let saved = adapter.saved().next().map(|(key, _, _)| key.to_owned());
        let more = match saved {
            _ if plan.dora => Some("magnitudes (DoRA)".to_owned()),
            saved => saved,
        };
        if let Some(more) = more {
            return Err(adapter::Error::Refused(format!(
                "{}: it trains {more}, which cannot be added to a model that serves others: merge it into the model \
                 with `worker adapter merge`, and serve that",
                dir.display()
            )));
        }
        let linears = config.linears();
        let mut blocks: Vec<Vec<Option<Held>>> =
            (0..config.layers).map(|_| linears.iter().map(|_| None).collect()).collect();
        for (module, pair) in adapter.pairs()? {
            let Some(linear) = plan.linears.iter().find(|linear| linear.module == module) else { continue };
            let place = linears.iter().position(|shape| shape.name == linear.name);
            let slot = blocks.get_mut(linear.block as usize).and_then(|block| block.get_mut(place?));
            let Some(slot) = slot else { continue };
            let there = |tensor: &Tensor| tensor.to_device(numerics.device).to_kind(numerics.product_kind);
            *slot = Some(Held { a: there(pair.a), b: there(pair.b), scaling: pair.scaling });
        }
        let rows = own_rows(adapter, config, numerics);
        Ok(Adapter { weight, blocks, rows })
    }

    /// Rows of the tables of tokens that it has of its own.
    pub fn rows(&self) -> Option<&OwnRows> {
        self.rows.as_ref()
    }

    /// The same adapter with another weight.
    pub fn weighing(&self, weight: f64) -> Self {
        let held = |held: &Held| Held {
            a: held.a.shallow_clone(),
            b: held.b.shallow_clone(),
            scaling: held.scaling,
        };
        let block = |pairs: &Vec<Option<Held>>| pairs.iter().map(|pair| pair.as_ref().map(held)).collect();
        let rows = self.rows.as_ref().map(|rows| OwnRows {
            ids: rows.ids.clone(),
            ids_n: rows.ids_n.shallow_clone(),
            tokens_nd: rows.tokens_nd.shallow_clone(),
            head_nd: rows.head_nd.as_ref().map(Tensor::shallow_clone),
        });
        Adapter { weight, blocks: self.blocks.iter().map(block).collect(), rows }
    }

    /// What is added to a linear of a block, by the place of its weight among the block's parameters.
    pub fn pair(&self, block: usize, linear: usize) -> Option<Pair<'_>> {
        let held = self.blocks.get(block)?.get(linear)?.as_ref()?;
        let scaling = held.scaling * self.weight;
        Some(Pair { a: &held.a, b: &held.b, scaling, dropout: 0.0, magnitude: None })
    }
}

fn own_rows(adapter: &files::Adapter, config: &ModelConfig, numerics: Numerics) -> Option<OwnRows> {
    let ids: Vec<u32> = adapter.config.token_rows.iter().filter_map(|id| u32::try_from(*id).ok()).collect();
    let mut tables: Vec<(&str, &Tensor)> = adapter.token_rows().map(|(name, _, rows)| (name, rows)).collect();
    tables.sort_by_key(|(name, _)| *name != TOKEN_ROWS);
    let (_, tokens) = tables.first()?;
    // Where embedding and head are one table, their rows are as well.
    let head = if config.tied_head { Some(tokens) } else { tables.get(1).map(|(_, rows)| rows) };
    let there = |rows: &Tensor, kind| rows.to_device(numerics.device).to_kind(kind);
    let of_ids: Vec<i64> = ids.iter().map(|id| i64::from(*id)).collect();
    Some(OwnRows {
        ids_n: Tensor::from_slice(&of_ids).to_device(numerics.device),
        tokens_nd: there(tokens, numerics.kind),
        head_nd: head.map(|rows| there(rows, numerics.product_kind)),
        ids,
    })
}
