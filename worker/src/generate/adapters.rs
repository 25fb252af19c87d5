//! Adapters beside one base: pairs in the dtype and on the device of the model, chosen by request.

use std::path::Path;

use tch::Tensor;
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
        Ok(Adapter { weight, blocks })
    }

    /// The same adapter with another weight.
    pub fn weighing(&self, weight: f64) -> Self {
        let held = |held: &Held| Held {
            a: held.a.shallow_clone(),
            b: held.b.shallow_clone(),
            scaling: held.scaling,
        };
        let block = |pairs: &Vec<Option<Held>>| pairs.iter().map(|pair| pair.as_ref().map(held)).collect();
        Adapter { weight, blocks: self.blocks.iter().map(block).collect() }
    }

    /// What is added to a linear of a block, by the place of its weight among the block's parameters.
    pub fn pair(&self, block: usize, linear: usize) -> Option<Pair<'_>> {
        let held = self.blocks.get(block)?.get(linear)?.as_ref()?;
        let scaling = held.scaling * self.weight;
        Some(Pair { a: &held.a, b: &held.b, scaling, dropout: 0.0, magnitude: None })
    }
}
