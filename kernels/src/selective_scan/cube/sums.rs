//! Sums of backward's partials, each in one fixed order.

use cubecl::ir::ElemType;
use cubecl::prelude::*;

use super::adjoint_ends::Wanted;
use crate::cube::reduce::sum_strided;

/// dB and dC of a segment: the sum of `sums` (`[B, cubes, positions, 2 · states]`) over the cubes.
///
/// One unit for each sequence, position and one of the 2 · states numbers.
#[cube(launch_unchecked, address_type = "dynamic")]
pub(super) fn sum_cubes<P: Float, Q: Float>(
    sums: &[f32],
    db: &mut [P],
    dc: &mut [Q],
    batch: usize,
    length: usize,
    state: usize,
    db_stride: usize,
    dc_stride: usize,
    position0: usize,
    positions: usize,
    cubes: usize,
    #[comptime] states: usize,
    #[define(P, Q)] _types: [ElemType; 2],
) {
    let width = comptime!(2 * states);
    let unit = CUBE_POS * CUBE_DIM as usize + UNIT_POS as usize;
    let sequence = unit / (positions * width);
    let at = unit % (positions * width);
    let position = position0 + at / width;
    let n = at % states;
    if sequence < batch && position < length && n < state {
        let first = sequence * cubes * positions * width + at;
        let sum = sum_strided(sums, first, cubes, positions * width);
        let row = sequence * length + position;
        if at % width < states {
            db[row * db_stride + n] = P::cast_from(sum);
        } else {
            dc[row * dc_stride + n] = Q::cast_from(sum);
        }
    }
}

/// dA (`[E, N]`), dD and the bias's gradient (`[E]`): the sum of `sums` (`[rows, N + 2, E]`) over
/// the rows, one for each chunk of each sequence.
#[cube(launch_unchecked, address_type = "dynamic")]
pub(super) fn sum_chunks(
    sums: &[f32],
    da: &mut [f32],
    dd: &mut [f32],
    dbias: &mut [f32],
    rows: usize,
    inner: usize,
    state: usize,
    #[comptime] wanted: Wanted,
) {
    let unit = CUBE_POS * CUBE_DIM as usize + UNIT_POS as usize;
    let n = unit / inner;
    let channel = unit % inner;
    let width = (state + 2) * inner;
    if n < state {
        da[channel * state + n] = sum_strided(sums, unit, rows, width);
    }
    if wanted.d {
        if n == state {
            dd[channel] = sum_strided(sums, unit, rows, width);
        }
    }
    if wanted.bias {
        if n == state + 1 {
            dbias[channel] = sum_strided(sums, unit, rows, width);
        }
    }
}
