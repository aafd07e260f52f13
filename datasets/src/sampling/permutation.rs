//! A keyed pseudo-random permutation of `0..n` without a table.
//!
//! A balanced Feistel network permutes the even power of two at or above `n`; values that fall
//! outside are sent through again (cycle walking), which keeps it a bijection of `0..n`. The
//! power is below `4 n`, so on average fewer than four passes are needed.

use crate::hashing::keyed;

/// Rounds of the network. Four already give a pseudo-random permutation for a good round
/// function (Luby and Rackoff); the others are margin for small domains.
const ROUNDS: usize = 6;

/// A permutation of `0..n` that is a pure function of its keys.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Permutation {
    n: u64,
    half_bits: u32,
    keys: [u64; ROUNDS],
}

impl Permutation {
    /// The permutation of `0..n` (`n` > 0) for a seed and an epoch.
    pub fn new(n: u64, seed: u64, epoch: u64) -> Self {
        let bits = u64::BITS - n.saturating_sub(1).leading_zeros();
        let mut keys = [0; ROUNDS];
        for (round, key) in keys.iter_mut().enumerate() {
            *key = keyed(seed, epoch, 0x7065_726d + round as u64);
        }
        Self {
            n,
            half_bits: bits.div_ceil(2).max(1),
            keys,
        }
    }

    /// Where `index` (below `n`) goes.
    pub fn apply(&self, index: u64) -> u64 {
        debug_assert!(index < self.n);
        let mut value = self.network(index);
        while value >= self.n {
            value = self.network(value);
        }
        value
    }

    fn network(&self, value: u64) -> u64 {
        let mask = (1u64 << self.half_bits) - 1;
        let (mut left, mut right) = (value >> self.half_bits, value & mask);
        for key in self.keys {
            (left, right) = (right, left ^ (keyed(key, right, 0) & mask));
        }
        left << self.half_bits | right
    }
}
