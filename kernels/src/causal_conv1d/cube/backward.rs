//! The backward kernel, and the sum over its tiles.

use cubecl::ir::ElemType;
use cubecl::prelude::*;

use super::common::{
    Filter, Window, clear, convolve, gate, load_filter, load_resets, load_rows, place, shift,
    window_before,
};
use super::{AHEAD, ConvConfig};
use crate::cube::OptionalInput;
use crate::cube::reduce::sum_strided;

/// Gradients on their way.
#[derive(CubeType)]
struct Adjoint<N: Size> {
    /// What the positions of the window have received so far.
    pending: Array<Vector<f32, N>>,
    /// The tile's partials of dweight, then of dbias.
    sums: Array<Vector<f32, N>>,
}

/// Where a tile's rows are.
#[derive(CubeType)]
struct TileRows {
    first: usize,
    /// The row after the tile's last.
    end: usize,
    /// The sequence's last row.
    last: usize,
    /// Number of the vector that holds the unit's channels.
    vector: usize,
    /// Strides of the rows, in vectors.
    x_stride: usize,
    dy_stride: usize,
    dx_stride: usize,
}

/// Walks over `AHEAD` rows: all of them `inside` the tile, or up to K - 1 beyond it.
#[cube]
fn backward_rows<X: Float, Y: Float, N: Size>(
    x: &[Vector<X, N>],
    dy: &[Vector<Y, N>],
    dx: &mut [Vector<X, N>],
    resets: &OptionalInput,
    window: &mut Window<N>,
    adjoint: &mut Adjoint<N>,
    filter: &Filter<N>,
    rows: &TileRows,
    group: usize,
    #[comptime] config: ConvConfig,
    #[comptime] inside: bool,
) {
    let width = comptime!(config.width);
    let zero = Vector::<f32, N>::new(0.0f32);
    let first = rows.first + group * AHEAD;
    // What lies further on than the tile's inputs reach need not come from memory.
    let last = min(rows.last, rows.end + comptime!(width - 1) - 1);
    let next = load_rows::<X, N>(x, rows.x_stride, first, last, rows.vector, inside);
    let next_dy = load_rows::<Y, N>(dy, rows.dy_stride, first, last, rows.vector, inside);
    let flags = load_resets(resets, first, rows.last);
    let start = first * rows.dx_stride + rows.vector;
    #[unroll]
    for i in 0..AHEAD {
        let row = first + i;
        if inside || row < rows.end + comptime!(width - 1) {
            // Beyond the sequence nothing is added; the last position's reset is harmless.
            if comptime!(resets.is_some()) {
                clear(window, flags[i], width);
            }
            shift(window, Vector::cast_from(next[i]), width);
            let mut ds = Vector::<f32, N>::cast_from(next_dy[i]);
            if config.silu {
                let sum = convolve(&*window, filter, width);
                let gate = gate(sum, config.ptx);
                let one = Vector::<f32, N>::new(1.0f32);
                ds = ds * gate * fma(sum, one - gate, one);
            }
            let mut own = ds;
            if comptime!(!inside) {
                if row > rows.last {
                    ds = zero;
                }
                if row >= rows.end {
                    own = zero;
                }
            }
            receive(
                &*window,
                adjoint,
                filter,
                ds,
                own,
                comptime!(resets.is_some()),
                width,
            );
            // The window's oldest position is complete; before the first K rows it is none of the
            // tile's.
            if comptime!(i + 1 >= width) || row + 1 >= rows.first + width {
                let done = start + i * rows.dx_stride - comptime!(width - 1) * rows.dx_stride;
                dx[done] = Vector::cast_from(adjoint.pending[0]);
            }
        }
    }
}

/// Passes the gradient `ds` of a position on to the inputs in its window, and `own`, which is zero
/// beyond the tile, to weight and bias.
#[cube]
fn receive<N: Size>(
    window: &Window<N>,
    adjoint: &mut Adjoint<N>,
    filter: &Filter<N>,
    ds: Vector<f32, N>,
    own: Vector<f32, N>,
    #[comptime] resets: bool,
    #[comptime] width: usize,
) {
    #[unroll]
    for j in 1..width {
        adjoint.pending[comptime!(j - 1)] = adjoint.pending[j];
    }
    adjoint.pending[comptime!(width - 1)] = Vector::new(0.0f32);
    adjoint.sums[width] += own;
    #[unroll]
    for j in 0..width {
        adjoint.sums[j] = fma(own, window.inputs[j], adjoint.sums[j]);
        let mut reach = ds;
        if resets {
            reach = ds * Vector::new(window.alive[j]);
        }
        adjoint.pending[j] = fma(filter.weights[j], reach, adjoint.pending[j]);
    }
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
    let zero = Vector::<f32, N>::new(0.0f32);
    let mut adjoint = Adjoint::<N> {
        pending: Array::<Vector<f32, N>>::new(width),
        sums: Array::<Vector<f32, N>>::new(comptime!(width + 1)),
    };
    #[unroll]
    for j in 0..width {
        adjoint.pending[j] = zero;
        adjoint.sums[j] = zero;
    }
    adjoint.sums[width] = zero;
    let rows = TileRows {
        first: row0 + t0,
        end: row0 + end,
        last: row0 + length - 1,
        vector: place.vector,
        x_stride,
        dy_stride,
        dx_stride,
    };
    let whole = (end - t0) / AHEAD;
    for group in 0..whole {
        backward_rows::<X, Y, N>(
            x,
            dy,
            dx,
            resets,
            &mut window,
            &mut adjoint,
            &filter,
            &rows,
            group,
            config,
            true,
        );
    }
    // Position t - (K - 1) has received everything after position t.
    let all = (end - t0 + comptime!(width - 1)).div_ceil(AHEAD);
    for group in whole..all {
        backward_rows::<X, Y, N>(
            x,
            dy,
            dx,
            resets,
            &mut window,
            &mut adjoint,
            &filter,
            &rows,
            group,
            config,
            false,
        );
    }
    let row = (place.batch * length.div_ceil(comptime!(config.tile)) + place.tile)
        * comptime!(config.partials());
    #[unroll]
    for j in 0..width {
        sums[(row + j) * vectors + place.vector] = adjoint.sums[j];
    }
    if config.bias {
        sums[(row + width) * vectors + place.vector] = adjoint.sums[width];
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
