//! The next token from its logits: greedy, or by temperature, top-k and nucleus (top-p), seeded. The order of the steps
//! is that of transformers.

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use tch::{Kind, Tensor};

/// How tokens are chosen.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sampling {
    /// 0 is greedy.
    pub temperature: f64,
    /// Smallest set of tokens with at least this probability is drawn from; 1 is all.
    pub top_p: f64,
    /// Only the likeliest so many tokens are drawn from; 0 is all.
    pub top_k: usize,
    /// Logits of tokens that are there already are divided by it, or multiplied where they are negative (Keskar et al.
    /// 2019); 1 changes nothing.
    pub repetition_penalty: f64,
    /// Seed of the draws.
    pub seed: u64,
}

impl Default for Sampling {
    fn default() -> Self {
        Sampling { temperature: 0.0, top_p: 1.0, top_k: 0, repetition_penalty: 1.0, seed: 0 }
    }
}

/// Tokens among which the nucleus is looked for first.
const FIRST_LOOK: i64 = 1024;

/// Draws tokens.
pub struct Sampler {
    sampling: Sampling,
    random: StdRng,
}

impl Sampler {
    /// A fresh stream of draws.
    pub fn new(sampling: Sampling) -> Self {
        Sampler { sampling, random: StdRng::seed_from_u64(sampling.seed) }
    }

    /// The next token after `seen`; `logits_v` is fp32 on the CPU.
    pub fn next(&mut self, logits_v: &Tensor, seen: &[u32]) -> u32 {
        let penalised = self.penalised(logits_v, seen);
        let logits_v = penalised.as_ref().unwrap_or(logits_v);
        if self.sampling.temperature <= 0.0 {
            return logits_v.argmax(0, false).int64_value(&[]) as u32;
        }
        let probabilities = (logits_v / self.sampling.temperature).softmax(0, Kind::Double);
        let (sorted, order) = self.likeliest(&probabilities);
        let most = if self.sampling.top_k == 0 { sorted.len() } else { self.sampling.top_k };
        let sorted = sorted.get(..most.min(sorted.len())).unwrap_or_default();
        // Top-p is of what top-k has left.
        let all: f64 = if self.sampling.top_k == 0 { 1.0 } else { sorted.iter().sum() };
        // As in transformers: a token stays when the mass before it is below top_p.
        let mut mass = 0.0;
        let kept = sorted.iter().take_while(|&&p| {
            let keep = mass < self.sampling.top_p * all;
            mass += p;
            keep
        });
        let kept: Vec<f64> = kept.copied().collect();
        let total: f64 = kept.iter().sum();
        let mut draw = self.random.random::<f64>() * total;
        let mut chosen = kept.len().saturating_sub(1);
        for (index, p) in kept.iter().enumerate() {
            if draw < *p {
                chosen = index;
                break;
            }
            draw -= p;
        }
        order.int64_value(&[chosen as i64]) as u32
    }

    /// Logits with the penalty on what is there already; `None` where there is none.
    fn penalised(&self, logits_v: &Tensor, seen: &[u32]) -> Option<Tensor> {
        let penalty = self.sampling.repetition_penalty;
        if penalty == 1.0 || seen.is_empty() {
            return None;
        }
        let seen: Vec<i64> = seen.iter().map(|token| i64::from(*token)).collect();
        let seen = Tensor::from_slice(&seen);
        let there = logits_v.index_select(0, &seen);
        let lower = (&there * penalty).where_self(&there.lt(0.0), &(&there / penalty));
        Some(logits_v.scatter(0, &seen, &lower))
    }

    /// Probabilities from the largest down, at least as many as the nucleus has, and their tokens.
    fn likeliest(&self, probabilities: &Tensor) -> (Vec<f64>, Tensor) {
        let all = probabilities.size()[0];
        // Sorting a whole vocabulary takes longer than a small model's step; the nucleus is small.
        for most in [FIRST_LOOK.min(all), all] {
            let (sorted, order) = probabilities.topk(most, 0, true, true);
            let sorted = Vec::<f64>::try_from(sorted).unwrap_or_default();
            let has_all = (1..=sorted.len()).contains(&self.sampling.top_k)
                || sorted.iter().sum::<f64>() >= self.sampling.top_p;
            if most == all || has_all {
                return (sorted, order);
            }
        }
        (Vec::new(), Tensor::new())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn draws_follow_the_nucleus() {
        // Probabilities 0.5, 0.3, 0.15, 0.05; top-p 0.75 keeps the first two.
        let logits = Tensor::from_slice(&[0.5f32, 0.3, 0.15, 0.05]).log();
        let mut sampler =
            Sampler::new(Sampling { temperature: 1.0, top_p: 0.75, seed: 7, ..Sampling::default() });
        let mut counts = [0; 4];
        for _ in 0..4000 {
            counts[sampler.next(&logits, &[]) as usize] += 1;
        }
        assert_eq!(counts[2] + counts[3], 0);
        let share = f64::from(counts[0]) / 4000.0;
        assert!((share - 0.625).abs() < 0.03, "{share}");
    }

    #[test]
    fn temperature_zero_is_greedy() {
        let mut sampler = Sampler::new(Sampling::default());
        assert_eq!(sampler.next(&Tensor::from_slice(&[0.1f32, 2.0, -1.0]), &[]), 1);
    }

    #[test]
    fn draws_follow_the_distribution_that_temperature_top_k_and_top_p_leave() {
        // Chi-square of 20,000 draws; 99.9% of fair ones stay below the limit of their degrees of freedom.
        let probabilities = [0.4, 0.25, 0.15, 0.1, 0.06, 0.04];
        let logits = Tensor::from_slice(&probabilities.map(|p: f32| p.ln()));
        for (temperature, top_k, top_p, limit) in [
            (1.0, 0, 1.0, 20.5),
            (0.7, 0, 1.0, 20.5),
            (1.0, 4, 1.0, 16.3),
            (1.0, 4, 0.8, 13.8),
            (1.3, 5, 0.9, 18.5),
        ] {
            let sampling = Sampling { temperature, top_k, top_p, seed: 11, ..Sampling::default() };
            let mut expected = probabilities.map(|p| f64::from(p).powf(1.0 / temperature)).to_vec();
            expected.truncate(if top_k == 0 { expected.len() } else { top_k });
            let all: f64 = expected.iter().sum();
            let mut mass = 0.0;
            expected.retain(|p| {
                let keep = mass < top_p * all - 1e-6;
                mass += p;
                keep
            });
            let all: f64 = expected.iter().sum();
            let mut sampler = Sampler::new(sampling);
            let mut counts = [0.0; 6];
            let draws = 20_000;
            for _ in 0..draws {
                counts[sampler.next(&logits, &[]) as usize] += 1.0;
            }
            let square = expected.iter().zip(counts).map(|(p, count)| {
                let wanted = p / all * f64::from(draws);
                (count - wanted).powi(2) / wanted
            });
            let square: f64 = square.sum();
            assert!(square < limit, "{sampling:?}: {square}, {counts:?}");
            assert!(counts[expected.len()..].iter().all(|count| *count == 0.0), "{sampling:?}: {counts:?}");
        }
    }

    #[test]
    fn what_is_there_already_is_made_less_likely() {
        let logits = Tensor::from_slice(&[2.0f32, 1.5, -1.0, -0.9]);
        let sampling = Sampling { repetition_penalty: 2.0, ..Sampling::default() };
        assert_eq!(Sampler::new(sampling).next(&logits, &[0, 0]), 1);
        assert_eq!(Sampler::new(sampling).next(&logits, &[2]), 0);
    }
}
