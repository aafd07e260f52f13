//! Kernels of the convolution.

use cubecl::ir::ElemType;
use cubecl::prelude::*;

use super::{AHEAD, ConvConfig, UNITS};
use crate::cube::OptionalInput;
use crate::cube::math::sigmoid;
use crate::cube::reduce::sum_strided;

/// A unit's sequence and tile, and where its channels are.
#[derive(CubeType)]
struct Place {
    batch: usize,
    tile: usize,
    /// Number of the vector that holds the unit's channels.
    vector: usize,
}

/// `vectors` is the number of vectors in a row.
#[cube]
fn place(length: usize, vectors: usize, #[comptime] config: ConvConfig) -> Place {
    let cubes = vectors.div_ceil(UNITS);
    let tiles = length.div_ceil(comptime!(config.tile));
    let row = CUBE_POS / cubes;
    Place {
        batch: row / tiles,
        tile: row % tiles,
        vector: CUBE_POS % cubes * UNITS + UNIT_POS as usize,
    }
}

/// The K last inputs of the unit's channels, oldest first, and which of them the position may see.
#[derive(CubeType)]
struct Window<N: Size> {
    /// Those cleared by a reset are zero.
    inputs: Array<Vector<f32, N>>,
    /// 1 for an input that no reset has cut off, else 0. Unused without resets.
    alive: Array<f32>,
}

/// Clears the window if the state is `reset` before the next position.
#[cube]
fn clear<N: Size>(window: &mut Window<N>, reset: f32, #[comptime] width: usize) {
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
fn shift<N: Size>(window: &mut Window<N>, next: Vector<f32, N>, #[comptime] width: usize) {
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
fn window_before<X: Float, N: Size>(
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
struct Filter<N: Size> {
    weights: Array<Vector<f32, N>>,
    bias: Vector<f32, N>,
}

#[cube]
fn load_filter<N: Size>(
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
fn convolve<N: Size>(
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

/// Rows `first .. first + AHEAD` of the unit's channels, those beyond `last` being `last`.
#[cube]
fn load_rows<X: Float, N: Size>(
    x: &[Vector<X, N>],
    stride: usize,
    first: usize,
    last: usize,
    vector: usize,
) -> Array<Vector<X, N>> {
    let mut rows = Array::<Vector<X, N>>::new(AHEAD);
    #[unroll]
    for i in 0..AHEAD {
        rows[i] = x[min(first + i, last) * stride + vector];
    }
    rows
}

/// The resets of the rows that [`load_rows`] reads.
#[cube]
fn load_resets(resets: &OptionalInput, first: usize, last: usize) -> Array<f32> {
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

/// Output and last window. `x_stride` is that of the rows of `x`, in vectors.
#[cube(launch_unchecked, address_type = "dynamic")]
pub(super) fn conv_forward<X: Float, N: Size>(
    x: &[Vector<X, N>],
    weight: &[f32],
    bias: &OptionalInput,
    initial: &OptionalInput,
    resets: &OptionalInput,
    y: &mut [Vector<X, N>],
    last_window: &mut [f32],
    batch: usize,
    length: usize,
    vectors: usize,
    x_stride: usize,
    #[comptime] config: ConvConfig,
    #[define(X)] _type: ElemType,
) {
    let place = place(length, vectors, config);
    if place.batch >= batch || place.vector >= vectors {
        terminate!();
    }
    let width = comptime!(config.width);
    let t0 = place.tile * comptime!(config.tile);
    let end = min(t0 + comptime!(config.tile), length);
    let filter = load_filter::<N>(weight, bias, place.vector, width);
    let mut window = window_before::<X, N>(
        x, x_stride, initial, resets, &place, t0, length, vectors, width,
    );
    let row0 = place.batch * length;
    for group in 0..(end - t0).div_ceil(AHEAD) {
        let first = row0 + t0 + group * AHEAD;
        let next = load_rows::<X, N>(x, x_stride, first, row0 + end - 1, place.vector);
        let flags = load_resets(resets, first, row0 + end - 1);
        #[unroll]
        for i in 0..AHEAD {
            let row = first + i;
            if row < row0 + end {
                if comptime!(resets.is_some()) {
                    clear(&mut window, flags[i], width);
                }
                shift(&mut window, Vector::cast_from(next[i]), width);
                let mut value = convolve(&window, &filter, width);
                if config.silu {
                    value = value * gate(value, config.ptx);
                }
                y[row * vectors + place.vector] = Vector::cast_from(value);
            }
        }
    }
    if end == length {
        let channel = (place.batch * vectors + place.vector) * N::value();
        #[unroll]
        for c in 0..N::value() {
            #[unroll]
            for j in 1..width {
                let at = (channel + c) * comptime!(width - 1) + comptime!(j - 1);
                last_window[at] = window.inputs[j].extract(c);
            }
        }
    }
}

/// The sigmoid of every number.
#[cube]
fn gate<N: Size>(x: Vector<f32, N>, #[comptime] ptx: bool) -> Vector<f32, N> {
    let mut out = Vector::<f32, N>::new(0.0f32);
    #[unroll]
    for c in 0..N::value() {
        out.insert(c, sigmoid(x.extract(c), ptx));
    }
    out
}

/// dx, and each tile's partials of dweight and dbias, `[B · tiles, K (+ 1), E]`. The strides are
/// those of rows, in vectors.
#[cube(launch_unchecked, address_type = "dynamic")]
pub(super) fn conv_backward<X: Float, Y: Float, N: Size>(
    x: &[Vector<X, N>],
    weight: &[f32],
    bias: &OptionalInput,
    initial: &OptionalInput,
    resets: &OptionalInput,
    dy: &[Vector<Y, N>],
    dx: &mut [Vector<X, N>],
    sums: &mut [Vector<f32, N>],
    batch: usize,
    length: usize,
    vectors: usize,
    x_stride: usize,
    dy_stride: usize,
    dx_stride: usize,
    #[comptime] config: ConvConfig,
    #[define(X, Y)] _types: [ElemType; 2],
) {
    let place = place(length, vectors, config);
    if place.batch >= batch || place.vector >= vectors {
        terminate!();
    }
    let width = comptime!(config.width);
    let t0 = place.tile * comptime!(config.tile);
    let end = min(t0 + comptime!(config.tile), length);
    let filter = load_filter::<N>(weight, bias, place.vector, width);
    let mut window = window_before::<X, N>(
        x, x_stride, initial, resets, &place, t0, length, vectors, width,
    );
    let row0 = place.batch * length;
    let last = row0 + length - 1;
    let zero = Vector::<f32, N>::new(0.0f32);
    let mut dweight = Array::<Vector<f32, N>>::new(width);
    // What the positions of the window have received so far.
    let mut pending = Array::<Vector<f32, N>>::new(width);
    #[unroll]
    for j in 0..width {
        dweight[j] = zero;
        pending[j] = zero;
    }
    let mut dbias = Vector::<f32, N>::new(0.0f32);
    // Position t - (K - 1) has received everything after position t.
    let stop = end + comptime!(width - 1);
    for group in 0..(stop - t0).div_ceil(AHEAD) {
        let first = row0 + t0 + group * AHEAD;
        let next = load_rows::<X, N>(x, x_stride, first, last, place.vector);
        let next_dy = load_rows::<Y, N>(dy, dy_stride, first, last, place.vector);
        let flags = load_resets(resets, first, last);
        #[unroll]
        for i in 0..AHEAD {
            let t = t0 + group * AHEAD + i;
            if t < stop {
                // Beyond the sequence nothing is added; the last position's reset is harmless.
                if comptime!(resets.is_some()) {
                    clear(&mut window, flags[i], width);
                }
                shift(&mut window, Vector::cast_from(next[i]), width);
                let mut ds = Vector::<f32, N>::cast_from(next_dy[i]);
                if config.silu {
                    let sum = convolve(&window, &filter, width);
                    let gate = gate(sum, config.ptx);
                    let one = Vector::<f32, N>::new(1.0f32);
                    ds = ds * gate * fma(sum, one - gate, one);
                }
                ds = select(t < length, ds, zero);
                #[unroll]
                for j in 1..width {
                    pending[comptime!(j - 1)] = pending[j];
                }
                pending[comptime!(width - 1)] = zero;
                let own = select(t < end, ds, zero);
                dbias += own;
                #[unroll]
                for j in 0..width {
                    dweight[j] = fma(own, window.inputs[j], dweight[j]);
                    let mut reach = ds;
                    if comptime!(resets.is_some()) {
                        reach = ds * Vector::new(window.alive[j]);
                    }
                    pending[j] = fma(filter.weights[j], reach, pending[j]);
                }
                // The window's oldest position is complete.
                if t + 1 >= t0 + width {
                    let done = row0 + t + 1 - width;
                    dx[done * dx_stride + place.vector] = Vector::cast_from(pending[0]);
                }
            }
        }
    }
    let row = (place.batch * length.div_ceil(comptime!(config.tile)) + place.tile)
        * comptime!(config.partials());
    #[unroll]
    for j in 0..width {
        sums[(row + j) * vectors + place.vector] = dweight[j];
    }
    if config.bias {
        sums[(row + width) * vectors + place.vector] = dbias;
    }
}

/// Adds up the tiles' partials: dweight `[E, K]` and dbias `[E]`.
#[cube(launch_unchecked, address_type = "dynamic")]
pub(super) fn sum_tiles(
    sums: &[f32],
    dweight: &mut [f32],
    dbias: &mut [f32],
    rows: usize,
    inner: usize,
    #[comptime] config: ConvConfig,
) {
    let width = comptime!(config.width);
    let unit = CUBE_POS * CUBE_DIM as usize + UNIT_POS as usize;
    let j = unit / inner;
    let channel = unit % inner;
    let stride = inner * comptime!(config.partials());
    if j < width {
        dweight[channel * width + j] = sum_strided(sums, unit, rows, stride);
    }
    if config.bias {
        if j == width {
            dbias[channel] = sum_strided(sums, unit, rows, stride);
        }
    }
}
