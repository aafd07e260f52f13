//! What follows the last layer.

use cubecl::prelude::*;

use super::{StepConfig, add_products, load_norm, no_norm, normalise, own_sum, read_row};
use crate::cube::wide::One;
use crate::cube::words::Words;

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
    let unit = UNIT_POS as usize;
    let lane = unit % comptime!(c.plane);
    let plane = unit / comptime!(c.plane);
    let vectors = comptime!(c.width / c.vector);
    let loads = comptime!(c.loads(vectors)[0]);
    let rounds = comptime!(c.loads(vectors)[1]);
    let row = cube * comptime!(c.head_rows) + plane;
    let inside = plane < comptime!(c.head_rows) && row < comptime!(c.rows);
    let row = min(row, comptime!(c.rows - 1).runtime());
    let mut hat = Shared::<[One]>::new_aligned_slice(comptime!(c.group * c.padded()), 32usize);
    let mut weights = Array::<Words<P>>::new(loads);
    let mut ahead = no_norm(c);
    load_norm(&mut ahead, norm, 0usize, c);
    read_row(head, &mut weights, row, vectors, 0usize, c);
    for group in 0..batch.div_ceil(comptime!(c.group)) {
        let first = group * comptime!(c.group);
        sync_cube();
        normalise(stream, &ahead, &mut hat, first, batch, eps, c.norm_f, c);
        sync_cube();
        let mut sums = Array::<f32>::new(comptime!(c.group));
        #[unroll]
        for b in 0..c.group {
            sums[b] = 0.0f32;
        }
        #[unroll]
        for round in 0..rounds {
            if comptime!(rounds > 1) {
                read_row(head, &mut weights, row, vectors, round, c);
            }
            add_products::<P, V>(&weights, &mut hat, &mut sums, 0usize, round, c);
        }
        let sum = own_sum(&sums, lane, 0usize, c);
        let sequence = first + lane;
        if inside && lane < comptime!(c.group) && sequence < batch {
            logits[sequence * comptime!(c.rows) + row] = sum;
        }
    }
}
