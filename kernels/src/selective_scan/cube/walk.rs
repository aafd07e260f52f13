//! Forward in one pass: a cube's units share the states of its channels.
//!
//! In the recurrence a unit has four states of a channel, its *share*, or two where there are too few
//! channels to fill the device with fours. All that does not belong to a
//! state (step sizes before it, sums, skip connection and gate after it) is done once a position and
//! channel, by all units of the cube, with four neighbouring channels of one position each. The two
//! sides meet in shared memory, tile after tile of positions, two tiles of each kind: while the
//! recurrence goes through tile k, the units complete the
//! outputs of tile k - 1 and make tile k + 1 ready, and the loads of tiles k + 2 and k + 3 are on their
//! way. So there is one barrier a tile.
//!
//! What a processor's shared memory can deliver bounds this kernel, so units are laid out for few of its
//! cycles: a plane's have all shares of its channels.
//!
//! Where there are too few channels even so, sequences are cut into a few *segments*, in two
//! launches ([`Pass`]). The first one completes the first segment, and takes each of the others but the last
//! from a zero state to its end state, with the sum of its steps. From these the second launch has the states
//! that enter the other segments, and completes them.
//!
//! Without segments, four states a unit give the bits of [`outputs`](super::forward::outputs): the same
//! operations in the same order. Backward has the bits of their outputs either way, from the saved
//! states; those of two states a unit it has to rounding, since these add up in another order.

use cubecl::ir::ElemType;
use cubecl::prelude::*;

use super::common::{
    CLEARED, Place, V4, load_initial, load_rates, load_states, store_last, store_states,
};
use super::walk_parts::{
    Ahead, Parameters, Part, Strides, finish, gather, nothing_ahead, parameters, part, read, read_gates,
    stage, stage_bc, write,
};
use crate::cube::OptionalInput;
use crate::cube::math::exp2;
use crate::cube::reduce::tree_sum;
use crate::cube::wide::{One, wide_at};
use crate::cube::words::Words;

/// States of a channel.
pub(super) const STATES: usize = 16;
/// Units of a cube. Each has one position and four channels of a tile, element-wise.
pub(super) const UNITS: usize = 128;

/// Units that share memory's cycles.
const PLANE: usize = 32;
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
    pub layout: Layout,
    /// Positions of a chunk, a multiple of a tile.
    pub chunk: usize,
    /// Which of u, delta, B and C, and z are of two numbers a word.
    pub halves: [bool; 4],
    /// Whether L is a multiple of two tiles.
    pub whole: bool,
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
}

/// How the states of the cube's channels are spread over its units, and where numbers lie in shared
/// memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Layout {
    /// States of a unit: four or two.
    pub own: usize,
    /// Whether units that read or write outputs together meet in no bank, which takes more room.
    pub spaced: bool,
}

impl Layout {
    /// Units that share a channel.
    pub const fn shares(&self) -> usize {
        STATES / self.own
    }

    /// Channels of a cube.
    pub const fn channels(&self) -> usize {
        UNITS / self.shares()
    }

    /// Channels of a plane.
    pub const fn plane_channels(&self) -> usize {
        PLANE / self.shares()
    }

    /// Positions of a tile.
    pub const fn tile(&self) -> usize {
        4 * self.shares()
    }

    /// Positions of a tile whose B and C a unit makes ready.
    pub const fn bc_rows(&self) -> usize {
        self.tile() * STATES / 2 / UNITS
    }

    /// From two positions' steps to the next two's, in vectors of a channel's two steps. One place is
    /// left free after eight channels.
    pub const fn step_row(&self) -> usize {
        (self.channels() + self.channels() / 8 + 5) / 8 * 8 + 2
    }

    /// Positions that the recurrence fetches from shared memory at once. A processor that has only one
    /// cube finds work for its units while they wait in a longer piece of the program.
    pub const fn group(&self) -> usize {
        16 / self.own / self.own * 2
    }

    /// From a position's outputs to the next one's.
    pub const fn pitch(&self) -> usize {
        self.channels() + if self.spaced { 8 } else { 0 }
    }

    /// From a share's outputs to the next one's.
    pub const fn share_pitch(&self) -> usize {
        self.tile() * self.pitch() + if self.spaced { self.plane_channels() } else { 0 }
    }

    /// Numbers of [`Room`].
    const fn room(&self) -> [usize; 3] {
        [
            self.tile() * self.step_row() * 4,
            2 * self.tile() * 2 * STATES,
            2 * self.shares() * self.share_pitch(),
        ]
    }

    /// Bytes of shared memory.
    pub const fn shared_bytes(&self) -> usize {
        let [steps, bc, sums] = self.room();
        4 * (steps + bc + sums)
    }
}

/// The cube's shared memory.
#[derive(CubeType)]
struct Room {
    /// Steps, as the decays see them and times u, of two tiles.
    steps: Shared<[One]>,
    /// With four states a unit, these of B and these of C by turns, in odd positions the other way
    /// round; with two, both side by side.
    bc: Shared<[One]>,
    /// Every share's outputs of two tiles.
    sums: Shared<[One]>,
}

/// What the recurrence needs of two groups of positions, the even one first.
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
    let count = comptime!(c.layout.group());
    let first = comptime!(parity * c.layout.tile() + group * count);
    #[unroll]
    for i in 0..comptime!(count / 2) {
        let at = comptime!((first / 2 + i) * c.layout.step_row()) + lane + lane / 8;
        groups.steps[comptime!(group % 2 * (count / 2) + i)] =
            wide_at::<Const<4>>(&mut room.steps, at, c.ptx);
    }
    #[unroll]
    for i in 0..count {
        let row = comptime!(first + i);
        let slot = comptime!(group % 2 * count + i);
        if comptime!(c.layout.own == 4) {
            let at = comptime!(row * STATES / 2) + share * 2;
            groups.b[slot] = wide_at::<Const<4>>(&mut room.bc, at + comptime!(row % 2), c.ptx);
            if outputs {
                let at = at + comptime!(1 - row % 2);
                groups.c[slot] = wide_at::<Const<4>>(&mut room.bc, at, c.ptx);
            }
        } else {
            let at = comptime!(row * STATES / 2) + share;
            groups.b[slot] = wide_at::<Const<4>>(&mut room.bc, at, c.ptx);
        }
    }
}

/// B, or C, of the unit's state number `k`.
#[cube]
fn of_state(
    groups: &Groups,
    #[comptime] slot: usize,
    #[comptime] k: usize,
    #[comptime] outputs: bool,
    #[comptime] c: WalkConfig,
) -> f32 {
    if comptime!(c.layout.own == 2) {
        let both = groups.b[slot];
        both.extract(comptime!(2 * outputs as usize + k))
    } else if outputs {
        let cs = groups.c[slot];
        cs.extract(k)
    } else {
        let bs = groups.b[slot];
        bs.extract(k)
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
    let count = comptime!(c.layout.group());
    let mut sums = Array::<f32>::new(count);
    #[unroll]
    for i in 0..count {
        let slot = comptime!(group % 2 * count + i);
        let two = groups.steps[comptime!(slot / 2)];
        let dt = two.extract(comptime!(i % 2 * 2));
        let x = two.extract(comptime!(i % 2 * 2 + 1));
        #[unroll]
        for k in 0..comptime!(c.layout.own) {
            let b = of_state(groups, slot, k, false, c);
            h[k] = fma(exp2(dt * rates[k], c.ptx), h[k], x * b);
        }
        if outputs {
            let mut sum = h[0] * of_state(groups, slot, 0usize, true, c);
            #[unroll]
            for k in 1..comptime!(c.layout.own) {
                sum = fma(h[k], of_state(groups, slot, k, true, c), sum);
            }
            sums[i] = sum;
        }
    }
    if outputs {
        let first = comptime!(parity * c.layout.shares() * c.layout.share_pitch());
        #[unroll]
        for i in 0..count {
            let at = comptime!(first + (group * count + i) * c.layout.pitch())
                + share * comptime!(c.layout.share_pitch())
                + lane;
            room.sums[at] = One::new(sums[i]);
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

/// Makes the tile from position `t0` on, which is of the given parity, ready for the recurrence.
#[cube]
fn prepare<SU: Size, SD: Size, SP: Size, SZ: Size>(
    ahead: &Ahead<SU, SD, SP, SZ>,
    room: &mut Room,
    us: &mut Array<f32>,
    passed: &mut Array<f32>,
    parameters: &Parameters,
    part: &Part,
    t0: usize,
    #[comptime] parity: usize,
    #[comptime] cleared: bool,
    #[comptime] outputs: bool,
    #[comptime] config: WalkConfig,
) {
    #[unroll]
    for i in 0..4usize {
        stage(
            ahead,
            &mut room.steps,
            us,
            passed,
            parameters,
            part,
            t0,
            i,
            parity,
            cleared,
            outputs,
            config,
        );
    }
    stage_bc(ahead, &mut room.bc, part, parity, outputs, config);
}

/// Loads before this begin before anything after it. Without, the compiler begins them last, and whoever
/// waits for earlier loads waits for them too: they share what tells that they have come.
#[cube]
fn begin_loads(#[comptime] c: WalkConfig) {
    if comptime!(c.ptx) {
        sync_plane();
    }
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
    let tile = comptime!(config.layout.tile());
    let own = comptime!(config.layout.own);
    let mut ahead = nothing_ahead::<SU, SD, SP, SZ>(config);
    let mut us = Array::<f32>::new(8usize);
    let group = comptime!(config.layout.group());
    let mut groups = Groups {
        steps: Array::new(group),
        b: Array::new(comptime!(2 * group)),
        c: Array::new(comptime!(2 * group)),
    };
    #[unroll]
    for i in 0..8usize {
        us[i] = 0.0f32;
    }

    // Tile 0 is ready, and tile 1 on its way.
    let zero = 0usize.runtime();
    read(
        &mut ahead, u, delta, b, c, resets, part, zero, 0usize, outputs, config,
    );
    prepare(
        &ahead, room, &mut us, passed, parameters, part, zero, 0usize, cleared, outputs, config,
    );
    let t1 = tile.runtime();
    read(
        &mut ahead, u, delta, b, c, resets, part, t1, 1usize, outputs, config,
    );
    if outputs {
        read_gates(&mut ahead, z, part, zero, 0usize, config);
    }
    sync_cube();

    let pairs = walker.count.div_ceil(comptime!(2 * tile));
    let last = comptime!(tile / group - 1);
    for pair in 0..pairs {
        #[unroll]
        for parity in 0..2usize {
            let other = comptime!(1 - parity);
            let t0 = pair * comptime!(2 * tile) + comptime!(parity * tile);
            // Memory may take longer to answer than a tile does.
            let t2 = t0 + comptime!(2 * tile);
            read(
                &mut ahead, u, delta, b, c, resets, part, t2, parity, outputs, config,
            );
            if outputs {
                if comptime!(parity == 0 || config.chunk % (2 * tile) != 0) {
                    let t = walker.from + t0;
                    if t0 < walker.count && t % comptime!(config.chunk) == 0 {
                        let row = walker.place.batch * walker.chunks + t / comptime!(config.chunk);
                        store_states(saved, &*h, row, &walker.place, states, walker.inner, own);
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
            if outputs {
                let sums = gather(&mut room.sums, part, other, config);
                let mut out = V4::new(0.0f32);
                #[unroll]
                for i in 0..4usize {
                    let value = finish(&ahead, &sums, &us, parameters, i, other, gated, config);
                    out.insert(i, value);
                }
                write::<Y>(out, y, part, t0 - tile);
                read_gates(&mut ahead, z, part, t0 + tile, other, config);
            }
            begin_loads(config);
            #[unroll]
            for number in 0..comptime!(tile / group) {
                if comptime!(number == last) {
                    let next = t0 + tile;
                    prepare(
                        &ahead, room, &mut us, passed, parameters, part, next, other, cleared,
                        outputs, config,
                    );
                }
                // The next group's numbers are on their way meanwhile.
                if comptime!(number < last) {
                    let next = comptime!(number + 1);
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
                    &groups, h, rates, room, lane, share, parity, number, outputs, config,
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
        write::<Y>(out, y, part, pairs * comptime!(2 * tile) - tile);
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
    let layout = comptime!(config.layout);
    let own = comptime!(layout.own);
    let blocks = inner.div_ceil(comptime!(layout.channels()));
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
    let part = part(
        block,
        sequence * length + from,
        count,
        inner,
        strides,
        layout,
    );
    let unit = UNIT_POS as usize;
    // Shared memory answers twice as fast where units 0 and 1, 2 and 3 and so on ask for the same, as they
    // do for steps, or units 0 and 2, 1 and 3, as for B and C.
    let channels = comptime!(layout.plane_channels());
    let lane = unit / 2 % channels + unit / PLANE * channels;
    let share = unit % 2 + unit / comptime!(2 * channels) % comptime!(layout.shares() / 2) * 2;
    let channel = block * comptime!(layout.channels()) + lane;
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
    let [steps_room, bc_room, sums_room] = comptime!(layout.room());
    let mut room = Room {
        steps: Shared::new_aligned_slice(steps_room, 16usize),
        bc: Shared::new_aligned_slice(bc_room, 16usize),
        sums: Shared::new_aligned_slice(sums_room, 16usize),
    };
    let states = comptime!(STATES).runtime();
    let place = &walker.place;
    let mut rates = Array::<f32>::new(own);
    load_rates(
        a,
        &mut rates,
        place.channel,
        share,
        states,
        0usize,
        comptime!(resets.is_some()),
        own,
    );
    let mut h = Array::<f32>::new(own);
    let row0 = sequence * (segments - 1);
    if comptime!(config.pass == Pass::Outputs) {
        enter(
            ends, steps, &mut h, &rates, row0, number, place, inner, config,
        );
    } else {
        load_initial(initial, &mut h, place, states, inner, own);
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
            for k in 0..own {
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
            store_steps(
                &passed, &mut room, steps, row, &part, place, lane, inner, layout,
            );
        }
        store_states(ends, &h, row, place, states, inner, own);
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
            store_last(last, &h, place, states, inner, own);
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
    let own = comptime!(config.layout.own);
    let mut end = Array::<f32>::new(own);
    #[unroll]
    for k in 0..own {
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
            own,
        );
        // The first segment's end is of its true initial state.
        let sum = steps[row * inner + place.channel];
        let keeps = i > 0 && sum < CLEARED;
        #[unroll]
        for k in 0..own {
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
    #[comptime] layout: Layout,
) {
    let (tile, channels) = comptime!((layout.tile(), layout.channels()));
    #[unroll]
    for i in 0..4usize {
        let at = part.position * channels + part.column + i;
        room.sums[at] = One::new(passed[i]);
    }
    sync_cube();
    let mut of_positions = Array::<f32>::new(tile);
    #[unroll]
    for i in 0..tile {
        of_positions[i] = room.sums[comptime!(i * channels) + lane].extract(0usize);
    }
    let sum = min(tree_sum(&mut of_positions, tile), CLEARED);
    if place.inside && place.lane == 0 {
        steps[row * inner + place.channel] = sum;
    }
}
