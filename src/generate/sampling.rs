//! The settings of a choice, and the random numbers it is made with.

use mambabyte_kernels::sampling::{BYTES, Sampling};
use rand::rngs::ChaCha8Rng;
use rand::{RngExt, SeedableRng};

/// How bytes are chosen; the order in which this acts is that of [`mambabyte_kernels::sampling`].
#[derive(Clone, Debug, PartialEq)]
pub struct SamplingConfig {
    /// Divides the logits; 0 takes the likeliest byte.
    pub temperature: f64,
    /// Choose among so many likeliest bytes, at most 256: 0 is no limit, 1 takes the likeliest.
    pub top_k: usize,
    /// Choose among the likeliest bytes that have this probability together; 0 and 1 are no limit.
    pub top_p: f64,
    /// Choose among bytes at least this fraction as likely as the likeliest; 0 is no limit.
    pub min_p: f64,
    /// Makes bytes that the text has already less likely; 1 does nothing.
    pub repetition_penalty: f64,
}

impl Default for SamplingConfig {
    fn default() -> Self {
        Self {
            temperature: 1.0,
            top_k: 256,
            top_p: 0.98,
            min_p: 0.0,
            repetition_penalty: 1.0,
        }
    }
}

impl SamplingConfig {
    /// Always the likeliest byte.
    pub fn greedy() -> Self {
        Self {
            top_k: 1,
            ..Self::default()
        }
    }

    /// All bytes by the model's own probabilities.
    pub fn plain() -> Self {
        Self {
            top_k: 0,
            top_p: 1.0,
            ..Self::default()
        }
    }

    /// Says which setting is outside its range, if one is.
    ///
    /// # Errors
    ///
    /// The setting's name, its value and what is expected.
    pub fn check(&self) -> Result<(), String> {
        let within = |name: &str, value: f64, good: bool, expected: &str| match good {
            true => Ok(()),
            false => Err(format!("{name} is {value}, expected {expected}")),
        };
        let fraction = |value: f64| (0.0..=1.0).contains(&value);
        let Self {
            temperature,
            top_k,
            top_p,
            min_p,
            repetition_penalty,
        } = *self;
        within(
            "temperature",
            temperature,
            temperature == 0.0 || (1e-4..=1e4).contains(&temperature),
            "0, or 0.0001 to 10,000",
        )?;
        within("top_k", top_k as f64, top_k <= BYTES, "0 to 256")?;
        within("top_p", top_p, fraction(top_p), "0 to 1")?;
        within("min_p", min_p, fraction(min_p), "0 to 1")?;
        within(
            "repetition_penalty",
            repetition_penalty,
            (0.01..=100.0).contains(&repetition_penalty),
            "0.01 to 100",
        )
    }

    /// The settings as the kernels take them.
    pub(super) fn kernel(&self) -> Sampling {
        Sampling {
            temperature: self.temperature as f32,
            top_k: self.top_k as u32,
            top_p: self.top_p as f32,
            min_p: self.min_p as f32,
            repetition_penalty: self.repetition_penalty as f32,
        }
    }
}

/// The draws of one sequence: the same seed and stream give the same numbers on every device, and
/// whatever other sequences run beside it.
#[derive(Debug)]
pub(super) struct Draws(ChaCha8Rng);

impl Draws {
    pub fn new(seed: u64, stream: u64) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        rng.set_stream(stream);
        Self(rng)
    }

    /// A number in [0, 1).
    pub fn next(&mut self) -> f32 {
        self.0.random()
    }
}
