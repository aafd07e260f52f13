//! First kernel of backward: one sweep left to right, for one exponential a state element, leaves
//! the states that the main kernel recomputes from and the adjoint that leaves each chunk. What
//! needs the outputs before the gate is done here too: all states of a channel are close by.

use cubecl::ir::ElemType;
use cubecl::prelude::*;

use super::common::{
    CLEARED, V4, decay_step, elements, entries, fetch_tile, gate_at, load_rates, load_states,
    output, place, put_clears, put_tile, store_states,
};
use super::plan::{SUB, SweepConfig};
use crate::cube::OptionalInput;
use crate::cube::math::{exp2, sigmoid, step_size};
use crate::cube::reduce::{spread_start, spread_sum, spread_width, spread_writer};

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
pub(super) fn adjoint_ends<U: Float, D: Float, P: Float, Z: Float, V: Size, S: Size>(
    u: &[Vector<U, V>],
    delta: &[Vector<D, V>],
    b: &[Vector<P, S>],
    c: &[Vector<P, S>],
    a: &[f32],
    d: &OptionalInput,
    z: &ComptimeOption<Box<[Vector<Z, V>]>>,
    bias: &OptionalInput,
    resets: &OptionalInput,
    dy: &[Vector<U, V>],
    saved: &[f32],
    sub_states: &mut [V4],
    ends: &mut [f32],
    steps_sum: &mut [f32],
    dz: &mut [Vector<Z, V>],
    y: &mut [Vector<U, V>],
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
    let tile = comptime!(config.tile);
    let per_lane = comptime!(config.per_lane);
    let lanes = comptime!(config.lanes);
    let vector = comptime!(config.vector);
    let place = place(inner, segment, config);
    if place.batch >= batch {
        terminate!();
    }
    let chunks = length.div_ceil(comptime!(config.chunk));
    let skipped = (chunk0 + place.chunk) * comptime!(config.chunk);
    let first = place.batch * length + skipped;
    let count = min(comptime!(config.chunk).runtime(), length - skipped);
    let own_row = place.batch * segment + place.chunk;
    let row = place.batch * chunks + chunk0 + place.chunk;

    let mut b_tile = Shared::<[V4]>::new_slice(comptime!(config.tile * config.states() / 4));
    let mut c_tile = Shared::<[V4]>::new_slice(comptime!(config.tile * config.states() / 4));
    // (Δ, Δ·u, gated dy, the gate's sigmoid) of every position and channel.
    let mut steps = Shared::<[V4]>::new_slice(comptime!(config.tile * config.channels()));
    let mut sums = Shared::<[f32]>::new_slice(comptime!(config.tile * config.channels()));
    let mut clears = Shared::<[f32]>::new_slice(tile);
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
    let mut sum = 0.0f32;

    let own = elements(place.channel0, inner, config);
    let bias = entries::<V>(bias, own.channel, vector);
    let skip = entries::<V>(d, own.channel, vector);
    let mut skipped_sum = Array::<f32>::new(vector);
    #[unroll]
    for i in 0..vector {
        skipped_sum[i] = 0.0f32;
    }
    let passes = comptime!(config.passes());

    for stage in 0..count.div_ceil(tile) {
        let t0 = stage * tile;
        let rows = min(comptime!(config.tile).runtime(), count - t0);
        let mut b_fetched = Array::<Vector<P, S>>::new(comptime!(config.tile_loads()));
        let mut c_fetched = Array::<Vector<P, S>>::new(comptime!(config.tile_loads()));
        fetch_tile(b, &mut b_fetched, first + t0, rows, b_stride, state, config);
        fetch_tile(c, &mut c_fetched, first + t0, rows, c_stride, state, config);
        #[unroll]
        for p in 0..passes {
            let t = own.turn + comptime!(p * config.stride());
            let valid = own.inside && t < rows;
            let position = first + t0 + min(t, rows - 1);
            let at = (position * inner + own.channel) / vector;
            let us = u[at];
            let deltas = delta[at];
            let dys = dy[at];
            let gates = gate_at(z, (position * z_stride + own.channel) / vector);
            #[unroll]
            for i in 0..vector {
                let raw = f32::cast_from(deltas.extract(i)) + bias.extract(i);
                let dt = select(valid, step_size(raw, config.softplus, config.ptx), 0.0f32);
                let mut w = f32::cast_from(dys.extract(i));
                let mut step = V4::new(0.0f32);
                if comptime!(z.is_some()) {
                    let gate = f32::cast_from(gates.extract(i));
                    let slope = sigmoid(gate, config.ptx);
                    w = w * gate * slope;
                    step.insert(3usize, slope);
                }
                let w = select(valid, w, 0.0f32);
                let uf = f32::cast_from(us.extract(i));
                step.insert(0usize, dt);
                step.insert(1usize, dt * uf);
                step.insert(2usize, w);
                if wanted.d {
                    skipped_sum[i] = fma(w, uf, skipped_sum[i]);
                }
                if comptime!(config.exact()) {
                    steps[t * columns + own.column + i] = step;
                } else {
                    if t < tile {
                        steps[t * columns + own.column + i] = step;
                    }
                }
            }
        }
        put_tile(&b_fetched, &mut b_tile, rows, state, config);
        put_tile(&c_fetched, &mut c_tile, rows, state, config);
        put_clears(resets, &mut clears, first + t0, rows, config);
        sync_cube();

        let width = comptime!(config.group());
        for group in 0..comptime!(config.tile / config.group()) {
            let mut values = Array::<f32>::new(width);
            #[unroll]
            for i in 0..width {
                let t = group * width + i;
                if comptime!(i % SUB == 0) {
                    let sub = own_row * comptime!(config.chunk / SUB) + (t0 + t) / SUB;
                    let quarters = state.div_ceil(4usize);
                    #[unroll]
                    for q in 0..comptime!(per_lane / 4) {
                        let quarter = place.lane * comptime!(per_lane / 4) + q;
                        let mut four = V4::new(0.0f32);
                        #[unroll]
                        for k in 0..4usize {
                            four.insert(k, h[comptime!(q * 4 + k)]);
                        }
                        if place.inside && quarter < quarters {
                            sub_states[(sub * quarters + quarter) * inner + place.channel] = four;
                        }
                    }
                }
                let step = steps[t * columns + place.column];
                let dt = decay_step(
                    step.extract(0usize),
                    &clears,
                    t,
                    comptime!(resets.is_some()),
                );
                let x = step.extract(1usize);
                let w = step.extract(2usize);
                sum = min(sum + dt, CLEARED);
                let row = (t * lanes + place.lane) * comptime!(per_lane / 4);
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
                    values[i] = output(&h, &c_tile, row, per_lane, 4usize);
                }
            }
            if comptime!(wanted.z || wanted.y) {
                spread_sum(&mut values, place.lane, width, lanes, 1usize);
                let start = group * width + spread_start(place.lane, width, lanes, 1usize);
                if spread_writer(place.lane, width, lanes, 1usize) {
                    #[unroll]
                    for j in 0..comptime!(spread_width(config.group(), config.lanes)) {
                        sums[(start + j) * columns + place.column] = values[j];
                    }
                }
            }
        }
        sync_cube();

        if comptime!(wanted.z || wanted.y) {
            #[unroll]
            for p in 0..passes {
                let t = own.turn + comptime!(p * config.stride());
                if own.inside && t < rows {
                    let position = first + t0 + t;
                    let at = (position * inner + own.channel) / vector;
                    let us = u[at];
                    let dys = dy[at];
                    let gates = gate_at(z, (position * z_stride + own.channel) / vector);
                    let mut out = Vector::<U, V>::new(U::from_int(0));
                    let mut dgates = Vector::<Z, V>::new(Z::from_int(0));
                    #[unroll]
                    for i in 0..vector {
                        let place = t * columns + own.column + i;
                        let uf = f32::cast_from(us.extract(i));
                        let mut value = fma(skip.extract(i), uf, sums[place]);
                        if comptime!(z.is_some()) {
                            let gate = f32::cast_from(gates.extract(i));
                            let s = steps[place].extract(3usize);
                            let slope = s * fma(gate, 1.0f32 - s, 1.0f32);
                            let dgate = f32::cast_from(dys.extract(i)) * value * slope;
                            dgates.insert(i, Z::cast_from(dgate));
                            value = value * gate * s;
                        }
                        out.insert(i, U::cast_from(value));
                    }
                    if wanted.z {
                        dz[(position * dz_stride + own.channel) / vector] = dgates;
                    }
                    if wanted.y {
                        y[at] = out;
                    }
                }
            }
            // The sums are read before the next stage's first write behind its barrier; the
            // steps are read and written by the same unit.
        }
    }

    store_states(ends, &adjoint, own_row, &place, state, inner, per_lane);
    if place.inside && place.lane == 0 {
        steps_sum[own_row * inner + place.channel] = sum;
    }
    if wanted.d {
        // Units of one channel have different positions of it.
        sync_cube();
        let turns = comptime!(config.tile.min(config.stride()));
        if own.turn < turns {
            #[unroll]
            for i in 0..vector {
                sums[own.turn * columns + own.column + i] = skipped_sum[i];
            }
        }
        sync_cube();
        if own.turn == 0 && own.inside {
            #[unroll]
            for i in 0..vector {
                let mut total = 0.0f32;
                #[unroll]
                for turn in 0..turns {
                    total += sums[comptime!(turn * config.channels()) + own.column + i];
                }
                sums_e[(row * (state + 2) + state) * inner + own.channel + i] = total;
            }
        }
    }
}
