//! Kernels of the forward scan.

use cubecl::ir::ElemType;
use cubecl::prelude::*;

use super::common::{
    CLEARED, V4, entry, gate_at, is_reset, load_initial, load_rates, load_tile, place, store_last,
    store_states,
};
use super::plan::SweepConfig;
use crate::cube::OptionalInput;
use crate::cube::math::{exp2, sigmoid, step_size};
use crate::cube::reduce::{lane_sum, tree_sum};

/// First pass: every chunk from a zero state to its end state, `[B, chunks, N, E]`, and the sum of
/// its steps, `[B, chunks, E]` ([`CLEARED`] if it holds a reset).
#[cube(launch_unchecked, address_type = "dynamic")]
pub(super) fn chunk_ends<U: Float, D: Float, P: Float>(
    u: &[U],
    delta: &[D],
    b: &[P],
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
    let ahead = comptime!(config.ahead);
    let first = place.batch * length + place.chunk * comptime!(config.chunk);
    let count = min(
        comptime!(config.chunk).runtime(),
        length - place.chunk * comptime!(config.chunk),
    );
    let base = first * inner + place.channel;

    let mut b_tile = Shared::<[V4]>::new_slice(comptime!(config.tile * config.states() / 4));
    let mut rates = Array::<f32>::new(per_lane);
    let mut h = Array::<f32>::new(per_lane);
    load_rates(
        a,
        &mut rates,
        place.channel,
        place.lane,
        state,
        0usize,
        per_lane,
    );
    #[unroll]
    for k in 0..per_lane {
        h[k] = 0.0f32;
    }
    let bias = entry(bias, place.channel, 0.0f32);
    let mut sum = 0.0f32;
    let mut next_u = Array::<U>::new(ahead);
    let mut next_delta = Array::<D>::new(ahead);
    #[unroll]
    for i in 0..ahead {
        let at = base + min(i, count - 1) * inner;
        next_u[i] = u[at];
        next_delta[i] = delta[at];
    }

    for tile in 0..count.div_ceil(comptime!(config.tile)) {
        let t0 = tile * comptime!(config.tile);
        let rows = min(comptime!(config.tile).runtime(), count - t0);
        sync_cube();
        load_tile::<P>(b, &mut b_tile, first + t0, rows, b_stride, state, config);
        sync_cube();
        for group in 0..rows.div_ceil(ahead) {
            let mut us = Array::<f32>::new(ahead);
            let mut deltas = Array::<f32>::new(ahead);
            #[unroll]
            for i in 0..ahead {
                us[i] = f32::cast_from(next_u[i]);
                deltas[i] = f32::cast_from(next_delta[i]);
                let t = t0 + (group + 1) * ahead + i;
                let at = base + min(t, count - 1) * inner;
                next_u[i] = u[at];
                next_delta[i] = delta[at];
            }
            #[unroll]
            for i in 0..ahead {
                let t = group * ahead + i;
                if t < rows {
                    let dt = step_size(deltas[i] + bias, config.softplus, config.ptx);
                    let x = dt * us[i];
                    if is_reset(resets, first + t0 + t) {
                        sum = CLEARED;
                        #[unroll]
                        for k in 0..per_lane {
                            h[k] = 0.0f32;
                        }
                    } else if sum < CLEARED {
                        sum += dt;
                    }
                    let row = (t * comptime!(config.lanes) + place.lane) * comptime!(per_lane / 4);
                    #[unroll]
                    for q in 0..comptime!(per_lane / 4) {
                        let bs = b_tile[row + q];
                        #[unroll]
                        for k in 0..4usize {
                            let n = comptime!(q * 4 + k);
                            h[n] = fma(exp2(dt * rates[n], config.ptx), h[n], x * bs.extract(k));
                        }
                    }
                }
            }
        }
    }
    let row = place.batch * chunks + place.chunk;
    store_states(ends, &h, row, &place, state, inner, per_lane);
    if place.inside && place.lane == 0 {
        steps[row * inner + place.channel] = sum;
    }
}

/// The outputs. Either every chunk from its entering state in `saved` (`walk` off), or every
/// sequence from its initial state, writing the entering states of the chunks it passes and the
/// last state.
#[cube(launch_unchecked, address_type = "dynamic")]
pub(super) fn outputs<U: Float, D: Float, P: Float, Z: Float>(
    u: &[U],
    delta: &[D],
    b: &[P],
    c: &[P],
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
    let ahead = comptime!(config.ahead);
    let skipped = place.chunk * comptime!(config.chunk);
    let first = place.batch * length + skipped;
    let count = if walk {
        length
    } else {
        min(comptime!(config.chunk).runtime(), length - skipped)
    };
    let base = first * inner + place.channel;

    let mut b_tile = Shared::<[V4]>::new_slice(comptime!(config.tile * config.states() / 4));
    let mut c_tile = Shared::<[V4]>::new_slice(comptime!(config.tile * config.states() / 4));
    let mut rates = Array::<f32>::new(per_lane);
    let mut h = Array::<f32>::new(per_lane);
    load_rates(
        a,
        &mut rates,
        place.channel,
        place.lane,
        state,
        0usize,
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
    let mut next_u = Array::<U>::new(ahead);
    let mut next_delta = Array::<D>::new(ahead);
    #[unroll]
    for i in 0..ahead {
        let at = base + min(i, count - 1) * inner;
        next_u[i] = u[at];
        next_delta[i] = delta[at];
    }

    for tile in 0..count.div_ceil(comptime!(config.tile)) {
        let t0 = tile * comptime!(config.tile);
        let rows = min(comptime!(config.tile).runtime(), count - t0);
        sync_cube();
        load_tile::<P>(b, &mut b_tile, first + t0, rows, b_stride, state, config);
        load_tile::<P>(c, &mut c_tile, first + t0, rows, c_stride, state, config);
        sync_cube();
        if walk {
            if t0 % comptime!(config.chunk) == 0 {
                let row = place.batch * chunks + t0 / comptime!(config.chunk);
                store_states(saved, &h, row, &place, state, inner, per_lane);
            }
        }
        for group in 0..rows.div_ceil(ahead) {
            let mut us = Array::<f32>::new(ahead);
            let mut deltas = Array::<f32>::new(ahead);
            let mut gates = Array::<f32>::new(ahead);
            #[unroll]
            for i in 0..ahead {
                us[i] = f32::cast_from(next_u[i]);
                deltas[i] = f32::cast_from(next_delta[i]);
                let own = first + min(t0 + group * ahead + i, count - 1);
                gates[i] = gate_at(z, own * z_stride + place.channel);
                let t = t0 + (group + 1) * ahead + i;
                let at = base + min(t, count - 1) * inner;
                next_u[i] = u[at];
                next_delta[i] = delta[at];
            }
            #[unroll]
            for i in 0..ahead {
                let t = group * ahead + i;
                if t < rows {
                    let at = base + (t0 + t) * inner;
                    let dt = step_size(deltas[i] + bias, config.softplus, config.ptx);
                    let x = dt * us[i];
                    if is_reset(resets, first + t0 + t) {
                        #[unroll]
                        for k in 0..per_lane {
                            h[k] = 0.0f32;
                        }
                    }
                    let row = (t * comptime!(config.lanes) + place.lane) * comptime!(per_lane / 4);
                    // A sum of its own for every vector: shorter chains of additions.
                    let mut parts = Array::<f32>::new(comptime!(per_lane / 4));
                    #[unroll]
                    for q in 0..comptime!(per_lane / 4) {
                        let bs = b_tile[row + q];
                        let cs = c_tile[row + q];
                        let mut part = 0.0f32;
                        #[unroll]
                        for k in 0..4usize {
                            let n = comptime!(q * 4 + k);
                            h[n] = fma(exp2(dt * rates[n], config.ptx), h[n], x * bs.extract(k));
                            part = fma(h[n], cs.extract(k), part);
                        }
                        parts[q] = part;
                    }
                    let sum = tree_sum(&mut parts, comptime!(per_lane / 4));
                    let mut value = fma(skip, us[i], lane_sum(sum, config.lanes, 1usize));
                    if comptime!(z.is_some()) {
                        value = value * gates[i] * sigmoid(gates[i], config.ptx);
                    }
                    if place.inside && place.lane == 0 {
                        y[at] = U::cast_from(value);
                    }
                }
            }
        }
    }
    if walk {
        store_last(last, &h, &place, state, inner, per_lane);
    }
}
