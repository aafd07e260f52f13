//! The convolution on a GPU.
//!
//! A unit owns one channel of one tile of positions and walks it left to right, the last K inputs
//! in registers: neighbouring units are neighbouring channels, so loads and stores are coalesced,
//! and an input is read once a tile (the K - 1 before the tile twice).
//!
//! Backward walks the same way and recomputes the pre-activation instead of saving it. It runs
//! K - 1 positions past its tile, where the tile's last inputs still have a say. The gradients of
//! weight and bias leave one partial a tile, added up by a small sum kernel: no atomics.

// In the kernel language an `if` on a compile-time value decides what is compiled: it cannot be
// merged with one on a run-time value.
#![allow(clippy::collapsible_if)]

mod kernels;

use burn::tensor::DType;
use burn_cubecl::tensor::CubeTensor;

use super::{ConvGrads, ConvInputs, ConvOutputs};
use crate::cube::{
    DeviceTraits, address_type, buffer, contiguous, contiguous_f32, cube_dim, dims, elem, empty,
    fold_rows, grid, optional,
};

/// Units of a cube.
const UNITS: usize = 128;
/// Positions whose loads are in flight together.
const AHEAD: usize = 4;
/// Bounds of the positions in a tile: short ones read much twice, long ones leave the device idle.
const TILE: [usize; 2] = [16, 256];

/// Compile-time switches and sizes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct ConvConfig {
    /// K.
    width: usize,
    /// Positions of a tile, a multiple of [`AHEAD`].
    tile: usize,
    silu: bool,
    /// Whether a bias (and its gradient) exists.
    bias: bool,
    ptx: bool,
}

impl ConvConfig {
    /// Numbers that a channel leaves of each tile: those of dweight and, if wanted, dbias.
    const fn partials(&self) -> usize {
        self.width + self.bias as usize
    }
}

/// The sizes of the problem.
#[derive(Clone, Copy, Debug)]
struct ConvShape {
    batch: usize,
    length: usize,
    inner: usize,
}

impl ConvShape {
    fn of(inputs: &ConvInputs<CubeTensor>) -> Self {
        let [batch, length, inner] = dims(&inputs.x);
        Self {
            batch,
            length,
            inner,
        }
    }

    fn config(&self, inputs: &ConvInputs<CubeTensor>) -> ConvConfig {
        let device = DeviceTraits::of(&inputs.x);
        let [_, width] = dims(&inputs.weight);
        let elements = (self.batch * self.inner).saturating_mul(self.length);
        ConvConfig {
            width,
            tile: elements
                .div_ceil(device.busy_units)
                .next_power_of_two()
                .clamp(TILE[0], TILE[1]),
            silu: inputs.silu,
            bias: inputs.bias.is_some(),
            ptx: device.ptx,
        }
    }

    /// Cubes of a launch with one unit for each sequence, tile and channel.
    fn blocks(&self, config: &ConvConfig) -> usize {
        self.batch * self.length.div_ceil(config.tile) * self.inner.div_ceil(UNITS)
    }
}

/// See [`MambaKernels::causal_conv1d`](crate::MambaKernels::causal_conv1d).
pub(crate) fn forward(inputs: ConvInputs<CubeTensor>) -> ConvOutputs<CubeTensor> {
    let inputs = prepare(inputs);
    let shape = ConvShape::of(&inputs);
    let config = shape.config(&inputs);
    let ConvShape {
        batch,
        length,
        inner,
    } = shape;
    let y = empty(&inputs.x, [batch, length, inner], inputs.x.dtype);
    let last_window = empty(&inputs.x, [batch, inner, config.width - 1], DType::F32);
    // An empty buffer cannot be bound; nothing is written to its stand-in.
    let window = if config.width > 1 { &last_window } else { &y };
    // SAFETY: every position is derived from the shapes passed along, whose buffers are contiguous
    // and of just these sizes; units beyond the last channel or tile do nothing.
    unsafe {
        kernels::conv_forward::launch_unchecked(
            &inputs.x.client,
            grid(shape.blocks(&config)),
            cube_dim(UNITS),
            address_type(&[&inputs.x, &inputs.weight]),
            buffer(&inputs.x),
            buffer(&inputs.weight),
            optional(&inputs.bias),
            optional(&inputs.initial_window),
            optional(&inputs.resets),
            buffer(&y),
            buffer(window),
            batch,
            length,
            inner,
            config,
            elem(inputs.x.dtype),
        );
    }
    ConvOutputs { y, last_window }
}

/// See [`MambaKernels::causal_conv1d_backward`](crate::MambaKernels::causal_conv1d_backward).
pub(crate) fn backward(inputs: ConvInputs<CubeTensor>, dy: CubeTensor) -> ConvGrads<CubeTensor> {
    let inputs = prepare(inputs);
    let dy = contiguous(dy);
    let shape = ConvShape::of(&inputs);
    let config = shape.config(&inputs);
    let ConvShape {
        batch,
        length,
        inner,
    } = shape;
    let rows = batch * length.div_ceil(config.tile);
    let dx = empty(&inputs.x, [batch, length, inner], inputs.x.dtype);
    let sums = empty(&inputs.x, [rows, config.partials() * inner], DType::F32);
    let weight = empty(&inputs.x, [inner, config.width], DType::F32);
    let bias = empty(&inputs.x, [if config.bias { inner } else { 1 }], DType::F32);
    let address = address_type(&[&inputs.x, &sums]);
    // SAFETY: as in `forward`.
    unsafe {
        kernels::conv_backward::launch_unchecked(
            &inputs.x.client,
            grid(shape.blocks(&config)),
            cube_dim(UNITS),
            address,
            buffer(&inputs.x),
            buffer(&inputs.weight),
            optional(&inputs.bias),
            optional(&inputs.initial_window),
            optional(&inputs.resets),
            buffer(&dy),
            buffer(&dx),
            buffer(&sums),
            batch,
            length,
            inner,
            config,
            [elem(inputs.x.dtype), elem(dy.dtype)],
        );
    }
    let sums = fold_rows(sums);
    let [rows, _] = dims(&sums);
    // SAFETY: as in `forward`; units beyond the last number write nothing.
    unsafe {
        kernels::sum_tiles::launch_unchecked(
            &inputs.x.client,
            grid((config.partials() * inner).div_ceil(UNITS)),
            cube_dim(UNITS),
            address,
            buffer(&sums),
            buffer(&weight),
            buffer(&bias),
            rows,
            inner,
            config,
        );
    }
    ConvGrads {
        x: dx,
        weight,
        bias: inputs.bias.map(|_| bias),
    }
}

/// Contiguous inputs, parameters in f32; an empty window counts as absent.
fn prepare(inputs: ConvInputs<CubeTensor>) -> ConvInputs<CubeTensor> {
    let [_, width] = dims(&inputs.weight);
    ConvInputs {
        x: contiguous(inputs.x),
        weight: contiguous_f32(inputs.weight),
        bias: inputs.bias.map(contiguous_f32),
        initial_window: inputs
            .initial_window
            .filter(|_| width > 1)
            .map(contiguous_f32),
        resets: inputs.resets.map(contiguous_f32),
        silu: inputs.silu,
    }
}
