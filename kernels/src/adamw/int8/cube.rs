//! The update on a GPU: one pass over parameter, gradient and codes, in place where nothing else
//! holds the buffers.
//!
//! The lanes of a plane share a block: each holds some of its words (four numbers each) in
//! registers, so the new scales are maxima over the plane, with no barrier.

// Integers have no `is_multiple_of` in the kernel language.
#![allow(clippy::manual_is_multiple_of)]

use burn_cubecl::CubeBackend;
use burn_cubecl::tensor::CubeTensor;
use cubecl::ir::ElemType;
use cubecl::prelude::*;

use super::{AdamwStep, BLOCK_WORDS, RawMoments};
use crate::adamw::cube::is_finite;
use crate::adamw::cube::writable;
use crate::cube::reduce::lane_max;
use crate::cube::{
    DeviceTraits, address_type, buffer, contiguous, contiguous_f32, cube_dim, elem, grid,
    vector_width,
};

/// Units that the size of a cube aims at.
const UNITS: usize = 256;

/// Scales up to this one count as zero: their inverse may not be a number.
const SMALLEST: f32 = 1e-37;

/// Compile-time sizes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Config {
    units: usize,
    /// Units that share a block.
    lanes: usize,
    /// Numbers of a vector of the parameter.
    vector: usize,
}

impl Config {
    /// Words of a lane.
    const fn held(&self) -> usize {
        BLOCK_WORDS / self.lanes
    }
}

/// See [`MambaKernels::adamw_int8_step`](crate::MambaKernels::adamw_int8_step).
pub(crate) fn step(
    param: CubeTensor,
    grad: CubeTensor,
    moments: RawMoments<CubeBackend>,
    grad_scale: CubeTensor,
    step: AdamwStep,
) -> (CubeTensor, RawMoments<CubeBackend>) {
    let param = writable(contiguous_f32(param));
    let grad = contiguous(grad);
    let moments = RawMoments::<CubeBackend> {
        first: writable(contiguous(moments.first)),
        first_scale: writable(contiguous_f32(moments.first_scale)),
        second: writable(contiguous(moments.second)),
        second_scale: writable(contiguous_f32(moments.second_scale)),
    };
    let count = param.meta.num_elements();
    let blocks = moments.first_scale.meta.num_elements();
    if blocks == 0 {
        return (param, moments);
    }
    let device = DeviceTraits::of(&param);
    let config = Config {
        units: UNITS.next_multiple_of(device.plane).min(device.max_units),
        lanes: device.plane.min(BLOCK_WORDS),
        vector: vector_width(4, count, &[(&param, count), (&grad, count)]),
    };
    // SAFETY: there are `count` numbers of parameter and gradient, and one scale and `BLOCK_WORDS`
    // words of each moment for every block; what is written belongs to this call alone. Lanes
    // beyond the last block or number write nothing.
    unsafe {
        update::launch_unchecked(
            &param.client,
            grid(blocks.div_ceil(config.units / config.lanes)),
            cube_dim(config.units),
            address_type(&[&param]),
            config.vector,
            buffer(&param),
            buffer(&grad),
            buffer(&moments.first),
            buffer(&moments.first_scale),
            buffer(&moments.second),
            buffer(&moments.second_scale),
            buffer(&contiguous_f32(grad_scale)),
            count,
            blocks,
            step.beta1,
            step.beta2,
            step.eps,
            1.0 - step.lr * step.weight_decay,
            step.lr,
            1.0 / step.correction1,
            1.0 / step.correction2.sqrt(),
            config,
            elem(grad.dtype),
        );
    }
    (param, moments)
}

/// The four numbers of a word, as f32; zero beyond the last.
#[cube]
fn load<T: Float, N: Size>(
    x: &[Vector<T, N>],
    word: usize,
    count: usize,
    #[comptime] vector: usize,
) -> Array<f32> {
    let mut four = Array::<f32>::new(4usize);
    #[unroll]
    for i in 0..comptime!(4 / vector) {
        let at = word * comptime!(4 / vector) + i;
        let mut values = Vector::<f32, N>::new(0.0f32);
        if at * vector < count {
            values = Vector::cast_from(x[at]);
        }
        #[unroll]
        for c in 0..vector {
            four[comptime!(i * vector + c)] = values.extract(c);
        }
    }
    four
}

/// The inverse of [`load`].
#[cube]
fn store<N: Size>(
    x: &mut [Vector<f32, N>],
    four: &Array<f32>,
    word: usize,
    count: usize,
    #[comptime] vector: usize,
) {
    #[unroll]
    for i in 0..comptime!(4 / vector) {
        let at = word * comptime!(4 / vector) + i;
        let mut values = Vector::<f32, N>::new(0.0f32);
        #[unroll]
        for c in 0..vector {
            values.insert(c, four[comptime!(i * vector + c)]);
        }
        if at * vector < count {
            x[at] = values;
        }
    }
}

/// Byte `i` of a word.
#[cube]
fn byte(word: u32, #[comptime] i: usize) -> f32 {
    f32::cast_from((word >> comptime!(8 * i as u32)) & 255u32)
}

/// 1 / `scale`; zero where that would not be a number.
#[cube]
fn inverse(scale: f32) -> f32 {
    select(scale > SMALLEST, 1.0f32 / max(scale, SMALLEST), 0.0f32)
}

/// The code of `x`, at most the scale: the nearest of `steps` even steps of the root.
#[cube]
fn code(x: f32, inverse_scale: f32, #[comptime] steps: f32) -> f32 {
    min(
        fma((x * inverse_scale).sqrt(), steps, 0.5f32).floor(),
        steps,
    )
}

/// The update; formulas and codes are in the [module's documentation](super).
#[cube(launch_unchecked, address_type = "dynamic")]
fn update<G: Float, N: Size>(
    param: &mut [Vector<f32, N>],
    grad: &[Vector<G, N>],
    first: &mut [u32],
    first_scale: &mut [f32],
    second: &mut [u32],
    second_scale: &mut [f32],
    grad_scale: &[f32],
    count: usize,
    blocks: usize,
    beta1: f32,
    beta2: f32,
    eps: f32,
    keep: f32,
    lr: f32,
    mean_factor: f32,
    root_factor: f32,
    #[comptime] config: Config,
    #[define(G)] _type: ElemType,
) {
    let scale = grad_scale[0];
    // The same for every unit, so shuffles below lose no lane.
    if !is_finite(scale) {
        terminate!();
    }
    let lanes = comptime!(config.lanes);
    let held = comptime!(config.held());
    let unit = UNIT_POS as usize;
    let own = CUBE_POS * comptime!(config.units / config.lanes) + unit / lanes;
    // Planes beyond the last block repeat it: shuffles want every lane.
    let block = min(own, blocks - 1);
    let word0 = block * BLOCK_WORDS + unit % lanes;
    let first_unit = first_scale[block] / 16129.0f32;
    let second_unit = second_scale[block] / 65025.0f32;
    let mut means = Array::<f32>::new(comptime!(4 * held));
    let mut roots = Array::<f32>::new(comptime!(4 * held));
    let mut largest_mean = 0.0f32;
    let mut largest_root = 0.0f32;
    #[unroll]
    for w in 0..held {
        let word = word0 + w * lanes;
        let first_word = first[word];
        let second_word = second[word];
        let grads = load::<G, N>(grad, word, count, config.vector);
        let mut numbers = load::<f32, N>(&*param, word, count, config.vector);
        #[unroll]
        for i in 0..4usize {
            let g = grads[i] * scale;
            let unsigned = byte(first_word, i);
            let c = select(unsigned > 127.5f32, unsigned - 256.0f32, unsigned);
            let m = beta1 * (c * c.abs() * first_unit) + (1.0f32 - beta1) * g;
            let c = byte(second_word, i);
            let before = c * c * second_unit;
            let v = beta2 * before * before + (1.0f32 - beta2) * g * g;
            let root = v.sqrt();
            let update = m * mean_factor / fma(root, root_factor, eps);
            numbers[i] = numbers[i] * keep - update * lr;
            means[comptime!(4 * w + i)] = m;
            roots[comptime!(4 * w + i)] = root;
            largest_mean = max(largest_mean, m.abs());
            largest_root = max(largest_root, root);
        }
        if own < blocks {
            store(param, &numbers, word, count, config.vector);
        }
    }
    let largest_mean = lane_max(largest_mean, lanes);
    let largest_root = lane_max(largest_root, lanes);
    let inverse_mean = inverse(largest_mean);
    let inverse_root = inverse(largest_root);
    if own < blocks {
        #[unroll]
        for w in 0..held {
            let mut first_word = 0u32;
            let mut second_word = 0u32;
            #[unroll]
            for i in 0..4usize {
                let m = means[comptime!(4 * w + i)];
                let c = code(m.abs(), inverse_mean, 127.0f32);
                let negative = m < 0.0f32 && c > 0.0f32;
                let unsigned = select(negative, 256.0f32 - c, c);
                first_word |= u32::cast_from(unsigned) << comptime!(8 * i as u32);
                let root = roots[comptime!(4 * w + i)];
                let c = code(root, inverse_root, 255.0f32);
                let c = select(root > 0.0f32, max(c, 1.0f32), 0.0f32);
                second_word |= u32::cast_from(c) << comptime!(8 * i as u32);
            }
            first[word0 + w * lanes] = first_word;
            second[word0 + w * lanes] = second_word;
        }
        if unit % lanes == 0 {
            first_scale[block] = largest_mean;
            second_scale[block] = largest_root;
        }
    }
}
