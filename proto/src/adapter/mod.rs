//! LoRA adapters (Hu et al. 2021): settings, what they apply to, and PEFT's own file format.
//!
//! An adapted linear computes `x W^T + b + s (dropout(x) A^T) B^T` with `A` `[rank, in]`, `B`
//! `[out, rank]` and `s = alpha / rank` (rsLoRA: `alpha / sqrt(rank)`). DoRA (Liu et al. 2024) adds a
//! magnitude per output row. Torch-free: the coordinator counts and shards with it.

mod modules;
mod peft;
mod targets;

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::model::{ModelConfig, Parameter};
pub use modules::{Modules, PairShape};
pub use peft::{CONFIG_FILE, KEY_PREFIX, MAX_RANK, WEIGHTS_FILE};
pub use targets::Targets;

/// What an adapter is.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LoraConfig {
    /// Inner width of every pair that `rank_pattern` does not name.
    pub rank: u64,
    /// Numerator of the scaling, where `alpha_pattern` names none.
    pub alpha: f64,
    /// On the input of `A`, in training.
    pub dropout: f64,
    /// Scale by the root of the rank instead of the rank.
    pub rslora: bool,
    /// Learn a magnitude per output row.
    pub dora: bool,
    /// Which linears get a pair.
    pub targets: Targets,
    /// Modules that are trained whole, by the end of their name.
    pub modules_to_save: Vec<String>,
    /// Ranks of modules whose names match, as PEFT matches them.
    pub rank_pattern: BTreeMap<String, u64>,
    /// Alphas of modules whose names match.
    pub alpha_pattern: BTreeMap<String, f64>,
    /// Rows of the token embedding that are trained whole, and of the output head where that is another table; in
    /// ascending order.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub token_rows: Vec<u64>,
    /// Name of the token embedding, where the same rows of the output head are trained as well.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub untied_tokens: Option<String>,
    /// The model that it was trained on, for people.
    pub base_model: Option<String>,
}

/// What a config asks for and cannot have.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// No linear of the model is a target.
    #[error("target_modules {targets} match no linear of this model; it has {linears}")]
    NothingMatches {
        /// What was asked for.
        targets: String,
        /// What there is, without block numbers.
        linears: String,
    },
    /// A module that cannot be trained whole, or cannot have a pair.
    #[error("{key} {module:?}: {rule}")]
    Module {
        /// `modules_to_save` or `target_modules`.
        key: &'static str,
        /// The offending entry.
        module: String,
        /// What is wrong.
        rule: String,
    },
    /// A pattern that is not a regular expression.
    #[error("{key}: {pattern:?} is not a regular expression that this program can read: {cause}")]
    Pattern {
        /// `target_modules`, `rank_pattern` or `alpha_pattern`.
        key: &'static str,
        /// The pattern.
        pattern: String,
        /// Why.
        cause: String,
    },
    /// An `adapter_config.json` with something that is not supported, by key.
    #[error("adapter_config.json: {key}: {rule}")]
    Config {
        /// Which key.
        key: String,
        /// What is wrong.
        rule: String,
    },
}

/// One linear with its pair.
#[derive(Debug, Clone, PartialEq)]
pub struct AdaptedLinear {
    /// Name inside its block, e.g. `attn.c_attn`.
    pub name: String,
    /// Full name in Hugging Face files, e.g. `transformer.h.3.attn.c_attn`.
    pub module: String,
    /// Block that it belongs to.
    pub block: u64,
    /// Width of its output.
    pub out_features: u64,
    /// Width of its input.
    pub in_features: u64,
    /// Inner width of the pair.
    pub rank: u64,
    /// What the product of the pair is multiplied by.
    pub scaling: f64,
}

/// A [`LoraConfig`] on a model: everything that it trains.
#[derive(Debug, Clone, PartialEq)]
pub struct AdapterPlan {
    /// In the order of blocks and of their parameters.
    pub linears: Vec<AdaptedLinear>,
    /// Whether a magnitude belongs to each pair.
    pub dora: bool,
    /// Base parameters outside the blocks that are trained whole.
    pub saved_embed: Vec<Parameter>,
    /// Rows of the tables of tokens that are trained.
    pub token_rows: Vec<u64>,
    /// Their values: of the token embedding, and of the output head where that is another table.
    pub token_tables: Vec<Parameter>,
    /// Base parameters of each block that are trained whole.
    pub saved_blocks: Vec<Vec<Parameter>>,
    /// Entries of `target_modules` that match nothing: worth a warning.
    pub unmatched: Vec<String>,
}

impl LoraConfig {
    /// Matches the config against `model`.
    ///
    /// # Errors
    /// See [`Error`]; above all a config that matches nothing.
    pub fn plan(&self, model: &ModelConfig) -> Result<AdapterPlan, Error> {
        let saved_embed = self.saved(&model.embed_parameters());
        let saved_blocks: Vec<_> =
            (0..model.layers).map(|b| self.saved(&model.block_parameters(b))).collect();
        self.check_saved(model)?;
        let modules = self.modules()?;
        let mut linears = Vec::new();
        for block in 0..model.layers {
            for parameter in model.block_parameters(block) {
                let (Some(module), &[out_features, in_features]) =
                    (parameter.hf_name.strip_suffix(".weight"), &parameter.shape[..])
                else {
                    continue;
                };
                let Some(PairShape { rank, scaling }) = modules.pair(module) else { continue };
                if saved_blocks.get(block as usize).is_some_and(|saved| saved.contains(&parameter)) {
                    return Err(Error::Module {
                        key: "target_modules",
                        module: module.to_owned(),
                        rule: "is in modules_to_save as well: keep one".to_owned(),
                    });
                }
                linears.push(AdaptedLinear {
                    name: parameter.name.trim_end_matches(".weight").to_owned(),
                    module: module.to_owned(),
                    block,
                    out_features,
                    in_features,
                    rank,
                    scaling,
                });
            }
        }
        // PEFT would put a pair on the output head or an embedding, and train the wrong thing silently
        // if we did not: both are said.
        for parameter in model.embed_parameters().iter().filter(|parameter| parameter.decays).chain([&head()])
        {
            let name = parameter.hf_name.trim_end_matches(".weight");
            if modules.names(name) {
                return Err(Error::Module {
                    key: "target_modules",
                    module: name.to_owned(),
                    rule: "pairs on embeddings and the output head are not supported: train it whole, with \
                           modules_to_save"
                        .to_owned(),
                });
            }
        }
        if linears.is_empty() {
            let mut names: Vec<&str> = Vec::new();
            let block = model.block_parameters(0);
            names.extend(
                block.iter().filter(|p| p.shape.len() == 2).map(|p| p.name.trim_end_matches(".weight")),
            );
            return Err(Error::NothingMatches {
                targets: self.targets.to_string(),
                linears: names.join(", "),
            });
        }
        let unmatched = modules.unmatched(linears.iter().map(|l| l.module.as_str()));
        Ok(AdapterPlan {
            linears,
            dora: self.dora,
            saved_embed,
            token_rows: self.token_rows.clone(),
            token_tables: self.token_tables(model)?,
            saved_blocks,
            unmatched,
        })
    }

    /// The same, and rows of control tokens that were added to `model` are trained.
    pub fn with_added_tokens(&self, model: &ModelConfig) -> Self {
        let embedding = model.family.names().token_embedding.to_owned();
        let is_untied = !model.added_tokens.is_empty() && !model.tied_head;
        LoraConfig {
            token_rows: model.added_tokens.clone(),
            untied_tokens: is_untied.then_some(embedding),
            ..self.clone()
        }
    }

    /// The trained rows as parameters, named as in PEFT's files.
    fn token_tables(&self, model: &ModelConfig) -> Result<Vec<Parameter>, Error> {
        let refuse = |rule: String| Error::Config { key: "trainable_token_indices".to_owned(), rule };
        let Some(last) = self.token_rows.last() else { return Ok(Vec::new()) };
        if *last >= model.vocab_size {
            return Err(refuse(format!(
                "row {last} is none of the {} that the model's embedding has: give the model that `worker init-chat` made \
                 for it",
                model.vocab_size
            )));
        }
        let tables: Vec<_> = token_tables(model)
            .into_iter()
            .filter(|(name, _)| *name == TOKEN_ROWS || self.untied_tokens.is_some())
            .collect();
        if let Some(module) = tables.iter().find(|(_, module)| {
            self.modules_to_save.iter().any(|name| targets::ends_with_module(module, name))
        }) {
            return Err(refuse(format!("{} is in modules_to_save as well: keep one", module.1)));
        }
        let shape = vec![self.token_rows.len() as u64, model.hidden_size];
        let table = |(name, module): (&'static str, String)| Parameter {
            name: name.to_owned(),
            hf_name: format!("{KEY_PREFIX}{module}{TOKEN_ROWS_SUFFIX}"),
            shape: shape.clone(),
            decays: true,
        };
        Ok(tables.into_iter().map(table).collect())
    }

    fn scaling(&self, alpha: f64, rank: u64) -> f64 {
        let rank = rank.max(1) as f64;
        alpha / if self.rslora { rank.sqrt() } else { rank }
    }

    fn saved(&self, parameters: &[Parameter]) -> Vec<Parameter> {
        let is_saved = |p: &&Parameter| {
            let module = p.hf_name.trim_end_matches(".weight").trim_end_matches(".bias");
            self.modules_to_save.iter().any(|name| targets::ends_with_module(module, name))
        };
        parameters.iter().filter(is_saved).cloned().collect()
    }

    fn check_saved(&self, model: &ModelConfig) -> Result<(), Error> {
        let refuse = |module: &str, rule: &str| {
            Err(Error::Module { key: "modules_to_save", module: module.to_owned(), rule: rule.to_owned() })
        };
        for name in &self.modules_to_save {
            let tied = model.family.names().token_embedding;
            if model.tied_head && (name == "lm_head" || targets::ends_with_module(name, tied)) {
                return refuse(
                    name,
                    "this model's output head is its token embedding, and training one of them would untie \
                     them: not supported",
                );
            }
            let one = LoraConfig { modules_to_save: vec![name.clone()], ..self.clone() };
            let mut units = (0..model.layers).map(|block| model.block_parameters(block));
            if one.saved(&model.embed_parameters()).is_empty()
                && units.all(|unit| one.saved(&unit).is_empty())
            {
                return refuse(name, "matches no module of this model");
            }
        }
        Ok(())
    }
}

impl AdaptedLinear {
    /// Trained elements.
    pub fn elements(&self, dora: bool) -> u64 {
        self.rank * (self.in_features + self.out_features) + if dora { self.out_features } else { 0 }
    }
}

impl AdapterPlan {
    /// All trained elements.
    pub fn trainable(&self) -> u64 {
        let pairs: u64 = self.linears.iter().map(|linear| linear.elements(self.dora)).sum();
        let saved = self.saved_blocks.iter().flatten().chain(&self.saved_embed).chain(&self.token_tables);
        pairs + saved.map(Parameter::elements).sum::<u64>()
    }

    /// As PEFT's `print_trainable_parameters` counts: the base, its pairs, and second copies of what is
    /// trained whole.
    pub fn all_parameters(&self, model: &ModelConfig) -> u64 {
        model.parameter_count() + self.trainable()
    }

    /// Trained tensors outside the blocks, named as in PEFT's files.
    pub fn embed_parameters(&self) -> Vec<Parameter> {
        // What decays comes first.
        self.token_tables.iter().cloned().chain(self.saved_embed.iter().map(saved_parameter)).collect()
    }

    /// Trained tensors of one block, named as in PEFT's files. What decays comes first.
    pub fn block_parameters(&self, block: u64) -> Vec<Parameter> {
        let mut out = Vec::new();
        for linear in self.linears.iter().filter(|linear| linear.block == block) {
            let parameter = |part: &str, shape: Vec<u64>| Parameter {
                name: format!("{}.{part}", linear.name),
                hf_name: format!("{KEY_PREFIX}{}.{part}", linear.module),
                shape,
                decays: true,
            };
            out.push(parameter("lora_A.weight", vec![linear.rank, linear.in_features]));
            out.push(parameter("lora_B.weight", vec![linear.out_features, linear.rank]));
            if self.dora {
                out.push(parameter("lora_magnitude_vector", vec![linear.out_features]));
            }
        }
        let saved = self.saved_blocks.get(block as usize).into_iter().flatten();
        out.extend(saved.map(saved_parameter));
        // Stable: pairs stay together.
        out.sort_by_key(|parameter| !parameter.decays);
        out
    }
}

/// Name among trained tensors of rows of the token embedding.
pub const TOKEN_ROWS: &str = "token_rows";
/// Name among trained tensors of rows of the output head.
pub const HEAD_ROWS: &str = "head_rows";
/// Behind a module's name in PEFT's files: its trained rows.
pub const TOKEN_ROWS_SUFFIX: &str = ".token_adapter.trainable_tokens_delta";

/// The tables that have a row for each token: [`TOKEN_ROWS`] or [`HEAD_ROWS`], and the module.
pub fn token_tables(model: &ModelConfig) -> Vec<(&'static str, String)> {
    let names = model.family.names();
    let tokens = (TOKEN_ROWS, format!("{}{}", names.prefix, names.token_embedding));
    let head = (!model.tied_head).then(|| (HEAD_ROWS, "lm_head".to_owned()));
    std::iter::once(tokens).chain(head).collect()
}

/// The output head, which is there by name where it is tied as well.
fn head() -> Parameter {
    let name = "lm_head.weight".to_owned();
    Parameter { hf_name: name.clone(), name, shape: Vec::new(), decays: true }
}

fn saved_parameter(base: &Parameter) -> Parameter {
    Parameter { hf_name: format!("{KEY_PREFIX}{}", base.hf_name), ..base.clone() }
}

#[cfg(test)]
mod tests;
