//! The phases of a step. Each is a function of a cube's number within the phase, so that a phase
//! can be a kernel of its own or a part of one that runs them all.
//!
//! | phase | reads | leaves |
//! | --- | --- | --- |
//! | [`enter`] | stream | u, z, parts of the low-rank product |
//! | [`advance`] | those | y, and the new states |
//! | [`leave`] | y | stream |
//! | [`head`] | stream | logits |
//!
//! A product with a matrix gives a plane a row of weights, whose lanes read neighbouring vectors of
//! it. The rows of `in_proj` that make x and z of a channel belong to one plane, so that the
//! convolution and SiLU follow in its registers; and a cube multiplies its channels' u with their
//! rows of `x_proj` right away. The partial sums are added up where they are needed.

use cubecl::prelude::*;

use super::plan::StepConfig;
use crate::cube::math::{exp2, sigmoid, step_size};
use crate::cube::reduce::{lane_sum, total};

/// A number of a buffer that some phases read as wider vectors.
pub(super) type One = Vector<f32, Const<1>>;

/// Numbers of a channel in the buffer of channel parameters: its taps, then these.
pub(super) const CONV_BIAS: usize = 0;
pub(super) const X_BIAS: usize = 1;
pub(super) const Z_BIAS: usize = 2;
pub(super) const DT_BIAS: usize = 3;
pub(super) const SKIP: usize = 4;
pub(super) const CHANNEL_NUMBERS: usize = 5;

/// Numbers of a column in the buffer of width parameters: weight and bias of the norm, then this.
pub(super) const OUT_BIAS: usize = 2;
pub(super) const WIDTH_NUMBERS: usize = 3;

/// `Σ a · b` over the numbers of a vector, added to `sum`.
#[cube]
fn dot<V: Size>(a: Vector<f32, V>, b: Vector<f32, V>, sum: f32) -> f32 {
    let mut result = sum;
    #[unroll]
    for i in 0..V::value() {
        result = fma(a.extract(i), b.extract(i), result);
    }
    result
}

/// The vector number `at` of a buffer.
#[cube]
fn wide_at<V: Size>(buffer: &mut [One], at: usize, #[comptime] ptx: bool) -> Vector<f32, V> {
    let mut value = Vector::<f32, V>::new(0.0f32);
    if ptx {
        value = buffer.with_vector_size::<V>()[at];
    } else {
        // Not every target can see a buffer as one of wider vectors.
        #[unroll]
        for i in 0..V::value() {
            value.insert(i, buffer[at * V::value() + i].extract(0usize));
        }
    }
    value
}

/// Normalises the sequences `first ..` of a group into shared memory, one a plane; places beyond
/// D and sequences beyond the last are zero. `at` is where the parameters begin, in vectors.
#[cube]
fn normalise<V: Size>(
    stream: &mut [One],
    weight: &[Vector<f32, V>],
    hat: &mut Shared<[Vector<f32, V>]>,
    first: usize,
    batch: usize,
    at: usize,
    eps: f32,
    #[comptime] norm: bool,
    #[comptime] c: StepConfig,
) {
    let vectors = comptime!(c.width / c.vector);
    let padded = comptime!(c.padded_width());
    let lane = UNIT_POS as usize % comptime!(c.plane);
    let plane = UNIT_POS as usize / comptime!(c.plane);
    let rounds = comptime!(c.group.div_ceil(c.planes()));
    let loads = comptime!(padded / c.plane);
    #[unroll]
    for round in 0..rounds {
        let member = plane + comptime!(round * c.planes());
        if member < comptime!(c.group) {
            let sequence = first + member;
            let row = min(sequence, batch - 1) * vectors;
            let mut centre = 0.0f32;
            let mut scale = 1.0f32;
            if norm {
                if c.centred {
                    let mut own = Vector::<f32, V>::new(0.0f32);
                    for i in 0..loads {
                        let column = i * comptime!(c.plane) + lane;
                        if column < vectors {
                            own += wide_at::<V>(stream, row + column, c.ptx);
                        }
                    }
                    let sum = lane_sum(total(own), comptime!(c.plane), 1usize);
                    centre = sum / comptime!(c.width as f32);
                }
                let mut squares = Vector::<f32, V>::new(0.0f32);
                for i in 0..loads {
                    let column = i * comptime!(c.plane) + lane;
                    if column < vectors {
                        let value = wide_at::<V>(stream, row + column, c.ptx) - Vector::new(centre);
                        squares = fma(value, value, squares);
                    }
                }
                let sum = lane_sum(total(squares), comptime!(c.plane), 1usize);
                scale = 1.0f32 / (sum / comptime!(c.width as f32) + eps).sqrt();
            }
            for i in 0..loads {
                let column = i * comptime!(c.plane) + lane;
                let mut value = Vector::<f32, V>::new(0.0f32);
                if column < vectors && sequence < batch {
                    value = wide_at::<V>(stream, row + column, c.ptx) - Vector::new(centre);
                    value *= Vector::new(scale);
                    if norm {
                        let bias = weight[at + vectors + column];
                        value = fma(value, weight[at + column], bias);
                    }
                }
                hat[member * padded + column] = value;
            }
        }
    }
}

/// Reads vectors of a row of weights: the lane's number `round` of loads. Vectors beyond the row
/// are its last one, which meets zeros.
#[cube]
fn read_row<W: Float, V: Size>(
    weights: &[Vector<W, V>],
    into: &mut Array<Vector<W, V>>,
    row: usize,
    #[comptime] vectors: usize,
    #[comptime] round: usize,
    #[comptime] c: StepConfig,
) {
    let loads = comptime!(c.loads(vectors)[0]);
    let lane = UNIT_POS as usize % comptime!(c.plane);
    #[unroll]
    for i in 0..loads {
        let column = comptime!((round * loads + i) * c.plane) + lane;
        into[i] = weights[row * vectors + min(column, comptime!(vectors - 1).runtime())];
    }
}

/// Adds the products of the weights with a group's normalised inputs to `sums[from ..]`.
#[cube]
fn add_products<W: Float, V: Size>(
    weights: &Array<Vector<W, V>>,
    hat: &Shared<[Vector<f32, V>]>,
    sums: &mut Array<f32>,
    #[comptime] from: usize,
    #[comptime] round: usize,
    #[comptime] c: StepConfig,
) {
    let padded = comptime!(c.padded_width());
    let loads = comptime!(c.loads(c.width / c.vector)[0]);
    let lane = UNIT_POS as usize % comptime!(c.plane);
    #[unroll]
    for i in 0..loads {
        let column = comptime!((round * loads + i) * c.plane) + lane;
        if comptime!((round * loads + i) * c.plane < padded) {
            let weight = Vector::<f32, V>::cast_from(weights[i]);
            #[unroll]
            for b in 0..c.group {
                let x = hat[comptime!(b * padded) + column];
                sums[comptime!(from + b)] = dot(weight, x, sums[comptime!(from + b)]);
            }
        }
    }
}

/// The sum over the plane that belongs to this lane's sequence: lane b gets `sums[from + b]`.
#[cube]
fn own_sum(
    sums: &Array<f32>,
    lane: usize,
    #[comptime] from: usize,
    #[comptime] c: StepConfig,
) -> f32 {
    let mut own = lane_sum(sums[from], comptime!(c.plane), 1usize);
    #[unroll]
    for b in 1..c.group {
        let sum = lane_sum(sums[comptime!(from + b)], comptime!(c.plane), 1usize);
        own = select(lane == b, sum, own);
    }
    own
}

/// What a unit loads for [`enter`] before it waits for the stream: all that is known ahead.
#[derive(CubeType)]
pub(super) struct EnterAhead<W: Float, V: Size> {
    /// The row of x of the plane's first channel, and that of z.
    x_row: Array<Vector<W, V>>,
    z_row: Array<Vector<W, V>>,
    /// The unit's column of the cube's rows of `x_proj`.
    low: Array<W>,
}

/// An empty [`EnterAhead`].
#[cube]
pub(super) fn no_enter<W: Float, V: Size>(#[comptime] c: StepConfig) -> EnterAhead<W, V> {
    EnterAhead::<W, V> {
        x_row: Array::new(comptime!(c.loads(c.width / c.vector)[0])),
        z_row: Array::new(comptime!(c.loads(c.width / c.vector)[0])),
        low: Array::new(comptime!(c.channels)),
    }
}

/// Loads ahead for [`enter`].
#[cube]
pub(super) fn load_enter<W: Float, V: Size>(
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
pub(super) fn enter<W: Float, V: Size>(
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

/// What a unit loads for [`advance`] before it waits for u, z and the parts.
#[derive(CubeType)]
pub(super) struct AdvanceAhead<W: Float, T: Size, S: Size> {
    /// The lane's states, their rates, and its weights of `dt_proj`.
    state: Array<Vector<f32, S>>,
    rate: Array<Vector<f32, S>>,
    weights: Array<Vector<W, T>>,
    /// Bias of Δ, and d.
    numbers: Array<f32>,
}

/// An empty [`AdvanceAhead`].
#[cube]
pub(super) fn no_advance<W: Float, T: Size, S: Size>(
    #[comptime] c: StepConfig,
) -> AdvanceAhead<W, T, S> {
    AdvanceAhead::<W, T, S> {
        state: Array::new(comptime!(c.held())),
        rate: Array::new(comptime!(c.held())),
        weights: Array::new(comptime!(c.ranks())),
        numbers: Array::new(2usize),
    }
}

/// The channel of a unit in [`advance`], as a row of `[B, E]`, and whether there is one.
#[derive(CubeType)]
struct Place {
    sequence: usize,
    channel: usize,
    lane: usize,
    inside: bool,
}

#[cube]
fn place(cube: usize, #[comptime] c: StepConfig) -> Place {
    let lanes = comptime!(c.lanes());
    let unit = UNIT_POS as usize;
    let place = unit / lanes;
    let channel = cube % comptime!(c.blocks()) * comptime!(c.block) + place;
    Place {
        sequence: cube / comptime!(c.blocks()),
        channel: min(channel, comptime!(c.inner - 1).runtime()),
        lane: unit % lanes,
        inside: place < comptime!(c.block) && channel < comptime!(c.inner),
    }
}

/// Loads ahead for [`advance`].
#[cube]
pub(super) fn load_advance<W: Float, T: Size, S: Size>(
    ahead: &mut AdvanceAhead<W, T, S>,
    channels: &[f32],
    dt_proj: &[Vector<W, T>],
    rates: &[Vector<f32, S>],
    h: &mut [Vector<f32, S>],
    layer: usize,
    batch: usize,
    cube: usize,
    #[comptime] c: StepConfig,
) {
    let place = place(cube, c);
    let lanes = comptime!(c.lanes());
    let states = comptime!(c.states / c.state_vector);
    let ranks = comptime!(c.rank / c.rank_vector);
    let row = layer * comptime!(c.inner) + place.channel;
    let own = (layer * batch + place.sequence) * comptime!(c.inner) + place.channel;
    #[unroll]
    for i in 0..comptime!(c.held()) {
        let vector = min(
            comptime!(i * lanes) + place.lane,
            comptime!(states - 1).runtime(),
        );
        ahead.state[i] = h[own * states + vector];
        ahead.rate[i] = rates[row * states + vector];
    }
    #[unroll]
    for i in 0..comptime!(c.ranks()) {
        let vector = min(
            comptime!(i * lanes) + place.lane,
            comptime!(ranks - 1).runtime(),
        );
        ahead.weights[i] = dt_proj[row * ranks + vector];
    }
    let numbers = row * comptime!(c.taps + CHANNEL_NUMBERS);
    ahead.numbers[0] = channels[numbers + comptime!(c.taps + DT_BIAS)];
    ahead.numbers[1] = channels[numbers + comptime!(c.taps + SKIP)];
}

/// Δ, B and C from the parts, then one step of the recurrence and the gate.
///
/// `cube` counts blocks of channels within a sequence, then sequences.
///
/// - dt_proj: `[layers, E, R]`; rates: `[layers, E, N]`, times log₂ e; h: `[layers, B, E, N]`
/// - parts as [`enter`] leaves them; u, z, y: `[B, E]`
#[cube]
pub(super) fn advance<W: Float, Y: Float, T: Size, S: Size, Q: Size>(
    ahead: &AdvanceAhead<W, T, S>,
    parts: &mut [One],
    u: &mut [f32],
    z: &mut [f32],
    h: &mut [Vector<f32, S>],
    y: &mut [Vector<Y, Const<1>>],
    layer: usize,
    batch: usize,
    cube: usize,
    #[comptime] c: StepConfig,
) {
    let place = place(cube, c);
    let lanes = comptime!(c.lanes());
    let held = comptime!(c.held());
    let ranks = comptime!(c.ranks());
    let state_vectors = comptime!(c.states / c.state_vector);
    let rank_vectors = comptime!(c.rank / c.rank_vector);
    let lane = place.lane;
    let inside = place.inside;
    let at = place.sequence * comptime!(c.inner) + place.channel;
    let state_row = (layer * batch + place.sequence) * comptime!(c.inner) + place.channel;
    let input = u[at];
    let gate = z[at];

    let low = low_rank::<Q>(parts, place.sequence, c);
    let mut delta = 0.0f32;
    #[unroll]
    for i in 0..ranks {
        let vector = comptime!(i * lanes) + lane;
        let weight = Vector::<f32, T>::cast_from(ahead.weights[i]);
        #[unroll]
        for k in 0..T::value() {
            let index = min(vector, comptime!(rank_vectors - 1).runtime()) * T::value() + k;
            let term = weight.extract(k) * low[index];
            delta += select(vector < rank_vectors, term, 0.0f32);
        }
    }
    let delta = lane_sum(delta, lanes, 1usize) + ahead.numbers[0];
    let delta = step_size(delta, true, c.ptx);
    let scaled = delta * input;
    let mut sum = 0.0f32;
    #[unroll]
    for i in 0..held {
        let vector = comptime!(i * lanes) + lane;
        let within = vector < state_vectors;
        let n = min(vector, comptime!(state_vectors - 1).runtime()) * S::value();
        let mut next = Vector::<f32, S>::new(0.0f32);
        #[unroll]
        for k in 0..S::value() {
            let b = low[comptime!(c.rank) + n + k];
            let out = low[comptime!(c.rank + c.states) + n + k];
            let exponent = delta * ahead.rate[i].extract(k);
            let decay = exp2(exponent, c.ptx);
            let value = fma(decay, ahead.state[i].extract(k), scaled * b);
            next.insert(k, value);
            sum += select(within, value * out, 0.0f32);
        }
        if inside && within {
            h[state_row * state_vectors + vector] = next;
        }
    }
    let value = fma(ahead.numbers[1], input, lane_sum(sum, lanes, 1usize));
    let value = value * gate * sigmoid(gate, c.ptx);
    if inside && lane == 0 {
        y[at] = Vector::new(Y::cast_from(value));
    }
}

/// The low-rank product of a sequence, `[R + 2N]`, from its parts.
#[cube]
fn low_rank<Q: Size>(
    parts: &mut [One],
    sequence: usize,
    #[comptime] c: StepConfig,
) -> Shared<[f32]> {
    let unit = UNIT_POS as usize;
    let columns = comptime!(c.low() / c.low_vector);
    let slices = comptime!(c.slices());
    let rounds = comptime!(c.parts.div_ceil(slices));
    let mut scratch = Shared::<[Vector<f32, Q>]>::new_slice(comptime!(columns * slices));
    let mut low = Shared::<[f32]>::new_slice(comptime!(c.low()));
    let column = unit % columns;
    let slice = unit / columns;
    // Others may still read what came before.
    sync_cube();
    if slice < slices {
        let mut sum = Vector::<f32, Q>::new(0.0f32);
        #[unroll]
        for i in 0..rounds {
            let part = comptime!(i * slices) + slice;
            if part < comptime!(c.parts) {
                let at = (sequence * comptime!(c.parts) + part) * columns + column;
                sum += wide_at::<Q>(parts, at, c.ptx);
            }
        }
        scratch[slice * columns + column] = sum;
    }
    sync_cube();
    if unit < columns {
        let mut sum = Vector::<f32, Q>::new(0.0f32);
        #[unroll]
        for i in 0..slices {
            sum += scratch[comptime!(i * columns) + unit];
        }
        #[unroll]
        for k in 0..Q::value() {
            low[unit * Q::value() + k] = sum.extract(k);
        }
    }
    sync_cube();
    low
}

/// What a unit loads for [`leave`] before it waits for y.
#[derive(CubeType)]
pub(super) struct LeaveAhead<W: Float, V: Size> {
    weights: Array<Vector<W, V>>,
}

/// An empty [`LeaveAhead`].
#[cube]
pub(super) fn no_leave<W: Float, V: Size>(#[comptime] c: StepConfig) -> LeaveAhead<W, V> {
    LeaveAhead::<W, V> {
        weights: Array::new(comptime!(c.loads(c.out_vectors())[0])),
    }
}

/// Reads the plane's part of a row of `out_proj`, as [`read_row`] does.
#[cube]
fn read_part<W: Float, V: Size>(
    out_proj: &[Vector<W, V>],
    weights: &mut Array<Vector<W, V>>,
    layer: usize,
    cube: usize,
    #[comptime] round: usize,
    #[comptime] c: StepConfig,
) {
    let vectors = comptime!(c.inner / c.vector);
    let loads = comptime!(c.loads(c.out_vectors())[0]);
    let lane = UNIT_POS as usize % comptime!(c.plane);
    let plane = UNIT_POS as usize / comptime!(c.plane);
    let column = cube * comptime!(c.out_rows) + plane / comptime!(c.split);
    let row = layer * comptime!(c.width) + min(column, comptime!(c.width - 1).runtime());
    let first = plane % comptime!(c.split) * comptime!(c.out_vectors());
    #[unroll]
    for i in 0..loads {
        let place = first + comptime!((round * loads + i) * c.plane) + lane;
        weights[i] = out_proj[row * vectors + min(place, comptime!(vectors - 1).runtime())];
    }
}

/// Loads ahead for [`leave`].
#[cube]
pub(super) fn load_leave<W: Float, V: Size>(
    ahead: &mut LeaveAhead<W, V>,
    out_proj: &[Vector<W, V>],
    layer: usize,
    cube: usize,
    #[comptime] c: StepConfig,
) {
    read_part(out_proj, &mut ahead.weights, layer, cube, 0usize, c);
}

/// `out_proj`, added to the stream. A row is divided among a few planes.
///
/// - y: `[B, E]`; out_proj: `[layers, D, E]`; stream: `[B, D]`
#[cube]
pub(super) fn leave<W: Float, V: Size>(
    ahead: &mut LeaveAhead<W, V>,
    y: &mut [One],
    out_proj: &[Vector<W, V>],
    widths: &[f32],
    stream: &mut [One],
    layer: usize,
    batch: usize,
    cube: usize,
    #[comptime] c: StepConfig,
) {
    let unit = UNIT_POS as usize;
    let lane = unit % comptime!(c.plane);
    let plane = unit / comptime!(c.plane);
    let vectors = comptime!(c.inner / c.vector);
    let per_part = comptime!(c.out_vectors());
    let loads = comptime!(c.loads(per_part)[0]);
    let rounds = comptime!(c.loads(per_part)[1]);
    let mut shared = Shared::<[f32]>::new_slice(comptime!(c.planes() * c.group));
    let column = cube * comptime!(c.out_rows) + plane / comptime!(c.split);
    let part = plane % comptime!(c.split);
    let inside = plane < comptime!(c.out_rows * c.split) && column < comptime!(c.width);
    let column = min(column, comptime!(c.width - 1).runtime());
    let first_place = part * per_part;
    let end = min(first_place + per_part, vectors);
    let bias = widths[(layer * WIDTH_NUMBERS + OUT_BIAS) * comptime!(c.width) + column];
    for group in 0..batch.div_ceil(comptime!(c.group)) {
        let first = group * comptime!(c.group);
        let sequence = first + lane;
        let at = min(sequence, batch - 1) * comptime!(c.width) + column;
        let before = stream[at].extract(0usize);
        let mut sums = Array::<f32>::new(comptime!(c.group));
        #[unroll]
        for b in 0..c.group {
            sums[b] = 0.0f32;
        }
        #[unroll]
        for round in 0..rounds {
            if comptime!(rounds > 1) {
                if comptime!(round > 0) || group > 0 {
                    read_part(out_proj, &mut ahead.weights, layer, cube, round, c);
                }
            }
            #[unroll]
            for i in 0..loads {
                let place = first_place + comptime!((round * loads + i) * c.plane) + lane;
                let weight = Vector::<f32, V>::cast_from(ahead.weights[i]);
                if place < end {
                    #[unroll]
                    for b in 0..c.group {
                        let row = min(first + b, batch - 1) * vectors;
                        let x = wide_at::<V>(y, row + place, c.ptx);
                        sums[b] = dot(weight, x, sums[b]);
                    }
                }
            }
        }
        let mut sum = own_sum(&sums, lane, 0usize, c);
        if comptime!(c.split > 1) {
            // Others may still read the group before.
            sync_cube();
            if lane < comptime!(c.group) {
                shared[plane * comptime!(c.group) + lane] = sum;
            }
            sync_cube();
            #[unroll]
            for i in 1..c.split {
                let other = min(plane + i, comptime!(c.planes() - 1).runtime());
                sum += shared
                    [other * comptime!(c.group) + min(lane, comptime!(c.group - 1).runtime())];
            }
        }
        if inside && part == 0 && lane < comptime!(c.group) && sequence < batch {
            stream[at] = Vector::new(before + sum + bias);
        }
    }
}

/// The last norm and the logits.
///
/// - norm: `[2, D]`; head: `[V, D]`; logits: `[B, V]`
#[cube]
pub(super) fn head<W: Float, V: Size>(
    stream: &mut [One],
    norm: &[Vector<f32, V>],
    head: &[Vector<W, V>],
    logits: &mut [f32],
    batch: usize,
    cube: usize,
    eps: f32,
    #[comptime] c: StepConfig,
) {
    let unit = UNIT_POS as usize;
    let lane = unit % comptime!(c.plane);
    let plane = unit / comptime!(c.plane);
    let vectors = comptime!(c.width / c.vector);
    let loads = comptime!(c.loads(vectors)[0]);
    let rounds = comptime!(c.loads(vectors)[1]);
    let row = cube * comptime!(c.head_rows) + plane;
    let inside = plane < comptime!(c.head_rows) && row < comptime!(c.rows);
    let row = min(row, comptime!(c.rows - 1).runtime());
    let mut hat = Shared::<[Vector<f32, V>]>::new_slice(comptime!(c.group * c.padded_width()));
    let mut weights = Array::<Vector<W, V>>::new(loads);
    read_row(head, &mut weights, row, vectors, 0usize, c);
    for group in 0..batch.div_ceil(comptime!(c.group)) {
        let first = group * comptime!(c.group);
        sync_cube();
        normalise(
            stream, norm, &mut hat, first, batch, 0usize, eps, c.norm_f, c,
        );
        sync_cube();
        let mut sums = Array::<f32>::new(comptime!(c.group));
        #[unroll]
        for b in 0..c.group {
            sums[b] = 0.0f32;
        }
        #[unroll]
        for round in 0..rounds {
            if comptime!(rounds > 1) {
                read_row(head, &mut weights, row, vectors, round, c);
            }
            add_products(&weights, &hat, &mut sums, 0usize, round, c);
        }
        let sum = own_sum(&sums, lane, 0usize, c);
        let sequence = first + lane;
        if inside && lane < comptime!(c.group) && sequence < batch {
            logits[sequence * comptime!(c.rows) + row] = sum;
        }
    }
}
