//! What both passes share: a unit's place, its window of inputs, its filter.

use cubecl::prelude::*;

use super::{AHEAD, ConvConfig};
use crate::cube::OptionalInput;
use crate::cube::math::sigmoid;

/// A unit's sequence and tile, and where its channels are.
#[derive(CubeType)]
pub(super) struct Place {
    pub batch: usize,
    pub tile: usize,
    /// Number of the vector that holds the unit's channels.
    pub vector: usize,
}

/// `vectors` is the number of vectors in a row.
#[cube]
pub(super) fn place(length: usize, vectors: usize, #[comptime] config: ConvConfig) -> Place {
    let cubes = vectors.div_ceil(comptime!(config.units));
    let tiles = length.div_ceil(comptime!(config.tile));
    let row = CUBE_POS / cubes;
    Place {
        batch: row / tiles,
        tile: row % tiles,
        vector: CUBE_POS % cubes * comptime!(config.units) + UNIT_POS as usize,
    }
}

/// The K last inputs of the unit's channels, oldest first, and which of them the position may see.
#[derive(CubeType)]
pub(super) struct Window<N: Size> {
    /// Those cleared by a reset are zero.
    pub inputs: Array<Vector<f32, N>>,
    /// 1 for an input that no reset has cut off, else 0. Unused without resets.
    pub alive: Array<f32>,
}

/// Clears the window if the state is `reset` before the next position.
#[cube]
pub(super) fn clear<N: Size>(window: &mut Window<N>, reset: f32, #[comptime] width: usize) {
    if reset > 0.5f32 {
        #[unroll]
        for j in 0..width {
            window.inputs[j] = Vector::new(0.0f32);
            window.alive[j] = 0.0f32;
        }
    }
}

/// Shifts the window by one place.
#[cube]
pub(super) fn shift<N: Size>(
    window: &mut Window<N>,
    next: Vector<f32, N>,
    #[comptime] width: usize,
) {
    #[unroll]
    for j in 1..width {
        window.inputs[comptime!(j - 1)] = window.inputs[j];
        window.alive[comptime!(j - 1)] = window.alive[j];
    }
    window.inputs[comptime!(width - 1)] = next;
    window.alive[comptime!(width - 1)] = 1.0f32;
}

/// The window as it is when position `t0` of the sequence comes next.
#[cube]
pub(super) fn window_before<X: Float, N: Size>(
    x: &[Vector<X, N>],
    x_stride: usize,
    initial: &OptionalInput,
    resets: &OptionalInput,
    place: &Place,
    t0: usize,
    length: usize,
    vectors: usize,
    #[comptime] width: usize,
) -> Window<N> {
    let mut window = Window::<N> {
        inputs: Array::<Vector<f32, N>>::new(width),
        alive: Array::<f32>::new(width),
    };
    #[unroll]
    for j in 0..width {
        window.inputs[j] = Vector::new(0.0f32);
        window.alive[j] = 0.0f32;
    }
    #[unroll]
    for j in 0..comptime!(width - 1) {
        // Position t0 - (K - 1) + j.
        let mut next = Vector::<f32, N>::new(0.0f32);
        if t0 + j >= comptime!(width - 1) {
            let row = place.batch * length + t0 + j - comptime!(width - 1);
            #[comptime]
            match resets {
                ComptimeOption::Some(resets) => clear(&mut window, resets[row], width),
                ComptimeOption::None => {}
            }
            next = Vector::cast_from(x[row * x_stride + place.vector]);
        } else {
            // Before the first position lies the window that the caller carried over.
            #[comptime]
            match initial {
                ComptimeOption::Some(initial) => {
                    let channel = (place.batch * vectors + place.vector) * N::value();
                    #[unroll]
                    for c in 0..N::value() {
                        next.insert(c, initial[(channel + c) * comptime!(width - 1) + t0 + j]);
                    }
                }
                ComptimeOption::None => {}
            }
        }
        shift(&mut window, next, width);
    }
    window
}

/// Weights and bias of the unit's channels.
#[derive(CubeType)]
pub(super) struct Filter<N: Size> {
    pub weights: Array<Vector<f32, N>>,
    pub bias: Vector<f32, N>,
}

#[cube]
pub(super) fn load_filter<N: Size>(
    weight: &[f32],
    bias: &OptionalInput,
    vector: usize,
    #[comptime] width: usize,
) -> Filter<N> {
    let channel = vector * N::value();
    let mut weights = Array::<Vector<f32, N>>::new(width);
    #[unroll]
    for j in 0..width {
        let mut tap = Vector::<f32, N>::new(0.0f32);
        #[unroll]
        for c in 0..N::value() {
            tap.insert(c, weight[(channel + c) * width + j]);
        }
        weights[j] = tap;
    }
    let mut own = Vector::<f32, N>::new(0.0f32);
    #[comptime]
    match bias {
        ComptimeOption::Some(bias) =>
        {
            #[unroll]
            for c in 0..N::value() {
                own.insert(c, bias[channel + c]);
            }
        }
        ComptimeOption::None => {}
    }
    Filter::<N> { weights, bias: own }
}

/// The convolution at the window's last position, before the activation.
#[cube]
pub(super) fn convolve<N: Size>(
    window: &Window<N>,
    filter: &Filter<N>,
    #[comptime] width: usize,
) -> Vector<f32, N> {
    let mut sum = filter.bias;
    #[unroll]
    for j in 0..width {
        sum = fma(filter.weights[j], window.inputs[j], sum);
    }
    sum
}

/// Rows `first .. first + AHEAD` of the unit's channels, those beyond `last` being `last`. If `inside`
/// none are: their places are then a stride apart, which saves arithmetic.
#[cube]
pub(super) fn load_rows<X: Float, N: Size>(
    x: &[Vector<X, N>],
    stride: usize,
    first: usize,
    last: usize,
    vector: usize,
    #[comptime] inside: bool,
) -> Array<Vector<X, N>> {
    let mut rows = Array::<Vector<X, N>>::new(AHEAD);
    let start = first * stride + vector;
    #[unroll]
    for i in 0..AHEAD {
        if inside {
            rows[i] = x[start + i * stride];
        } else {
            rows[i] = x[min(first + i, last) * stride + vector];
        }
    }
    rows
}

/// The resets of the rows that [`load_rows`] reads.
#[cube]
pub(super) fn load_resets(resets: &OptionalInput, first: usize, last: usize) -> Array<f32> {
    let mut flags = Array::<f32>::new(AHEAD);
    #[comptime]
    match resets {
        ComptimeOption::Some(resets) =>
        {
            #[unroll]
            for i in 0..AHEAD {
                flags[i] = resets[min(first + i, last)];
            }
        }
        ComptimeOption::None => {}
    }
    flags
}

/// The sigmoid of every number.
#[cube]
pub(super) fn gate<N: Size>(x: Vector<f32, N>, #[comptime] ptx: bool) -> Vector<f32, N> {
    let mut out = Vector::<f32, N>::new(0.0f32);
    #[unroll]
    for c in 0..N::value() {
        out.insert(c, sigmoid(x.extract(c), ptx));
    }
    out
}
