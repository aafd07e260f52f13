//! The kernels.

use cubecl::cmma;
use cubecl::ir::ElemType;
use cubecl::prelude::*;

use super::super::phases::{
    CHANNEL_NUMBERS, CONV_BIAS, OUT_BIAS, WIDTH_NUMBERS, X_BIAS, Z_BIAS, load_parameters,
    load_states, no_advance, place, recur,
};
use super::product::{Sixteen, column, number, product, row};
use super::{AHEAD, NORM_UNITS, SEQUENCES, TALL, TILE, WideConfig};
use crate::cube::math::sigmoid;
use crate::cube::reduce::cube_sum;
use crate::cube::wide::One;
use crate::cube::words::Words;

/// The tile `Σ_k a[row, k] · b[k, column]` of a plane, into `out[out_at ..]` row by row; both are
/// stored row by row.
///
/// The rows of `a` begin at `a_at` and are `a_stride` apart, and so on.
#[cube]
fn tile_product<W: Float>(
    a: &[W],
    b: &[W],
    out: &mut Shared<[f32]>,
    a_at: usize,
    b_at: usize,
    out_at: usize,
    #[comptime] a_stride: usize,
    #[comptime] b_stride: usize,
    #[comptime] depth: usize,
    #[comptime] w: WideConfig,
) {
    if w.tensor {
        let sum = cmma::Matrix::<f32>::from_value(
            cmma::MatrixIdent::Accumulator,
            TILE,
            TILE,
            TILE,
            cmma::MatrixLayout::Undefined,
            0.0f32,
        );
        let a_len = a.len();
        let b_len = b.len();
        let steps = comptime!(depth / TILE);
        let rounds = comptime!(steps.div_ceil(AHEAD));
        for round in 0..rounds {
            #[unroll]
            for i in 0..comptime!(if steps < AHEAD { steps } else { AHEAD }) {
                let k = (round * comptime!(AHEAD) + i) * TILE;
                if comptime!(steps % AHEAD == 0 || steps < AHEAD) || k < depth {
                    let b_from = b_at + k * comptime!(b_stride);
                    let a_tile = cmma::Matrix::<W>::from_slice(
                        cmma::MatrixIdent::A,
                        TILE,
                        TILE,
                        TILE,
                        cmma::MatrixLayout::RowMajor,
                        &a[a_at + k..a_len],
                        comptime!(a_stride as u32).runtime(),
                    );
                    let b_tile = cmma::Matrix::<W>::from_slice(
                        cmma::MatrixIdent::B,
                        TILE,
                        TILE,
                        TILE,
                        cmma::MatrixLayout::RowMajor,
                        &b[b_from..b_len],
                        comptime!(b_stride as u32).runtime(),
                    );
                    cmma::execute(&a_tile, &b_tile, &sum, &sum);
                }
            }
        }
        cmma::store(
            &mut out[out_at..out_at + comptime!(TILE * TILE)],
            &sum,
            comptime!(TILE as u32).runtime(),
            cmma::MatrixLayout::RowMajor,
        );
    } else {
        let lane = UNIT_POS as usize % comptime!(w.step.plane);
        for i in 0..comptime!((TILE * TILE).div_ceil(w.step.plane)) {
            let place = i * comptime!(w.step.plane) + lane;
            let row = a_at + place / TILE * a_stride;
            let column = b_at + place % TILE;
            let mut sum = 0.0f32;
            for k in 0..depth {
                let left = f32::cast_from(a[row + k]);
                sum = fma(left, f32::cast_from(b[column + k * b_stride]), sum);
            }
            out[out_at + place] = sum;
        }
    }
}

/// The norm of every row, rounded; rows beyond the last sequence are zero. A cube a row. The norm's
/// parameters begin at `at`.
#[cube(launch_unchecked, address_type = "dynamic")]
pub(super) fn normalise_rows<W: Float>(
    stream: &[f32],
    widths: &[f32],
    hat: &mut [W],
    at: usize,
    batch: usize,
    eps: f32,
    #[comptime] norm: bool,
    #[comptime] w: WideConfig,
    #[define(W)] _type: ElemType,
) {
    let width = comptime!(w.step.width);
    let plane = comptime!(w.step.plane);
    let held = comptime!(width.div_ceil(NORM_UNITS));
    let row = CUBE_POS;
    if row >= comptime!(w.rows()) {
        terminate!();
    }
    let unit = UNIT_POS as usize;
    let from = min(row, batch - 1) * width;
    let mut scratch = Shared::<[f32]>::new_slice(comptime!(NORM_UNITS / plane));
    let mut values = Array::<f32>::new(held);
    let mut own = 0.0f32;
    #[unroll]
    for i in 0..held {
        let column = unit + comptime!(i * NORM_UNITS);
        values[i] = 0.0f32;
        if column < width {
            values[i] = stream[from + column];
        }
        own += values[i];
    }
    if comptime!(norm && w.step.centred) {
        let mean = cube_sum(own, &mut scratch, NORM_UNITS, plane) / comptime!(width as f32);
        #[unroll]
        for i in 0..held {
            values[i] -= mean;
        }
    }
    let mut scale = 1.0f32;
    if norm {
        let mut squares = 0.0f32;
        #[unroll]
        for i in 0..held {
            if unit + comptime!(i * NORM_UNITS) < width {
                squares = fma(values[i], values[i], squares);
            }
        }
        let sum = cube_sum(squares, &mut scratch, NORM_UNITS, plane);
        scale = 1.0f32 / (sum / comptime!(width as f32) + eps).sqrt();
    }
    #[unroll]
    for i in 0..held {
        let column = unit + comptime!(i * NORM_UNITS);
        if column < width {
            let mut value = values[i] * scale;
            if norm {
                value = fma(value, widths[at + column], widths[at + width + column]);
            }
            hat[row * width + column] = W::cast_from(select(row < batch, value, 0.0f32));
        }
    }
}

/// `in_proj`, one step of the convolution, SiLU. A cube has 16 channels of some tiles of sequences.
#[cube(launch_unchecked, address_type = "dynamic")]
pub(super) fn enter_wide<W: Float>(
    hat: &[Sixteen],
    in_proj: &[Sixteen],
    channels: &[f32],
    window: &mut [f32],
    u: &mut [f32],
    rounded_u: &mut [W],
    z: &mut [f32],
    layer: usize,
    batch: usize,
    #[comptime] w: WideConfig,
    #[define(W)] _type: ElemType,
) {
    let t = comptime!(w.in_tiles());
    let inner = comptime!(w.step.inner);
    let taps = comptime!(w.step.taps);
    let blocks = comptime!(w.step.inner / TILE);
    let numbers = comptime!(taps + CHANNEL_NUMBERS);
    let past = comptime!(taps - 1);
    let first = CUBE_POS % blocks * TILE;
    let first_tile = CUBE_POS / blocks * comptime!(t.tall);
    if first_tile >= comptime!(w.tiles) {
        terminate!();
    }
    // What follows the product is loaded before it: a unit has one channel, of some sequences.
    let unit = UNIT_POS as usize;
    let count = comptime!(t.numbers());
    let channel = first + unit % TILE;
    let mut parameters = Array::<f32>::new(numbers);
    let at = (layer * inner + channel) * numbers;
    #[unroll]
    for j in 0..numbers {
        parameters[j] = channels[at + j];
    }
    let mut inputs = Array::<f32>::new(comptime!(count * past));
    #[unroll]
    for i in 0..count {
        let sequence = first_tile * TILE + row(i, t);
        let state = (layer * batch + min(sequence, batch - 1)) * inner + channel;
        #[unroll]
        for j in 0..past {
            inputs[comptime!(i * past + j)] = window[state * past + j];
        }
    }
    let mut sums = Shared::<[f32]>::new_slice(comptime!(t.sums()));
    let weights = layer * comptime!(2 * inner) + first;
    product(
        hat,
        in_proj,
        &mut sums,
        first_tile * TILE,
        weights,
        inner,
        t,
    );
    #[unroll]
    for i in 0..count {
        let sequence = first_tile * TILE + row(i, t);
        let x = number(&sums, i, 0usize, t) + parameters[comptime!(taps + X_BIAS)];
        let gate = number(&sums, i, 1usize, t) + parameters[comptime!(taps + Z_BIAS)];
        let mut value = parameters[comptime!(taps + CONV_BIAS)];
        #[unroll]
        for j in 0..past {
            value = fma(parameters[j], inputs[comptime!(i * past + j)], value);
        }
        value = fma(parameters[past], x, value);
        value = value * sigmoid(value, w.step.ptx);
        if sequence < batch {
            let at = sequence * inner + channel;
            let state = (layer * batch * inner + at) * past;
            #[unroll]
            for j in 1..past {
                window[state + comptime!(j - 1)] = inputs[comptime!(i * past + j)];
            }
            if comptime!(past > 0) {
                window[state + comptime!(past.max(1) - 1)] = x;
            }
            u[at] = value;
            z[at] = gate;
        }
        if sequence < comptime!(w.rows()) {
            rounded_u[sequence * inner + channel] =
                W::cast_from(select(sequence < batch, value, 0.0f32));
        }
    }
}

/// A part of `x_proj`'s sum. A cube has 16 columns of some tiles of sequences.
#[cube(launch_unchecked, address_type = "dynamic")]
pub(super) fn low_wide<W: Float>(
    u: &[W],
    x_proj: &[W],
    parts: &mut [f32],
    layer: usize,
    batch: usize,
    #[comptime] w: WideConfig,
    #[define(W)] _type: ElemType,
) {
    let inner = comptime!(w.step.inner);
    let low = comptime!(w.step.low());
    let blocks = comptime!(w.step.low() / TILE);
    let depth = comptime!(w.step.inner / w.step.parts);
    let first = CUBE_POS % blocks * TILE;
    let part = CUBE_POS / blocks % comptime!(w.step.parts);
    let plane = UNIT_POS as usize / comptime!(w.step.plane);
    let lane = UNIT_POS as usize % comptime!(w.step.plane);
    let tall = CUBE_POS / comptime!(blocks * w.step.parts);
    let tile = tall * comptime!(w.tall(TALL)) + plane;
    let mut sums = Shared::<[f32]>::new_slice(comptime!(TILE * TILE * w.tall(TALL)));
    let own = plane * comptime!(TILE * TILE);
    if tile < comptime!(w.tiles) {
        let a_at = tile * comptime!(TILE * inner) + part * depth;
        let b_at = (layer * inner + part * depth) * low + first;
        tile_product(u, x_proj, &mut sums, a_at, b_at, own, inner, low, depth, w);
    }
    sync_cube();
    for i in 0..comptime!((TILE * TILE).div_ceil(w.step.plane)) {
        let place = i * comptime!(w.step.plane) + lane;
        let sequence = tile * TILE + place / TILE;
        if sequence < batch {
            let at = (sequence * comptime!(w.step.parts) + part) * low + first + place % TILE;
            parts[at] = sums[own + place];
        }
    }
}

/// The recurrence and the gate, y rounded. A cube has a block of channels of a few sequences, one
/// after the other: what it loads of the channels' parameters serves all of them.
#[cube(launch_unchecked, address_type = "dynamic")]
pub(super) fn advance_wide<W: Float, T: Size, S: Size>(
    parts: &[f32],
    u: &[f32],
    z: &[f32],
    channels: &[One],
    dt_proj: &[Words<T>],
    rates: &[Vector<f32, S>],
    h: &mut [Vector<f32, S>],
    y: &mut [W],
    layer: usize,
    batch: usize,
    #[comptime] w: WideConfig,
    #[define(W)] _type: ElemType,
) {
    let c = comptime!(w.step);
    let inner = comptime!(c.inner);
    let blocks = comptime!(c.blocks());
    let count = SEQUENCES;
    let first = CUBE_POS / blocks * count;
    if first >= batch {
        terminate!();
    }
    let mut place = place(first, CUBE_POS % blocks, c);
    let mut ahead = no_advance::<T, S>(c);
    load_parameters(&mut ahead, channels, dt_proj, rates, layer, &place, c);
    let mut low = Shared::<[f32]>::new_slice(comptime!(count * c.low()));
    for i in 0..comptime!((count * c.low()).div_ceil(c.units)) {
        let at = i * comptime!(c.units) + UNIT_POS as usize;
        let sequence = min(first + at / comptime!(c.low()), batch - 1);
        let column = at % comptime!(c.low());
        let from = sequence * comptime!(c.parts * c.low()) + column;
        let mut sum = 0.0f32;
        #[unroll]
        for part in 0..c.parts {
            sum += parts[from + comptime!(part * c.low())];
        }
        if at < comptime!(count * c.low()) {
            low[at] = sum;
        }
    }
    let mut next = Array::<Vector<f32, S>>::new(comptime!(c.held()));
    load_states(&mut next, h, layer, batch, &place, c);
    let mut next_input = u[first * inner + place.channel];
    let mut next_gate = z[first * inner + place.channel];
    sync_cube();
    for i in 0..min(comptime!(count).runtime(), batch - first) {
        let sequence = first + i;
        let input = next_input;
        let gate = next_gate;
        #[unroll]
        for j in 0..comptime!(c.held()) {
            ahead.state[j] = next[j];
        }
        // The next sequence's numbers are on their way while this one is worked on.
        place.sequence = min(sequence + 1, batch - 1);
        load_states(&mut next, h, layer, batch, &place, c);
        next_input = u[place.sequence * inner + place.channel];
        next_gate = z[place.sequence * inner + place.channel];
        place.sequence = sequence;
        let from = i * comptime!(c.low());
        let value = recur(&ahead, &low, from, input, gate, h, layer, batch, &place, c);
        if place.inside && place.lane == 0 {
            y[sequence * inner + place.channel] = W::cast_from(value);
        }
    }
}

/// `out_proj`, added to the stream. A cube has 16 columns of some tiles of sequences.
#[cube(launch_unchecked, address_type = "dynamic")]
pub(super) fn leave_wide(
    y: &[Sixteen],
    out_proj: &[Sixteen],
    widths: &[f32],
    stream: &mut [f32],
    layer: usize,
    batch: usize,
    #[comptime] w: WideConfig,
) {
    let t = comptime!(w.out_tiles());
    let width = comptime!(w.step.width);
    let blocks = comptime!(w.step.width / TILE);
    let first = CUBE_POS % blocks * TILE;
    let first_tile = CUBE_POS / blocks * comptime!(t.tall);
    if first_tile >= comptime!(w.tiles) {
        terminate!();
    }
    // What the product is added to is loaded before it.
    let unit = UNIT_POS as usize;
    let count = comptime!(t.numbers());
    let own = first + unit % TILE;
    let bias = widths[(layer * WIDTH_NUMBERS + OUT_BIAS) * width + own];
    let mut before = Array::<f32>::new(count);
    #[unroll]
    for i in 0..count {
        let sequence = first_tile * TILE + row(i, t);
        before[i] = stream[min(sequence, batch - 1) * width + own];
    }
    let mut sums = Shared::<[f32]>::new_slice(comptime!(t.sums()));
    let weights = layer * width + first;
    product(y, out_proj, &mut sums, first_tile * TILE, weights, TILE, t);
    #[unroll]
    for i in 0..count {
        let sequence = first_tile * TILE + row(i, t);
        let sum = number(&sums, i, 0usize, t);
        if sequence < batch {
            stream[sequence * width + own] = before[i] + (sum + bias);
        }
    }
}

/// The logits; the step is over. A cube has 16 of them of some tiles of sequences.
#[cube(launch_unchecked, address_type = "dynamic")]
pub(super) fn head_wide(
    hat: &[Sixteen],
    head: &[Sixteen],
    logits: &mut [f32],
    position: &mut [u32],
    batch: usize,
    #[comptime] w: WideConfig,
) {
    let t = comptime!(w.head_tiles());
    let rows = comptime!(w.step.rows);
    let blocks = comptime!(w.step.rows / TILE);
    let first = CUBE_POS % blocks * TILE;
    let first_tile = CUBE_POS / blocks * comptime!(t.tall);
    if first_tile >= comptime!(w.tiles) {
        terminate!();
    }
    let mut sums = Shared::<[f32]>::new_slice(comptime!(t.sums()));
    product(hat, head, &mut sums, first_tile * TILE, first, TILE, t);
    for i in 0..comptime!(t.numbers()) {
        let sequence = first_tile * TILE + row(i, t);
        if sequence < batch {
            logits[sequence * rows + first + column(i, t)] = number(&sums, i, 0usize, t);
        }
    }
    if CUBE_POS == 0 && UNIT_POS == 0 {
        position[0] += 1;
    }
}
