//! The sum on the CPU: tiles in parallel, added up in order.

use burn::tensor::DType;
use burn_flex::FlexTensor;
use multiversion::multiversion;
use rayon::prelude::*;

use crate::flex::LANES;
use crate::flex::tensor::{contiguous, tensor, values};

/// Elements a task handles: a fixed number, so the sum does not depend on the threads.
const TILE: usize = 16 * 1024;

/// See [`MambaKernels::sum_squares`](crate::MambaKernels::sum_squares).
pub(crate) fn sum_squares(tensors: Vec<FlexTensor>) -> FlexTensor {
    let mut total = 0.0f64;
    for x in tensors.into_iter().map(contiguous) {
        let tiles: Vec<f32> = values(&x).par_chunks(TILE).map(tile_sum).collect();
        total += tiles.into_iter().map(f64::from).sum::<f64>();
    }
    tensor(vec![total as f32], [1], DType::F32)
}

/// The sum of one tile.
#[multiversion(targets = "simd")]
fn tile_sum(x: &[f32]) -> f32 {
    let mut lanes = [0.0f32; LANES];
    let chunks = x.chunks_exact(LANES);
    let rest = chunks.remainder();
    for chunk in chunks {
        for (lane, x) in lanes.iter_mut().zip(chunk) {
            *lane = x.mul_add(*x, *lane);
        }
    }
    for (lane, x) in lanes.iter_mut().zip(rest) {
        *lane = x.mul_add(*x, *lane);
    }
    crate::flex::sum(lanes)
}
