//! Which documents are held out from training, where the corpus itself does not say.

use xxhash_rust::xxh3::xxh3_64_with_seed;

use crate::document::Split;
use crate::error::{DataError, Result};

/// Seed of the hash that assigns keys to splits. Fixed: changing it changes every held-out set.
const ASSIGNMENT_SEED: u64 = 0x6d61_6d62_6162_7974;

/// Fewest keys among which each split can have one.
pub(crate) const MIN_KEYS: usize = 3;

/// Fractions of a corpus that are held out; the rest is for training.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct HeldOut {
    /// Fraction for validation, 0 to 1.
    pub validation: f64,
    /// Fraction for the test split, 0 to 1.
    pub test: f64,
}

impl HeldOut {
    /// The same fraction for validation and test.
    pub fn each(fraction: f64) -> Self {
        Self {
            validation: fraction,
            test: fraction,
        }
    }

    /// Checks that both are fractions and leave something to train on.
    ///
    /// # Errors
    ///
    /// [`DataError::Config`] otherwise.
    pub fn validate(self) -> Result<Self> {
        let possible = |x: f64| (0.0..1.0).contains(&x);
        if possible(self.validation) && possible(self.test) && self.validation + self.test < 1.0 {
            return Ok(self);
        }
        Err(DataError::Config {
            setting: "held-out fractions",
            got: format!("validation {}, test {}", self.validation, self.test),
            expected: "each at least 0, together below 1".to_owned(),
        })
    }

    /// Assigns each key to a split by its hash.
    ///
    /// A key's split depends on the key alone, so files added later move no other file. Only
    /// where the hash would leave a wanted split empty (small sets of at least [`MIN_KEYS`] keys)
    /// do the keys with the lowest hashes step in ([`stand_ins`](Self::stand_ins)).
    pub(crate) fn assign(self, keys: &[String]) -> Vec<Split> {
        let mut order: Vec<(f64, usize)> = keys
            .iter()
            .enumerate()
            .map(|(index, key)| (unit_hash(key), index))
            .collect();
        order.sort_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));

        let under = |limit: f64| order.partition_point(|(hash, _)| *hash < limit);
        let mut tests = under(self.test);
        let mut validations = under(self.test + self.validation) - tests;
        if keys.len() >= MIN_KEYS {
            // One key for validation and one to train on must remain.
            tests = tests.clamp(usize::from(self.test > 0.0), keys.len() - 2);
            let most = keys.len() - tests - 1;
            validations = validations.clamp(usize::from(self.validation > 0.0), most);
        }

        let mut splits = vec![Split::Train; keys.len()];
        for (rank, &(_, index)) in order.iter().take(tests + validations).enumerate() {
            splits[index] = if rank < tests {
                Split::Test
            } else {
                Split::Validation
            };
        }
        splits
    }

    /// How many keys are not in the split that their hash alone gives them: keys added later may
    /// move them.
    pub(crate) fn stand_ins(self, keys: &[String]) -> usize {
        let splits = self.assign(keys);
        let by_hash = |key: &str| match unit_hash(key) {
            hash if hash < self.test => Split::Test,
            hash if hash < self.test + self.validation => Split::Validation,
            _ => Split::Train,
        };
        let pairs = keys.iter().zip(splits);
        pairs.filter(|(key, split)| by_hash(key) != *split).count()
    }
}

/// A key's place in [0, 1).
fn unit_hash(key: &str) -> f64 {
    let hash = xxh3_64_with_seed(key.as_bytes(), ASSIGNMENT_SEED);
    // 53 bits: exactly representable, so the comparison with a fraction is the same everywhere.
    (hash >> 11) as f64 / (1u64 << 53) as f64
}
