//! The third phase of a layer.

// In the kernel language an `if` on a compile-time value decides what is compiled: it cannot be
// merged with one on a run-time value.
#![allow(clippy::collapsible_if)]

use cubecl::prelude::*;

use super::{OUT_BIAS, StepConfig, WIDTH_NUMBERS};
use crate::cube::reduce::{spread_start, spread_sum};
use crate::cube::wide::{One, wide_at};
use crate::cube::words::{Words, load_now, number};

/// What a unit loads for [`leave`] before it waits for y: its vectors of the plane's first rows.
#[derive(CubeType)]
pub(in crate::decode::cube) struct LeaveAhead<P: Size> {
    weights: Array<Words<P>>,
    /// The bias of the unit's number of the result.
    pub bias: Array<f32>,
}

/// An empty [`LeaveAhead`].
#[cube]
pub(in crate::decode::cube) fn no_leave<P: Size>(#[comptime] c: StepConfig) -> LeaveAhead<P> {
    LeaveAhead::<P> {
        weights: Array::new(comptime!(c.out_held() * c.out_loads())),
        bias: Array::new(1usize),
    }
}

/// Reads the lane's vectors of the plane's slice of some rows of `out_proj`: those of a turn. Vectors
/// beyond the row are its last one, rows beyond the last are that one.
#[cube]
fn read_rows<P: Size>(
    out_proj: &[Words<P>],
    weights: &mut Array<Words<P>>,
    layer: usize,
    cube: usize,
    #[comptime] turn: usize,
    #[comptime] c: StepConfig,
) {
    let vectors = comptime!(c.inner / c.out_vector);
    let loads = comptime!(c.out_loads());
    let lane = UNIT_POS as usize % comptime!(c.plane);
    let plane = UNIT_POS as usize / comptime!(c.plane);
    let first = plane % comptime!(c.out_slices) * comptime!(loads * c.plane) + lane;
    #[unroll]
    for r in 0..comptime!(c.out_held()) {
        let row = comptime!(turn * c.out_held() + r);
        let row = cube * comptime!(c.out_rows) + out_row(plane, row, c);
        let row = layer * comptime!(c.width) + min(row, comptime!(c.width - 1).runtime());
        #[unroll]
        for i in 0..loads {
            let place = min(
                first + comptime!(i * c.plane),
                comptime!(vectors - 1).runtime(),
            );
            weights[comptime!(r * loads + i)] = load_now(out_proj, row * vectors + place, c.ptx);
        }
    }
}

/// The row of a cube that is a plane's number `row`.
#[cube]
fn out_row(plane: usize, #[comptime] row: usize, #[comptime] c: StepConfig) -> usize {
    plane / comptime!(c.out_slices) + comptime!(row * (c.planes() / c.out_slices))
}

/// Loads ahead for [`leave`].
#[cube]
pub(in crate::decode::cube) fn load_leave<P: Size>(
    ahead: &mut LeaveAhead<P>,
    out_proj: &[Words<P>],
    widths: &[One],
    layer: usize,
    cube: usize,
    #[comptime] c: StepConfig,
) {
    read_rows(out_proj, &mut ahead.weights, layer, cube, 0usize, c);
    let last = comptime!(c.width - 1).runtime();
    let column = min(own_column(cube, c), last);
    let at = (layer * WIDTH_NUMBERS + OUT_BIAS) * comptime!(c.width) + column;
    ahead.bias[0] = load_now(widths, at, c.ptx).extract(0usize);
}

/// The column of the unit's number of the result: the cube's rows of every sequence of a group.
#[cube]
fn own_column(cube: usize, #[comptime] c: StepConfig) -> usize {
    cube * comptime!(c.out_rows) + UNIT_POS as usize / comptime!(c.group)
}

/// `out_proj`, added to the stream. Planes have slices of the sum for some of the cube's rows: a
/// plane needs a part of y only.
///
/// - y: `[B, E]`; out_proj: `[layers, D, E]`; stream: `[B, D]`
#[cube]
pub(in crate::decode::cube) fn leave<P: Size, V: Size>(
    ahead: &mut LeaveAhead<P>,
    y: &mut [One],
    out_proj: &[Words<P>],
    stream: &mut [One],
    layer: usize,
    batch: usize,
    cube: usize,
    #[comptime] c: StepConfig,
) {
    let vectors = comptime!(c.inner / c.out_vector);
    let loads = comptime!(c.out_loads());
    let first_place = first_vector(c);
    for group in 0..batch.div_ceil(comptime!(c.group)) {
        let first = group * comptime!(c.group);
        let (inside, at) = own_place(first, batch, cube, c);
        let before = stream[at].extract(0usize);
        let mut inputs = Array::<f32>::new(comptime!(c.group * loads * c.out_vector));
        #[unroll]
        for b in 0..c.group {
            let row = min(first + b, batch - 1) * vectors;
            #[unroll]
            for i in 0..loads {
                let place = first_place + comptime!(i * c.plane);
                let place = row + min(place, comptime!(vectors - 1).runtime());
                let value = wide_at::<V>(y, place, c.ptx);
                #[unroll]
                for k in 0..c.out_vector {
                    inputs[comptime!((b * loads + i) * c.out_vector + k)] = value.extract(k);
                }
            }
        }
        let sums = leave_products(ahead, &inputs, out_proj, layer, group, cube, c);
        let sum = leave_sum(&sums, c) + ahead.bias[0];
        if inside {
            stream[at] = Vector::new(before + sum);
        }
    }
}

/// The first of the lane's vectors of y.
#[cube]
pub(in crate::decode::cube) fn first_vector(#[comptime] c: StepConfig) -> usize {
    let lane = UNIT_POS as usize % comptime!(c.plane);
    let plane = UNIT_POS as usize / comptime!(c.plane);
    plane % comptime!(c.out_slices) * comptime!(c.out_loads() * c.plane) + lane
}

/// Whether the unit has a number of the stream of the sequences `first ..` of a group to write, and
/// its place.
#[cube]
pub(in crate::decode::cube) fn own_place(
    first: usize,
    batch: usize,
    cube: usize,
    #[comptime] c: StepConfig,
) -> (bool, usize) {
    let unit = UNIT_POS as usize;
    let sequence = first + unit % comptime!(c.group);
    let column = own_column(cube, c);
    let inside = unit < comptime!(c.out_rows * c.group) && sequence < batch;
    let inside = inside && column < comptime!(c.width);
    let column = min(column, comptime!(c.width - 1).runtime());
    (
        inside,
        min(sequence, batch - 1) * comptime!(c.width) + column,
    )
}

/// The planes' sums for the cube's rows, `[slices, rows, group]`. `inputs` is what the lane has of y,
/// for every sequence of a group: vectors beyond E are anything.
#[cube]
pub(in crate::decode::cube) fn leave_products<P: Size>(
    ahead: &mut LeaveAhead<P>,
    inputs: &Array<f32>,
    out_proj: &[Words<P>],
    layer: usize,
    group: usize,
    cube: usize,
    #[comptime] c: StepConfig,
) -> Shared<[f32]> {
    let unit = UNIT_POS as usize;
    let lane = unit % comptime!(c.plane);
    let plane = unit / comptime!(c.plane);
    let vectors = comptime!(c.inner / c.out_vector);
    let loads = comptime!(c.out_loads());
    let slices = comptime!(c.out_slices);
    let rows = comptime!(c.out_rows);
    let held = comptime!(c.out_held());
    let width = comptime!(held.next_power_of_two());
    let first_place = first_vector(c);
    let mut shared = Shared::<[f32]>::new_slice(comptime!(slices * rows * c.group));
    // Others may still read the group before.
    sync_cube();
    #[unroll]
    for turn in 0..comptime!(c.out_turns()) {
        if comptime!(turn > 0 || c.out_turns() > 1) {
            if comptime!(turn > 0) || group > 0 {
                read_rows(out_proj, &mut ahead.weights, layer, cube, turn, c);
            }
        }
        #[unroll]
        for b in 0..c.group {
            let mut sums = Array::<f32>::new(width);
            #[unroll]
            for r in 0..width {
                sums[r] = 0.0f32;
            }
            #[unroll]
            for r in 0..held {
                #[unroll]
                for i in 0..loads {
                    let weights = ahead.weights[comptime!(r * loads + i)];
                    let mut term = 0.0f32;
                    #[unroll]
                    for k in 0..c.out_vector {
                        let input = inputs[comptime!((b * loads + i) * c.out_vector + k)];
                        term = fma(number(weights, k, c.halves), input, term);
                    }
                    let place = first_place + comptime!(i * c.plane);
                    sums[r] += select(place < vectors, term, 0.0f32);
                }
            }
            spread_sum(&mut sums, lane, width, comptime!(c.plane), 1usize);
            let place = spread_start(lane, width, comptime!(c.plane), 1usize);
            let row = out_row(plane, comptime!(turn * held), c)
                + place * comptime!(c.planes() / c.out_slices);
            if lane < width && place < held && row < rows {
                shared[(plane % slices * rows + row) * comptime!(c.group) + b] = sums[0];
            }
        }
    }
    shared
}

/// The sum that is the unit's number of the result, from those of [`leave_products`].
#[cube]
pub(in crate::decode::cube) fn leave_sum(sums: &Shared<[f32]>, #[comptime] c: StepConfig) -> f32 {
    let numbers = comptime!(c.out_rows * c.group);
    let own = min(UNIT_POS as usize, comptime!(numbers - 1).runtime());
    sync_cube();
    let mut sum = 0.0f32;
    #[unroll]
    for slice in 0..c.out_slices {
        sum += sums[comptime!(slice * numbers) + own];
    }
    sum
}
