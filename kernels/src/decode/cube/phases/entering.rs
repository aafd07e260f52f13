//! The first phase of a layer.

// In the kernel language an `if` on a compile-time value decides what is compiled: it cannot be
// merged with one on a run-time value.
#![allow(clippy::collapsible_if)]

use cubecl::prelude::*;

use super::{
    CHANNEL_NUMBERS, CONV_BIAS, NormAhead, StepConfig, WIDTH_NUMBERS, X_BIAS, Z_BIAS, add_products,
    load_norm, load_now, no_norm, normalise, own_sum, read_row,
};
use crate::cube::math::sigmoid;
use crate::cube::reduce::lane_sum;
use crate::cube::wide::One;
use crate::cube::words::{Words, number};

/// What a unit loads for [`enter`] before it waits for the stream: all that is known ahead.
#[derive(CubeType)]
pub(in crate::decode::cube) struct EnterAhead<P: Size> {
    norm: NormAhead,
    /// The row of x of the plane's first channel, and that of z.
    x_row: Array<Words<P>>,
    z_row: Array<Words<P>>,
    /// The channel's parameters, and the inputs of its convolution for the lane's sequence.
    parameters: Array<f32>,
    inputs: Array<f32>,
    /// The unit's words of the cube's rows of `x_proj`.
    low: Array<Words<Const<1>>>,
}

/// An empty [`EnterAhead`].
#[cube]
pub(in crate::decode::cube) fn no_enter<P: Size>(#[comptime] c: StepConfig) -> EnterAhead<P> {
    EnterAhead::<P> {
        norm: no_norm(c),
        x_row: Array::new(comptime!(c.loads(c.width / c.vector)[0])),
        z_row: Array::new(comptime!(c.loads(c.width / c.vector)[0])),
        parameters: Array::new(comptime!(c.taps + CHANNEL_NUMBERS)),
        inputs: Array::new(comptime!(c.taps)),
        low: Array::new(comptime!(c.low_rows())),
    }
}

/// Loads ahead for [`enter`].
#[cube]
pub(in crate::decode::cube) fn load_enter<P: Size>(
    ahead: &mut EnterAhead<P>,
    widths: &[One],
    channels: &[One],
    in_proj: &[Words<P>],
    x_proj: &[Words<Const<1>>],
    window: &mut [f32],
    layer: usize,
    batch: usize,
    cube: usize,
    #[comptime] c: StepConfig,
) {
    let vectors = comptime!(c.width / c.vector);
    let unit = UNIT_POS as usize;
    let first = cube * comptime!(c.channels);
    let last = comptime!(c.inner - 1).runtime();
    let row = layer * comptime!(2 * c.inner) + min(first + unit / comptime!(c.plane), last);
    read_row(in_proj, &mut ahead.x_row, row, vectors, 0usize, c);
    let z_row = row + comptime!(c.inner);
    read_row(in_proj, &mut ahead.z_row, z_row, vectors, 0usize, c);
    let norm_at = layer * comptime!(WIDTH_NUMBERS * c.width);
    load_norm(&mut ahead.norm, widths, norm_at, c);
    load_channel(
        ahead,
        channels,
        window,
        layer,
        batch,
        cube,
        0usize,
        0usize.runtime(),
        c,
    );
    let word = min(
        unit / comptime!(c.low_slices()),
        comptime!(c.low_words() - 1).runtime(),
    );
    #[unroll]
    for i in 0..comptime!(c.low_rows()) {
        let channel = first + comptime!(i * c.low_slices()) + unit % comptime!(c.low_slices());
        let row = layer * comptime!(c.inner) + min(channel, last);
        let at = row * comptime!(c.low_words()) + word;
        ahead.low[i] = load_now(x_proj, at, c.ptx);
    }
}

/// Loads the parameters of the plane's channel of a turn, and its inputs for the lane's sequence
/// of a group.
#[cube]
fn load_channel<P: Size>(
    ahead: &mut EnterAhead<P>,
    channels: &[One],
    window: &mut [f32],
    layer: usize,
    batch: usize,
    cube: usize,
    #[comptime] turn: usize,
    group: usize,
    #[comptime] c: StepConfig,
) {
    let numbers = comptime!(c.taps + CHANNEL_NUMBERS);
    let past = comptime!(c.taps - 1);
    let lane = UNIT_POS as usize % comptime!(c.plane);
    let plane = UNIT_POS as usize / comptime!(c.plane);
    let channel = cube * comptime!(c.channels) + plane + comptime!(turn * c.planes());
    let channel = min(channel, comptime!(c.inner - 1).runtime());
    let sequence = min(group * comptime!(c.group) + lane, batch - 1);
    let at = (layer * comptime!(c.inner) + channel) * numbers;
    let state = ((layer * batch + sequence) * comptime!(c.inner) + channel) * past;
    #[unroll]
    for i in 0..numbers {
        ahead.parameters[i] = load_now(channels, at + i, c.ptx).extract(0usize);
    }
    #[unroll]
    for i in 0..past {
        ahead.inputs[i] = window[state + i];
    }
}

/// Norm, `in_proj`, one step of the convolution, SiLU, and the cube's part of `x_proj`.
///
/// - stream: `[B, D]`; in_proj: `[layers, 2E, D]`; x_proj: `[layers, E, R + 2N]`
/// - window: `[layers, B, E, K-1]`; u, z: `[B, E]`; parts: `[B, parts, R + 2N]`
#[cube]
pub(in crate::decode::cube) fn enter<P: Size, V: Size>(
    ahead: &mut EnterAhead<P>,
    stream: &mut [One],
    channels: &[One],
    in_proj: &[Words<P>],
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
    let past = comptime!(c.taps - 1);
    let first_channel = cube * comptime!(c.channels);

    let mut hat = Shared::<[One]>::new_aligned_slice(comptime!(c.group * c.padded()), 32usize);
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
            let state = (layer * batch + min(sequence, batch - 1)) * comptime!(c.inner) + channel;
            // The first turn's numbers are there already, for the first sequences.
            if comptime!(turn > 0) || group > 0 {
                load_channel(ahead, channels, window, layer, batch, cube, turn, group, c);
            }
            if turn == 0 {
                // Others may still read the group before.
                sync_cube();
                normalise(stream, &ahead.norm, &mut hat, first, batch, eps, true, c);
                sync_cube();
            }
            let mut sums = Array::<f32>::new(comptime!(2 * c.group));
            #[unroll]
            for i in 0..comptime!(2 * c.group) {
                sums[i] = 0.0f32;
            }
            #[unroll]
            for round in 0..rounds {
                // And so is the first round of its weights.
                if comptime!(round > 0 || turn > 0 || turns * rounds > 1) {
                    if comptime!(round > 0 || turn > 0) || group > 0 {
                        read_row(in_proj, &mut ahead.x_row, row, vectors, round, c);
                        let z_row = row + comptime!(c.inner);
                        read_row(in_proj, &mut ahead.z_row, z_row, vectors, round, c);
                    }
                }
                add_products::<P, V>(&ahead.x_row, &mut hat, &mut sums, 0usize, round, c);
                add_products::<P, V>(&ahead.z_row, &mut hat, &mut sums, c.group, round, c);
            }
            let x = own_sum(&sums, lane, 0usize, c);
            let x = x + ahead.parameters[comptime!(c.taps + X_BIAS)];
            let gate = own_sum(&sums, lane, c.group, c);
            let gate = gate + ahead.parameters[comptime!(c.taps + Z_BIAS)];
            ahead.inputs[past] = x;
            let mut value = ahead.parameters[comptime!(c.taps + CONV_BIAS)];
            #[unroll]
            for i in 0..c.taps {
                value = fma(ahead.parameters[i], ahead.inputs[i], value);
            }
            let value = value * sigmoid(value, c.ptx);
            if own {
                #[unroll]
                for i in 0..past {
                    window[state * past + i] = ahead.inputs[comptime!(i + 1)];
                }
                u[sequence * comptime!(c.inner) + channel] = value;
                z[sequence * comptime!(c.inner) + channel] = gate;
            }
            if lane < comptime!(c.group) && place < comptime!(c.channels) {
                us[place * comptime!(c.group) + lane] = select(own, value, 0.0f32);
            }
        }
        sync_cube();
        leave_parts(&ahead.low, &us, parts, first, batch, cube, c);
    }
}

/// The cube's part of `x_proj`: a few neighbouring units share the sums of a word's columns.
#[cube]
fn leave_parts(
    weights: &Array<Words<Const<1>>>,
    us: &Shared<[f32]>,
    parts: &mut [One],
    first: usize,
    batch: usize,
    cube: usize,
    #[comptime] c: StepConfig,
) {
    let unit = UNIT_POS as usize;
    let slices = comptime!(c.low_slices());
    let word = unit / slices;
    let slice = unit % slices;
    let each = comptime!(c.per_word());
    let mut sums = Array::<f32>::new(comptime!(each * c.group));
    #[unroll]
    for i in 0..comptime!(each * c.group) {
        sums[i] = 0.0f32;
    }
    #[unroll]
    for i in 0..comptime!(c.low_rows()) {
        let place = comptime!(i * slices) + slice;
        let inside = place < comptime!(c.channels);
        let place = min(place, comptime!(c.channels - 1).runtime());
        #[unroll]
        for b in 0..c.group {
            let value = us[place * comptime!(c.group) + b];
            let value = select(inside, value, 0.0f32);
            #[unroll]
            for k in 0..each {
                let at = comptime!(each * b + k);
                sums[at] = fma(number(weights[i], k, c.halves), value, sums[at]);
            }
        }
    }
    #[unroll]
    for b in 0..c.group {
        #[unroll]
        for k in 0..each {
            let sum = lane_sum(sums[comptime!(each * b + k)], slices, 1usize);
            if slice == 0 && word < comptime!(c.low_words()) && first + b < batch {
                let row = (first + b) * comptime!(c.parts) + cube;
                parts[row * comptime!(c.low()) + word * each + k] = Vector::new(sum);
            }
        }
    }
}
