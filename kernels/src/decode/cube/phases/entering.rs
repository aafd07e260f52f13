//! The first phase of a layer.

// In the kernel language an `if` on a compile-time value decides what is compiled: it cannot be
// merged with one on a run-time value.
#![allow(clippy::collapsible_if)]

use cubecl::prelude::*;

use super::{
    CHANNEL_NUMBERS, CONV_BIAS, ENTER_NUMBERS, NormAhead, StepConfig, WIDTH_NUMBERS, X_BIAS,
    Z_BIAS, add_products, load_norm, no_norm, normalise, own_sum, read_row, read_stream,
};
use crate::cube::math::sigmoid;
use crate::cube::reduce::lane_sum;
use crate::cube::wide::One;
use crate::cube::words::{Words, load_now, number};

/// What a unit loads for [`enter`] before it waits for the stream: all that is known ahead.
#[derive(CubeType)]
pub(in crate::decode::cube) struct EnterAhead<P: Size> {
    norm: NormAhead,
    /// The row of x of the plane's first channel, and that of z.
    x_row: Array<Words<P>>,
    z_row: Array<Words<P>>,
    /// The channel's parameters, spread over the lanes, and the inputs of its convolution for the
    /// lane's sequence.
    parameters: Array<f32>,
    inputs: Array<f32>,
    /// The unit's words of the cube's rows of `x_proj`.
    pub low: Array<Words<Const<1>>>,
}

/// An empty [`EnterAhead`].
#[cube]
pub(in crate::decode::cube) fn no_enter<P: Size>(#[comptime] c: StepConfig) -> EnterAhead<P> {
    EnterAhead::<P> {
        norm: no_norm(c),
        x_row: Array::new(comptime!(c.loads(c.width / c.vector)[0])),
        z_row: Array::new(comptime!(c.loads(c.width / c.vector)[0])),
        parameters: Array::new(comptime!((c.taps + ENTER_NUMBERS).div_ceil(c.plane))),
        inputs: Array::new(comptime!(c.taps)),
        low: Array::new(comptime!(c.low_rows())),
    }
}

/// Loads ahead for [`enter`] the row of z: the rest of what [`load_enter`] loads.
#[cube]
pub(in crate::decode::cube) fn load_gates<P: Size>(
    ahead: &mut EnterAhead<P>,
    in_proj: &[Words<P>],
    layer: usize,
    cube: usize,
    #[comptime] c: StepConfig,
) {
    let channel = cube * comptime!(c.channels) + UNIT_POS as usize / comptime!(c.plane);
    let channel = min(channel, comptime!(c.inner - 1).runtime());
    let row = layer * comptime!(2 * c.inner) + comptime!(c.inner) + channel;
    let vectors = comptime!(c.width / c.vector);
    read_row(in_proj, &mut ahead.z_row, row, vectors, 0usize, c);
}

/// Loads ahead for [`enter`] all but what [`load_gates`] loads.
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
    for i in 0..comptime!((c.taps + ENTER_NUMBERS).div_ceil(c.plane)) {
        let number = min(
            lane + comptime!(i * c.plane),
            comptime!(c.taps + ENTER_NUMBERS - 1).runtime(),
        );
        ahead.parameters[i] = load_now(channels, at + number, c.ptx).extract(0usize);
    }
    #[unroll]
    for i in 0..past {
        ahead.inputs[i] = window[state + i];
    }
}

/// Parameter `number` of the plane's channel.
#[cube]
fn parameter(parameters: &Array<f32>, #[comptime] number: usize, #[comptime] c: StepConfig) -> f32 {
    let own = parameters[comptime!(number / c.plane)];
    if comptime!(c.plane == 1) {
        own
    } else {
        plane_broadcast(own, comptime!((number % c.plane) as u32))
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
    let mut us = Shared::<[f32]>::new_slice(comptime!(c.group * c.channels));
    let mut zs = Shared::<[f32]>::new_slice(comptime!(c.group * c.channels));
    for group in 0..batch.div_ceil(comptime!(c.group)) {
        let first = group * comptime!(c.group);
        let values = read_stream(stream, first, batch, c);
        enter_group::<P, V>(
            ahead, &values, channels, in_proj, window, &mut us, &mut zs, layer, batch, group, cube,
            eps, c,
        );
        let channel = cube * comptime!(c.channels) + unit / comptime!(c.group);
        let sequence = first + unit % comptime!(c.group);
        let inside = unit < comptime!(c.group * c.channels) && channel < comptime!(c.inner);
        if inside && sequence < batch {
            u[sequence * comptime!(c.inner) + channel] = us[unit];
            z[sequence * comptime!(c.inner) + channel] = zs[unit];
        }
        let sums = part_sums(&ahead.low, &us, c);
        let (slice, word) = part_place(c);
        #[unroll]
        for b in 0..c.group {
            #[unroll]
            for k in 0..comptime!(c.per_word()) {
                if slice == 0 && word < comptime!(c.low_words()) && first + b < batch {
                    let row = (first + b) * comptime!(c.parts) + cube;
                    let at = row * comptime!(c.low()) + word * comptime!(c.per_word()) + k;
                    parts[at] = Vector::new(sums[comptime!(c.per_word() * b + k)]);
                }
            }
        }
    }
}

/// u and z of the cube's channels, of the sequences of a group, into shared memory: `[channels,
/// group]`. `values` is what the units have of the stream.
#[cube]
pub(in crate::decode::cube) fn enter_group<P: Size, V: Size>(
    ahead: &mut EnterAhead<P>,
    values: &Array<f32>,
    channels: &[One],
    in_proj: &[Words<P>],
    window: &mut [f32],
    us: &mut Shared<[f32]>,
    zs: &mut Shared<[f32]>,
    layer: usize,
    batch: usize,
    group: usize,
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
    let first = group * comptime!(c.group);
    let sequence = first + lane;
    let mut hat = Shared::<[One]>::new_aligned_slice(comptime!(c.group * c.padded()), 32usize);
    #[unroll]
    for turn in 0..turns {
        let place = plane + comptime!(turn * c.planes());
        let channel = cube * comptime!(c.channels) + place;
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
            normalise(values, &ahead.norm, &mut hat, first, batch, eps, true, c);
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
        let x = x + parameter(&ahead.parameters, comptime!(c.taps + X_BIAS), c);
        let gate = own_sum(&sums, lane, c.group, c);
        let gate = gate + parameter(&ahead.parameters, comptime!(c.taps + Z_BIAS), c);
        ahead.inputs[past] = x;
        let mut value = parameter(&ahead.parameters, comptime!(c.taps + CONV_BIAS), c);
        #[unroll]
        for i in 0..c.taps {
            value = fma(parameter(&ahead.parameters, i, c), ahead.inputs[i], value);
        }
        let value = value * sigmoid(value, c.ptx);
        if own {
            #[unroll]
            for i in 0..past {
                window[state * past + i] = ahead.inputs[comptime!(i + 1)];
            }
        }
        if lane < comptime!(c.group) && place < comptime!(c.channels) {
            us[place * comptime!(c.group) + lane] = select(own, value, 0.0f32);
            zs[place * comptime!(c.group) + lane] = gate;
        }
    }
    sync_cube();
}

/// Which share of a word's columns of `x_proj` a unit adds up, and the word.
#[cube]
pub(in crate::decode::cube) fn part_place(#[comptime] c: StepConfig) -> (usize, usize) {
    let unit = UNIT_POS as usize;
    let slices = comptime!(c.low_slices());
    (unit % slices, unit / slices)
}

/// The cube's part of `x_proj`: a few neighbouring units share the sums of a word's columns, and all of
/// them get them.
#[cube]
pub(in crate::decode::cube) fn part_sums(
    weights: &Array<Words<Const<1>>>,
    us: &Shared<[f32]>,
    #[comptime] c: StepConfig,
) -> Array<f32> {
    let (slice, _) = part_place(c);
    let slices = comptime!(c.low_slices());
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
    for i in 0..comptime!(each * c.group) {
        sums[i] = lane_sum(sums[i], slices, 1usize);
    }
    sums
}
