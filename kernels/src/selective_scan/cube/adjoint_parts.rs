//! Steps of the main backward kernel: where a unit sits, the recurrences of a sub-chunk, and the
//! sums over channels and states.

use cubecl::prelude::*;

use super::common::{Elements, V2, V4, decay_step, gates_at};
use super::plan::{FOURS, PAIRS, SUB, Spaced, SweepConfig};
use crate::cube::math::{exp2, sigmoid, softplus_exp, softplus_of, softplus_slope_of};
use crate::cube::wide::{One, put_wide_at, wide_at};

/// Where a unit works in the main kernel, state-wise.
#[derive(CubeType)]
pub(super) struct Seat {
    /// The part of the states it has.
    pub part: usize,
    /// Its first channel within the cube; the others follow at `config.spacing()`.
    pub column: usize,
    /// The cube's first channel.
    pub channel0: usize,
    pub inner: usize,
}

/// The seat of the unit in cube number `cube` of its chunk.
#[cube]
pub(super) fn seat(cube: usize, inner: usize, #[comptime] config: SweepConfig) -> Seat {
    let unit = UNIT_POS as usize;
    Seat {
        part: unit / comptime!(config.spacing()),
        column: unit % comptime!(config.spacing()),
        channel0: cube * comptime!(config.channels()),
        inner,
    }
}

/// The unit's channel number `c`, or the last channel for those beyond it.
#[cube]
pub(super) fn channel(seat: &Seat, #[comptime] c: usize, #[comptime] config: SweepConfig) -> usize {
    let own = seat.channel0 + seat.column + comptime!(c * config.spacing());
    min(own, seat.inner - 1)
}

/// What a stage needs of the activations at a unit's positions, element-wise, as it is stored.
#[derive(CubeType)]
pub(super) struct Activations<U: Float, D: Float, Z: Float, V: Size> {
    pub u: Array<Vector<U, V>>,
    pub delta: Array<Vector<D, V>>,
    pub dy: Array<Vector<U, V>>,
    pub z: Array<Vector<Z, V>>,
}

/// Gradients that are written into the buffer of an input: every position is read by the unit that
/// writes it, before it does, and by no other unit that uses what it reads. The kernel then reads the
/// input through the gradient's buffer, so that no buffer is bound twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct InPlace {
    /// The gradient of delta in the place of delta.
    pub delta: bool,
    /// The gradient of u in the place of dy.
    pub dy: bool,
}

/// Loads the activations of the stage from position `t0` on. `first` is the chunk's first position,
/// `last` the number of its last.
#[cube]
pub(super) fn fetch_activations<U: Float, D: Float, Z: Float, V: Size>(
    u: &[Vector<U, V>],
    delta: &[Vector<D, V>],
    z: &ComptimeOption<Box<[Vector<Z, V>]>>,
    dy: &[Vector<U, V>],
    du: &mut [Vector<U, V>],
    ddelta: &mut [Vector<D, V>],
    fetched: &mut Activations<U, D, Z, V>,
    own: &Elements,
    first: usize,
    t0: usize,
    last: usize,
    inner: usize,
    z_stride: usize,
    #[comptime] in_place: InPlace,
    #[comptime] config: SweepConfig,
) {
    let vector = comptime!(config.vector);
    #[unroll]
    for p in 0..comptime!(config.passes()) {
        let position = first + min(t0 + own.turn + comptime!(p * config.stride()), last);
        let at = (position * inner + own.channel) / vector;
        fetched.u[p] = u[at];
        fetched.delta[p] = if in_place.delta {
            ddelta[at]
        } else {
            delta[at]
        };
        fetched.dy[p] = if in_place.dy { du[at] } else { dy[at] };
        fetched.z[p] = gates_at(z, (position * z_stride + own.channel) / vector);
    }
}

/// Where channel `column` of a stage is in a row.
#[cube]
pub(super) fn slot(column: usize, #[comptime] row: Spaced) -> usize {
    column + column / comptime!(row.run) * comptime!(row.gap)
}

/// Where the unit's channel `i` is.
#[cube]
fn own_slot(
    seat: &Seat,
    #[comptime] i: usize,
    #[comptime] row: Spaced,
    #[comptime] config: SweepConfig,
) -> usize {
    let spacing = comptime!(config.spacing());
    if comptime!(spacing % row.run == 0) {
        slot(seat.column, row) + comptime!(i * row.places(spacing))
    } else {
        slot(seat.column + comptime!(i * spacing), row)
    }
}

/// Puts (Δ, Δ·u, gated dy, slope of Δ) of the stage's positions into shared memory.
#[cube]
pub(super) fn put_steps<U: Float, D: Float, Z: Float, V: Size>(
    fetched: &Activations<U, D, Z, V>,
    bias: Vector<f32, V>,
    steps: &mut Shared<[V4]>,
    own: &Elements,
    rows: usize,
    #[comptime] gated: bool,
    #[comptime] config: SweepConfig,
) {
    let vector = comptime!(config.vector);
    let pitch = comptime!(FOURS.places(config.channels()));
    let slot = slot(own.column, FOURS);
    #[unroll]
    for p in 0..comptime!(config.passes()) {
        let t = own.turn + comptime!(p * config.stride());
        let valid = own.inside && t < rows;
        let us = fetched.u[p];
        let deltas = fetched.delta[p];
        let dys = fetched.dy[p];
        let gates = fetched.z[p];
        #[unroll]
        for i in 0..vector {
            let raw = f32::cast_from(deltas.extract(i)) + bias.extract(i);
            let mut dt = raw;
            let mut slope = 1.0f32;
            if config.softplus {
                let e = softplus_exp(raw, config.ptx);
                dt = softplus_of(raw, e);
                slope = softplus_slope_of(raw, e, config.ptx);
            }
            let mut w = f32::cast_from(dys.extract(i));
            if gated {
                let gate = f32::cast_from(gates.extract(i));
                w = w * gate * sigmoid(gate, config.ptx);
            }
            // Positions and channels beyond the last leave state and adjoint as they are.
            let dt = select(valid, dt, 0.0f32);
            let mut step = V4::new(slope);
            step.insert(0usize, dt);
            step.insert(1usize, dt * f32::cast_from(us.extract(i)));
            step.insert(2usize, select(valid, w, 0.0f32));
            if comptime!(config.exact()) {
                steps[t * pitch + slot + i] = step;
            } else {
                if t < comptime!(config.tile) {
                    steps[t * pitch + slot + i] = step;
                }
            }
        }
    }
}

/// One channel of the unit passes the sub-chunk: states and decays left to right from the states
/// `before` it, then adjoints right to left. `g` and `da` are updated, the
/// contributions to dB and dC put or added into `over` (`[SUB, 2, per_lane]`), the lane's parts of
/// the sums over states, dx and dΔ through the decay, put into `sum_x` and `sum_decay`.
#[cube]
pub(super) fn pass_sub_chunk(
    before: &Array<V4>,
    g: &mut Array<f32>,
    da: &mut Array<f32>,
    over: &mut Array<f32>,
    sum_x: &mut Array<f32>,
    sum_decay: &mut Array<f32>,
    rates: &Array<f32>,
    steps: &Shared<[V4]>,
    b_tile: &Shared<[V4]>,
    c_tile: &Shared<[V4]>,
    clears: &Shared<[f32]>,
    seat: &Seat,
    #[comptime] i: usize,
    #[comptime] resets: bool,
    #[comptime] config: SweepConfig,
) {
    let per_lane = comptime!(config.per_lane);
    let offset = comptime!(i * config.per_lane);
    let pitch = comptime!(FOURS.places(config.channels()));
    let step0 = own_slot(seat, i, FOURS, config);
    let row0 = seat.part * comptime!(per_lane / 4);
    let mut h = Array::<f32>::new(comptime!((SUB + 1) * per_lane));
    let mut decays = Array::<f32>::new(comptime!(SUB * per_lane));
    #[unroll]
    for k in 0..per_lane {
        h[k] = before[comptime!((offset + k) / 4)].extract(comptime!(k % 4));
    }
    #[unroll]
    for t in 0..SUB {
        let step = steps[step0 + comptime!(t * pitch)];
        let dt = decay_step(step.extract(0usize), clears, t, resets);
        let x = step.extract(1usize);
        #[unroll]
        for q in 0..comptime!(per_lane / 4) {
            let bs = b_tile[row0 + comptime!(t * config.states() / 4 + q)];
            #[unroll]
            for k in 0..4usize {
                let n = comptime!(q * 4 + k);
                let decay = exp2(dt * rates[comptime!(offset + n)], config.ptx);
                decays[comptime!(t * per_lane + n)] = decay;
                h[comptime!((t + 1) * per_lane + n)] =
                    fma(decay, h[comptime!(t * per_lane + n)], x * bs.extract(k));
            }
        }
    }
    #[unroll]
    for back in 0..SUB {
        let t = comptime!(SUB - 1 - back);
        let step = steps[step0 + comptime!(t * pitch)];
        let dt = step.extract(0usize);
        let x = step.extract(1usize);
        let w = step.extract(2usize);
        let mut dx = 0.0f32;
        let mut ddecay = 0.0f32;
        #[unroll]
        for q in 0..comptime!(per_lane / 4) {
            let bs = b_tile[row0 + comptime!(t * config.states() / 4 + q)];
            let cs = c_tile[row0 + comptime!(t * config.states() / 4 + q)];
            #[unroll]
            for k in 0..4usize {
                let s = comptime!(q * 4 + k);
                let n = comptime!(offset + q * 4 + k);
                let after = h[comptime!((t + 1) * per_lane + s)];
                let here = fma(w, cs.extract(k), g[n]);
                let left = here * decays[comptime!(t * per_lane + s)];
                let through = left * h[comptime!(t * per_lane + s)];
                let to_b = comptime!(t * 2 * per_lane + s);
                let to_c = comptime!((t * 2 + 1) * per_lane + s);
                if comptime!(i == 0) {
                    over[to_b] = here * x;
                    over[to_c] = w * after;
                } else {
                    over[to_b] = fma(here, x, over[to_b]);
                    over[to_c] = fma(w, after, over[to_c]);
                }
                if comptime!(q == 0 && k == 0) {
                    dx = here * bs.extract(k);
                    ddecay = through * rates[n];
                } else {
                    dx = fma(here, bs.extract(k), dx);
                    ddecay = fma(through, rates[n], ddecay);
                }
                da[n] = fma(through, dt, da[n]);
                g[n] = left;
            }
        }
        sum_x[t] = dx;
        sum_decay[t] = ddecay;
    }
}

/// Puts channel `i`'s parts of the sums over states, (dx, dΔ through the decay), into the rows of
/// `sums`, `[lanes, SUB, channels]`, each row spaced.
#[cube]
pub(super) fn put_sums(
    dx: &Array<f32>,
    ddecay: &Array<f32>,
    sums: &mut Shared<[V2]>,
    seat: &Seat,
    #[comptime] i: usize,
    #[comptime] config: SweepConfig,
) {
    let pitch = comptime!(PAIRS.places(config.channels()));
    let own = own_slot(seat, i, PAIRS, config);
    let row0 = seat.part * comptime!(SUB * pitch);
    #[unroll]
    for t in 0..SUB {
        let mut two = V2::new(dx[t]);
        two.insert(1usize, ddecay[t]);
        sums[row0 + comptime!(t * pitch) + own] = two;
    }
}

/// The sums over states of position `t` and `count` neighbouring channels from `column` on.
#[cube]
pub(super) fn sum_states(
    sums: &Shared<[V2]>,
    t: usize,
    column: usize,
    #[comptime] count: usize,
    #[comptime] config: SweepConfig,
) -> Array<V2> {
    let pitch = comptime!(PAIRS.places(config.channels()));
    let at = t * pitch + slot(column, PAIRS);
    let mut totals = Array::<V2>::new(count);
    #[unroll]
    for i in 0..count {
        let mut sum = sums[at + i];
        #[unroll]
        for part in 1..comptime!(config.lanes) {
            sum += sums[at + comptime!(part * SUB * pitch) + i];
        }
        totals[i] = sum;
    }
    totals
}

/// Puts a unit's contributions to dB and dC of a stage into `crossing`, whose rows
/// [`SweepConfig::crossing`] describes.
#[cube]
pub(super) fn put_contributions(
    over: &Array<f32>,
    crossing: &mut Shared<[One]>,
    seat: &Seat,
    #[comptime] config: SweepConfig,
) {
    let at = seat.part * comptime!(config.spacing() + 1) + seat.column;
    #[unroll]
    for row in 0..comptime!(SUB * 2 * config.per_lane / 4) {
        let mut four = V4::new(0.0f32);
        #[unroll]
        for k in 0..4usize {
            four.insert(k, over[comptime!(row * 4 + k)]);
        }
        let row0 = comptime!(row * config.crossing());
        put_wide_at::<Const<4>>(crossing, row0 + at, four, config.ptx);
    }
}

/// Sums the units' contributions to dB and dC of a stage over the cube's channels: its partials, from
/// row `row` of `sums_bc` on.
#[cube]
pub(super) fn sum_channels(
    sums_bc: &mut [V2],
    crossing: &mut Shared<[One]>,
    row: usize,
    #[comptime] config: SweepConfig,
) {
    let units = comptime!(config.units);
    let pairs = comptime!(config.per_lane / 2);
    let count = comptime!(SUB * config.states());
    #[unroll]
    for p in 0..comptime!(count.div_ceil(units)) {
        let at = UNIT_POS as usize + comptime!(p * units);
        if at < count {
            // In the order of `sums_bc`: position and kind, part, pair of states.
            let pair = at % pairs;
            let part = at / pairs % comptime!(config.lanes);
            let of = at / comptime!(pairs * config.lanes);
            let vector = (of * comptime!(config.per_lane / 4) + pair / 2)
                * comptime!(config.crossing())
                + part * comptime!(config.spacing() + 1);
            let from = vector * 2 + pair % 2;
            let mut sum = wide_at::<Const<2>>(crossing, from, config.ptx);
            #[unroll]
            for column in 1..comptime!(config.spacing()) {
                sum += wide_at::<Const<2>>(crossing, from + comptime!(2 * column), config.ptx);
            }
            sums_bc[row * comptime!(config.states()) + at] = sum;
        }
    }
}
