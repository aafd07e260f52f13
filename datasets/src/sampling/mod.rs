//! Batches of byte windows, each a pure function of (seed, step).
//!
//! Nothing about sampling needs to be saved: a resumed run asks for its next step, and gets
//! what an uninterrupted run would have got.

use std::ops::Range;
use std::sync::Arc;

use burn_dataset::{Dataset, DatasetError};
use serde::{Deserialize, Serialize};

use crate::error::{DataError, Result};
use crate::hashing::{below, keyed};
use crate::shards::Shards;

mod permutation;

use permutation::Permutation;

/// Purposes of hashes, so that they do not correlate.
const PHASE: u64 = 0x7068_6173;
const ROTATION: u64 = 0x726f_7461;

/// A batch of byte windows, row-major: row `b`, position `t` is at `b * length + t`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Batch {
    /// Rows (B).
    pub batch: usize,
    /// Bytes per row (L).
    pub length: usize,
    /// Input bytes, B x L.
    pub inputs: Vec<u8>,
    /// For each input byte the byte that follows it, B x L.
    pub targets: Vec<u8>,
    /// Where recurrent state must be cleared before the input byte is read, B x L: at the first
    /// byte of a document, and at a row's start unless it continues the same row of the step
    /// before.
    pub resets: Vec<bool>,
}

impl Batch {
    /// The positions of a row in the three arrays.
    pub fn row(&self, lane: usize) -> Range<usize> {
        lane * self.length..(lane + 1) * self.length
    }
}

/// How windows are chosen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SamplingMode {
    /// Every row is an unrelated window; windows of an epoch come in random order, none twice.
    #[default]
    Independent,
    /// Every row reads its own stretch of the stream from step to step, so that state can be
    /// carried over.
    Contiguous,
}

/// What batches to make.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SamplerConfig {
    /// Rows per batch (B).
    pub batch: usize,
    /// Bytes per row (L).
    pub length: usize,
    /// Seed of all choices.
    pub seed: u64,
    /// How windows are chosen.
    pub mode: SamplingMode,
}

/// Where a row of a batch comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Coordinates {
    /// Number of the pass over the data, from 0.
    pub epoch: u64,
    /// Independent: number of the window in the stream (not its place in the order).
    /// Contiguous: number of the window in its lane.
    pub window: u64,
    /// Stream position of the row's first input byte.
    pub offset: u64,
}

/// Makes batches from a split.
///
/// In both modes an epoch cuts the stream into windows that lie side by side from a start, the
/// phase, that differs from epoch to epoch; so over epochs every byte is seen with contexts of
/// every length. Fewer than two windows of bytes (independent), or fewer than a batch
/// (contiguous), are left out of an epoch at the stream's ends.
///
/// Independent: rows take the epoch's windows in the order of a keyed pseudo-random permutation;
/// steps run on from one epoch into the next without a gap.
///
/// Contiguous: the epoch's windows form B stretches of equal length. Row `b` reads one stretch,
/// a window per step, and changes to another at the next epoch: stretches rotate among rows.
///
/// As a [`Dataset`], a sampler is the batches of its first epoch.
#[derive(Clone, Debug)]
pub struct Sampler {
    shards: Arc<Shards>,
    config: SamplerConfig,
    /// Windows per epoch (independent), or per lane and epoch (contiguous).
    windows: u64,
    /// Number of different phases: 0 to this, exclusive.
    phases: u64,
}

impl Sampler {
    /// A sampler over a split.
    ///
    /// # Errors
    ///
    /// [`DataError::Config`] for a batch without rows or bytes; [`DataError::TooShort`] when the
    /// split has not B * L + 1 bytes.
    pub fn new(shards: Arc<Shards>, config: SamplerConfig) -> Result<Self> {
        let (batch, length) = (config.batch as u64, config.length as u64);
        for (setting, value) in [("batch size", batch), ("window length", length)] {
            if value == 0 {
                return Err(DataError::Config {
                    setting,
                    got: "0".to_owned(),
                    expected: "at least 1".to_owned(),
                });
            }
        }
        let bytes = shards.byte_count();
        let inputs = batch.saturating_mul(length);
        if bytes <= inputs {
            return Err(DataError::TooShort {
                dir: shards.dir().to_path_buf(),
                what: format!("one batch of {batch} windows of {length} bytes and a last target"),
                got: bytes,
                expected: inputs.saturating_add(1),
            });
        }
        // Every window needs one byte more than its length, the target of its last byte.
        let (windows, phases) = match config.mode {
            SamplingMode::Independent => {
                let phases = length.min(bytes - inputs);
                ((bytes - phases) / length, phases)
            }
            SamplingMode::Contiguous => {
                let windows = (bytes - 1) / inputs;
                (windows, bytes - windows * inputs)
            }
        };
        Ok(Self {
            shards,
            config,
            windows,
            phases,
        })
    }

    /// The split.
    pub fn shards(&self) -> &Arc<Shards> {
        &self.shards
    }

    /// The settings.
    pub fn config(&self) -> &SamplerConfig {
        &self.config
    }

    /// Whole steps in an epoch, at least 1.
    pub fn steps_per_epoch(&self) -> u64 {
        match self.config.mode {
            SamplingMode::Independent => self.windows / self.config.batch as u64,
            SamplingMode::Contiguous => self.windows,
        }
    }

    /// Where row `lane` (below B) of the batch of a step comes from.
    pub fn coordinates(&self, step: u64, lane: usize) -> Coordinates {
        let SamplerConfig { batch, seed, .. } = self.config;
        let length = self.config.length as u64;
        match self.config.mode {
            SamplingMode::Independent => {
                // Wide: a step may be any number, also one whose windows u64 cannot count.
                let index = u128::from(step) * batch as u128 + lane as u128;
                let windows = u128::from(self.windows);
                let (epoch, place) = ((index / windows) as u64, (index % windows) as u64);
                let window = Permutation::new(self.windows, seed, epoch).apply(place);
                Coordinates {
                    epoch,
                    window,
                    offset: self.phase(epoch) + window * length,
                }
            }
            SamplingMode::Contiguous => {
                let (epoch, window) = (step / self.windows, step % self.windows);
                let lanes = batch as u64;
                let rotation = below(keyed(seed, epoch, ROTATION), lanes);
                let stretch = (lane as u64 % lanes + rotation) % lanes;
                let before = stretch * self.windows + window;
                Coordinates {
                    epoch,
                    window,
                    offset: self.phase(epoch) + before * length,
                }
            }
        }
    }

    /// The batch of a step.
    ///
    /// # Errors
    ///
    /// Those of [`Shards::read`].
    pub fn batch(&self, step: u64) -> Result<Batch> {
        let SamplerConfig { batch, length, .. } = self.config;
        let mut inputs = Vec::with_capacity(batch * length);
        let mut targets = Vec::with_capacity(batch * length);
        let mut resets = vec![false; batch * length];
        let mut window = vec![0; length + 1];
        for lane in 0..batch {
            let place = self.coordinates(step, lane);
            self.shards.read(place.offset, &mut window)?;
            inputs.extend_from_slice(&window[..length]);
            targets.extend_from_slice(&window[1..]);

            let row = &mut resets[lane * length..(lane + 1) * length];
            let continues = self.config.mode == SamplingMode::Contiguous && place.window > 0;
            row[0] = !continues;
            let range = place.offset..place.offset + length as u64;
            for start in self.shards.document_starts_in(range) {
                row[(start - place.offset) as usize] = true;
            }
        }
        Ok(Batch {
            batch,
            length,
            inputs,
            targets,
            resets,
        })
    }

    /// Where an epoch's first window begins.
    fn phase(&self, epoch: u64) -> u64 {
        below(keyed(self.config.seed, epoch, PHASE), self.phases)
    }
}

impl Dataset<Batch> for Sampler {
    /// The batch of step `index`.
    fn get(&self, index: usize) -> Result<Batch, DatasetError> {
        let steps = self.steps_per_epoch();
        // The trait's contract: an index out of bounds is the caller's mistake.
        assert!(
            (index as u64) < steps,
            "step out of bounds: the epoch has {steps}, the index is {index}"
        );
        self.batch(index as u64).map_err(DatasetError::new)
    }

    /// Whole steps in an epoch.
    fn len(&self) -> usize {
        usize::try_from(self.steps_per_epoch()).unwrap_or(usize::MAX)
    }
}

#[cfg(test)]
pub(crate) mod tests;
