//! The next token from its logits: greedy, or by temperature and nucleus (top-p), seeded.

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
    /// Seed of the draws.
    pub seed: u64,
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

    /// The next token; `logits_v` is fp32 on the CPU.
    pub fn next(&mut self, logits_v: &Tensor) -> u32 {
        if self.sampling.temperature <= 0.0 {
            return logits_v.argmax(0, false).int64_value(&[]) as u32;
        }
        let probabilities = (logits_v / self.sampling.temperature).softmax(0, Kind::Double);
        let (sorted, order) = self.likeliest(&probabilities);
        // As in transformers: a token stays when the mass before it is below top_p.
        let mut mass = 0.0;
        let kept = sorted.iter().take_while(|&&p| {
            let keep = mass < self.sampling.top_p;
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

    /// Probabilities from the largest down, at least as many as the nucleus has, and their tokens.
    fn likeliest(&self, probabilities: &Tensor) -> (Vec<f64>, Tensor) {
        let all = probabilities.size()[0];
        // Sorting a whole vocabulary takes longer than a small model's step; the nucleus is small.
        for most in [FIRST_LOOK.min(all), all] {
            let (sorted, order) = probabilities.topk(most, 0, true, true);
            let sorted = Vec::<f64>::try_from(sorted).unwrap_or_default();
            if most == all || sorted.iter().sum::<f64>() >= self.sampling.top_p {
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
        let mut sampler = Sampler::new(Sampling { temperature: 1.0, top_p: 0.75, seed: 7 });
        let mut counts = [0; 4];
        for _ in 0..4000 {
            counts[sampler.next(&logits) as usize] += 1;
        }
        assert_eq!(counts[2] + counts[3], 0);
        let share = f64::from(counts[0]) / 4000.0;
        assert!((share - 0.625).abs() < 0.03, "{share}");
    }

    #[test]
    fn temperature_zero_is_greedy() {
        let mut sampler = Sampler::new(Sampling { temperature: 0.0, top_p: 1.0, seed: 0 });
        assert_eq!(sampler.next(&Tensor::from_slice(&[0.1f32, 2.0, -1.0])), 1);
    }
}
