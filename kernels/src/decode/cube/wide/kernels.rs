//! The kernels.

use cubecl::cmma;
use cubecl::ir::ElemType;
use cubecl::prelude::*;

use super::super::phases::{
    CHANNEL_NUMBERS, CONV_BIAS, OUT_BIAS, One, WIDTH_NUMBERS, X_BIAS, Z_BIAS, advance,
    load_advance, no_advance,
};
use super::super::plan::StepConfig;
use super::{AHEAD, HALVES, NORM_UNITS, TILE, WideConfig};
use crate::cube::math::sigmoid;
use crate::cube::reduce::cube_sum;

/// The tile `Σ_k a[row, k] · b[k, column]` of a plane, into `out[out_at ..]` row by row.
///
/// The rows of `a` begin at `a_at` and are `a_stride` apart. `b` is stored column by column
/// (`by_columns`, as weights `[out, in]`) or row by row.
#[cube]
fn tile_product<W: Float>(
    a: &[W],
    b: &[W],
    out: &mut Shared<[f32]>,
    a_at: usize,
    b_at: usize,
    out_at: usize,
    #[comptime] a_stride: usize,
    #[comptime] b_stride: usize,
    #[comptime] by_columns: bool,
    #[comptime] depth: usize,
    #[comptime] w: WideConfig,
) {
    if w.tensor {
        let layout = comptime!(if by_columns {
            cmma::MatrixLayout::ColMajor
        } else {
            cmma::MatrixLayout::RowMajor
        });
        let sum = cmma::Matrix::<f32>::from_value(
            cmma::MatrixIdent::Accumulator,
            TILE,
            TILE,
            TILE,
            cmma::MatrixLayout::Undefined,
            0.0f32,
        );
        let a_len = a.len();
        let b_len = b.len();
        let steps = comptime!(depth / TILE);
        let rounds = comptime!(steps.div_ceil(AHEAD));
        for round in 0..rounds {
            #[unroll]
            for i in 0..comptime!(if steps < AHEAD { steps } else { AHEAD }) {
                let k = (round * comptime!(AHEAD) + i) * TILE;
                if comptime!(steps % AHEAD == 0 || steps < AHEAD) || k < depth {
                    let a_from = a_at + k;
                    let b_from = b_at + k * comptime!(if by_columns { 1 } else { b_stride });
                    let a_tile = cmma::Matrix::<W>::from_slice(
                        cmma::MatrixIdent::A,
                        TILE,
                        TILE,
                        TILE,
                        cmma::MatrixLayout::RowMajor,
                        &a[a_from..a_len],
                        comptime!(a_stride as u32).runtime(),
                    );
                    let b_tile = cmma::Matrix::<W>::from_slice(
                        cmma::MatrixIdent::B,
                        TILE,
                        TILE,
                        TILE,
                        layout,
                        &b[b_from..b_len],
                        comptime!(b_stride as u32).runtime(),
                    );
                    cmma::execute(&a_tile, &b_tile, &sum, &sum);
                }
            }
        }
        cmma::store(
            &mut out[out_at..out_at + comptime!(TILE * TILE)],
            &sum,
            comptime!(TILE as u32).runtime(),
            cmma::MatrixLayout::RowMajor,
        );
    } else {
        let lane = UNIT_POS as usize % comptime!(w.step.plane);
        for i in 0..comptime!((TILE * TILE).div_ceil(w.step.plane)) {
            let place = i * comptime!(w.step.plane) + lane;
            let row = place / TILE;
            let column = place % TILE;
            let mut sum = 0.0f32;
            for k in 0..depth {
                let left = f32::cast_from(a[a_at + row * a_stride + k]);
                let at = if comptime!(by_columns) {
                    column * b_stride + k
                } else {
                    k * b_stride + column
                };
                sum = fma(left, f32::cast_from(b[b_at + at]), sum);
            }
            out[out_at + place] = sum;
        }
    }
}

/// The norm of every row, rounded; rows beyond the last sequence are zero. A cube a row.
#[cube(launch_unchecked, address_type = "dynamic")]
pub(super) fn normalise_rows<W: Float>(
    stream: &[f32],
    widths: &[f32],
    hat: &mut [W],
    layer: usize,
    batch: usize,
    eps: f32,
    #[comptime] w: WideConfig,
    #[define(W)] _type: ElemType,
) {
    let width = comptime!(w.step.width);
    let plane = comptime!(w.step.plane);
    let held = comptime!(width.div_ceil(NORM_UNITS));
    let row = CUBE_POS;
    if row >= comptime!(w.rows()) {
        terminate!();
    }
    let unit = UNIT_POS as usize;
    let from = min(row, batch - 1) * width;
    let mut scratch = Shared::<[f32]>::new_slice(comptime!(NORM_UNITS / plane));
    let mut values = Array::<f32>::new(held);
    let mut own = 0.0f32;
    #[unroll]
    for i in 0..held {
        let column = unit + comptime!(i * NORM_UNITS);
        values[i] = 0.0f32;
        if column < width {
            values[i] = stream[from + column];
        }
        own += values[i];
    }
    if comptime!(w.step.centred) {
        let mean = cube_sum(own, &mut scratch, NORM_UNITS, plane) / comptime!(width as f32);
        #[unroll]
        for i in 0..held {
            values[i] -= mean;
        }
    }
    let mut squares = 0.0f32;
    #[unroll]
    for i in 0..held {
        if unit + comptime!(i * NORM_UNITS) < width {
            squares = fma(values[i], values[i], squares);
        }
    }
    let sum = cube_sum(squares, &mut scratch, NORM_UNITS, plane);
    let scale = 1.0f32 / (sum / comptime!(width as f32) + eps).sqrt();
    let at = layer * comptime!(WIDTH_NUMBERS * width);
    #[unroll]
    for i in 0..held {
        let column = unit + comptime!(i * NORM_UNITS);
        if column < width {
            let value = fma(
                values[i] * scale,
                widths[at + column],
                widths[at + width + column],
            );
            hat[row * width + column] = W::cast_from(select(row < batch, value, 0.0f32));
        }
    }
}

/// `in_proj`, one step of the convolution, SiLU. A cube has 16 channels of some tiles of sequences.
#[cube(launch_unchecked, address_type = "dynamic")]
pub(super) fn enter_wide<W: Float>(
    hat: &[W],
    in_proj: &[W],
    channels: &[f32],
    window: &mut [f32],
    u: &mut [f32],
    rounded_u: &mut [W],
    z: &mut [f32],
    layer: usize,
    batch: usize,
    #[comptime] w: WideConfig,
    #[define(W)] _type: ElemType,
) {
    let width = comptime!(w.step.width);
    let inner = comptime!(w.step.inner);
    let blocks = comptime!(w.step.inner / TILE);
    let numbers = comptime!(w.step.taps + CHANNEL_NUMBERS);
    let past = comptime!(w.step.taps - 1);
    let square = comptime!(TILE * TILE);
    let first = CUBE_POS % blocks * TILE;
    let plane = UNIT_POS as usize / comptime!(w.step.plane);
    let lane = UNIT_POS as usize % comptime!(w.step.plane);
    let tile = CUBE_POS / blocks * comptime!(w.tall()) + plane;
    let mut sums = Shared::<[f32]>::new_slice(comptime!(2 * square * w.tall()));
    let own = plane * comptime!(2 * square);
    if tile < comptime!(w.tiles) {
        let a_at = tile * comptime!(TILE * width);
        let row = layer * comptime!(2 * inner) + first;
        tile_product(
            hat,
            in_proj,
            &mut sums,
            a_at,
            row * width,
            own,
            width,
            width,
            true,
            width,
            w,
        );
        tile_product(
            hat,
            in_proj,
            &mut sums,
            a_at,
            (row + inner) * width,
            own + square,
            width,
            width,
            true,
            width,
            w,
        );
    }
    sync_cube();
    for i in 0..comptime!(square.div_ceil(w.step.plane)) {
        let place = i * comptime!(w.step.plane) + lane;
        let sequence = tile * TILE + place / TILE;
        let channel = first + place % TILE;
        if tile < comptime!(w.tiles) {
            let mut value = 0.0f32;
            if sequence < batch {
                let at = (layer * inner + channel) * numbers;
                let state = ((layer * batch + sequence) * inner + channel) * past;
                let x = sums[own + place] + channels[at + comptime!(w.step.taps + X_BIAS)];
                let gate = sums[own + square + place];
                value = channels[at + comptime!(w.step.taps + CONV_BIAS)];
                let mut inputs = Array::<f32>::new(comptime!(w.step.taps));
                #[unroll]
                for j in 0..past {
                    inputs[j] = window[state + j];
                }
                inputs[past] = x;
                #[unroll]
                for j in 0..comptime!(w.step.taps) {
                    value = fma(channels[at + j], inputs[j], value);
                }
                value = value * sigmoid(value, w.step.ptx);
                #[unroll]
                for j in 0..past {
                    window[state + j] = inputs[comptime!(j + 1)];
                }
                u[sequence * inner + channel] = value;
                z[sequence * inner + channel] =
                    gate + channels[at + comptime!(w.step.taps + Z_BIAS)];
            }
            rounded_u[sequence * inner + channel] = W::cast_from(value);
        }
    }
}

/// A part of `x_proj`'s sum. A cube has 16 columns of some tiles of sequences.
#[cube(launch_unchecked, address_type = "dynamic")]
pub(super) fn low_wide<W: Float>(
    u: &[W],
    x_proj: &[W],
    parts: &mut [f32],
    layer: usize,
    batch: usize,
    #[comptime] w: WideConfig,
    #[define(W)] _type: ElemType,
) {
    let inner = comptime!(w.step.inner);
    let low = comptime!(w.step.low());
    let blocks = comptime!(w.step.low() / TILE);
    let depth = comptime!(w.step.inner / w.step.parts);
    let first = CUBE_POS % blocks * TILE;
    let part = CUBE_POS / blocks % comptime!(w.step.parts);
    let plane = UNIT_POS as usize / comptime!(w.step.plane);
    let lane = UNIT_POS as usize % comptime!(w.step.plane);
    let tall = CUBE_POS / comptime!(blocks * w.step.parts);
    let tile = tall * comptime!(w.tall()) + plane;
    let mut sums = Shared::<[f32]>::new_slice(comptime!(TILE * TILE * w.tall()));
    let own = plane * comptime!(TILE * TILE);
    if tile < comptime!(w.tiles) {
        let a_at = tile * comptime!(TILE * inner) + part * depth;
        let b_at = (layer * inner + part * depth) * low + first;
        tile_product(
            u, x_proj, &mut sums, a_at, b_at, own, inner, low, false, depth, w,
        );
    }
    sync_cube();
    for i in 0..comptime!((TILE * TILE).div_ceil(w.step.plane)) {
        let place = i * comptime!(w.step.plane) + lane;
        let sequence = tile * TILE + place / TILE;
        if sequence < batch {
            let at = (sequence * comptime!(w.step.parts) + part) * low + first + place % TILE;
            parts[at] = sums[own + place];
        }
    }
}

/// [`advance`] with y rounded.
#[cube(launch_unchecked, address_type = "dynamic")]
pub(super) fn advance_wide<W: Float, T: Size, S: Size, Q: Size>(
    parts: &mut [One],
    u: &mut [f32],
    z: &mut [f32],
    channels: &[f32],
    dt_proj: &[Vector<W, T>],
    rates: &[Vector<f32, S>],
    h: &mut [Vector<f32, S>],
    y: &mut [Vector<W, Const<1>>],
    layer: usize,
    batch: usize,
    #[comptime] c: StepConfig,
    #[define(W)] _type: ElemType,
    #[define(Q)] _size: usize,
) {
    let cube = CUBE_POS;
    if cube >= comptime!(c.blocks()) * batch {
        terminate!();
    }
    let mut ahead = no_advance::<W, T, S>(c);
    load_advance(
        &mut ahead, channels, dt_proj, rates, h, layer, batch, cube, c,
    );
    advance::<W, W, T, S, Q>(&ahead, parts, u, z, h, y, layer, batch, cube, c);
}

/// `out_proj`, added to the stream. A cube has 16 columns of some tiles of sequences; two planes
/// share a tile's sum.
#[cube(launch_unchecked, address_type = "dynamic")]
pub(super) fn leave_wide<W: Float>(
    y: &[W],
    out_proj: &[W],
    widths: &[f32],
    stream: &mut [f32],
    layer: usize,
    batch: usize,
    #[comptime] w: WideConfig,
    #[define(W)] _type: ElemType,
) {
    let width = comptime!(w.step.width);
    let inner = comptime!(w.step.inner);
    let blocks = comptime!(w.step.width / TILE);
    let square = comptime!(TILE * TILE);
    let depth = comptime!(w.step.inner / HALVES);
    let tall = comptime!(w.out_tall());
    let first = CUBE_POS % blocks * TILE;
    let plane = UNIT_POS as usize / comptime!(w.step.plane);
    let lane = UNIT_POS as usize % comptime!(w.step.plane);
    let half = plane / tall;
    let tile = CUBE_POS / blocks * tall + plane % tall;
    let mut sums = Shared::<[f32]>::new_slice(comptime!(square * w.out_tall() * HALVES));
    let own = plane * square;
    if tile < comptime!(w.tiles) {
        let a_at = tile * comptime!(TILE * inner) + half * depth;
        let b_at = (layer * width + first) * inner + half * depth;
        tile_product(
            y, out_proj, &mut sums, a_at, b_at, own, inner, inner, true, depth, w,
        );
    }
    sync_cube();
    if half == 0 {
        for i in 0..comptime!(square.div_ceil(w.step.plane)) {
            let place = i * comptime!(w.step.plane) + lane;
            let sequence = tile * TILE + place / TILE;
            let column = first + place % TILE;
            if sequence < batch {
                let mut sum = widths[(layer * WIDTH_NUMBERS + OUT_BIAS) * width + column];
                #[unroll]
                for part in 0..HALVES {
                    sum += sums[own + comptime!(part * square * w.out_tall()) + place];
                }
                stream[sequence * width + column] += sum;
            }
        }
    }
}
