//! Steps of the main backward kernel: where a unit sits, the recurrences of a sub-chunk, and the
//! sums over channels and states.

use cubecl::prelude::*;

use super::common::V4;
use super::plan::{SUB, SweepConfig};
use crate::cube::math::exp2;
use crate::cube::reduce::{spread_start, spread_sum, spread_width, spread_writer, tree_sum};

/// Where a unit works in the main kernel.
#[derive(CubeType)]
pub(super) struct Seat {
    /// Plane and lane of the unit.
    pub plane: usize,
    pub lane: usize,
    /// The part of the states it has.
    pub part: usize,
    /// Its first channel within the cube, state-wise; the others follow at `config.units /
    /// config.lanes`.
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
    let own = seat.channel0 + seat.column + comptime!(c * (config.units / config.lanes));
    min(own, seat.inner - 1)
}

/// States and decays of a sub-chunk, left to right; `h` holds the states before it.
#[cube]
pub(super) fn recompute_states(
    h: &mut Array<f32>,
    decays: &mut Array<f32>,
    rates: &Array<f32>,
    steps: &Shared<[V4]>,
    b_tile: &Shared<[V4]>,
    seat: &Seat,
    row0: usize,
    #[comptime] resets: bool,
    #[comptime] config: SweepConfig,
) {
    let per_lane = comptime!(config.per_lane);
    let held = comptime!(config.per_lane * config.per_unit);
    #[unroll]
    for t in 0..SUB {
        #[unroll]
        for i in 0..comptime!(config.per_unit) {
            let entry = steps[comptime!(step_index(t, i, &config)) + seat.column];
            let dt = entry.extract(0usize);
            let x = entry.extract(1usize);
            #[unroll]
            for q in 0..comptime!(per_lane / 4) {
                let bs = b_tile[row0 + comptime!(t * config.states() / 4 + q)];
                #[unroll]
                for k in 0..4usize {
                    let n = comptime!(i * per_lane + q * 4 + k);
                    let mut decay = exp2(dt * rates[n], config.ptx);
                    if resets {
                        decay *= entry.extract(3usize);
                    }
                    decays[comptime!(t * held + n)] = decay;
                    h[comptime!((t + 1) * held + n)] =
                        fma(decay, h[comptime!(t * held + n)], x * bs.extract(k));
                }
            }
        }
    }
}

/// The adjoint passes position `t` for channel `i`: `g` and `da` are updated, the contributions to
/// dB and dC put or added into `over_channels`; returns the lane's parts of the sums over states,
/// (dx, dΔ through the decay, y, 0).
#[cube]
pub(super) fn adjoint_position(
    g: &mut Array<f32>,
    da: &mut Array<f32>,
    over_channels: &mut Array<f32>,
    h: &Array<f32>,
    decays: &Array<f32>,
    rates: &Array<f32>,
    steps: &Shared<[V4]>,
    b_tile: &Shared<[V4]>,
    c_tile: &Shared<[V4]>,
    seat: &Seat,
    row0: usize,
    #[comptime] t: usize,
    #[comptime] i: usize,
    #[comptime] config: SweepConfig,
) -> V4 {
    let per_lane = comptime!(config.per_lane);
    let held = comptime!(config.per_lane * config.per_unit);
    let entry = steps[comptime!(step_index(t, i, &config)) + seat.column];
    let dt = entry.extract(0usize);
    let x = entry.extract(1usize);
    let w = entry.extract(2usize);
    let mut dx = 0.0f32;
    let mut ddecay = 0.0f32;
    let mut parts = Array::<f32>::new(comptime!(per_lane / 4));
    #[unroll]
    for q in 0..comptime!(per_lane / 4) {
        let mut y = 0.0f32;
        let bs = b_tile[row0 + comptime!(t * config.states() / 4 + q)];
        let cs = c_tile[row0 + comptime!(t * config.states() / 4 + q)];
        #[unroll]
        for k in 0..4usize {
            let s = comptime!(q * 4 + k);
            let n = comptime!(i * per_lane + q * 4 + k);
            let after = h[comptime!((t + 1) * held + n)];
            let here = fma(w, cs.extract(k), g[n]);
            let before = here * decays[comptime!(t * held + n)];
            let through = before * h[comptime!(t * held + n)];
            if comptime!(i == 0) {
                over_channels[s] = here * x;
                over_channels[comptime!(per_lane + s)] = w * after;
            } else {
                over_channels[s] = fma(here, x, over_channels[s]);
                over_channels[comptime!(per_lane + s)] =
                    fma(w, after, over_channels[comptime!(per_lane + s)]);
            }
            dx = fma(here, bs.extract(k), dx);
            ddecay = fma(through, rates[n], ddecay);
            y = fma(after, cs.extract(k), y);
            da[n] = fma(through, dt, da[n]);
            g[n] = before;
        }
        parts[q] = y;
    }
    let mut sums = V4::new(0.0f32);
    sums.insert(0usize, dx);
    sums.insert(1usize, ddecay);
    sums.insert(2usize, tree_sum(&mut parts, comptime!(per_lane / 4)));
    sums
}

/// Place of position `t` of a lane's channel number `i` among a sub-chunk's vectors, less the
/// lane's column.
fn step_index(t: usize, i: usize, config: &SweepConfig) -> usize {
    t * config.channels() + i * (config.units / config.lanes)
}

/// Sums the planes' contributions to dB and dC of a sub-chunk: the cube's partials, from row `row`
/// of `sums_bc` on.
#[cube]
pub(super) fn sum_planes(
    sums_bc: &mut [f32],
    plane_sums: &Shared<[f32]>,
    row: usize,
    #[comptime] config: SweepConfig,
) {
    let units = comptime!(config.units);
    let width = comptime!(2 * config.states());
    #[unroll]
    for p in 0..comptime!((SUB * width).div_ceil(units)) {
        let at = UNIT_POS as usize + comptime!(p * units);
        if at < comptime!(SUB * width) {
            let mut sum = 0.0f32;
            #[unroll]
            for plane in 0..comptime!(units / config.plane) {
                sum += plane_sums[at + comptime!(plane * SUB * width)];
            }
            sums_bc[row * width + at] = sum;
        }
    }
}

/// Sums a position's contributions to dB and dC over the channels of the plane, into the plane's
/// row of `plane_sums`.
#[cube]
pub(super) fn sum_channels(
    values: &mut Array<f32>,
    plane_sums: &mut Shared<[f32]>,
    seat: &Seat,
    #[comptime] t: usize,
    #[comptime] config: SweepConfig,
) {
    let states = comptime!(config.states());
    let width = comptime!(2 * config.per_lane);
    let across = comptime!(config.plane / config.lanes);
    spread_sum(values, seat.lane, width, across, 1usize);
    let start = spread_start(seat.lane, width, across, 1usize);
    if spread_writer(seat.lane, width, across, 1usize) {
        #[unroll]
        for j in 0..comptime!(spread_width(
            2 * config.per_lane,
            config.plane / config.lanes
        )) {
            let at = start + j;
            // The first half of the values is dB, the second dC.
            let half = at / comptime!(config.per_lane);
            let n = seat.part * comptime!(config.per_lane) + at % comptime!(config.per_lane);
            let row = (seat.plane * SUB + t) * comptime!(2 * states);
            plane_sums[row + half * states + n] = values[j];
        }
    }
}

/// Sums channel `i`'s three sums of every position over the lanes that have its states.
#[cube]
pub(super) fn sum_states(
    dx: &mut Array<f32>,
    ddecay: &mut Array<f32>,
    y: &mut Array<f32>,
    sums: &mut Shared<[V4]>,
    seat: &Seat,
    #[comptime] i: usize,
    #[comptime] config: SweepConfig,
) {
    let lanes = comptime!(config.lanes);
    let across = comptime!(config.plane / config.lanes);
    let column = seat.column + comptime!(i * (config.units / config.lanes));
    let mut own_x = Array::<f32>::new(SUB);
    let mut own_decay = Array::<f32>::new(SUB);
    let mut own_y = Array::<f32>::new(SUB);
    #[unroll]
    for t in 0..SUB {
        own_x[t] = dx[comptime!(i * SUB + t)];
        own_decay[t] = ddecay[comptime!(i * SUB + t)];
        own_y[t] = y[comptime!(i * SUB + t)];
    }
    spread_sum(&mut own_x, seat.lane, SUB, lanes, across);
    spread_sum(&mut own_decay, seat.lane, SUB, lanes, across);
    spread_sum(&mut own_y, seat.lane, SUB, lanes, across);
    let start = spread_start(seat.lane, SUB, lanes, across);
    if spread_writer(seat.lane, SUB, lanes, across) {
        #[unroll]
        for j in 0..comptime!(spread_width(SUB, config.lanes)) {
            let mut entry = V4::new(0.0f32);
            entry.insert(0usize, own_x[j]);
            entry.insert(1usize, own_decay[j]);
            entry.insert(2usize, own_y[j]);
            sums[(start + j) * comptime!(config.channels()) + column] = entry;
        }
    }
}
