//! The forward kernel.

use cubecl::ir::ElemType;
use cubecl::prelude::*;

use super::common::{
    Filter, Window, clear, convolve, gate, load_filter, load_resets, load_rows, place, shift,
    window_before,
};
use super::{AHEAD, ConvConfig};
use crate::cube::OptionalInput;

/// The outputs of `AHEAD` rows from `first` on, or of those before `end` unless all are `inside`.
///
/// Without conditions the window's shifts are mere renaming of registers.
#[cube]
fn forward_rows<X: Float, N: Size>(
    x: &[Vector<X, N>],
    x_stride: usize,
    resets: &OptionalInput,
    y: &mut [Vector<X, N>],
    vectors: usize,
    window: &mut Window<N>,
    filter: &Filter<N>,
    first: usize,
    end: usize,
    vector: usize,
    #[comptime] config: ConvConfig,
    #[comptime] inside: bool,
) {
    let next = load_rows::<X, N>(x, x_stride, first, end - 1, vector, inside);
    let flags = load_resets(resets, first, end - 1);
    let start = first * vectors + vector;
    #[unroll]
    for i in 0..AHEAD {
        let row = first + i;
        if inside || row < end {
            if comptime!(resets.is_some()) {
                clear(window, flags[i], config.width);
            }
            shift(window, Vector::cast_from(next[i]), config.width);
            let mut value = convolve(&*window, filter, config.width);
            if config.silu {
                value = value * gate(value, config.ptx);
            }
            y[start + i * vectors] = Vector::cast_from(value);
        }
    }
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
    let groups = (end - t0) / AHEAD;
    for group in 0..groups {
        let first = row0 + t0 + group * AHEAD;
        forward_rows::<X, N>(
            x,
            x_stride,
            resets,
            y,
            vectors,
            &mut window,
            &filter,
            first,
            row0 + end,
            place.vector,
            config,
            true,
        );
    }
    if t0 + groups * AHEAD < end {
        let first = row0 + t0 + groups * AHEAD;
        forward_rows::<X, N>(
            x,
            x_stride,
            resets,
            y,
            vectors,
            &mut window,
            &filter,
            first,
            row0 + end,
            place.vector,
            config,
            false,
        );
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
