//! What the servers of the [one pass](super::walk) over all positions do: loads ahead of their use,
//! step sizes before the recurrence, and outputs after it.

use cubecl::prelude::*;

use super::common::{CLEARED, V2, V4, entry};
use super::walk_layout::{Layout, Room, STATES, WalkConfig};
use crate::cube::OptionalInput;
use crate::cube::math::{sigmoid, step_size};
use crate::cube::reduce::tree_sum;
use crate::cube::wide::{One, put_wide_at, wide_at};
use crate::cube::words::{Words, load_now, number};

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
    /// The first position, in all of them, and their number.
    first: usize,
    pub count: usize,
    /// The unit's position within a tile.
    position: usize,
    /// Its first channel within the cube.
    column: usize,
    /// Its four channels, counted in fours; the last four for units beyond them.
    four: usize,
    inside: bool,
    /// The position of its two numbers of B and of C within a tile, the first if it has several, and
    /// their number there.
    row: usize,
    pair: usize,
    strides: Strides,
}

#[cube]
pub(super) fn part(
    block: usize,
    first: usize,
    count: usize,
    inner: usize,
    strides: Strides,
    #[comptime] layout: Layout,
) -> Part {
    let unit = UNIT_POS as usize % layout.half;
    // Neighbouring units have the channels of one position, so that global memory sees few
    // lines; of 16 of them four have four positions each, which do not meet in a bank of shared memory.
    let columns = comptime!(layout.channels() / 4);
    let column = unit / 4 % columns * 4;
    let channel = block * comptime!(layout.channels()) + column;
    Part {
        first,
        count,
        position: unit % 4 + unit / comptime!(4 * columns) * 4,
        column,
        four: min(channel, inner - 4) / 4,
        inside: channel < inner,
        row: unit / comptime!(STATES / 2),
        pair: unit % comptime!(STATES / 2),
        strides,
    }
}

/// Position number `t`, counted from the first, in all of them; the last one for those beyond it.
#[cube]
fn at_row(part: &Part, t: usize) -> usize {
    part.first + min(t, part.count - 1)
}

/// Inputs on their way, of a tile; the gates are of an earlier one, which waits for its outputs.
#[derive(CubeType)]
pub(super) struct Ahead<SU: Size, SD: Size, SP: Size, SZ: Size> {
    u: Array<Words<SU>>,
    delta: Array<Words<SD>>,
    b: Array<Words<SP>>,
    c: Array<Words<SP>>,
    resets: Array<f32>,
    z: Array<Words<SZ>>,
}

/// No inputs yet.
#[cube]
pub(super) fn nothing_ahead<SU: Size, SD: Size, SP: Size, SZ: Size>(
    #[comptime] config: WalkConfig,
) -> Ahead<SU, SD, SP, SZ> {
    let rows = comptime!(config.layout.bc_rows());
    let mut z = Array::<Words<SZ>>::new(1usize);
    z[0] = Words::<SZ>::new(0u32);
    Ahead::<SU, SD, SP, SZ> {
        u: Array::new(1usize),
        delta: Array::new(1usize),
        b: Array::new(rows),
        c: Array::new(rows),
        resets: Array::new(1usize),
        z,
    }
}

/// Reads the unit's part of the tile from position `t0` on.
#[cube]
pub(super) fn read<SU: Size, SD: Size, SP: Size, SZ: Size>(
    ahead: &mut Ahead<SU, SD, SP, SZ>,
    u: &[Words<SU>],
    delta: &[Words<SD>],
    b: &[Words<SP>],
    c: &[Words<SP>],
    resets: &OptionalInput,
    part: &Part,
    t0: usize,
    #[comptime] config: WalkConfig,
) {
    let row = at_row(part, t0 + part.position);
    let at = row * part.strides.fours + part.four;
    ahead.u[0] = load_now(u, at, config.ptx);
    ahead.delta[0] = load_now(delta, at, config.ptx);
    #[comptime]
    match resets {
        ComptimeOption::Some(resets) => ahead.resets[0] = resets[row],
        ComptimeOption::None => {}
    }
    #[unroll]
    for i in 0..comptime!(config.layout.bc_rows()) {
        let row = at_row(
            part,
            t0 + part.row + comptime!(i * config.layout.bc_pitch()),
        );
        ahead.b[i] = load_now(b, row * part.strides.b_twos + part.pair, config.ptx);
        ahead.c[i] = load_now(c, row * part.strides.c_twos + part.pair, config.ptx);
    }
}

/// Reads the unit's gates of the tile from position `t0` on.
#[cube]
pub(super) fn read_gates<SU: Size, SD: Size, SP: Size, SZ: Size>(
    ahead: &mut Ahead<SU, SD, SP, SZ>,
    z: &ComptimeOption<Box<[Words<SZ>]>>,
    part: &Part,
    t0: usize,
    #[comptime] config: WalkConfig,
) {
    #[comptime]
    match z {
        ComptimeOption::Some(z) => {
            let row = at_row(part, t0 + part.position);
            let at = row * part.strides.z_fours + part.four;
            ahead.z[0] = load_now(z, at, config.ptx)
        }
        ComptimeOption::None => {}
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

/// Makes channel number `i` of the unit's of the tile from position `t0` on ready for the recurrence, in
/// the half `turn` of shared memory. Returns its u.
#[cube]
fn stage<SU: Size, SD: Size, SP: Size, SZ: Size>(
    ahead: &Ahead<SU, SD, SP, SZ>,
    steps: &mut Shared<[One]>,
    parameters: &Parameters,
    part: &Part,
    t0: usize,
    #[comptime] turn: usize,
    #[comptime] i: usize,
    #[comptime] cleared: bool,
    #[comptime] c: WalkConfig,
) -> f32 {
    let inside = t0 + part.position < part.count;
    let delta = number::<SD>(ahead.delta[0], i, comptime!(c.halves[1]));
    let mut dt = step_size(delta + parameters.bias[i], c.softplus, c.ptx);
    if comptime!(!c.whole) {
        // A position beyond the last leaves the state as it is.
        dt = select(inside, dt, 0.0f32);
    }
    let mut step = dt;
    if cleared {
        let mut reset = ahead.resets[0] > 0.5f32;
        if comptime!(!c.whole) {
            reset = reset && inside;
        }
        step += select(reset, CLEARED, 0.0f32);
    }
    let u = number::<SU>(ahead.u[0], i, comptime!(c.halves[0]));
    // In twos.
    let at = comptime!(turn * c.layout.room()[0] / 2)
        + part.position / 2 * comptime!(c.layout.step_row() * 2)
        + (part.column + part.column / 8 + i) * 2
        + part.position % 2;
    put_two(steps, at, step, dt * u, c.ptx);
    u
}

/// Makes the unit's numbers of B and C ready, in the half `turn` of shared memory. Where they are apart,
/// those of odd positions are the other way round, so that neighbouring positions meet in no bank.
#[cube]
fn stage_bc<SU: Size, SD: Size, SP: Size, SZ: Size>(
    ahead: &Ahead<SU, SD, SP, SZ>,
    bc: &mut Shared<[One]>,
    part: &Part,
    #[comptime] turn: usize,
    #[comptime] c: WalkConfig,
) {
    let halves = comptime!(c.halves[2]);
    #[unroll]
    for i in 0..comptime!(c.layout.bc_rows()) {
        let b0 = number::<SP>(ahead.b[i], 0usize, halves);
        let b1 = number::<SP>(ahead.b[i], 1usize, halves);
        let c0 = number::<SP>(ahead.c[i], 0usize, halves);
        let c1 = number::<SP>(ahead.c[i], 1usize, halves);
        let row = part.row + comptime!(i * c.layout.bc_pitch());
        // In twos.
        let first = comptime!(turn * c.layout.room()[1] / 2) + row * STATES;
        if comptime!(c.layout.own == 4) {
            let at = first + part.pair / 2 * 4 + part.pair % 2;
            let turned = row % 2 * 2;
            put_two(bc, at + turned, b0, b1, c.ptx);
            put_two(bc, at + 2 - turned, c0, c1, c.ptx);
        } else {
            let at = first + part.pair * 2;
            put_two(bc, at, b0, b1, c.ptx);
            put_two(bc, at + 1, c0, c1, c.ptx);
        }
    }
}

/// Pair number `at` of a buffer.
#[cube]
fn put_two(buffer: &mut Shared<[One]>, at: usize, first: f32, second: f32, #[comptime] ptx: bool) {
    let mut two = V2::new(first);
    two.insert(1usize, second);
    put_wide_at::<Const<2>>(buffer, at, two, ptx);
}

/// Sums over the states of the unit's outputs of a tile, in the half `turn` of shared memory.
#[cube]
fn gather(
    sums: &mut Shared<[One]>,
    part: &Part,
    #[comptime] turn: usize,
    #[comptime] c: WalkConfig,
) -> Array<f32> {
    let count = comptime!(c.layout.shares());
    let first = comptime!(turn * c.layout.room()[2] / 4)
        + part.position * comptime!(c.layout.pitch() / 4)
        + part.column / 4;
    let mut shares = Array::<V4>::new(count);
    #[unroll]
    for i in 0..count {
        let at = first + comptime!(i * c.layout.share_pitch() / 4);
        shares[i] = wide_at::<Const<4>>(sums, at, c.ptx);
    }
    let mut out = Array::<f32>::new(4usize);
    #[unroll]
    for i in 0..4usize {
        let mut of_shares = Array::<f32>::new(count);
        #[unroll]
        for k in 0..count {
            of_shares[k] = shares[k].extract(i);
        }
        out[i] = tree_sum(&mut of_shares, count);
    }
    out
}

/// What a tile's outputs take besides their sums.
#[derive(CubeType)]
pub(super) struct Closing {
    u: Array<f32>,
    z: Array<f32>,
    gates: Array<f32>,
}

/// Of the tile whose gates have come.
#[cube]
pub(super) fn closing<SU: Size, SD: Size, SP: Size, SZ: Size>(
    ahead: &Ahead<SU, SD, SP, SZ>,
    us: &Array<f32>,
    #[comptime] gated: bool,
    #[comptime] c: WalkConfig,
) -> Closing {
    let mut closing = Closing {
        u: Array::new(4usize),
        z: Array::new(4usize),
        gates: Array::new(4usize),
    };
    #[unroll]
    for i in 0..4usize {
        closing.u[i] = us[i];
        if gated {
            let z = number::<SZ>(ahead.z[0], i, comptime!(c.halves[3]));
            closing.z[i] = z;
            closing.gates[i] = sigmoid(z, c.ptx);
        }
    }
    closing
}

/// The output of channel number `i` of the unit's.
#[cube]
fn finish(
    closing: &Closing,
    sums: &Array<f32>,
    parameters: &Parameters,
    #[comptime] i: usize,
    #[comptime] gated: bool,
) -> f32 {
    let value = fma(parameters.skip[i], closing.u[i], sums[i]);
    if gated {
        value * closing.z[i] * closing.gates[i]
    } else {
        value
    }
}

/// Writes the unit's outputs of the tile from position `t0` on, but none beyond either end.
#[cube]
fn write<Y: Float>(out: V4, y: &mut [Vector<Y, Const<4>>], part: &Part, t0: usize) {
    let t = t0 + part.position;
    if part.inside && t < part.count {
        y[(part.first + t) * part.strides.fours + part.four] = Vector::cast_from(out);
    }
}

/// A server makes the tile from position `t0` on ready, in the half `turn` of shared memory. Its u are
/// kept, as are those of the tile before.
#[cube]
pub(super) fn prepare<SU: Size, SD: Size, SP: Size, SZ: Size>(
    ahead: &Ahead<SU, SD, SP, SZ>,
    room: &mut Room,
    us: &mut Array<f32>,
    parameters: &Parameters,
    part: &Part,
    t0: usize,
    #[comptime] turn: usize,
    #[comptime] cleared: bool,
    #[comptime] config: WalkConfig,
) {
    #[unroll]
    for i in 0..4usize {
        us[i] = us[comptime!(4 + i)];
        us[comptime!(4 + i)] = stage(
            ahead,
            &mut room.steps,
            parameters,
            part,
            t0,
            turn,
            i,
            cleared,
            config,
        );
    }
    stage_bc(ahead, &mut room.bc, part, turn, config);
}

/// A server's outputs of the tile from position `t0` on, in the half `turn` of shared memory.
#[cube]
pub(super) fn complete<Y: Float>(
    closing: &Closing,
    y: &mut [Vector<Y, Const<4>>],
    parameters: &Parameters,
    part: &Part,
    room: &mut Room,
    t0: usize,
    #[comptime] turn: usize,
    #[comptime] gated: bool,
    #[comptime] config: WalkConfig,
) {
    let sums = gather(&mut room.sums, part, turn, config);
    let mut out = V4::new(0.0f32);
    #[unroll]
    for i in 0..4usize {
        out.insert(i, finish(closing, &sums, parameters, i, gated));
    }
    write::<Y>(out, y, part, t0);
}
