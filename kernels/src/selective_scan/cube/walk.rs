//! Forward in one pass: a cube's units share the states of its channels.
//!
//! Half of its units, the *walkers*, go through the recurrence. Each has four states of a channel, its
//! *share*, or two where there are too few channels to fill the device with fours. All that does not belong
//! to a state (step sizes before it, sums, skip connection and gate after it) is done once a position and
//! channel, by the other half, the *servers*, with four neighbouring channels of one position each. The two
//! sides meet in shared memory, tile after tile of positions, two tiles of each kind: while the walkers go
//! through tile k, the servers complete the outputs of tile k - 1 and make tile k + 1 ready, and the loads
//! of tile k + 2 are on their way. So there is one barrier a tile.
//!
//! A walker waits at every position for the one before, and for exponentials, and a scheduler has only one
//! or two planes of them. With both kinds of work in the same units, schedulers stood idle more than half of
//! the time: the compiler keeps the element-wise work together, between groups of positions.
//!
//! What a processor's shared memory can deliver is the next bound, so units are laid out for few of its
//! cycles: a plane's have all shares of its channels.
//!
//! Four states a unit give the bits of [`outputs`](super::forward::outputs): the same operations in the same
//! order. Backward has the bits of their outputs, from the saved states; those of two states a unit it has
//! to rounding, since these add up in another order.

use cubecl::ir::ElemType;
use cubecl::prelude::*;

use super::common::{Place, V4, load_initial, load_rates, store_last, store_states};
use super::walk_layout::{Layout, PLANE, Room, STATES, WalkConfig};
use super::walk_servers::{
    Parameters, Part, Strides, closing, complete, nothing_ahead, parameters, part, prepare, read,
    read_gates,
};
use crate::cube::OptionalInput;
use crate::cube::math::exp2;
use crate::cube::wide::{One, wide_at};
use crate::cube::words::Words;

/// What the recurrence needs of two groups of positions, the even one first.
#[derive(CubeType)]
struct Groups {
    /// Two positions a vector: each one's step as the decays see it, and step times u.
    steps: Array<V4>,
    b: Array<V4>,
    c: Array<V4>,
}

/// Where a walker's numbers of a tile begin in shared memory: steps and B and C in fours.
#[derive(CubeType)]
struct Corner {
    steps: usize,
    bc: usize,
    sums: usize,
}

/// Given the unit's channel and share within the cube.
#[cube]
fn corner(lane: usize, share: usize, #[comptime] config: WalkConfig) -> Corner {
    let layout = comptime!(config.layout);
    let pitch = comptime!(layout.share_pitch());
    Corner {
        steps: fresh(lane + lane / 8, config),
        bc: fresh(share * comptime!(layout.own / 2), config),
        sums: fresh(share * pitch + lane, config),
    }
}

/// A place in a tile's shared memory, as a number that the compiler knows only to be one. Else it computes
/// all places that are a constant away from each other before the loop, and holds each of them in a register
/// (168 for 104), which leaves a processor room for one cube instead of two. It has to know that sums with
/// constants stay small, or it cannot make the constants part of the loads and stores.
#[cube]
fn fresh(place: usize, #[comptime] config: WalkConfig) -> usize {
    if comptime!(config.ptx) {
        let known = place as u32;
        let it: u32;
        gpu_asm!("mov.b32 {}, {};", out(_) it, in(_) known);
        let places = comptime!(config.layout.room()[2].next_power_of_two() as u32);
        (it % places) as usize
    } else {
        place
    }
}

/// Fetches a group of the tile in the half `turn` of shared memory.
#[cube]
fn fetch(
    groups: &mut Groups,
    room: &mut Room,
    corner: &Corner,
    #[comptime] turn: usize,
    #[comptime] group: usize,
    #[comptime] c: WalkConfig,
) {
    let count = comptime!(c.layout.group());
    let [steps, bc, _] = comptime!(c.layout.room());
    #[unroll]
    for i in 0..comptime!(count / 2) {
        let row = comptime!(turn * steps / 4 + (group * count / 2 + i) * c.layout.step_row());
        groups.steps[comptime!(group % 2 * (count / 2) + i)] =
            wide_at::<Const<4>>(&mut room.steps, corner.steps + row, c.ptx);
    }
    #[unroll]
    for i in 0..count {
        let row = comptime!(group * count + i);
        let slot = comptime!(group % 2 * count + i);
        let at = corner.bc + comptime!(turn * bc / 4 + row * STATES / 2);
        if comptime!(c.layout.own == 4) {
            groups.b[slot] = wide_at::<Const<4>>(&mut room.bc, at + comptime!(row % 2), c.ptx);
            groups.c[slot] = wide_at::<Const<4>>(&mut room.bc, at + comptime!(1 - row % 2), c.ptx);
        } else {
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
    #[comptime] own: usize,
) -> f32 {
    if comptime!(own == 2) {
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

/// A walker's states pass the positions of a group; its share of their outputs goes to the cube's sums.
#[cube]
fn advance(
    groups: &Groups,
    h: &mut Array<f32>,
    rates: &Array<f32>,
    room: &mut Room,
    corner: &Corner,
    #[comptime] turn: usize,
    #[comptime] group: usize,
    #[comptime] c: WalkConfig,
) {
    let count = comptime!(c.layout.group());
    let sums_room = comptime!(c.layout.room()[2]);
    let own = comptime!(c.layout.own);
    let mut sums = Array::<f32>::new(count);
    #[unroll]
    for i in 0..count {
        let slot = comptime!(group % 2 * count + i);
        let two = groups.steps[comptime!(slot / 2)];
        let dt = two.extract(comptime!(i % 2 * 2));
        let x = two.extract(comptime!(i % 2 * 2 + 1));
        #[unroll]
        for k in 0..own {
            let b = of_state(groups, slot, k, false, own);
            h[k] = fma(exp2(dt * rates[k], c.ptx), h[k], x * b);
        }
        let mut sum = h[0] * of_state(groups, slot, 0usize, true, own);
        #[unroll]
        for k in 1..own {
            sum = fma(h[k], of_state(groups, slot, k, true, own), sum);
        }
        sums[i] = sum;
    }
    #[unroll]
    for i in 0..count {
        let row = comptime!(turn * sums_room + (group * count + i) * c.layout.pitch());
        room.sums[corner.sums + row] = One::new(sums[i]);
    }
}

/// Whether the unit is a walker.
#[cube]
fn walks(#[comptime] layout: Layout) -> bool {
    (UNIT_POS as usize) < layout.half
}

/// Where the unit's channel is, state-wise.
#[derive(CubeType)]
struct Walker {
    place: Place,
    corner: Corner,
    chunks: usize,
    inner: usize,
}

/// A walker's states pass the tile from position `t0` on, in the half `turn` of shared memory.
#[cube]
fn walk_tile(
    groups: &mut Groups,
    h: &mut Array<f32>,
    rates: &Array<f32>,
    saved: &mut [f32],
    walker: &Walker,
    room: &mut Room,
    t0: usize,
    length: usize,
    #[comptime] turn: usize,
    #[comptime] config: WalkConfig,
) {
    let corner = &walker.corner;
    let count = comptime!(config.layout.tile() / config.layout.group());
    fetch(groups, room, corner, turn, 0usize, config);
    if t0 < length && t0 % comptime!(config.chunk) == 0 {
        let row = walker.place.batch * walker.chunks + t0 / comptime!(config.chunk);
        let states = comptime!(STATES).runtime();
        let own = comptime!(config.layout.own);
        store_states(saved, &*h, row, &walker.place, states, walker.inner, own);
    }
    #[unroll]
    for group in 0..count {
        // The next group's numbers are on their way meanwhile.
        if comptime!(group + 1 < count) {
            fetch(groups, room, corner, turn, comptime!(group + 1), config);
        }
        advance(&*groups, h, rates, room, corner, turn, group, config);
    }
}

/// Loads before this begin before anything after it, and not last, where the compiler puts them. All that
/// earlier loads bring is used before: whoever waits for a load waits for the later ones too, as they share
/// what tells that they have come.
#[cube]
fn begin_loads(#[comptime] c: WalkConfig) {
    if comptime!(c.ptx) {
        sync_plane();
    }
}

/// The states `h` pass all positions.
#[cube]
fn pass<Y: Float, SU: Size, SD: Size, SP: Size, SZ: Size>(
    u: &[Words<SU>],
    delta: &[Words<SD>],
    b: &[Words<SP>],
    c: &[Words<SP>],
    z: &ComptimeOption<Box<[Words<SZ>]>>,
    resets: &OptionalInput,
    saved: &mut [f32],
    y: &mut [Vector<Y, Const<4>>],
    h: &mut Array<f32>,
    rates: &Array<f32>,
    parameters: &Parameters,
    part: &Part,
    walker: &Walker,
    room: &mut Room,
    #[comptime] config: WalkConfig,
) {
    let gated = comptime!(z.is_some());
    let cleared = comptime!(resets.is_some());
    let tile = comptime!(config.layout.tile());
    let group = comptime!(config.layout.group());
    let walks = walks(config.layout);
    let mut groups = Groups {
        steps: Array::new(group),
        b: Array::new(comptime!(2 * group)),
        c: Array::new(comptime!(2 * group)),
    };
    let mut ahead = nothing_ahead::<SU, SD, SP, SZ>(config);
    let mut us = Array::<f32>::new(8usize);
    #[unroll]
    for i in 0..8usize {
        us[i] = 0.0f32;
    }

    // Tile 0 is ready, and tile 1 on its way.
    if !walks {
        let zero = 0usize.runtime();
        read(&mut ahead, u, delta, b, c, resets, part, zero, config);
        prepare(
            &ahead, room, &mut us, parameters, part, zero, 0usize, cleared, config,
        );
        let t1 = tile.runtime();
        read(&mut ahead, u, delta, b, c, resets, part, t1, config);
    }
    sync_cube();

    let pairs = part.count.div_ceil(comptime!(2 * tile));
    for pair in 0..pairs {
        // With both turns written out, all places of shared memory are constants beside the unit's own.
        #[unroll]
        for turn in 0..2usize {
            let t0 = pair * comptime!(2 * tile) + comptime!(turn * tile);
            if walks {
                walk_tile(
                    &mut groups,
                    h,
                    rates,
                    saved,
                    walker,
                    room,
                    t0,
                    part.count,
                    turn,
                    config,
                );
            } else {
                let other = comptime!(1 - turn);
                let closing = closing(&ahead, &us, gated, config);
                prepare(
                    &ahead,
                    room,
                    &mut us,
                    parameters,
                    part,
                    t0 + tile,
                    other,
                    cleared,
                    config,
                );
                let t2 = t0 + comptime!(2 * tile);
                read(&mut ahead, u, delta, b, c, resets, part, t2, config);
                read_gates(&mut ahead, z, part, t0, config);
                begin_loads(config);
                complete::<Y>(
                    &closing,
                    y,
                    parameters,
                    part,
                    room,
                    t0 - tile,
                    other,
                    gated,
                    config,
                );
            }
            sync_cube();
        }
    }
    if !walks {
        let closing = closing(&ahead, &us, gated, config);
        let t0 = pairs * comptime!(2 * tile) - tile;
        complete::<Y>(
            &closing, y, parameters, part, room, t0, 1usize, gated, config,
        );
    }
}

/// The outputs, the states that enter chunks and the last states. Strides of B and C are counted in twos,
/// that of z in fours.
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
    y: &mut [Vector<Y, Const<4>>],
    batch: usize,
    length: usize,
    inner: usize,
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
    let sequence = CUBE_POS / blocks;
    if sequence >= batch {
        terminate!();
    }
    let strides = Strides {
        fours: inner / 4,
        z_fours,
        b_twos,
        c_twos,
    };
    let part = part(block, sequence * length, length, inner, strides, layout);
    let unit = UNIT_POS as usize % layout.half;
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
            inside: walks(layout) && channel < inner,
        },
        corner: corner(lane, share, config),
        chunks: length.div_ceil(comptime!(config.chunk)),
        inner,
    };
    let [steps_room, bc_room, sums_room] = comptime!(layout.room().map(|numbers| 2 * numbers));
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
    load_initial(initial, &mut h, place, states, inner, own);
    let parameters = parameters(bias, d, &part);
    pass::<Y, SU, SD, SP, SZ>(
        u,
        delta,
        b,
        c,
        z,
        resets,
        saved,
        y,
        &mut h,
        &rates,
        &parameters,
        &part,
        &walker,
        &mut room,
        config,
    );
    store_last(last, &h, place, states, inner, own);
}
