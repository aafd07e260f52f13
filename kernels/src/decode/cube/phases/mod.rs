//! The phases of a step. Each is a function of a cube's number within the phase, so that a phase
//! can be a kernel of its own or a part of one that runs them all.
//!
//! | phase | reads | leaves |
//! | --- | --- | --- |
//! | [`enter`] | stream | u, z, parts of the low-rank product |
//! | [`advance`] | those | y, and the new states |
//! | [`leave`] | y | stream |
//! | [`head`] | stream | logits |
//!
//! A product with a matrix gives a plane a row of weights, whose lanes read neighbouring vectors of
//! it. The rows of `in_proj` that make x and z of a channel belong to one plane, so that the
//! convolution and SiLU follow in its registers; and a cube multiplies its channels' u with their
//! rows of `x_proj` right away. The partial sums are added up where they are needed.

mod advancing;
mod entering;
mod leaving;
mod logits;

use cubecl::prelude::*;

use super::plan::StepConfig;
use crate::cube::reduce::lane_sum;
use crate::cube::wide::{One, wide_at};
use crate::cube::words::{Words, load_now, number};
pub(super) use advancing::{
    AdvanceAhead, advance, load_advance, load_parameters, load_states, no_advance, part, place,
    place_in_entering_cube, recur,
};
pub(super) use entering::{
    EnterAhead, enter, enter_group, load_enter, load_gates, no_enter, part_place, part_sums,
};
pub(super) use leaving::{
    LeaveAhead, first_vector, leave, leave_products, leave_sum, load_leave, no_leave, own_place,
};
pub(super) use logits::{head, head_group, head_place, load_head};

/// Numbers of a channel in the buffer of channel parameters: its taps, then these.
pub(super) const CONV_BIAS: usize = 0;
pub(super) const X_BIAS: usize = 1;
pub(super) const Z_BIAS: usize = 2;
pub(super) const DT_BIAS: usize = 3;
pub(super) const SKIP: usize = 4;
pub(super) const CHANNEL_NUMBERS: usize = 5;
/// Those of them, from the first on, that the first phase needs.
const ENTER_NUMBERS: usize = 3;

/// Numbers of a column in the buffer of width parameters: weight and bias of the norm, then this.
pub(super) const OUT_BIAS: usize = 2;
pub(super) const WIDTH_NUMBERS: usize = 3;

/// `Σ weights · x`, added to `sum`.
#[cube]
fn dot<P: Size, V: Size>(
    weights: Words<P>,
    x: Vector<f32, V>,
    sum: f32,
    #[comptime] halves: bool,
) -> f32 {
    let mut result = sum;
    #[unroll]
    for i in 0..V::value() {
        result = fma(number(weights, i, halves), x.extract(i), result);
    }
    result
}

/// A norm's weights and biases of a unit's columns.
#[derive(CubeType)]
pub(super) struct NormAhead {
    weight: Array<f32>,
    bias: Array<f32>,
}

#[cube]
fn no_norm(#[comptime] c: StepConfig) -> NormAhead {
    NormAhead {
        weight: Array::new(comptime!(c.columns())),
        bias: Array::new(comptime!(c.columns())),
    }
}

/// Reads a norm's parameters, which begin at `at`.
#[cube]
fn load_norm(ahead: &mut NormAhead, widths: &[One], at: usize, #[comptime] c: StepConfig) {
    #[unroll]
    for i in 0..comptime!(c.columns()) {
        let column = UNIT_POS as usize + comptime!(i * c.units);
        let column = min(column, comptime!(c.width - 1).runtime());
        ahead.weight[i] = load_now(widths, at + column, c.ptx).extract(0usize);
        ahead.bias[i] = load_now(widths, at + comptime!(c.width) + column, c.ptx).extract(0usize);
    }
}

/// The unit's columns of the stream, for every sequence of a group; columns beyond D are zero.
#[cube]
fn read_stream(
    stream: &mut [One],
    first: usize,
    batch: usize,
    #[comptime] c: StepConfig,
) -> Array<f32> {
    let columns = comptime!(c.columns());
    let unit = UNIT_POS as usize;
    let mut values = Array::<f32>::new(comptime!(columns * c.group));
    #[unroll]
    for b in 0..c.group {
        let row = min(first + b, batch - 1) * comptime!(c.width);
        #[unroll]
        for i in 0..columns {
            let column = unit + comptime!(i * c.units);
            let mut value = 0.0f32;
            if column < comptime!(c.width) {
                value = stream[row + column].extract(0usize);
            }
            values[comptime!(b * columns + i)] = value;
        }
    }
    values
}

/// Normalises the sequences `first ..` of a group, of which a unit has the columns as
/// [`read_stream`] reads them, into shared memory; places beyond D and sequences beyond the last are
/// zero.
#[cube]
pub(super) fn normalise(
    values: &Array<f32>,
    ahead: &NormAhead,
    hat: &mut Shared<[One]>,
    first: usize,
    batch: usize,
    eps: f32,
    #[comptime] norm: bool,
    #[comptime] c: StepConfig,
) {
    let columns = comptime!(c.columns());
    let unit = UNIT_POS as usize;
    let mut scratch = Shared::<[f32]>::new_slice(comptime!(2 * c.planes() * c.group));
    let mut means = Array::<f32>::new(comptime!(c.group));
    let mut scales = Array::<f32>::new(comptime!(c.group));
    #[unroll]
    for b in 0..c.group {
        means[b] = 0.0f32;
        scales[b] = 1.0f32;
    }
    if norm {
        plane_moments(values, &mut scratch, c);
        sync_cube();
        cube_moments(&scratch, &mut means, &mut scales, eps, c);
    }
    #[unroll]
    for b in 0..c.group {
        #[unroll]
        for i in 0..columns {
            let column = unit + comptime!(i * c.units);
            let mut value = values[comptime!(b * columns + i)];
            if norm {
                value = fma(
                    (value - means[b]) * scales[b],
                    ahead.weight[i],
                    ahead.bias[i],
                );
            }
            let inside = column < comptime!(c.width) && first + b < batch;
            if column < comptime!(c.padded()) {
                hat[comptime!(b * c.padded()) + hat_place(column, c)] =
                    Vector::new(select(inside, value, 0.0f32));
            }
        }
    }
}

/// Where a column of a normalised row is: of every vector of eight numbers the first four, then of
/// every one the others. Lanes that read neighbouring vectors of four read all banks.
#[cube]
fn hat_place(column: usize, #[comptime] c: StepConfig) -> usize {
    if comptime!(c.vector == 8) {
        let half = column / 4 % 2 * comptime!(c.padded() / 2);
        half + column / 8 * 4 + column % 4
    } else {
        column
    }
}

/// The products of the weights of a vector with its numbers of a normalised row, which begins at
/// `row` vectors, added to `sum`.
#[cube]
fn dot_hat<P: Size, V: Size>(
    weights: Words<P>,
    hat: &mut Shared<[One]>,
    row: usize,
    vector: usize,
    sum: f32,
    #[comptime] c: StepConfig,
) -> f32 {
    if comptime!(c.vector == 8) {
        let mut result = sum;
        #[unroll]
        for half in 0..2usize {
            let place = 2 * row + comptime!(half * c.padded() / 8) + vector;
            let x = wide_at::<Const<4>>(hat, place, c.ptx);
            #[unroll]
            for i in 0..4usize {
                let weight = number(weights, comptime!(4 * half + i), c.halves);
                result = fma(weight, x.extract(i), result);
            }
        }
        result
    } else {
        dot::<P, V>(
            weights,
            wide_at::<V>(hat, row + vector, c.ptx),
            sum,
            c.halves,
        )
    }
}

/// Columns of D that a plane's units have together.
#[cube]
fn plane_columns(plane: usize, #[comptime] c: StepConfig) -> f32 {
    if comptime!(c.width.is_multiple_of(c.units)) {
        comptime!((c.columns() * c.plane) as f32).runtime()
    } else {
        let mut count = 0usize;
        #[unroll]
        for i in 0..comptime!(c.columns()) {
            let start = plane * comptime!(c.plane) + comptime!(i * c.units);
            let rest = comptime!(c.width) - min(start, comptime!(c.width).runtime());
            count += min(rest, comptime!(c.plane).runtime());
        }
        f32::cast_from(count as u32)
    }
}

/// Mean and sum of squared differences from it, of a plane's columns of every sequence; the mean is
/// zero where the norm subtracts none.
#[cube]
fn plane_moments(values: &Array<f32>, scratch: &mut Shared<[f32]>, #[comptime] c: StepConfig) {
    let columns = comptime!(c.columns());
    let unit = UNIT_POS as usize;
    let lane = unit % comptime!(c.plane);
    let plane = unit / comptime!(c.plane);
    let count = plane_columns(plane, c);
    #[unroll]
    for b in 0..c.group {
        let mut mean = 0.0f32;
        if c.centred {
            #[unroll]
            for i in 0..columns {
                mean += values[comptime!(b * columns + i)];
            }
            mean = lane_sum(mean, comptime!(c.plane), 1usize) / max(count, 1.0f32);
        }
        let mut sum = 0.0f32;
        #[unroll]
        for i in 0..columns {
            let difference = values[comptime!(b * columns + i)] - mean;
            let inside = unit + comptime!(i * c.units) < comptime!(c.width);
            sum += select(inside, difference * difference, 0.0f32);
        }
        let sum = lane_sum(sum, comptime!(c.plane), 1usize);
        if lane == 0 {
            let at = 2 * (plane * comptime!(c.group) + b);
            scratch[at] = mean;
            scratch[at + 1] = sum;
        }
    }
}

/// Those of all columns, from those of the planes (Chan, Golub and LeVeque 1983, equation 2.1): mean and
/// one over the root of the variance.
#[cube]
fn cube_moments(
    scratch: &Shared<[f32]>,
    means: &mut Array<f32>,
    scales: &mut Array<f32>,
    eps: f32,
    #[comptime] c: StepConfig,
) {
    let width = comptime!(c.width as f32);
    #[unroll]
    for b in 0..c.group {
        let mut mean = 0.0f32;
        if c.centred {
            #[unroll(c.planes() <= 32)]
            for p in 0..comptime!(c.planes()) {
                let count = plane_columns(p, c);
                mean = fma(count, scratch[2 * (p * comptime!(c.group) + b)], mean);
            }
            mean /= width;
        }
        let mut sum = 0.0f32;
        #[unroll(c.planes() <= 32)]
        for p in 0..comptime!(c.planes()) {
            let at = 2 * (p * comptime!(c.group) + b);
            let mut own = scratch[at + 1];
            if c.centred {
                let difference = scratch[at] - mean;
                own = fma(plane_columns(p, c) * difference, difference, own);
            }
            sum += own;
        }
        means[b] = mean;
        scales[b] = (sum / width + eps).inverse_sqrt();
    }
}

/// Reads vectors of a row of weights: the lane's number `round` of loads. Vectors beyond the row
/// are its last one, which meets zeros.
#[cube]
fn read_row<P: Size>(
    weights: &[Words<P>],
    into: &mut Array<Words<P>>,
    row: usize,
    #[comptime] vectors: usize,
    #[comptime] round: usize,
    #[comptime] c: StepConfig,
) {
    let loads = comptime!(c.loads(vectors)[0]);
    let lane = UNIT_POS as usize % comptime!(c.plane);
    #[unroll]
    for i in 0..loads {
        let column = comptime!((round * loads + i) * c.plane) + lane;
        let at = row * vectors + min(column, comptime!(vectors - 1).runtime());
        into[i] = load_now(weights, at, c.ptx);
    }
}

/// Adds the products of the weights with a group's normalised inputs to `sums[from ..]`.
#[cube]
fn add_products<P: Size, V: Size>(
    weights: &Array<Words<P>>,
    hat: &mut Shared<[One]>,
    sums: &mut Array<f32>,
    #[comptime] from: usize,
    #[comptime] round: usize,
    #[comptime] c: StepConfig,
) {
    let padded = comptime!(c.padded() / c.vector);
    let loads = comptime!(c.loads(c.width / c.vector)[0]);
    let lane = UNIT_POS as usize % comptime!(c.plane);
    #[unroll]
    for i in 0..loads {
        let column = comptime!((round * loads + i) * c.plane) + lane;
        if comptime!((round * loads + i) * c.plane < padded) {
            #[unroll]
            for b in 0..c.group {
                let row = comptime!(b * padded).runtime();
                let sum = sums[comptime!(from + b)];
                sums[comptime!(from + b)] = dot_hat::<P, V>(weights[i], hat, row, column, sum, c);
            }
        }
    }
}

/// The sum over the plane that belongs to this lane's sequence: lane b gets `sums[from + b]`.
#[cube]
fn own_sum(
    sums: &Array<f32>,
    lane: usize,
    #[comptime] from: usize,
    #[comptime] c: StepConfig,
) -> f32 {
    let mut own = lane_sum(sums[from], comptime!(c.plane), 1usize);
    #[unroll]
    for b in 1..c.group {
        let sum = lane_sum(sums[comptime!(from + b)], comptime!(c.plane), 1usize);
        own = select(lane == b, sum, own);
    }
    own
}
