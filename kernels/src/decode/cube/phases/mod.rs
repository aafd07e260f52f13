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
use crate::cube::words::{Words, number};
pub(super) use advancing::{
    advance, load_advance, load_parameters, load_states, no_advance, place, recur,
};
pub(super) use entering::{enter, load_enter, no_enter};
pub(super) use leaving::{leave, load_leave, no_leave};
pub(super) use logits::head;

/// Numbers of a channel in the buffer of channel parameters: its taps, then these.
pub(super) const CONV_BIAS: usize = 0;
pub(super) const X_BIAS: usize = 1;
pub(super) const Z_BIAS: usize = 2;
pub(super) const DT_BIAS: usize = 3;
pub(super) const SKIP: usize = 4;
pub(super) const CHANNEL_NUMBERS: usize = 5;

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

/// How PTX calls a vector of so many numbers.
const fn width_name(size: usize) -> &'static str {
    match size {
        4 => ".v4",
        2 => ".v2",
        _ => "",
    }
}

/// `from[at]`, loaded here and not before. A compiler that knows that nobody writes to a buffer
/// begins loads from it as early as it can: before the cube has told the others that it has arrived,
/// which then waits for them.
#[cube]
fn load_now<E: Scalar, N: Size>(
    from: &[Vector<E, N>],
    at: usize,
    #[comptime] ptx: bool,
) -> Vector<E, N> {
    if comptime!(ptx) {
        let place = from[at..at + 1].as_ptr();
        let size = N::value();
        let name = comptime!(width_name(size));
        let it: Vector<E, N>;
        gpu_asm!("ld.global{name}.b32 {}, [{}];", out(_) it, in(_) place);
        it
    } else {
        from[at]
    }
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

/// Normalises the sequences `first ..` of a group into shared memory; places beyond D and sequences
/// beyond the last are zero.
#[cube]
fn normalise(
    stream: &mut [One],
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
    let mut values = Array::<f32>::new(comptime!(columns * c.group));
    let mut sums = Array::<f32>::new(comptime!(c.group));
    let mut scales = Array::<f32>::new(comptime!(c.group));
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
        scales[b] = 1.0f32;
    }
    if norm {
        if c.centred {
            #[unroll]
            for b in 0..c.group {
                sums[b] = 0.0f32;
                #[unroll]
                for i in 0..columns {
                    sums[b] += values[comptime!(b * columns + i)];
                }
            }
            group_sums(&mut sums, &mut scratch, 0usize, c);
            #[unroll]
            for b in 0..c.group {
                #[unroll]
                for i in 0..columns {
                    values[comptime!(b * columns + i)] -= sums[b] / comptime!(c.width as f32);
                }
            }
        }
        #[unroll]
        for b in 0..c.group {
            sums[b] = 0.0f32;
            #[unroll]
            for i in 0..columns {
                if unit + comptime!(i * c.units) < comptime!(c.width) {
                    let value = values[comptime!(b * columns + i)];
                    sums[b] = fma(value, value, sums[b]);
                }
            }
        }
        group_sums(&mut sums, &mut scratch, comptime!(c.planes() * c.group), c);
        #[unroll]
        for b in 0..c.group {
            scales[b] = 1.0f32 / (sums[b] / comptime!(c.width as f32) + eps).sqrt();
        }
    }
    #[unroll]
    for b in 0..c.group {
        #[unroll]
        for i in 0..columns {
            let column = unit + comptime!(i * c.units);
            let mut value = values[comptime!(b * columns + i)];
            if norm {
                value = fma(value * scales[b], ahead.weight[i], ahead.bias[i]);
            }
            let inside = column < comptime!(c.width) && first + b < batch;
            if column < comptime!(c.padded()) {
                hat[comptime!(b * c.padded()) + column] =
                    Vector::new(select(inside, value, 0.0f32));
            }
        }
    }
}

/// Sums over the cube, one for each sequence of a group; every unit gets them. The scratch from
/// `from` on is used by nobody else until the cube has been synchronised.
#[cube]
fn group_sums(
    sums: &mut Array<f32>,
    scratch: &mut Shared<[f32]>,
    #[comptime] from: usize,
    #[comptime] c: StepConfig,
) {
    let lane = UNIT_POS as usize % comptime!(c.plane);
    let plane = UNIT_POS as usize / comptime!(c.plane);
    #[unroll]
    for b in 0..c.group {
        let sum = lane_sum(sums[b], comptime!(c.plane), 1usize);
        if lane == 0 {
            scratch[from + plane * comptime!(c.group) + b] = sum;
        }
    }
    sync_cube();
    #[unroll]
    for b in 0..c.group {
        let mut sum = 0.0f32;
        #[unroll(c.planes() <= 32)]
        for p in 0..comptime!(c.planes()) {
            sum += scratch[from + p * comptime!(c.group) + b];
        }
        sums[b] = sum;
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
                let x = wide_at::<V>(hat, comptime!(b * padded) + column, c.ptx);
                let sum = sums[comptime!(from + b)];
                sums[comptime!(from + b)] = dot::<P, V>(weights[i], x, sum, c.halves);
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
