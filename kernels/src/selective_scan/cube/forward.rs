//! Kernels of the forward scan: a unit has all states of a channel, or several units share them.

use cubecl::ir::ElemType;
use cubecl::prelude::*;

use super::common::{
    CLEARED, V4, at_position, decay_step, entry, gate_at, load_initial, load_rates, load_tile,
    output, place, put_clears, store_last, store_states,
};
use super::plan::SweepConfig;
use crate::cube::OptionalInput;
use crate::cube::math::{exp2, sigmoid, step_size};
use crate::cube::reduce::lane_sum;

/// Positions loaded ahead of their use.
const AHEAD: usize = 2;

/// First pass: every chunk from a zero state to its end state, `[B, chunks, N, E]`, and the sum of
/// its steps, `[B, chunks, E]` ([`CLEARED`] if it holds a reset).
#[cube(launch_unchecked, address_type = "dynamic")]
pub(super) fn chunk_ends<U: Float, D: Float, P: Float, S: Size>(
    u: &[U],
    delta: &[D],
    b: &[Vector<P, S>],
    a: &[f32],
    bias: &OptionalInput,
    resets: &OptionalInput,
    ends: &mut [f32],
    steps: &mut [f32],
    batch: usize,
    length: usize,
    inner: usize,
    state: usize,
    b_stride: usize,
    #[comptime] config: SweepConfig,
    #[define(U, D, P)] _types: [ElemType; 3],
) {
    let chunks = length.div_ceil(comptime!(config.chunk));
    let place = place(inner, chunks, config);
    if place.batch >= batch {
        terminate!();
    }
    let per_lane = comptime!(config.per_lane);
    let first = place.batch * length + place.chunk * comptime!(config.chunk);
    let count = min(
        comptime!(config.chunk).runtime(),
        length - place.chunk * comptime!(config.chunk),
    );
    let base = first * inner + place.channel;

    let mut b_tile = Shared::<[V4]>::new_slice(comptime!(config.tile_vectors()));
    let mut clears = Shared::<[f32]>::new_slice(comptime!(config.tile));
    let mut rates = Array::<f32>::new(per_lane);
    let mut h = Array::<f32>::new(per_lane);
    load_rates(
        a,
        &mut rates,
        place.channel,
        place.lane,
        state,
        0usize,
        comptime!(resets.is_some()),
        per_lane,
    );
    #[unroll]
    for k in 0..per_lane {
        h[k] = 0.0f32;
    }
    let bias = entry(bias, place.channel, 0.0f32);
    let mut sum = 0.0f32;
    let mut next_u = Array::<U>::new(AHEAD);
    let mut next_delta = Array::<D>::new(AHEAD);
    #[unroll]
    for i in 0..AHEAD {
        let at = at_position(base, i, count, inner);
        next_u[i] = u[at];
        next_delta[i] = delta[at];
    }

    for tile in 0..count.div_ceil(comptime!(config.tile)) {
        let t0 = tile * comptime!(config.tile);
        let rows = min(comptime!(config.tile).runtime(), count - t0);
        sync_cube();
        load_tile(b, &mut b_tile, first + t0, rows, b_stride, state, config);
        put_clears(resets, &mut clears, first + t0, rows, config);
        sync_cube();
        for group in 0..rows.div_ceil(AHEAD) {
            let mut us = Array::<f32>::new(AHEAD);
            let mut deltas = Array::<f32>::new(AHEAD);
            #[unroll]
            for i in 0..AHEAD {
                us[i] = f32::cast_from(next_u[i]);
                deltas[i] = f32::cast_from(next_delta[i]);
                let at = at_position(base, t0 + (group + 1) * AHEAD + i, count, inner);
                next_u[i] = u[at];
                next_delta[i] = delta[at];
            }
            #[unroll]
            for i in 0..AHEAD {
                let t = group * AHEAD + i;
                let dt = step_size(deltas[i] + bias, config.softplus, config.ptx);
                // A position beyond the last leaves the state as it is.
                let dt = select(t < rows, dt, 0.0f32);
                let decay = decay_step(dt, &clears, t, comptime!(resets.is_some()));
                sum = min(sum + decay, CLEARED);
                advance(
                    &mut h,
                    &rates,
                    &b_tile,
                    decay,
                    dt * us[i],
                    t,
                    place.lane,
                    config,
                );
            }
        }
    }
    let row = place.batch * chunks + place.chunk;
    store_states(ends, &h, row, &place, state, inner, per_lane);
    if place.inside && place.lane == 0 {
        steps[row * inner + place.channel] = sum;
    }
}

/// The lane's states pass position `t` of the tile.
#[cube]
pub(super) fn advance(
    h: &mut Array<f32>,
    rates: &Array<f32>,
    b_tile: &Shared<[V4]>,
    dt: f32,
    x: f32,
    t: usize,
    lane: usize,
    #[comptime] config: SweepConfig,
) {
    let vectors = comptime!(config.per_lane / 4);
    let row = (t * comptime!(config.lanes) + lane) * vectors;
    #[unroll]
    for q in 0..vectors {
        let bs = b_tile[row + q];
        #[unroll]
        for k in 0..4usize {
            let n = comptime!(q * 4 + k);
            h[n] = fma(exp2(dt * rates[n], config.ptx), h[n], x * bs.extract(k));
        }
    }
}

/// The outputs. Either every chunk from its entering state in `saved` (`walk` off), or every
/// sequence from its initial state, writing the entering states of the chunks it passes and the
/// last state.
#[cube(launch_unchecked, address_type = "dynamic")]
pub(super) fn outputs<U: Float, D: Float, P: Float, Z: Float, S: Size>(
    u: &[U],
    delta: &[D],
    b: &[Vector<P, S>],
    c: &[Vector<P, S>],
    a: &[f32],
    d: &OptionalInput,
    z: &ComptimeOption<Box<[Z]>>,
    bias: &OptionalInput,
    initial: &OptionalInput,
    resets: &OptionalInput,
    saved: &mut [f32],
    last: &mut [f32],
    y: &mut [U],
    batch: usize,
    length: usize,
    inner: usize,
    state: usize,
    b_stride: usize,
    c_stride: usize,
    z_stride: usize,
    #[comptime] walk: bool,
    #[comptime] config: SweepConfig,
    #[define(U, D, P, Z)] _types: [ElemType; 4],
) {
    let chunks = length.div_ceil(comptime!(config.chunk));
    let place = place(inner, if walk { 1usize.runtime() } else { chunks }, config);
    if place.batch >= batch {
        terminate!();
    }
    let per_lane = comptime!(config.per_lane);
    let skipped = place.chunk * comptime!(config.chunk);
    let first = place.batch * length + skipped;
    let count = if walk {
        length
    } else {
        min(comptime!(config.chunk).runtime(), length - skipped)
    };
    let base = first * inner + place.channel;
    let z_base = first * z_stride + place.channel;

    let mut b_tile = Shared::<[V4]>::new_slice(comptime!(config.tile_vectors()));
    let mut c_tile = Shared::<[V4]>::new_slice(comptime!(config.tile_vectors()));
    let mut clears = Shared::<[f32]>::new_slice(comptime!(config.tile));
    let mut rates = Array::<f32>::new(per_lane);
    let mut h = Array::<f32>::new(per_lane);
    load_rates(
        a,
        &mut rates,
        place.channel,
        place.lane,
        state,
        0usize,
        comptime!(resets.is_some()),
        per_lane,
    );
    if walk {
        load_initial(initial, &mut h, &place, state, inner, per_lane);
    } else {
        let row = place.batch * chunks + place.chunk;
        #[unroll]
        for k in 0..per_lane {
            let n = place.lane * per_lane + k;
            let value = saved[(row * state + min(n, state - 1)) * inner + place.channel];
            h[k] = select(n < state, value, 0.0f32);
        }
    }
    let bias = entry(bias, place.channel, 0.0f32);
    let skip = entry(d, place.channel, 0.0f32);
    let mut next_u = Array::<U>::new(AHEAD);
    let mut next_delta = Array::<D>::new(AHEAD);
    let mut next_z = Array::<Z>::new(AHEAD);
    #[unroll]
    for i in 0..AHEAD {
        let at = at_position(base, i, count, inner);
        next_u[i] = u[at];
        next_delta[i] = delta[at];
        next_z[i] = gate_at(z, at_position(z_base, i, count, z_stride));
    }

    for tile in 0..count.div_ceil(comptime!(config.tile)) {
        let t0 = tile * comptime!(config.tile);
        let rows = min(comptime!(config.tile).runtime(), count - t0);
        sync_cube();
        load_tile(b, &mut b_tile, first + t0, rows, b_stride, state, config);
        load_tile(c, &mut c_tile, first + t0, rows, c_stride, state, config);
        put_clears(resets, &mut clears, first + t0, rows, config);
        sync_cube();
        if walk {
            if t0 % comptime!(config.chunk) == 0 {
                let row = place.batch * chunks + t0 / comptime!(config.chunk);
                store_states(saved, &h, row, &place, state, inner, per_lane);
            }
        }
        for group in 0..rows.div_ceil(AHEAD) {
            let mut us = Array::<f32>::new(AHEAD);
            let mut deltas = Array::<f32>::new(AHEAD);
            let mut gates = Array::<f32>::new(AHEAD);
            #[unroll]
            for i in 0..AHEAD {
                us[i] = f32::cast_from(next_u[i]);
                deltas[i] = f32::cast_from(next_delta[i]);
                gates[i] = f32::cast_from(next_z[i]);
                let t = t0 + (group + 1) * AHEAD + i;
                let at = at_position(base, t, count, inner);
                next_u[i] = u[at];
                next_delta[i] = delta[at];
                next_z[i] = gate_at(z, at_position(z_base, t, count, z_stride));
            }
            #[unroll]
            for i in 0..AHEAD {
                let t = group * AHEAD + i;
                let dt = step_size(deltas[i] + bias, config.softplus, config.ptx);
                // A position beyond the last leaves the state as it is.
                let dt = select(t < rows, dt, 0.0f32);
                let decay = decay_step(dt, &clears, t, comptime!(resets.is_some()));
                advance(
                    &mut h,
                    &rates,
                    &b_tile,
                    decay,
                    dt * us[i],
                    t,
                    place.lane,
                    config,
                );
                let sum = output(&h, &c_tile, t, place.lane, config);
                let mut value = fma(skip, us[i], lane_sum(sum, config.lanes, 1usize));
                if comptime!(z.is_some()) {
                    value = value * gates[i] * sigmoid(gates[i], config.ptx);
                }
                if place.inside && place.lane == 0 && t < rows {
                    y[base + (t0 + t) * inner] = U::cast_from(value);
                }
            }
        }
    }
    if walk {
        store_last(last, &h, &place, state, inner, per_lane);
    }
}
