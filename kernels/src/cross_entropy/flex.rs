//! Cross-entropy on the CPU: rows in parallel, no softmax kept.

use burn::tensor::DType;
use burn_flex::FlexTensor;
use multiversion::multiversion;
use rayon::prelude::*;

use crate::flex::LANES;
use crate::flex::math::exp;
use crate::flex::tensor::{contiguous, dims, indices, tensor, values};

/// Rows a task handles.
const TILE: usize = 64;

/// log Σ exp of one row.
#[inline(always)]
fn log_sum_exp(row: &[f32]) -> f32 {
    let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let mut lanes = [0.0f32; LANES];
    let chunks = row.chunks_exact(LANES);
    let rest = chunks.remainder();
    for chunk in chunks {
        for (lane, x) in lanes.iter_mut().zip(chunk) {
            *lane += exp(x - max);
        }
    }
    let mut total = crate::flex::sum(lanes);
    for x in rest {
        total += exp(x - max);
    }
    max + total.ln()
}

/// Loss and log-sum-exp of every row.
pub(crate) fn forward(logits: FlexTensor, targets: FlexTensor) -> (FlexTensor, FlexTensor) {
    let [rows, _] = dims(&logits);
    let logits = contiguous(logits);
    let logits = values(&logits);
    let targets = indices(&targets);
    let mut loss = vec![0.0; rows];
    let mut lse = vec![0.0; rows];
    loss.par_chunks_mut(TILE)
        .zip(lse.par_chunks_mut(TILE))
        .enumerate()
        .for_each(|(tile, (loss, lse))| {
            forward_tile(logits, &targets, tile, loss, lse);
        });
    (
        tensor(loss, [rows], DType::F32),
        tensor(lse, [rows], DType::F32),
    )
}

/// `dlogits = (softmax(logits) - onehot(target)) · dloss`.
pub(crate) fn backward(
    logits: FlexTensor,
    targets: FlexTensor,
    log_sum_exp: FlexTensor,
    dloss: FlexTensor,
    dtype: DType,
) -> FlexTensor {
    let [rows, vocabulary] = dims(&logits);
    let logits = contiguous(logits);
    let lse = contiguous(log_sum_exp);
    let dloss = contiguous(dloss);
    let (logits, lse, dloss) = (values(&logits), values(&lse), values(&dloss));
    let targets = indices(&targets);
    let mut out = vec![0.0; rows * vocabulary];
    out.par_chunks_mut(TILE * vocabulary)
        .enumerate()
        .for_each(|(tile, out)| {
            backward_tile(logits, &targets, lse, dloss, tile, out);
        });
    tensor(out, [rows, vocabulary], dtype)
}

/// Loss and log-sum-exp of one tile's rows.
#[multiversion(targets = "simd")]
fn forward_tile(logits: &[f32], targets: &[usize], tile: usize, loss: &mut [f32], lse: &mut [f32]) {
    let vocabulary = logits.len() / targets.len();
    for i in 0..loss.len() {
        let row = tile * TILE + i;
        let logits = &logits[row * vocabulary..(row + 1) * vocabulary];
        lse[i] = log_sum_exp(logits);
        loss[i] = lse[i] - logits[targets[row]];
    }
}

/// Gradients of one tile's logits.
#[multiversion(targets = "simd")]
fn backward_tile(
    logits: &[f32],
    targets: &[usize],
    lse: &[f32],
    dloss: &[f32],
    tile: usize,
    out: &mut [f32],
) {
    let vocabulary = logits.len() / targets.len();
    for (i, out) in out.chunks_exact_mut(vocabulary).enumerate() {
        let row = tile * TILE + i;
        let logits = &logits[row * vocabulary..(row + 1) * vocabulary];
        for (o, x) in out.iter_mut().zip(logits) {
            *o = exp(x - lse[row]) * dloss[row];
        }
        out[targets[row]] -= dloss[row];
    }
}
