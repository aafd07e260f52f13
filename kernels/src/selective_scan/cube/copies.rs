//! Activations of a plane's channels, copied to shared memory by the hardware a sub-chunk ahead of their
//! use: they take no registers on the way. Memory answers after some 1,700 cycles where it is also
//! written to, longer than the work on a position, and a sweep has no registers to spare.
//!
//! Each plane copies for itself, so the cube need not wait for all of its units.

use cubecl::prelude::*;

use super::plan::{SUB, SweepConfig};

/// Lanes of a plane.
pub(super) const PLANE: usize = 32;
/// Neighbouring channels of a copy: 16 bytes.
pub(super) const WIDTH: usize = 8;
/// Inputs that are copied.
const KINDS: usize = 4;
/// Lanes that copy a plane's channels of one position.
const PIECES: usize = PLANE / WIDTH;
/// Numbers of a position.
const POSITION: usize = KINDS * PLANE;
/// Numbers of a plane: two sub-chunks.
const OWN: usize = 2 * SUB * POSITION;

/// Numbers that a cube has in shared memory; one vector where nothing is copied.
pub(super) const fn numbers(config: &SweepConfig) -> usize {
    if config.copies {
        config.units / PLANE * OWN
    } else {
        WIDTH
    }
}

/// What a lane copies: eight channels of one position of every sub-chunk.
#[derive(CubeType)]
pub(super) struct Copier {
    /// A few lanes are enough for a sub-chunk.
    works: bool,
    /// Its position in the sub-chunk.
    turn: usize,
    /// The first position of the chunk and the number of its last.
    first: usize,
    last: usize,
    /// Its first channel.
    channel: usize,
    /// Where they go in the first sub-chunk.
    into: usize,
    /// Where the numbers of the unit's own channel begin.
    own: usize,
}

/// The copier of the unit, for the `count` positions from `first` on. `channel0` is the cube's first
/// channel.
#[cube]
pub(super) fn copier(channel0: usize, inner: usize, first: usize, count: usize) -> Copier {
    let lane = UNIT_POS as usize % PLANE;
    let plane = UNIT_POS as usize / PLANE;
    let column = lane % PIECES * WIDTH;
    Copier {
        works: lane / PIECES < SUB,
        turn: lane / PIECES,
        first,
        last: count - 1,
        channel: min(channel0 + plane * PLANE + column, inner - WIDTH),
        into: plane * OWN + lane / PIECES * POSITION + column,
        own: plane * OWN + lane,
    }
}

/// Starts to copy sub-chunk number `sub` of the chunk, or positions at its end beyond the last.
#[cube]
pub(super) fn copy_sub_chunk<U: Float, D: Float, Z: Float>(
    u: &[U],
    delta: &[D],
    dy: &[U],
    z: &ComptimeOption<Box<[Z]>>,
    copied: &mut Shared<[U]>,
    copier: &Copier,
    sub: usize,
    inner: usize,
    z_stride: usize,
) {
    if copier.works {
        let position = copier.first + min(sub * SUB + copier.turn, copier.last);
        let at = position * inner + copier.channel;
        let into = copier.into + sub % 2 * comptime!(SUB * POSITION);
        copy(u, at, copied, into);
        copy(delta, at, copied, into + PLANE);
        copy(dy, at, copied, into + comptime!(2 * PLANE));
        #[comptime]
        match z {
            ComptimeOption::Some(z) => {
                let at = position * z_stride + copier.channel;
                copy(z, at, copied, into + comptime!(3 * PLANE))
            }
            ComptimeOption::None => {}
        }
    }
}

/// Starts to copy 16 bytes.
#[cube]
fn copy<E: Float, U: Float>(from: &[E], at: usize, to: &mut Shared<[U]>, into: usize) {
    let source = from[at..at + 1].as_ptr();
    let target = to[into..into + 1].as_ptr();
    gpu_asm!(
        "{{ .reg .u64 at; cvta.to.shared.u64 at, {target}; ",
        "cp.async.cg.shared.global [at], [{source}], 16; }}",
        target = in(_) target, source = in(_) source,
    );
}

/// Waits for all copies of the plane. Whatever its lanes read before may be overwritten from here on.
#[cube]
pub(super) fn arrived() {
    gpu_asm!("cp.async.wait_all;");
    gpu_asm!("bar.warp.sync 0xffffffff;");
}

/// Input number `kind`, in the order of [`copy_sub_chunk`], at position `t`, counted from the chunk's start, of the unit's own channel.
#[cube]
pub(super) fn own<U: Float>(
    copied: &Shared<[U]>,
    copier: &Copier,
    t: usize,
    #[comptime] kind: usize,
) -> f32 {
    let at = copier.own + t % comptime!(2 * SUB) * POSITION + comptime!(kind * PLANE);
    f32::cast_from(copied[at])
}
