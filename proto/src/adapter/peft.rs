//! PEFT's `adapter_config.json`, read with its defaults and written with every key that it reads.

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};

use super::{Error, LoraConfig, Targets};

/// Where an adapter's settings stand.
pub const CONFIG_FILE: &str = "adapter_config.json";
/// Where its tensors stand.
pub const WEIGHTS_FILE: &str = "adapter_model.safetensors";
/// What PEFT puts before a base module's name.
pub const KEY_PREFIX: &str = "base_model.model.";

/// Most rows of a table of tokens that an adapter trains.
const MAX_TOKEN_ROWS: usize = 1 << 16;
/// Largest inner width of a pair.
pub const MAX_RANK: u64 = 1 << 16;
/// Keys that change what an adapter computes, in ways that this program does not know; each with the
/// values that mean "not used".
const UNSUPPORTED: [&str; 14] = [
    "alora_invocation_tokens",
    "arrow_config",
    "corda_config",
    "eva_config",
    "exclude_modules",
    "kasa_config",
    "layer_replication",
    "layers_to_transform",
    "lora_bias",
    "monteclora_config",
    "target_parameters",
    "use_bdlora",
    "use_qalora",
    "velora_config",
];

impl LoraConfig {
    /// Reads an `adapter_config.json`. Unknown keys are left alone, absent ones have PEFT's defaults.
    ///
    /// # Errors
    /// [`Error::Config`] with the key and the rule.
    pub fn from_peft_json(text: &str) -> Result<Self, Error> {
        let value: Value = serde_json::from_str(text).map_err(|e| config_error("the file", e.to_string()))?;
        let Value::Object(map) = value else { return Err(config_error("the file", "is not an object")) };
        let kind = map.get("peft_type").and_then(Value::as_str).unwrap_or("LORA");
        if kind != "LORA" {
            return Err(config_error("peft_type", format!("{kind:?} is not supported; supported: LORA")));
        }
        for key in UNSUPPORTED {
            if map.get(key).is_some_and(is_used) {
                return Err(config_error(key, "is not supported"));
            }
        }
        // These change the base as well: what the adapter was trained on is not the model of that name.
        if let Some(init) = map.get("init_lora_weights").and_then(Value::as_str)
            && ["pissa", "olora", "corda", "loftq"].iter().any(|changed| init.starts_with(changed))
        {
            return Err(config_error("init_lora_weights", format!("{init:?} is not supported")));
        }
        if map.get("fan_in_fan_out").and_then(Value::as_bool) == Some(true) {
            return Err(config_error(
                "fan_in_fan_out",
                "true is not supported: the linears here are [out, in]",
            ));
        }
        match map.get("bias").and_then(Value::as_str).unwrap_or("none") {
            "none" => {}
            other => {
                return Err(config_error("bias", format!("{other:?} is not supported; supported: none")));
            }
        }
        let (token_rows, untied_tokens) = token_rows(map.get("trainable_token_indices"))?;
        Ok(LoraConfig {
            rank: rank("r", map.get("r"), 8)?,
            alpha: number(&map, "lora_alpha", 8.0)?,
            dropout: number(&map, "lora_dropout", 0.0)?,
            rslora: flag(&map, "use_rslora"),
            dora: flag(&map, "use_dora"),
            targets: targets(map.get("target_modules"))?,
            modules_to_save: words(map.get("modules_to_save"), "modules_to_save")?,
            rank_pattern: pattern(&map, "rank_pattern", |key, value| rank(key, Some(value), 8))?,
            alpha_pattern: pattern(&map, "alpha_pattern", |key, value| {
                value.as_f64().ok_or_else(|| config_error(key, format!("{value} is not a number")))
            })?,
            token_rows,
            untied_tokens,
            base_model: map.get("base_model_name_or_path").and_then(Value::as_str).map(str::to_owned),
        })
    }

    /// The `adapter_config.json` that PEFT reads.
    pub fn to_peft_json(&self) -> Value {
        let whole = |x: f64| if x.fract() == 0.0 && x.abs() < 1e15 { json!(x as i64) } else { json!(x) };
        let alphas: BTreeMap<&String, Value> =
            self.alpha_pattern.iter().map(|(k, v)| (k, whole(*v))).collect();
        json!({
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": self.base_model,
            "revision": null,
            "inference_mode": true,
            "r": self.rank,
            "lora_alpha": whole(self.alpha),
            "lora_dropout": self.dropout,
            "target_modules": self.targets,
            "exclude_modules": null,
            "bias": "none",
            "fan_in_fan_out": false,
            "modules_to_save": if self.modules_to_save.is_empty() { json!(null) } else { json!(self.modules_to_save) },
            "init_lora_weights": true,
            "use_rslora": self.rslora,
            "use_dora": self.dora,
            "rank_pattern": self.rank_pattern,
            "alpha_pattern": alphas,
            "trainable_token_indices": self.token_indices(),
            "layers_to_transform": null,
            "layers_pattern": null,
        })
    }
}

impl LoraConfig {
    /// `trainable_token_indices`: a list where embedding and head are one table, else by table.
    fn token_indices(&self) -> Value {
        match (self.token_rows.is_empty(), &self.untied_tokens) {
            (true, _) => Value::Null,
            (false, None) => json!(self.token_rows),
            (false, Some(embedding)) => json!({ embedding: self.token_rows, "lm_head": self.token_rows }),
        }
    }
}

/// Rows of the tables of tokens: a list, or the same list for each table.
fn token_rows(value: Option<&Value>) -> Result<(Vec<u64>, Option<String>), Error> {
    let key = "trainable_token_indices";
    let list = |value: &Value| {
        let ids: Option<Vec<u64>> = value.as_array()?.iter().map(Value::as_u64).collect();
        ids.filter(|ids| ids.is_sorted_by(|a, b| a < b) && ids.len() <= MAX_TOKEN_ROWS)
    };
    let refuse = || {
        config_error(
            key,
            format!(
                "must be a list of at most {MAX_TOKEN_ROWS} ids in ascending order, the same for each table"
            ),
        )
    };
    match value {
        None | Some(Value::Null) => Ok((Vec::new(), None)),
        Some(Value::Object(tables)) => {
            let embedding = tables.keys().find(|name| *name != "lm_head").cloned();
            let lists: Vec<Vec<u64>> = tables.values().map(list).collect::<Option<_>>().ok_or_else(refuse)?;
            match (lists.split_first(), embedding) {
                (Some((first, rest)), Some(embedding)) if rest.iter().all(|other| other == first) => {
                    let untied = tables.contains_key("lm_head").then_some(embedding);
                    Ok((first.clone(), untied))
                }
                _ => Err(refuse()),
            }
        }
        Some(value) => Ok((list(value).ok_or_else(refuse)?, None)),
    }
}

fn config_error(key: &str, rule: impl Into<String>) -> Error {
    Error::Config { key: key.to_owned(), rule: rule.into() }
}

/// Anything but the ways in which PEFT writes "not used".
fn is_used(value: &Value) -> bool {
    match value {
        Value::Null => false,
        Value::Bool(on) => *on,
        Value::Array(list) => !list.is_empty(),
        Value::Object(map) => !map.is_empty(),
        Value::Number(_) | Value::String(_) => true,
    }
}

fn flag(map: &Map<String, Value>, key: &str) -> bool {
    map.get(key).and_then(Value::as_bool).unwrap_or(false)
}

fn number(map: &Map<String, Value>, key: &str, default: f64) -> Result<f64, Error> {
    match map.get(key) {
        None | Some(Value::Null) => Ok(default),
        Some(value) => match value.as_f64() {
            Some(x) if x.is_finite() => Ok(x),
            _ => Err(config_error(key, format!("{value} is not a number"))),
        },
    }
}

fn rank(key: &str, value: Option<&Value>, default: u64) -> Result<u64, Error> {
    match value {
        None | Some(Value::Null) => Ok(default),
        Some(value) => match value.as_u64() {
            Some(rank) if (1..=MAX_RANK).contains(&rank) => Ok(rank),
            _ => Err(config_error(key, format!("{value} is not a whole number from 1 to {MAX_RANK}"))),
        },
    }
}

fn targets(value: Option<&Value>) -> Result<Targets, Error> {
    match value {
        // PEFT's own defaults, of which a model has one or the other.
        None | Some(Value::Null) => {
            Ok(Targets::Suffixes(["c_attn", "q_proj", "v_proj"].map(str::to_owned).to_vec()))
        }
        Some(Value::String(text)) => Ok(Targets::Pattern(text.clone())),
        Some(list) => Ok(Targets::Suffixes(words(Some(list), "target_modules")?)),
    }
}

fn words(value: Option<&Value>, key: &str) -> Result<Vec<String>, Error> {
    let refuse = || config_error(key, "is not a list of names");
    match value {
        None | Some(Value::Null) => Ok(Vec::new()),
        Some(Value::Array(list)) => {
            list.iter().map(|word| word.as_str().map(str::to_owned).ok_or_else(refuse)).collect()
        }
        Some(_) => Err(refuse()),
    }
}

fn pattern<T>(
    map: &Map<String, Value>,
    key: &str,
    read: impl Fn(&str, &Value) -> Result<T, Error>,
) -> Result<BTreeMap<String, T>, Error> {
    match map.get(key) {
        None | Some(Value::Null) => Ok(BTreeMap::new()),
        Some(Value::Object(table)) => table
            .iter()
            .map(|(name, value)| Ok((name.clone(), read(&format!("{key}.{name}"), value)?)))
            .collect(),
        Some(_) => Err(config_error(key, "is not an object")),
    }
}
