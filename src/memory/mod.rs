//! How much device memory training takes: arithmetic over a config, for `mambabyte estimate`, for
//! `train.recompute = "auto"`, and for the check before a run.
//!
//! Memory peaks at one of a few moments of a step, and [`estimate`] is the greatest of them:
//!
//! - *head*: all layers have run, and the logits are there with their gradient;
//! - *layer i*: backward is inside layer i. Layers 0..=i still hold what they kept, those behind it
//!   have turned into gradients. With `train.checkpoint_every` only those of layer i's group hold
//!   anything, besides the streams that groups start from;
//! - *update*: all gradients are there and the optimizer runs.
//!
//! Weights and AdamW's moments are there throughout. All sizes are in bytes. Letters are those of the
//! documentation: B, L, D, E, N, R, K, V; `s` bytes of a number in the computation, `p` = B·L
//! positions of a micro-batch, T positions of a chunk of the scan.
//!
//! On an H200 the whole was 0 to 2 % below what the driver gave (353M and 972M in bf16, 2 to 4
//! sequences of 8,192 bytes, docs/benchmarks.md). The sum of all tensors was compared with CubeCL's own count on software
//! Vulkan (fp32, D 256, 8 layers, 8 · 1,024 positions, T 256): 602 of 605 MiB with no layer
//! recomputed, 378 of 381 MiB with all. What groups of layers add and save was compared there as well
//! (6 layers in groups of 2, 5 and 6, 4 · 512 positions): the same to the MiB.

mod pages;
mod sizes;
#[cfg(test)]
mod tests;

use std::fmt;

use serde::Serialize;

use self::sizes::Sizes;
use crate::config::{Config, Recompute};

/// The driver's context with the kernels loaded into it, and cuBLASLt.
pub(crate) const CUDA_CONTEXT: u64 = 500 << 20;

/// What `"auto"` leaves unused of a limit, in percent: an estimate that is a little short costs an
/// attempt ([`crate::train::fit`]).
const SPARE_PERCENT: u64 = 2;

/// How far an estimate may be above what there is before a run is refused, in percent: it is an
/// estimate, and the allocator has the last word.
const TOLERANCE_PERCENT: u64 = 10;

/// When memory peaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Moment {
    /// Forward is done, backward starts.
    Head,
    /// Backward is inside this layer, from 0.
    Layer(usize),
    /// Backward is done, the optimizer runs.
    Update,
}

impl fmt::Display for Moment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Head => f.write_str("logits"),
            Self::Layer(layer) => write!(f, "backward of layer {layer}"),
            Self::Update => f.write_str("update of the weights"),
        }
    }
}

/// What is in device memory when it is fullest, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Estimate {
    /// When that is.
    pub moment: Moment,
    /// Weights, fp32.
    pub weights: u64,
    /// Gradients that exist at the moment, fp32.
    pub gradients: u64,
    /// Both moments of AdamW, in the form that `optimizer.state` names.
    pub optimizer: u64,
    /// What layers keep for their backward pass, the residual stream, carried states, the batch.
    pub activations: u64,
    /// What the work of the moment itself needs: logits, or the inside of one layer.
    pub workspace: u64,
    /// Room in the allocator's pages that no tensor fills.
    pub pages: u64,
    /// The driver's context and libraries.
    pub context: u64,
}

impl Estimate {
    /// All of it.
    pub fn total(&self) -> u64 {
        self.weights
            + self.gradients
            + self.optimizer
            + self.activations
            + self.workspace
            + self.pages
            + self.context
    }
}

/// The peak of training by `config`, with the number of recomputed layers that it names
/// (`"auto"`: none).
pub fn estimate(config: &Config) -> Estimate {
    estimate_with(config, recomputed(config))
}

/// The peak of training by `config` with the first `layers` layers recomputed.
pub fn estimate_with(config: &Config, layers: usize) -> Estimate {
    Sizes::new(config).peak(layers)
}

/// The fewest first layers to recompute so that training fits `limit` bytes; none where no number
/// does.
pub fn fewest_recomputed(config: &Config, limit: u64) -> Option<usize> {
    let sizes = Sizes::new(config);
    (0..=config.model.depth).find(|&layers| sizes.fits(layers, limit))
}

/// The number that `train.recompute = "auto"` stands for where training may use `limit` bytes: the
/// fewest layers that fit with some room to spare, all where none do.
pub fn automatic(config: &Config, limit: u64) -> usize {
    let roomy = limit - limit / 100 * SPARE_PERCENT;
    fewest_recomputed(config, roomy).unwrap_or(config.model.depth)
}

/// The largest `train.batch` that fits `limit` bytes, with `train.recompute` as it is; where that is
/// `"auto"`, with as many layers recomputed as it takes. None where not even one sequence fits.
pub fn largest_batch(config: &Config, limit: u64) -> Option<usize> {
    let fits = |batch: usize| {
        let mut config = config.clone();
        config.train.batch = batch;
        match config.train.recompute {
            Recompute::Auto => fewest_recomputed(&config, limit).is_some(),
            _ => estimate(&config).total() <= limit,
        }
    };
    // Kernels index positions with 32 bits; the config refuses more.
    let most = (i32::MAX as usize / config.train.length).max(1);
    let (mut good, mut bad) = (0, most + 1);
    while good + 1 < bad {
        let middle = good + (bad - good) / 2;
        match fits(middle) {
            true => good = middle,
            false => bad = middle,
        }
    }
    (good > 0).then_some(good)
}

/// Puts the number in the place of `train.recompute = "auto"`: [`automatic`], and none where there
/// is no limit. Any other setting stays.
pub fn settle(config: &mut Config, limit: Option<u64>) {
    if config.train.recompute != Recompute::Auto {
        return;
    }
    let depth = config.model.depth;
    let layers = limit.map_or(0, |limit| automatic(config, limit));
    config.train.recompute = match layers {
        0 => Recompute::None,
        all if all == depth => Recompute::All,
        some => Recompute::First(some),
    };
}

/// Why training by `config` will not fit `limit` bytes; none where it may.
pub fn excess(config: &Config, limit: u64) -> Option<String> {
    let peak = estimate(config);
    let tolerated = limit.saturating_add(limit / 100 * TOLERANCE_PERCENT);
    if peak.total() <= tolerated {
        return None;
    }
    Some(format!(
        "training needs about {} (weights {}, gradients {}, optimizer {}, activations {}, the rest \
         {}) and may use {}",
        size(peak.total()),
        size(peak.weights),
        size(peak.gradients),
        size(peak.optimizer),
        size(peak.activations),
        size(peak.workspace + peak.pages + peak.context),
        size(limit),
    ))
}

/// Size of the pages that tensors should be cut from on a GPU: that with the least loss; 0 on the CPU.
pub fn page_bytes(config: &Config) -> u64 {
    let best = Sizes::new(config).pages(recomputed(config));
    best.map_or(0, |(page, _)| page)
}

/// `bytes` for people, with the largest of GiB, MiB and KiB that leaves at least 1.
pub fn size(bytes: u64) -> String {
    let [kib, mib, gib] = [10, 20, 30].map(|power| f64::from(1 << power));
    match bytes as f64 {
        bytes if bytes >= gib => format!("{:.2} GiB", bytes / gib),
        bytes if bytes >= mib => format!("{:.1} MiB", bytes / mib),
        bytes => format!("{:.1} KiB", bytes / kib),
    }
}

/// How many first layers are recomputed.
fn recomputed(config: &Config) -> usize {
    config.train.recompute.layers(config.model.depth)
}
