//! Rotary positions (Su et al. 2021) in their scaled variants, as `modeling_rope_utils.py` of transformers has them.
//!
//! A head's first half and second half are rotated against each other: pair `i` of a token at position `p` by `p` times
//! [`inverse_frequencies`](Rope::inverse_frequencies)`[i]`.

use std::f64::consts::TAU;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::Error;
use super::keys::{Keys, invalid};

/// Positions by rotation.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Rope {
    /// Base of the wavelengths.
    pub theta: f64,
    /// How they are stretched.
    pub scaling: Scaling,
}

/// How wavelengths are stretched to positions that training did not reach.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Scaling {
    /// Not at all.
    None,
    /// All by one factor (Chen et al. 2023).
    Linear {
        /// The factor.
        factor: f64,
    },
    /// By a base that grows with sequences longer than the model's positions. Those are refused, so nothing changes.
    Dynamic {
        /// The factor, which is only handed on.
        factor: f64,
    },
    /// Long wavelengths by the factor, short ones not, with a ramp between (Peng et al. 2023).
    Yarn(Yarn),
    /// The same with other bounds (Llama 3.1).
    Llama3 {
        /// The factor.
        factor: f64,
        /// Wavelengths longer than `original_positions` over this are stretched.
        low_freq_factor: f64,
        /// Those shorter than `original_positions` over this are not.
        high_freq_factor: f64,
        /// Positions of the model before.
        original_positions: u64,
    },
}

/// Settings of YaRN.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Yarn {
    /// The factor.
    pub factor: f64,
    /// Positions of the model before.
    pub original_positions: u64,
    /// What sines and cosines are multiplied by; by default it follows from the factor.
    pub attention_factor: Option<f64>,
    /// Turns in `original_positions` above which a wavelength is not stretched.
    pub beta_fast: f64,
    /// Turns below which it is stretched whole.
    pub beta_slow: f64,
    /// Weights of two corrections whose quotient is the attention factor.
    pub mscale: Option<(f64, f64)>,
    /// Whether the ramp's ends are whole numbers.
    pub truncate: bool,
}

impl Rope {
    /// Without scaling.
    pub fn plain(theta: f64) -> Self {
        Rope { theta, scaling: Scaling::None }
    }

    /// From a `config.json` of any age: `rope_parameters`, or `rope_theta` and `rope_scaling`.
    ///
    /// # Errors
    /// A type that is not known, by name; values that are missing, impossible, or contradict each other.
    pub fn read(keys: Keys<'_>, default_theta: f64, positions: u64) -> Result<Self, Error> {
        let scaling = keys.object("rope_scaling")?;
        let parameters = keys.object("rope_parameters")?;
        let theta = keys.get("rope_theta").map(|_| keys.positive("rope_theta", None)).transpose()?;
        let inner = parameters.or(scaling);
        let of_inner = inner.map(|inner| inner.get("rope_theta").map(|_| inner.positive("rope_theta", None)));
        let of_inner = of_inner.flatten().transpose()?;
        if let (Some(outer), Some(of_inner)) = (theta, of_inner)
            && outer != of_inner
        {
            let rule = format!("contradicts rope_theta = {of_inner} of rope_parameters; keep one");
            return Err(invalid("rope_theta", &json!(outer), &rule));
        }
        let theta = of_inner.or(theta).unwrap_or(default_theta);
        let scaling = match inner {
            None => Scaling::None,
            Some(inner) => Scaling::read(inner, positions)?,
        };
        Ok(Rope { theta, scaling })
    }

    /// Adds the keys that transformers of any age reads.
    pub fn write(&self, map: &mut Map<String, Value>) {
        map.insert("rope_theta".to_owned(), json!(self.theta));
        map.insert("rope_scaling".to_owned(), self.scaling.to_json());
    }

    /// Turns of each pair of a head of `head_dim` from one position to the next, in radians, `[head_dim / 2]`. In fp32,
    /// as transformers computes them: what it rounds is rounded here.
    pub fn inverse_frequencies(&self, head_dim: u64) -> Vec<f32> {
        let dim = head_dim as f32;
        let plain: Vec<f32> =
            (0..head_dim / 2).map(|pair| 1.0 / (self.theta as f32).powf(2.0 * pair as f32 / dim)).collect();
        match &self.scaling {
            Scaling::None | Scaling::Dynamic { .. } => plain,
            Scaling::Linear { factor } => plain.iter().map(|turn| turn / *factor as f32).collect(),
            Scaling::Yarn(yarn) => yarn.stretch(&plain, self.theta, head_dim),
            Scaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_positions } => {
                let (factor, original) = (*factor as f32, *original_positions as f32);
                let (low, high) = (*low_freq_factor as f32, *high_freq_factor as f32);
                let stretch = |turn: &f32| {
                    let wavelength = TAU as f32 / turn;
                    if wavelength < original / high {
                        return *turn;
                    }
                    if wavelength > original / low {
                        return turn / factor;
                    }
                    let smooth = (original / wavelength - low) / (high - low);
                    (1.0 - smooth) * turn / factor + smooth * turn
                };
                plain.iter().map(stretch).collect()
            }
        }
    }

    /// What sines and cosines are multiplied by.
    pub fn attention_factor(&self) -> f64 {
        match &self.scaling {
            Scaling::Yarn(yarn) => yarn.attention_factor(),
            _ => 1.0,
        }
    }
}

impl Yarn {
    fn attention_factor(&self) -> f64 {
        let correction =
            |weight: f64| if self.factor <= 1.0 { 1.0 } else { 0.1 * weight * self.factor.ln() + 1.0 };
        match (self.attention_factor, self.mscale) {
            (Some(given), _) => given,
            (None, Some((mscale, all_dim))) => correction(mscale) / correction(all_dim),
            (None, None) => correction(1.0),
        }
    }

    fn stretch(&self, plain: &[f32], theta: f64, head_dim: u64) -> Vec<f32> {
        let dim = head_dim as f64;
        let pair_of =
            |turns: f64| dim * (self.original_positions as f64 / (turns * TAU)).ln() / (2.0 * theta.ln());
        let (mut low, mut high) = (pair_of(self.beta_fast), pair_of(self.beta_slow));
        if self.truncate {
            (low, high) = (low.floor(), high.ceil());
        }
        let (low, mut high) = (low.max(0.0), high.min(dim - 1.0));
        if low == high {
            high += 0.001;
        }
        let stretch = |(pair, turn): (usize, &f32)| {
            let ramp = ((pair as f32 - low as f32) / (high - low) as f32).clamp(0.0, 1.0);
            let kept = 1.0 - ramp;
            turn / self.factor as f32 * (1.0 - kept) + turn * kept
        };
        plain.iter().enumerate().map(stretch).collect()
    }
}

impl Scaling {
    fn read(keys: Keys<'_>, positions: u64) -> Result<Self, Error> {
        let kind = keys.text("rope_type").or_else(|| keys.text("type")).unwrap_or("default");
        if let Some(share) = keys.get("partial_rotary_factor").filter(|share| share.as_f64() != Some(1.0)) {
            return Err(invalid("partial_rotary_factor", share, "only whole heads are rotated"));
        }
        let factor = || match keys.positive("factor", None)? {
            factor if factor < 1.0 => Err(invalid("factor", &json!(factor), "must be at least 1")),
            factor => Ok(factor),
        };
        let original = || keys.size("original_max_position_embeddings", Some(positions));
        Ok(match kind {
            "default" => Scaling::None,
            "linear" => Scaling::Linear { factor: factor()? },
            "dynamic" => Scaling::Dynamic { factor: factor()? },
            "yarn" => {
                let given = |key: &'static str| keys.get(key).map(|_| keys.positive(key, None)).transpose();
                let original_positions = original()?;
                let factor = match keys.get("factor") {
                    None => (positions as f64 / original_positions as f64).max(1.0),
                    Some(_) => factor()?,
                };
                Scaling::Yarn(Yarn {
                    factor,
                    original_positions,
                    attention_factor: given("attention_factor")?,
                    beta_fast: keys.positive("beta_fast", Some(32.0))?,
                    beta_slow: keys.positive("beta_slow", Some(1.0))?,
                    mscale: given("mscale")?.zip(given("mscale_all_dim")?),
                    truncate: keys.switch("truncate", true)?,
                })
            }
            "llama3" => {
                let low_freq_factor = keys.positive("low_freq_factor", None)?;
                let high_freq_factor = keys.positive("high_freq_factor", None)?;
                if high_freq_factor <= low_freq_factor {
                    let rule = format!("must be greater than low_freq_factor ({low_freq_factor})");
                    return Err(invalid("high_freq_factor", &json!(high_freq_factor), &rule));
                }
                Scaling::Llama3 {
                    factor: factor()?,
                    low_freq_factor,
                    high_freq_factor,
                    original_positions: original()?,
                }
            }
            other => {
                let rule = "is not supported; supported: default, linear, dynamic, yarn, llama3";
                return Err(invalid("rope_type", &json!(other), rule));
            }
        })
    }

    fn to_json(self) -> Value {
        let mut value = match self {
            Scaling::None => return Value::Null,
            Scaling::Linear { factor } => json!({"rope_type": "linear", "factor": factor}),
            Scaling::Dynamic { factor } => json!({"rope_type": "dynamic", "factor": factor}),
            Scaling::Yarn(yarn) => {
                let mut value = json!({
                    "rope_type": "yarn",
                    "factor": yarn.factor,
                    "original_max_position_embeddings": yarn.original_positions,
                    "beta_fast": yarn.beta_fast,
                    "beta_slow": yarn.beta_slow,
                });
                if let Some(factor) = yarn.attention_factor {
                    value["attention_factor"] = json!(factor);
                }
                if let Some((mscale, all_dim)) = yarn.mscale {
                    (value["mscale"], value["mscale_all_dim"]) = (json!(mscale), json!(all_dim));
                }
                if !yarn.truncate {
                    value["truncate"] = json!(false);
                }
                value
            }
            Scaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_positions } => json!({
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": low_freq_factor,
                "high_freq_factor": high_freq_factor,
                "original_max_position_embeddings": original_positions,
            }),
        };
        // What older versions call it.
        value["type"] = value["rope_type"].clone();
        value
    }
}
