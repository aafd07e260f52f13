//! Addition and normalisation on the CPU: rows in parallel, the width in vector lanes.

use burn::tensor::DType;
use burn_flex::FlexTensor;
use multiversion::multiversion;
use rayon::prelude::*;

use super::{NormGrads, NormInputs, NormKind, NormOutputs, NormSaved};
use crate::flex::LANES;
use crate::flex::tensor::{contiguous, dims, tensor, values};

/// Rows a task handles: a fixed number, so sums over tiles do not depend on the threads.
const TILE: usize = 64;

/// Sum of `f(i)` over a row, always in the same order.
#[inline(always)]
pub(crate) fn row_sum(len: usize, f: impl Fn(usize) -> f32) -> f32 {
    let mut lanes = [0.0f32; LANES];
    let whole = len / LANES * LANES;
    for i in (0..whole).step_by(LANES) {
        for (lane, total) in lanes.iter_mut().enumerate() {
            *total += f(i + lane);
        }
    }
    let mut total = crate::flex::sum(lanes);
    for i in whole..len {
        total += f(i);
    }
    total
}

/// Forward pass over `[M, D]` rows.
pub(crate) fn forward(inputs: NormInputs<FlexTensor>) -> NormOutputs<FlexTensor> {
    let dtype = inputs.x.dtype();
    let sum_dtype = inputs.residual.as_ref().map_or(DType::F32, |r| r.dtype());
    let [rows, width] = dims(&inputs.x);
    let x = contiguous(inputs.x);
    let residual = inputs.residual.map(contiguous);
    let weight = contiguous(inputs.weight);
    let bias = inputs.bias.map(contiguous);
    let (x, weight) = (values(&x), values(&weight));
    let (residual, bias) = (residual.as_ref().map(values), bias.as_ref().map(values));

    let mut y = vec![0.0; rows * width];
    let mut sum = vec![0.0; rows * width];
    let mut mean = vec![0.0; rows];
    let mut rstd = vec![0.0; rows];
    let rows_in = RowsIn {
        x,
        residual,
        weight,
        bias,
        kind: inputs.kind,
        eps: inputs.eps,
    };
    y.par_chunks_mut(TILE * width)
        .zip(sum.par_chunks_mut(TILE * width))
        .zip(mean.par_chunks_mut(TILE).zip(rstd.par_chunks_mut(TILE)))
        .enumerate()
        .for_each(|(tile, ((y, sum), (mean, rstd)))| {
            forward_tile(&rows_in, tile, y, sum, mean, rstd);
        });
    NormOutputs {
        y: tensor(y, [rows, width], dtype),
        sum: tensor(sum, [rows, width], sum_dtype),
        mean: tensor(mean, [rows], DType::F32),
        rstd: tensor(rstd, [rows], DType::F32),
    }
}

/// Inputs of the forward pass.
struct RowsIn<'a> {
    x: &'a [f32],
    residual: Option<&'a [f32]>,
    weight: &'a [f32],
    bias: Option<&'a [f32]>,
    kind: NormKind,
    eps: f32,
}

/// The rows of one tile.
#[multiversion(targets = "simd")]
fn forward_tile(
    rows: &RowsIn<'_>,
    tile: usize,
    y: &mut [f32],
    sum: &mut [f32],
    mean: &mut [f32],
    rstd: &mut [f32],
) {
    let width = rows.weight.len();
    for i in 0..mean.len() {
        let (at, local) = ((tile * TILE + i) * width, i * width);
        let sum = &mut sum[local..local + width];
        sum.copy_from_slice(&rows.x[at..at + width]);
        if let Some(residual) = rows.residual {
            for (s, r) in sum.iter_mut().zip(&residual[at..at + width]) {
                *s += r;
            }
        }
        (mean[i], rstd[i]) = moments(sum, rows.kind, rows.eps);
        let y = &mut y[local..local + width];
        for ((y, s), w) in y.iter_mut().zip(sum.iter()).zip(rows.weight) {
            *y = (s - mean[i]) * rstd[i] * w;
        }
        if let Some(bias) = rows.bias {
            for (y, b) in y.iter_mut().zip(bias) {
                *y += b;
            }
        }
    }
}

/// Mean (zero for RMSNorm) and reciprocal deviation of one row.
#[inline(always)]
pub(crate) fn moments(row: &[f32], kind: NormKind, eps: f32) -> (f32, f32) {
    let width = row.len() as f32;
    let mean = match kind {
        NormKind::Rms => 0.0,
        NormKind::Layer => row_sum(row.len(), |j| row[j]) / width,
    };
    let variance = row_sum(row.len(), |j| (row[j] - mean) * (row[j] - mean)) / width;
    (mean, 1.0 / (variance + eps).sqrt())
}

/// Backward pass over `[M, D]` rows.
///
/// With x̂ the normalised row and w the weighted gradient `dy · weight`:
/// `dsum = rstd · (w - mean(w) - x̂ · mean(w · x̂))`, without the `mean(w)` for RMSNorm.
pub(crate) fn backward(saved: NormSaved<FlexTensor>, dy: FlexTensor) -> NormGrads<FlexTensor> {
    let sum_dtype = saved.sum.dtype();
    let [rows, width] = dims(&saved.sum);
    let sum = contiguous(saved.sum);
    let dy = contiguous(dy);
    let (mean, rstd) = (contiguous(saved.mean), contiguous(saved.rstd));
    let weight = contiguous(saved.weight);
    let (sum, dy, weight) = (values(&sum), values(&dy), values(&weight));
    let (mean, rstd) = (values(&mean), values(&rstd));

    let rows_back = RowsBack {
        sum,
        dy,
        weight,
        mean,
        rstd,
        kind: saved.kind,
    };
    let mut dsum = vec![0.0; rows * width];
    let parts: Vec<Vec<f32>> = dsum
        .par_chunks_mut(TILE * width)
        .enumerate()
        .map(|(tile, out)| backward_tile(&rows_back, tile, out))
        .collect();
    let mut total = vec![0.0; 2 * width];
    for part in parts {
        for (t, p) in total.iter_mut().zip(part) {
            *t += p;
        }
    }
    let dbias = total.split_off(width);
    NormGrads {
        sum: tensor(dsum, [rows, width], sum_dtype),
        weight: tensor(total, [width], DType::F32),
        bias: saved.has_bias.then(|| tensor(dbias, [width], DType::F32)),
    }
}

/// Inputs of the backward pass.
struct RowsBack<'a> {
    sum: &'a [f32],
    dy: &'a [f32],
    weight: &'a [f32],
    mean: &'a [f32],
    rstd: &'a [f32],
    kind: NormKind,
}

/// The rows of one tile; returns the tile's gradients of the weight, then of the bias.
#[multiversion(targets = "simd")]
fn backward_tile(rows: &RowsBack<'_>, tile: usize, out: &mut [f32]) -> Vec<f32> {
    let weight = rows.weight;
    let width = weight.len();
    let mut part = vec![0.0; 2 * width];
    for (i, out) in out.chunks_exact_mut(width).enumerate() {
        let row = tile * TILE + i;
        let at = row * width;
        let sum = &rows.sum[at..at + width];
        let dy = &rows.dy[at..at + width];
        let (mean, rstd) = (rows.mean[row], rows.rstd[row]);
        let shift = match rows.kind {
            NormKind::Rms => 0.0,
            NormKind::Layer => row_sum(width, |j| dy[j] * weight[j]) / width as f32,
        };
        let normal = |j: usize| (sum[j] - mean) * rstd;
        let slope = row_sum(width, |j| dy[j] * weight[j] * normal(j)) / width as f32;
        let (dweight, dbias) = part.split_at_mut(width);
        for j in 0..width {
            let normal = (sum[j] - mean) * rstd;
            out[j] = rstd * (dy[j] * weight[j] - shift - normal * slope);
            dweight[j] += dy[j] * normal;
            dbias[j] += dy[j];
        }
    }
    part
}
