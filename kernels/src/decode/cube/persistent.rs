//! All steps of a piece in one kernel, for few sequences.
//!
//! With few sequences a phase takes two microseconds, as long as it takes to get from one kernel to
//! the next. So here the cubes stay: each has its part of every phase, and between phases they wait
//! for each other at a counter in memory. What a phase knows ahead (weights, states) is loaded between
//! arriving and waiting, a phase or two early, so that reading the weights goes on all the time.
//!
//! The cubes must run at the same time: there are no more than the device has processors, each
//! taking no more than a processor has. The arithmetic is that of the kernels of [`steps`](super::steps),
//! in the same order: the results have the same bits.

use burn_cubecl::tensor::CubeTensor;
use cubecl::prelude::*;
use cubecl::server::Handle;

use super::phases::{
    advance, enter, head, leave, load_advance, load_enter, load_leave, no_advance, no_enter,
    no_leave,
};
use super::plan::StepConfig;
use super::steps::next_byte;
use super::{AHEAD, Buffers, Weights};
use crate::cube::wide::One;
use crate::cube::words::Words;
use crate::cube::{address_type, buffer, cube_dim, word_buffer};
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
    let [words, rank_words] = c.words();
    // SAFETY: the kernel indexes every buffer within the size its field documents; `cubes` is a number
    // that the device runs at the same time, and each phase has no more pieces than that.
    unsafe {
        run_steps::launch_unchecked(
            &weights.embedding.client,
            CubeCount::Static(cubes as u32, 1, 1),
            cube_dim(c.units),
            address_type(&[&weights.in_proj, &weights.rates]),
            words,
            c.vector,
            rank_words,
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
            of(&weights.channels),
            word_buffer(&weights.in_proj),
            word_buffer(&weights.x_proj),
            word_buffer(&weights.dt_proj),
            of(&weights.rates),
            word_buffer(&weights.out_proj),
            of(&weights.norm_f),
            word_buffer(&weights.head),
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
            c.low_vector,
        );
    }
}

/// Arrives: what this unit, and those it has synchronised with, wrote before is there for all who
/// see it.
#[cube]
fn arrive(arrivals: &[Atomic<u32>]) {
    let place = arrivals.as_ptr();
    gpu_asm!("red.release.gpu.global.add.u32 [{}], {};", in(_) place, in(_) 1u32);
}

/// How many have arrived. What is read after it is as those left it.
#[cube]
fn arrived(arrivals: &[Atomic<u32>]) -> u32 {
    let place = arrivals.as_ptr();
    let count: u32;
    gpu_asm!("ld.acquire.gpu.global.u32 {}, [{}];", out(_) count, in(_) place);
    count
}

/// The cube arrives. One unit stands for all; it must not have loads on the way that others can do
/// without, since arriving waits for them.
#[cube]
fn come(arrivals: &[Atomic<u32>], #[comptime] ptx: bool) {
    if ptx {
        sync_cube();
        if UNIT_POS == 0 {
            arrive(arrivals);
        }
    } else {
        sync_storage();
        if UNIT_POS == 0 {
            arrivals[0].fetch_add(1u32);
        }
    }
}

/// Waits until cubes have arrived `target` times in all; what they wrote before is then there for
/// all.
#[cube]
fn meet(arrivals: &[Atomic<u32>], target: u32, #[comptime] ptx: bool) {
    if ptx {
        if UNIT_POS == 0 {
            while arrived(arrivals) < target {}
        }
        sync_cube();
    } else {
        if UNIT_POS == 0 {
            while arrivals[0].load() < target {}
        }
        sync_storage();
    }
}

/// See the module's documentation; buffers are those of the phases.
#[cube(launch_unchecked, address_type = "dynamic")]
fn run_steps<P: Size, V: Size, T: Size, S: Size, Q: Size>(
    logits: &mut [f32],
    seen: &mut [f32],
    limits: &[f32],
    draws: &[f32],
    choices: &mut [f32],
    arrivals: &[Atomic<u32>],
    embedding: &[f32],
    stream: &mut [One],
    widths: &[One],
    channels: &[One],
    in_proj: &[Words<P>],
    x_proj: &[Words<Const<1>>],
    dt_proj: &[Words<T>],
    rates: &[Vector<f32, S>],
    out_proj: &[Words<P>],
    norm_f: &[One],
    head_weights: &[Words<P>],
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
    #[define(Q)] _size: usize,
) {
    let cube = CUBE_POS;
    let mut target = 0u32;
    let mut entering = no_enter::<P>(c);
    let mut advancing = no_advance::<T, S>(c);
    let mut leaving = no_leave::<P>(c);
    load_enter(
        &mut entering,
        widths,
        channels,
        in_proj,
        x_proj,
        window,
        0usize.runtime(),
        batch,
        cube,
        c,
    );
    for step in 0..steps {
        if cube < batch {
            next_byte(
                logits, seen, limits, draws, choices, embedding, stream, step, cube, batch, c,
            );
        }
        come(arrivals, c.ptx);
        target += cubes;
        meet(arrivals, target, c.ptx);
        for layer in 0..layers {
            if cube < comptime!(c.in_cubes()) {
                enter::<P, V>(
                    &mut entering,
                    stream,
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
            come(arrivals, c.ptx);
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
            load_leave(&mut leaving, out_proj, widths, layer, cube, c);
            target += cubes;
            meet(arrivals, target, c.ptx);
            if cube < comptime!(c.blocks()) * batch {
                advance::<T, S, Q>(&advancing, parts, u, z, h, y, layer, batch, cube, c);
            }
            come(arrivals, c.ptx);
            load_enter(
                &mut entering,
                widths,
                channels,
                in_proj,
                x_proj,
                window,
                select(layer + 1 == layers, 0usize.runtime(), layer + 1),
                batch,
                cube,
                c,
            );
            target += cubes;
            meet(arrivals, target, c.ptx);
            if cube < comptime!(c.out_cubes()) {
                leave::<P, V>(&mut leaving, y, out_proj, stream, layer, batch, cube, c);
            }
            come(arrivals, c.ptx);
            target += cubes;
            meet(arrivals, target, c.ptx);
        }
        if cube < comptime!(c.head_cubes()) {
            head::<P, V>(stream, norm_f, head_weights, logits, batch, cube, eps, c);
        }
        come(arrivals, c.ptx);
        target += cubes;
        meet(arrivals, target, c.ptx);
    }
}
