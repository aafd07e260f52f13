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

use super::common::{
    CLEARED, Place, V2, V4, entry, load_initial, load_rates, store_last, store_states,
};
use crate::cube::OptionalInput;
use crate::cube::math::{exp2, sigmoid, step_size};
use crate::cube::reduce::tree_sum;
use crate::cube::words::{Words, number};

/// Positions of a tile.
pub(super) const TILE: usize = 16;
/// Channels of a cube.
pub(super) const CHANNELS: usize = 32;
/// States of a unit.
const OWN: usize = 4;
/// Units that share a channel.
const SHARES: usize = 4;
/// States of a channel.
pub(super) const STATES: usize = OWN * SHARES;
/// Units of a cube. Each has one position and four channels of a tile, element-wise.
pub(super) const UNITS: usize = CHANNELS * SHARES;

/// Positions that the recurrence fetches from shared memory at once.
const GROUP: usize = 4;
/// From a channel's steps to the next one's, in positions: vectors of two positions are aligned, and
/// those of neighbouring channels in other banks.
const STEP_PITCH: usize = TILE + 2;

/// A number of shared memory that is written and read as vectors of several widths.
type One = Vector<f32, Const<1>>;

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

/// What a unit works on, element-wise.
#[derive(CubeType)]
struct Part {
    /// The sequence's first position, in all of them.
    first: usize,
    length: usize,
    /// The unit's position within a tile.
    position: usize,
    /// Its first channel within the cube.
    column: usize,
    /// Its four channels, counted in fours; the last four for units beyond them.
    four: usize,
    inside: bool,
    /// The position of its two numbers of B and of C within a tile, and their number there.
    row: usize,
    pair: usize,
}

#[cube]
fn part(block: usize, sequence: usize, length: usize, inner: usize) -> Part {
    let unit = UNIT_POS as usize;
    // So that neither loads and stores of shared memory nor those of global memory meet in a bank or
    // touch more lines than need be: of 8 neighbouring units two have the same position.
    let column = (unit % 2 + unit / 16 % 4 * 2) * 4;
    let channel = block * CHANNELS + column;
    Part {
        first: sequence * length,
        length,
        position: unit / 2 % 8 + unit / 64 * 8,
        column,
        four: min(channel, inner - 4) / 4,
        inside: channel < inner,
        row: unit / 8,
        pair: unit % 8,
    }
}

/// Inputs on their way: of u and z those of tiles k - 1 to k + 2, of the others tiles k + 1 and k + 2.
#[derive(CubeType)]
struct Ahead<SU: Size, SD: Size, SP: Size, SZ: Size> {
    u: Array<Words<SU>>,
    z: Array<Words<SZ>>,
    delta: Array<Words<SD>>,
    b: Array<Words<SP>>,
    c: Array<Words<SP>>,
    resets: Array<f32>,
}

/// Reads the unit's part of the tile from position `t0` on, or of the last position beyond the end,
/// into the places of tile k + 1, or of tile k + 2 if `late`.
#[cube]
fn read<SU: Size, SD: Size, SP: Size, SZ: Size>(
    ahead: &mut Ahead<SU, SD, SP, SZ>,
    u: &[Words<SU>],
    delta: &[Words<SD>],
    b: &[Words<SP>],
    c: &[Words<SP>],
    z: &ComptimeOption<Box<[Words<SZ>]>>,
    resets: &OptionalInput,
    part: &Part,
    t0: usize,
    fours: usize,
    b_twos: usize,
    c_twos: usize,
    z_fours: usize,
    #[comptime] late: bool,
) {
    let slot = comptime!(late as usize);
    let at = part.first + min(t0 + part.position, part.length - 1);
    ahead.u[comptime!(slot + 2)] = u[at * fours + part.four];
    ahead.delta[slot] = delta[at * fours + part.four];
    #[comptime]
    match z {
        ComptimeOption::Some(z) => ahead.z[comptime!(slot + 2)] = z[at * z_fours + part.four],
        ComptimeOption::None => {}
    }
    #[comptime]
    match resets {
        ComptimeOption::Some(resets) => ahead.resets[slot] = resets[at],
        ComptimeOption::None => {}
    }
    let at = part.first + min(t0 + part.row, part.length - 1);
    ahead.b[slot] = b[at * b_twos + part.pair];
    ahead.c[slot] = c[at * c_twos + part.pair];
}

/// Every tile becomes the one before.
#[cube]
fn shift<SU: Size, SD: Size, SP: Size, SZ: Size>(
    ahead: &mut Ahead<SU, SD, SP, SZ>,
    #[comptime] gated: bool,
    #[comptime] resets: bool,
) {
    #[unroll]
    for i in 0..3usize {
        ahead.u[i] = ahead.u[comptime!(i + 1)];
        if gated {
            ahead.z[i] = ahead.z[comptime!(i + 1)];
        }
    }
    ahead.delta[0] = ahead.delta[1];
    ahead.b[0] = ahead.b[1];
    ahead.c[0] = ahead.c[1];
    if resets {
        ahead.resets[0] = ahead.resets[1];
    }
}

/// The unit's four channels of the parameters.
#[derive(CubeType)]
struct Parameters {
    bias: Array<f32>,
    skip: Array<f32>,
}

#[cube]
fn parameters(bias: &OptionalInput, d: &OptionalInput, part: &Part) -> Parameters {
    let mut biases = Array::<f32>::new(4usize);
    let mut skips = Array::<f32>::new(4usize);
    #[unroll]
    for i in 0..4usize {
        biases[i] = entry(bias, part.four * 4 + i, 0.0f32);
        skips[i] = entry(d, part.four * 4 + i, 0.0f32);
    }
    Parameters {
        bias: biases,
        skip: skips,
    }
}

/// The unit's part of tile k + 1 as the recurrence takes it.
#[derive(CubeType)]
struct Ready<SP: Size> {
    /// Step sizes of four channels as the decays see them, and times u.
    steps: Array<f32>,
    xs: Array<f32>,
    b: Words<SP>,
    c: Words<SP>,
}

/// Makes the tile from position `t0` on ready.
#[cube]
fn stage<SU: Size, SD: Size, SP: Size, SZ: Size>(
    ahead: &Ahead<SU, SD, SP, SZ>,
    parameters: &Parameters,
    part: &Part,
    t0: usize,
    #[comptime] resets: bool,
    #[comptime] c: WalkConfig,
) -> Ready<SP> {
    let mut steps = Array::<f32>::new(4usize);
    let mut xs = Array::<f32>::new(4usize);
    let inside = t0 + part.position < part.length;
    let mut clear = 0.0f32;
    if resets {
        let mut reset = ahead.resets[0] > 0.5f32;
        if comptime!(!c.whole) {
            reset = reset && inside;
        }
        clear = select(reset, CLEARED, 0.0f32);
    }
    #[unroll]
    for i in 0..4usize {
        let delta = number::<SD>(ahead.delta[0], i, comptime!(c.halves[1]));
        let mut dt = step_size(delta + parameters.bias[i], c.softplus, c.ptx);
        if comptime!(!c.whole) {
            // A position beyond the last leaves the state as it is.
            dt = select(inside, dt, 0.0f32);
        }
        xs[i] = dt * number::<SU>(ahead.u[2], i, comptime!(c.halves[0]));
        steps[i] = if resets { dt + clear } else { dt };
    }
    Ready::<SP> {
        steps,
        xs,
        b: ahead.b[0],
        c: ahead.c[0],
    }
}

/// Writes what is ready into the tile of the given parity.
#[cube]
fn put<SP: Size>(
    ready: &Ready<SP>,
    steps: &mut Shared<[One]>,
    bc: &mut Shared<[One]>,
    part: &Part,
    #[comptime] parity: usize,
    #[comptime] c: WalkConfig,
) {
    #[unroll]
    for i in 0..4usize {
        let at = comptime!(parity * CHANNELS * STEP_PITCH)
            + (part.column + i) * STEP_PITCH
            + part.position;
        put_two(steps, at, ready.steps[i], ready.xs[i], c.ptx);
    }
    let at =
        comptime!(parity * TILE * STATES) + part.row * STATES + part.pair / 2 * 4 + part.pair % 2;
    let halves = comptime!(c.halves[2]);
    let (b0, b1) = (
        number::<SP>(ready.b, 0usize, halves),
        number::<SP>(ready.b, 1usize, halves),
    );
    put_two(bc, at, b0, b1, c.ptx);
    let (c0, c1) = (
        number::<SP>(ready.c, 0usize, halves),
        number::<SP>(ready.c, 1usize, halves),
    );
    put_two(bc, at + 2, c0, c1, c.ptx);
}

/// Pair number `at` of a buffer.
#[cube]
fn put_two(buffer: &mut Shared<[One]>, at: usize, first: f32, second: f32, #[comptime] ptx: bool) {
    if ptx {
        let mut two = V2::new(first);
        two.insert(1usize, second);
        buffer.with_vector_size_mut::<Const<2>>()[at] = two;
    } else {
        buffer[2 * at] = One::new(first);
        buffer[2 * at + 1] = One::new(second);
    }
}

/// Four numbers, the fours counted from the buffer's start.
#[cube]
fn four_at(buffer: &Shared<[One]>, at: usize, #[comptime] ptx: bool) -> V4 {
    let mut four = V4::new(0.0f32);
    if ptx {
        four = buffer.with_vector_size::<Const<4>>()[at];
    } else {
        // Not every target can see a buffer as one of wider vectors.
        #[unroll]
        for i in 0..4usize {
            four.insert(i, buffer[4 * at + i].extract(0usize));
        }
    }
    four
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
    steps: &Shared<[One]>,
    bc: &Shared<[One]>,
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
        groups.steps[comptime!(group % 2 * (GROUP / 2) + i)] = four_at(steps, at, c.ptx);
    }
    #[unroll]
    for i in 0..GROUP {
        let row = comptime!(parity * TILE + group * GROUP + i);
        let at = comptime!(row * 2 * SHARES) + share * 2;
        groups.b[comptime!(group % 2 * GROUP + i)] = four_at(bc, at, c.ptx);
        groups.c[comptime!(group % 2 * GROUP + i)] = four_at(bc, at + 1, c.ptx);
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

/// Completes the outputs of the tile from position `t0` on, which is tile k - 1. Of a tile beyond
/// either end nothing is written.
#[cube]
fn finish<Y: Float, SU: Size, SD: Size, SP: Size, SZ: Size>(
    ahead: &Ahead<SU, SD, SP, SZ>,
    sums: &Shared<[One]>,
    parameters: &Parameters,
    y: &mut [Vector<Y, Const<4>>],
    part: &Part,
    t0: usize,
    fours: usize,
    #[comptime] gated: bool,
    #[comptime] parity: usize,
    #[comptime] c: WalkConfig,
) {
    let mut shares = Array::<V4>::new(SHARES);
    #[unroll]
    for i in 0..SHARES {
        let at = comptime!((parity * SHARES + i) * TILE * c.pitch / 4)
            + part.position * comptime!(c.pitch / 4)
            + part.column / 4;
        shares[i] = four_at(sums, at, c.ptx);
    }
    let mut out = V4::new(0.0f32);
    #[unroll]
    for i in 0..4usize {
        let mut of_shares = Array::<f32>::new(SHARES);
        #[unroll]
        for k in 0..SHARES {
            of_shares[k] = shares[k].extract(i);
        }
        let sum = tree_sum(&mut of_shares, SHARES);
        let u = number::<SU>(ahead.u[0], i, comptime!(c.halves[0]));
        let mut value = fma(parameters.skip[i], u, sum);
        if gated {
            let z = number::<SZ>(ahead.z[0], i, comptime!(c.halves[3]));
            value = value * z * sigmoid(z, c.ptx);
        }
        out.insert(i, value);
    }
    let t = t0 + part.position;
    if part.inside && t < part.length {
        y[(part.first + t) * fours + part.four] = Vector::cast_from(out);
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
    let fours = inner / 4;
    let chunks = length.div_ceil(comptime!(config.chunk));
    let part = part(block, sequence, length, inner);
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
    let mut ahead = Ahead::<SU, SD, SP, SZ> {
        u: Array::new(4usize),
        z: Array::new(4usize),
        delta: Array::new(2usize),
        b: Array::new(2usize),
        c: Array::new(2usize),
        resets: Array::new(2usize),
    };
    let mut groups = Groups {
        steps: Array::new(GROUP),
        b: Array::new(comptime!(2 * GROUP)),
        c: Array::new(comptime!(2 * GROUP)),
    };
    #[unroll]
    for i in 0..2usize {
        ahead.u[i] = Words::<SU>::new(0u32);
        ahead.z[i] = Words::<SZ>::new(0u32);
    }

    // Tile 0 is ready, and tile 1 on its way.
    let zero = 0usize.runtime();
    read(
        &mut ahead, u, delta, b, c, z, resets, &part, zero, fours, b_twos, c_twos, z_fours, false,
    );
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
        fours,
        b_twos,
        c_twos,
        z_fours,
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
                fours,
                b_twos,
                c_twos,
                z_fours,
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
                &steps,
                &bc,
                lane,
                share,
                parity,
                0usize,
                config,
            );
            finish::<Y, SU, SD, SP, SZ>(
                &ahead,
                &sums,
                &parameters,
                y,
                &part,
                t0 - TILE,
                fours,
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
                        &steps,
                        &bc,
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
        &sums,
        &parameters,
        y,
        &part,
        pairs * comptime!(2 * TILE) - TILE,
        fours,
        gated,
        1usize,
        config,
    );
    store_last(last, &h, &place, states, inner, OWN);
}
