//! Steps of the main backward kernel: where a unit sits, the recurrences of a sub-chunk, and the
//! sums over channels and states.

use cubecl::prelude::*;

use super::common::{Elements, V2, V4, decay_step, gates_at};
use super::plan::{SUB, SweepConfig};
use crate::cube::math::{exp2, sigmoid, softplus_exp, softplus_of, softplus_slope_of};
use crate::cube::reduce::{spread_start, spread_sum, spread_width, spread_writer};

/// Where a unit works in the main kernel, state-wise.
#[derive(CubeType)]
pub(super) struct Seat {
    /// Plane and lane of the unit.
    pub plane: usize,
    pub lane: usize,
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
    let across = comptime!(config.plane / config.lanes);
    let unit = UNIT_POS as usize;
    let plane = unit / comptime!(config.plane);
    let lane = unit % comptime!(config.plane);
    Seat {
        plane,
        lane,
        part: lane / across,
        column: plane * across + lane % across,
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
    let columns = comptime!(config.channels());
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
                dt = softplus_of(raw, e, config.ptx);
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
                steps[t * columns + own.column + i] = step;
            } else {
                if t < comptime!(config.tile) {
                    steps[t * columns + own.column + i] = step;
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
    let step0 = seat.column + comptime!(i * config.spacing());
    let row0 = seat.part * comptime!(per_lane / 4);
    let mut h = Array::<f32>::new(comptime!((SUB + 1) * per_lane));
    let mut decays = Array::<f32>::new(comptime!(SUB * per_lane));
    #[unroll]
    for k in 0..per_lane {
        h[k] = before[comptime!((offset + k) / 4)].extract(comptime!(k % 4));
    }
    #[unroll]
    for t in 0..SUB {
        let step = steps[step0 + comptime!(t * config.channels())];
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
        let step = steps[step0 + comptime!(t * config.channels())];
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

/// Sums the planes' contributions to dB and dC of a stage: the cube's partials, from row `row`
/// of `sums_bc` on.
#[cube]
pub(super) fn sum_planes(
    sums_bc: &mut [V4],
    plane_sums: &Shared<[V4]>,
    row: usize,
    #[comptime] config: SweepConfig,
) {
    let units = comptime!(config.units);
    let width = comptime!(config.states() / 2);
    let vectors = comptime!(config.tile * config.states() / 2);
    #[unroll]
    for p in 0..comptime!(vectors.div_ceil(units)) {
        let at = UNIT_POS as usize + comptime!(p * units);
        if at < vectors {
            let mut sum = plane_sums[at];
            #[unroll]
            for plane in 1..comptime!(units / config.plane) {
                sum += plane_sums[at + comptime!(plane * vectors)];
            }
            sums_bc[row * width + at] = sum;
        }
    }
}

/// Sums a sub-chunk's contributions to dB and dC over the channels of the plane, into the plane's
/// rows of `plane_sums`.
#[cube]
pub(super) fn sum_channels(
    values: &mut Array<f32>,
    plane_sums: &mut Shared<[V4]>,
    seat: &Seat,
    #[comptime] config: SweepConfig,
) {
    let per_lane = comptime!(config.per_lane);
    let quarters = comptime!(config.states() / 4);
    let width = comptime!(SUB * 2 * config.per_lane);
    let across = comptime!(config.plane / config.lanes);
    spread_sum(values, seat.lane, width, across, 1usize);
    let start = spread_start(seat.lane, width, across, 1usize);
    let row0 = seat.plane * comptime!(2 * config.tile);
    #[unroll]
    for j in 0..comptime!(spread_width(SUB * 2 * config.per_lane, config.plane / config.lanes) / 4)
    {
        let at = start + comptime!(j * 4);
        let mut four = V4::new(0.0f32);
        #[unroll]
        for k in 0..4usize {
            four.insert(k, values[comptime!(j * 4 + k)]);
        }
        let n = seat.part * per_lane + at % per_lane;
        plane_sums[(row0 + at / per_lane) * quarters + n / 4] = four;
    }
}

/// Sums channel `i`'s two sums of every position over the lanes that have its states.
#[cube]
pub(super) fn sum_states(
    dx: &mut Array<f32>,
    ddecay: &mut Array<f32>,
    sums: &mut Shared<[V2]>,
    seat: &Seat,
    #[comptime] i: usize,
    #[comptime] config: SweepConfig,
) {
    let lanes = comptime!(config.lanes);
    let across = comptime!(config.plane / config.lanes);
    let column = seat.column + comptime!(i * config.spacing());
    spread_sum(dx, seat.lane, SUB, lanes, across);
    spread_sum(ddecay, seat.lane, SUB, lanes, across);
    let start = spread_start(seat.lane, SUB, lanes, across);
    if spread_writer(seat.lane, SUB, lanes, across) {
        #[unroll]
        for j in 0..comptime!(spread_width(SUB, config.lanes)) {
            let mut sum = V2::new(0.0f32);
            sum.insert(0usize, dx[j]);
            sum.insert(1usize, ddecay[j]);
            sums[(start + j) * comptime!(config.channels()) + column] = sum;
        }
    }
}
