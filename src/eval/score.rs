//! Sums of losses.

use std::iter::Sum;

use crate::train::metrics::bits;

/// Losses of some bytes together.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Score {
    /// Sum of the losses.
    pub nats: f64,
    /// Bytes scored.
    pub bytes: u64,
}

impl Score {
    /// Adds the loss of one byte.
    pub(crate) fn add(&mut self, nats: f64) {
        self.nats += nats;
        self.bytes += 1;
    }

    /// Mean loss in nats.
    pub fn nats_per_byte(&self) -> f64 {
        self.nats / self.bytes.max(1) as f64
    }

    /// Mean loss in bits.
    pub fn bits_per_byte(&self) -> f64 {
        bits(self.nats_per_byte())
    }

    /// Perplexity a word: `exp(nats / words)` (PG-19's rule).
    pub fn word_perplexity(&self, words: u64) -> f64 {
        (self.nats / words.max(1) as f64).exp()
    }
}

impl Sum for Score {
    fn sum<I: Iterator<Item = Self>>(scores: I) -> Self {
        scores.fold(Self::default(), |a, b| Self {
            nats: a.nats + b.nats,
            bytes: a.bytes + b.bytes,
        })
    }
}
