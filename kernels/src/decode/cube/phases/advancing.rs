//! The second phase of a layer.

use cubecl::prelude::*;

use super::{CHANNEL_NUMBERS, DT_BIAS, One, SKIP, StepConfig, wide_at};
use crate::cube::math::{exp2, sigmoid, step_size};
use crate::cube::reduce::lane_sum;

/// What a unit loads for [`advance`] before it waits for u, z and the parts.
#[derive(CubeType)]
pub(in crate::decode::cube) struct AdvanceAhead<W: Float, T: Size, S: Size> {
    /// The lane's states, their rates, and its weights of `dt_proj`.
    state: Array<Vector<f32, S>>,
    rate: Array<Vector<f32, S>>,
    weights: Array<Vector<W, T>>,
    /// Bias of Δ, and d.
    numbers: Array<f32>,
}

/// An empty [`AdvanceAhead`].
#[cube]
pub(in crate::decode::cube) fn no_advance<W: Float, T: Size, S: Size>(
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
pub(in crate::decode::cube) fn load_advance<W: Float, T: Size, S: Size>(
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
pub(in crate::decode::cube) fn advance<W: Float, Y: Float, T: Size, S: Size, Q: Size>(
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
