//! Steps of many sequences: the products are those of matrices, done tile by tile on tensor cores.
//!
//! A plane has a tile of 16 sequences and 16 columns. Inputs of products are rounded to the type
//! of the weights. Where a device has no tensor cores for a type, a plane computes its tiles number
//! by number: the same kernels, for tests.

mod kernels;
mod product;

use burn::tensor::DType;
use burn_cubecl::tensor::CubeTensor;
use cubecl::ir::features::MmaConfig;
use cubecl::prelude::*;
use cubecl::server::Handle;

use self::kernels::{advance_wide, enter_wide, head_wide, leave_wide, low_wide, normalise_rows};
use self::product::Tiles;
use super::phases::WIDTH_NUMBERS;
use super::plan::StepConfig;
use super::{Buffers, Weights};
use crate::cube::{address_type, buffer, cube_dim, elem, grid, word_buffer};

/// Rows and columns of a tile.
pub(super) const TILE: usize = 16;
/// Most tiles of sequences in a cube.
const TALL: usize = 8;
/// Units of a cube that normalises a row.
const NORM_UNITS: usize = 256;
/// Tiles along the inner sum that are loaded together.
const AHEAD: usize = 8;
/// Most tiles of sequences in a cube of `out_proj`, which has fewer columns.
const OUT_TALL: usize = 4;
/// The same of the head, which has fewer still.
const HEAD_TALL: usize = 1;
/// Most sequences of a cube that runs the recurrence.
const SEQUENCES: usize = 8;

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
        let whole = [step.width, step.inner, step.low(), step.rows];
        if !whole.iter().all(|size| size.is_multiple_of(TILE)) {
            return None;
        }
        // Parts of the sum of `x_proj`, of at least a few tiles.
        let columns = step.inner / TILE;
        let parts = [16, 8, 4, 2, 1].into_iter();
        let parts = parts
            .filter(|parts| columns.is_multiple_of(*parts))
            .find(|parts| columns / parts >= 4)
            .unwrap_or(1);
        let config = Self {
            step: StepConfig {
                parts,
                // A cube that runs the recurrence has as many channels as there are units for.
                block: step.units / step.lanes(),
                ..step
            },
            tiles: batch.div_ceil(TILE),
            tensor,
        };
        // What a unit has of a product is in one column where it takes up whole rows with others.
        let products = [config.in_tiles(), config.out_tiles()];
        let rows = products.iter().all(|it| it.units().is_multiple_of(TILE));
        rows.then_some(config)
    }

    /// Rows of the buffers.
    pub const fn rows(&self) -> usize {
        self.tiles * TILE
    }

    /// Tiles of sequences in a cube, of which there may be `most`.
    const fn tall(&self, most: usize) -> usize {
        if self.tiles < most { self.tiles } else { most }
    }

    /// The product of `in_proj`: a tile of x's columns and one of z's.
    const fn in_tiles(&self) -> Tiles {
        self.tiles_of(self.step.width, self.tall(TALL), 2)
    }

    /// The product of `out_proj`.
    const fn out_tiles(&self) -> Tiles {
        self.tiles_of(self.step.inner, self.tall(OUT_TALL), 1)
    }

    /// The product of the head.
    const fn head_tiles(&self) -> Tiles {
        self.tiles_of(self.step.width, self.tall(HEAD_TALL), 1)
    }

    const fn tiles_of(&self, depth: usize, tall: usize, blocks: usize) -> Tiles {
        Tiles {
            plane: self.step.plane,
            vector: self.step.vector,
            halves: self.step.halves,
            depth,
            rows: self.rows(),
            tall,
            blocks,
            split: 1,
            tensor: self.tensor,
        }
        .divided()
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

/// Launches the kernels of all layers and of the head.
pub(super) fn launch(
    weights: &Weights,
    buffers: &Buffers,
    wide: &WideBuffers,
    config: &WideConfig,
) {
    let w = *config;
    let c = w.step;
    let [_, _, rank_words] = c.words();
    let client = &weights.embedding.client;
    let batch = buffers.batch;
    let dtype = elem(weights.in_proj.dtype);
    let address = address_type(&[&weights.in_proj, &weights.rates]);
    let all = |handle: &Handle, count: usize| {
        // SAFETY: `count` is the size that the buffer's field documents.
        unsafe { BufferArg::from_raw_parts(handle.clone(), count) }
    };
    let words = |handle: &Handle, count: usize| {
        // SAFETY: as above; rows are of whole words.
        unsafe {
            BufferArg::from_raw_parts(handle.clone(), count * weights.in_proj.dtype.size() / 4)
        }
    };
    let channels = batch * c.inner;
    let past = (weights.layers * channels * (c.taps - 1)).max(1);
    let [hat, u, y] = [c.width, c.inner, c.inner].map(|width| w.rows() * width);
    let parts = batch * c.parts * c.low();
    let normalise = |parameters: &CubeTensor, at: usize, norm: bool| {
        // SAFETY: the kernel indexes every buffer within the size its field documents.
        unsafe {
            normalise_rows::launch_unchecked(
                client,
                grid(w.rows()),
                cube_dim(NORM_UNITS),
                address,
                all(&buffers.stream, batch * c.width),
                buffer(parameters),
                all(&wide.hat, hat),
                at,
                batch,
                weights.eps,
                norm,
                w,
                dtype,
            );
        }
    };
    for layer in 0..weights.layers {
        // SAFETY: the kernels index every buffer within the size its field documents; cubes and
        // units beyond the last piece of work do nothing.
        unsafe {
            normalise(&weights.widths, layer * WIDTH_NUMBERS * c.width, true);
            enter_wide::launch_unchecked(
                client,
                grid(c.inner / TILE * w.tiles.div_ceil(w.in_tiles().tall)),
                cube_dim(w.in_tiles().units()),
                address,
                words(&wide.hat, hat),
                word_buffer(&weights.in_proj),
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
                grid(c.low() / TILE * c.parts * w.tiles.div_ceil(w.tall(TALL))),
                cube_dim(w.tall(TALL) * c.plane),
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
                grid(c.blocks() * batch.div_ceil(SEQUENCES)),
                cube_dim(c.units),
                address,
                rank_words,
                c.state_vector,
                all(&buffers.parts, parts),
                all(&buffers.u, channels),
                all(&buffers.z, channels),
                buffer(&weights.channels),
                word_buffer(&weights.dt_proj),
                buffer(&weights.rates),
                all(&buffers.h, weights.layers * channels * c.states),
                all(&wide.y, y),
                layer,
                batch,
                w,
                dtype,
            );
            leave_wide::launch_unchecked(
                client,
                grid(c.width / TILE * w.tiles.div_ceil(w.out_tiles().tall)),
                cube_dim(w.out_tiles().units()),
                address,
                words(&wide.y, y),
                word_buffer(&weights.out_proj),
                buffer(&weights.widths),
                all(&buffers.stream, batch * c.width),
                layer,
                batch,
                w,
            );
        }
    }
    normalise(&weights.norm_f, 0, c.norm_f);
    // SAFETY: as above.
    unsafe {
        head_wide::launch_unchecked(
            client,
            grid(c.rows / TILE * w.tiles.div_ceil(w.head_tiles().tall)),
            cube_dim(w.head_tiles().units()),
            address,
            words(&wide.hat, hat),
            word_buffer(&weights.head),
            all(&buffers.logits, batch * c.rows),
            all(&buffers.position, 1),
            batch,
            w,
        );
    }
}
