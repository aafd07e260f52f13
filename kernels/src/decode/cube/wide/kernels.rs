//! The kernels.

use cubecl::cmma;
use cubecl::ir::ElemType;
use cubecl::prelude::*;

use super::super::phases::{
    CHANNEL_NUMBERS, CONV_BIAS, X_BIAS, Z_BIAS, load_parameters, load_states, no_advance, place,
    recur,
};
use super::{TILE, UNITS, WideConfig};
use crate::cube::math::sigmoid;
use crate::cube::reduce::cube_sum;
use crate::cube::wide::One;
use crate::cube::words::Words;

/// The norm of every row, rounded, a cube a row; its parameters begin at `at`. The bias of the
/// `out_proj` before is added to the stream first, and begins at `bias_at`. After the last norm the
/// step's choice has long been made: the position moves on.
#[cube(launch_unchecked, address_type = "dynamic")]
pub(super) fn normalise_rows<W: Float>(
    stream: &mut [f32],
    widths: &[f32],
    biases: &[f32],
    hat: &mut [W],
    position: &mut [u32],
    at: usize,
    bias_at: usize,
    batch: usize,
    eps: f32,
    #[comptime] norm: bool,
    #[comptime] biased: bool,
    #[comptime] last: bool,
    #[comptime] w: WideConfig,
    #[define(W)] _type: ElemType,
) {
    let width = comptime!(w.step.width);
    let plane = comptime!(w.step.plane);
    let held = comptime!(width.div_ceil(UNITS));
    let row = CUBE_POS;
    if row >= batch {
        terminate!();
    }
    let unit = UNIT_POS as usize;
    let mut scratch = Shared::<[f32]>::new_slice(comptime!(UNITS / plane));
    let mut values = Array::<f32>::new(held);
    // All loads before the first wait.
    let mut parameters = Array::<f32>::new(comptime!(2 * held));
    #[unroll]
    for i in 0..held {
        let column = unit + comptime!(i * UNITS);
        let inside = min(column, comptime!(width - 1).runtime());
        values[i] = select(column < width, stream[row * width + inside], 0.0f32);
        if norm {
            parameters[comptime!(2 * i)] = widths[at + inside];
            parameters[comptime!(2 * i + 1)] = widths[at + width + inside];
        }
    }
    let mut own = 0.0f32;
    #[unroll]
    for i in 0..held {
        let column = unit + comptime!(i * UNITS);
        if biased && column < width {
            values[i] += biases[bias_at + column];
            stream[row * width + column] = values[i];
        }
        own += values[i];
    }
    if comptime!(norm && w.step.centred) {
        let mean = cube_sum(own, &mut scratch, UNITS, plane) / comptime!(width as f32);
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
            if unit + comptime!(i * UNITS) < width {
                squares = fma(values[i], values[i], squares);
            }
        }
        let sum = cube_sum(squares, &mut scratch, UNITS, plane);
        scale = 1.0f32 / (sum / comptime!(width as f32) + eps).sqrt();
    }
    #[unroll]
    for i in 0..held {
        let column = unit + comptime!(i * UNITS);
        if column < width {
            let mut value = values[i] * scale;
            if norm {
                let (weight, bias) = (comptime!(2 * i), comptime!(2 * i + 1));
                value = fma(value, parameters[weight], parameters[bias]);
            }
            hat[row * width + column] = W::cast_from(value);
        }
    }
    if last && row == 0 && unit == 0 {
        position[0] += 1;
    }
}

/// One step of the convolution, SiLU, and a part of `x_proj`'s sum. A cube has some channels of a tile
/// of sequences.
///
/// - xz: `[B, 2E]`; window: `[layers, B, E, K-1]`; x_proj: `[layers, E, R + 2N]`; u: `[B, E]`;
///   parts: `[B, parts, R + 2N]`
#[cube(launch_unchecked, address_type = "dynamic")]
pub(super) fn enter_wide<W: Float>(
    xz: &[W],
    channels: &[f32],
    window: &mut [f32],
    x_proj: &[W],
    u: &mut [W],
    parts: &mut [f32],
    layer: usize,
    batch: usize,
    #[comptime] w: WideConfig,
    #[define(W)] _type: ElemType,
) {
    let part = CUBE_POS % comptime!(w.step.parts);
    let first = CUBE_POS / comptime!(w.step.parts) * TILE;
    if first >= batch {
        terminate!();
    }
    let inner = comptime!(w.step.inner);
    let pitch = comptime!(w.pitch());
    let low = comptime!(w.step.low());
    let turns = comptime!(w.turns());
    let steps = comptime!(w.part() / TILE);
    let plane = UNIT_POS as usize / comptime!(w.step.plane);
    let planes = comptime!(UNITS / w.step.plane);
    let rows_at = (layer * inner + part * comptime!(w.part())) * low;
    // Matrices are loaded from places that are multiples of 32 bytes.
    let mut inputs = Shared::<[W]>::new_aligned_slice(comptime!(TILE * pitch), 32usize);
    let past = past(xz, channels, window, layer, batch, part, first, w);
    let mut weights = Sequence::<cmma::Matrix<W>>::new();
    if w.tensor {
        // They are on their way while the convolution is done, and asked for after its inputs: turning
        // them round waits for them.
        let len = x_proj.len();
        #[unroll]
        for turn in 0..turns {
            let tile = min(plane + turn * planes, comptime!(w.columns() - 1).runtime());
            #[unroll]
            for k in 0..steps {
                let from = rows_at + comptime!(k * TILE * low) + tile * TILE;
                weights.push(cmma::Matrix::<W>::from_slice(
                    cmma::MatrixIdent::B,
                    TILE,
                    TILE,
                    TILE,
                    cmma::MatrixLayout::RowMajor,
                    &x_proj[from..len],
                    comptime!(low as u32).runtime(),
                ));
            }
        }
    }
    convolve(&past, window, u, &mut inputs, layer, batch, part, first, w);
    sync_cube();
    let mut sums =
        Shared::<[f32]>::new_aligned_slice(comptime!(TILE * TILE * w.columns()), 32usize);
    if w.tensor {
        #[unroll]
        for turn in 0..turns {
            let tile = plane + turn * planes;
            let sum = cmma::Matrix::<f32>::from_value(
                cmma::MatrixIdent::Accumulator,
                TILE,
                TILE,
                TILE,
                cmma::MatrixLayout::Undefined,
                0.0f32,
            );
            #[unroll]
            for k in 0..steps {
                let input = cmma::Matrix::<W>::from_slice(
                    cmma::MatrixIdent::A,
                    TILE,
                    TILE,
                    TILE,
                    cmma::MatrixLayout::RowMajor,
                    &inputs[comptime!(k * TILE)..comptime!(TILE * pitch)],
                    comptime!(pitch as u32).runtime(),
                );
                let weight = weights.index(comptime!(turn * steps + k));
                cmma::execute(&input, weight, &sum, &sum);
            }
            if tile < comptime!(w.columns()) {
                let at = tile * comptime!(TILE * TILE);
                cmma::store(
                    &mut sums[at..at + comptime!(TILE * TILE)],
                    &sum,
                    comptime!(TILE as u32).runtime(),
                    cmma::MatrixLayout::RowMajor,
                );
            }
        }
    } else {
        for i in 0..comptime!((TILE * low).div_ceil(UNITS)) {
            let at = i * UNITS + UNIT_POS as usize;
            if at < comptime!(TILE * low) {
                let (row, column) = (at / low, at % low);
                let mut sum = 0.0f32;
                for k in 0..comptime!(w.part()) {
                    let input = f32::cast_from(inputs[row * pitch + k]);
                    let weight = f32::cast_from(x_proj[rows_at + k * low + column]);
                    sum = fma(input, weight, sum);
                }
                sums[(column / TILE * TILE + row) * TILE + column % TILE] = sum;
            }
        }
    }
    sync_cube();
    for i in 0..comptime!((TILE * low).div_ceil(UNITS)) {
        let at = i * UNITS + UNIT_POS as usize;
        let (row, column) = (at / low, at % low);
        if row < TILE && first + row < batch {
            parts[((first + row) * comptime!(w.step.parts) + part) * low + column] =
                sums[(column / TILE * TILE + row) * TILE + column % TILE];
        }
    }
}

/// What a unit needs for its convolutions: its channel's parameters, and the taps' inputs of every so
/// many of the sequences.
#[derive(CubeType)]
struct Past {
    parameters: Array<f32>,
    inputs: Array<f32>,
}

/// Loads it.
#[cube]
fn past<W: Float>(
    xz: &[W],
    channels: &[f32],
    window: &mut [f32],
    layer: usize,
    batch: usize,
    part: usize,
    first: usize,
    #[comptime] w: WideConfig,
) -> Past {
    let inner = comptime!(w.step.inner);
    let taps = comptime!(w.step.taps);
    let past = comptime!(taps - 1);
    let numbers = comptime!(taps + CHANNEL_NUMBERS);
    let unit = UNIT_POS as usize;
    let channel = part * comptime!(w.part()) + unit % comptime!(w.part());
    let mut inputs = Array::<f32>::new(comptime!(w.each() * taps));
    #[unroll]
    for i in 0..comptime!(w.each()) {
        let sequence = first + unit / comptime!(w.part()) + comptime!(i * w.apart());
        let sequence = min(sequence, batch - 1);
        let state = ((layer * batch + sequence) * inner + channel) * past;
        #[unroll]
        for j in 0..past {
            inputs[comptime!(i * taps + j)] = window[state + j];
        }
        inputs[comptime!(i * taps + past)] =
            f32::cast_from(xz[sequence * comptime!(2 * inner) + channel]);
    }
    let mut parameters = Array::<f32>::new(numbers);
    #[unroll]
    for j in 0..numbers {
        parameters[j] = channels[(layer * inner + channel) * numbers + j];
    }
    Past { parameters, inputs }
}

/// One step of the convolution for the cube's channels of its sequences: u, in global memory and, for
/// the product, in `inputs`; and the window moves on.
#[cube]
fn convolve<W: Float>(
    ahead: &Past,
    window: &mut [f32],
    u: &mut [W],
    inputs: &mut Shared<[W]>,
    layer: usize,
    batch: usize,
    part: usize,
    first: usize,
    #[comptime] w: WideConfig,
) {
    let inner = comptime!(w.step.inner);
    let taps = comptime!(w.step.taps);
    let past = comptime!(taps - 1);
    let unit = UNIT_POS as usize;
    let own = unit % comptime!(w.part());
    #[unroll]
    for i in 0..comptime!(w.each()) {
        let row = unit / comptime!(w.part()) + comptime!(i * w.apart());
        let sequence = first + row;
        let newest = ahead.inputs[comptime!(i * taps + past)];
        let newest = newest + ahead.parameters[comptime!(taps + X_BIAS)];
        let mut value = ahead.parameters[comptime!(taps + CONV_BIAS)];
        #[unroll]
        for j in 0..past {
            let input = ahead.inputs[comptime!(i * taps + j)];
            value = fma(ahead.parameters[j], input, value);
        }
        value = fma(ahead.parameters[past], newest, value);
        let rounded = W::cast_from(value * sigmoid(value, w.step.ptx));
        inputs[row * comptime!(w.pitch()) + own] = rounded;
        if sequence < batch {
            let at = sequence * inner + part * comptime!(w.part()) + own;
            u[at] = rounded;
            let state = (layer * batch * inner + at) * past;
            #[unroll]
            for j in 1..past {
                window[state + comptime!(j - 1)] = ahead.inputs[comptime!(i * taps + j)];
            }
            if comptime!(past > 0) {
                window[state + comptime!(past.max(1) - 1)] = newest;
            }
        }
    }
}

/// The recurrence and the gate. A cube has a block of channels of a few sequences, one after the
/// other: what it loads of the channels' parameters serves all of them.
#[cube(launch_unchecked, address_type = "dynamic")]
pub(super) fn advance_wide<W: Float, T: Size, S: Size>(
    parts: &[f32],
    u: &[W],
    xz: &[W],
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
    let count = comptime!(w.sequences);
    let first = CUBE_POS / blocks * count;
    if first >= batch {
        terminate!();
    }
    let mut place = place(first, CUBE_POS % blocks, c);
    let mut ahead = no_advance::<T, S>(c);
    load_parameters(&mut ahead, channels, dt_proj, rates, layer, &place, c);
    let numbers = (layer * inner + place.channel) * comptime!(c.taps + CHANNEL_NUMBERS);
    let gate_bias = channels[numbers + comptime!(c.taps + Z_BIAS)].extract(0usize);
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
    let mut next_gate = xz[first * comptime!(2 * inner) + inner + place.channel];
    sync_cube();
    for i in 0..min(comptime!(count).runtime(), batch - first) {
        let sequence = first + i;
        let input = f32::cast_from(next_input);
        let gate = f32::cast_from(next_gate) + gate_bias;
        #[unroll]
        for j in 0..comptime!(c.held()) {
            ahead.state[j] = next[j];
        }
        // The next sequence's numbers are on their way while this one is worked on.
        place.sequence = min(sequence + 1, batch - 1);
        load_states(&mut next, h, layer, batch, &place, c);
        next_input = u[place.sequence * inner + place.channel];
        next_gate = xz[place.sequence * comptime!(2 * inner) + inner + place.channel];
        place.sequence = sequence;
        let from = i * comptime!(c.low());
        let value = recur(&ahead, &low, from, input, gate, h, layer, batch, &place, c);
        if place.inside && place.lane == 0 {
            y[sequence * inner + place.channel] = W::cast_from(value);
        }
    }
}
