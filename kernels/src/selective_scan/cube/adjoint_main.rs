//! Main kernel of backward: right to left over the sub-chunks of a chunk, each of them a stage.
//!
//! A part of the states has a part of the cube's units, neighbouring units neighbouring channels. A unit
//! has [`SweepConfig::per_unit`] channels and goes through them one after the other for every
//! sub-chunk, adding up what they give to dB and dC. Sums over channels and over states go through
//! shared memory: shuffles, with the selects that go with them, are twice the instructions.

use cubecl::ir::ElemType;
use cubecl::prelude::*;

use super::adjoint_ends::Wanted;
use super::adjoint_parts::{
    Activations, InPlace, Seat, channel, fetch_activations, pass_sub_chunk, put_contributions,
    put_steps, put_sums, seat, slot, sum_channels, sum_states,
};
use super::common::{
    V2, V4, elements, entries, fetch_tile, load_rates, load_states, put_clears, put_tile,
};
use super::plan::{FOURS, PAIRS, SUB, SweepConfig};
use crate::cube::OptionalInput;
use crate::cube::math::LN2;
use crate::cube::wide::One;

/// Gradients of one segment of chunks.
///
/// `sub_states` and `entering` (the adjoints that enter each chunk from its right) are of the
/// segment. Partial sums: `sums_bc` holds `[B, cubes, segment · chunk, 2 · states]` (dB, then dC),
/// `sums_e` holds `[B, chunks, N + 2, E]` (dA, then dD, then the bias's). With `in_place`, `delta` or
/// `dy` are not read: `ddelta` and `du` hold them.
#[cube(launch_unchecked, address_type = "dynamic")]
pub(super) fn adjoint_main<U: Float, D: Float, P: Float, Z: Float, V: Size, S: Size>(
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
    sub_states: &[V4],
    entering: &[f32],
    du: &mut [Vector<U, V>],
    ddelta: &mut [Vector<D, V>],
    sums_bc: &mut [V2],
    sums_e: &mut [f32],
    batch: usize,
    length: usize,
    inner: usize,
    state: usize,
    b_stride: usize,
    c_stride: usize,
    z_stride: usize,
    chunk0: usize,
    segment: usize,
    #[comptime] wanted: Wanted,
    #[comptime] in_place: InPlace,
    #[comptime] config: SweepConfig,
    #[define(U, D, P, Z)] _types: [ElemType; 4],
) {
    let columns = comptime!(config.channels());
    let tile = comptime!(config.tile);
    let vector = comptime!(config.vector);
    let per_lane = comptime!(config.per_lane);
    let per_unit = comptime!(config.per_unit);
    let held = comptime!(per_lane * per_unit);
    let states = comptime!(config.states());
    let cubes = inner.div_ceil(columns);
    let cube = CUBE_POS % cubes;
    let chunk = CUBE_POS / cubes % segment;
    let sequence = CUBE_POS / cubes / segment;
    if sequence >= batch {
        terminate!();
    }
    let seat = seat(cube, inner, config);
    let chunks = length.div_ceil(comptime!(config.chunk));
    let skipped = (chunk0 + chunk) * comptime!(config.chunk);
    let first = sequence * length + skipped;
    let count = min(comptime!(config.chunk).runtime(), length - skipped);
    let own_row = sequence * segment + chunk;
    let sub_row = own_row * comptime!(config.chunk / SUB);
    let quarters = state.div_ceil(4usize);

    let mut b_tile = Shared::<[V4]>::new_slice(comptime!(config.tile * states / 4));
    let mut c_tile = Shared::<[V4]>::new_slice(comptime!(config.tile * states / 4));
    // (Δ, Δ·u, gated dy, slope of Δ) of every position and channel ...
    let mut steps = Shared::<[V4]>::new_slice(comptime!(config.tile * FOURS.places(columns)));
    // ... the parts of the sums over states (dx, dΔ through the decay) ...
    let mut sums = Shared::<[V2]>::new_aligned_slice(
        comptime!(config.lanes * SUB * PAIRS.places(columns)),
        16usize,
    );
    // ... and the units' contributions to dB and dC.
    let mut crossing = Shared::<[One]>::new_aligned_slice(
        comptime!(SUB * 2 * config.per_lane * config.crossing()),
        16usize,
    );
    let mut clears = Shared::<[f32]>::new_slice(tile);

    let mut rates = Array::<f32>::new(held);
    let mut da = Array::<f32>::new(held);
    let mut g = Array::<f32>::new(held);
    #[unroll]
    for i in 0..per_unit {
        let at = channel(&seat, i, config);
        let offset = comptime!(i * per_lane);
        let inside = seat.channel0 + seat.column + comptime!(i * config.spacing()) < inner;
        load_rates(
            a,
            &mut rates,
            at,
            seat.part,
            state,
            offset,
            comptime!(resets.is_some()),
            per_lane,
        );
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

    let own = elements(seat.channel0, inner, config);
    let bias = entries::<V>(bias, own.channel, vector);
    let skip = entries::<V>(d, own.channel, vector);
    let mut acc_bias = Array::<f32>::new(vector);
    #[unroll]
    for i in 0..vector {
        acc_bias[i] = 0.0f32;
    }
    let own_slot = slot(own.column, FOURS);
    let passes = comptime!(config.passes());
    let stages = count.div_ceil(tile);
    let last = count - 1;
    let mut next = Activations::<U, D, Z, V> {
        u: Array::new(passes),
        delta: Array::new(passes),
        dy: Array::new(passes),
        z: Array::new(passes),
    };
    let last_stage = (stages - 1) * tile;
    fetch_activations(
        u, delta, z, dy, du, ddelta, &mut next, &own, first, last_stage, last, inner, z_stride,
        in_place, config,
    );
    let mut next_b = Array::<Vector<P, S>>::new(comptime!(config.tile_loads()));
    let mut next_c = Array::<Vector<P, S>>::new(comptime!(config.tile_loads()));
    let from = first + last_stage;
    fetch_tile(
        b,
        &mut next_b,
        from,
        count - last_stage,
        b_stride,
        state,
        config,
    );
    fetch_tile(
        c,
        &mut next_c,
        from,
        count - last_stage,
        c_stride,
        state,
        config,
    );
    // The states before the sub-chunk that comes next.
    let mut next_h = Array::<V4>::new(comptime!(held / 4));
    fetch_states(
        sub_states,
        &mut next_h,
        sub_row + stages - 1,
        &seat,
        inner,
        quarters,
        config,
    );

    for turned in 0..stages {
        let t0 = (stages - 1 - turned) * tile;
        let rows = min(comptime!(config.tile).runtime(), count - t0);
        let mut us = Array::<Vector<U, V>>::new(passes);
        #[unroll]
        for p in 0..passes {
            us[p] = next.u[p];
        }
        put_steps(
            &next,
            bias,
            &mut steps,
            &own,
            rows,
            comptime!(z.is_some()),
            config,
        );
        put_tile(&next_b, &mut b_tile, rows, state, config);
        put_tile(&next_c, &mut c_tile, rows, state, config);
        put_clears(resets, &mut clears, first + t0, rows, config);
        sync_cube();
        // The stage that comes next; the first one again at the end.
        let ahead0 = max(t0, SUB.runtime()) - SUB;
        fetch_activations(
            u, delta, z, dy, du, ddelta, &mut next, &own, first, ahead0, last, inner, z_stride,
            in_place, config,
        );
        let (from, held_rows) = (first + ahead0, min(SUB.runtime(), count - ahead0));
        fetch_tile(b, &mut next_b, from, held_rows, b_stride, state, config);
        fetch_tile(c, &mut next_c, from, held_rows, c_stride, state, config);

        let mut over = Array::<f32>::new(comptime!(SUB * 2 * per_lane));
        let mut before = Array::<V4>::new(comptime!(held / 4));
        #[unroll]
        for i in 0..comptime!(held / 4) {
            before[i] = next_h[i];
        }
        let ahead = sub_row + ahead0 / SUB;
        fetch_states(
            sub_states,
            &mut next_h,
            ahead,
            &seat,
            inner,
            quarters,
            config,
        );
        #[unroll]
        for i in 0..per_unit {
            let mut sum_x = Array::<f32>::new(SUB);
            let mut sum_decay = Array::<f32>::new(SUB);
            pass_sub_chunk(
                &before,
                &mut g,
                &mut da,
                &mut over,
                &mut sum_x,
                &mut sum_decay,
                &rates,
                &steps,
                &b_tile,
                &c_tile,
                &clears,
                &seat,
                i,
                comptime!(resets.is_some()),
                config,
            );
            put_sums(&sum_x, &sum_decay, &mut sums, &seat, i, config);
        }
        put_contributions(&over, &mut crossing, &seat, config);
        sync_cube();

        // All that is summed is read before any of it is used.
        let mut totals = Array::<V2>::new(comptime!(passes * vector));
        #[unroll]
        for p in 0..passes {
            let t = min(own.turn + comptime!(p * config.stride()), tile - 1);
            let own_totals = sum_states(&sums, t, own.column, vector, config);
            #[unroll]
            for i in 0..vector {
                totals[comptime!(p * vector) + i] = own_totals[i];
            }
        }
        #[unroll]
        for p in 0..passes {
            let t = own.turn + comptime!(p * config.stride());
            let valid = own.inside && t < rows;
            let mut dus = Vector::<U, V>::new(U::from_int(0));
            let mut ddeltas = Vector::<D, V>::new(D::from_int(0));
            #[unroll]
            for i in 0..vector {
                let step =
                    steps[min(t, tile - 1) * comptime!(FOURS.places(columns)) + own_slot + i];
                let sum = totals[comptime!(p * vector) + i];
                let dx = sum.extract(0usize);
                // The rates carry log₂ e, so the sum does too.
                let through = sum.extract(1usize) * LN2;
                let uf = f32::cast_from(us[p].extract(i));
                let draw = fma(dx, uf, through) * step.extract(3usize);
                let skipped = skip.extract(i) * step.extract(2usize);
                dus.insert(i, U::cast_from(fma(dx, step.extract(0usize), skipped)));
                ddeltas.insert(i, D::cast_from(draw));
                if wanted.bias {
                    acc_bias[i] += select(valid, draw, 0.0f32);
                }
            }
            if valid {
                let at = ((first + t0 + t) * inner + own.channel) / vector;
                du[at] = dus;
                ddelta[at] = ddeltas;
            }
        }
        // One partial of dB and dC for the whole cube.
        let row = (sequence * cubes + cube) * (segment * comptime!(config.chunk))
            + chunk * comptime!(config.chunk)
            + t0;
        sum_channels(sums_bc, &mut crossing, row, config);
    }

    // The chunk's partials of dA and the bias's gradient.
    let row = (sequence * chunks + chunk0 + chunk) * (state + 2);
    #[unroll]
    for i in 0..per_unit {
        let at = seat.channel0 + seat.column + comptime!(i * config.spacing());
        #[unroll]
        for k in 0..per_lane {
            let n = seat.part * per_lane + k;
            if at < inner && n < state {
                sums_e[(row + n) * inner + at] = da[comptime!(i * per_lane + k)];
            }
        }
    }
    if wanted.bias {
        // Units of one channel have different positions of it.
        sync_cube();
        let turns = comptime!(config.tile.min(config.stride()));
        if own.turn < turns {
            #[unroll]
            for i in 0..vector {
                let mut sum = V2::new(0.0f32);
                sum.insert(0usize, acc_bias[i]);
                sums[own.turn * columns + own.column + i] = sum;
            }
        }
        sync_cube();
        if own.turn == 0 && own.inside {
            #[unroll]
            for i in 0..vector {
                let mut total = 0.0f32;
                #[unroll]
                for turn in 0..turns {
                    let sum = sums[comptime!(turn * config.channels()) + own.column + i];
                    total += sum.extract(0usize);
                }
                sums_e[(row + state + 1) * inner + own.channel + i] = total;
            }
        }
    }
}

/// Loads the unit's states of row `row` of `sub_states`.
#[cube]
fn fetch_states(
    sub_states: &[V4],
    fetched: &mut Array<V4>,
    row: usize,
    seat: &Seat,
    inner: usize,
    quarters: usize,
    #[comptime] config: SweepConfig,
) {
    let own = comptime!(config.per_lane / 4);
    #[unroll]
    for i in 0..comptime!(config.per_unit) {
        let at = channel(seat, i, config);
        #[unroll]
        for q in 0..own {
            let quarter = seat.part * own + q;
            let four = sub_states[(row * quarters + min(quarter, quarters - 1)) * inner + at];
            // Lanes beyond the last state must hold no state.
            let keep = select(quarter < quarters, 1.0f32, 0.0f32);
            fetched[comptime!(i * own + q)] = four * V4::new(keep);
        }
    }
}
