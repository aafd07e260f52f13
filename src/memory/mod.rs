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
//! On an H200 the whole was 0 to 6 % below what the driver gave (353M and 972M in bf16, 1 to 8
//! sequences of 8,192 bytes, docs/benchmarks.md), before a page was added for what the model of the
//! allocator does not see. The sum of all tensors was compared with CubeCL's own count on software
//! Vulkan (fp32, D 256, 8 layers, 8 · 1,024 positions, T 256): 602 of 605 MiB with no layer
//! recomputed, 378 of 381 MiB with all. What groups of layers add and save was compared there as well
//! (6 layers in groups of 2, 5 and 6, 4 · 512 positions): the same to the MiB.

mod pages;

use std::fmt;
use std::ops::Range;

use mambabyte_kernels::selective_scan::BACKWARD_TRANSIENT_BYTES;
use serde::Serialize;

use self::pages::Step;
use crate::config::{Config, DeviceKind, MambaConfig, Mode, Precision, Recompute};

/// Bytes of a number of weights, gradients, moments, the residual stream, logits and states.
const F32: u64 = 4;

/// The driver's context with the kernels loaded into it, and cuBLASLt.
pub(crate) const CUDA_CONTEXT: u64 = 500 << 20;

/// What cuBLASLt may use to compute a product.
const MATMUL_WORKSPACE: u64 = 32 << 20;

/// Residual streams `[B, L, D]` that exist between two layers: before, after, and one in work.
const STREAMS: u64 = 3;

/// Gradients of the residual stream that exist at the fullest point inside a layer: that of its
/// output. The one of its input comes when most else is gone.
const STREAM_GRADIENTS: u64 = 1;

/// Buffers `[B, L, E]` inside the backward pass of a layer on the CPU: u, Δ, y and the gradients of
/// the three.
const INNER_BUFFERS_CPU: u64 = 6;

/// The same on a GPU: u; Δ, whose gradient takes its place; the gradient of y, whose place that of u
/// takes. y is where the gradient of the convolution's input will be.
const INNER_BUFFERS: u64 = 3;

/// Buffers `[B, L, 2E]` there: the gradient of the input projection's output. Its value is one more
/// in a layer that is recomputed, and is counted with what is kept in one that is not.
const PROJECTED_BUFFERS: u64 = 1;

/// Buffers `[B, L, D]` there: none, and, where the computation is not in fp32, the rounded gradient of
/// the layer's output. The input of the input projection is there when most else is gone.
const OUTER_BUFFERS: [u64; 2] = [0, 1];

/// Bytes and targets (i32) and resets (f32) of a position.
const INPUTS: u64 = 12;

/// What the scan's backward pass may use at a time.
const SCAN_TRANSIENT: u64 = BACKWARD_TRANSIENT_BYTES as u64;

/// Positions between the states it recomputes from; as `SUB` in
/// `kernels/src/selective_scan/cube/plan.rs`.
const SCAN_SUB: u64 = 4;

/// Channels whose gradients of B and C one cube sums there.
const SCAN_CHANNELS: u64 = 64;

/// Shortest and longest chunk on a GPU; as `CHUNK` there.
const SCAN_CHUNK: [u64; 2] = [32, 512];

/// Channels times positions that a chunk's length is chosen by: units that keep 128
/// multiprocessors busy. More of them make shorter chunks and more states.
const SCAN_BUSY_UNITS: u64 = 128 * 1024;

/// Positions of a chunk on the CPU; as `CHUNK` in `kernels/src/selective_scan/flex/mod.rs`.
const SCAN_CHUNK_CPU: u64 = 32;

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

/// Whether a run by `config` will use a GPU, as far as config and build tell.
fn on_gpu(config: &Config) -> bool {
    match config.device.kind {
        DeviceKind::Cpu => false,
        DeviceKind::Auto => cfg!(feature = "cuda") || !cfg!(feature = "flex"),
        DeviceKind::Cuda | DeviceKind::Wgpu => true,
    }
}

/// Bytes of a number in the computation.
fn number_bytes(precision: Precision) -> u64 {
    match precision {
        Precision::Fp32 | Precision::Tf32 => 4,
        Precision::Bf16 => 2,
    }
}

/// The sizes that a peak is the sum of.
struct Sizes {
    depth: u64,
    /// Layers of a group; all of them where there are no groups.
    group: u64,
    /// The stream that each group starts from; 0 where there are no groups.
    start: u64,
    /// Parameters of the whole model, of one layer, and behind the last layer.
    parameters: u64,
    layer_parameters: u64,
    tail_parameters: u64,
    /// Both moments of AdamW.
    moments: u64,
    /// Gradients summed up from earlier micro-batches.
    accumulated: u64,
    /// What one layer keeps for its backward pass, besides `projected`.
    kept: u64,
    /// The output of its input projection, which a recomputed layer does not keep.
    projected: u64,
    /// The batch, and carried states.
    inputs: u64,
    /// All residual streams, and what the final norm keeps.
    streams: u64,
    /// Logits and their gradient, in fp32 and as the product reads it.
    logits: u64,
    /// Inside the backward pass of a layer that is not recomputed.
    inside: u64,
    /// What products need on the side.
    products: u64,
    /// The step as a GPU's allocator sees it.
    step: Option<Step>,
    context: u64,
}

impl Sizes {
    fn new(config: &Config) -> Self {
        Self::with(config, number_bytes(config.train.precision), on_gpu(config))
    }

    /// The sizes with `s` bytes a number.
    fn with(config: &Config, s: u64, gpu: bool) -> Self {
        let (model, train) = (&config.model, &config.train);
        let [batch, length, dim, inner, state] = [
            train.batch,
            train.length,
            model.dim,
            model.d_inner(),
            model.d_state,
        ]
        .map(|n| n as u64);
        let positions = batch * length;
        let vocabulary = model.padded_vocab() as u64;
        let rank = model.dt_rank() as u64;
        let projections = rank + 2 * state;
        let chunk = chunk(batch * inner * length, gpu);
        let chunk_states = F32 * batch * length.div_ceil(chunk) * inner * state;
        let carried = match train.mode {
            Mode::Independent => 0,
            // Of every micro-batch, and what the one at work leaves.
            Mode::Contiguous => (train.accumulation as u64 + 1) * batch * model.state_bytes(),
        };
        let (layer_parameters, tail_parameters) = parameters_by_place(model);
        let (scan, scan_states, scan_ends) =
            scan_transient(batch, length, inner, state, chunk, gpu);
        let stream = F32 * positions * dim;
        let projected = s * positions * 2 * inner;
        let logits = F32 * positions * vocabulary;
        // Where the computation is not in fp32, the largest weight and the gradient of the logits
        // are there a second time, rounded.
        let (outer, cast, rounded_logits) = match s {
            F32 => (OUTER_BUFFERS[0], 0, 0),
            _ => (
                OUTER_BUFFERS.iter().sum(),
                s * 2 * inner * dim,
                s * positions * vocabulary,
            ),
        };
        let inner_buffers = if gpu {
            INNER_BUFFERS
        } else {
            INNER_BUFFERS_CPU
        };
        Self {
            depth: model.depth as u64,
            group: match train.checkpoint_every {
                0 => model.depth as u64,
                every => every as u64,
            },
            start: match train.checkpoint_every {
                0 => 0,
                _ => stream,
            },
            parameters: model.num_params(),
            layer_parameters,
            tail_parameters,
            moments: config.optimizer.moment_bytes(model),
            accumulated: match train.accumulation {
                1 => 0,
                _ => F32 * model.num_params(),
            },
            // The normalised input with one statistic a row; Δ, B, C; states.
            kept: positions * (s * (dim + projections) + F32) + chunk_states,
            projected,
            inputs: positions * INPUTS + carried,
            streams: STREAMS * stream + positions * (s * dim + F32),
            logits: 2 * logits + rounded_logits,
            inside: s * positions * (inner_buffers * inner + outer * dim + projections)
                + PROJECTED_BUFFERS * projected
                + STREAM_GRADIENTS * stream
                + scan
                + cast,
            products: if gpu { MATMUL_WORKSPACE } else { 0 },
            step: gpu.then(|| Step {
                stream,
                outer: s * positions * dim,
                statistics: F32 * positions,
                projected,
                inner: s * positions * inner,
                low: s * positions * projections,
                states: chunk_states,
                scan: vec![
                    scan_states,
                    scan.saturating_sub(scan_states + scan_ends),
                    scan_ends,
                ],
                casts: (s != F32).then(|| {
                    [
                        s * 2 * inner * dim,
                        s * inner * projections,
                        s * rank * inner,
                        s * inner * dim,
                    ]
                }),
                gradients: [
                    F32 * inner * dim,
                    F32 * rank * inner,
                    F32 * inner * projections,
                    F32 * 2 * inner * dim,
                ],
                logits: [logits, rounded_logits],
                table: F32 * vocabulary * dim,
                layers: model.depth,
                group: match train.checkpoint_every {
                    0 => model.depth,
                    every => every,
                },
                recomputed: 0,
                accumulates: train.accumulation > 1,
            }),
            context: if gpu { CUDA_CONTEXT } else { 0 },
        }
    }

    /// The greatest of all moments with the first `recomputed` layers recomputed, and the room that
    /// the allocator loses by then.
    fn peak(&self, recomputed: usize) -> Estimate {
        let tensors = self.tensors(recomputed);
        let cut = tensors.gradients + tensors.activations + tensors.workspace - self.products;
        let reserved = self.pages(recomputed).map_or(0, |(_, reserved)| reserved);
        Estimate {
            pages: reserved.saturating_sub(cut),
            ..tensors
        }
    }

    /// The best page size and what is reserved with it; none where the allocator has no pages.
    fn pages(&self, recomputed: usize) -> Option<(u64, u64)> {
        let step = Step {
            recomputed,
            ..self.step.clone()?
        };
        Some(step.best_page())
    }

    /// Whether the peak is within `limit`. What tensors alone take is looked at first: it is had
    /// for nothing.
    fn fits(&self, recomputed: usize, limit: u64) -> bool {
        self.tensors(recomputed).total() <= limit && self.peak(recomputed).total() <= limit
    }

    /// The greatest of all moments, without what the allocator loses.
    fn tensors(&self, recomputed: usize) -> Estimate {
        // From one layer of a group to the next the sum changes by the same amount, but for the step
        // from recomputed layers to others: the ends are enough.
        let recomputed = recomputed as u64;
        let ends = (0..self.depth).step_by(self.group as usize);
        let ends = ends.flat_map(|first| [first, self.group_of(first).end - 1]);
        [recomputed.saturating_sub(1), recomputed]
            .into_iter()
            .chain(ends)
            .filter(|&layer| layer < self.depth)
            .map(|layer| self.in_layer(layer, recomputed))
            .chain([self.at_update(), self.at_head(recomputed)])
            .max_by_key(Estimate::total)
            .unwrap_or_else(|| self.at_update())
    }

    /// The layers of the group that `layer` is in.
    fn group_of(&self, layer: u64) -> Range<u64> {
        let first = layer - layer % self.group;
        first..self.depth.min(first + self.group)
    }

    /// What the layers of its group up to `last` keep, and the streams that this group and those
    /// before it start from. The first `recomputed` of all layers are recomputed.
    fn kept_until(&self, last: u64, recomputed: u64) -> u64 {
        let group = self.group_of(last);
        let layers = last + 1 - group.start;
        let whole = (last + 1).saturating_sub(group.start.max(recomputed));
        // Burn holds the gradient that a group's backward pass starts from until its end; that of
        // the last group starts from the loss.
        let gradient = u64::from(group.end < self.depth);
        let streams = group.start / self.group + 1 + gradient;
        layers * self.kept + whole * self.projected + streams * self.start
    }

    fn at_head(&self, recomputed: u64) -> Estimate {
        let kept = self.kept_until(self.depth - 1, recomputed);
        let activations = kept + self.inputs + self.streams;
        self.moment(Moment::Head, 0, activations, self.logits)
    }

    fn in_layer(&self, layer: u64, recomputed: u64) -> Estimate {
        // Its own gradients are written while the inside is still there. Those of later groups have
        // been added to the sum, where there is one.
        let end = match self.accumulated {
            0 => self.depth,
            _ => self.group_of(layer).end,
        };
        let gradients = F32 * (self.tail_parameters + (end - layer) * self.layer_parameters);
        let activations = self.kept_until(layer, recomputed) + self.inputs;
        let rebuilt = match layer < recomputed {
            true => self.projected,
            false => 0,
        };
        let inside = self.inside + rebuilt;
        let moment = Moment::Layer(layer as usize);
        self.moment(moment, gradients, activations, inside)
    }

    fn at_update(&self) -> Estimate {
        // Gradients of a whole micro-batch and their sum are there together, unless they come in
        // groups.
        let gradients = match (self.start, self.accumulated) {
            (0, _) | (_, 0) => F32 * self.parameters,
            _ => 0,
        };
        self.moment(Moment::Update, gradients, self.inputs, 0)
    }

    fn moment(&self, moment: Moment, gradients: u64, activations: u64, inside: u64) -> Estimate {
        let gradients = gradients + self.accumulated;
        Estimate {
            moment,
            weights: F32 * self.parameters,
            gradients,
            optimizer: self.moments,
            activations,
            workspace: inside + self.products,
            pages: 0,
            context: self.context,
        }
    }
}

/// Parameters of one layer, and of what is behind the last layer.
fn parameters_by_place(model: &MambaConfig) -> (u64, u64) {
    let table = MambaConfig {
        depth: 1,
        ..model.clone()
    }
    .parameter_table();
    let sum = |prefix: &str| -> u64 {
        let of = table.iter().filter(|it| it.name.starts_with(prefix));
        of.map(|it| it.count).sum()
    };
    let tail = sum("backbone.norm_f.") + sum("lm_head.");
    (sum("backbone.layers.0."), tail)
}

/// Positions of a chunk of the scan over so many channels times positions.
fn chunk(elements: u64, gpu: bool) -> u64 {
    let [least, most] = SCAN_CHUNK;
    match gpu {
        true => elements
            .div_ceil(SCAN_BUSY_UNITS)
            .next_power_of_two()
            .clamp(least, most),
        false => SCAN_CHUNK_CPU,
    }
}

/// What the scan's backward pass uses besides its inputs and outputs, for as many chunks as fit its
/// budget, one at least: states inside chunks, partial sums of the gradients of B and C, and states
/// between chunks. The first and the last alone are the other numbers. On the CPU all stay in the cache.
fn scan_transient(
    batch: u64,
    length: u64,
    inner: u64,
    state: u64,
    chunk: u64,
    gpu: bool,
) -> (u64, u64, u64) {
    if !gpu {
        return (0, 0, 0);
    }
    let inside = chunk / SCAN_SUB * state * inner;
    let sums = chunk * 2 * state * inner.div_ceil(SCAN_CHANNELS);
    let ends = (state + 1) * inner;
    let budget = SCAN_TRANSIENT / (F32 * batch * (inside + sums));
    let count = length.div_ceil(chunk);
    // Segments of one size.
    let chunks = count.div_ceil(count.div_ceil(budget.clamp(1, count)));
    let unit = F32 * batch * chunks;
    (unit * (inside + sums + ends), unit * inside, unit * ends)
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    /// D 16, E 32, N 16, R 1, V 256, 2 layers, 2 · 64 positions, on the CPU.
    const SMALL: [&str; 5] = [
        "model.dim=16",
        "model.depth=2",
        "train.batch=2",
        "train.length=64",
        "device.kind=cpu",
    ];

    const LARGE: [&str; 2] = ["model.preset=mambabyte_353m", "device.kind=cuda"];

    fn config(settings: &[&[&str]]) -> Config {
        let settings: Vec<String> = settings.concat().iter().map(|&it| it.to_owned()).collect();
        Config::parse("config", "train.steps = 1000\ndata.path = \"x\"", &settings).expect("valid")
    }

    #[test]
    fn a_small_model_takes_what_a_hand_calculates() {
        let config = config(&[&SMALL]);
        // A layer: 32 norm, 1024 + 160 + 1056 + 64 + 512 + 32 + 512 mixer. The rest: 2 · 4096 + 32.
        let parameters = 2 * 3392 + 8224;
        // 128 positions of 16 + 33 numbers and a statistic; 2 · 2 chunks of 32 · 16 states.
        let kept = 128 * (49 * 4 + 4) + 4 * 2 * 2 * 512;
        let projected = 4 * 128 * 64;
        let inputs = 128 * 12;
        let streams = 3 * 8192 + 128 * (16 * 4 + 4);
        let head = Estimate {
            moment: Moment::Head,
            weights: 4 * parameters,
            gradients: 0,
            optimizer: 8 * parameters,
            activations: 2 * (kept + projected) + inputs + streams,
            workspace: 2 * 4 * 128 * 256,
            pages: 0,
            context: 0,
        };
        assert_eq!(estimate_with(&config, 0), head);
        assert_eq!(head.total(), 610_176);
        assert_eq!(estimate_with(&config, 2).total(), 610_176 - 2 * projected);
    }

    #[test]
    fn every_moment_of_a_small_model_is_what_a_hand_calculates() {
        let sizes = Sizes::new(&config(&[&SMALL]));
        // Six buffers of 32 numbers a position, one of 33, one of 64; a gradient of the stream.
        let inside = 4 * 128 * (6 * 32 + 33 + 64) + 8192;
        let last = sizes.in_layer(1, 0);
        assert_eq!(last.workspace, inside);
        // The last layer, the final norm and the head.
        assert_eq!(last.gradients, 4 * (3392 + 32 + 4096));
        assert_eq!(last.total(), 500_992);
        let first = sizes.in_layer(0, 0);
        assert_eq!(first.gradients, last.gradients + 4 * 3392);
        assert_eq!(last.activations - first.activations, 33_792 + 32_768);
        // A recomputed layer does not keep its projection, and has it back inside.
        let rebuilt = sizes.in_layer(1, 2);
        assert_eq!(rebuilt.workspace, inside + 32_768);
        assert_eq!(rebuilt.activations, last.activations - 2 * 32_768);
        let update = sizes.at_update();
        assert_eq!(update.gradients, 4 * 15_008);
        assert_eq!(update.activations, 128 * 12);
        assert_eq!(update.workspace, 0);
    }

    #[test]
    fn the_paper_s_model_in_16_bits_takes_what_a_hand_calculates() {
        let sizes = Sizes::with(&config(&[&LARGE]), 2, true);
        // Chunks of 128 positions: 64 of them, of 2048 · 16 states.
        let kept = 8192 * (2 * (1024 + 64 + 32) + 4) + 4 * 64 * 2048 * 16;
        assert_eq!(sizes.kept, kept);
        assert_eq!(sizes.projected, 128 << 19);
        // 2048 norm, 1024 · 4096, 2048 · (4 + 1), 2048 · 96, (64 + 1) · 2048, 2048 · 16, 2048,
        // 2048 · 1024.
        assert_eq!(sizes.layer_parameters, 6_668_288);
        // A chunk: 32 states, sums of 32 cubes, ends. All 64 of them fit 640 MiB.
        let (states, sums, ends) = (32 * 2048 * 16, 128 * 32 * 32, 17 * 2048);
        assert!((640 << 20) / (4 * (states + sums)) >= 64);
        let inside = 2 * 8192 * (3 * 2048 + 1024 + 96 + 4096)
            + 4 * 8192 * 1024
            + 64 * 4 * (states + sums + ends)
            + 2 * 1024 * 4096;
        assert_eq!(sizes.inside, inside);
        assert_eq!(sizes.logits, 8192 * 256 * (4 + 4 + 2));
        let peak = sizes.peak(53);
        let cut = peak.gradients + peak.activations + peak.workspace - MATMUL_WORKSPACE;
        let (page, reserved) = sizes.pages(53).expect("a GPU has pages");
        assert_eq!(cut + peak.pages, reserved);
        assert_eq!(reserved % page, 0);
        assert!(peak.pages < cut / 3, "{} of {cut} lost", peak.pages);
        assert_eq!(peak.context, CUDA_CONTEXT);
    }

    #[test]
    fn accumulation_and_carried_states_have_their_price() {
        let plain = Sizes::new(&config(&[&SMALL]));
        let more = Sizes::new(&config(&[&SMALL, &["train.accumulation=3"]]));
        assert_eq!((plain.accumulated, more.accumulated), (0, 4 * 15_008));
        assert_eq!(more.at_update().gradients, 8 * 15_008);
        let contiguous = ["train.mode=contiguous", "train.accumulation=3"];
        let carried = Sizes::new(&config(&[&SMALL, &contiguous]));
        // Four times two sequences, two layers, 32 channels of 16 states and 3 inputs.
        assert_eq!(carried.inputs - plain.inputs, 4 * 2 * (4 * 2 * 32 * 19));
    }

    /// Embedding and head of 4096 numbers each are in 8 bits, with 16 scales a moment; nothing else
    /// of the small model has so many.
    #[test]
    fn moments_in_8_bits_take_two_bytes_and_their_scales() {
        let fp32 = Sizes::new(&config(&[&SMALL]));
        assert_eq!(fp32.moments, 8 * 15_008);
        let int8 = Sizes::new(&config(&[&SMALL, &["optimizer.state=int8"]]));
        assert_eq!(
            int8.moments,
            8 * (15_008 - 8192) + 2 * (2 * 4096 + 2 * 4 * 16)
        );
        assert_eq!(int8.peak(0).optimizer, int8.moments);
        let large = Sizes::new(&config(&[&LARGE, &["optimizer.state=int8"]]));
        let per_number = large.moments as f64 / large.parameters as f64;
        assert!(
            (per_number - (2.0 + 8.0 / 256.0)).abs() < 0.02,
            "{per_number}"
        );
    }

    /// Five layers in groups of two: 0 and 1, 2 and 3, 4.
    #[test]
    fn groups_keep_their_streams_and_the_inside_of_one() {
        let five = ["model.depth=5", "train.accumulation=2"];
        let plain = Sizes::new(&config(&[&SMALL, &five]));
        let groups = Sizes::new(&config(&[&SMALL, &five, &["train.checkpoint_every=2"]]));
        let (stream, layer) = (8192, plain.kept + plain.projected);
        let kept = |sizes: &Sizes, layer| sizes.in_layer(layer, 0).activations - sizes.inputs;
        assert_eq!(kept(&plain, 4), 5 * layer);
        // One stream for the gradient at the end of a group, but for the last one.
        assert_eq!(kept(&groups, 0), layer + 2 * stream);
        assert_eq!(kept(&groups, 1), 2 * layer + 2 * stream);
        assert_eq!(kept(&groups, 2), layer + 3 * stream);
        assert_eq!(kept(&groups, 3), 2 * layer + 3 * stream);
        assert_eq!(kept(&groups, 4), layer + 3 * stream);
        // Layers 0 to 2 recomputed: one of the second group is not.
        let second = groups.in_layer(3, 3).activations - groups.inputs;
        assert_eq!(second, 2 * layer - groups.projected + 3 * stream);
        let (head, plain_head) = (groups.at_head(0), plain.at_head(0));
        assert_eq!(
            plain_head.activations - head.activations,
            4 * layer - 3 * stream
        );
        // The sum of an earlier micro-batch, and of this one only the group's and the tail.
        let gradients = groups.in_layer(2, 0).gradients;
        assert_eq!(gradients, groups.accumulated + 4 * (2 * 3392 + 32 + 4096));
        assert_eq!(groups.at_update().gradients, groups.accumulated);
    }

    #[test]
    fn auto_recomputes_as_few_layers_as_fit() {
        let config = config(&[&LARGE]);
        let total = |layers| estimate_with(&config, layers).total();
        let most = total(0);
        let least = (0..=53).map(total).min().expect("some");
        assert!(least < most);
        assert_eq!(fewest_recomputed(&config, most), Some(0));
        assert!(fewest_recomputed(&config, least).is_some_and(|layers| layers > 20));
        assert_eq!(fewest_recomputed(&config, least - 1), None);
        for layers in [1, 20, 52] {
            let fewest = fewest_recomputed(&config, total(layers)).expect("it fits");
            assert!(fewest <= layers);
            assert!(total(fewest) <= total(layers));
            // Totals go by whole pages: several numbers of layers may have the same.
            assert!(
                fewest == 0 || total(fewest - 1) > total(layers),
                "{fewest} of {layers}"
            );
        }
    }

    #[test]
    fn the_ends_are_the_greatest_of_all_layers() {
        for settings in [
            &SMALL[..],
            &LARGE[..],
            // Gradients of a layer outweigh what it keeps.
            &["model.preset=mambabyte_972m", "train.length=64"][..],
            &["model.preset=mambabyte_353m", "train.checkpoint_every=7"][..],
        ] {
            let sizes = Sizes::new(&config(&[settings]));
            let depth = sizes.depth;
            for recomputed in [0, 1, depth / 2, depth - 1, depth] {
                let all = (0..depth).map(|layer| sizes.in_layer(layer, recomputed));
                let all: Vec<_> = all
                    .chain([sizes.at_update(), sizes.at_head(recomputed)])
                    .collect();
                let peak = sizes.tensors(recomputed as usize);
                assert_eq!(Some(peak.total()), all.iter().map(Estimate::total).max());
            }
        }
    }

    #[test]
    fn settling_puts_a_number_in_the_place_of_auto_only() {
        let settled = |limit: Option<u64>, recompute: &str| {
            let setting = format!("train.recompute={recompute}");
            let mut config = config(&[&SMALL, &[setting.as_str()]]);
            settle(&mut config, limit);
            config.train.recompute
        };
        assert_eq!(settled(None, "auto"), Recompute::None);
        // With a fiftieth to spare: 610176 of 622700.
        assert_eq!(settled(Some(622_700), "auto"), Recompute::None);
        assert_eq!(settled(Some(622_600), "auto"), Recompute::First(1));
        assert_eq!(settled(Some(589_200), "auto"), Recompute::First(1));
        assert_eq!(settled(Some(589_100), "auto"), Recompute::All);
        assert_eq!(settled(Some(1000), "auto"), Recompute::All);
        assert_eq!(settled(Some(1000), "none"), Recompute::None);
        assert_eq!(settled(Some(1000), "1"), Recompute::First(1));
    }

    #[test]
    fn the_largest_batch_fits_and_the_next_one_does_not() {
        for recompute in ["auto", "none", "all"] {
            let setting = format!("train.recompute={recompute}");
            let mut config = config(&[&LARGE, &[setting.as_str()]]);
            let limit = 48 * GIB;
            let batch = largest_batch(&config, limit).expect("one fits");
            let fits = |config: &Config| match config.train.recompute {
                Recompute::Auto => fewest_recomputed(config, limit).is_some(),
                _ => estimate(config).total() <= limit,
            };
            config.train.batch = batch;
            assert!(fits(&config), "{recompute}: {batch}");
            config.train.batch = batch + 1;
            assert!(!fits(&config), "{recompute}: {batch}");
            assert_eq!(largest_batch(&config, GIB), None);
        }
    }

    #[test]
    fn a_run_is_refused_only_far_above_the_limit() {
        let config = config(&[&SMALL, &["train.recompute=none"]]);
        assert_eq!(excess(&config, 610_176), None);
        assert_eq!(excess(&config, 610_176 * 10 / 11 + 100), None);
        let reason = excess(&config, 610_176 * 10 / 11 - 100).expect("too much");
        assert!(reason.contains("about 595.9 KiB"), "{reason}");
        assert_eq!(excess(&config, u64::MAX), None);
    }

    #[test]
    fn sizes_are_readable() {
        assert_eq!(size(24 * GIB), "24.00 GiB");
        assert_eq!(size(384 << 20), "384.0 MiB");
        assert_eq!(size(1 << 19), "512.0 KiB");
        assert_eq!(size(0), "0.0 KiB");
    }
}
