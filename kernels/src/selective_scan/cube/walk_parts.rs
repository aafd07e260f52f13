//! What the [one pass](super::walk) over all positions does element-wise: inputs copied ahead of their
//! use, step sizes before the recurrence, and outputs after it.

use cubecl::prelude::*;

use super::common::{CLEARED, V2, V4, entry};
use super::walk::{CHANNELS, SHARES, STATES, STEP_PITCH, SUM_PITCH, TILE, UNITS, WalkConfig};
use crate::cube::OptionalInput;
use crate::cube::math::{sigmoid, step_size};
use crate::cube::reduce::tree_sum;
use crate::cube::wide::{One, put_wide_at, wide_at};
use crate::cube::words::{Words, number};

/// A word of a buffer of words.
pub(super) type Word = Words<Const<1>>;

/// From a position to the next of u, delta and y, and of z, B and C, in fours.
#[derive(CubeType)]
pub(super) struct Strides {
    pub u: usize,
    pub z: usize,
    pub b: usize,
    pub c: usize,
}

/// What a unit works on, element-wise.
#[derive(CubeType)]
pub(super) struct Part {
    /// The first position, in all of them, and their number.
    first: usize,
    count: usize,
    /// The unit's position within a tile.
    pub position: usize,
    /// Its first channel within the cube.
    pub column: usize,
    /// Its four channels, counted in fours; the last four for units beyond them.
    four: usize,
    inside: bool,
    /// The position of its four numbers of B, or of C, within a tile, and their number there.
    row: usize,
    quarter: usize,
    of_c: bool,
    strides: Strides,
}

#[cube]
pub(super) fn part(
    block: usize,
    first: usize,
    count: usize,
    inner: usize,
    strides: Strides,
) -> Part {
    let unit = UNIT_POS as usize;
    // Eight neighbouring units have eight positions: with rows of shared memory a vector longer than
    // all banks they meet in none. A plane's loads and stores of global memory are of whole sectors.
    let column = unit / 8 % 8 * 4;
    let channel = block * CHANNELS + column;
    Part {
        first,
        count,
        position: unit % 8 + unit / 64 * 8,
        column,
        four: min(channel, inner - 4) / 4,
        inside: channel < inner,
        row: unit % 64 / 4,
        quarter: unit % 4,
        of_c: unit >= comptime!(UNITS / 2),
        strides,
    }
}

/// Position number `t`, counted from the first, in all of them; the last one for those beyond it.
#[cube]
fn at_row(part: &Part, t: usize) -> usize {
    part.first + min(t, part.count - 1)
}

/// The kinds of what is copied.
const U: usize = 0;
const DELTA: usize = 1;
const BC: usize = 2;
const Z: usize = 3;
const RESETS: usize = 4;

/// Where the unit's words of a kind are.
#[cube]
fn place(slot: usize, #[comptime] kind: usize, #[comptime] c: WalkConfig) -> usize {
    let words = comptime!(c.words[kind]);
    let before = comptime!(c.words[..kind].iter().sum::<usize>() * UNITS);
    slot * comptime!(c.slot_words()) + before + UNIT_POS as usize * words
}

fn bytes(words: usize) -> &'static str {
    match words {
        1 => "4",
        2 => "8",
        _ => "16",
    }
}

/// Starts to copy an element of some words to where they begin in the ring.
#[cube]
fn copy<E: CubePrimitive>(
    from: &[E],
    at: usize,
    ring: &mut Shared<[Word]>,
    into: usize,
    #[comptime] words: usize,
) {
    let source = from[at..at + 1].as_ptr();
    let target = ring[into..into + 1].as_ptr();
    let bytes = comptime!(bytes(words));
    gpu_asm!(
        "{{ .reg .u64 at; cvta.to.shared.u64 at, {target}; ",
        "cp.async.ca.shared.global [at], [{source}], {bytes}; }}",
        target = in(_) target, source = in(_) source,
    );
}

/// Starts to copy what [`stage`] takes of the tile from position `t0` on.
#[cube]
pub(super) fn ask<SU: Size, SD: Size, SP: Size>(
    u: &[Words<SU>],
    delta: &[Words<SD>],
    b: &[Words<SP>],
    c: &[Words<SP>],
    resets: &OptionalInput,
    ring: &mut Shared<[Word]>,
    part: &Part,
    t0: usize,
    slot: usize,
    #[comptime] outputs: bool,
    #[comptime] config: WalkConfig,
) {
    if comptime!(config.ptx) {
        let [u_words, delta_words, bc_words, _, _] = comptime!(config.words);
        let row = at_row(part, t0 + part.position);
        let at = row * part.strides.u + part.four;
        copy(u, at, ring, place(slot, U, config), u_words);
        copy(delta, at, ring, place(slot, DELTA, config), delta_words);
        #[comptime]
        match resets {
            ComptimeOption::Some(resets) => {
                copy(resets, row, ring, place(slot, RESETS, config), 1usize)
            }
            ComptimeOption::None => {}
        }
        let row = at_row(part, t0 + part.row);
        let into = place(slot, BC, config);
        if part.of_c {
            if outputs {
                let at = row * part.strides.c + part.quarter;
                copy(c, at, ring, into, bc_words);
            }
        } else {
            let at = row * part.strides.b + part.quarter;
            copy(b, at, ring, into, bc_words);
        }
    }
}

/// Starts to copy the gates of the tile from position `t0` on.
#[cube]
pub(super) fn ask_gates<SZ: Size>(
    z: &ComptimeOption<Box<[Words<SZ>]>>,
    ring: &mut Shared<[Word]>,
    part: &Part,
    t0: usize,
    slot: usize,
    #[comptime] config: WalkConfig,
) {
    #[comptime]
    match z {
        ComptimeOption::Some(z) => {
            if comptime!(config.ptx) {
                let at = at_row(part, t0 + part.position) * part.strides.z + part.four;
                let words = comptime!(config.words[Z]);
                copy(z, at, ring, place(slot, Z, config), words);
            }
        }
        ComptimeOption::None => {}
    }
}

/// Ends a group of copies.
#[cube]
pub(super) fn asked(#[comptime] config: WalkConfig) {
    if comptime!(config.ptx) {
        gpu_asm!("cp.async.commit_group;");
    }
}

/// Waits for all groups of copies but the last `but`.
#[cube]
pub(super) fn arrived(#[comptime] but: usize, #[comptime] config: WalkConfig) {
    if comptime!(config.ptx) {
        let but = comptime!(but.to_string());
        gpu_asm!("cp.async.wait_group {but};");
    }
}

/// Four numbers that were copied to the ring, or vector number `at` where nothing is copied.
#[cube]
fn take<S: Size>(
    from: &[Words<S>],
    at: usize,
    ring: &mut Shared<[Word]>,
    slot: usize,
    #[comptime] kind: usize,
    #[comptime] c: WalkConfig,
) -> V4 {
    let words = if comptime!(c.ptx) {
        ring.with_vector_size::<S>()[place(slot, kind, c) / S::value()]
    } else {
        from[at]
    };
    let mut out = V4::new(0.0f32);
    #[unroll]
    for i in 0..4usize {
        out.insert(i, number::<S>(words, i, comptime!(c.halves[kind])));
    }
    out
}

/// The unit's four channels of the parameters.
#[derive(CubeType)]
pub(super) struct Parameters {
    bias: Array<f32>,
    skip: Array<f32>,
}

#[cube]
pub(super) fn parameters(bias: &OptionalInput, d: &OptionalInput, part: &Part) -> Parameters {
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

/// The unit's inputs of a tile.
#[derive(CubeType)]
pub(super) struct Raw {
    u: V4,
    delta: V4,
    /// Four numbers of B or C.
    bc: V4,
    /// What a reset adds to the steps.
    clear: f32,
    /// Whether its position is there.
    inside: bool,
}

/// The inputs of the tile from position `t0` on.
#[cube]
pub(super) fn inputs<SU: Size, SD: Size, SP: Size>(
    u: &[Words<SU>],
    delta: &[Words<SD>],
    b: &[Words<SP>],
    c: &[Words<SP>],
    resets: &OptionalInput,
    ring: &mut Shared<[Word]>,
    part: &Part,
    t0: usize,
    slot: usize,
    #[comptime] config: WalkConfig,
) -> Raw {
    let inside = t0 + part.position < part.count;
    let row = at_row(part, t0 + part.position);
    let at = row * part.strides.u + part.four;
    let mut clear = 0.0f32;
    #[comptime]
    match resets {
        ComptimeOption::Some(resets) => {
            let flag = if comptime!(config.ptx) {
                f32::reinterpret(ring[place(slot, RESETS, config)].extract(0usize))
            } else {
                resets[row]
            };
            let mut reset = flag > 0.5f32;
            if comptime!(!config.whole) {
                reset = reset && inside;
            }
            clear = select(reset, CLEARED, 0.0f32);
        }
        ComptimeOption::None => {}
    }
    let u = take(u, at, ring, slot, U, config);
    let delta = take(delta, at, ring, slot, DELTA, config);
    let row = at_row(part, t0 + part.row);
    let at = row * part.strides.b + part.quarter;
    let mut bc = take(b, at, ring, slot, BC, config);
    if comptime!(!config.ptx) {
        if part.of_c {
            let at = row * part.strides.c + part.quarter;
            bc = take(c, at, ring, slot, BC, config);
        }
    }
    Raw {
        u,
        delta,
        bc,
        clear,
        inside,
    }
}

/// Makes the unit's channel number `i` of a tile ready for the recurrence, in the half of the given
/// parity. Its u is kept for [`finish`], its step added to `passed`.
#[cube]
pub(super) fn stage(
    raw: &Raw,
    steps: &mut Shared<[One]>,
    us: &mut Array<f32>,
    passed: &mut Array<f32>,
    parameters: &Parameters,
    part: &Part,
    #[comptime] i: usize,
    #[comptime] parity: usize,
    #[comptime] cleared: bool,
    #[comptime] outputs: bool,
    #[comptime] config: WalkConfig,
) {
    let biased = raw.delta.extract(i) + parameters.bias[i];
    let mut dt = step_size(biased, config.softplus, config.ptx);
    if comptime!(!config.whole) {
        // A position beyond the last leaves the state as it is.
        dt = select(raw.inside, dt, 0.0f32);
    }
    let step = if cleared { dt + raw.clear } else { dt };
    let u = raw.u.extract(i);
    let mut two = V2::new(step);
    two.insert(1usize, dt * u);
    let at =
        comptime!(parity * CHANNELS * STEP_PITCH) + (part.column + i) * STEP_PITCH + part.position;
    put_wide_at::<Const<2>>(steps, at, two, config.ptx);
    if outputs {
        us[comptime!(parity * 4 + i)] = u;
    } else {
        passed[i] = min(passed[i] + step, CLEARED);
    }
}

/// Puts the unit's numbers of B or C in the half of the given parity.
#[cube]
pub(super) fn put_bc(
    raw: &Raw,
    bc: &mut Shared<[One]>,
    part: &Part,
    #[comptime] parity: usize,
    #[comptime] c: WalkConfig,
) {
    let at = comptime!(parity * TILE * STATES / 2)
        + part.row * comptime!(STATES / 2)
        + part.quarter * 2
        + (part.of_c as usize + part.row) % 2;
    put_wide_at::<Const<4>>(bc, at, raw.bc, c.ptx);
}

/// What the unit's outputs of a tile are completed from: sums over the states, and gates.
#[derive(CubeType)]
pub(super) struct Passed {
    sums: Array<f32>,
    gates: V4,
}

/// Those of the tile from position `t0` on.
#[cube]
pub(super) fn gather<SZ: Size>(
    z: &ComptimeOption<Box<[Words<SZ>]>>,
    ring: &mut Shared<[Word]>,
    sums: &mut Shared<[One]>,
    part: &Part,
    t0: usize,
    slot: usize,
    #[comptime] parity: usize,
    #[comptime] c: WalkConfig,
) -> Passed {
    let mut shares = Array::<V4>::new(SHARES);
    #[unroll]
    for i in 0..SHARES {
        let at = comptime!((parity * SHARES + i) * TILE * SUM_PITCH / 4)
            + part.position * comptime!(SUM_PITCH / 4)
            + part.column / 4;
        shares[i] = wide_at::<Const<4>>(sums, at, c.ptx);
    }
    let mut of_states = Array::<f32>::new(4usize);
    #[unroll]
    for i in 0..4usize {
        let mut of_shares = Array::<f32>::new(SHARES);
        #[unroll]
        for k in 0..SHARES {
            of_shares[k] = shares[k].extract(i);
        }
        of_states[i] = tree_sum(&mut of_shares, SHARES);
    }
    let mut gates = V4::new(0.0f32);
    #[comptime]
    match z {
        ComptimeOption::Some(z) => {
            let at = at_row(part, t0 + part.position) * part.strides.z + part.four;
            gates = take(z, at, ring, slot, Z, c)
        }
        ComptimeOption::None => {}
    }
    Passed {
        sums: of_states,
        gates,
    }
}

/// The output of the unit's channel number `i`.
#[cube]
pub(super) fn finish(
    passed: &Passed,
    us: &Array<f32>,
    parameters: &Parameters,
    #[comptime] i: usize,
    #[comptime] parity: usize,
    #[comptime] gated: bool,
    #[comptime] c: WalkConfig,
) -> f32 {
    let u = us[comptime!(parity * 4 + i)];
    let value = fma(parameters.skip[i], u, passed.sums[i]);
    if gated {
        let z = passed.gates.extract(i);
        value * z * sigmoid(z, c.ptx)
    } else {
        value
    }
}

/// Writes the unit's outputs of the tile from position `t0` on, but none beyond either end.
#[cube]
pub(super) fn write<Y: Float>(out: V4, y: &mut [Vector<Y, Const<4>>], part: &Part, t0: usize) {
    let t = t0 + part.position;
    if part.inside && t < part.count {
        y[(part.first + t) * part.strides.u + part.four] = Vector::cast_from(out);
    }
}
