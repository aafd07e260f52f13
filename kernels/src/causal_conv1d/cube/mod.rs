//! The convolution on a GPU.
//!
//! A unit owns a few neighbouring channels (one vector) of one tile of positions and walks it left to
//! right, the last K inputs in registers: neighbouring units are neighbouring vectors, so loads and
//! stores are coalesced, and an input is read once a tile (the K - 1 before the tile twice).
//!
//! Backward walks the same way and recomputes the pre-activation instead of saving it. It runs
//! K - 1 positions past its tile, where the tile's last inputs still have a say. The gradients of
//! weight and bias leave one partial a tile, added up by a small sum kernel: no atomics.

// In the kernel language an `if` on a compile-time value decides what is compiled: it cannot be
// merged with one on a run-time value.
#![allow(clippy::collapsible_if)]

mod backward;
mod common;
mod forward;
#[cfg(test)]
mod tests;

use burn::tensor::DType;
use burn_cubecl::tensor::CubeTensor;

use super::{ConvGrads, ConvInputs, ConvOutputs};
use crate::cube::{
    DeviceTraits, address_type, buffer, contiguous_f32, cube_dim, dims, elem, empty, fold_rows,
    grid, optional, row_stride, rows, vector_width,
};

/// Units of a cube.
const UNITS: usize = 128;
/// Units of a cube backward, where a row fills such cubes and the problem the device.
///
/// An NVIDIA multiprocessor has 128 registers for each of so many units, with which backward does
/// well: the compiler, which would rather take more, has to keep to them where a cube is that large.
const MANY_UNITS: usize = 512;
/// Positions whose loads are in flight together.
const AHEAD: usize = 8;
/// Most channels of a unit, and most bytes of them backward: wide loads against registers.
const CHANNELS: usize = 4;
const BACKWARD_BYTES: usize = 8;
/// The share of the units that keep a device busy which its registers have room for, forward and
/// backward (one half). With more, the last cubes would begin when the others are done.
const SHARE: [usize; 2] = [1, 2];
/// Bounds of the positions in a tile: short ones read much twice, long ones leave the device idle.
const TILE: [usize; 2] = [16, 256];

/// Compile-time switches and sizes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct ConvConfig {
    /// K.
    width: usize,
    /// Positions of a tile, a multiple of [`AHEAD`].
    tile: usize,
    /// Channels of a unit.
    channels: usize,
    /// Units of a cube.
    units: usize,
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

    /// `pass` is 0 forward, 1 backward.
    fn config(&self, inputs: &ConvInputs<CubeTensor>, channels: usize, pass: usize) -> ConvConfig {
        let device = DeviceTraits::of(&inputs.x);
        let [_, width] = dims(&inputs.weight);
        let elements = (self.batch * self.inner).saturating_mul(self.length);
        let tile = elements
            .div_ceil(device.busy_units / SHARE[pass] * channels)
            .next_power_of_two();
        let many = pass == 1
            && tile >= TILE[0]
            && (self.inner / channels).is_multiple_of(MANY_UNITS)
            && device.max_units >= MANY_UNITS;
        ConvConfig {
            width,
            tile: tile.clamp(TILE[0], TILE[1]),
            channels,
            units: if many { MANY_UNITS } else { UNITS },
            silu: inputs.silu,
            bias: inputs.bias.is_some(),
            ptx: device.ptx,
        }
    }

    /// Vectors of a row.
    fn vectors(&self, config: &ConvConfig) -> usize {
        self.inner / config.channels
    }

    /// Cubes of a launch with one unit for each sequence, tile and vector.
    fn blocks(&self, config: &ConvConfig) -> usize {
        self.batch * self.length.div_ceil(config.tile) * self.vectors(config).div_ceil(config.units)
    }
}

/// See [`MambaKernels::causal_conv1d`](crate::MambaKernels::causal_conv1d).
pub(crate) fn forward(inputs: ConvInputs<CubeTensor>) -> ConvOutputs<CubeTensor> {
    let (inputs, x_stride) = prepare(inputs);
    let shape = ConvShape::of(&inputs);
    let ConvShape {
        batch,
        length,
        inner,
    } = shape;
    let channels = vector_width(CHANNELS, inner, &[(&inputs.x, x_stride)]);
    let config = shape.config(&inputs, channels, 0);
    let y = empty(&inputs.x, [batch, length, inner], inputs.x.dtype);
    let last_window = empty(&inputs.x, [batch, inner, config.width - 1], DType::F32);
    // An empty buffer cannot be bound; nothing is written to its stand-in.
    let window = if config.width > 1 { &last_window } else { &y };
    // SAFETY: every position is derived from the shapes and strides passed along, which are those
    // of the buffers; units beyond the last vector or tile do nothing.
    unsafe {
        forward::conv_forward::launch_unchecked(
            &inputs.x.client,
            grid(shape.blocks(&config)),
            cube_dim(config.units),
            address_type(&[&inputs.x, &inputs.weight]),
            channels,
            buffer(&inputs.x),
            buffer(&inputs.weight),
            optional(&inputs.bias),
            optional(&inputs.initial_window),
            optional(&inputs.resets),
            buffer(&y),
            buffer(window),
            batch,
            length,
            shape.vectors(&config),
            x_stride / channels,
            config,
            elem(inputs.x.dtype),
        );
    }
    ConvOutputs { y, last_window }
}

/// See [`MambaKernels::causal_conv1d_backward`](crate::MambaKernels::causal_conv1d_backward).
pub(crate) fn backward(
    inputs: ConvInputs<CubeTensor>,
    dy: CubeTensor,
    dx_into: Option<CubeTensor>,
) -> ConvGrads<CubeTensor> {
    let (inputs, x_stride) = prepare(inputs);
    let (dy, dy_stride) = rows(dy);
    let shape = ConvShape::of(&inputs);
    let ConvShape {
        batch,
        length,
        inner,
    } = shape;
    let (dx, dx_stride) = gradient_rows(&inputs.x, dx_into);
    let views = [(&inputs.x, x_stride), (&dy, dy_stride), (&dx, dx_stride)];
    let most = BACKWARD_BYTES / inputs.x.dtype.size();
    let channels = vector_width(most, inner, &views);
    let config = shape.config(&inputs, channels, 1);
    let tiles = batch * length.div_ceil(config.tile);
    let sums = empty(&inputs.x, [tiles, config.partials() * inner], DType::F32);
    // SAFETY: as in `forward`.
    unsafe {
        backward::conv_backward::launch_unchecked(
            &inputs.x.client,
            grid(shape.blocks(&config)),
            cube_dim(config.units),
            address_type(&[&inputs.x, &dy, &dx, &sums]),
            channels,
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
            shape.vectors(&config),
            x_stride / channels,
            dy_stride / channels,
            dx_stride / channels,
            config,
            [elem(inputs.x.dtype), elem(dy.dtype)],
        );
    }
    let (weight, bias) = parameter_gradients(sums, inner, &config);
    ConvGrads {
        x: dx,
        weight,
        bias: inputs.bias.map(|_| bias),
    }
}

/// Where the gradient of `x` goes, and the stride of its rows.
fn gradient_rows(x: &CubeTensor, into: Option<CubeTensor>) -> (CubeTensor, usize) {
    let shape: [usize; 3] = dims(x);
    let Some(into) = into else {
        return (empty(x, shape, x.dtype), shape[2]);
    };
    assert_eq!(
        (dims::<3>(&into), into.dtype),
        (shape, x.dtype),
        "causal_conv1d_backward: shape and data type of dx_into"
    );
    let stride = row_stride(&into)
        .expect("causal_conv1d_backward: the rows of dx_into must be a uniform stride apart");
    (into, stride)
}

/// dweight `[E, K]` and dbias `[E]` (a stand-in without bias) from the partials of the tiles.
fn parameter_gradients(
    sums: CubeTensor,
    inner: usize,
    config: &ConvConfig,
) -> (CubeTensor, CubeTensor) {
    let sums = fold_rows(sums);
    let [rows, _] = dims(&sums);
    let weight = empty(&sums, [inner, config.width], DType::F32);
    let bias = empty(&sums, [if config.bias { inner } else { 1 }], DType::F32);
    // SAFETY: every position is derived from the shapes passed along, which are those of the
    // buffers; units beyond the last number write nothing.
    unsafe {
        backward::sum_tiles::launch_unchecked(
            &sums.client,
            grid((config.partials() * inner).div_ceil(UNITS)),
            cube_dim(UNITS),
            address_type(&[&sums]),
            buffer(&sums),
            buffer(&weight),
            buffer(&bias),
            rows,
            inner,
            *config,
        );
    }
    (weight, bias)
}

/// `x` as rows, with their stride; the rest contiguous, in f32. An empty window counts as absent.
fn prepare(inputs: ConvInputs<CubeTensor>) -> (ConvInputs<CubeTensor>, usize) {
    let [_, width] = dims(&inputs.weight);
    let (x, stride) = rows(inputs.x);
    let inputs = ConvInputs {
        x,
        weight: contiguous_f32(inputs.weight),
        bias: inputs.bias.map(contiguous_f32),
        initial_window: inputs
            .initial_window
            .filter(|_| width > 1)
            .map(contiguous_f32),
        resets: inputs.resets.map(contiguous_f32),
        silu: inputs.silu,
    };
    (inputs, stride)
}
