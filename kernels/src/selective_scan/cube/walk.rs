//! Forward in one pass: a cube's units share the states of its channels.
//!
//! In the recurrence a unit has four states of a channel, and neighbouring units neighbouring
//! channels. All that does not belong to a state (step sizes before it, sums, skip connection and gate
//! after it) is done once a position and channel, by all units of the cube, with four neighbouring
//! channels of one position each. The two sides meet in shared memory, tile after tile of [`TILE`]
//! positions, two tiles of each kind: while the recurrence goes through tile k, the units complete the
//! outputs of tile k - 1 and make tile k + 1 ready. So there is one barrier a tile. Later tiles are
//! on their way meanwhile: every unit has what it will work on copied by the hardware to places of its
//! own in shared memory, the *ring*, which takes no registers and no barriers.
//!
//! Too few channels for the device are made more by cutting sequences into a few *segments*, in two
//! launches ([`Pass`]): the end states of all segments but the last, and then the outputs of all but the
//! first, whose are complete by the first launch. A segment's other end states come from a zero state and
//! the sum of its steps.
//!
//! Without segments, results have the bits of [`outputs`](super::forward::outputs): the same operations
//! in the same order. Backward has the bits of an output either way, from the saved states.

use cubecl::ir::ElemType;
use cubecl::prelude::*;

use super::common::{
    CLEARED, Place, V4, load_initial, load_rates, load_states, store_last, store_states,
};
use super::walk_parts::{
    Parameters, Part, Strides, Word, arrived, ask, ask_gates, asked, finish, gather, inputs,
    parameters, part, put_bc, stage, write,
};
use crate::cube::OptionalInput;
use crate::cube::math::exp2;
use crate::cube::reduce::tree_sum;
use crate::cube::wide::{One, wide_at};
use crate::cube::words::Words;

/// Positions of a tile.
pub(super) const TILE: usize = 16;
/// Channels of a cube.
pub(super) const CHANNELS: usize = 32;
/// States of a unit.
const OWN: usize = 4;
/// Units that share a channel.
pub(super) const SHARES: usize = 4;
/// States of a channel.
pub(super) const STATES: usize = OWN * SHARES;
/// Units of a cube. Each has one position and four channels of a tile, element-wise.
pub(super) const UNITS: usize = CHANNELS * SHARES;

/// Positions that the recurrence fetches from shared memory at once.
const GROUP: usize = 2;
/// From a channel's steps to the next one's, in positions: vectors of two positions are aligned, and
/// those of neighbouring channels in other banks.
pub(super) const STEP_PITCH: usize = TILE + 2;
/// From a position's partial sums to the next one's: aligned vectors of four, in other banks.
pub(super) const SUM_PITCH: usize = CHANNELS + 4;

/// Which part of the work a launch does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Pass {
    /// All of it: a sequence is one segment.
    Whole,
    /// The first segment, and the end states of all but the last.
    Ends,
    /// All segments but the first, from their end states.
    Outputs,
}

/// Compile-time switches.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct WalkConfig {
    pub pass: Pass,
    /// Positions of a chunk, a multiple of two tiles.
    pub chunk: usize,
    /// Which of u, delta, B and C, and z are of two numbers a word.
    pub halves: [bool; 4],
    /// Words that a unit copies of each of them, and of resets, a tile.
    pub words: [usize; 5],
    /// Tiles of the ring, 2 or 4.
    pub slots: usize,
    /// Whether L is a multiple of two tiles.
    pub whole: bool,
    /// Whether the step size goes through softplus.
    pub softplus: bool,
    /// Whether kernels may hold PTX.
    pub ptx: bool,
}

impl WalkConfig {
    /// Words of a tile of the ring.
    pub fn slot_words(&self) -> usize {
        self.words.iter().sum::<usize>() * UNITS
    }

    /// Words of the ring; one where nothing is copied.
    fn ring_words(&self) -> usize {
        match self.ptx {
            true => self.slots * self.slot_words(),
            false => 4,
        }
    }
}

/// Bytes of shared memory, but for the ring.
pub(super) const SHARED_BYTES: usize =
    4 * (2 * CHANNELS * STEP_PITCH * 2 + 2 * TILE * 2 * STATES + 2 * SHARES * TILE * SUM_PITCH);

/// The cube's shared memory.
#[derive(CubeType)]
struct Room {
    /// Steps, as the decays see them and times u, of two tiles.
    steps: Shared<[One]>,
    bc: Shared<[One]>,
    /// Every share's outputs of two tiles.
    sums: Shared<[One]>,
    ring: Shared<[Word]>,
}

/// What the recurrence needs of two groups of [`GROUP`] positions, the even one first.
#[derive(CubeType)]
struct Groups {
    /// Two positions a vector: each one's step as the decays see it, and step times u.
    steps: Array<V4>,
    b: Array<V4>,
    c: Array<V4>,
}

/// Fetches a group of the tile of the given parity.
#[cube]
fn fetch(
    groups: &mut Groups,
    room: &mut Room,
    lane: usize,
    share: usize,
    #[comptime] parity: usize,
    #[comptime] group: usize,
    #[comptime] outputs: bool,
    #[comptime] c: WalkConfig,
) {
    #[unroll]
    for i in 0..comptime!(GROUP / 2) {
        let at = comptime!(parity * CHANNELS * STEP_PITCH / 2 + group * GROUP / 2 + i)
            + lane * comptime!(STEP_PITCH / 2);
        groups.steps[comptime!(group % 2 * (GROUP / 2) + i)] =
            wide_at::<Const<4>>(&mut room.steps, at, c.ptx);
    }
    #[unroll]
    for i in 0..GROUP {
        let row = comptime!(parity * TILE + group * GROUP + i);
        let at = comptime!(row * 2 * SHARES) + share * 2;
        let slot = comptime!(group % 2 * GROUP + i);
        groups.b[slot] = wide_at::<Const<4>>(&mut room.bc, at + comptime!(row % 2), c.ptx);
        if outputs {
            groups.c[slot] = wide_at::<Const<4>>(&mut room.bc, at + comptime!(1 - row % 2), c.ptx);
        }
    }
}

/// The unit's states pass the positions of a group; its share of their outputs goes to the cube's sums.
#[cube]
fn advance(
    groups: &Groups,
    h: &mut Array<f32>,
    rates: &Array<f32>,
    room: &mut Room,
    lane: usize,
    share: usize,
    #[comptime] parity: usize,
    #[comptime] group: usize,
    #[comptime] outputs: bool,
    #[comptime] c: WalkConfig,
) {
    #[unroll]
    for i in 0..GROUP {
        let two = groups.steps[comptime!(group % 2 * (GROUP / 2) + i / 2)];
        let dt = two.extract(comptime!(i % 2 * 2));
        let x = two.extract(comptime!(i % 2 * 2 + 1));
        let bs = groups.b[comptime!(group % 2 * GROUP + i)];
        #[unroll]
        for k in 0..OWN {
            h[k] = fma(exp2(dt * rates[k], c.ptx), h[k], x * bs.extract(k));
        }
        if outputs {
            let cs = groups.c[comptime!(group % 2 * GROUP + i)];
            let mut sum = h[0] * cs.extract(0usize);
            #[unroll]
            for k in 1..OWN {
                sum = fma(h[k], cs.extract(k), sum);
            }
            let row = comptime!(parity * SHARES * TILE + group * GROUP + i);
            let at = comptime!(row * SUM_PITCH) + share * comptime!(TILE * SUM_PITCH) + lane;
            room.sums[at] = One::new(sum);
        }
    }
}

/// Where the cube's segment and the unit's channel are, state-wise.
#[derive(CubeType)]
struct Walker {
    place: Place,
    /// The unit's channel within the cube.
    lane: usize,
    /// The segment's first position in its sequence, and its number of positions.
    from: usize,
    count: usize,
    chunks: usize,
    inner: usize,
}

/// The states `h` pass a segment. With `outputs` its outputs and the states that enter its chunks
/// are written; without, the unit's steps are added to `passed`.
#[cube]
fn pass_segment<Y: Float, SU: Size, SD: Size, SP: Size, SZ: Size>(
    u: &[Words<SU>],
    delta: &[Words<SD>],
    b: &[Words<SP>],
    c: &[Words<SP>],
    z: &ComptimeOption<Box<[Words<SZ>]>>,
    resets: &OptionalInput,
    saved: &mut [f32],
    y: &mut [Vector<Y, Const<4>>],
    h: &mut Array<f32>,
    passed: &mut Array<f32>,
    rates: &Array<f32>,
    parameters: &Parameters,
    part: &Part,
    walker: &Walker,
    room: &mut Room,
    #[comptime] outputs: bool,
    #[comptime] config: WalkConfig,
) {
    let states = comptime!(STATES).runtime();
    let slots = comptime!(config.slots);
    let gated = comptime!(z.is_some());
    let cleared = comptime!(resets.is_some());
    let (lane, share) = (walker.lane, walker.place.lane);
    let mut us = Array::<f32>::new(8usize);
    let mut groups = Groups {
        steps: Array::new(GROUP),
        b: Array::new(comptime!(2 * GROUP)),
        c: Array::new(comptime!(2 * GROUP)),
    };
    #[unroll]
    for i in 0..8usize {
        us[i] = 0.0f32;
    }

    // Inputs are asked for so many tiles ahead of their use, and the gates of a tile, which are used
    // two tiles later, with them.
    #[unroll]
    for slot in 0..slots {
        let t0 = comptime!(slot * TILE).runtime();
        let at = slot.runtime();
        ask(
            u,
            delta,
            b,
            c,
            resets,
            &mut room.ring,
            part,
            t0,
            at,
            outputs,
            config,
        );
        if outputs {
            if comptime!(slot >= 2) {
                let t0 = comptime!((slot - 2) * TILE).runtime();
                let at = comptime!(slot - 2).runtime();
                ask_gates(z, &mut room.ring, part, t0, at, config);
            }
        }
        asked(config);
    }
    arrived(comptime!(slots - 1), config);
    let zero = 0usize.runtime();
    let raw = inputs(
        u,
        delta,
        b,
        c,
        resets,
        &mut room.ring,
        part,
        zero,
        zero,
        config,
    );
    #[unroll]
    for i in 0..4usize {
        stage(
            &raw,
            &mut room.steps,
            &mut us,
            passed,
            parameters,
            part,
            i,
            0usize,
            cleared,
            outputs,
            config,
        );
    }
    put_bc(&raw, &mut room.bc, part, 0usize, config);
    sync_cube();

    let pairs = walker.count.div_ceil(comptime!(2 * TILE));
    for pair in 0..pairs {
        #[unroll]
        for parity in 0..2usize {
            let other = comptime!(1 - parity);
            let t0 = pair * comptime!(2 * TILE) + comptime!(parity * TILE);
            let tile = pair * 2 + parity;
            let t1 = t0 + comptime!(slots * TILE);
            let into = tile % slots;
            ask(
                u,
                delta,
                b,
                c,
                resets,
                &mut room.ring,
                part,
                t1,
                into,
                outputs,
                config,
            );
            if outputs {
                let t1 = t0 + comptime!((slots - 2) * TILE);
                let into = (tile + comptime!(slots - 2)) % slots;
                ask_gates(z, &mut room.ring, part, t1, into, config);
            }
            asked(config);
            if outputs {
                if comptime!(parity == 0) {
                    let t = walker.from + t0;
                    if t % comptime!(config.chunk) == 0 {
                        let row = walker.place.batch * walker.chunks + t / comptime!(config.chunk);
                        store_states(saved, &*h, row, &walker.place, states, walker.inner, OWN);
                    }
                }
            }
            fetch(
                &mut groups,
                room,
                lane,
                share,
                parity,
                0usize,
                outputs,
                config,
            );
            arrived(comptime!(slots - 1), config);
            let from = (tile + 1) % slots;
            let raw = inputs(
                u,
                delta,
                b,
                c,
                resets,
                &mut room.ring,
                part,
                t0 + TILE,
                from,
                config,
            );
            put_bc(&raw, &mut room.bc, part, other, config);
            let from = (tile + comptime!(slots - 1)) % slots;
            let through = gather::<SZ>(
                z,
                &mut room.ring,
                &mut room.sums,
                part,
                t0 - TILE,
                from,
                other,
                config,
            );
            let mut out = V4::new(0.0f32);
            // What belongs to no state is spread over the groups: all of it at once would wait for the
            // unit for exponentials, and then that unit for it.
            #[unroll]
            for group in 0..comptime!(TILE / GROUP) {
                // The next group's numbers are on their way meanwhile.
                if comptime!(group + 1 < TILE / GROUP) {
                    let next = comptime!(group + 1);
                    fetch(
                        &mut groups,
                        room,
                        lane,
                        share,
                        parity,
                        next,
                        outputs,
                        config,
                    );
                }
                let channel = comptime!(group / 2);
                if comptime!(group % 2 == 0) {
                    if outputs {
                        let value =
                            finish(&through, &us, parameters, channel, other, gated, config);
                        out.insert(channel, value);
                    }
                } else {
                    stage(
                        &raw,
                        &mut room.steps,
                        &mut us,
                        passed,
                        parameters,
                        part,
                        channel,
                        other,
                        cleared,
                        outputs,
                        config,
                    );
                }
                advance(
                    &groups, h, rates, room, lane, share, parity, group, outputs, config,
                );
            }
            if outputs {
                write::<Y>(out, y, part, t0 - TILE);
            }
            sync_cube();
        }
    }
    arrived(0usize, config);
    if outputs {
        let t0 = pairs * comptime!(2 * TILE) - TILE;
        let from = (pairs * 2 + comptime!(slots - 1)) % slots;
        let through = gather::<SZ>(
            z,
            &mut room.ring,
            &mut room.sums,
            part,
            t0,
            from,
            1usize,
            config,
        );
        let mut out = V4::new(0.0f32);
        #[unroll]
        for i in 0..4usize {
            out.insert(
                i,
                finish(&through, &us, parameters, i, 1usize, gated, config),
            );
        }
        write::<Y>(out, y, part, t0);
    }
}

/// The outputs, the states that enter chunks and the last states, or what one [`Pass`] does of it.
/// `ends` (`[B, segments - 1, N, E]`) and `steps` (`[B, segments - 1, E]`) are the end states of segments
/// and sums of their steps; `segment` is the number of positions of all but the last. Strides are
/// counted in fours.
#[cube(launch_unchecked, address_type = "dynamic")]
pub(super) fn walk<Y: Float, SU: Size, SD: Size, SP: Size, SZ: Size>(
    u: &[Words<SU>],
    delta: &[Words<SD>],
    b: &[Words<SP>],
    c: &[Words<SP>],
    a: &[f32],
    d: &OptionalInput,
    z: &ComptimeOption<Box<[Words<SZ>]>>,
    bias: &OptionalInput,
    initial: &OptionalInput,
    resets: &OptionalInput,
    saved: &mut [f32],
    last: &mut [f32],
    ends: &mut [f32],
    steps: &mut [f32],
    y: &mut [Vector<Y, Const<4>>],
    batch: usize,
    length: usize,
    inner: usize,
    segment: usize,
    b_fours: usize,
    c_fours: usize,
    z_fours: usize,
    #[comptime] config: WalkConfig,
    #[define(Y)] _type: ElemType,
) {
    let blocks = inner.div_ceil(CHANNELS);
    let block = CUBE_POS % blocks;
    let sequence = CUBE_POS / blocks % batch;
    let turn = CUBE_POS / blocks / batch;
    let segments = length.div_ceil(segment);
    let number = turn + comptime!((config.pass == Pass::Outputs) as usize);
    if number + comptime!((config.pass == Pass::Ends) as usize) >= segments {
        terminate!();
    }
    let from = number * segment;
    let count = min(segment, length - from);
    let strides = Strides {
        u: inner / 4,
        z: z_fours,
        b: b_fours,
        c: c_fours,
    };
    let part = part(block, sequence * length + from, count, inner, strides);
    let lane = UNIT_POS as usize % CHANNELS;
    let share = UNIT_POS as usize / CHANNELS;
    let channel = block * CHANNELS + lane;
    let walker = Walker {
        place: Place {
            batch: sequence,
            chunk: 0usize.runtime(),
            lane: share,
            channel: min(channel, inner - 1),
            inside: channel < inner,
        },
        lane,
        from,
        count,
        chunks: length.div_ceil(comptime!(config.chunk)),
        inner,
    };
    let mut room = Room {
        steps: Shared::new_aligned_slice(comptime!(2 * CHANNELS * STEP_PITCH * 2), 16usize),
        bc: Shared::new_aligned_slice(comptime!(2 * TILE * 2 * STATES), 16usize),
        sums: Shared::new_aligned_slice(comptime!(2 * SHARES * TILE * SUM_PITCH), 16usize),
        ring: Shared::new_aligned_slice(comptime!(config.ring_words()), 16usize),
    };
    let states = comptime!(STATES).runtime();
    let place = &walker.place;
    let mut rates = Array::<f32>::new(OWN);
    load_rates(
        a,
        &mut rates,
        place.channel,
        share,
        states,
        0usize,
        comptime!(resets.is_some()),
        OWN,
    );
    let mut h = Array::<f32>::new(OWN);
    let row0 = sequence * (segments - 1);
    if comptime!(config.pass == Pass::Outputs) {
        enter(
            ends, steps, &mut h, &rates, row0, number, place, inner, config,
        );
    } else {
        load_initial(initial, &mut h, place, states, inner, OWN);
    }
    let parameters = parameters(bias, d, &part);
    let mut passed = Array::<f32>::new(4usize);
    #[unroll]
    for i in 0..4usize {
        passed[i] = 0.0f32;
    }
    if comptime!(config.pass == Pass::Ends) {
        let row = row0 + number;
        if number == 0 {
            pass_segment::<Y, SU, SD, SP, SZ>(
                u,
                delta,
                b,
                c,
                z,
                resets,
                saved,
                y,
                &mut h,
                &mut passed,
                &rates,
                &parameters,
                &part,
                &walker,
                &mut room,
                true,
                config,
            );
        } else {
            #[unroll]
            for k in 0..OWN {
                h[k] = 0.0f32;
            }
            pass_segment::<Y, SU, SD, SP, SZ>(
                u,
                delta,
                b,
                c,
                z,
                resets,
                saved,
                y,
                &mut h,
                &mut passed,
                &rates,
                &parameters,
                &part,
                &walker,
                &mut room,
                false,
                config,
            );
            store_steps(&passed, &mut room, steps, row, &part, place, lane, inner);
        }
        store_states(ends, &h, row, place, states, inner, OWN);
    } else {
        pass_segment::<Y, SU, SD, SP, SZ>(
            u,
            delta,
            b,
            c,
            z,
            resets,
            saved,
            y,
            &mut h,
            &mut passed,
            &rates,
            &parameters,
            &part,
            &walker,
            &mut room,
            true,
            config,
        );
        if number + 1 == segments {
            store_last(last, &h, place, states, inner, OWN);
        }
    }
}

/// The states that enter segment `number`: the ends of those before it, each decayed by what follows.
#[cube]
fn enter(
    ends: &mut [f32],
    steps: &mut [f32],
    h: &mut Array<f32>,
    rates: &Array<f32>,
    row0: usize,
    number: usize,
    place: &Place,
    inner: usize,
    #[comptime] config: WalkConfig,
) {
    let mut end = Array::<f32>::new(OWN);
    #[unroll]
    for k in 0..OWN {
        h[k] = 0.0f32;
    }
    for i in 0..number {
        let row = row0 + i;
        let states = comptime!(STATES).runtime();
        load_states(
            &*ends,
            &mut end,
            row,
            place.channel,
            place.lane,
            states,
            inner,
            0usize,
            OWN,
        );
        // The first segment's end is of its true initial state.
        let sum = steps[row * inner + place.channel];
        let keeps = i > 0 && sum < CLEARED;
        #[unroll]
        for k in 0..OWN {
            let decay = select(keeps, exp2(rates[k] * sum, config.ptx), 0.0f32);
            h[k] = fma(decay, h[k], end[k]);
        }
    }
}

/// Writes the sums of the segment's steps. Each unit has those of one position of every tile.
#[cube]
fn store_steps(
    passed: &Array<f32>,
    room: &mut Room,
    steps: &mut [f32],
    row: usize,
    part: &Part,
    place: &Place,
    lane: usize,
    inner: usize,
) {
    #[unroll]
    for i in 0..4usize {
        let at = part.position * SUM_PITCH + part.column + i;
        room.sums[at] = One::new(passed[i]);
    }
    sync_cube();
    let mut of_positions = Array::<f32>::new(TILE);
    #[unroll]
    for i in 0..TILE {
        of_positions[i] = room.sums[comptime!(i * SUM_PITCH) + lane].extract(0usize);
    }
    let sum = min(tree_sum(&mut of_positions, TILE), CLEARED);
    if place.inside && place.lane == 0 {
        steps[row * inner + place.channel] = sum;
    }
}
