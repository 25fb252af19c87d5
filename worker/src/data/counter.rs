//! Counter-based random numbers: a draw is a pure function of its key, so a resume seeks.

const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;

/// What a stream of draws is for; part of the key, so streams never coincide.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// Order of documents in an epoch.
    DocumentOrder = 1,
    /// Order of windows in an epoch.
    WindowOrder = 2,
    /// Rearrangement for infilling.
    Fim = 3,
    /// How an adapter begins.
    AdapterInit = 4,
}

/// The draws of one key.
#[derive(Debug, Clone)]
pub struct Draws {
    state: u64,
}

impl Draws {
    /// The stream of `purpose` at `position` (split, epoch, document, ...) under `seed`.
    pub fn new(seed: u64, purpose: Purpose, position: &[u64]) -> Self {
        let mut state = mix(seed.wrapping_add(GOLDEN));
        for part in std::iter::once(purpose as u64).chain(position.iter().copied()) {
            state = mix(state ^ mix(part.wrapping_add(GOLDEN)));
        }
        Draws { state }
    }

    /// 64 random bits (SplitMix64).
    pub fn bits(&mut self) -> u64 {
        self.state = self.state.wrapping_add(GOLDEN);
        mix(self.state)
    }

    /// Uniform in `0..bound`, without bias; 0 when `bound` is 0.
    pub fn below(&mut self, bound: u64) -> u64 {
        // Lemire: the high half of a 128-bit product; low halves under 2^64 mod bound are redrawn.
        let reject_below = if bound == 0 { 0 } else { bound.wrapping_neg() % bound };
        loop {
            let product = u128::from(self.bits()) * u128::from(bound);
            if product as u64 >= reject_below {
                return (product >> 64) as u64;
            }
        }
    }

    /// True with probability `p`.
    pub fn chance(&mut self, p: f64) -> bool {
        self.unit() < p
    }

    /// Uniform from 0 to below 1.
    pub fn unit(&mut self) -> f64 {
        ((self.bits() >> 11) as f64) * (1.0 / (1u64 << 53) as f64)
    }

    /// `0..n` in random order (Fisher-Yates from the end).
    pub fn permutation(&mut self, n: u32) -> Vec<u32> {
        let mut order: Vec<u32> = (0..n).collect();
        for i in (1..order.len()).rev() {
            order.swap(i, self.below(i as u64 + 1) as usize);
        }
        order
    }
}

/// The finaliser of SplitMix64.
fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_decides_its_draws_and_differs_in_every_part() {
        let draw = |seed, purpose, position: &[u64]| Draws::new(seed, purpose, position).bits();
        let base = draw(1, Purpose::Fim, &[0, 2, 3]);
        assert_eq!(base, draw(1, Purpose::Fim, &[0, 2, 3]));
        let others = [
            draw(2, Purpose::Fim, &[0, 2, 3]),
            draw(1, Purpose::WindowOrder, &[0, 2, 3]),
            draw(1, Purpose::Fim, &[1, 2, 3]),
            draw(1, Purpose::Fim, &[0, 3, 2]),
            draw(1, Purpose::Fim, &[0, 2]),
        ];
        assert!(others.iter().all(|other| *other != base));
    }

    #[test]
    fn draws_below_a_bound_are_uniform() {
        let mut draws = Draws::new(7, Purpose::Fim, &[]);
        let mut counts = [0u32; 6];
        for _ in 0..60_000 {
            counts[draws.below(6) as usize] += 1;
        }
        // Six standard deviations of a binomial with n = 60,000 and p = 1/6.
        assert!(counts.iter().all(|count| count.abs_diff(10_000) < 550), "{counts:?}");
    }

    #[test]
    fn chances_of_zero_and_one_are_never_and_always() {
        let mut draws = Draws::new(7, Purpose::Fim, &[]);
        assert!((0..1000).all(|_| !draws.chance(0.0) && draws.chance(1.0)));
    }
}
