//! Forward in one pass: a cube's units share the states of its channels.
//!
//! In the recurrence a unit has four states of a channel, its *share*. All that does not belong to a
//! state (step sizes before it, sums, skip connection and gate after it) is done once a position and
//! channel, by all units of the cube, with four neighbouring channels of one position each. The two sides meet in shared memory, tile after tile of [`TILE`]
//! positions, two tiles of each kind: while the recurrence goes through tile k, the units complete the
//! outputs of tile k - 1 and make tile k + 1 ready, and the loads of tiles k + 2 and k + 3 are on their
//! way. So there is one barrier a tile.
//!
//! What a processor's shared memory can deliver bounds this kernel, so units are laid out for few of its
//! cycles: a plane's have eight channels and all four shares of them.
//!
//! Where there are too few channels for the device, sequences are cut into a few *segments*, in two
//! launches ([`Pass`]). The first one completes the first segment, and takes each of the others but the last
//! from a zero state to its end state, with the sum of its steps. From these the second launch has the states
//! that enter the other segments, and completes them.
//!
//! Without segments, results have the bits of [`outputs`](super::forward::outputs): the same operations
//! in the same order. Backward has the bits of an output either way, from the saved states.

use cubecl::ir::ElemType;
use cubecl::prelude::*;

use super::common::{
    CLEARED, Place, V4, load_initial, load_rates, load_states, store_last, store_states,
};
use super::walk_parts::{
    Parameters, Part, Strides, finish, gather, nothing_ahead, parameters, part, read, read_gates,
    stage, stage_bc, write,
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
/// Channels of a plane.
const PLANE: usize = CHANNELS / SHARES;
/// From two positions' steps to the next two's, in vectors of a channel's two steps. One place is left
/// free after eight channels, and a few at the end, so that units meet in no bank when they write.
pub(super) const STEP_ROW: usize = 42;

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
    /// Whether L is a multiple of two tiles.
    pub whole: bool,
    /// From a position's partial sums to the next one's.
    pub pitch: usize,
    /// Whether the step size goes through softplus.
    pub softplus: bool,
    /// Whether kernels may hold PTX.
    pub ptx: bool,
}

impl WalkConfig {
    /// Words of four numbers of u, delta and z, and of two of B and C, in the kernel's order.
    pub fn words(&self) -> [usize; 4] {
        let [u, delta, b, z] = self.halves.map(|halves| if halves { 1 } else { 2 });
        [2 * u, 2 * delta, b, 2 * z]
    }

    /// From a share's partial sums to the next one's.
    pub fn share_pitch(&self) -> usize {
        share_pitch(self.pitch)
    }
}

/// From a share's partial sums to the next one's.
const fn share_pitch(pitch: usize) -> usize {
    TILE * pitch + pitch - CHANNELS
}

/// Bytes of shared memory for a pitch of partial sums.
pub(super) const fn shared_bytes(pitch: usize) -> usize {
    4 * (TILE * STEP_ROW * 4 + 2 * TILE * 2 * STATES + 2 * SHARES * share_pitch(pitch))
}

/// The cube's shared memory.
#[derive(CubeType)]
struct Room {
    /// Steps, as the decays see them and times u, of two tiles.
    steps: Shared<[One]>,
    bc: Shared<[One]>,
    /// Every share's outputs of two tiles.
    sums: Shared<[One]>,
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
        let at =
            comptime!((parity * TILE / 2 + group * GROUP / 2 + i) * STEP_ROW) + lane + lane / PLANE;
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
            let row = comptime!((group * GROUP + i) * c.pitch);
            let at = comptime!(parity * SHARES * c.share_pitch() + row)
                + share * comptime!(c.share_pitch())
                + lane;
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
    let gated = comptime!(z.is_some());
    let cleared = comptime!(resets.is_some());
    let (lane, share) = (walker.lane, walker.place.lane);
    let mut ahead = nothing_ahead::<SU, SD, SP, SZ>();
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

    // Tile 0 is ready, and tiles 1 and 2 on their way.
    let zero = 0usize.runtime();
    read(
        &mut ahead, u, delta, b, c, resets, part, zero, 0usize, outputs, config,
    );
    #[unroll]
    for i in 0..4usize {
        stage(
            &ahead,
            &mut room.steps,
            &mut us,
            passed,
            parameters,
            part,
            zero,
            i,
            0usize,
            cleared,
            outputs,
            config,
        );
    }
    stage_bc(&ahead, &mut room.bc, part, 0usize, outputs, config);
    let (t1, t2) = (comptime!(TILE).runtime(), comptime!(2 * TILE).runtime());
    read(
        &mut ahead, u, delta, b, c, resets, part, t1, 1usize, outputs, config,
    );
    read(
        &mut ahead, u, delta, b, c, resets, part, t2, 0usize, outputs, config,
    );
    if outputs {
        read_gates(&mut ahead, z, part, zero, 0usize, config);
    }
    sync_cube();

    let pairs = walker.count.div_ceil(comptime!(2 * TILE));
    for pair in 0..pairs {
        #[unroll]
        for parity in 0..2usize {
            let other = comptime!(1 - parity);
            let t0 = pair * comptime!(2 * TILE) + comptime!(parity * TILE);
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
            let mut out = V4::new(0.0f32);
            if outputs {
                let sums = gather(&mut room.sums, part, other, config);
                #[unroll]
                for i in 0..4usize {
                    let value = finish(&ahead, &sums, &us, parameters, i, other, gated, config);
                    out.insert(i, value);
                }
                write::<Y>(out, y, part, t0 - TILE);
                read_gates(&mut ahead, z, part, t0 + TILE, other, config);
            }
            #[unroll]
            for i in 0..4usize {
                stage(
                    &ahead,
                    &mut room.steps,
                    &mut us,
                    passed,
                    parameters,
                    part,
                    t0 + TILE,
                    i,
                    other,
                    cleared,
                    outputs,
                    config,
                );
            }
            stage_bc(&ahead, &mut room.bc, part, other, outputs, config);
            // As soon as these places are free: memory may take longer to answer than a tile does.
            let t3 = t0 + comptime!(3 * TILE);
            read(
                &mut ahead, u, delta, b, c, resets, part, t3, other, outputs, config,
            );
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
                advance(
                    &groups, h, rates, room, lane, share, parity, group, outputs, config,
                );
            }
            sync_cube();
        }
    }
    if outputs {
        let sums = gather(&mut room.sums, part, 1usize, config);
        let mut out = V4::new(0.0f32);
        #[unroll]
        for i in 0..4usize {
            out.insert(
                i,
                finish(&ahead, &sums, &us, parameters, i, 1usize, gated, config),
            );
        }
        write::<Y>(out, y, part, pairs * comptime!(2 * TILE) - TILE);
    }
}

/// The outputs, the states that enter chunks and the last states, or what one [`Pass`] does of it.
/// `ends` (`[B, segments - 1, N, E]`) and `steps` (`[B, segments - 1, E]`) are the end states of segments
/// and sums of their steps; `segment` is the number of positions of all but the last. Strides of B and C are
/// counted in twos, that of z in fours.
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
    b_twos: usize,
    c_twos: usize,
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
        fours: inner / 4,
        z_fours,
        b_twos,
        c_twos,
    };
    let part = part(block, sequence * length + from, count, inner, strides);
    let unit = UNIT_POS as usize;
    // Shared memory answers twice as fast where units 0 and 1, 2 and 3 and so on ask for the same, as they
    // do for steps, or units 0 and 2, 1 and 3, as for B and C.
    let lane = unit / 2 % PLANE + unit / 32 * PLANE;
    let share = unit % 2 + unit / 16 % 2 * 2;
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
        steps: Shared::new_aligned_slice(comptime!(TILE * STEP_ROW * 4), 16usize),
        bc: Shared::new_aligned_slice(comptime!(2 * TILE * 2 * STATES), 16usize),
        sums: Shared::new_aligned_slice(comptime!(2 * SHARES * config.share_pitch()), 16usize),
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
        let at = part.position * CHANNELS + part.column + i;
        room.sums[at] = One::new(passed[i]);
    }
    sync_cube();
    let mut of_positions = Array::<f32>::new(TILE);
    #[unroll]
    for i in 0..TILE {
        of_positions[i] = room.sums[comptime!(i * CHANNELS) + lane].extract(0usize);
    }
    let sum = min(tree_sum(&mut of_positions, TILE), CLEARED);
    if place.inside && place.lane == 0 {
        steps[row * inner + place.channel] = sum;
    }
}
