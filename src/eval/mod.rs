//! Bits per byte of a model on held-out data.
//!
//! Every byte is scored once, from a context of at most one window that starts at zero memory. The
//! first byte of the data has no context: it costs log 256 nats, as with a uniform guess.

use burn::tensor::{Device, Int, Tensor, TensorData};
use mambabyte_datasets::{EvalScope, EvalWindow, Progress, SequentialWindows, Shards};
use serde::Serialize;

use crate::error::Result;
use crate::model::MambaLm;
use crate::train::metrics::bits;

/// How to measure.
#[derive(Clone, Debug)]
pub struct EvalOptions {
    /// Bytes of a window, L.
    pub length: usize,
    /// Windows computed at once.
    pub batch: usize,
    /// Measure so many bytes from the beginning; all without.
    pub max_bytes: Option<u64>,
}

/// Result of a measurement.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Score {
    /// Sum of the losses.
    pub nats: f64,
    /// Bytes scored.
    pub bytes: u64,
}

impl Score {
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

/// What `eval --json` prints.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// Mean loss in bits.
    pub bits_per_byte: f64,
    /// Mean loss in nats.
    pub nats_per_byte: f64,
    /// Bytes scored.
    pub bytes: u64,
    /// Words of the data (runs of bytes between white space).
    pub words: u64,
    /// `exp(total nats / words)`.
    pub word_perplexity: f64,
}

/// Scores `shards` with `model` (without gradients) on `device`.
pub fn evaluate(
    model: &MambaLm,
    device: &Device,
    shards: &Shards,
    options: &EvalOptions,
    progress: &dyn Progress,
) -> Result<Score> {
    let limit = options
        .max_bytes
        .unwrap_or(u64::MAX)
        .min(shards.byte_count());
    progress.start("evaluate", limit);
    let mut score = Score::default();
    let mut pending: Vec<EvalWindow> = Vec::new();
    let mut chosen = 0;
    for window in SequentialWindows::new(shards, options.length, EvalScope::Stream)? {
        if chosen >= limit {
            break;
        }
        chosen += targets(&window);
        let alike = pending
            .first()
            .is_none_or(|first| first.inputs().end - first.inputs().start == inputs(&window));
        if pending.len() == options.batch || !alike {
            score_windows(model, device, shards, &pending, &mut score, progress)?;
            pending.clear();
        }
        pending.push(window);
    }
    score_windows(model, device, shards, &pending, &mut score, progress)?;
    progress.finish();
    Ok(score)
}

fn targets(window: &EvalWindow) -> u64 {
    window.targets().end - window.targets().start
}

fn inputs(window: &EvalWindow) -> u64 {
    window.inputs().end - window.inputs().start
}

/// Adds the losses of windows with equally many inputs.
fn score_windows(
    model: &MambaLm,
    device: &Device,
    shards: &Shards,
    windows: &[EvalWindow],
    score: &mut Score,
    progress: &dyn Progress,
) -> Result<()> {
    let bytes: u64 = windows.iter().map(targets).sum();
    let without_context = windows.iter().filter(|w| w.begins).count();
    score.nats += without_context as f64 * 256f64.ln();
    score.bytes += bytes;
    if let Some(length) = windows.first().map(inputs).filter(|length| *length > 0) {
        score.nats += losses(model, device, shards, windows, length as usize)?;
    }
    progress.advance(bytes);
    Ok(())
}

/// Sum of the losses of all targets that have a context.
fn losses(
    model: &MambaLm,
    device: &Device,
    shards: &Shards,
    windows: &[EvalWindow],
    length: usize,
) -> Result<f64> {
    let dims = [windows.len(), length];
    let mut bytes = Vec::with_capacity(windows.len() * length);
    let mut next = Vec::with_capacity(windows.len() * length);
    let mut resets = vec![0.0f32; windows.len() * length];
    // One byte more than inputs: each position's target is the byte after it.
    let mut buffer = vec![0; length + 1];
    for (i, window) in windows.iter().enumerate() {
        let start = window.inputs().start;
        shards.read(start, &mut buffer)?;
        bytes.extend(buffer[..length].iter().map(|b| i32::from(*b)));
        next.extend(buffer[1..].iter().map(|b| i32::from(*b)));
        for at in shards.document_starts_in(window.inputs()) {
            resets[i * length + (at - start) as usize] = 1.0;
        }
    }
    let int = |values| Tensor::<2, Int>::from_data(TensorData::new(values, dims), device);
    let resets = resets
        .contains(&1.0)
        .then(|| Tensor::<2>::from_data(TensorData::new(resets, dims), device));
    let (losses, _) = model.losses(int(bytes), int(next), None, resets);
    let losses = losses.into_data();
    // Summed in f64 on the host: a million f32 terms would lose digits.
    Ok(losses.iter::<f32>().map(f64::from).sum())
}
