//! The kernels of a step and their launches.

use burn_cubecl::tensor::CubeTensor;
use cubecl::prelude::*;
use cubecl::server::Handle;

use super::plan::StepConfig;
use super::wide::{self, WideBuffers, WideConfig};
use super::{Buffers, Weights, phases};
use crate::cube::wide::One;
use crate::cube::words::Words;
use crate::cube::{address_type, buffer, cube_dim, grid, launches, word_buffer};
use crate::sampling::BYTES;
use crate::sampling::cube::{CHOICE, SETTINGS, choose, no_logit, note};

/// Units of a cube of the copy.
const UNITS: usize = 256;

/// Copies contiguous tensors of f32, all of one size, into a buffer of f32: tensor `i` to number
/// `i · stride` on. One launch takes as many as the device binds buffers for.
pub(super) fn copy(from: &[CubeTensor], to: &Handle, stride: usize) {
    let count = from[0].meta.num_elements();
    let end = (from.len() - 1) * stride + count;
    assert!(
        from.iter().all(|it| it.meta.num_elements() == count) && 4 * end as u64 <= to.size(),
        "decode: a copy beyond the buffer"
    );
    let cubes = count.div_ceil(UNITS);
    let mut first = 0;
    for some in launches(from, |_| (), &from[0], 1) {
        // SAFETY: all of it is inside the buffer, as checked; units beyond a tensor's last number do
        // nothing.
        unsafe {
            copy_numbers::launch_unchecked(
                &from[0].client,
                grid(some.len() * cubes),
                cube_dim(UNITS),
                AddressType::from_len(end),
                some.iter().map(buffer).collect(),
                BufferArg::from_raw_parts(to.clone(), end),
                first * stride,
                stride,
                count,
                cubes,
            );
        }
        first += some.len();
    }
}

/// Every tensor has so many `cubes`.
#[cube(launch_unchecked, address_type = "dynamic")]
fn copy_numbers(
    from: &Sequence<Box<[f32]>>,
    to: &mut [f32],
    first: usize,
    stride: usize,
    count: usize,
    cubes: usize,
) {
    let own = CUBE_POS / cubes;
    let at = CUBE_POS % cubes * CUBE_DIM as usize + UNIT_POS as usize;
    #[unroll]
    for i in 0..comptime!(from.len()) {
        if own == i && at < count {
            to[first + i * stride + at] = from.index(i)[at];
        }
    }
}

/// Launches all kernels of one step; whether a graph may replay them.
pub(super) fn launch(
    weights: &Weights,
    buffers: &Buffers,
    config: &StepConfig,
    wide: Option<&(WideConfig, WideBuffers)>,
) -> bool {
    let c = *config;
    let client = &weights.embedding.client;
    let batch = buffers.batch;
    let [words, out_words, rank_words] = c.words();
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
    let parts = batch * c.parts * c.low();
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
    if let Some((config, wide)) = wide {
        return wide::launch(weights, buffers, wide, config);
    }
    for layer in 0..weights.layers {
        // SAFETY: as above.
        unsafe {
            enter::launch_unchecked(
                client,
                grid(c.in_cubes()),
                dim,
                address,
                words,
                c.vector,
                all(&buffers.stream, batch * c.width),
                buffer(&weights.widths),
                buffer(&weights.channels),
                word_buffer(&weights.in_proj),
                word_buffer(&weights.x_proj),
                all(&buffers.window, past.max(1)),
                all(&buffers.u, channels),
                all(&buffers.z, channels),
                all(&buffers.parts, parts),
                layer,
                batch,
                weights.eps,
                c,
            );
            advance::launch_unchecked(
                client,
                grid(c.blocks() * batch),
                dim,
                address,
                rank_words,
                c.state_vector,
                all(&buffers.parts, parts),
                all(&buffers.u, channels),
                all(&buffers.z, channels),
                buffer(&weights.channels),
                word_buffer(&weights.dt_proj),
                buffer(&weights.rates),
                all(&buffers.h, states),
                all(&buffers.y, channels),
                layer,
                batch,
                c,
                c.low_vector,
            );
            leave::launch_unchecked(
                client,
                grid(c.out_cubes()),
                dim,
                address,
                out_words,
                c.out_vector,
                all(&buffers.y, channels),
                word_buffer(&weights.out_proj),
                buffer(&weights.widths),
                all(&buffers.stream, batch * c.width),
                layer,
                batch,
                c,
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
            words,
            c.vector,
            all(&buffers.stream, batch * c.width),
            buffer(&weights.norm_f),
            word_buffer(&weights.head),
            all(&buffers.logits, batch * c.rows),
            all(&buffers.position, 1),
            batch,
            weights.eps,
            c,
        );
    }
    true
}

/// The choice of every sequence's byte, and its row of the embedding: `stream` `[B, D]`.
#[cube(launch_unchecked, address_type = "dynamic")]
fn choose_and_embed(
    logits: &mut [f32],
    seen: &mut [f32],
    limits: &[f32],
    draws: &[f32],
    choices: &mut [f32],
    position: &[u32],
    embedding: &[f32],
    stream: &mut [One],
    batch: usize,
    #[comptime] c: StepConfig,
) {
    let sequence = CUBE_POS;
    if sequence >= batch {
        terminate!();
    }
    let step = usize::cast_from(position[0]);
    let unit = UNIT_POS as usize;
    let chooser = comptime!(c.chooser());
    let mut raw = no_logit();
    if unit < comptime!(chooser.bytes()) {
        raw = logits[sequence * comptime!(c.rows) + unit];
    }
    let byte = choose(raw, seen, limits, draws, step, sequence, batch, chooser);
    for i in 0..comptime!(c.width.div_ceil(c.units)) {
        let column = i * comptime!(c.units) + UNIT_POS as usize;
        if column < comptime!(c.width) {
            stream[sequence * comptime!(c.width) + column] =
                Vector::new(embedded(embedding, byte, column, c));
        }
    }
    note(raw, byte, choices, step, sequence, batch, chooser);
}

/// Column `column` of a byte's row of the embedding; a byte that the vocabulary does not have reads
/// its last row.
#[cube]
pub(super) fn embedded(
    embedding: &[f32],
    byte: usize,
    column: usize,
    #[comptime] c: StepConfig,
) -> f32 {
    embedding[min(byte * comptime!(c.width) + column, embedding.len() - 1)]
}

#[cube(launch_unchecked, address_type = "dynamic")]
fn enter<P: Size, V: Size>(
    stream: &mut [One],
    widths: &[One],
    channels: &[One],
    in_proj: &[Words<P>],
    x_proj: &[Words<Const<1>>],
    window: &mut [f32],
    u: &mut [f32],
    z: &mut [f32],
    parts: &mut [One],
    layer: usize,
    batch: usize,
    eps: f32,
    #[comptime] c: StepConfig,
) {
    let cube = CUBE_POS;
    if cube >= comptime!(c.in_cubes()) {
        terminate!();
    }
    let mut ahead = phases::no_enter::<P>(c);
    phases::load_enter(
        &mut ahead, widths, channels, in_proj, x_proj, window, layer, batch, cube, c,
    );
    phases::load_gates(&mut ahead, in_proj, layer, cube, c);
    phases::enter::<P, V>(
        &mut ahead, stream, channels, in_proj, window, u, z, parts, layer, batch, cube, eps, c,
    );
}

#[cube(launch_unchecked, address_type = "dynamic")]
fn advance<T: Size, S: Size, Q: Size>(
    parts: &mut [One],
    u: &mut [f32],
    z: &mut [f32],
    channels: &[One],
    dt_proj: &[Words<T>],
    rates: &[Vector<f32, S>],
    h: &mut [Vector<f32, S>],
    y: &mut [One],
    layer: usize,
    batch: usize,
    #[comptime] c: StepConfig,
    #[define(Q)] _size: usize,
) {
    let cube = CUBE_POS;
    if cube >= comptime!(c.blocks()) * batch {
        terminate!();
    }
    // Cubes are blocks of channels of a sequence, then sequences.
    let blocks = comptime!(c.blocks());
    let place = phases::place(cube / blocks, cube % blocks, c);
    let mut ahead = phases::no_advance::<T, S>(c);
    phases::load_advance(
        &mut ahead, channels, dt_proj, rates, h, layer, batch, &place, c,
    );
    phases::advance::<T, S, Q>(&ahead, parts, u, z, h, y, layer, batch, &place, c);
}

#[cube(launch_unchecked, address_type = "dynamic")]
fn leave<P: Size, V: Size>(
    y: &mut [One],
    out_proj: &[Words<P>],
    widths: &[One],
    stream: &mut [One],
    layer: usize,
    batch: usize,
    #[comptime] c: StepConfig,
) {
    let cube = CUBE_POS;
    if cube >= comptime!(c.out_cubes()) {
        terminate!();
    }
    let mut ahead = phases::no_leave::<P>(c);
    phases::load_leave(&mut ahead, out_proj, widths, layer, cube, c);
    phases::leave::<P, V>(&mut ahead, y, out_proj, stream, layer, batch, cube, c);
}

/// The logits; the step is over.
#[cube(launch_unchecked, address_type = "dynamic")]
fn head<P: Size, V: Size>(
    stream: &mut [One],
    norm: &[One],
    weights: &[Words<P>],
    logits: &mut [f32],
    position: &mut [u32],
    batch: usize,
    eps: f32,
    #[comptime] c: StepConfig,
) {
    let cube = CUBE_POS;
    if cube >= comptime!(c.head_cubes()) {
        terminate!();
    }
    phases::head::<P, V>(stream, norm, weights, logits, batch, cube, eps, c);
    if cube == 0 && UNIT_POS == 0 {
        position[0] += 1;
    }
}
