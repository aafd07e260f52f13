//! All steps of a piece in one kernel, for few sequences.
//!
//! With few sequences a phase takes a microsecond or two, as long as it takes to get from one kernel to
//! the next. So here the cubes stay: each has its part of every phase, and hands on what others need
//! as [`exchange`](super::exchange) does. A cube has the same channels in the first two phases, so u
//! and z stay where they are; of what the kernels of [`steps`](super::steps) hand on, y and the stream
//! go to all cubes, and the parts of the low-rank product to one that adds them up for all.
//! What a phase knows ahead (weights, states) is loaded a phase or two early, so that reading the
//! weights goes on all the time.
//!
//! The cubes must run at the same time: there are no more than the device has processors, each
//! taking no more than a processor has. The arithmetic is that of the kernels of [`steps`](super::steps),
//! in the same order: the results have the same bits.

use burn_cubecl::tensor::CubeTensor;
use cubecl::prelude::*;
use cubecl::server::Handle;

use super::exchange::{Pattern, Tagged, again, give, settle, take};
use super::phases::{
    AdvanceAhead, EnterAhead, LeaveAhead, enter_group, first_vector, head_group, head_place,
    leave_products, leave_sum, load_advance, load_enter, load_gates, load_head, load_leave,
    no_advance, no_enter, no_leave, own_place, part, part_place, part_sums, place_in_entering_cube,
    recur,
};
use super::plan::StepConfig;
use super::steps::embedded;
use super::{AHEAD, Buffers, Weights};
use crate::cube::reduce::lane_sum;
use crate::cube::wide::One;
use crate::cube::words::Words;
use crate::cube::{address_type, buffer, cube_dim, word_buffer};
use crate::sampling::BYTES;
use crate::sampling::cube::{CHOICE, SETTINGS, choose, no_logit, note};

/// What cubes hand to each other.
#[derive(Clone, Debug)]
pub(super) struct Exchange {
    cubes: usize,
    /// `[B, D]`.
    stream: Handle,
    /// `[B, R + 2N, parts]`.
    parts: Handle,
    /// `[B, R + 2N]`.
    low: Handle,
    /// `[B, E]`.
    y: Handle,
    /// `[B, rows]`.
    logits: Handle,
    /// The last tag that was used. Tags go on from one launch to the next, so that nothing old has
    /// one that is waited for.
    tag: u32,
}

impl Exchange {
    /// Buffers for a number of sequences, and `cubes` cubes.
    pub(super) fn new(weights: &Weights, config: &StepConfig, batch: usize, cubes: usize) -> Self {
        let client = &weights.embedding.client;
        let empty = |count: usize| {
            let handle = client.empty(8 * count);
            let zeros = cubecl::bytes::Bytes::from_elems(vec![0u32; 2 * count]);
            client.write(&handle, zeros);
            handle
        };
        Self {
            cubes,
            stream: empty(batch * config.width),
            parts: empty(batch * config.low() * config.parts),
            low: empty(batch * config.low()),
            y: empty(batch * config.inner),
            logits: empty(batch * config.rows),
            tag: 0,
        }
    }
}

/// Runs `steps` steps.
pub(super) fn launch(
    weights: &Weights,
    buffers: &Buffers,
    exchange: &mut Exchange,
    config: &StepConfig,
    steps: usize,
) {
    let c = *config;
    let batch = buffers.batch;
    let cubes = exchange.cubes;
    let needed = c.cubes_at_once(batch);
    // With fewer, work is left undone; one more would wait for a stream that nobody keeps for it.
    assert_eq!(needed, Some(cubes), "decode: cubes of the one kernel");
    let draws = AHEAD * batch;
    let channels = batch * c.inner;
    let past = weights.layers * channels * (c.taps - 1);
    let all = |handle: &Handle, count: usize| {
        // SAFETY: `count` is the size that the buffer's field documents.
        unsafe { BufferArg::from_raw_parts(handle.clone(), count) }
    };
    let of = |tensor: &CubeTensor| buffer(tensor);
    let [words, out_words, rank_words] = c.words();
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
            out_words,
            rank_words,
            c.state_vector,
            all(&buffers.logits, batch * c.rows),
            all(&buffers.seen, batch * BYTES),
            all(&buffers.settings, batch * SETTINGS),
            all(&buffers.draws, draws),
            all(&buffers.choices, draws * CHOICE),
            of(&weights.embedding),
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
            all(&buffers.h, weights.layers * channels * c.states),
            all(&exchange.stream, batch * c.width),
            all(&exchange.parts, batch * c.low() * c.parts),
            all(&exchange.low, batch * c.low()),
            all(&exchange.y, channels),
            all(&exchange.logits, batch * c.rows),
            steps,
            weights.layers,
            batch,
            weights.eps,
            cubes,
            exchange.tag,
            c,
        );
    }
    let tags = steps * (weights.layers + 1);
    exchange.tag = exchange.tag.wrapping_add(tags as u32);
}

/// See the module's documentation; buffers are those of the phases and of [`Exchange`].
#[cube(launch_unchecked, address_type = "dynamic")]
fn run_steps<P: Size, V: Size, O: Size, T: Size, S: Size>(
    logits: &mut [f32],
    seen: &mut [f32],
    limits: &[f32],
    draws: &[f32],
    choices: &mut [f32],
    embedding: &[f32],
    widths: &[One],
    channels: &[One],
    in_proj: &[Words<P>],
    x_proj: &[Words<Const<1>>],
    dt_proj: &[Words<T>],
    rates: &[Vector<f32, S>],
    out_proj: &[Words<O>],
    norm_f: &[One],
    head_weights: &[Words<P>],
    window: &mut [f32],
    h: &mut [Vector<f32, S>],
    stream: &mut [Tagged],
    parts: &mut [Tagged],
    low: &mut [Tagged],
    y: &mut [Tagged],
    handed: &mut [Tagged],
    steps: usize,
    layers: usize,
    batch: usize,
    eps: f32,
    cubes: usize,
    last_tag: u32,
    #[comptime] c: StepConfig,
) {
    let cube = CUBE_POS;
    let mut entering = no_enter::<P>(c);
    let mut advancing = no_advance::<T, S>(c);
    let mut leaving = no_leave::<O>(c);
    let mut us = Shared::<[f32]>::new_slice(comptime!(c.group * c.channels));
    let mut zs = Shared::<[f32]>::new_slice(comptime!(c.group * c.channels));
    for step in 0..steps {
        // The stream's tag before the first layer.
        let first_tag = last_tag + 1u32 + (step * (layers + 1)) as u32;
        if cube < batch {
            next_byte(
                logits, handed, seen, limits, draws, choices, embedding, stream, step, cube, batch,
                first_tag, c,
            );
        }
        // Cubes that choose no byte do this while they wait; ahead of a step it would be in the way of
        // the choice, which needs registers.
        let first = 0usize.runtime();
        load_enter(
            &mut entering,
            widths,
            channels,
            in_proj,
            x_proj,
            window,
            first,
            batch,
            cube,
            c,
        );
        load_gates(&mut entering, in_proj, first, cube, c);
        load_leave(&mut leaving, out_proj, widths, first, cube, c);
        for layer in 0..layers {
            let next = layer + 1;
            // All that the layer hands on has this one.
            let tag = first_tag + 1u32 + layer as u32;
            let values = take_stream(stream, batch, tag - 1u32, c);
            enter_group::<P, V>(
                &mut entering,
                &values,
                channels,
                in_proj,
                window,
                &mut us,
                &mut zs,
                layer,
                batch,
                0usize.runtime(),
                cube,
                eps,
                c,
            );
            give_parts(&entering, &us, parts, batch, cube, tag, c);
            load_channels(
                &mut advancing,
                channels,
                dt_proj,
                rates,
                h,
                layer,
                batch,
                cube,
                c,
            );
            if next < layers {
                load_enter(
                    &mut entering,
                    widths,
                    channels,
                    in_proj,
                    x_proj,
                    window,
                    next,
                    batch,
                    cube,
                    c,
                );
            }
            let sums = take_low(parts, low, batch, cube, cubes, tag, c);
            advance(
                &advancing, &sums, &us, &zs, h, y, layer, batch, cube, tag, c,
            );
            // Those who look for y have to wait until it can be there: looking takes the memory's time.
            sync_cube();
            if next < layers {
                load_gates(&mut entering, in_proj, next, cube, c);
            }
            leave(
                &mut leaving,
                y,
                out_proj,
                widths,
                stream,
                layer,
                layers,
                batch,
                cube,
                tag,
                c,
            );
        }
        if cube < comptime!(c.head_cubes()) {
            let mut ahead = load_head(norm_f, head_weights, cube, c);
            let values = take_stream(stream, batch, first_tag + layers as u32, c);
            // All sequences are one group.
            let group = 0usize.runtime();
            let sum = head_group::<P, V>(
                &mut ahead,
                &values,
                head_weights,
                group,
                batch,
                cube,
                eps,
                c,
            );
            let (inside, at) = head_place(group, batch, cube, c);
            if inside {
                logits[at] = sum;
                give(handed, at, sum, first_tag + layers as u32, c.ptx);
            }
        }
        // Shared memory of the head may serve the choice.
        sync_cube();
    }
}

/// Chooses the byte of a sequence and hands on its row of the embedding. The first byte is chosen from
/// `logits`, later ones from those that cubes have handed on.
#[cube]
fn next_byte(
    logits: &mut [f32],
    handed: &mut [Tagged],
    seen: &mut [f32],
    limits: &[f32],
    draws: &[f32],
    choices: &mut [f32],
    embedding: &[f32],
    stream: &mut [Tagged],
    step: usize,
    sequence: usize,
    batch: usize,
    tag: u32,
    #[comptime] c: StepConfig,
) {
    let unit = UNIT_POS as usize;
    let chooser = comptime!(c.chooser());
    let bytes = comptime!(chooser.bytes());
    let first = sequence * comptime!(c.rows);
    let own = min(unit, comptime!(bytes - 1).runtime());
    settle(c.ptx);
    let mut raw = logits[first + own];
    if step > 0 {
        let pattern = comptime!(Pattern {
            rows: 1,
            row: 0,
            count: 1,
            stride: 1,
            each: 1,
        });
        let last = first + comptime!(bytes - 1);
        let none = 0usize.runtime();
        let taken = take(handed, first + own, last, none, tag - 1u32, pattern, c.ptx);
        raw = taken[0];
    }
    let raw = select(unit < bytes, raw, no_logit());
    let byte = choose(raw, seen, limits, draws, step, sequence, batch, chooser);
    for i in 0..comptime!(c.width.div_ceil(c.units)) {
        let column = i * comptime!(c.units) + UNIT_POS as usize;
        if column < comptime!(c.width) {
            let number = embedded(embedding, byte, column, c);
            give(
                stream,
                sequence * comptime!(c.width) + column,
                number,
                tag,
                c.ptx,
            );
        }
    }
    note(raw, byte, choices, step, sequence, batch, chooser);
}

/// The unit's columns of the stream of every sequence; columns beyond D are zero.
#[cube]
fn take_stream(
    stream: &mut [Tagged],
    batch: usize,
    tag: u32,
    #[comptime] c: StepConfig,
) -> Array<f32> {
    let unit = UNIT_POS as usize;
    let pattern = comptime!(Pattern {
        rows: c.group,
        row: c.width,
        count: c.columns(),
        stride: c.units,
        each: 1,
    });
    settle(c.ptx);
    let last = comptime!(c.width - 1).runtime();
    let mut values = take(stream, unit, last, batch - 1, tag, pattern, c.ptx);
    #[unroll]
    for b in 0..c.group {
        #[unroll]
        for i in 0..comptime!(c.columns()) {
            let at = comptime!(b * c.columns() + i);
            let inside = unit + comptime!(i * c.units) < comptime!(c.width);
            values[at] = select(inside, values[at], 0.0f32);
        }
    }
    values
}

/// Hands on the cube's part of `x_proj`.
#[cube]
fn give_parts<P: Size>(
    entering: &EnterAhead<P>,
    us: &Shared<[f32]>,
    parts: &mut [Tagged],
    batch: usize,
    cube: usize,
    tag: u32,
    #[comptime] c: StepConfig,
) {
    let sums = part_sums(&entering.low, us, c);
    let (slice, word) = part_place(c);
    let each = comptime!(c.per_word());
    let inside = cube < comptime!(c.parts) && word < comptime!(c.low_words());
    #[unroll]
    for b in 0..c.group {
        #[unroll]
        for k in 0..each {
            // The lanes that share a sum write different ones, where there are so many.
            let writer = comptime!((each * b + k) % c.low_slices());
            if inside && slice == writer && b < batch {
                let at = (b * comptime!(c.low()) + word * each + k) * comptime!(c.parts) + cube;
                give(parts, at, sums[comptime!(each * b + k)], tag, c.ptx);
            }
        }
    }
}

/// The low-rank products of all sequences, `[B, R + 2N]`. A plane adds up the parts of one number and
/// hands on the sum.
#[cube]
fn take_low(
    parts: &mut [Tagged],
    low: &mut [Tagged],
    batch: usize,
    cube: usize,
    cubes: usize,
    tag: u32,
    #[comptime] c: StepConfig,
) -> Shared<[f32]> {
    let unit = UNIT_POS as usize;
    let plane = unit / comptime!(c.plane);
    let lane = unit % comptime!(c.plane);
    let slices = comptime!(c.slices());
    let each = comptime!(c.part_each());
    let count = batch * comptime!(c.low());
    let pattern = comptime!(Pattern {
        rows: 1,
        row: 0,
        count: c.part_groups(),
        stride: slices,
        each,
    });
    let slice = lane % slices;
    settle(c.ptx);
    let mut number = plane * cubes + cube;
    while number < count {
        let from = number * comptime!(c.parts / each);
        let last = from + comptime!(c.parts / each - 1);
        let own = take(
            parts,
            from + slice,
            last,
            0usize.runtime(),
            tag,
            pattern,
            c.ptx,
        );
        let mut sum = own[0];
        #[unroll]
        for i in 1..comptime!(pattern.numbers()) {
            let inside = part(i, slice, c) < comptime!(c.parts);
            sum += select(inside, own[i], 0.0f32);
        }
        let sum = lane_sum(sum, slices, 1usize);
        if lane == 0 {
            give(low, number, sum, tag, c.ptx);
        }
        number += comptime!(c.planes()) * cubes;
    }
    let mut sums = Shared::<[f32]>::new_slice(comptime!(c.group * c.low()));
    let each = comptime!((c.group * c.low()).div_ceil(c.units));
    let pattern = comptime!(Pattern {
        rows: 1,
        row: 0,
        count: each,
        stride: c.units,
        each: 1,
    });
    settle(c.ptx);
    if plane * comptime!(c.plane) < count {
        let own = take(low, unit, count - 1, 0usize.runtime(), tag, pattern, c.ptx);
        #[unroll]
        for i in 0..each {
            let at = unit + comptime!(i * c.units);
            if at < count {
                sums[at] = own[i];
            }
        }
    }
    sync_cube();
    sums
}

/// Whether this unit's plane has channels to advance.
#[cube]
fn advances(batch: usize, #[comptime] c: StepConfig) -> bool {
    let first = UNIT_POS as usize / comptime!(c.plane) * comptime!(c.plane);
    first < batch * comptime!(c.channels * c.lanes())
}

/// Loads ahead for [`advance`].
#[cube]
fn load_channels<T: Size, S: Size>(
    ahead: &mut AdvanceAhead<T, S>,
    channels: &[One],
    dt_proj: &[Words<T>],
    rates: &[Vector<f32, S>],
    h: &mut [Vector<f32, S>],
    layer: usize,
    batch: usize,
    cube: usize,
    #[comptime] c: StepConfig,
) {
    if advances(batch, c) {
        let place = place_in_entering_cube(cube, batch, c);
        load_advance(ahead, channels, dt_proj, rates, h, layer, batch, &place, c);
    }
}

/// One step of the recurrence and the gate for the cube's channels; y is handed on.
#[cube]
fn advance<T: Size, S: Size>(
    ahead: &AdvanceAhead<T, S>,
    low: &Shared<[f32]>,
    us: &Shared<[f32]>,
    zs: &Shared<[f32]>,
    h: &mut [Vector<f32, S>],
    y: &mut [Tagged],
    layer: usize,
    batch: usize,
    cube: usize,
    tag: u32,
    #[comptime] c: StepConfig,
) {
    if advances(batch, c) {
        let place = place_in_entering_cube(cube, batch, c);
        let own = UNIT_POS as usize / comptime!(c.lanes()) % comptime!(c.channels);
        let at = own * comptime!(c.group) + place.sequence;
        let from = place.sequence * comptime!(c.low());
        let value = recur(ahead, low, from, us[at], zs[at], h, layer, batch, &place, c);
        if place.inside && place.lane == 0 {
            let at = place.sequence * comptime!(c.inner) + place.channel;
            give(y, at, value, tag, c.ptx);
        }
    }
}

/// `out_proj`; the stream is handed on. The next layer's weights are loaded before the sums are taken.
#[cube]
fn leave<O: Size>(
    ahead: &mut LeaveAhead<O>,
    y: &mut [Tagged],
    out_proj: &[Words<O>],
    widths: &[One],
    stream: &mut [Tagged],
    layer: usize,
    layers: usize,
    batch: usize,
    cube: usize,
    tag: u32,
    #[comptime] c: StepConfig,
) {
    if cube < comptime!(c.out_cubes()) {
        let (inside, at) = own_place(0usize.runtime(), batch, cube, c);
        settle(c.ptx);
        let before = again(stream, at, c.ptx);
        let pattern = comptime!(Pattern {
            rows: c.group,
            row: c.inner,
            count: c.out_loads(),
            stride: c.plane,
            each: c.out_vector,
        });
        let last = comptime!(c.inner / c.out_vector - 1).runtime();
        let inputs = take(y, first_vector(c), last, batch - 1, tag, pattern, c.ptx);
        let sums = leave_products(ahead, &inputs, out_proj, layer, 0usize.runtime(), cube, c);
        let bias = ahead.bias[0];
        if layer + 1 < layers {
            load_leave(ahead, out_proj, widths, layer + 1, cube, c);
        }
        let sum = leave_sum(&sums, c) + bias;
        if inside {
            give(stream, at, before + sum, tag, c.ptx);
        }
    }
}
