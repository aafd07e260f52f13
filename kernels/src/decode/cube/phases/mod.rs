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
use crate::cube::reduce::{lane_sum, total};
pub(super) use advancing::{advance, load_advance, no_advance};
pub(super) use entering::{enter, load_enter, no_enter};
pub(super) use leaving::{leave, load_leave, no_leave};
pub(super) use logits::head;

/// A number of a buffer that some phases read as wider vectors.
pub(super) type One = Vector<f32, Const<1>>;

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

/// `Σ a · b` over the numbers of a vector, added to `sum`.
#[cube]
fn dot<V: Size>(a: Vector<f32, V>, b: Vector<f32, V>, sum: f32) -> f32 {
    let mut result = sum;
    #[unroll]
    for i in 0..V::value() {
        result = fma(a.extract(i), b.extract(i), result);
    }
    result
}

/// The vector number `at` of a buffer.
#[cube]
fn wide_at<V: Size>(buffer: &mut [One], at: usize, #[comptime] ptx: bool) -> Vector<f32, V> {
    let mut value = Vector::<f32, V>::new(0.0f32);
    if ptx {
        value = buffer.with_vector_size::<V>()[at];
    } else {
        // Not every target can see a buffer as one of wider vectors.
        #[unroll]
        for i in 0..V::value() {
            value.insert(i, buffer[at * V::value() + i].extract(0usize));
        }
    }
    value
}

/// Normalises the sequences `first ..` of a group into shared memory, one a plane; places beyond
/// D and sequences beyond the last are zero. `at` is where the parameters begin, in vectors.
#[cube]
fn normalise<V: Size>(
    stream: &mut [One],
    weight: &[Vector<f32, V>],
    hat: &mut Shared<[Vector<f32, V>]>,
    first: usize,
    batch: usize,
    at: usize,
    eps: f32,
    #[comptime] norm: bool,
    #[comptime] c: StepConfig,
) {
    let vectors = comptime!(c.width / c.vector);
    let padded = comptime!(c.padded_width());
    let lane = UNIT_POS as usize % comptime!(c.plane);
    let plane = UNIT_POS as usize / comptime!(c.plane);
    let rounds = comptime!(c.group.div_ceil(c.planes()));
    let loads = comptime!(padded / c.plane);
    #[unroll]
    for round in 0..rounds {
        let member = plane + comptime!(round * c.planes());
        if member < comptime!(c.group) {
            let sequence = first + member;
            let row = min(sequence, batch - 1) * vectors;
            let mut centre = 0.0f32;
            let mut scale = 1.0f32;
            if norm {
                if c.centred {
                    let mut own = Vector::<f32, V>::new(0.0f32);
                    for i in 0..loads {
                        let column = i * comptime!(c.plane) + lane;
                        if column < vectors {
                            own += wide_at::<V>(stream, row + column, c.ptx);
                        }
                    }
                    let sum = lane_sum(total(own), comptime!(c.plane), 1usize);
                    centre = sum / comptime!(c.width as f32);
                }
                let mut squares = Vector::<f32, V>::new(0.0f32);
                for i in 0..loads {
                    let column = i * comptime!(c.plane) + lane;
                    if column < vectors {
                        let value = wide_at::<V>(stream, row + column, c.ptx) - Vector::new(centre);
                        squares = fma(value, value, squares);
                    }
                }
                let sum = lane_sum(total(squares), comptime!(c.plane), 1usize);
                scale = 1.0f32 / (sum / comptime!(c.width as f32) + eps).sqrt();
            }
            for i in 0..loads {
                let column = i * comptime!(c.plane) + lane;
                let mut value = Vector::<f32, V>::new(0.0f32);
                if column < vectors && sequence < batch {
                    value = wide_at::<V>(stream, row + column, c.ptx) - Vector::new(centre);
                    value *= Vector::new(scale);
                    if norm {
                        let bias = weight[at + vectors + column];
                        value = fma(value, weight[at + column], bias);
                    }
                }
                hat[member * padded + column] = value;
            }
        }
    }
}

/// Reads vectors of a row of weights: the lane's number `round` of loads. Vectors beyond the row
/// are its last one, which meets zeros.
#[cube]
fn read_row<W: Float, V: Size>(
    weights: &[Vector<W, V>],
    into: &mut Array<Vector<W, V>>,
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
        into[i] = weights[row * vectors + min(column, comptime!(vectors - 1).runtime())];
    }
}

/// Adds the products of the weights with a group's normalised inputs to `sums[from ..]`.
#[cube]
fn add_products<W: Float, V: Size>(
    weights: &Array<Vector<W, V>>,
    hat: &Shared<[Vector<f32, V>]>,
    sums: &mut Array<f32>,
    #[comptime] from: usize,
    #[comptime] round: usize,
    #[comptime] c: StepConfig,
) {
    let padded = comptime!(c.padded_width());
    let loads = comptime!(c.loads(c.width / c.vector)[0]);
    let lane = UNIT_POS as usize % comptime!(c.plane);
    #[unroll]
    for i in 0..loads {
        let column = comptime!((round * loads + i) * c.plane) + lane;
        if comptime!((round * loads + i) * c.plane < padded) {
            let weight = Vector::<f32, V>::cast_from(weights[i]);
            #[unroll]
            for b in 0..c.group {
                let x = hat[comptime!(b * padded) + column];
                sums[comptime!(from + b)] = dot(weight, x, sums[comptime!(from + b)]);
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
