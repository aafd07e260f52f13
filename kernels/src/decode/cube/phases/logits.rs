//! What follows the last layer.

use cubecl::prelude::*;

use super::{
    NormAhead, StepConfig, add_products, load_norm, no_norm, normalise, own_sum, read_row,
    read_stream,
};
use crate::cube::wide::One;
use crate::cube::words::Words;

/// What a unit loads for [`head`] before it waits for the stream: the norm, and its vectors of the
/// plane's row.
#[derive(CubeType)]
pub(in crate::decode::cube) struct HeadAhead<P: Size> {
    norm: NormAhead,
    weights: Array<Words<P>>,
}

/// Loads ahead for [`head`].
#[cube]
pub(in crate::decode::cube) fn load_head<P: Size>(
    norm: &[One],
    head: &[Words<P>],
    cube: usize,
    #[comptime] c: StepConfig,
) -> HeadAhead<P> {
    let vectors = comptime!(c.width / c.vector);
    let mut ahead = HeadAhead::<P> {
        norm: no_norm(c),
        weights: Array::new(comptime!(c.loads(vectors)[0])),
    };
    load_norm(&mut ahead.norm, norm, 0usize, c);
    read_row(
        head,
        &mut ahead.weights,
        head_row(cube, c),
        vectors,
        0usize,
        c,
    );
    ahead
}

/// The row of the head of this plane; planes beyond the last row have that one.
#[cube]
fn head_row(cube: usize, #[comptime] c: StepConfig) -> usize {
    let plane = UNIT_POS as usize / comptime!(c.plane);
    let row = cube * comptime!(c.head_rows) + plane;
    min(row, comptime!(c.rows - 1).runtime())
}

/// The last norm and the logits.
///
/// - norm: `[2, D]`; head: `[V, D]`; logits: `[B, V]`
#[cube]
pub(in crate::decode::cube) fn head<P: Size, V: Size>(
    stream: &mut [One],
    norm: &[One],
    head: &[Words<P>],
    logits: &mut [f32],
    batch: usize,
    cube: usize,
    eps: f32,
    #[comptime] c: StepConfig,
) {
    let mut ahead = load_head(norm, head, cube, c);
    for group in 0..batch.div_ceil(comptime!(c.group)) {
        let first = group * comptime!(c.group);
        let values = read_stream(stream, first, batch, c);
        let sum = head_group::<P, V>(&mut ahead, &values, head, first, batch, cube, eps, c);
        let (inside, at) = head_place(first, batch, cube, c);
        if inside {
            logits[at] = sum;
        }
    }
}

/// Whether the unit has a logit of the sequences `first ..` of a group, and its place.
#[cube]
pub(in crate::decode::cube) fn head_place(
    first: usize,
    batch: usize,
    cube: usize,
    #[comptime] c: StepConfig,
) -> (bool, usize) {
    let lane = UNIT_POS as usize % comptime!(c.plane);
    let plane = UNIT_POS as usize / comptime!(c.plane);
    let row = head_row(cube, c);
    let inside = plane < comptime!(c.head_rows) && cube * comptime!(c.head_rows) + plane == row;
    let sequence = first + lane;
    (
        inside && lane < comptime!(c.group) && sequence < batch,
        sequence * comptime!(c.rows) + row,
    )
}

/// The unit's logit of the sequences `first ..` of a group, of whose stream the units have `values`: that
/// of [`head_place`].
#[cube]
pub(in crate::decode::cube) fn head_group<P: Size, V: Size>(
    ahead: &mut HeadAhead<P>,
    values: &Array<f32>,
    head: &[Words<P>],
    first: usize,
    batch: usize,
    cube: usize,
    eps: f32,
    #[comptime] c: StepConfig,
) -> f32 {
    let lane = UNIT_POS as usize % comptime!(c.plane);
    let vectors = comptime!(c.width / c.vector);
    let rounds = comptime!(c.loads(vectors)[1]);
    let row = head_row(cube, c);
    let mut hat = Shared::<[One]>::new_aligned_slice(comptime!(c.group * c.padded()), 32usize);
    // Others may still read the group before.
    sync_cube();
    normalise(
        values,
        &ahead.norm,
        &mut hat,
        first,
        batch,
        eps,
        c.norm_f,
        c,
    );
    sync_cube();
    let mut sums = Array::<f32>::new(comptime!(c.group));
    #[unroll]
    for b in 0..c.group {
        sums[b] = 0.0f32;
    }
    #[unroll]
    for round in 0..rounds {
        if comptime!(rounds > 1) {
            read_row(head, &mut ahead.weights, row, vectors, round, c);
        }
        add_products::<P, V>(&ahead.weights, &mut hat, &mut sums, 0usize, round, c);
    }
    own_sum(&sums, lane, 0usize, c)
}
