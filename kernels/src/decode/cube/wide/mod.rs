//! Steps of many sequences: the products are those of matrices, and go where those of training go.
//!
//! What a step hands from kernel to kernel is in the type of the weights, as it is in training; the
//! stream, the states and all sums are f32. `x_proj`, whose result is too narrow to keep a GPU busy,
//! is part of the kernel that makes its input: cubes have some channels each and leave parts of its
//! sums, which the recurrence adds up. Where a device has no tensor cores for a type, that product is
//! done number by number: the same kernels, for tests.

mod kernels;

use burn::tensor::{DType, Shape};
use burn_cubecl::tensor::CubeTensor;
use cubecl::ir::features::MmaConfig;
use cubecl::prelude::*;
use cubecl::server::Handle;

use self::kernels::{advance_wide, enter_wide, normalise_rows};
use super::phases::{OUT_BIAS, WIDTH_NUMBERS};
use super::plan::StepConfig;
use super::{Buffers, Weights};
use crate::cube::{address_type, buffer, cube_dim, elem, grid};
use crate::linear::Product;
use crate::linear::cube::product_into;

/// Rows and columns of a tile of tensor cores: sequences of a cube that enters a layer.
const TILE: usize = 16;
/// Units of a cube that normalises a row, and of one that enters a layer.
const UNITS: usize = 256;
/// Most channels of a cube that enters a layer.
const PART: usize = 128;
/// Most sequences of a cube that runs the recurrence.
const SEQUENCES: usize = 8;

/// Compile-time sizes of the kernels here.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct WideConfig {
    pub step: StepConfig,
    /// Whether tiles go to tensor cores.
    pub tensor: bool,
    /// Whether `out_proj` has a bias.
    pub biased: bool,
    /// Sequences of a cube that runs the recurrence.
    pub sequences: usize,
}

/// What the products read and write, in the type of the weights.
#[derive(Clone, Debug)]
pub(super) struct WideBuffers {
    /// `[B, D]`.
    pub hat: CubeTensor,
    /// `[B, 2E]`.
    pub xz: CubeTensor,
    /// `[B, E]`.
    pub u: CubeTensor,
    /// `[B, E]`.
    pub y: CubeTensor,
}

impl WideConfig {
    /// The division of the work of `batch` sequences among `processors`; `None` where a size is not one
    /// of whole tiles.
    pub fn new(
        step: StepConfig,
        batch: usize,
        processors: usize,
        tensor: bool,
        biased: bool,
    ) -> Option<Self> {
        let whole = [step.inner, step.low()];
        if !whole.iter().all(|size| size.is_multiple_of(TILE)) {
            return None;
        }
        let part = std::iter::successors(Some(PART), |part| Some(part / 2));
        let part = part.take_while(|part| *part >= TILE);
        let part = part.into_iter().find(|it| step.inner.is_multiple_of(*it))?;
        let step = StepConfig {
            parts: step.inner / part,
            // A cube that runs the recurrence has as many channels as there are units for.
            block: step.units / step.lanes(),
            ..step
        };
        // Two cubes for each processor, where there are so many sequences.
        let share = (step.blocks() * batch).div_ceil(2 * processors);
        Some(Self {
            step,
            tensor,
            biased,
            sequences: share.next_power_of_two().min(SEQUENCES),
        })
    }

    /// Channels of a cube that enters a layer.
    const fn part(&self) -> usize {
        self.step.inner / self.step.parts
    }

    /// Sequences of a cube that enters a layer between two of a unit's, and how many a unit has.
    const fn apart(&self) -> usize {
        UNITS / self.part()
    }

    const fn each(&self) -> usize {
        TILE / self.apart()
    }

    /// Numbers from a sequence to the next of u in shared memory: rows begin in other banks.
    const fn pitch(&self) -> usize {
        self.part() + 8
    }

    /// Tiles of `x_proj`'s columns.
    const fn columns(&self) -> usize {
        self.step.low() / TILE
    }

    /// How many of them a plane has.
    const fn turns(&self) -> usize {
        self.columns().div_ceil(UNITS / self.step.plane)
    }
}

impl WideBuffers {
    pub fn new(weights: &Weights, sizes: &StepConfig, batch: usize) -> Self {
        let like = &weights.in_proj;
        let rows = |width: usize| {
            let handle = like.client.empty(like.dtype.size() * batch * width);
            matrix(like, handle, [batch, width], like.dtype)
        };
        Self {
            hat: rows(sizes.width),
            xz: rows(2 * sizes.inner),
            u: rows(sizes.inner),
            y: rows(sizes.inner),
        }
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

/// A buffer as a matrix on the device of `like`.
fn matrix(like: &CubeTensor, handle: Handle, shape: [usize; 2], dtype: DType) -> CubeTensor {
    let (client, device) = (like.client.clone(), like.device.clone());
    CubeTensor::new_contiguous(client, device, Shape::from(shape), handle, dtype)
}

/// The matrix of one layer in a buffer of all layers'.
fn of_layer(all: &CubeTensor, layer: usize) -> CubeTensor {
    let [_, rows, columns] = all.meta.shape().dims();
    let bytes = layer * rows * columns * all.dtype.size();
    let handle = all.handle.clone().offset_start(bytes as u64);
    matrix(all, handle, [rows, columns], all.dtype)
}

/// Launches the kernels of all layers and of the head; whether a graph may replay them.
pub(super) fn launch(
    weights: &Weights,
    buffers: &Buffers,
    wide: &WideBuffers,
    config: &WideConfig,
) -> bool {
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
    let channels = batch * c.inner;
    let past = (weights.layers * channels * (c.taps - 1)).max(1);
    let parts = batch * c.parts * c.low();
    let float = |handle: &Handle, width: usize| {
        let handle = handle.clone();
        matrix(&weights.embedding, handle, [batch, width], DType::F32)
    };
    let [stream, logits] = [
        float(&buffers.stream, c.width),
        float(&buffers.logits, c.rows),
    ];
    let product = |a: &CubeTensor, b: CubeTensor, adds: bool, out: &CubeTensor| {
        let how = Product {
            workspace: false,
            ..Product::right_transposed(out.dtype, false)
        };
        product_into(a.clone(), b, how, adds, out)
    };
    // The norm before layer `layer`, or the last.
    let normalise = |layer: usize| {
        let last = layer == weights.layers;
        let (parameters, at) = match last {
            true => (&weights.norm_f, 0),
            false => (&weights.widths, layer * WIDTH_NUMBERS * c.width),
        };
        let bias = (layer > 0 && w.biased).then_some(layer.saturating_sub(1));
        let bias_at = (bias.unwrap_or(0) * WIDTH_NUMBERS + OUT_BIAS) * c.width;
        // SAFETY: the kernel indexes every buffer within the size its field documents.
        unsafe {
            normalise_rows::launch_unchecked(
                client,
                grid(batch),
                cube_dim(UNITS),
                address,
                buffer(&stream),
                buffer(parameters),
                buffer(&weights.widths),
                buffer(&wide.hat),
                all(&buffers.position, 1),
                at,
                bias_at,
                batch,
                weights.eps,
                !last || c.norm_f,
                bias.is_some(),
                last,
                w,
                dtype,
            );
        }
    };
    let mut replayable = true;
    for layer in 0..weights.layers {
        normalise(layer);
        let in_proj = of_layer(&weights.in_proj, layer);
        replayable &= product(&wide.hat, in_proj, false, &wide.xz);
        // SAFETY: the kernels index every buffer within the size its field documents; cubes and
        // units beyond the last piece of work do nothing.
        unsafe {
            enter_wide::launch_unchecked(
                client,
                grid(c.parts * batch.div_ceil(TILE)),
                cube_dim(UNITS),
                address,
                buffer(&wide.xz),
                buffer(&weights.channels),
                all(&buffers.window, past),
                buffer(&weights.x_proj),
                buffer(&wide.u),
                all(&buffers.parts, parts),
                layer,
                batch,
                w,
                dtype,
            );
            advance_wide::launch_unchecked(
                client,
                grid(c.blocks() * batch.div_ceil(w.sequences)),
                cube_dim(c.units),
                address,
                rank_words,
                c.state_vector,
                all(&buffers.parts, parts),
                buffer(&wide.u),
                buffer(&wide.xz),
                buffer(&weights.channels),
                crate::cube::word_buffer(&weights.dt_proj),
                buffer(&weights.rates),
                all(&buffers.h, weights.layers * channels * c.states),
                buffer(&wide.y),
                layer,
                batch,
                w,
                dtype,
            );
        }
        let out_proj = of_layer(&weights.out_proj, layer);
        replayable &= product(&wide.y, out_proj, true, &stream);
    }
    normalise(weights.layers);
    replayable & product(&wide.hat, weights.head.clone(), false, &logits)
}
