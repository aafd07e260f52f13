//! The first phase of a layer.

// In the kernel language an `if` on a compile-time value decides what is compiled: it cannot be
// merged with one on a run-time value.
#![allow(clippy::collapsible_if)]

use cubecl::prelude::*;

use super::{
    CHANNEL_NUMBERS, CONV_BIAS, One, StepConfig, WIDTH_NUMBERS, X_BIAS, Z_BIAS, add_products,
    normalise, own_sum, read_row,
};
use crate::cube::math::sigmoid;

/// What a unit loads for [`enter`] before it waits for the stream: all that is known ahead.
#[derive(CubeType)]
pub(in crate::decode::cube) struct EnterAhead<W: Float, V: Size> {
    /// The row of x of the plane's first channel, and that of z.
    x_row: Array<Vector<W, V>>,
    z_row: Array<Vector<W, V>>,
    /// The unit's column of the cube's rows of `x_proj`.
    low: Array<W>,
}

/// An empty [`EnterAhead`].
#[cube]
pub(in crate::decode::cube) fn no_enter<W: Float, V: Size>(
    #[comptime] c: StepConfig,
) -> EnterAhead<W, V> {
    EnterAhead::<W, V> {
        x_row: Array::new(comptime!(c.loads(c.width / c.vector)[0])),
        z_row: Array::new(comptime!(c.loads(c.width / c.vector)[0])),
        low: Array::new(comptime!(c.channels)),
    }
}

/// Loads ahead for [`enter`].
#[cube]
pub(in crate::decode::cube) fn load_enter<W: Float, V: Size>(
    ahead: &mut EnterAhead<W, V>,
    in_proj: &[Vector<W, V>],
    x_proj: &[W],
    layer: usize,
    cube: usize,
    #[comptime] c: StepConfig,
) {
    let vectors = comptime!(c.width / c.vector);
    let unit = UNIT_POS as usize;
    let first = cube * comptime!(c.channels);
    let last = comptime!(c.inner - 1).runtime();
    let row = layer * comptime!(2 * c.inner) + min(first + unit / comptime!(c.plane), last);
    read_row(in_proj, &mut ahead.x_row, row, vectors, 0usize, c);
    read_row(
        in_proj,
        &mut ahead.z_row,
        row + comptime!(c.inner),
        vectors,
        0usize,
        c,
    );
    let column = min(unit, comptime!(c.low() - 1).runtime());
    #[unroll]
    for i in 0..c.channels {
        let row = layer * comptime!(c.inner) + min(first + i, last);
        ahead.low[i] = x_proj[row * comptime!(c.low()) + column];
    }
}

/// Norm, `in_proj`, one step of the convolution, SiLU, and the cube's part of `x_proj`.
///
/// - stream: `[B, D]`; in_proj: `[layers, 2E, D]`; x_proj: `[layers, E, R + 2N]`
/// - window: `[layers, B, E, K-1]`; u, z: `[B, E]`; parts: `[B, parts, R + 2N]`
#[cube]
pub(in crate::decode::cube) fn enter<W: Float, V: Size>(
    ahead: &mut EnterAhead<W, V>,
    stream: &mut [One],
    widths: &[Vector<f32, V>],
    channels: &[f32],
    in_proj: &[Vector<W, V>],
    window: &mut [f32],
    u: &mut [f32],
    z: &mut [f32],
    parts: &mut [One],
    layer: usize,
    batch: usize,
    cube: usize,
    eps: f32,
    #[comptime] c: StepConfig,
) {
    let unit = UNIT_POS as usize;
    let lane = unit % comptime!(c.plane);
    let plane = unit / comptime!(c.plane);
    let vectors = comptime!(c.width / c.vector);
    let rounds = comptime!(c.loads(vectors)[1]);
    let turns = comptime!(c.channels.div_ceil(c.planes()));
    let numbers = comptime!(c.taps + CHANNEL_NUMBERS);
    let past = comptime!(c.taps - 1);
    let low = comptime!(c.low());
    let first_channel = cube * comptime!(c.channels);
    let norm_at = layer * comptime!(WIDTH_NUMBERS * vectors);

    let mut hat = Shared::<[Vector<f32, V>]>::new_slice(comptime!(c.group * c.padded_width()));
    let mut us = Shared::<[f32]>::new_slice(comptime!(c.group * c.channels));
    for group in 0..batch.div_ceil(comptime!(c.group)) {
        let first = group * comptime!(c.group);
        let sequence = first + lane;
        #[unroll]
        for turn in 0..turns {
            let place = plane + comptime!(turn * c.planes());
            let channel = first_channel + place;
            let inside = place < comptime!(c.channels) && channel < comptime!(c.inner);
            let channel = min(channel, comptime!(c.inner - 1).runtime());
            let row = layer * comptime!(2 * c.inner) + channel;
            let own = inside && lane < comptime!(c.group) && sequence < batch;
            let numbers_at = (layer * comptime!(c.inner) + channel) * numbers;
            let state = (layer * batch + min(sequence, batch - 1)) * comptime!(c.inner) + channel;
            let mut parameters = Array::<f32>::new(numbers);
            let mut inputs = Array::<f32>::new(comptime!(c.taps));
            #[unroll]
            for i in 0..numbers {
                parameters[i] = channels[numbers_at + i];
            }
            #[unroll]
            for i in 0..past {
                inputs[i] = window[state * past + i];
            }
            if turn == 0 {
                // Others may still read the group before.
                sync_cube();
                normalise(
                    stream, widths, &mut hat, first, batch, norm_at, eps, true, c,
                );
                sync_cube();
            }
            let mut sums = Array::<f32>::new(comptime!(2 * c.group));
            #[unroll]
            for i in 0..comptime!(2 * c.group) {
                sums[i] = 0.0f32;
            }
            #[unroll]
            for round in 0..rounds {
                // The first channel's first round is there already, for the first sequences.
                if comptime!(round > 0 || turn > 0 || turns * rounds > 1) {
                    if comptime!(round > 0 || turn > 0) || group > 0 {
                        read_row(in_proj, &mut ahead.x_row, row, vectors, round, c);
                        let z_row = row + comptime!(c.inner);
                        read_row(in_proj, &mut ahead.z_row, z_row, vectors, round, c);
                    }
                }
                add_products(&ahead.x_row, &hat, &mut sums, 0usize, round, c);
                add_products(&ahead.z_row, &hat, &mut sums, c.group, round, c);
            }
            let x = own_sum(&sums, lane, 0usize, c) + parameters[comptime!(c.taps + X_BIAS)];
            let gate = own_sum(&sums, lane, c.group, c) + parameters[comptime!(c.taps + Z_BIAS)];
            inputs[past] = x;
            let mut value = parameters[comptime!(c.taps + CONV_BIAS)];
            #[unroll]
            for i in 0..c.taps {
                value = fma(parameters[i], inputs[i], value);
            }
            let value = value * sigmoid(value, c.ptx);
            if own {
                #[unroll]
                for i in 0..past {
                    window[state * past + i] = inputs[comptime!(i + 1)];
                }
                u[sequence * comptime!(c.inner) + channel] = value;
                z[sequence * comptime!(c.inner) + channel] = gate;
            }
            if lane < comptime!(c.group) && place < comptime!(c.channels) {
                us[place * comptime!(c.group) + lane] = select(own, value, 0.0f32);
            }
        }
        sync_cube();
        if unit < low {
            let mut sums = Array::<f32>::new(comptime!(c.group));
            #[unroll]
            for b in 0..c.group {
                sums[b] = 0.0f32;
            }
            #[unroll]
            for i in 0..c.channels {
                let weight = f32::cast_from(ahead.low[i]);
                #[unroll]
                for b in 0..c.group {
                    sums[b] = fma(weight, us[comptime!(i * c.group + b)], sums[b]);
                }
            }
            #[unroll]
            for b in 0..c.group {
                if first + b < batch {
                    parts[((first + b) * comptime!(c.parts) + cube) * low + unit] =
                        Vector::new(sums[b]);
                }
            }
        }
    }
}
