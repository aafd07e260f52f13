//! Forward in one pass over all positions, for enough channels to keep the device busy without
//! cutting time.
//!
//! A channel's states are spread over a few neighbouring lanes. Positions come in *groups* of as
//! many as there are lanes: each lane works out step size and gate of one of them, the lanes hand
//! each other the step sizes, and the sums over states come back spread over the lanes as the
//! positions were ([`spread_sum`]). So units wait for one another only where a stage's B and C change
//! in shared memory; a few groups are one piece of code without a loop, in which the element-wise
//! work of one group, the exponentials of the next and the loads of later ones overlap.

use cubecl::ir::ElemType;
use cubecl::prelude::*;

use super::common::{
    CLEARED, V4, at_position, entry, fetch_tile, gate_at, load_initial, load_rates, output, place,
    put_tile, store_last, store_states,
};
use super::forward::advance;
use super::plan::SweepConfig;
use crate::cube::OptionalInput;
use crate::cube::math::{sigmoid, step_size};
use crate::cube::reduce::{spread_start, spread_sum};

/// The outputs, the states entering every chunk (`saved`, `[B, chunks, N, E]`) and the last states
/// (`[B, E, N]`).
#[cube(launch_unchecked, address_type = "dynamic")]
pub(super) fn spread_outputs<U: Float, D: Float, P: Float, Z: Float, S: Size>(
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
    #[comptime] config: SweepConfig,
    #[define(U, D, P, Z)] _types: [ElemType; 4],
) {
    let place = place(inner, 1usize.runtime(), config);
    if place.batch >= batch {
        terminate!();
    }
    let per_lane = comptime!(config.per_lane);
    let lanes = comptime!(config.lanes);
    let groups = comptime!(config.groups());
    let chunks = length.div_ceil(comptime!(config.chunk));
    let first = place.batch * length;
    let base = first * inner + place.channel;
    let z_base = first * z_stride + place.channel;
    // The lane's own position of a group, and the plane's lane that the channel's first one is.
    let turn = spread_start(place.lane, lanes, lanes, 1usize);
    let lane0 = UNIT_POS_PLANE - place.lane as u32;

    let mut b_tile = Shared::<[V4]>::new_slice(comptime!(config.tile_vectors()));
    let mut c_tile = Shared::<[V4]>::new_slice(comptime!(config.tile_vectors()));
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
    load_initial(initial, &mut h, &place, state, inner, per_lane);
    let bias = entry(bias, place.channel, 0.0f32);
    let skip = entry(d, place.channel, 0.0f32);

    let mut next_u = Array::<U>::new(groups);
    let mut next_delta = Array::<D>::new(groups);
    let mut next_z = Array::<Z>::new(groups);
    let mut next_clear = Array::<f32>::new(groups);
    #[unroll]
    for g in 0..groups {
        let t = comptime!(g * config.lanes) + turn;
        let at = at_position(base, t, length, inner);
        next_u[g] = u[at];
        next_delta[g] = delta[at];
        next_z[g] = gate_at(z, at_position(z_base, t, length, z_stride));
        next_clear[g] = clear_at(resets, at_position(first, t, length, 1usize));
    }
    let mut next_b = Array::<Vector<P, S>>::new(comptime!(config.tile_loads()));
    let mut next_c = Array::<Vector<P, S>>::new(comptime!(config.tile_loads()));
    let rows = min(comptime!(config.tile).runtime(), length);
    fetch_tile(b, &mut next_b, first, rows, b_stride, state, config);
    fetch_tile(c, &mut next_c, first, rows, c_stride, state, config);

    for tile in 0..length.div_ceil(comptime!(config.tile)) {
        let t0 = tile * comptime!(config.tile);
        let rows = min(comptime!(config.tile).runtime(), length - t0);
        sync_cube();
        put_tile(&next_b, &mut b_tile, rows, state, config);
        put_tile(&next_c, &mut c_tile, rows, state, config);
        sync_cube();
        // The stage that comes next; the last position at the end.
        let ahead = min(t0 + comptime!(config.tile), length - 1);
        let rows_ahead = min(comptime!(config.tile).runtime(), length - ahead);
        let from = first + ahead;
        fetch_tile(b, &mut next_b, from, rows_ahead, b_stride, state, config);
        fetch_tile(c, &mut next_c, from, rows_ahead, c_stride, state, config);
        if t0 % comptime!(config.chunk) == 0 {
            let row = place.batch * chunks + t0 / comptime!(config.chunk);
            store_states(saved, &h, row, &place, state, inner, per_lane);
        }
        for block in 0..rows.div_ceil(comptime!(config.block())) {
            let block0 = block * comptime!(config.block());
            let mut us = Array::<f32>::new(groups);
            let mut gates = Array::<f32>::new(groups);
            let mut steps = Array::<f32>::new(groups);
            let mut xs = Array::<f32>::new(groups);
            #[unroll]
            for g in 0..groups {
                let t = t0 + block0 + comptime!(g * config.lanes) + turn;
                let raw = f32::cast_from(next_delta[g]);
                us[g] = f32::cast_from(next_u[g]);
                gates[g] = f32::cast_from(next_z[g]);
                let dt = step_size(raw + bias, config.softplus, config.ptx);
                // A position beyond the last leaves the state as it is.
                let dt = select(t < length, dt, 0.0f32);
                xs[g] = dt * us[g];
                steps[g] = dt;
                if comptime!(resets.is_some()) {
                    steps[g] = dt + select(t < length, next_clear[g], 0.0f32);
                }
                let t = t + comptime!(config.block());
                let at = at_position(base, t, length, inner);
                next_u[g] = u[at];
                next_delta[g] = delta[at];
                next_z[g] = gate_at(z, at_position(z_base, t, length, z_stride));
                next_clear[g] = clear_at(resets, at_position(first, t, length, 1usize));
            }
            #[unroll]
            for g in 0..groups {
                let mut values = Array::<f32>::new(lanes);
                #[unroll]
                for i in 0..lanes {
                    let t = block0 + comptime!(g * config.lanes + i);
                    let owner = lane0 + comptime!(owner(i, config.lanes));
                    let step = of_lane(steps[g], owner, lanes);
                    let x = of_lane(xs[g], owner, lanes);
                    advance(&mut h, &rates, &b_tile, step, x, t, place.lane, config);
                    values[i] = output(&h, &c_tile, t, place.lane, config);
                }
                spread_sum(&mut values, place.lane, lanes, lanes, 1usize);
                let mut value = fma(skip, us[g], values[0]);
                if comptime!(z.is_some()) {
                    value = value * gates[g] * sigmoid(gates[g], config.ptx);
                }
                let t = t0 + block0 + comptime!(g * config.lanes) + turn;
                if place.inside && t < length {
                    y[base + t * inner] = U::cast_from(value);
                }
            }
        }
    }
    store_last(last, &h, &place, state, inner, per_lane);
}

/// The lane of a channel that has position `i` of a group: the inverse of [`spread_start`], which
/// turns the bits of the lane's number around.
const fn owner(i: usize, lanes: usize) -> u32 {
    let bits = lanes.ilog2();
    if bits == 0 {
        0
    } else {
        (i as u32).reverse_bits() >> (32 - bits)
    }
}

/// The value that the plane's lane `owner` has.
#[cube]
fn of_lane(value: f32, owner: u32, #[comptime] lanes: usize) -> f32 {
    if comptime!(lanes == 1) {
        value
    } else {
        plane_shuffle(value, owner)
    }
}

/// [`CLEARED`] where position `at` of all sequences clears the state, else 0.
#[cube]
fn clear_at(resets: &OptionalInput, at: usize) -> f32 {
    #[comptime]
    match resets {
        ComptimeOption::Some(resets) => select(resets[at] > 0.5f32, CLEARED, 0.0f32),
        ComptimeOption::None => 0.0f32.runtime(),
    }
}
