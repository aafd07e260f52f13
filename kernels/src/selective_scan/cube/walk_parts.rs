//! What the [one pass](super::walk) over all positions does element-wise: loads ahead of their use,
//! step sizes before the recurrence, and outputs after it.

use cubecl::prelude::*;

use super::common::{CLEARED, V2, V4, entry};
use super::walk::{CHANNELS, SHARES, STATES, STEP_PITCH, TILE, WalkConfig};
use crate::cube::OptionalInput;
use crate::cube::math::{sigmoid, step_size};
use crate::cube::reduce::tree_sum;
use crate::cube::wide::{One, put_wide_at, wide_at};
use crate::cube::words::{Words, number};

/// From a position to the next: of u, delta and y, and of z, in fours; of B and C in twos.
#[derive(CubeType)]
pub(super) struct Strides {
    pub fours: usize,
    pub z_fours: usize,
    pub b_twos: usize,
    pub c_twos: usize,
}

/// What a unit works on, element-wise.
#[derive(CubeType)]
pub(super) struct Part {
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
    strides: Strides,
}

#[cube]
pub(super) fn part(
    block: usize,
    sequence: usize,
    length: usize,
    inner: usize,
    strides: Strides,
) -> Part {
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
        strides,
    }
}

/// Inputs on their way: of u and z those of tiles k - 1 to k + 2, of the others tiles k + 1 and k + 2.
#[derive(CubeType)]
pub(super) struct Ahead<SU: Size, SD: Size, SP: Size, SZ: Size> {
    u: Array<Words<SU>>,
    z: Array<Words<SZ>>,
    delta: Array<Words<SD>>,
    b: Array<Words<SP>>,
    c: Array<Words<SP>>,
    resets: Array<f32>,
}

/// No inputs yet; of tiles before the first there are none.
#[cube]
pub(super) fn nothing_ahead<SU: Size, SD: Size, SP: Size, SZ: Size>() -> Ahead<SU, SD, SP, SZ> {
    let mut u = Array::<Words<SU>>::new(4usize);
    let mut z = Array::<Words<SZ>>::new(4usize);
    #[unroll]
    for i in 0..2usize {
        u[i] = Words::<SU>::new(0u32);
        z[i] = Words::<SZ>::new(0u32);
    }
    Ahead::<SU, SD, SP, SZ> {
        u,
        z,
        delta: Array::new(2usize),
        b: Array::new(2usize),
        c: Array::new(2usize),
        resets: Array::new(2usize),
    }
}

/// Reads the unit's part of the tile from position `t0` on, or of the last position beyond the end,
/// into the places of tile k + 1, or of tile k + 2 if `late`.
#[cube]
pub(super) fn read<SU: Size, SD: Size, SP: Size, SZ: Size>(
    ahead: &mut Ahead<SU, SD, SP, SZ>,
    u: &[Words<SU>],
    delta: &[Words<SD>],
    b: &[Words<SP>],
    c: &[Words<SP>],
    z: &ComptimeOption<Box<[Words<SZ>]>>,
    resets: &OptionalInput,
    part: &Part,
    t0: usize,
    #[comptime] late: bool,
) {
    let slot = comptime!(late as usize);
    let at = part.first + min(t0 + part.position, part.length - 1);
    ahead.u[comptime!(slot + 2)] = u[at * part.strides.fours + part.four];
    ahead.delta[slot] = delta[at * part.strides.fours + part.four];
    #[comptime]
    match z {
        ComptimeOption::Some(z) => {
            ahead.z[comptime!(slot + 2)] = z[at * part.strides.z_fours + part.four]
        }
        ComptimeOption::None => {}
    }
    #[comptime]
    match resets {
        ComptimeOption::Some(resets) => ahead.resets[slot] = resets[at],
        ComptimeOption::None => {}
    }
    let at = part.first + min(t0 + part.row, part.length - 1);
    ahead.b[slot] = b[at * part.strides.b_twos + part.pair];
    ahead.c[slot] = c[at * part.strides.c_twos + part.pair];
}

/// Every tile becomes the one before.
#[cube]
pub(super) fn shift<SU: Size, SD: Size, SP: Size, SZ: Size>(
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

/// The unit's part of tile k + 1 as the recurrence takes it.
#[derive(CubeType)]
pub(super) struct Ready<SP: Size> {
    /// Step sizes of four channels as the decays see them, and times u.
    steps: Array<f32>,
    xs: Array<f32>,
    b: Words<SP>,
    c: Words<SP>,
}

/// Makes the tile from position `t0` on ready.
#[cube]
pub(super) fn stage<SU: Size, SD: Size, SP: Size, SZ: Size>(
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
pub(super) fn put<SP: Size>(
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
    let mut two = V2::new(first);
    two.insert(1usize, second);
    put_wide_at::<Const<2>>(buffer, at, two, ptx);
}

/// Completes the outputs of the tile from position `t0` on, which is tile k - 1. Of a tile beyond
/// either end nothing is written.
#[cube]
pub(super) fn finish<Y: Float, SU: Size, SD: Size, SP: Size, SZ: Size>(
    ahead: &Ahead<SU, SD, SP, SZ>,
    sums: &mut Shared<[One]>,
    parameters: &Parameters,
    y: &mut [Vector<Y, Const<4>>],
    part: &Part,
    t0: usize,
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
        shares[i] = wide_at::<Const<4>>(sums, at, c.ptx);
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
        y[(part.first + t) * part.strides.fours + part.four] = Vector::cast_from(out);
    }
}
