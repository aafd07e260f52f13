//! The sizes of a run's tensors, and what of them is there at each moment.

use std::ops::Range;

use mambabyte_kernels::selective_scan::BACKWARD_TRANSIENT_BYTES;

use super::pages::Step;
use super::{CUDA_CONTEXT, Estimate, Moment};
use crate::config::{Config, DeviceKind, MambaConfig, Mode, Precision};

/// Bytes of a number of weights, gradients, moments, the residual stream, logits and states.
const F32: u64 = 4;

/// What cuBLASLt may use to compute a product.
pub(super) const MATMUL_WORKSPACE: u64 = 32 << 20;

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
pub(super) struct Sizes {
    pub(super) depth: u64,
    /// Layers of a group; all of them where there are no groups.
    pub(super) group: u64,
    /// The stream that each group starts from; 0 where there are no groups.
    pub(super) start: u64,
    /// Parameters of the whole model, of one layer, and behind the last layer.
    pub(super) parameters: u64,
    pub(super) layer_parameters: u64,
    pub(super) tail_parameters: u64,
    /// Both moments of AdamW.
    pub(super) moments: u64,
    /// Gradients summed up from earlier micro-batches.
    pub(super) accumulated: u64,
    /// What one layer keeps for its backward pass, besides `projected`.
    pub(super) kept: u64,
    /// The output of its input projection, which a recomputed layer does not keep.
    pub(super) projected: u64,
    /// The batch, and carried states.
    pub(super) inputs: u64,
    /// All residual streams, and what the final norm keeps.
    pub(super) streams: u64,
    /// Logits and their gradient, in fp32 and as the product reads it.
    pub(super) logits: u64,
    /// Inside the backward pass of a layer that is not recomputed.
    pub(super) inside: u64,
    /// What products need on the side.
    pub(super) products: u64,
    /// The step as a GPU's allocator sees it.
    pub(super) step: Option<Step>,
    pub(super) context: u64,
}

impl Sizes {
    pub(super) fn new(config: &Config) -> Self {
        Self::with(config, number_bytes(config.train.precision), on_gpu(config))
    }

    /// The sizes with `s` bytes a number.
    pub(super) fn with(config: &Config, s: u64, gpu: bool) -> Self {
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
        // Where the computation is not in fp32, the weights of a layer's products and the gradient of
        // the logits are there a second time, rounded.
        let weights = [2 * dim, projections, rank, dim].map(|width| s * inner * width);
        let (outer, cast, rounded_logits) = match s {
            F32 => (OUTER_BUFFERS[0], 0, 0),
            _ => (
                OUTER_BUFFERS.iter().sum(),
                weights.iter().sum(),
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
                casts: (s != F32).then_some(weights),
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
    pub(super) fn peak(&self, recomputed: usize) -> Estimate {
        let tensors = self.tensors(recomputed);
        let cut = tensors.gradients + tensors.activations + tensors.workspace;
        let cut = cut - self.products - self.accumulated;
        let reserved = self.pages(recomputed).map_or(0, |(_, reserved)| reserved);
        Estimate {
            pages: reserved.saturating_sub(cut),
            ..tensors
        }
    }

    /// The best page size and what is reserved with it; none where the allocator has no pages.
    pub(super) fn pages(&self, recomputed: usize) -> Option<(u64, u64)> {
        let step = Step {
            recomputed,
            ..self.step.clone()?
        };
        Some(step.best_page())
    }

    /// Whether the peak is within `limit`. What tensors alone take is looked at first: it is had
    /// for nothing.
    pub(super) fn fits(&self, recomputed: usize, limit: u64) -> bool {
        self.tensors(recomputed).total() <= limit && self.peak(recomputed).total() <= limit
    }

    /// The greatest of all moments, without what the allocator loses.
    pub(super) fn tensors(&self, recomputed: usize) -> Estimate {
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
    pub(super) fn group_of(&self, layer: u64) -> Range<u64> {
        let first = layer - layer % self.group;
        first..self.depth.min(first + self.group)
    }

    /// What the layers of its group up to `last` keep, and the streams that this group and those
    /// before it start from. The first `recomputed` of all layers are recomputed.
    pub(super) fn kept_until(&self, last: u64, recomputed: u64) -> u64 {
        let group = self.group_of(last);
        let layers = last + 1 - group.start;
        let whole = (last + 1).saturating_sub(group.start.max(recomputed));
        // Burn holds the gradient that a group's backward pass starts from until its end; that of
        // the last group starts from the loss.
        let gradient = u64::from(group.end < self.depth);
        let streams = group.start / self.group + 1 + gradient;
        layers * self.kept + whole * self.projected + streams * self.start
    }

    pub(super) fn at_head(&self, recomputed: u64) -> Estimate {
        let kept = self.kept_until(self.depth - 1, recomputed);
        let activations = kept + self.inputs + self.streams;
        self.moment(Moment::Head, 0, activations, self.logits)
    }

    pub(super) fn in_layer(&self, layer: u64, recomputed: u64) -> Estimate {
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

    pub(super) fn at_update(&self) -> Estimate {
        // Gradients of a whole micro-batch and their sum are there together, unless they come in
        // groups.
        let gradients = match (self.start, self.accumulated) {
            (0, _) | (_, 0) => F32 * self.parameters,
            _ => 0,
        };
        self.moment(Moment::Update, gradients, self.inputs, 0)
    }

    pub(super) fn moment(
        &self,
        moment: Moment,
        gradients: u64,
        activations: u64,
        inside: u64,
    ) -> Estimate {
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
