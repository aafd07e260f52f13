//! Steps of many sequences: the products are those of matrices, done tile by tile on tensor cores.
//!
//! A plane has a tile of 16 sequences and 16 columns. Inputs of products are rounded to the type
//! of the weights. Where a device has no tensor cores for a type, a plane computes its tiles number
//! by number: the same kernels, for tests.

use burn::tensor::DType;
use burn_cubecl::tensor::CubeTensor;
use cubecl::cmma;
use cubecl::ir::ElemType;
use cubecl::ir::features::MmaConfig;
use cubecl::prelude::*;
use cubecl::server::Handle;

use super::phases::{
    CHANNEL_NUMBERS, CONV_BIAS, OUT_BIAS, One, WIDTH_NUMBERS, X_BIAS, Z_BIAS, advance,
    load_advance, no_advance,
};
use super::plan::StepConfig;
use super::{Buffers, Weights};
use crate::cube::math::sigmoid;
use crate::cube::reduce::cube_sum;
use crate::cube::{address_type, buffer, cube_dim, elem, grid};

/// Rows and columns of a tile.
pub(super) const TILE: usize = 16;
/// Most tiles of sequences in a cube.
const TALL: usize = 8;
/// Units of a cube that normalises a row.
const NORM_UNITS: usize = 256;
/// Tiles along the inner sum that are loaded together.
const AHEAD: usize = 8;
/// Parts of the inner sum of `out_proj`.
const HALVES: usize = 2;

/// Compile-time sizes of the kernels here.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct WideConfig {
    pub step: StepConfig,
    /// Tiles of sequences.
    pub tiles: usize,
    /// Whether tiles go to tensor cores.
    pub tensor: bool,
}

/// What the products read, in the type of the weights; rows are those of all tiles.
#[derive(Clone, Debug)]
pub(super) struct WideBuffers {
    /// `[rows, D]`.
    pub hat: Handle,
    /// `[rows, E]`.
    pub u: Handle,
    /// `[rows, E]`.
    pub y: Handle,
}

impl WideConfig {
    /// The division for `batch` sequences; `None` where a size is not one of whole tiles.
    pub fn new(step: StepConfig, batch: usize, tensor: bool) -> Option<Self> {
        let whole = [step.width, step.inner / HALVES, step.low()];
        if !whole.iter().all(|size| size.is_multiple_of(TILE)) || step.inner % HALVES != 0 {
            return None;
        }
        // Parts of the sum of `x_proj`, of at least a few tiles.
        let columns = step.inner / TILE;
        let parts = [16, 8, 4, 2, 1].into_iter();
        let parts = parts
            .filter(|parts| columns.is_multiple_of(*parts))
            .find(|parts| columns / parts >= 4)
            .unwrap_or(1);
        Some(Self {
            step: StepConfig { parts, ..step },
            tiles: batch.div_ceil(TILE),
            tensor,
        })
    }

    /// Rows of the buffers.
    pub const fn rows(&self) -> usize {
        self.tiles * TILE
    }

    /// Tiles of sequences in a cube.
    const fn tall(&self) -> usize {
        if self.tiles < TALL { self.tiles } else { TALL }
    }

    /// The same in a cube of `out_proj`.
    const fn out_tall(&self) -> usize {
        let most = TALL / HALVES;
        if self.tiles < most { self.tiles } else { most }
    }
}

/// Whether the device's tensor cores multiply matrices of the type with sums in f32.
pub(super) fn has_tensor_cores(tensor: &CubeTensor, dtype: DType) -> bool {
    let config = MmaConfig {
        a_type: elem(dtype),
        b_type: elem(dtype),
        cd_type: elem(DType::F32),
        m: TILE as u32,
        n: TILE as u32,
        k: TILE as u32,
    };
    let features = &tensor.client.properties().features;
    features.matmul.cmma.contains(&config)
}

/// Launches the kernels of all layers.
pub(super) fn launch(
    weights: &Weights,
    buffers: &Buffers,
    wide: &WideBuffers,
    config: &WideConfig,
) {
    let w = *config;
    let c = w.step;
    let client = &weights.embedding.client;
    let batch = buffers.batch;
    let dtype = elem(weights.in_proj.dtype);
    let address = address_type(&[&weights.in_proj, &weights.rates]);
    let all = |handle: &Handle, count: usize| {
        // SAFETY: `count` is the size that the buffer's field documents.
        unsafe { BufferArg::from_raw_parts(handle.clone(), count) }
    };
    let channels = batch * c.inner;
    let past = (weights.layers * channels * (c.taps - 1)).max(1);
    let [hat, u, y] = [c.width, c.inner, c.inner].map(|width| w.rows() * width);
    let parts = batch * c.parts * c.low();
    for layer in 0..weights.layers {
        // SAFETY: the kernels index every buffer within the size its field documents; cubes and
        // units beyond the last piece of work do nothing.
        unsafe {
            normalise_rows::launch_unchecked(
                client,
                grid(w.rows()),
                cube_dim(NORM_UNITS),
                address,
                all(&buffers.stream, batch * c.width),
                buffer(&weights.widths),
                all(&wide.hat, hat),
                layer,
                batch,
                weights.eps,
                w,
                dtype,
            );
            enter_wide::launch_unchecked(
                client,
                grid(c.inner / TILE * w.tiles.div_ceil(w.tall())),
                cube_dim(w.tall() * c.plane),
                address,
                all(&wide.hat, hat),
                buffer(&weights.in_proj),
                buffer(&weights.channels),
                all(&buffers.window, past),
                all(&buffers.u, channels),
                all(&wide.u, u),
                all(&buffers.z, channels),
                layer,
                batch,
                w,
                dtype,
            );
            low_wide::launch_unchecked(
                client,
                grid(c.low() / TILE * c.parts * w.tiles.div_ceil(w.tall())),
                cube_dim(w.tall() * c.plane),
                address,
                all(&wide.u, u),
                buffer(&weights.x_proj),
                all(&buffers.parts, parts),
                layer,
                batch,
                w,
                dtype,
            );
            advance_wide::launch_unchecked(
                client,
                grid(c.blocks() * batch),
                cube_dim(c.units),
                address,
                c.rank_vector,
                c.state_vector,
                all(&buffers.parts, parts),
                all(&buffers.u, channels),
                all(&buffers.z, channels),
                buffer(&weights.channels),
                buffer(&weights.dt_proj),
                buffer(&weights.rates),
                all(&buffers.h, weights.layers * channels * c.states),
                all(&wide.y, y),
                layer,
                batch,
                c,
                dtype,
                c.low_vector,
            );
            leave_wide::launch_unchecked(
                client,
                grid(c.width / TILE * w.tiles.div_ceil(w.out_tall())),
                cube_dim(w.out_tall() * HALVES * c.plane),
                address,
                all(&wide.y, y),
                buffer(&weights.out_proj),
                buffer(&weights.widths),
                all(&buffers.stream, batch * c.width),
                layer,
                batch,
                w,
                dtype,
            );
        }
    }
}

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
fn normalise_rows<W: Float>(
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
fn enter_wide<W: Float>(
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
                value = value * sigmoid(value * 1.0f32, w.step.ptx);
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
fn low_wide<W: Float>(
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
fn advance_wide<W: Float, T: Size, S: Size, Q: Size>(
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
fn leave_wide<W: Float>(
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
