//! Main kernel of backward: right to left over the sub-chunks of a chunk.
//!
//! A cube owns some channels of one chunk. Its units work in two arrangements, exchanging through
//! shared memory:
//!
//! - *element-wise* (softplus, gate, the gradients of u, delta and z): a unit has one channel and
//!   every few-th position of the sub-chunk;
//! - *state-wise* (the recurrences): a unit has [`SweepConfig::per_lane`] states of
//!   [`SweepConfig::per_unit`] channels. Within a plane, neighbouring lanes are neighbouring
//!   channels and each quarter (half, …) of the plane has another part of the states, so sums over
//!   channels and sums over states are both sums over lanes.

use cubecl::ir::ElemType;
use cubecl::prelude::*;

use super::adjoint_parts::{
    adjoint_position, channel, recompute_states, seat, sum_channels, sum_planes, sum_states,
};
use super::common::{V4, entry, is_reset, load_rates, load_states, load_tile};
use super::plan::{SUB, SweepConfig};
use crate::cube::OptionalInput;
use crate::cube::math::{LN2, sigmoid, softplus_exp, softplus_of, softplus_slope_of};

/// Which gradients are wanted beyond those of u, delta, A, B and C.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Wanted {
    /// The skip connection's.
    pub d: bool,
    /// The gate's.
    pub z: bool,
    /// The bias's.
    pub bias: bool,
    /// The outputs, computed once more.
    pub y: bool,
}

/// Gradients of one segment of chunks.
///
/// `sub_states` and `entering` (the adjoints that enter each chunk from its right) are of the
/// segment. Partial sums: `sums_bc` holds `[B, cubes, segment · chunk, 2 · states]` (dB, then dC),
/// `sums_e` holds `[B, chunks, N + 2, E]` (dA, then dD, then the bias's).
#[cube(launch_unchecked, address_type = "dynamic")]
pub(super) fn adjoint_main<U: Float, D: Float, P: Float, Z: Float>(
    u: &[U],
    delta: &[D],
    b: &[P],
    c: &[P],
    a: &[f32],
    d: &OptionalInput,
    z: &[Z],
    bias: &OptionalInput,
    resets: &OptionalInput,
    dy: &[U],
    sub_states: &[f32],
    entering: &[f32],
    du: &mut [U],
    ddelta: &mut [D],
    dz: &mut [Z],
    y: &mut [U],
    sums_bc: &mut [f32],
    sums_e: &mut [f32],
    batch: usize,
    length: usize,
    inner: usize,
    state: usize,
    b_stride: usize,
    c_stride: usize,
    z_stride: usize,
    dz_stride: usize,
    chunk0: usize,
    segment: usize,
    #[comptime] wanted: Wanted,
    #[comptime] config: SweepConfig,
    #[define(U, D, P, Z)] _types: [ElemType; 4],
) {
    let columns = comptime!(config.channels());
    let cubes = inner.div_ceil(columns);
    let cube = CUBE_POS % cubes;
    let chunk = CUBE_POS / cubes % segment;
    let sequence = CUBE_POS / cubes / segment;
    if sequence >= batch {
        terminate!();
    }
    let units = comptime!(config.units);
    let per_lane = comptime!(config.per_lane);
    let per_unit = comptime!(config.per_unit);
    let held = comptime!(per_lane * per_unit);
    let states = comptime!(config.states());
    let seat = seat(cube, inner, config);
    let unit = UNIT_POS as usize;

    let chunks = length.div_ceil(comptime!(config.chunk));
    let skipped = (chunk0 + chunk) * comptime!(config.chunk);
    let first = sequence * length + skipped;
    let count = min(comptime!(config.chunk).runtime(), length - skipped);
    let own_row = sequence * segment + chunk;
    let sub_row = own_row * comptime!(config.chunk / SUB);

    let mut b_tile = Shared::<[V4]>::new_slice(comptime!(config.tile * states / 4));
    let mut c_tile = Shared::<[V4]>::new_slice(comptime!(config.tile * states / 4));
    // For every position and channel of the sub-chunk: (Δ, Δ·u, gated dy, keep) ...
    let mut steps = Shared::<[V4]>::new_slice(comptime!(SUB * columns));
    // ... and the sums over states (dx, dΔ through the decay, y), 0.
    let mut sums = Shared::<[V4]>::new_slice(comptime!(SUB * columns));
    let mut plane_sums =
        Shared::<[f32]>::new_slice(comptime!(units.div_ceil(config.plane) * SUB * 2 * states));

    let mut rates = Array::<f32>::new(held);
    let mut da = Array::<f32>::new(held);
    let mut g = Array::<f32>::new(held);
    #[unroll]
    for i in 0..per_unit {
        let at = channel(&seat, i, config);
        let offset = comptime!(i * per_lane);
        let inside =
            seat.channel0 + seat.column + comptime!(i * (config.units / config.lanes)) < inner;
        load_rates(a, &mut rates, at, seat.part, state, offset, per_lane);
        load_states(
            entering, &mut g, own_row, at, seat.part, state, inner, offset, per_lane,
        );
        #[unroll]
        for k in 0..per_lane {
            da[comptime!(offset + k)] = 0.0f32;
            // A unit beyond the last channel must add nothing to dB.
            g[comptime!(offset + k)] = select(inside, g[comptime!(offset + k)], 0.0f32);
        }
    }

    // Element-wise arrangement: one channel, every `stride`-th position.
    let stride = comptime!(units / columns);
    let passes = comptime!(SUB.div_ceil(units / columns));
    let column = unit % columns;
    let turn = unit / columns;
    let own = seat.channel0 + column;
    let inside = own < inner;
    let own = min(own, inner - 1);
    let base = first * inner + own;
    let bias = entry(bias, own, 0.0f32);
    let skip = entry(d, own, 0.0f32);
    let mut acc_d = 0.0f32;
    let mut acc_bias = 0.0f32;
    let subs = count.div_ceil(SUB);
    let mut next_u = Array::<U>::new(passes);
    let mut next_delta = Array::<D>::new(passes);
    let mut next_dy = Array::<U>::new(passes);
    let mut next_z = Array::<Z>::new(passes);
    #[unroll]
    for p in 0..passes {
        let t = min((subs - 1) * SUB + turn + comptime!(p * stride), count - 1);
        let at = base + t * inner;
        next_u[p] = u[at];
        next_delta[p] = delta[at];
        next_dy[p] = dy[at];
        if wanted.z {
            next_z[p] = z[(first + t) * z_stride + own];
        }
    }

    for turned in 0..subs {
        let sub = subs - 1 - turned;
        let t0 = sub * SUB;
        if turned == 0 || (t0 + SUB) % comptime!(config.tile) == 0 {
            let tile0 = t0 / comptime!(config.tile) * comptime!(config.tile);
            let rows = min(comptime!(config.tile).runtime(), count - tile0);
            load_tile::<P>(b, &mut b_tile, first + tile0, rows, b_stride, state, config);
            load_tile::<P>(c, &mut c_tile, first + tile0, rows, c_stride, state, config);
        }

        // What backward of the element-wise parts needs again at the end of the sub-chunk.
        let mut us = Array::<f32>::new(passes);
        let mut dys = Array::<f32>::new(passes);
        let mut zs = Array::<f32>::new(passes);
        let mut gates = Array::<f32>::new(passes);
        let mut slopes = Array::<f32>::new(passes);
        #[unroll]
        for p in 0..passes {
            let t = turn + comptime!(p * stride);
            let valid = inside && t0 + t < count;
            let raw = f32::cast_from(next_delta[p]) + bias;
            us[p] = f32::cast_from(next_u[p]);
            dys[p] = f32::cast_from(next_dy[p]);
            let mut w = dys[p];
            if wanted.z {
                zs[p] = f32::cast_from(next_z[p]);
                gates[p] = sigmoid(zs[p], config.ptx);
                w = w * zs[p] * gates[p];
            }
            let mut dt = raw;
            slopes[p] = 1.0f32;
            if config.softplus {
                let e = softplus_exp(raw, config.ptx);
                dt = softplus_of(raw, e, config.ptx);
                slopes[p] = softplus_slope_of(raw, e, config.ptx);
            }
            // Positions and channels beyond the last leave state and adjoint as they are.
            let dt = select(valid, dt, 0.0f32);
            let mut entry = V4::new(0.0f32);
            entry.insert(0usize, dt);
            entry.insert(1usize, dt * us[p]);
            entry.insert(2usize, select(valid, w, 0.0f32));
            if comptime!(resets.is_some()) {
                let reset = is_reset(resets, first + min(t0 + t, count - 1));
                entry.insert(3usize, select(reset && t0 + t < count, 0.0f32, 1.0f32));
            }
            if t < SUB {
                steps[t * columns + column] = entry;
            }
        }
        sync_cube();
        // The sub-chunk that comes next; the first one again at the end.
        let ahead0 = max(t0, SUB.runtime()) - SUB;
        #[unroll]
        for p in 0..passes {
            let t = min(ahead0 + turn + comptime!(p * stride), count - 1);
            let at = base + t * inner;
            next_u[p] = u[at];
            next_delta[p] = delta[at];
            next_dy[p] = dy[at];
            if wanted.z {
                next_z[p] = z[(first + t) * z_stride + own];
            }
        }

        // States and decays of the sub-chunk, left to right.
        let mut h = Array::<f32>::new(comptime!((SUB + 1) * held));
        let mut decays = Array::<f32>::new(comptime!(SUB * held));
        #[unroll]
        for i in 0..per_unit {
            let at = channel(&seat, i, config);
            let offset = comptime!(i * per_lane);
            load_states(
                sub_states,
                &mut h,
                sub_row + sub,
                at,
                seat.part,
                state,
                inner,
                offset,
                per_lane,
            );
        }
        let row0 = (t0 % comptime!(config.tile) * comptime!(config.lanes) + seat.part)
            * comptime!(per_lane / 4);
        recompute_states(
            &mut h,
            &mut decays,
            &rates,
            &steps,
            &b_tile,
            &seat,
            row0,
            comptime!(resets.is_some()),
            config,
        );

        // Adjoints, right to left.
        let mut sum_x = Array::<f32>::new(comptime!(SUB * per_unit));
        let mut sum_decay = Array::<f32>::new(comptime!(SUB * per_unit));
        let mut sum_y = Array::<f32>::new(comptime!(SUB * per_unit));
        #[unroll]
        for back in 0..SUB {
            let t = comptime!(SUB - 1 - back);
            let mut over_channels = Array::<f32>::new(comptime!(2 * per_lane));
            #[unroll]
            for i in 0..per_unit {
                let sums = adjoint_position(
                    &mut g,
                    &mut da,
                    &mut over_channels,
                    &h,
                    &decays,
                    &rates,
                    &steps,
                    &b_tile,
                    &c_tile,
                    &seat,
                    row0,
                    t,
                    i,
                    config,
                );
                sum_x[comptime!(i * SUB + t)] = sums.extract(0usize);
                sum_decay[comptime!(i * SUB + t)] = sums.extract(1usize);
                sum_y[comptime!(i * SUB + t)] = sums.extract(2usize);
            }
            sum_channels(&mut over_channels, &mut plane_sums, &seat, t, config);
        }
        #[unroll]
        for i in 0..per_unit {
            sum_states(
                &mut sum_x,
                &mut sum_decay,
                &mut sum_y,
                &mut sums,
                &seat,
                i,
                config,
            );
        }
        sync_cube();

        #[unroll]
        for p in 0..passes {
            let t = turn + comptime!(p * stride);
            if inside && t < SUB && t0 + t < count {
                let at = base + (t0 + t) * inner;
                let entry = steps[t * columns + column];
                let sum = sums[t * columns + column];
                let w = entry.extract(2usize);
                let dx = sum.extract(0usize);
                // The rates carry log₂ e, so the sum does too.
                let draw = fma(dx, us[p], sum.extract(1usize) * LN2) * slopes[p];
                du[at] = U::cast_from(fma(dx, entry.extract(0usize), skip * w));
                ddelta[at] = D::cast_from(draw);
                if comptime!(wanted.z || wanted.y) {
                    let mut value = fma(skip, us[p], sum.extract(2usize));
                    if wanted.z {
                        let slope = gates[p] * fma(zs[p], 1.0f32 - gates[p], 1.0f32);
                        dz[(first + t0 + t) * dz_stride + own] =
                            Z::cast_from(dys[p] * value * slope);
                        value = value * zs[p] * gates[p];
                    }
                    if wanted.y {
                        y[at] = U::cast_from(value);
                    }
                }
                if wanted.d {
                    acc_d = fma(w, us[p], acc_d);
                }
                if wanted.bias {
                    acc_bias += draw;
                }
            }
        }
        // One partial of dB and dC for the whole cube.
        let row = (sequence * cubes + cube) * (segment * comptime!(config.chunk))
            + chunk * comptime!(config.chunk)
            + t0;
        sum_planes(sums_bc, &plane_sums, row, config);
        sync_cube();
    }

    // The chunk's partials of dA, dD and the bias's gradient.
    let row = (sequence * chunks + chunk0 + chunk) * (state + 2);
    #[unroll]
    for i in 0..per_unit {
        let at = seat.channel0 + seat.column + comptime!(i * (config.units / config.lanes));
        #[unroll]
        for k in 0..per_lane {
            let n = seat.part * per_lane + k;
            if at < inner && n < state {
                sums_e[(row + n) * inner + at] = da[comptime!(i * per_lane + k)];
            }
        }
    }
    if comptime!(wanted.d || wanted.bias) {
        // Units of one channel have different positions of it.
        let mut entry = V4::new(0.0f32);
        entry.insert(0usize, acc_d);
        entry.insert(1usize, acc_bias);
        if comptime!(units <= SUB * columns) || unit < comptime!(SUB * columns) {
            sums[unit] = entry;
        }
        sync_cube();
        if unit < columns && inside {
            let mut sum = sums[unit];
            #[unroll]
            for p in 1..comptime!(SUB.min(units / columns)) {
                sum += sums[unit + comptime!(p * columns)];
            }
            if wanted.d {
                sums_e[(row + state) * inner + own] = sum.extract(0usize);
            }
            if wanted.bias {
                sums_e[(row + state + 1) * inner + own] = sum.extract(1usize);
            }
        }
    }
}
