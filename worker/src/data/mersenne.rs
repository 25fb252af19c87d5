//! The Mersenne Twister as NumPy's `RandomState` and Python's `random` drive it: seeding and
//! draw order are theirs, bit for bit, for the seed-compatible mode.

const N: usize = 624;
const M: usize = 397;

/// MT19937.
#[derive(Debug, Clone)]
struct Twister {
    state: Box<[u32; N]>,
    next: usize,
}

impl Twister {
    /// Knuth's initialisation by one word.
    fn from_word(seed: u32) -> Self {
        let mut state = Box::new([0u32; N]);
        let mut previous = seed;
        state[0] = seed;
        for (i, word) in state.iter_mut().enumerate().skip(1) {
            previous = 1_812_433_253u32.wrapping_mul(previous ^ (previous >> 30)).wrapping_add(i as u32);
            *word = previous;
        }
        Twister { state, next: N }
    }

    /// Initialisation by a non-empty array of words.
    fn from_words(key: &[u32]) -> Self {
        let mut twister = Self::from_word(19_650_218);
        let state = &mut twister.state;
        let mut i = 1;
        for (j, word) in key.iter().enumerate().cycle().take(N.max(key.len())) {
            let previous = state[i - 1];
            state[i] = (state[i] ^ (previous ^ (previous >> 30)).wrapping_mul(1_664_525))
                .wrapping_add(*word)
                .wrapping_add(j as u32);
            i += 1;
            if i == N {
                state[0] = state[N - 1];
                i = 1;
            }
        }
        for _ in 1..N {
            let previous = state[i - 1];
            state[i] =
                (state[i] ^ (previous ^ (previous >> 30)).wrapping_mul(1_566_083_941)).wrapping_sub(i as u32);
            i += 1;
            if i == N {
                state[0] = state[N - 1];
                i = 1;
            }
        }
        state[0] = 0x8000_0000;
        twister
    }

    fn refill(&mut self) {
        let state = &mut self.state;
        for i in 0..N {
            let y = (state[i] & 0x8000_0000) | (state[(i + 1) % N] & 0x7fff_ffff);
            let twist = if y & 1 == 1 { 0x9908_b0df } else { 0 };
            state[i] = state[(i + M) % N] ^ (y >> 1) ^ twist;
        }
        self.next = 0;
    }

    fn word(&mut self) -> u32 {
        if self.next == N {
            self.refill();
        }
        let mut y = self.state[self.next];
        self.next += 1;
        y ^= y >> 11;
        y ^= (y << 7) & 0x9d2c_5680;
        y ^= (y << 15) & 0xefc6_0000;
        y ^ (y >> 18)
    }

    /// Uniform in [0, 1) with 53 bits.
    fn double(&mut self) -> f64 {
        let high = f64::from(self.word() >> 5);
        let low = f64::from(self.word() >> 6);
        (high * 67_108_864.0 + low) / 9_007_199_254_740_992.0
    }
}

/// `numpy.random.RandomState(seed)`.
#[derive(Debug, Clone)]
pub struct RandomState(Twister);

impl RandomState {
    /// `RandomState(seed)`; NumPy accepts 32-bit seeds only.
    pub fn new(seed: u32) -> Self {
        RandomState(Twister::from_word(seed))
    }

    /// `binomial(1, p)`: inversion, on the smaller of the two probabilities.
    pub fn coin(&mut self, p: f64) -> bool {
        if p <= 0.5 { self.invert(p) } else { !self.invert(1.0 - p) }
    }

    fn invert(&mut self, p: f64) -> bool {
        let q = 1.0 - p;
        // NumPy computes q^n this way, which may differ from q in the last bit.
        let none = q.ln().exp();
        let one = p * none / q;
        loop {
            let mut u = self.0.double();
            if u <= none {
                return false;
            }
            u -= none;
            if u <= one {
                return true;
            }
        }
    }

    /// One value of `randint(0, bound)`: masked rejection on 32-bit words; no draw when only 0 is possible.
    pub fn below(&mut self, bound: u32) -> u32 {
        let last = bound.saturating_sub(1);
        if last == 0 {
            return 0;
        }
        let mask = u32::MAX >> last.leading_zeros();
        loop {
            let value = self.0.word() & mask;
            if value <= last {
                return value;
            }
        }
    }
}

/// Python's `random` after `random.seed(seed)`.
#[derive(Debug, Clone)]
pub struct PythonRandom(Twister);

impl PythonRandom {
    /// `random.seed(seed)`.
    pub fn new(seed: u64) -> Self {
        let (low, high) = (seed as u32, (seed >> 32) as u32);
        PythonRandom(if high == 0 { Twister::from_words(&[low]) } else { Twister::from_words(&[low, high]) })
    }

    /// `random.shuffle(items)`.
    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for i in (1..items.len()).rev() {
            items.swap(i, self.below(i as u32 + 1) as usize);
        }
    }

    /// `_randbelow`: as many bits as `bound` has, redrawn while too large.
    fn below(&mut self, bound: u32) -> u32 {
        loop {
            let value = self.0.word() >> bound.leading_zeros();
            if value < bound {
                return value;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_reference_stream_of_mt19937_is_reproduced() {
        // First outputs published with the reference implementation for the key below.
        let mut twister = Twister::from_words(&[0x123, 0x234, 0x345, 0x456]);
        let first: Vec<u32> = (0..5).map(|_| twister.word()).collect();
        assert_eq!(first, [1_067_595_299, 955_945_823, 477_289_528, 4_107_218_783, 4_228_976_476]);
        // The C++ standard fixes the 10,000th output after the default seed.
        let mut twister = Twister::from_word(5489);
        assert_eq!((0..10_000).map(|_| twister.word()).last(), Some(4_123_659_995));
    }

    #[test]
    fn certain_coins_are_certain() {
        let mut random = RandomState::new(0);
        assert!((0..1000).all(|_| !random.coin(0.0) && random.coin(1.0)));
    }
}
