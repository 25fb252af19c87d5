//! One adapter, weaker or stronger: `w s B A`. Exact where `w` goes into alpha, which is the default.

use tunefleet_proto::adapter::LoraConfig;

use super::Error;
use super::files::{Adapter, pair_keys};

/// Where the weight goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Into {
    /// `lora_alpha` and every `alpha_pattern`: no value of a tensor changes.
    Alpha,
    /// `B`, for programs that do not read alpha: each value is rounded once.
    B,
}

/// The adapter times `weight`, which may be negative.
///
/// # Errors
/// A weight that is not finite; a DoRA adapter, or one with modules that are trained whole, whose effect
/// is not proportional to anything.
pub fn scale(adapter: Adapter, weight: f64, into: Into) -> Result<Adapter, Error> {
    if !weight.is_finite() {
        return Err(Error::Refused(format!("--weight ({weight}) must be a finite number")));
    }
    refuse_dora(&adapter.config, "scaled")?;
    if let Some((key, ..)) = adapter.saved().next()
        && weight != 1.0
    {
        return Err(Error::Refused(format!(
            "the adapter trains {key} whole (modules_to_save), and its replacement of the base cannot be scaled: \
             merge it instead"
        )));
    }
    let mut adapter = adapter;
    match into {
        Into::Alpha => {
            adapter.config.alpha *= weight;
            adapter.config.alpha_pattern.values_mut().for_each(|alpha| *alpha *= weight);
            let alphas = adapter.config.alpha_pattern.values().chain([&adapter.config.alpha]);
            if alphas.into_iter().any(|alpha| !alpha.is_finite()) {
                return Err(Error::Refused(format!("--weight ({weight}) makes lora_alpha infinite")));
            }
        }
        Into::B => {
            let pairs = adapter.pairs()?.into_iter();
            let scaled: Vec<_> =
                pairs.map(|(module, pair)| (pair_keys(&module).1, pair.b * weight)).collect();
            adapter.tensors.extend(scaled);
        }
    }
    Ok(adapter)
}

/// DoRA's result is not linear in its pair.
pub(super) fn refuse_dora(config: &LoraConfig, what: &str) -> Result<(), Error> {
    if config.dora {
        return Err(Error::Refused(format!(
            "a DoRA adapter cannot be {what}: it renormalises each row, W' = m (W + sBA) / |W + sBA|, so its \
             effect is not proportional to its pairs; merge it into its base instead"
        )));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::support::{adapter, config, deltas, relative};
    use super::*;

    fn settings() -> LoraConfig {
        LoraConfig {
            alpha_pattern: [("mlp.c_fc".to_owned(), 5.0)].into(),
            ..config(4, 16.0, &["c_attn", "c_fc"])
        }
    }

    #[test]
    fn a_weight_in_alpha_is_exact_and_in_b_within_a_rounding() {
        for weight in [0.8, -0.5, 0.0] {
            let original = adapter(settings());
            let before = deltas(&original);
            let tensors: Vec<_> = original.tensors.values().map(|t| t.copy()).collect();
            let scaled = scale(original, weight, Into::Alpha).unwrap();
            assert!(scaled.tensors.values().zip(&tensors).all(|(a, b)| a == b));
            assert_eq!(scaled.config.alpha, 16.0 * weight);
            for ((_, delta), before) in deltas(&scaled).iter().zip(before.values()) {
                let error = (delta - before * weight).abs().max().double_value(&[]);
                assert!(error < 1e-15, "{error}");
            }
        }
        let original = adapter(settings());
        let before = deltas(&original);
        let baked = scale(original, 0.8, Into::B).unwrap();
        assert_eq!(baked.config, settings());
        for ((module, delta), before) in deltas(&baked).iter().zip(before.values()) {
            assert!(relative(delta, &(before * 0.8)) < 1e-6, "{module}");
        }
    }

    #[test]
    fn what_cannot_be_scaled_is_refused() {
        let message = |config, weight| scale(adapter(config), weight, Into::Alpha).unwrap_err().to_string();
        assert!(message(LoraConfig { dora: true, ..settings() }, 0.8).contains("DoRA"));
        let saved = || LoraConfig { modules_to_save: vec!["ln_f".to_owned()], ..settings() };
        assert!(message(saved(), 0.8).contains("modules_to_save"));
        assert!(scale(adapter(saved()), 1.0, Into::Alpha).is_ok());
        assert!(message(settings(), f64::INFINITY).contains("finite"));
        assert!(message(settings(), 1e308).contains("makes lora_alpha infinite"));
    }
}
