//! Sparse and sign-aware sums of tensors: magnitude pruning, DARE (Yu et al. 2024) and TIES (Yadav et al.
//! 2023), on whatever the caller hands in: factors, or whole differences.

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use sha2::{Digest, Sha256};
use tch::{Kind, Tensor};

/// Which values of each tensor stay.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Prune {
    /// The largest, by absolute value.
    Magnitude,
    /// Random ones, enlarged so that the expectation stays.
    Random,
}

/// How the sign of each element is elected.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
#[value(rename_all = "snake_case")]
pub enum MajoritySign {
    /// The sign of the sum: large values count more.
    #[default]
    Total,
    /// The sign that most adapters have.
    Frequency,
}

/// A rule for a sum.
#[derive(Debug, Clone, Copy)]
pub struct Rule {
    /// Which values stay.
    pub prune: Prune,
    /// Which share of them, above 0; from 1 on all do.
    pub density: f64,
    /// With an election, the mean of the values that have the elected sign; without, the sum of all.
    pub elect: Option<MajoritySign>,
    /// Whether values vote before they are weighted, as in PEFT; then even an adapter of weight 0 votes.
    pub unweighted_votes: bool,
}

/// The sum of `weight * tensor` under `rule`; `key` picks the random values, one stream for each tensor.
pub fn sum(rule: Rule, terms: &[(f64, Tensor)], key: &[&str]) -> Tensor {
    let pruned: Vec<Tensor> =
        terms.iter().enumerate().map(|(i, (_, tensor))| prune(rule, tensor, key, i)).collect();
    let weighted = || pruned.iter().zip(terms).map(|(tensor, (weight, _))| tensor * *weight);
    let total = |tensors: &mut dyn Iterator<Item = Tensor>| tensors.reduce(|sum, tensor| sum + tensor);
    let Some(method) = rule.elect else { return total(&mut weighted()).unwrap_or_default() };
    let vote = |tensor: Tensor| if method == MajoritySign::Total { tensor } else { tensor.sign() };
    let votes = match rule.unweighted_votes {
        true => total(&mut pruned.iter().map(|tensor| vote(tensor.shallow_clone()))),
        false => total(&mut weighted().map(vote)),
    };
    // A tie is positive, as in PEFT.
    let elected = votes.unwrap_or_default().ge(0.0).to_kind(Kind::Float) * 2.0 - 1.0;
    let agrees = |voter: &Tensor| voter.sign().eq_tensor(&elected).to_kind(Kind::Float);
    let (mut agreeing, mut count) = (elected.zeros_like(), elected.zeros_like());
    for (tensor, own) in weighted().zip(&pruned) {
        let mask = agrees(if rule.unweighted_votes { own } else { &tensor });
        agreeing += tensor * &mask;
        count += mask;
    }
    agreeing / count.clamp_min(1.0)
}

fn prune(rule: Rule, tensor: &Tensor, key: &[&str], index: usize) -> Tensor {
    if rule.density >= 1.0 {
        return tensor.shallow_clone();
    }
    let elements = tensor.numel();
    let mask = match rule.prune {
        Prune::Magnitude => {
            let kept = (rule.density * elements as f64) as i64;
            let (_, order) = tensor.abs().view([-1]).topk(kept, 0, true, false);
            tensor.zeros_like().view([-1]).index_fill(0, &order, 1.0)
        }
        Prune::Random => {
            let mut random = StdRng::from_seed(seed(key, index));
            let enlarged = (1.0 / rule.density) as f32;
            let draw = |_| if random.random::<f64>() < rule.density { enlarged } else { 0.0 };
            Tensor::from_slice(&(0..elements).map(draw).collect::<Vec<f32>>())
        }
    };
    tensor * mask.view_as(tensor)
}

fn seed(key: &[&str], index: usize) -> [u8; 32] {
    let mut hash = Sha256::new();
    for part in key {
        hash.update((part.len() as u64).to_le_bytes());
        hash.update(part.as_bytes());
    }
    hash.update((index as u64).to_le_bytes());
    hash.finalize().into()
}

#[cfg(test)]
mod tests {
    use tch::Device;

    use super::*;

    const TIES: Rule = Rule {
        prune: Prune::Magnitude,
        density: 1.0,
        elect: Some(MajoritySign::Total),
        unweighted_votes: false,
    };

    fn values(tensor: &Tensor) -> Vec<f32> {
        Vec::try_from(tensor).unwrap()
    }

    fn terms(parts: &[(f64, [f32; 4])]) -> Vec<(f64, Tensor)> {
        parts.iter().map(|(w, values)| (*w, Tensor::from_slice(values))).collect()
    }

    #[test]
    fn the_largest_values_stay_and_their_number_is_rounded_down() {
        let rule = Rule { density: 0.7, elect: None, ..TIES };
        assert_eq!(values(&sum(rule, &terms(&[(2.0, [1.0, -4.0, 3.0, 2.0])]), &[])), [0.0, -8.0, 6.0, 0.0]);
        let none = Rule { density: 0.1, ..rule };
        assert_eq!(values(&sum(none, &terms(&[(2.0, [1.0, -4.0, 3.0, 2.0])]), &[])), [0.0; 4]);
    }

    #[test]
    fn ties_takes_the_mean_of_what_agrees_with_the_elected_sign() {
        let parts = terms(&[(1.0, [1.0, -4.0, 3.0, 0.0]), (1.0, [-2.0, -2.0, 1.0, 0.0])]);
        assert_eq!(values(&sum(TIES, &parts, &[])), [-2.0, -3.0, 2.0, 0.0]);
        let frequency = Rule { elect: Some(MajoritySign::Frequency), ..TIES };
        assert_eq!(values(&sum(frequency, &parts, &[])), [1.0, -3.0, 2.0, 0.0], "a tie is positive");
    }

    #[test]
    fn an_adapter_of_weight_zero_has_no_vote() {
        let parts = terms(&[(1.0, [1.0, 2.0, -3.0, 4.0]), (0.0, [-9.0, -9.0, 9.0, 9.0])]);
        assert_eq!(values(&sum(TIES, &parts, &[])), [1.0, 2.0, -3.0, 4.0]);
        let peft = Rule { unweighted_votes: true, ..TIES };
        assert_eq!(values(&sum(peft, &parts, &[])), [0.0, 0.0, 0.0, 2.0]);
    }

    #[test]
    fn random_pruning_keeps_the_share_and_the_expectation_and_follows_its_seed() {
        let ones = || vec![(1.0, Tensor::ones([100_000], (Kind::Float, Device::Cpu)))];
        let rule = Rule { prune: Prune::Random, density: 0.3, elect: None, unweighted_votes: false };
        let out = sum(rule, &ones(), &["7", "m"]);
        let share = out.ne(0.0).to_kind(Kind::Double).mean(Kind::Double).double_value(&[]);
        assert!((share - 0.3).abs() < 0.01, "{share}");
        let mean = out.mean(Kind::Double).double_value(&[]);
        assert!((mean - 1.0).abs() < 0.03, "{mean}");
        assert_eq!(values(&out), values(&sum(rule, &ones(), &["7", "m"])));
        assert_ne!(values(&out), values(&sum(rule, &ones(), &["8", "m"])));
    }

    #[test]
    fn each_tensor_has_values_drawn_of_its_own_and_the_rest_is_as_without_draws() {
        let n = 1000;
        let randn = || Tensor::randn([n], (Kind::Float, Device::Cpu));
        let (a, b, ones) = (randn(), randn(), Tensor::ones([n], (Kind::Float, Device::Cpu)));
        let rule = Rule { prune: Prune::Random, density: 0.6, elect: None, unweighted_votes: false };
        let with = |rule, first: (f64, &Tensor), second: (f64, &Tensor)| {
            let terms = [first, second].map(|(weight, tensor)| (weight, tensor.shallow_clone()));
            sum(rule, &terms, &["0", "m"])
        };
        // The masks, enlargement included, as sums of ones show them.
        let masks = [with(rule, (1.0, &ones), (0.0, &ones)), with(rule, (0.0, &ones), (1.0, &ones))];
        assert_ne!(values(&masks[0]), values(&masks[1]));
        let (masked_a, masked_b) = (&a * &masks[0], &b * &masks[1]);
        let apart = |x: Tensor, y: Tensor| (x - y).abs().max().double_value(&[]);
        let linear = with(rule, (1.0, &a), (-0.5, &b));
        assert!(apart(linear, &masked_a - &masked_b * 0.5) < 1e-6);
        let elected = Rule { elect: Some(MajoritySign::Total), ..rule };
        let expected = sum(Rule { density: 1.0, ..elected }, &[(1.0, masked_a), (-0.5, masked_b)], &[]);
        assert!(apart(with(elected, (1.0, &a), (-0.5, &b)), expected) < 1e-6);
    }
}
