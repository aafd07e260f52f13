//! The kernels of a step and their launches.

use burn_cubecl::tensor::CubeTensor;
use cubecl::ir::ElemType;
use cubecl::prelude::*;
use cubecl::server::Handle;

use super::plan::StepConfig;
use super::{Buffers, Weights, phases};
use crate::cube::{address_type, buffer, cube_dim, elem, grid};
use crate::sampling::BYTES;
use crate::sampling::cube::{CHOICE, SETTINGS, choose};

/// Units of a cube of the copy.
const UNITS: usize = 256;

/// Copies a tensor of f32 to the beginning of a buffer.
pub(super) fn copy(from: &CubeTensor, to: &Handle) {
    let count = from.meta.num_elements();
    // SAFETY: both have `count` numbers; units beyond the last do nothing.
    unsafe {
        copy_numbers::launch_unchecked(
            &from.client,
            grid(count.div_ceil(UNITS)),
            cube_dim(UNITS),
            address_type(&[from]),
            buffer(from),
            BufferArg::from_raw_parts(to.clone(), count),
            count,
        );
    }
}

#[cube(launch_unchecked, address_type = "dynamic")]
fn copy_numbers(from: &[f32], to: &mut [f32], count: usize) {
    let at = CUBE_POS * CUBE_DIM as usize + UNIT_POS as usize;
    if at < count {
        to[at] = from[at];
    }
}

/// Launches all kernels of one step.
pub(super) fn launch(weights: &Weights, buffers: &Buffers, config: &StepConfig) {
    let c = *config;
    let client = &weights.embedding.client;
    let batch = buffers.batch;
    let dtype = elem(weights.in_proj.dtype);
    let dim = cube_dim(c.units);
    let address = address_type(&[&weights.in_proj, &weights.rates]);
    // SAFETY: every buffer has the size its field documents, which is what the kernels index by
    // `config` and `batch`; cubes beyond the last do nothing.
    let all =
        |handle: &Handle, count: usize| unsafe { BufferArg::from_raw_parts(handle.clone(), count) };
    let channels = batch * c.inner;
    let states = weights.layers * channels * c.states;
    let past = weights.layers * channels * (c.taps - 1);
    let draws = super::AHEAD * batch;
    let parts = batch * c.parts() * c.low();
    // SAFETY: as above.
    unsafe {
        choose_and_embed::launch_unchecked(
            client,
            grid(batch),
            dim,
            address,
            all(&buffers.logits, batch * c.rows),
            all(&buffers.seen, batch * BYTES),
            all(&buffers.settings, batch * SETTINGS),
            all(&buffers.draws, draws),
            all(&buffers.choices, draws * CHOICE),
            all(&buffers.position, 1),
            buffer(&weights.embedding),
            all(&buffers.stream, batch * c.width),
            batch,
            c,
        );
    }
    for layer in 0..weights.layers {
        // SAFETY: as above.
        unsafe {
            enter::launch_unchecked(
                client,
                grid(c.parts()),
                dim,
                address,
                c.vector,
                all(&buffers.stream, batch * c.width),
                buffer(&weights.widths),
                buffer(&weights.channels),
                buffer(&weights.in_proj),
                buffer(&weights.x_proj),
                all(&buffers.window, past.max(1)),
                all(&buffers.u, channels),
                all(&buffers.z, channels),
                all(&buffers.parts, parts),
                layer,
                batch,
                weights.eps,
                c,
                dtype,
            );
            advance::launch_unchecked(
                client,
                grid(c.blocks() * batch),
                dim,
                address,
                c.rank_vector,
                c.state_vector,
                c.low_vector,
                all(&buffers.parts, parts),
                all(&buffers.u, channels),
                all(&buffers.z, channels),
                buffer(&weights.channels),
                buffer(&weights.dt_proj),
                buffer(&weights.rates),
                all(&buffers.h, states),
                all(&buffers.y, channels),
                layer,
                batch,
                c,
                dtype,
            );
            leave::launch_unchecked(
                client,
                grid(c.out_cubes()),
                dim,
                address,
                c.vector,
                all(&buffers.y, channels),
                buffer(&weights.out_proj),
                buffer(&weights.widths),
                all(&buffers.stream, batch * c.width),
                layer,
                batch,
                c,
                dtype,
            );
        }
    }
    // SAFETY: as above.
    unsafe {
        head::launch_unchecked(
            client,
            grid(c.head_cubes()),
            dim,
            address,
            c.vector,
            all(&buffers.stream, batch * c.width),
            buffer(&weights.norm_f),
            buffer(&weights.head),
            all(&buffers.logits, batch * c.rows),
            all(&buffers.position, 1),
            batch,
            weights.eps,
            c,
            dtype,
        );
    }
}

/// The choice of every sequence's byte, and its row of the embedding: `stream` `[B, D]`.
#[cube(launch_unchecked, address_type = "dynamic")]
fn choose_and_embed(
    logits: &[f32],
    seen: &mut [f32],
    limits: &[f32],
    draws: &[f32],
    choices: &mut [f32],
    position: &[u32],
    embedding: &[f32],
    stream: &mut [f32],
    batch: usize,
    #[comptime] c: StepConfig,
) {
    let sequence = CUBE_POS;
    if sequence >= batch {
        terminate!();
    }
    let step = usize::cast_from(position[0]);
    let byte = choose(
        logits, seen, limits, draws, choices, step, sequence, batch, c.rows, c.units, c.plane,
    );
    for i in 0..comptime!(c.width.div_ceil(c.units)) {
        let column = i * comptime!(c.units) + UNIT_POS as usize;
        if column < comptime!(c.width) {
            stream[sequence * comptime!(c.width) + column] =
                embedding[byte * comptime!(c.width) + column];
        }
    }
}

#[cube(launch_unchecked, address_type = "dynamic")]
fn enter<W: Float, V: Size>(
    stream: &[Vector<f32, V>],
    widths: &[Vector<f32, V>],
    channels: &[f32],
    in_proj: &[Vector<W, V>],
    x_proj: &[W],
    window: &mut [f32],
    u: &mut [f32],
    z: &mut [f32],
    parts: &mut [f32],
    layer: usize,
    batch: usize,
    eps: f32,
    #[comptime] c: StepConfig,
    #[define(W)] _type: ElemType,
) {
    let cube = CUBE_POS;
    if cube >= comptime!(c.parts()) {
        terminate!();
    }
    phases::enter(
        stream, widths, channels, in_proj, x_proj, window, u, z, parts, layer, batch, cube, eps, c,
    );
}

#[cube(launch_unchecked, address_type = "dynamic")]
fn advance<W: Float, T: Size, S: Size, Q: Size>(
    parts: &[Vector<f32, Q>],
    u: &[f32],
    z: &[f32],
    channels: &[f32],
    dt_proj: &[Vector<W, T>],
    rates: &[Vector<f32, S>],
    h: &mut [Vector<f32, S>],
    y: &mut [f32],
    layer: usize,
    batch: usize,
    #[comptime] c: StepConfig,
    #[define(W)] _type: ElemType,
) {
    let cube = CUBE_POS;
    if cube >= comptime!(c.blocks()) * batch {
        terminate!();
    }
    phases::advance(
        parts, u, z, channels, dt_proj, rates, h, y, layer, batch, cube, c,
    );
}

#[cube(launch_unchecked, address_type = "dynamic")]
fn leave<W: Float, V: Size>(
    y: &[Vector<f32, V>],
    out_proj: &[Vector<W, V>],
    widths: &[f32],
    stream: &mut [f32],
    layer: usize,
    batch: usize,
    #[comptime] c: StepConfig,
    #[define(W)] _type: ElemType,
) {
    let cube = CUBE_POS;
    if cube >= comptime!(c.out_cubes()) {
        terminate!();
    }
    phases::leave(y, out_proj, widths, stream, layer, batch, cube, c);
}

/// The logits; the step is over.
#[cube(launch_unchecked, address_type = "dynamic")]
fn head<W: Float, V: Size>(
    stream: &[Vector<f32, V>],
    norm: &[Vector<f32, V>],
    weights: &[Vector<W, V>],
    logits: &mut [f32],
    position: &mut [u32],
    batch: usize,
    eps: f32,
    #[comptime] c: StepConfig,
    #[define(W)] _type: ElemType,
) {
    let cube = CUBE_POS;
    if cube >= comptime!(c.head_cubes()) {
        terminate!();
    }
    phases::head(stream, norm, weights, logits, batch, cube, eps, c);
    if cube == 0 && UNIT_POS == 0 {
        position[0] += 1;
    }
}
