//! The second phase of a layer.

use cubecl::prelude::*;

use super::{CHANNEL_NUMBERS, DT_BIAS, SKIP, StepConfig};
use crate::cube::math::{exp2, sigmoid, step_size};
use crate::cube::reduce::{lane_sum, tree_sum};
use crate::cube::wide::{One, wide_at};
use crate::cube::words::{Words, load_now, number};

/// What a unit loads for [`advance`] before it waits for u, z and the parts.
#[derive(CubeType)]
pub(in crate::decode::cube) struct AdvanceAhead<T: Size, S: Size> {
    /// The lane's states, their rates, and its weights of `dt_proj`.
    pub state: Array<Vector<f32, S>>,
    rate: Array<Vector<f32, S>>,
    weights: Array<Words<T>>,
    /// Bias of Δ, and d.
    numbers: Array<f32>,
}

/// An empty [`AdvanceAhead`].
#[cube]
pub(in crate::decode::cube) fn no_advance<T: Size, S: Size>(
    #[comptime] c: StepConfig,
) -> AdvanceAhead<T, S> {
    AdvanceAhead::<T, S> {
        state: Array::new(comptime!(c.held())),
        rate: Array::new(comptime!(c.held())),
        weights: Array::new(comptime!(c.ranks())),
        numbers: Array::new(2usize),
    }
}

/// A sequence and the channel of a unit, one of the lanes that share its states; `inside` is false
/// where there is no such channel.
#[derive(CubeType)]
pub(in crate::decode::cube) struct Place {
    pub sequence: usize,
    pub channel: usize,
    pub lane: usize,
    pub inside: bool,
}

/// The place of this unit in the cube that has block `block` of a sequence's channels.
#[cube]
pub(in crate::decode::cube) fn place(
    sequence: usize,
    block: usize,
    #[comptime] c: StepConfig,
) -> Place {
    let lanes = comptime!(c.lanes());
    let unit = UNIT_POS as usize;
    let place = unit / lanes;
    let channel = block * comptime!(c.block) + place;
    Place {
        sequence,
        channel: min(channel, comptime!(c.inner - 1).runtime()),
        lane: unit % lanes,
        inside: place < comptime!(c.block) && channel < comptime!(c.inner),
    }
}

/// Loads ahead for the recurrence at `place`.
#[cube]
pub(in crate::decode::cube) fn load_advance<T: Size, S: Size>(
    ahead: &mut AdvanceAhead<T, S>,
    channels: &[One],
    dt_proj: &[Words<T>],
    rates: &[Vector<f32, S>],
    h: &mut [Vector<f32, S>],
    layer: usize,
    batch: usize,
    place: &Place,
    #[comptime] c: StepConfig,
) {
    load_parameters(ahead, channels, dt_proj, rates, layer, place, c);
    load_states(&mut ahead.state, h, layer, batch, place, c);
}

/// The place of this unit in a cube that has the channels of a cube of the first phase, of every
/// sequence: sequence by sequence.
#[cube]
pub(in crate::decode::cube) fn place_in_entering_cube(
    cube: usize,
    batch: usize,
    #[comptime] c: StepConfig,
) -> Place {
    let lanes = comptime!(c.lanes());
    let unit = UNIT_POS as usize;
    let place = unit / lanes;
    let sequence = place / comptime!(c.channels);
    let channel = cube * comptime!(c.channels) + place % comptime!(c.channels);
    Place {
        sequence: min(sequence, batch - 1),
        channel: min(channel, comptime!(c.inner - 1).runtime()),
        lane: unit % lanes,
        inside: sequence < batch && channel < comptime!(c.inner),
    }
}

/// Loads the states of the lane.
#[cube]
pub(in crate::decode::cube) fn load_states<S: Size>(
    into: &mut Array<Vector<f32, S>>,
    h: &mut [Vector<f32, S>],
    layer: usize,
    batch: usize,
    place: &Place,
    #[comptime] c: StepConfig,
) {
    let states = comptime!(c.states / c.state_vector);
    let own = (layer * batch + place.sequence) * comptime!(c.inner) + place.channel;
    #[unroll]
    for i in 0..comptime!(c.held()) {
        let vector = comptime!(i * c.lanes()) + place.lane;
        let at = own * states + min(vector, comptime!(states - 1).runtime());
        into[i] = h[at];
    }
}

/// Loads what a lane needs of its channel's parameters.
#[cube]
pub(in crate::decode::cube) fn load_parameters<T: Size, S: Size>(
    ahead: &mut AdvanceAhead<T, S>,
    channels: &[One],
    dt_proj: &[Words<T>],
    rates: &[Vector<f32, S>],
    layer: usize,
    place: &Place,
    #[comptime] c: StepConfig,
) {
    let lanes = comptime!(c.lanes());
    let states = comptime!(c.states / c.state_vector);
    let ranks = comptime!(c.rank / c.rank_vector);
    let row = layer * comptime!(c.inner) + place.channel;
    #[unroll]
    for i in 0..comptime!(c.held()) {
        let vector = comptime!(i * lanes) + place.lane;
        let at = row * states + min(vector, comptime!(states - 1).runtime());
        ahead.rate[i] = load_now(rates, at, c.ptx);
    }
    #[unroll]
    for i in 0..comptime!(c.ranks()) {
        let vector = comptime!(i * lanes) + place.lane;
        let at = row * ranks + min(vector, comptime!(ranks - 1).runtime());
        ahead.weights[i] = load_now(dt_proj, at, c.ptx);
    }
    let numbers = row * comptime!(c.taps + CHANNEL_NUMBERS);
    ahead.numbers[0] =
        load_now(channels, numbers + comptime!(c.taps + DT_BIAS), c.ptx).extract(0usize);
    ahead.numbers[1] =
        load_now(channels, numbers + comptime!(c.taps + SKIP), c.ptx).extract(0usize);
}

/// Δ, B and C from the parts, then one step of the recurrence and the gate at `place`.
///
/// - parts as [`enter`](super::enter) leaves them; u, z, y: `[B, E]`; h: `[layers, B, E, N]`
#[cube]
pub(in crate::decode::cube) fn advance<T: Size, S: Size, Q: Size>(
    ahead: &AdvanceAhead<T, S>,
    parts: &mut [One],
    u: &mut [f32],
    z: &mut [f32],
    h: &mut [Vector<f32, S>],
    y: &mut [One],
    layer: usize,
    batch: usize,
    place: &Place,
    #[comptime] c: StepConfig,
) {
    let at = place.sequence * comptime!(c.inner) + place.channel;
    let input = u[at];
    let gate = z[at];
    let low = low_rank::<Q>(parts, place.sequence, c);
    let value = recur(
        ahead,
        &low,
        0usize.runtime(),
        input,
        gate,
        h,
        layer,
        batch,
        place,
        c,
    );
    if place.inside && place.lane == 0 {
        y[at] = Vector::new(value);
    }
}

/// One step of a channel's recurrence, and the gated output, in every lane; the low-rank product
/// `[R + 2N]` begins at `from`.
///
/// - dt_proj: `[layers, E, R]`; rates: `[layers, E, N]`, times log₂ e; h: `[layers, B, E, N]`
#[cube]
pub(in crate::decode::cube) fn recur<T: Size, S: Size>(
    ahead: &AdvanceAhead<T, S>,
    low: &Shared<[f32]>,
    from: usize,
    input: f32,
    gate: f32,
    h: &mut [Vector<f32, S>],
    layer: usize,
    batch: usize,
    place: &Place,
    #[comptime] c: StepConfig,
) -> f32 {
    let lanes = comptime!(c.lanes());
    let state_vectors = comptime!(c.states / c.state_vector);
    let rank_vectors = comptime!(c.rank / c.rank_vector);
    let state_row = (layer * batch + place.sequence) * comptime!(c.inner) + place.channel;
    let mut delta = 0.0f32;
    #[unroll]
    for i in 0..comptime!(c.ranks()) {
        let vector = comptime!(i * lanes) + place.lane;
        let first = min(vector, comptime!(rank_vectors - 1).runtime());
        let first = from + first * comptime!(c.rank_vector);
        let mut term = 0.0f32;
        #[unroll]
        for k in 0..comptime!(c.rank_vector) {
            term = fma(number(ahead.weights[i], k, c.halves), low[first + k], term);
        }
        delta += select(vector < rank_vectors, term, 0.0f32);
    }
    let delta = lane_sum(delta, lanes, 1usize) + ahead.numbers[0];
    let delta = step_size(delta, true, c.ptx);
    let scaled = delta * input;
    let mut sum = 0.0f32;
    #[unroll]
    for i in 0..comptime!(c.held()) {
        let vector = comptime!(i * lanes) + place.lane;
        let within = vector < state_vectors;
        let n = min(vector, comptime!(state_vectors - 1).runtime()) * S::value();
        let mut next = Vector::<f32, S>::new(0.0f32);
        #[unroll]
        for k in 0..S::value() {
            let b = low[from + comptime!(c.rank) + n + k];
            let out = low[from + comptime!(c.rank + c.states) + n + k];
            let exponent = delta * ahead.rate[i].extract(k);
            let decay = exp2(exponent, c.ptx);
            let value = fma(decay, ahead.state[i].extract(k), scaled * b);
            next.insert(k, value);
            sum += select(within, value * out, 0.0f32);
        }
        if place.inside && within {
            h[state_row * state_vectors + vector] = next;
        }
    }
    let value = fma(ahead.numbers[1], input, lane_sum(sum, lanes, 1usize));
    value * gate * sigmoid(gate, c.ptx)
}

/// The part that a slice adds as its number `i`: neighbours together, so that they can be read so.
#[cube]
pub(in crate::decode::cube) fn part(
    #[comptime] i: usize,
    slice: usize,
    #[comptime] c: StepConfig,
) -> usize {
    let each = comptime!(c.part_each());
    (comptime!(i / each * c.slices()) + slice) * each + comptime!(i % each)
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
    let rounds = comptime!(c.part_groups() * c.part_each());
    let mut scratch = Shared::<[f32]>::new_slice(comptime!(c.low() * slices));
    let mut low = Shared::<[f32]>::new_slice(comptime!(c.low()));
    let column = unit % columns;
    let slice = unit / columns;
    // Others may still read what came before.
    sync_cube();
    if slice < slices {
        // All loads before the first use.
        let mut own = Array::<Vector<f32, Q>>::new(rounds);
        #[unroll]
        for i in 0..rounds {
            let part = min(part(i, slice, c), comptime!(c.parts - 1).runtime());
            let at = (sequence * comptime!(c.parts) + part) * columns + column;
            own[i] = wide_at::<Q>(parts, at, c.ptx);
        }
        let mut sum = own[0];
        #[unroll]
        for i in 1..rounds {
            let inside = part(i, slice, c) < comptime!(c.parts);
            sum += select(inside, own[i], Vector::new(0.0f32));
        }
        #[unroll]
        for k in 0..Q::value() {
            scratch[slice * comptime!(c.low()) + column * Q::value() + k] = sum.extract(k);
        }
    }
    sync_cube();
    if unit < comptime!(c.low()) {
        let mut sums = Array::<f32>::new(slices);
        #[unroll]
        for i in 0..slices {
            sums[i] = scratch[comptime!(i * c.low()) + unit];
        }
        low[unit] = tree_sum(&mut sums, slices);
    }
    sync_cube();
    low
}
