//! First kernel of backward: one sweep left to right, for one exponential a state element, leaves
//! the states that the main kernel recomputes from and the adjoint that leaves each chunk.

use cubecl::ir::ElemType;
use cubecl::prelude::*;

use super::common::{
    CLEARED, V4, entry, gate_at, is_reset, load_rates, load_states, load_tile, place, store_states,
};
use super::plan::{SUB, SweepConfig};
use crate::cube::OptionalInput;
use crate::cube::math::{exp2, sigmoid, step_size};

/// For the `segment` chunks from `chunk0` on: the states at the start of every sub-chunk,
/// `[B, segment · chunk / SUB, N, E]`; what the chunk's own outputs send to its left end,
/// `[B, segment, N, E]`; and the sum of its steps, `[B, segment, E]`.
///
/// The adjoint at the left end is `Σ_t (Π_{s≤t} a_s) · C_t · dy_t`: with the running product of the
/// decays it is computed in the direction of the states, and needs no sweep of its own.
#[cube(launch_unchecked, address_type = "dynamic")]
pub(super) fn adjoint_ends<U: Float, D: Float, P: Float, Z: Float>(
    u: &[U],
    delta: &[D],
    b: &[P],
    c: &[P],
    a: &[f32],
    z: &ComptimeOption<Box<[Z]>>,
    bias: &OptionalInput,
    resets: &OptionalInput,
    dy: &[U],
    saved: &[f32],
    sub_states: &mut [f32],
    ends: &mut [f32],
    steps: &mut [f32],
    batch: usize,
    length: usize,
    inner: usize,
    state: usize,
    b_stride: usize,
    c_stride: usize,
    z_stride: usize,
    chunk0: usize,
    segment: usize,
    #[comptime] config: SweepConfig,
    #[define(U, D, P, Z)] _types: [ElemType; 4],
) {
    let place = place(inner, segment, config);
    if place.batch >= batch {
        terminate!();
    }
    let per_lane = comptime!(config.per_lane);
    let chunks = length.div_ceil(comptime!(config.chunk));
    let skipped = (chunk0 + place.chunk) * comptime!(config.chunk);
    let first = place.batch * length + skipped;
    let count = min(comptime!(config.chunk).runtime(), length - skipped);
    let base = first * inner + place.channel;
    let own_row = place.batch * segment + place.chunk;
    let sub_row = own_row * comptime!(config.chunk / SUB);

    let mut b_tile = Shared::<[V4]>::new_slice(comptime!(config.tile * config.states() / 4));
    let mut c_tile = Shared::<[V4]>::new_slice(comptime!(config.tile * config.states() / 4));
    let mut rates = Array::<f32>::new(per_lane);
    let mut h = Array::<f32>::new(per_lane);
    let mut product = Array::<f32>::new(per_lane);
    let mut adjoint = Array::<f32>::new(per_lane);
    load_rates(
        a,
        &mut rates,
        place.channel,
        place.lane,
        state,
        0usize,
        per_lane,
    );
    let row = place.batch * chunks + chunk0 + place.chunk;
    load_states(
        saved,
        &mut h,
        row,
        place.channel,
        place.lane,
        state,
        inner,
        0usize,
        per_lane,
    );
    #[unroll]
    for k in 0..per_lane {
        product[k] = 1.0f32;
        adjoint[k] = 0.0f32;
    }
    let bias = entry(bias, place.channel, 0.0f32);
    let mut sum = 0.0f32;

    for tile in 0..count.div_ceil(comptime!(config.tile)) {
        let t0 = tile * comptime!(config.tile);
        let rows = min(comptime!(config.tile).runtime(), count - t0);
        sync_cube();
        load_tile::<P>(b, &mut b_tile, first + t0, rows, b_stride, state, config);
        load_tile::<P>(c, &mut c_tile, first + t0, rows, c_stride, state, config);
        sync_cube();
        for group in 0..rows.div_ceil(SUB) {
            let sub = sub_row + t0 / SUB + group;
            store_states(sub_states, &h, sub, &place, state, inner, per_lane);
            // All loads of the sub-chunk before its first use of one.
            let mut us = Array::<f32>::new(SUB);
            let mut deltas = Array::<f32>::new(SUB);
            let mut dys = Array::<f32>::new(SUB);
            let mut gates = Array::<f32>::new(SUB);
            #[unroll]
            for i in 0..SUB {
                let t = min(t0 + group * SUB + i, count - 1);
                let at = base + t * inner;
                us[i] = f32::cast_from(u[at]);
                deltas[i] = f32::cast_from(delta[at]);
                dys[i] = f32::cast_from(dy[at]);
                gates[i] = gate_at(z, (first + t) * z_stride + place.channel);
            }
            #[unroll]
            for i in 0..SUB {
                let t = group * SUB + i;
                if t < rows {
                    let dt = step_size(deltas[i] + bias, config.softplus, config.ptx);
                    let x = dt * us[i];
                    let mut w = dys[i];
                    if comptime!(z.is_some()) {
                        w = w * gates[i] * sigmoid(gates[i], config.ptx);
                    }
                    if is_reset(resets, first + t0 + t) {
                        sum = CLEARED;
                        #[unroll]
                        for k in 0..per_lane {
                            h[k] = 0.0f32;
                            product[k] = 0.0f32;
                        }
                    } else if sum < CLEARED {
                        sum += dt;
                    }
                    let row = (t * comptime!(config.lanes) + place.lane) * comptime!(per_lane / 4);
                    #[unroll]
                    for q in 0..comptime!(per_lane / 4) {
                        let bs = b_tile[row + q];
                        let cs = c_tile[row + q];
                        #[unroll]
                        for k in 0..4usize {
                            let n = comptime!(q * 4 + k);
                            let decay = exp2(dt * rates[n], config.ptx);
                            h[n] = fma(decay, h[n], x * bs.extract(k));
                            product[n] *= decay;
                            adjoint[n] = fma(product[n], w * cs.extract(k), adjoint[n]);
                        }
                    }
                }
            }
        }
    }
    store_states(ends, &adjoint, own_row, &place, state, inner, per_lane);
    if place.inside && place.lane == 0 {
        steps[own_row * inner + place.channel] = sum;
    }
}
