//! All steps of a piece in one kernel, for few sequences.
//!
//! With few sequences a phase takes two microseconds, as long as it takes to get from one kernel to
//! the next. So here the cubes stay: each has its part of every phase, and between phases they wait
//! for each other at a counter in memory. What a phase knows ahead (weights, states) is loaded
//! before the wait, a phase or two early, so that reading the weights goes on all the time.
//!
//! The cubes must run at the same time: there are no more than the device has processors, each
//! taking no more than a processor has. The arithmetic is that of the kernels of [`steps`](super::steps),
//! in the same order: the results have the same bits.

use burn_cubecl::tensor::CubeTensor;
use cubecl::ir::ElemType;
use cubecl::prelude::*;
use cubecl::server::Handle;

use super::phases::{
    One, advance, enter, head, leave, load_advance, load_enter, load_leave, no_advance, no_enter,
    no_leave,
};
use super::plan::StepConfig;
use super::steps::next_byte;
use super::{AHEAD, Buffers, Weights};
use crate::cube::{address_type, buffer, cube_dim, elem};
use crate::sampling::BYTES;
use crate::sampling::cube::{CHOICE, SETTINGS};

/// Runs `steps` steps on `cubes` cubes. `buffers.arrivals` is zero.
pub(super) fn launch(
    weights: &Weights,
    buffers: &Buffers,
    config: &StepConfig,
    steps: usize,
    cubes: usize,
) {
    let c = *config;
    let batch = buffers.batch;
    assert!(c.fits_at_once(cubes, batch), "decode: too few cubes");
    let channels = batch * c.inner;
    let draws = AHEAD * batch;
    let past = weights.layers * channels * (c.taps - 1);
    let all = |handle: &Handle, count: usize| {
        // SAFETY: `count` is the size that the buffer's field documents.
        unsafe { BufferArg::from_raw_parts(handle.clone(), count) }
    };
    let of = |tensor: &CubeTensor| buffer(tensor);
    // SAFETY: the kernel indexes every buffer within the size its field documents; `cubes` is a number
    // that the device runs at the same time, and each phase has no more pieces than that.
    unsafe {
        run_steps::launch_unchecked(
            &weights.embedding.client,
            CubeCount::Static(cubes as u32, 1, 1),
            cube_dim(c.units),
            address_type(&[&weights.in_proj, &weights.rates]),
            c.vector,
            c.rank_vector,
            c.state_vector,
            all(&buffers.logits, batch * c.rows),
            all(&buffers.seen, batch * BYTES),
            all(&buffers.settings, batch * SETTINGS),
            all(&buffers.draws, draws),
            all(&buffers.choices, draws * CHOICE),
            all(&buffers.arrivals, 1),
            of(&weights.embedding),
            all(&buffers.stream, batch * c.width),
            of(&weights.widths),
            of(&weights.widths),
            of(&weights.channels),
            of(&weights.in_proj),
            of(&weights.x_proj),
            of(&weights.dt_proj),
            of(&weights.rates),
            of(&weights.out_proj),
            of(&weights.norm_f),
            of(&weights.head),
            all(&buffers.window, past.max(1)),
            all(&buffers.u, channels),
            all(&buffers.z, channels),
            all(&buffers.parts, batch * c.parts * c.low()),
            all(&buffers.h, weights.layers * channels * c.states),
            all(&buffers.y, channels),
            steps,
            weights.layers,
            batch,
            weights.eps,
            cubes as u32,
            c,
            elem(weights.in_proj.dtype),
            c.low_vector,
        );
    }
}

/// Orders the memory accesses of a unit, and of those it has synchronised with, before and after.
#[cube]
fn fence() {
    gpu_asm!("fence.acq_rel.gpu;");
}

/// Waits until all cubes have arrived `target` times together; what they wrote before is then there
/// for all.
#[cube]
fn meet(arrivals: &[Atomic<u32>], target: u32, #[comptime] ptx: bool) {
    if ptx {
        // One unit's fences stand for those of its cube; the others' loads ahead go on meanwhile.
        sync_cube();
        if UNIT_POS == 0 {
            fence();
            arrivals[0].fetch_add(1u32);
            while arrivals[0].load() < target {}
            fence();
        }
        sync_cube();
    } else {
        sync_storage();
        if UNIT_POS == 0 {
            arrivals[0].fetch_add(1u32);
            while arrivals[0].load() < target {}
        }
        sync_storage();
    }
}

/// See the module's documentation; buffers are those of the phases.
#[cube(launch_unchecked, address_type = "dynamic")]
fn run_steps<W: Float, V: Size, T: Size, S: Size, Q: Size>(
    logits: &mut [f32],
    seen: &mut [f32],
    limits: &[f32],
    draws: &[f32],
    choices: &mut [f32],
    arrivals: &[Atomic<u32>],
    embedding: &[f32],
    stream: &mut [One],
    widths: &[Vector<f32, V>],
    width_numbers: &[f32],
    channels: &[f32],
    in_proj: &[Vector<W, V>],
    x_proj: &[W],
    dt_proj: &[Vector<W, T>],
    rates: &[Vector<f32, S>],
    out_proj: &[Vector<W, V>],
    norm_f: &[Vector<f32, V>],
    head_weights: &[Vector<W, V>],
    window: &mut [f32],
    u: &mut [f32],
    z: &mut [f32],
    parts: &mut [One],
    h: &mut [Vector<f32, S>],
    y: &mut [One],
    steps: usize,
    layers: usize,
    batch: usize,
    eps: f32,
    cubes: u32,
    #[comptime] c: StepConfig,
    #[define(W)] _type: ElemType,
    #[define(Q)] _size: usize,
) {
    let cube = CUBE_POS;
    let mut target = 0u32;
    let mut entering = no_enter::<W, V>(c);
    let mut advancing = no_advance::<W, T, S>(c);
    let mut leaving = no_leave::<W, V>(c);
    load_enter(&mut entering, in_proj, x_proj, 0usize.runtime(), cube, c);
    for step in 0..steps {
        if cube < batch {
            next_byte(
                logits, seen, limits, draws, choices, embedding, stream, step, cube, batch, c,
            );
        }
        target += cubes;
        meet(arrivals, target, c.ptx);
        for layer in 0..layers {
            if cube < comptime!(c.in_cubes()) {
                enter(
                    &mut entering,
                    stream,
                    widths,
                    channels,
                    in_proj,
                    window,
                    u,
                    z,
                    parts,
                    layer,
                    batch,
                    cube,
                    eps,
                    c,
                );
            }
            load_advance(
                &mut advancing,
                channels,
                dt_proj,
                rates,
                h,
                layer,
                batch,
                min(cube, comptime!(c.blocks()) * batch - 1),
                c,
            );
            load_leave(&mut leaving, out_proj, layer, cube, c);
            target += cubes;
            meet(arrivals, target, c.ptx);
            if cube < comptime!(c.blocks()) * batch {
                advance::<W, f32, T, S, Q>(&advancing, parts, u, z, h, y, layer, batch, cube, c);
            }
            load_enter(
                &mut entering,
                in_proj,
                x_proj,
                (layer + 1) % layers,
                cube,
                c,
            );
            target += cubes;
            meet(arrivals, target, c.ptx);
            if cube < comptime!(c.out_cubes()) {
                leave(
                    &mut leaving,
                    y,
                    out_proj,
                    width_numbers,
                    stream,
                    layer,
                    batch,
                    cube,
                    c,
                );
            }
            target += cubes;
            meet(arrivals, target, c.ptx);
        }
        if cube < comptime!(c.head_cubes()) {
            head(stream, norm_f, head_weights, logits, batch, cube, eps, c);
        }
        target += cubes;
        meet(arrivals, target, c.ptx);
    }
}
