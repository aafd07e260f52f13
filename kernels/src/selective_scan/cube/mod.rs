//! The scan on a GPU.
//!
//! Everything is channel-last: neighbouring units work on neighbouring channels, so all loads of
//! activations are coalesced, and time runs sequentially in registers with no scan network.
//! A channel's N states are in one lane (up to 16) or spread over several lanes of a plane.
//!
//! Parallelism over time comes from cutting the positions into chunks ([`plan`]):
//!
//! 1. *Chunk ends*: every chunk from a zero state to its end, with the sum of its steps. The rates
//!    do not depend on time, so the chunk's whole decay is `exp(A · Σ steps)`.
//! 2. *Carry* over the chunks: what enters each of them. These states are all that backward needs.
//! 3. *Outputs*: every chunk again from its entering state.
//!
//! With enough channels one pass does all of it, for half the exponentials: half of a cube's units share
//! the states of its channels, the others do all that is not a state's ([`walk`]). With one chunk
//! (generation's L = 1), or very many channels that kernel does not fit, the third kernel alone walks
//! all positions.
//!
//! All ways leave the states that enter chunks for backward, and compute an output from them by the
//! same operations in the same order, so that backward can have forward's bits again; but for the one pass
//! where units have two states.
//!
//! Backward, in segments of chunks from the right (its transient memory is bounded):
//!
//! 1. *Adjoint ends*: one sweep left to right writes the states at every sub-chunk of 4 positions
//!    and the chunk's own adjoint at its left end, `Σ_t (Π_{s≤t} a_s) · C_t · dy_t`. All states of a
//!    channel are close by there, so it also computes the outputs again (with the bits of forward),
//!    which the gradient of the gate needs. Where it can, activations come through shared memory, copied
//!    ahead by the hardware ([`copies`]).
//! 2. *Carry* of the adjoints, right to left.
//! 3. *Main*: right to left over sub-chunks, whose states are recomputed into registers. dB and dC
//!    are summed over the cube's channels in shared memory, then over cubes by a small sum kernel;
//!    dA, dD and the gradient of the bias leave one partial a chunk.
//!
//! The other sweeps left to right have all of a channel in one unit and are bound by the
//! special-function unit and by registers; the main kernel is bound by its number of instructions,
//! and with registers for two planes a scheduler only, they hide little of each other's waiting.
//!
//! A reset clears the state: its decay is 0, and so is its chunk's whole decay. No atomics
//! anywhere: two runs give the same bits.

// In the kernel language an `if` on a compile-time value decides what is compiled: it cannot be
// merged with one on a run-time value. Integers have no `is_multiple_of` there.
#![allow(clippy::collapsible_if, clippy::manual_is_multiple_of)]

mod adjoint_ends;
mod adjoint_main;
mod adjoint_parts;
mod backward;
mod carry;
mod common;
mod copies;
mod forward;
pub(crate) mod plan;
mod sums;
#[cfg(test)]
mod tests;
mod walk;
mod walk_layout;
mod walk_servers;

use burn::tensor::DType;
use burn_cubecl::tensor::CubeTensor;
use cubecl::prelude::AddressType;

use self::plan::{Alignment, Chunks, Forward, ScanShape, SweepConfig, shares, sweep};
use self::walk_layout::{Layout, WalkConfig};
use super::{ScanInputs, ScanOutputs};
use crate::cube::{
    DeviceTraits, address_type, buffer, contiguous, contiguous_f32, cube_dim, elem, empty, grid,
    optional, rows, word_buffer,
};

pub(crate) use self::backward::backward;

/// Most units of a cube in forward: the more units, the fewer registers each of them has, and here
/// few registers and many units in flight are faster.
const FORWARD_UNITS: usize = 1024;
/// Units of a cube in the carry.
const CARRY_UNITS: usize = 128;

/// See [`MambaKernels::selective_scan`](crate::MambaKernels::selective_scan).
pub(crate) fn forward(inputs: ScanInputs<CubeTensor>) -> ScanOutputs<CubeTensor> {
    let (inputs, strides) = prepare(inputs);
    let shape = ScanShape::of(&inputs);
    let device = DeviceTraits::of(&inputs.u);
    let chunks = Chunks::new(&shape, &device);
    let alignment = alignment(&inputs, &strides, &shape, &[]);
    let ScanShape {
        batch,
        length,
        inner,
        state,
    } = shape;
    let results = Results {
        saved: empty(&inputs.u, [batch, chunks.count, state, inner], DType::F32),
        last_state: empty(&inputs.u, [batch, inner, state], DType::F32),
        y: empty(&inputs.u, [batch, length, inner], inputs.u.dtype),
    };
    let softplus = inputs.delta_softplus;
    let layout = shares(&shape, &device).filter(|_| in_words(&inputs, &strides, &shape));
    if let Some(layout) = layout {
        launch_walk(
            &inputs, &strides, &shape, &chunks, &device, layout, &results,
        );
    } else {
        let config = sweep(&shape, &chunks, &device, alignment, softplus, FORWARD_UNITS);
        if chunks.forward == Forward::Cut {
            launch_chunk_ends(&inputs, &strides, &shape, &chunks, &config, &results);
        }
        launch_outputs(&inputs, &strides, &shape, &chunks, &config, &results);
    }
    let Results {
        saved,
        last_state,
        y,
    } = results;
    ScanOutputs {
        y,
        last_state,
        saved,
    }
}

/// Elements from one position to the next of the inputs that may be columns of wider tensors.
#[derive(Clone, Copy, Debug)]
struct RowStrides {
    b: usize,
    c: usize,
    z: usize,
}

/// Contiguous inputs, but for columns of wider tensors; B and C of one data type, parameters in
/// f32.
fn prepare(inputs: ScanInputs<CubeTensor>) -> (ScanInputs<CubeTensor>, RowStrides) {
    let (mut b, mut c) = (inputs.b, inputs.c);
    if b.dtype != c.dtype {
        (b, c) = (contiguous_f32(b), contiguous_f32(c));
    }
    let ((b, b_stride), (c, c_stride)) = (rows(b), rows(c));
    let (z, z_stride) = inputs.z.map(rows).unzip();
    let strides = RowStrides {
        b: b_stride,
        c: c_stride,
        z: z_stride.unwrap_or(0),
    };
    let inputs = ScanInputs {
        u: contiguous(inputs.u),
        delta: contiguous(inputs.delta),
        a: contiguous_f32(inputs.a),
        b,
        c,
        d: inputs.d.map(contiguous_f32),
        z,
        delta_bias: inputs.delta_bias.map(contiguous_f32),
        initial_state: inputs.initial_state.map(contiguous_f32),
        resets: inputs.resets.map(contiguous_f32),
        delta_softplus: inputs.delta_softplus,
    };
    (inputs, strides)
}

/// The width of positions that reaches all of the inputs and `others`.
fn address(inputs: &ScanInputs<CubeTensor>, others: &[&CubeTensor]) -> AddressType {
    let z = inputs.z.as_ref().unwrap_or(&inputs.u);
    address_type(&[&inputs.u, &inputs.b, &inputs.c, z]).max(address_type(others))
}

/// Whether rows can be read `count` elements at once, which must begin at a multiple of their number.
fn aligned(tensor: &CubeTensor, stride: usize, count: usize) -> bool {
    let offset = tensor.handle.offset_start.unwrap_or(0) as usize;
    offset.is_multiple_of(count * tensor.dtype.size()) && stride.is_multiple_of(count)
}

/// How wide loads of the inputs and of `outputs` (rows of channels, like `z`) can be.
fn alignment(
    inputs: &ScanInputs<CubeTensor>,
    strides: &RowStrides,
    shape: &ScanShape,
    outputs: &[(&CubeTensor, usize)],
) -> Alignment {
    let wide = |count: &usize| {
        let rows = |tensor: &CubeTensor, stride: usize| aligned(tensor, stride, *count);
        shape.inner.is_multiple_of(*count)
            && [&inputs.u, &inputs.delta]
                .into_iter()
                .all(|tensor| rows(tensor, shape.inner))
            && inputs.z.as_ref().is_none_or(|z| rows(z, strides.z))
            && outputs.iter().all(|(tensor, stride)| rows(tensor, *stride))
    };
    let fours = shape.state.is_multiple_of(4)
        && aligned(&inputs.b, strides.b, 4)
        && aligned(&inputs.c, strides.c, 4);
    Alignment {
        channels: [4, 2].into_iter().find(wide).unwrap_or(1),
        states: if fours { 4 } else { 1 },
    }
}

/// Whether all activations are of one type of 16 bits, with rows for [`copies`].
fn in_eights(
    inputs: &ScanInputs<CubeTensor>,
    strides: &RowStrides,
    shape: &ScanShape,
    dy: &CubeTensor,
) -> bool {
    let rows = |tensor: &CubeTensor, stride: usize| {
        let same = tensor.dtype == inputs.u.dtype && tensor.dtype.size() == 2;
        same && aligned(tensor, stride, copies::WIDTH)
    };
    shape.inner.is_multiple_of(copies::WIDTH)
        && [&inputs.u, &inputs.delta, dy]
            .into_iter()
            .all(|tensor| rows(tensor, shape.inner))
        && inputs.z.as_ref().is_none_or(|z| rows(z, strides.z))
}

/// Whether the kernel of [`walk`] can read the inputs: as words, four channels and two states at once.
fn in_words(inputs: &ScanInputs<CubeTensor>, strides: &RowStrides, shape: &ScanShape) -> bool {
    let words = |tensor: &CubeTensor, stride: usize, count: usize| {
        let whole = matches!(tensor.dtype, DType::F32 | DType::Flex32 | DType::BF16);
        whole && aligned(tensor, stride, count)
    };
    words(&inputs.u, shape.inner, 4)
        && words(&inputs.delta, shape.inner, 4)
        && words(&inputs.b, strides.b, 2)
        && words(&inputs.c, strides.c, 2)
        && inputs.z.as_ref().is_none_or(|z| words(z, strides.z, 4))
}

/// What forward fills.
struct Results {
    /// The state entering every chunk, `[B, chunks, N, E]`.
    saved: CubeTensor,
    /// `[B, E, N]`.
    last_state: CubeTensor,
    /// `[B, L, E]`.
    y: CubeTensor,
}

/// Fills `saved` and `last_state`.
fn launch_chunk_ends(
    inputs: &ScanInputs<CubeTensor>,
    strides: &RowStrides,
    shape: &ScanShape,
    chunks: &Chunks,
    config: &SweepConfig,
    results: &Results,
) {
    let Results {
        saved, last_state, ..
    } = results;
    let client = &inputs.u.client;
    let steps = empty(
        &inputs.u,
        [shape.batch, chunks.count, shape.inner],
        DType::F32,
    );
    let blocks = config.cubes(shape.inner) * chunks.count * shape.batch;
    let address = address(inputs, &[saved]);
    // SAFETY: every position is derived from the shapes passed along, whose buffers are of just
    // these sizes and strides; units beyond the last channel or cube write nothing.
    unsafe {
        forward::chunk_ends::launch_unchecked(
            client,
            grid(blocks),
            cube_dim(config.units),
            address,
            config.source,
            buffer(&inputs.u),
            buffer(&inputs.delta),
            buffer(&inputs.b),
            buffer(&inputs.a),
            optional(&inputs.delta_bias),
            optional(&inputs.resets),
            buffer(saved),
            buffer(&steps),
            shape.batch,
            shape.length,
            shape.inner,
            shape.state,
            strides.b,
            *config,
            [
                elem(inputs.u.dtype),
                elem(inputs.delta.dtype),
                elem(inputs.b.dtype),
            ],
        );
    }
    let rows = shape.batch * shape.state * shape.inner;
    // SAFETY: as above; units beyond the last state write nothing.
    unsafe {
        carry::carry::launch_unchecked(
            client,
            grid(rows.div_ceil(CARRY_UNITS)),
            cube_dim(CARRY_UNITS),
            address,
            buffer(saved),
            buffer(&steps),
            buffer(&inputs.a),
            optional(&inputs.initial_state),
            buffer(last_state),
            shape.batch,
            chunks.count,
            shape.inner,
            shape.state,
            false,
            config.ptx,
        );
    }
}

/// Fills `y`; where time is not cut, `saved` and `last_state` too.
fn launch_outputs(
    inputs: &ScanInputs<CubeTensor>,
    strides: &RowStrides,
    shape: &ScanShape,
    chunks: &Chunks,
    config: &SweepConfig,
    results: &Results,
) {
    let client = &inputs.u.client;
    let blocks = grid(config.cubes(shape.inner) * chunks.parts() * shape.batch);
    let units = cube_dim(config.units);
    let address = address(inputs, &[&results.saved]);
    let z_dtype = inputs.z.as_ref().map_or(inputs.u.dtype, |z| z.dtype);
    let types = [
        elem(inputs.u.dtype),
        elem(inputs.delta.dtype),
        elem(inputs.b.dtype),
        elem(z_dtype),
    ];
    // SAFETY: every position is derived from the shapes passed along, whose buffers are of just
    // these sizes and strides; units beyond the last channel or cube write nothing.
    unsafe {
        forward::outputs::launch_unchecked(
            client,
            blocks,
            units,
            address,
            config.source,
            buffer(&inputs.u),
            buffer(&inputs.delta),
            buffer(&inputs.b),
            buffer(&inputs.c),
            buffer(&inputs.a),
            optional(&inputs.d),
            optional(&inputs.z),
            optional(&inputs.delta_bias),
            optional(&inputs.initial_state),
            optional(&inputs.resets),
            buffer(&results.saved),
            buffer(&results.last_state),
            buffer(&results.y),
            shape.batch,
            shape.length,
            shape.inner,
            shape.state,
            strides.b,
            strides.c,
            strides.z,
            chunks.forward != Forward::Cut,
            *config,
            types,
        );
    }
}

/// Fills `y`, `saved` and `last_state`, units sharing states.
fn launch_walk(
    inputs: &ScanInputs<CubeTensor>,
    strides: &RowStrides,
    shape: &ScanShape,
    chunks: &Chunks,
    device: &DeviceTraits,
    layout: Layout,
    results: &Results,
) {
    let z = inputs.z.as_ref().unwrap_or(&inputs.u);
    let config = WalkConfig {
        layout,
        chunk: chunks.size,
        halves: [&inputs.u, &inputs.delta, &inputs.b, z].map(|it| it.dtype.size() == 2),
        whole: shape.length.is_multiple_of(2 * layout.tile()),
        softplus: inputs.delta_softplus,
        ptx: device.ptx,
    };
    let [u_words, delta_words, bc_words, z_words] = config.words();
    // SAFETY: every position is derived from the shapes passed along, whose buffers are of just
    // these sizes and strides, in whole vectors; units beyond the last channel or sequence write nothing.
    unsafe {
        walk::walk::launch_unchecked(
            &inputs.u.client,
            grid(shape.batch * shape.inner.div_ceil(layout.channels())),
            cube_dim(2 * layout.half),
            address(inputs, &[&results.saved]),
            u_words,
            delta_words,
            bc_words,
            z_words,
            word_buffer(&inputs.u),
            word_buffer(&inputs.delta),
            word_buffer(&inputs.b),
            word_buffer(&inputs.c),
            buffer(&inputs.a),
            optional(&inputs.d),
            inputs.z.as_ref().map(word_buffer).into(),
            optional(&inputs.delta_bias),
            optional(&inputs.initial_state),
            optional(&inputs.resets),
            buffer(&results.saved),
            buffer(&results.last_state),
            buffer(&results.y),
            shape.batch,
            shape.length,
            shape.inner,
            strides.b / 2,
            strides.c / 2,
            strides.z / 4,
            config,
            elem(inputs.u.dtype),
        );
    }
}
