//! First kernel of backward: one sweep left to right, for one exponential a state element, leaves
//! the states that the main kernel recomputes from and the adjoint that leaves each chunk. What
//! needs the outputs before the gate is done here too: all states of a channel are close by.

use cubecl::ir::ElemType;
use cubecl::prelude::*;

use super::common::{
    CLEARED, Place, V4, at_position, decay_step, entry, fetch_tile, gate_at, load_rates,
    load_states, output, place, put_clears, put_tile, store_states,
};
use super::copies::{arrived, copier, copy_sub_chunk, numbers, own};
use super::plan::{SUB, SweepConfig};
use crate::cube::OptionalInput;
use crate::cube::math::{exp2, sigmoid, step_size};
use crate::cube::reduce::lane_sum;

/// Which results are wanted beyond the gradients of u, delta, A, B and C.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Wanted {
    /// The skip connection's gradient.
    pub d: bool,
    /// The gate's.
    pub z: bool,
    /// The bias's.
    pub bias: bool,
    /// The outputs, computed once more.
    pub y: bool,
}

/// For the `segment` chunks from `chunk0` on: the states at the start of every sub-chunk,
/// `[B, segment · chunk / SUB, N / 4, E, 4]`; what the chunk's own outputs send to its left end,
/// `[B, segment, N, E]`; the sum of its steps, `[B, segment, E]`; the gradient of the gate, the
/// outputs, and the chunk's partial of dD in row N of `sums_e`, `[B, chunks, N + 2, E]`.
///
/// The adjoint at the left end is `Σ_t (Π_{s≤t} a_s) · C_t · dy_t`: with the running product of the
/// decays it is computed in the direction of the states, and needs no sweep of its own.
#[cube(launch_unchecked, address_type = "dynamic")]
pub(super) fn adjoint_ends<U: Float, D: Float, P: Float, Z: Float, S: Size>(
    u: &[U],
    delta: &[D],
    b: &[Vector<P, S>],
    c: &[Vector<P, S>],
    a: &[f32],
    d: &OptionalInput,
    z: &ComptimeOption<Box<[Z]>>,
    bias: &OptionalInput,
    resets: &OptionalInput,
    dy: &[U],
    saved: &[f32],
    sub_states: &mut [V4],
    ends: &mut [f32],
    steps: &mut [f32],
    dz: &mut [Z],
    y: &mut [U],
    sums_e: &mut [f32],
    batch: usize,
    length: usize,
    inner: usize,
    state: usize,
    b_stride: usize,
    c_stride: usize,
    z_stride: usize,
    dz_stride: usize,
    y_stride: usize,
    chunk0: usize,
    segment: usize,
    #[comptime] wanted: Wanted,
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
    let row = place.batch * chunks + chunk0 + place.chunk;
    let sub_row = own_row * comptime!(config.chunk / SUB);

    let mut b_tile = Shared::<[V4]>::new_slice(comptime!(config.tile_vectors()));
    let mut c_tile = Shared::<[V4]>::new_slice(comptime!(config.tile_vectors()));
    let mut clears = Shared::<[f32]>::new_slice(comptime!(config.tile));
    let mut copied = Shared::<[U]>::new_aligned_slice(comptime!(numbers(&config)), 16usize);
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
        comptime!(resets.is_some()),
        per_lane,
    );
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
    let skip = entry(d, place.channel, 0.0f32);
    let mut sum = 0.0f32;
    let mut skipped_sum = 0.0f32;

    let z_base = first * z_stride + place.channel;
    let channel0 =
        CUBE_POS % inner.div_ceil(comptime!(config.channels())) * comptime!(config.channels());
    let copier = copier(channel0, inner, first, count);
    if comptime!(config.copies) {
        let zero = 0usize.runtime();
        copy_sub_chunk(u, delta, dy, z, &mut copied, &copier, zero, inner, z_stride);
    }

    let mut next_b = Array::<Vector<P, S>>::new(comptime!(config.tile_loads()));
    let mut next_c = Array::<Vector<P, S>>::new(comptime!(config.tile_loads()));
    let rows = min(comptime!(config.tile).runtime(), count);
    fetch_tile(b, &mut next_b, first, rows, b_stride, state, config);
    fetch_tile(c, &mut next_c, first, rows, c_stride, state, config);

    for tile in 0..count.div_ceil(comptime!(config.tile)) {
        let t0 = tile * comptime!(config.tile);
        let rows = min(comptime!(config.tile).runtime(), count - t0);
        sync_cube();
        put_tile(&next_b, &mut b_tile, rows, state, config);
        put_tile(&next_c, &mut c_tile, rows, state, config);
        put_clears(resets, &mut clears, first + t0, rows, config);
        sync_cube();
        // Those of the next tile come while this one is worked on.
        let next0 = min(t0 + comptime!(config.tile), count - 1);
        let next_rows = min(comptime!(config.tile).runtime(), count - next0);
        let from = first + next0;
        fetch_tile(b, &mut next_b, from, next_rows, b_stride, state, config);
        fetch_tile(c, &mut next_c, from, next_rows, c_stride, state, config);
        for group in 0..rows.div_ceil(SUB) {
            let sub = t0 / SUB + group;
            store_sub_states(
                sub_states,
                &h,
                sub_row + sub,
                &place,
                state,
                inner,
                per_lane,
            );
            let mut us = Array::<f32>::new(SUB);
            let mut deltas = Array::<f32>::new(SUB);
            let mut dys = Array::<f32>::new(SUB);
            let mut gates = Array::<f32>::new(SUB);
            if comptime!(config.copies) {
                arrived();
                copy_sub_chunk(
                    u,
                    delta,
                    dy,
                    z,
                    &mut copied,
                    &copier,
                    sub + 1,
                    inner,
                    z_stride,
                );
            } else {
                // All loads of the sub-chunk before its first use of one.
                #[unroll]
                for i in 0..SUB {
                    let t = t0 + group * SUB + i;
                    let at = at_position(base, t, count, inner);
                    us[i] = f32::cast_from(u[at]);
                    deltas[i] = f32::cast_from(delta[at]);
                    dys[i] = f32::cast_from(dy[at]);
                    gates[i] = f32::cast_from(gate_at(z, at_position(z_base, t, count, z_stride)));
                }
            }
            #[unroll]
            for i in 0..SUB {
                let t = group * SUB + i;
                if comptime!(config.copies) {
                    us[i] = own(&copied, &copier, t0 + t, 0usize);
                    deltas[i] = own(&copied, &copier, t0 + t, 1usize);
                    dys[i] = own(&copied, &copier, t0 + t, 2usize);
                    gates[i] = own(&copied, &copier, t0 + t, 3usize);
                }
                let valid = t < rows;
                let dt = step_size(deltas[i] + bias, config.softplus, config.ptx);
                // A position beyond the last leaves states and adjoints as they are.
                let dt = select(valid, dt, 0.0f32);
                let x = dt * us[i];
                let mut w = select(valid, dys[i], 0.0f32);
                let mut gate = 0.0f32;
                if comptime!(z.is_some()) {
                    gate = sigmoid(gates[i], config.ptx);
                    w = w * gates[i] * gate;
                }
                if wanted.d {
                    skipped_sum = fma(w, us[i], skipped_sum);
                }
                let dt = decay_step(dt, &clears, t, comptime!(resets.is_some()));
                sum = min(sum + dt, CLEARED);
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
                if comptime!(wanted.z || wanted.y) {
                    let sum = output(&h, &c_tile, t, place.lane, config);
                    let value = fma(skip, us[i], lane_sum(sum, config.lanes, 1usize));
                    if place.inside && place.lane == 0 && valid {
                        let position = first + t0 + t;
                        let mut gated = value;
                        if wanted.z {
                            let slope = gate * fma(gates[i], 1.0f32 - gate, 1.0f32);
                            dz[position * dz_stride + place.channel] =
                                Z::cast_from(dys[i] * value * slope);
                            gated = value * gates[i] * gate;
                        }
                        if wanted.y {
                            y[position * y_stride + place.channel] = U::cast_from(gated);
                        }
                    }
                }
            }
        }
    }

    if comptime!(config.copies) {
        // Nothing may be on its way when the cube ends.
        arrived();
    }
    store_states(ends, &adjoint, own_row, &place, state, inner, per_lane);
    if place.inside && place.lane == 0 {
        steps[own_row * inner + place.channel] = sum;
        if wanted.d {
            sums_e[(row * (state + 2) + state) * inner + place.channel] = skipped_sum;
        }
    }
}

/// Writes the lane's states to row `row` of `[N / 4, E, 4]` rows.
#[cube]
fn store_sub_states(
    rows: &mut [V4],
    states: &Array<f32>,
    row: usize,
    place: &Place,
    state: usize,
    inner: usize,
    #[comptime] per_lane: usize,
) {
    let quarters = state.div_ceil(4usize);
    #[unroll]
    for q in 0..comptime!(per_lane / 4) {
        let quarter = place.lane * comptime!(per_lane / 4) + q;
        let mut four = V4::new(0.0f32);
        #[unroll]
        for k in 0..4usize {
            four.insert(k, states[comptime!(q * 4 + k)]);
        }
        if place.inside && quarter < quarters {
            rows[(row * quarters + quarter) * inner + place.channel] = four;
        }
    }
}
