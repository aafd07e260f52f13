//! Kernels of the convolution.

use cubecl::ir::ElemType;
use cubecl::prelude::*;

use super::{AHEAD, ConvConfig, UNITS};
use crate::cube::OptionalInput;
use crate::cube::math::sigmoid;
use crate::cube::reduce::sum_strided;

/// A unit's sequence, tile and channel.
#[derive(CubeType)]
struct Place {
    batch: usize,
    tile: usize,
    channel: usize,
}

#[cube]
fn place(length: usize, inner: usize, #[comptime] config: ConvConfig) -> Place {
    let cubes = inner.div_ceil(UNITS);
    let tiles = length.div_ceil(comptime!(config.tile));
    let row = CUBE_POS / cubes;
    Place {
        batch: row / tiles,
        tile: row % tiles,
        channel: CUBE_POS % cubes * UNITS + UNIT_POS as usize,
    }
}

/// The K last inputs of a channel, oldest first, and which of them the position may see.
#[derive(CubeType)]
struct Window {
    /// Those cleared by a reset are zero.
    inputs: Array<f32>,
    /// 1 for an input that no reset has cut off, else 0. Unused without resets.
    alive: Array<f32>,
}

/// Clears the window if the state is reset before `at`, then shifts it by one place.
#[cube]
fn shift(
    window: &mut Window,
    next: f32,
    resets: &OptionalInput,
    at: usize,
    #[comptime] width: usize,
) {
    #[comptime]
    match resets {
        ComptimeOption::Some(resets) => {
            if resets[at] > 0.5f32 {
                #[unroll]
                for j in 0..width {
                    window.inputs[j] = 0.0f32;
                    window.alive[j] = 0.0f32;
                }
            }
        }
        ComptimeOption::None => {}
    }
    #[unroll]
    for j in 1..width {
        window.inputs[comptime!(j - 1)] = window.inputs[j];
        window.alive[comptime!(j - 1)] = window.alive[j];
    }
    window.inputs[comptime!(width - 1)] = next;
    window.alive[comptime!(width - 1)] = 1.0f32;
}

/// The window as it is when position `t0` of the sequence comes next.
#[cube]
fn window_before<X: Float>(
    x: &[X],
    initial: &OptionalInput,
    resets: &OptionalInput,
    place: &Place,
    t0: usize,
    length: usize,
    inner: usize,
    #[comptime] width: usize,
) -> Window {
    let mut window = Window {
        inputs: Array::<f32>::new(width),
        alive: Array::<f32>::new(width),
    };
    #[unroll]
    for j in 0..width {
        window.inputs[j] = 0.0f32;
        window.alive[j] = 0.0f32;
    }
    // Before the first position lies the window that the caller carried over.
    #[unroll]
    for j in 0..comptime!(width - 1) {
        // Position t0 - (K - 1) + j.
        if t0 + j >= comptime!(width - 1) {
            let row = place.batch * length + t0 + j - comptime!(width - 1);
            let next = f32::cast_from(x[row * inner + place.channel]);
            shift(&mut window, next, resets, row, width);
        } else {
            let mut next = 0.0f32;
            #[comptime]
            match initial {
                ComptimeOption::Some(initial) => {
                    let row = place.batch * inner + place.channel;
                    next = initial[row * comptime!(width - 1) + t0 + j];
                }
                ComptimeOption::None => {}
            }
            #[unroll]
            for i in 1..width {
                window.inputs[comptime!(i - 1)] = window.inputs[i];
                window.alive[comptime!(i - 1)] = window.alive[i];
            }
            window.inputs[comptime!(width - 1)] = next;
            window.alive[comptime!(width - 1)] = 1.0f32;
        }
    }
    window
}

/// The weights of a channel.
#[cube]
fn load_weights(weight: &[f32], channel: usize, #[comptime] width: usize) -> Array<f32> {
    let mut weights = Array::<f32>::new(width);
    #[unroll]
    for j in 0..width {
        weights[j] = weight[channel * width + j];
    }
    weights
}

/// The convolution at the window's last position, before the activation.
#[cube]
fn convolve(
    window: &Window,
    weights: &Array<f32>,
    bias: &OptionalInput,
    channel: usize,
    #[comptime] width: usize,
) -> f32 {
    let mut sum = 0.0f32;
    #[comptime]
    match bias {
        ComptimeOption::Some(bias) => sum = bias[channel],
        ComptimeOption::None => {}
    }
    #[unroll]
    for j in 0..width {
        sum = fma(weights[j], window.inputs[j], sum);
    }
    sum
}

/// Output and last window.
#[cube(launch_unchecked, address_type = "dynamic")]
pub(super) fn conv_forward<X: Float>(
    x: &[X],
    weight: &[f32],
    bias: &OptionalInput,
    initial: &OptionalInput,
    resets: &OptionalInput,
    y: &mut [X],
    last_window: &mut [f32],
    batch: usize,
    length: usize,
    inner: usize,
    #[comptime] config: ConvConfig,
    #[define(X)] _type: ElemType,
) {
    let place = place(length, inner, config);
    if place.batch >= batch || place.channel >= inner {
        terminate!();
    }
    let width = comptime!(config.width);
    let t0 = place.tile * comptime!(config.tile);
    let end = min(t0 + comptime!(config.tile), length);
    let weights = load_weights(weight, place.channel, width);
    let mut window = window_before::<X>(x, initial, resets, &place, t0, length, inner, width);
    let row0 = place.batch * length;
    for group in 0..(end - t0).div_ceil(AHEAD) {
        let mut next = Array::<f32>::new(AHEAD);
        #[unroll]
        for i in 0..AHEAD {
            let t = min(t0 + group * AHEAD + i, end - 1);
            next[i] = f32::cast_from(x[(row0 + t) * inner + place.channel]);
        }
        #[unroll]
        for i in 0..AHEAD {
            let t = t0 + group * AHEAD + i;
            if t < end {
                shift(&mut window, next[i], resets, row0 + t, width);
                let sum = convolve(&window, &weights, bias, place.channel, width);
                let mut value = sum;
                if config.silu {
                    value = sum * sigmoid(sum, config.ptx);
                }
                y[(row0 + t) * inner + place.channel] = X::cast_from(value);
            }
        }
    }
    if end == length {
        let row = place.batch * inner + place.channel;
        #[unroll]
        for j in 1..width {
            last_window[row * comptime!(width - 1) + comptime!(j - 1)] = window.inputs[j];
        }
    }
}

/// dx, and each tile's partials of dweight and dbias, `[B · tiles, K (+ 1), E]`.
#[cube(launch_unchecked, address_type = "dynamic")]
pub(super) fn conv_backward<X: Float, Y: Float>(
    x: &[X],
    weight: &[f32],
    bias: &OptionalInput,
    initial: &OptionalInput,
    resets: &OptionalInput,
    dy: &[Y],
    dx: &mut [X],
    sums: &mut [f32],
    batch: usize,
    length: usize,
    inner: usize,
    #[comptime] config: ConvConfig,
    #[define(X, Y)] _types: [ElemType; 2],
) {
    let place = place(length, inner, config);
    if place.batch >= batch || place.channel >= inner {
        terminate!();
    }
    let width = comptime!(config.width);
    let t0 = place.tile * comptime!(config.tile);
    let end = min(t0 + comptime!(config.tile), length);
    let weights = load_weights(weight, place.channel, width);
    let mut window = window_before::<X>(x, initial, resets, &place, t0, length, inner, width);
    let row0 = place.batch * length;
    let mut dweight = Array::<f32>::new(width);
    // What the positions of the window have received so far.
    let mut pending = Array::<f32>::new(width);
    #[unroll]
    for j in 0..width {
        dweight[j] = 0.0f32;
        pending[j] = 0.0f32;
    }
    let mut dbias = 0.0f32;
    // Position t - (K - 1) has received everything after position t.
    let stop = end + comptime!(width - 1);
    for group in 0..(stop - t0).div_ceil(AHEAD) {
        let mut next = Array::<f32>::new(AHEAD);
        let mut next_dy = Array::<f32>::new(AHEAD);
        #[unroll]
        for i in 0..AHEAD {
            let t = min(t0 + group * AHEAD + i, length - 1);
            next[i] = f32::cast_from(x[(row0 + t) * inner + place.channel]);
            next_dy[i] = f32::cast_from(dy[(row0 + t) * inner + place.channel]);
        }
        #[unroll]
        for i in 0..AHEAD {
            let t = t0 + group * AHEAD + i;
            if t < stop {
                // Beyond the sequence nothing is added; the last position's reset is harmless.
                shift(
                    &mut window,
                    next[i],
                    resets,
                    row0 + min(t, length - 1),
                    width,
                );
                let mut ds = next_dy[i];
                if config.silu {
                    let sum = convolve(&window, &weights, bias, place.channel, width);
                    let gate = sigmoid(sum, config.ptx);
                    ds = ds * gate * fma(sum, 1.0f32 - gate, 1.0f32);
                }
                ds = select(t < length, ds, 0.0f32);
                #[unroll]
                for j in 1..width {
                    pending[comptime!(j - 1)] = pending[j];
                }
                pending[comptime!(width - 1)] = 0.0f32;
                let own = select(t < end, ds, 0.0f32);
                dbias += own;
                #[unroll]
                for j in 0..width {
                    dweight[j] = fma(own, window.inputs[j], dweight[j]);
                    let mut reach = ds;
                    if comptime!(resets.is_some()) {
                        reach *= window.alive[j];
                    }
                    pending[j] = fma(weights[j], reach, pending[j]);
                }
                // The window's oldest position is complete.
                if t + 1 >= t0 + width {
                    let done = t + 1 - width;
                    dx[(row0 + done) * inner + place.channel] = X::cast_from(pending[0]);
                }
            }
        }
    }
    let row = (place.batch * length.div_ceil(comptime!(config.tile)) + place.tile)
        * comptime!(config.partials());
    #[unroll]
    for j in 0..width {
        sums[(row + j) * inner + place.channel] = dweight[j];
    }
    if config.bias {
        sums[(row + width) * inner + place.channel] = dbias;
    }
}

/// Adds up the tiles' partials: dweight `[E, K]` and dbias `[E]`.
#[cube(launch_unchecked, address_type = "dynamic")]
pub(super) fn sum_tiles(
    sums: &[f32],
    dweight: &mut [f32],
    dbias: &mut [f32],
    rows: usize,
    inner: usize,
    #[comptime] config: ConvConfig,
) {
    let width = comptime!(config.width);
    let unit = CUBE_POS * CUBE_DIM as usize + UNIT_POS as usize;
    let j = unit / inner;
    let channel = unit % inner;
    let stride = inner * comptime!(config.partials());
    if j < width {
        dweight[channel * width + j] = sum_strided(sums, unit, rows, stride);
    }
    if config.bias {
        if j == width {
            dbias[channel] = sum_strided(sums, unit, rows, stride);
        }
    }
}
