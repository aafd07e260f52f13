//! Forward in one pass, for enough channels: a cube's units share the states of its channels.
//!
//! In the recurrence a unit has four states of a channel, and neighbouring units neighbouring
//! channels. All that does not belong to a state (step sizes before it, sums, skip connection and gate
//! after it) is done once a position and channel, by all units of the cube, with four neighbouring
//! channels of one position each. The two sides meet in shared memory, tile after tile of [`TILE`]
//! positions, two tiles of each kind: while the recurrence goes through tile k, the units complete the
//! outputs of tile k - 1, make tile k + 1 ready, and wait for the loads of tile k + 2. So there is one
//! barrier a tile.
//!
//! Results have the bits of [`outputs`](super::forward::outputs): the same operations in the same
//! order.

use cubecl::ir::ElemType;
use cubecl::prelude::*;

use super::common::{Place, V4, load_initial, load_rates, store_last, store_states};
use super::walk_parts::{
    Strides, finish, nothing_ahead, parameters, part, put, read, shift, stage,
};
use crate::cube::OptionalInput;
use crate::cube::math::exp2;
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
const GROUP: usize = 4;
/// From a channel's steps to the next one's, in positions: vectors of two positions are aligned, and
/// those of neighbouring channels in other banks.
pub(super) const STEP_PITCH: usize = TILE + 2;

/// Compile-time switches.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct WalkConfig {
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
}

/// Bytes of shared memory for a pitch of partial sums.
pub(super) const fn shared_bytes(pitch: usize) -> usize {
    4 * (2 * CHANNELS * STEP_PITCH * 2 + 2 * TILE * 2 * STATES + 2 * SHARES * TILE * pitch)
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
    steps: &mut Shared<[One]>,
    bc: &mut Shared<[One]>,
    lane: usize,
    share: usize,
    #[comptime] parity: usize,
    #[comptime] group: usize,
    #[comptime] c: WalkConfig,
) {
    #[unroll]
    for i in 0..comptime!(GROUP / 2) {
        let at = comptime!(parity * CHANNELS * STEP_PITCH / 2 + group * GROUP / 2 + i)
            + lane * comptime!(STEP_PITCH / 2);
        groups.steps[comptime!(group % 2 * (GROUP / 2) + i)] =
            wide_at::<Const<4>>(steps, at, c.ptx);
    }
    #[unroll]
    for i in 0..GROUP {
        let row = comptime!(parity * TILE + group * GROUP + i);
        let at = comptime!(row * 2 * SHARES) + share * 2;
        groups.b[comptime!(group % 2 * GROUP + i)] = wide_at::<Const<4>>(bc, at, c.ptx);
        groups.c[comptime!(group % 2 * GROUP + i)] = wide_at::<Const<4>>(bc, at + 1, c.ptx);
    }
}

/// The unit's states pass the positions of a group; its share of their outputs goes to `sums`.
#[cube]
fn advance(
    groups: &Groups,
    h: &mut Array<f32>,
    rates: &Array<f32>,
    sums: &mut Shared<[One]>,
    lane: usize,
    share: usize,
    #[comptime] parity: usize,
    #[comptime] group: usize,
    #[comptime] c: WalkConfig,
) {
    #[unroll]
    for i in 0..GROUP {
        let two = groups.steps[comptime!(group % 2 * (GROUP / 2) + i / 2)];
        let dt = two.extract(comptime!(i % 2 * 2));
        let x = two.extract(comptime!(i % 2 * 2 + 1));
        let bs = groups.b[comptime!(group % 2 * GROUP + i)];
        let cs = groups.c[comptime!(group % 2 * GROUP + i)];
        #[unroll]
        for k in 0..OWN {
            h[k] = fma(exp2(dt * rates[k], c.ptx), h[k], x * bs.extract(k));
        }
        let mut sum = h[0] * cs.extract(0usize);
        #[unroll]
        for k in 1..OWN {
            sum = fma(h[k], cs.extract(k), sum);
        }
        let row = comptime!(parity * SHARES * TILE + group * GROUP + i);
        let at = comptime!(row * c.pitch) + share * comptime!(TILE * c.pitch) + lane;
        sums[at] = One::new(sum);
    }
}

/// The outputs of every sequence from its initial state on, the states that enter its chunks and the
/// last state. Strides of B and C are counted in twos, that of z in fours.
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
    let blocks = inner.div_ceil(CHANNELS);
    let block = CUBE_POS % blocks;
    let sequence = CUBE_POS / blocks;
    if sequence >= batch {
        terminate!();
    }
    let gated = comptime!(z.is_some());
    let cleared = comptime!(resets.is_some());
    let chunks = length.div_ceil(comptime!(config.chunk));
    let strides = Strides {
        fours: inner / 4,
        z_fours,
        b_twos,
        c_twos,
    };
    let part = part(block, sequence, length, inner, strides);
    let lane = UNIT_POS as usize % CHANNELS;
    let share = UNIT_POS as usize / CHANNELS;
    let channel = block * CHANNELS + lane;
    let place = Place {
        batch: sequence,
        chunk: 0usize.runtime(),
        lane: share,
        channel: min(channel, inner - 1),
        inside: channel < inner,
    };

    let mut steps =
        Shared::<[One]>::new_aligned_slice(comptime!(2 * CHANNELS * STEP_PITCH * 2), 16usize);
    let mut bc = Shared::<[One]>::new_aligned_slice(comptime!(2 * TILE * 2 * STATES), 16usize);
    let mut sums =
        Shared::<[One]>::new_aligned_slice(comptime!(2 * SHARES * TILE * config.pitch), 16usize);
    let mut rates = Array::<f32>::new(OWN);
    let mut h = Array::<f32>::new(OWN);
    let states = comptime!(STATES).runtime();
    load_rates(
        a,
        &mut rates,
        place.channel,
        share,
        states,
        0usize,
        cleared,
        OWN,
    );
    load_initial(initial, &mut h, &place, states, inner, OWN);
    let parameters = parameters(bias, d, &part);
    let mut ahead = nothing_ahead::<SU, SD, SP, SZ>();
    let mut groups = Groups {
        steps: Array::new(GROUP),
        b: Array::new(comptime!(2 * GROUP)),
        c: Array::new(comptime!(2 * GROUP)),
    };

    // Tile 0 is ready, and tile 1 on its way.
    let zero = 0usize.runtime();
    read(&mut ahead, u, delta, b, c, z, resets, &part, zero, false);
    let ready = stage(&ahead, &parameters, &part, zero, cleared, config);
    put(&ready, &mut steps, &mut bc, &part, 0usize, config);
    read(
        &mut ahead,
        u,
        delta,
        b,
        c,
        z,
        resets,
        &part,
        comptime!(TILE).runtime(),
        true,
    );
    shift(&mut ahead, gated, cleared);
    sync_cube();

    let pairs = length.div_ceil(comptime!(2 * TILE));
    for pair in 0..pairs {
        #[unroll]
        for parity in 0..2usize {
            let other = comptime!(1 - parity);
            let t0 = pair * comptime!(2 * TILE) + comptime!(parity * TILE);
            read(
                &mut ahead,
                u,
                delta,
                b,
                c,
                z,
                resets,
                &part,
                t0 + comptime!(2 * TILE),
                true,
            );
            if comptime!(parity == 0) {
                if t0 % comptime!(config.chunk) == 0 {
                    let row = sequence * chunks + t0 / comptime!(config.chunk);
                    store_states(saved, &h, row, &place, states, inner, OWN);
                }
            }
            fetch(
                &mut groups,
                &mut steps,
                &mut bc,
                lane,
                share,
                parity,
                0usize,
                config,
            );
            finish::<Y, SU, SD, SP, SZ>(
                &ahead,
                &mut sums,
                &parameters,
                y,
                &part,
                t0 - TILE,
                gated,
                other,
                config,
            );
            let ready = stage(&ahead, &parameters, &part, t0 + TILE, cleared, config);
            #[unroll]
            for group in 0..comptime!(TILE / GROUP) {
                // The next group's numbers are on their way meanwhile.
                if comptime!(group + 1 < TILE / GROUP) {
                    fetch(
                        &mut groups,
                        &mut steps,
                        &mut bc,
                        lane,
                        share,
                        parity,
                        comptime!(group + 1),
                        config,
                    );
                }
                advance(
                    &groups, &mut h, &rates, &mut sums, lane, share, parity, group, config,
                );
            }
            put(&ready, &mut steps, &mut bc, &part, other, config);
            shift(&mut ahead, gated, cleared);
            sync_cube();
        }
    }
    finish::<Y, SU, SD, SP, SZ>(
        &ahead,
        &mut sums,
        &parameters,
        y,
        &part,
        pairs * comptime!(2 * TILE) - TILE,
        gated,
        1usize,
        config,
    );
    store_last(last, &h, &place, states, inner, OWN);
}
