//! Kernels of the forward scan.

use cubecl::ir::ElemType;
use cubecl::prelude::*;

use super::common::{
    CLEARED, V2, decay_step, elements, entries, fetch_tile, gate_at, load_initial, load_rates,
    output, place, put_clears, put_tile, store_last, store_states,
};
use super::plan::SweepConfig;
use crate::cube::OptionalInput;
use crate::cube::math::{exp2, sigmoid, step_size};
use crate::cube::reduce::{spread_start, spread_sum, spread_width, spread_writer};

/// First pass: every chunk from a zero state to its end state, `[B, chunks, N, E]`, and the sum of
/// its steps, `[B, chunks, E]` ([`CLEARED`] if it holds a reset).
#[cube(launch_unchecked, address_type = "dynamic")]
pub(super) fn chunk_ends<U: Float, D: Float, P: Float, V: Size, S: Size, W: Size>(
    u: &[Vector<U, V>],
    delta: &[Vector<D, V>],
    b: &[Vector<P, S>],
    a: &[f32],
    bias: &OptionalInput,
    resets: &OptionalInput,
    ends: &mut [f32],
    steps_sum: &mut [f32],
    batch: usize,
    length: usize,
    inner: usize,
    state: usize,
    b_stride: usize,
    #[comptime] config: SweepConfig,
    #[define(U, D, P)] _types: [ElemType; 3],
) {
    let columns = comptime!(config.channels());
    let tile = comptime!(config.tile);
    let per_lane = comptime!(config.per_lane);
    let chunks = length.div_ceil(comptime!(config.chunk));
    let place = place(inner, chunks, config);
    if place.batch >= batch {
        terminate!();
    }
    let first = place.batch * length + place.chunk * comptime!(config.chunk);
    let count = min(
        comptime!(config.chunk).runtime(),
        length - place.chunk * comptime!(config.chunk),
    );
    let mut b_tile = Shared::<[Vector<f32, W>]>::new_slice(comptime!(
        config.tile * config.states() / config.width()
    ));
    let mut steps = Shared::<[V2]>::new_slice(comptime!(config.tile * config.channels()));
    let mut clears = Shared::<[f32]>::new_slice(tile);
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
    let mut sum = 0.0f32;

    let own = elements(place.channel0, inner, config);
    let bias = entries::<V>(bias, own.channel, comptime!(config.vector));
    let passes = comptime!(config.passes());
    let mut next_u = Array::<Vector<U, V>>::new(passes);
    let mut next_delta = Array::<Vector<D, V>>::new(passes);
    let mut next_b = Array::<Vector<P, S>>::new(comptime!(config.tile_loads()));
    #[unroll]
    for p in 0..passes {
        let t = min(own.turn + comptime!(p * config.stride()), count - 1);
        let at = ((first + t) * inner + own.channel) / comptime!(config.vector);
        next_u[p] = u[at];
        next_delta[p] = delta[at];
    }
    fetch_tile(
        b,
        &mut next_b,
        first,
        min(comptime!(config.tile).runtime(), count),
        b_stride,
        state,
        config,
    );

    for stage in 0..count.div_ceil(tile) {
        let t0 = stage * tile;
        let rows = min(comptime!(config.tile).runtime(), count - t0);
        #[unroll]
        for p in 0..passes {
            let t = own.turn + comptime!(p * config.stride());
            put_step(
                next_u[p],
                next_delta[p],
                bias,
                &mut steps,
                t * columns + own.column,
                own.inside && t < rows,
                config,
            );
        }
        put_tile(&next_b, &mut b_tile, rows, state, config);
        put_clears(resets, &mut clears, first + t0, rows, config);
        sync_cube();
        let ahead = min(t0 + tile, count - 1);
        #[unroll]
        for p in 0..passes {
            let t = min(ahead + own.turn + comptime!(p * config.stride()), count - 1);
            let at = ((first + t) * inner + own.channel) / comptime!(config.vector);
            next_u[p] = u[at];
            next_delta[p] = delta[at];
        }
        fetch_tile(
            b,
            &mut next_b,
            first + ahead,
            min(comptime!(config.tile).runtime(), count - ahead),
            b_stride,
            state,
            config,
        );
        for group in 0..comptime!(config.tile / config.group()) {
            #[unroll]
            for i in 0..comptime!(config.group()) {
                let t = group * comptime!(config.group()) + i;
                let step = steps[t * columns + place.column];
                let dt = decay_step(
                    step.extract(0usize),
                    &clears,
                    t,
                    comptime!(resets.is_some()),
                );
                sum = min(sum + dt, CLEARED);
                advance(
                    &mut h,
                    &rates,
                    &b_tile,
                    dt,
                    step.extract(1usize),
                    t,
                    place.lane,
                    config,
                );
            }
        }
        sync_cube();
    }
    let row = place.batch * chunks + place.chunk;
    store_states(ends, &h, row, &place, state, inner, per_lane);
    if place.inside && place.lane == 0 {
        steps_sum[row * inner + place.channel] = sum;
    }
}

/// Puts (Δ, Δ · u) of one position and a few channels into shared memory.
#[cube]
fn put_step<U: Float, D: Float, V: Size>(
    u: Vector<U, V>,
    delta: Vector<D, V>,
    bias: Vector<f32, V>,
    steps: &mut Shared<[V2]>,
    at: usize,
    valid: bool,
    #[comptime] config: SweepConfig,
) {
    #[unroll]
    for i in 0..comptime!(config.vector) {
        let raw = f32::cast_from(delta.extract(i)) + bias.extract(i);
        let dt = step_size(raw, config.softplus, config.ptx);
        // Positions and channels beyond the last leave the state as it is.
        let dt = select(valid, dt, 0.0f32);
        let mut step = V2::new(0.0f32);
        step.insert(0usize, dt);
        step.insert(1usize, dt * f32::cast_from(u.extract(i)));
        if comptime!(config.exact()) {
            steps[at + i] = step;
        } else {
            if at + i < comptime!(config.tile * config.channels()) {
                steps[at + i] = step;
            }
        }
    }
}

/// The lane's states pass position `t` of the tile.
#[cube]
fn advance<W: Size>(
    h: &mut Array<f32>,
    rates: &Array<f32>,
    b_tile: &Shared<[Vector<f32, W>]>,
    dt: f32,
    x: f32,
    t: usize,
    lane: usize,
    #[comptime] config: SweepConfig,
) {
    let width = comptime!(config.width());
    let row = (t * comptime!(config.lanes) + lane) * comptime!(config.per_lane / config.width());
    #[unroll]
    for q in 0..comptime!(config.per_lane / config.width()) {
        let bs = b_tile[row + q];
        #[unroll]
        for k in 0..width {
            let n = comptime!(q * config.width() + k);
            h[n] = fma(exp2(dt * rates[n], config.ptx), h[n], x * bs.extract(k));
        }
    }
}

/// The outputs. Either every chunk from its entering state in `saved` (`walk` off), or every
/// sequence from its initial state, writing the entering states of the chunks it passes and the
/// last state.
#[cube(launch_unchecked, address_type = "dynamic")]
pub(super) fn outputs<U: Float, D: Float, P: Float, Z: Float, V: Size, S: Size, W: Size>(
    u: &[Vector<U, V>],
    delta: &[Vector<D, V>],
    b: &[Vector<P, S>],
    c: &[Vector<P, S>],
    a: &[f32],
    d: &OptionalInput,
    z: &ComptimeOption<Box<[Vector<Z, V>]>>,
    bias: &OptionalInput,
    initial: &OptionalInput,
    resets: &OptionalInput,
    saved: &mut [f32],
    last: &mut [f32],
    y: &mut [Vector<U, V>],
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
    let columns = comptime!(config.channels());
    let tile = comptime!(config.tile);
    let per_lane = comptime!(config.per_lane);
    let lanes = comptime!(config.lanes);
    let vector = comptime!(config.vector);
    let chunks = length.div_ceil(comptime!(config.chunk));
    let place = place(inner, if walk { 1usize.runtime() } else { chunks }, config);
    if place.batch >= batch {
        terminate!();
    }
    let skipped = place.chunk * comptime!(config.chunk);
    let first = place.batch * length + skipped;
    let count = if walk {
        length
    } else {
        min(comptime!(config.chunk).runtime(), length - skipped)
    };

    let vectors = comptime!(config.tile * config.states() / config.width());
    let mut b_tile = Shared::<[Vector<f32, W>]>::new_slice(vectors);
    let mut c_tile = Shared::<[Vector<f32, W>]>::new_slice(vectors);
    let mut steps = Shared::<[V2]>::new_slice(comptime!(config.tile * config.channels()));
    let mut sums = Shared::<[f32]>::new_slice(comptime!(config.tile * config.channels()));
    let mut clears = Shared::<[f32]>::new_slice(tile);
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

    let own = elements(place.channel0, inner, config);
    let bias = entries::<V>(bias, own.channel, vector);
    let skip = entries::<V>(d, own.channel, vector);
    let passes = comptime!(config.passes());
    let mut next_u = Array::<Vector<U, V>>::new(passes);
    let mut next_delta = Array::<Vector<D, V>>::new(passes);
    let mut next_b = Array::<Vector<P, S>>::new(comptime!(config.tile_loads()));
    let mut next_c = Array::<Vector<P, S>>::new(comptime!(config.tile_loads()));
    #[unroll]
    for p in 0..passes {
        let t = min(own.turn + comptime!(p * config.stride()), count - 1);
        let at = ((first + t) * inner + own.channel) / vector;
        next_u[p] = u[at];
        next_delta[p] = delta[at];
    }
    fetch_tile(
        b,
        &mut next_b,
        first,
        min(comptime!(config.tile).runtime(), count),
        b_stride,
        state,
        config,
    );
    fetch_tile(
        c,
        &mut next_c,
        first,
        min(comptime!(config.tile).runtime(), count),
        c_stride,
        state,
        config,
    );

    for stage in 0..count.div_ceil(tile) {
        let t0 = stage * tile;
        let rows = min(comptime!(config.tile).runtime(), count - t0);
        let mut us = Array::<Vector<U, V>>::new(passes);
        let mut zs = Array::<Vector<Z, V>>::new(passes);
        #[unroll]
        for p in 0..passes {
            let t = own.turn + comptime!(p * config.stride());
            us[p] = next_u[p];
            put_step(
                next_u[p],
                next_delta[p],
                bias,
                &mut steps,
                t * columns + own.column,
                own.inside && t < rows,
                config,
            );
        }
        put_tile(&next_b, &mut b_tile, rows, state, config);
        put_tile(&next_c, &mut c_tile, rows, state, config);
        put_clears(resets, &mut clears, first + t0, rows, config);
        sync_cube();

        // Loads whose results are needed after the recurrences.
        let ahead = min(t0 + tile, count - 1);
        #[unroll]
        for p in 0..passes {
            let turn = own.turn + comptime!(p * config.stride());
            let at = ((first + min(ahead + turn, count - 1)) * inner + own.channel) / vector;
            next_u[p] = u[at];
            next_delta[p] = delta[at];
            let t = min(t0 + turn, count - 1);
            zs[p] = gate_at(z, ((first + t) * z_stride + own.channel) / vector);
        }
        let ahead_rows = min(comptime!(config.tile).runtime(), count - ahead);
        fetch_tile(
            b,
            &mut next_b,
            first + ahead,
            ahead_rows,
            b_stride,
            state,
            config,
        );
        fetch_tile(
            c,
            &mut next_c,
            first + ahead,
            ahead_rows,
            c_stride,
            state,
            config,
        );

        if walk {
            if t0 % comptime!(config.chunk) == 0 {
                let row = place.batch * chunks + t0 / comptime!(config.chunk);
                store_states(saved, &h, row, &place, state, inner, per_lane);
            }
        }
        let width = comptime!(config.group());
        #[unroll(comptime!(config.unroll))]
        for group in 0..comptime!(config.tile / config.group()) {
            let mut values = Array::<f32>::new(width);
            #[unroll]
            for i in 0..width {
                let t = group * width + i;
                let step = steps[t * columns + place.column];
                let dt = decay_step(
                    step.extract(0usize),
                    &clears,
                    t,
                    comptime!(resets.is_some()),
                );
                advance(
                    &mut h,
                    &rates,
                    &b_tile,
                    dt,
                    step.extract(1usize),
                    t,
                    place.lane,
                    config,
                );
                let row = (t * lanes + place.lane) * comptime!(config.per_lane / config.width());
                values[i] = output(&h, &c_tile, row, per_lane, comptime!(config.width()));
            }
            spread_sum(&mut values, place.lane, width, lanes, 1usize);
            let start = group * width + spread_start(place.lane, width, lanes, 1usize);
            if spread_writer(place.lane, width, lanes, 1usize) {
                #[unroll]
                for j in 0..comptime!(spread_width(config.group(), config.lanes)) {
                    sums[(start + j) * columns + place.column] = values[j];
                }
            }
        }
        sync_cube();

        #[unroll]
        for p in 0..passes {
            let t = own.turn + comptime!(p * config.stride());
            if own.inside && t < rows {
                let mut out = Vector::<U, V>::new(U::from_int(0));
                #[unroll]
                for i in 0..vector {
                    let sum = sums[t * columns + own.column + i];
                    let mut value = fma(skip.extract(i), f32::cast_from(us[p].extract(i)), sum);
                    if comptime!(z.is_some()) {
                        let gate = f32::cast_from(zs[p].extract(i));
                        value = value * gate * sigmoid(gate, config.ptx);
                    }
                    out.insert(i, U::cast_from(value));
                }
                y[((first + t0 + t) * inner + own.channel) / vector] = out;
            }
        }
    }
    if walk {
        store_last(last, &h, &place, state, inner, per_lane);
    }
}
