//! The third phase of a layer.

// In the kernel language an `if` on a compile-time value decides what is compiled: it cannot be
// merged with one on a run-time value.
#![allow(clippy::collapsible_if)]

use cubecl::prelude::*;

use super::{OUT_BIAS, One, StepConfig, WIDTH_NUMBERS, Words, dot, own_sum, wide_at};

/// What a unit loads for [`leave`] before it waits for y.
#[derive(CubeType)]
pub(in crate::decode::cube) struct LeaveAhead<P: Size> {
    weights: Array<Words<P>>,
}

/// An empty [`LeaveAhead`].
#[cube]
pub(in crate::decode::cube) fn no_leave<P: Size>(#[comptime] c: StepConfig) -> LeaveAhead<P> {
    LeaveAhead::<P> {
        weights: Array::new(comptime!(c.loads(c.out_vectors())[0])),
    }
}

/// Reads the plane's part of a row of `out_proj`, as [`read_row`] does.
#[cube]
fn read_part<P: Size>(
    out_proj: &[Words<P>],
    weights: &mut Array<Words<P>>,
    layer: usize,
    cube: usize,
    #[comptime] round: usize,
    #[comptime] c: StepConfig,
) {
    let vectors = comptime!(c.inner / c.vector);
    let loads = comptime!(c.loads(c.out_vectors())[0]);
    let lane = UNIT_POS as usize % comptime!(c.plane);
    let plane = UNIT_POS as usize / comptime!(c.plane);
    let column = cube * comptime!(c.out_rows) + plane / comptime!(c.split);
    let row = layer * comptime!(c.width) + min(column, comptime!(c.width - 1).runtime());
    let first = plane % comptime!(c.split) * comptime!(c.out_vectors());
    #[unroll]
    for i in 0..loads {
        let place = first + comptime!((round * loads + i) * c.plane) + lane;
        weights[i] = out_proj[row * vectors + min(place, comptime!(vectors - 1).runtime())];
    }
}

/// Loads ahead for [`leave`].
#[cube]
pub(in crate::decode::cube) fn load_leave<P: Size>(
    ahead: &mut LeaveAhead<P>,
    out_proj: &[Words<P>],
    layer: usize,
    cube: usize,
    #[comptime] c: StepConfig,
) {
    read_part(out_proj, &mut ahead.weights, layer, cube, 0usize, c);
}

/// `out_proj`, added to the stream. A row is divided among a few planes.
///
/// - y: `[B, E]`; out_proj: `[layers, D, E]`; stream: `[B, D]`
#[cube]
pub(in crate::decode::cube) fn leave<P: Size, V: Size>(
    ahead: &mut LeaveAhead<P>,
    y: &mut [One],
    out_proj: &[Words<P>],
    widths: &[f32],
    stream: &mut [One],
    layer: usize,
    batch: usize,
    cube: usize,
    #[comptime] c: StepConfig,
) {
    let unit = UNIT_POS as usize;
    let lane = unit % comptime!(c.plane);
    let plane = unit / comptime!(c.plane);
    let vectors = comptime!(c.inner / c.vector);
    let per_part = comptime!(c.out_vectors());
    let loads = comptime!(c.loads(per_part)[0]);
    let rounds = comptime!(c.loads(per_part)[1]);
    let mut shared = Shared::<[f32]>::new_slice(comptime!(c.planes() * c.group));
    let column = cube * comptime!(c.out_rows) + plane / comptime!(c.split);
    let part = plane % comptime!(c.split);
    let inside = plane < comptime!(c.out_rows * c.split) && column < comptime!(c.width);
    let column = min(column, comptime!(c.width - 1).runtime());
    let first_place = part * per_part;
    let end = min(first_place + per_part, vectors);
    let whole = comptime!(vectors == c.split * rounds * loads * c.plane);
    let bias = widths[(layer * WIDTH_NUMBERS + OUT_BIAS) * comptime!(c.width) + column];
    for group in 0..batch.div_ceil(comptime!(c.group)) {
        let first = group * comptime!(c.group);
        let sequence = first + lane;
        let at = min(sequence, batch - 1) * comptime!(c.width) + column;
        let before = stream[at].extract(0usize);
        let mut sums = Array::<f32>::new(comptime!(c.group));
        #[unroll]
        for b in 0..c.group {
            sums[b] = 0.0f32;
        }
        #[unroll]
        for round in 0..rounds {
            if comptime!(rounds > 1) {
                if comptime!(round > 0) || group > 0 {
                    read_part(out_proj, &mut ahead.weights, layer, cube, round, c);
                }
            }
            #[unroll]
            for b in 0..c.group {
                let row = min(first + b, batch - 1) * vectors;
                // All loads before the first use: the phase is as long as it takes them to come.
                let mut inputs = Array::<Vector<f32, V>>::new(loads);
                #[unroll]
                for i in 0..loads {
                    let place = first_place + comptime!((round * loads + i) * c.plane) + lane;
                    let at = row + min(place, comptime!(vectors - 1).runtime());
                    inputs[i] = wide_at::<V>(y, at, c.ptx);
                }
                #[unroll]
                for i in 0..loads {
                    let place = first_place + comptime!((round * loads + i) * c.plane) + lane;
                    let sum = dot::<P, V>(ahead.weights[i], inputs[i], sums[b], c.halves);
                    sums[b] = if comptime!(whole) {
                        sum
                    } else {
                        select(place < end, sum, sums[b])
                    };
                }
            }
        }
        let mut sum = own_sum(&sums, lane, 0usize, c);
        if comptime!(c.split > 1) {
            // Others may still read the group before.
            sync_cube();
            if lane < comptime!(c.group) {
                shared[plane * comptime!(c.group) + lane] = sum;
            }
            sync_cube();
            #[unroll]
            for i in 1..c.split {
                let other = min(plane + i, comptime!(c.planes() - 1).runtime());
                sum += shared
                    [other * comptime!(c.group) + min(lane, comptime!(c.group - 1).runtime())];
            }
        }
        if inside && part == 0 && lane < comptime!(c.group) && sequence < batch {
            stream[at] = Vector::new(before + sum + bias);
        }
    }
}
