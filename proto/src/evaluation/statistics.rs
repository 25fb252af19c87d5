//! What follows from scores: pass@k without bias (Chen et al. 2021), intervals by the bootstrap over tasks (Efron 1979),
//! and a paired test by random signs (Fisher 1935). All draws are seeded: the same scores give the same numbers.

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

/// Resamples of an interval, and sign draws of a test; fewer for many scores, but no fewer than [`MIN_DRAWS`].
const RESAMPLES: usize = 2000;
const SIGN_DRAWS: usize = 10_000;
const MIN_DRAWS: usize = 1000;
/// Scores that are drawn at most, over all draws.
const MAX_WORK: usize = 20_000_000;
/// Between which shares of the resamples an interval lies: 95% are inside.
const INTERVAL: (f64, f64) = (0.025, 0.975);
const SEED: u64 = 0;

/// The score of one task: `sum` over `weight` parts.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Score {
    /// Sum over its parts.
    pub sum: f64,
    /// How many parts: 1 for a task, the tokens of a file for a loss.
    pub weight: f64,
}

/// A number, and where it would lie in 95 of 100 other draws of as many tasks.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Estimate {
    /// The number.
    pub value: f64,
    /// Lower end of the interval.
    pub low: f64,
    /// Upper end.
    pub high: f64,
    /// Tasks.
    pub tasks: usize,
}

/// How far two models differ on the same tasks.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Difference {
    /// Second minus first, with its interval.
    pub estimate: Estimate,
    /// How often a difference at least as large would come about if the models did not differ.
    pub p_value: f64,
}

/// Probability that at least one of `k` completions passes, of `samples` of which `passed` did: the mean over all choices
/// of k of them. It is 1 where fewer than k failed.
pub fn pass_at_k(samples: u64, passed: u64, k: u64) -> f64 {
    let failed = samples.saturating_sub(passed);
    if failed < k {
        return 1.0;
    }
    let none = (0..k).map(|taken| (failed - taken) as f64 / (samples - taken) as f64).product::<f64>();
    1.0 - none
}

/// The mean of all parts, and its interval.
pub fn mean(scores: &[Score]) -> Estimate {
    estimate(scores.len(), |at| scores.get(at).map(|score| (score.sum, score.weight, 0.0, 0.0)), |a, _| a)
}

/// Second minus first over the tasks that both have.
pub fn difference(pairs: &[(Score, Score)]) -> Difference {
    let estimate = estimate(
        pairs.len(),
        |at| pairs.get(at).map(|(a, b)| (a.sum, a.weight, b.sum, b.weight)),
        |first, second| second - first,
    );
    Difference { estimate, p_value: p_value(pairs, estimate.value) }
}

/// Ratios of sums over tasks, for all of them and for draws of them with replacement.
fn estimate(
    tasks: usize,
    at: impl Fn(usize) -> Option<(f64, f64, f64, f64)>,
    value: impl Fn(f64, f64) -> f64,
) -> Estimate {
    let of = |indices: &mut dyn Iterator<Item = usize>| {
        let (mut a, mut a_weight, mut b, mut b_weight) = (0.0, 0.0, 0.0, 0.0);
        for (sum, weight, other, other_weight) in indices.filter_map(&at) {
            (a, a_weight) = (a + sum, a_weight + weight);
            (b, b_weight) = (b + other, b_weight + other_weight);
        }
        value(ratio(a, a_weight), ratio(b, b_weight))
    };
    let whole = of(&mut (0..tasks));
    if tasks == 0 {
        return Estimate { value: whole, low: whole, high: whole, tasks };
    }
    let mut random = StdRng::seed_from_u64(SEED);
    let mut drawn: Vec<f64> = (0..draws(RESAMPLES, tasks))
        .map(|_| of(&mut (0..tasks).map(|_| random.random_range(0..tasks))))
        .collect();
    drawn.sort_by(f64::total_cmp);
    let quantile =
        |share: f64| drawn.get((share * (drawn.len() - 1) as f64).round() as usize).copied().unwrap_or(whole);
    Estimate { value: whole, low: quantile(INTERVAL.0), high: quantile(INTERVAL.1), tasks }
}

/// How often models that are exchanged task by task at random differ by at least as much. For tasks that are passed or not
/// it is the exact test of McNemar (1947), by draws.
fn p_value(pairs: &[(Score, Score)], observed: f64) -> f64 {
    // Only where they differ does an exchange change anything.
    let differing: Vec<_> = pairs.iter().filter(|(a, b)| a != b).collect();
    if differing.is_empty() {
        return 1.0;
    }
    let same = pairs.iter().filter(|(a, b)| a == b);
    let start =
        same.fold([0.0; 4], |[a, aw, b, bw], (x, y)| [a + x.sum, aw + x.weight, b + y.sum, bw + y.weight]);
    let mut random = StdRng::seed_from_u64(SEED);
    let draws = draws(SIGN_DRAWS, differing.len());
    // Rounding must not tell a difference from its mirror image.
    let least = observed.abs() * (1.0 - 1e-9) - 1e-15;
    let mut as_large = 0;
    for _ in 0..draws {
        let mut sums = start;
        let mut bits = 0u64;
        for (at, (a, b)) in differing.iter().enumerate() {
            if at % 64 == 0 {
                bits = random.random();
            }
            let (a, b) = if bits & 1 == 0 { (a, b) } else { (b, a) };
            bits >>= 1;
            sums = [sums[0] + a.sum, sums[1] + a.weight, sums[2] + b.sum, sums[3] + b.weight];
        }
        as_large += usize::from((ratio(sums[2], sums[3]) - ratio(sums[0], sums[1])).abs() >= least);
    }
    // What was observed is one of the draws that could have been.
    (as_large + 1) as f64 / (draws + 1) as f64
}

fn draws(most: usize, tasks: usize) -> usize {
    (MAX_WORK / tasks.max(1)).clamp(MIN_DRAWS, most)
}

fn ratio(sum: f64, weight: f64) -> f64 {
    if weight > 0.0 { sum / weight } else { 0.0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// n choose k.
    fn choose(n: u64, k: u64) -> f64 {
        (1..=k).map(|i| (n - k + i) as f64 / i as f64).product()
    }

    fn passes(values: &[u8]) -> Vec<Score> {
        values.iter().map(|value| Score { sum: f64::from(*value), weight: 1.0 }).collect()
    }

    #[test]
    fn pass_at_k_is_its_closed_form() {
        for n in [1, 2, 5, 20, 200] {
            for c in 0..=n {
                for k in [1, 2, 10, 100].into_iter().filter(|k| *k <= n) {
                    let closed = if n - c < k { 1.0 } else { 1.0 - choose(n - c, k) / choose(n, k) };
                    assert!((pass_at_k(n, c, k) - closed).abs() < 1e-12, "{n} {c} {k}");
                }
            }
        }
        assert_eq!((pass_at_k(20, 0, 10), pass_at_k(20, 20, 1), pass_at_k(50, 25, 1)), (0.0, 1.0, 0.5));
    }

    #[test]
    fn an_interval_is_as_wide_as_theory_says() {
        // 164 tasks of which 55 pass: a standard error of 3.7 points.
        let values: Vec<u8> = (0..164).map(|at| u8::from(at < 55)).collect();
        let Estimate { value, low, high, tasks } = mean(&passes(&values));
        assert!((value - 55.0 / 164.0).abs() < 1e-12 && tasks == 164);
        let half = 1.96 * (value * (1.0 - value) / 164.0).sqrt();
        assert!((value - low - half).abs() < 0.01 && (high - value - half).abs() < 0.01, "{low} {high}");
        assert_eq!(mean(&passes(&values)), mean(&passes(&values)));
    }

    #[test]
    fn intervals_hold_what_they_promise_in_95_of_100_cases() {
        let mut random = StdRng::seed_from_u64(3);
        let held = (0..100).filter(|_| {
            let values: Vec<u8> = (0..100).map(|_| u8::from(random.random::<f64>() < 0.4)).collect();
            let Estimate { low, high, .. } = mean(&passes(&values));
            low <= 0.4 && 0.4 <= high
        });
        let held = held.count();
        assert!((88..=99).contains(&held), "{held}");
    }

    #[test]
    fn the_paired_test_is_mcnemars() {
        // 9 tasks that only the second passes, 2 that only the first does: 2 x P(X <= 2), X of 11 fair coins.
        let first = [vec![1; 30], vec![0; 9], vec![1; 2], vec![0; 123]].concat();
        let second = [vec![1; 30], vec![1; 9], vec![0; 2], vec![0; 123]].concat();
        let pairs: Vec<_> = passes(&first).into_iter().zip(passes(&second)).collect();
        let found = difference(&pairs);
        let exact = 2.0 * (choose(11, 0) + choose(11, 1) + choose(11, 2)) / 2048.0;
        assert!((found.p_value - exact).abs() < 0.01, "{} {exact}", found.p_value);
        assert!((found.estimate.value - 7.0 / 164.0).abs() < 1e-12);
        assert!(found.estimate.low < found.estimate.value && found.estimate.value < found.estimate.high);
    }

    #[test]
    fn models_that_do_not_differ_are_not_told_apart() {
        let same: Vec<_> = passes(&[0, 1, 1, 0]).into_iter().map(|score| (score, score)).collect();
        assert_eq!((difference(&same).p_value, difference(&same).estimate.value), (1.0, 0.0));
        assert_eq!(difference(&[]).p_value, 1.0);
        let far: Vec<_> = passes(&[0; 20]).into_iter().zip(passes(&[1; 20])).collect();
        assert!(difference(&far).p_value < 1e-3);
    }

    #[test]
    fn losses_weigh_as_their_tokens() {
        let scores = [Score { sum: 10.0, weight: 10.0 }, Score { sum: 270.0, weight: 90.0 }];
        assert!((mean(&scores).value - 2.8).abs() < 1e-12);
    }
}
