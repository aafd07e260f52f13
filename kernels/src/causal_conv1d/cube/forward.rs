//! The forward kernel.

use cubecl::ir::ElemType;
use cubecl::prelude::*;

use super::common::{
    Filter, Window, clear, convolve, gate, load_filter, place, shift, window_before,
};
use super::{ConvConfig, FORWARD_AHEAD};
use crate::cube::OptionalInput;
use crate::cube::words::{Words, load_now, number};

/// Reads `FORWARD_AHEAD` rows of the unit's channels from `first` on, those beyond `last` being `last`.
/// Without conditions, if `inside`: their places are then a stride apart.
#[cube]
fn load_words<P: Size>(
    x: &[Words<P>],
    stride: usize,
    into: &mut Array<Words<P>>,
    first: usize,
    last: usize,
    vector: usize,
    #[comptime] inside: bool,
    #[comptime] ptx: bool,
) {
    let start = first * stride + vector;
    #[unroll]
    for i in 0..FORWARD_AHEAD {
        if inside {
            into[i] = load_now(x, start + i * stride, ptx);
        } else {
            into[i] = load_now(x, min(first + i, last) * stride + vector, ptx);
        }
    }
}

/// The outputs of `FORWARD_AHEAD` rows from `first` on, or of those before `end` unless all are
/// `inside`.
///
/// Without conditions the window's shifts are mere renaming of registers.
#[cube]
fn forward_rows<X: Float, N: Size, P: Size>(
    rows: &Array<Words<P>>,
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
    let start = first * vectors + vector;
    #[unroll]
    for i in 0..FORWARD_AHEAD {
        let row = first + i;
        if inside || row < end {
            #[comptime]
            match resets {
                ComptimeOption::Some(resets) => clear(window, resets[row], config.width),
                ComptimeOption::None => {}
            }
            let words = rows[i];
            let mut next = Vector::<f32, N>::new(0.0f32);
            #[unroll]
            for c in 0..N::value() {
                next.insert(c, number(words, c, config.halves));
            }
            shift(window, next, config.width);
            let mut value = convolve(&*window, filter, config.width);
            if config.silu {
                value = value * gate(value, config.ptx);
            }
            y[start + i * vectors] = Vector::cast_from(value);
        }
    }
}

/// Output and last window. `x_stride` is that of the rows of `x`, in vectors; `words` is `x`, too.
///
/// A unit's rows are loaded while it works on those before: as words, which nothing takes apart
/// before they are needed.
#[cube(launch_unchecked, address_type = "dynamic")]
pub(super) fn conv_forward<X: Float, Y: Float, N: Size, P: Size>(
    x: &[Vector<X, N>],
    words: &[Words<P>],
    weight: &[f32],
    bias: &OptionalInput,
    initial: &OptionalInput,
    resets: &OptionalInput,
    y: &mut [Vector<Y, N>],
    last_window: &mut [f32],
    batch: usize,
    length: usize,
    vectors: usize,
    x_stride: usize,
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
    let row0 = place.batch * length;
    let groups = (end - t0) / FORWARD_AHEAD;
    let mut ahead = Array::<Words<P>>::new(FORWARD_AHEAD);
    let last = row0 + end - 1;
    load_words(
        words,
        x_stride,
        &mut ahead,
        row0 + t0,
        last,
        place.vector,
        false,
        config.ptx,
    );
    let filter = load_filter::<N>(weight, bias, place.vector, width);
    let mut window = window_before::<X, N>(
        x, x_stride, initial, resets, &place, t0, length, vectors, width,
    );
    let mut rows = Array::<Words<P>>::new(FORWARD_AHEAD);
    for group in 0..groups {
        let first = row0 + t0 + group * FORWARD_AHEAD;
        #[unroll]
        for i in 0..FORWARD_AHEAD {
            rows[i] = ahead[i];
        }
        // Beyond the last whole group this one is read again, and not used.
        let next = select(group + 1 < groups, first + FORWARD_AHEAD, first);
        load_words(
            words,
            x_stride,
            &mut ahead,
            next,
            last,
            place.vector,
            true,
            config.ptx,
        );
        forward_rows::<Y, N, P>(
            &rows,
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
    if t0 + groups * FORWARD_AHEAD < end {
        let first = row0 + t0 + groups * FORWARD_AHEAD;
        load_words(
            words,
            x_stride,
            &mut rows,
            first,
            last,
            place.vector,
            false,
            config.ptx,
        );
        forward_rows::<Y, N, P>(
            &rows,
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
