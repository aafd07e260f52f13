//! Normalisation on the CPU: rows in parallel, the width in vector lanes.

use burn::tensor::DType;
use burn_flex::FlexTensor;
use multiversion::multiversion;
use rayon::prelude::*;

use super::{NormKind, NormalizeBackward, NormalizeGrads, NormalizeInputs, Normalized};
use crate::add_norm::flex::{moments, row_sum};
use crate::flex::tensor::{contiguous, dims, tensor, values, values_mut};

/// Rows a task handles: a fixed number, so sums over tiles do not depend on the threads.
const TILE: usize = 64;

/// See [`MambaKernels::normalize`](crate::MambaKernels::normalize).
pub(crate) fn normalize(inputs: NormalizeInputs<FlexTensor>) -> Normalized<FlexTensor> {
    let [rows, width] = dims(&inputs.x);
    let x = contiguous(inputs.x);
    let mut hat = vec![0.0; rows * width];
    let mut rstd = vec![0.0; rows];
    hat.par_chunks_mut(TILE * width)
        .zip(rstd.par_chunks_mut(TILE))
        .zip(values(&x).par_chunks(TILE * width))
        .for_each(|((hat, rstd), x)| normalize_tile(x, hat, rstd, inputs.eps, inputs.kind));
    Normalized {
        hat: tensor(hat, [rows, width], inputs.dtype),
        rstd: tensor(rstd, [rows], DType::F32),
    }
}

/// The rows of one tile.
#[multiversion(targets = "simd")]
fn normalize_tile(x: &[f32], hat: &mut [f32], rstd: &mut [f32], eps: f32, kind: NormKind) {
    let width = x.len() / rstd.len();
    let rows = x.chunks_exact(width).zip(hat.chunks_exact_mut(width));
    for ((x, hat), rstd) in rows.zip(rstd) {
        let (mean, scale) = moments(x, kind, eps);
        for (hat, x) in hat.iter_mut().zip(x) {
            *hat = (x - mean) * scale;
        }
        *rstd = scale;
    }
}

/// See [`MambaKernels::affine`](crate::MambaKernels::affine).
pub(crate) fn affine(hat: FlexTensor, weight: FlexTensor, bias: Option<FlexTensor>) -> FlexTensor {
    let dtype = hat.dtype();
    let [rows, width] = dims(&hat);
    let (hat, weight) = (contiguous(hat), contiguous(weight));
    let bias = bias.map(contiguous);
    let (weight, bias) = (values(&weight), bias.as_ref().map(values));
    let mut y = vec![0.0; rows * width];
    y.par_chunks_mut(TILE * width)
        .zip(values(&hat).par_chunks(TILE * width))
        .for_each(|(y, hat)| affine_tile(hat, weight, bias, y));
    tensor(y, [rows, width], dtype)
}

/// The rows of one tile.
#[multiversion(targets = "simd")]
fn affine_tile(hat: &[f32], weight: &[f32], bias: Option<&[f32]>, y: &mut [f32]) {
    let width = weight.len();
    for (y, hat) in y.chunks_exact_mut(width).zip(hat.chunks_exact(width)) {
        match bias {
            Some(bias) => y.copy_from_slice(bias),
            None => y.fill(0.0),
        }
        for ((y, hat), weight) in y.iter_mut().zip(hat).zip(weight) {
            *y = hat.mul_add(*weight, *y);
        }
    }
}

/// See [`MambaKernels::normalize_affine`](crate::MambaKernels::normalize_affine).
pub(crate) fn normalize_affine(
    inputs: NormalizeInputs<FlexTensor>,
    weight: FlexTensor,
    bias: Option<FlexTensor>,
) -> (Normalized<FlexTensor>, FlexTensor) {
    let normalized = normalize(inputs);
    let normed = affine(normalized.hat.clone(), weight, bias);
    (normalized, normed)
}

/// See [`MambaKernels::normalize_backward`](crate::MambaKernels::normalize_backward).
///
/// With w the weighted gradient `dy · weight`:
/// `dx = dout + rstd · (w - mean(w) - hat · mean(w · hat))`, without the `mean(w)` for RMSNorm.
pub(crate) fn backward(inputs: NormalizeBackward<FlexTensor>) -> NormalizeGrads<FlexTensor> {
    let [_, width] = dims(&inputs.hat);
    let (hat, rstd) = (contiguous(inputs.hat), contiguous(inputs.rstd));
    let (weight, dy) = (contiguous(inputs.weight), contiguous(inputs.dy));
    let back = RowsBack {
        hat: values(&hat),
        rstd: values(&rstd),
        weight: values(&weight),
        dy: values(&dy),
        kind: inputs.kind,
    };
    let mut dx = contiguous(inputs.dout);
    let parts: Vec<Vec<f32>> = values_mut(&mut dx)
        .par_chunks_mut(TILE * width)
        .enumerate()
        .map(|(tile, dx)| backward_tile(&back, tile, dx))
        .collect();
    let mut dweight = vec![0.0; 2 * width];
    for part in parts {
        for (total, part) in dweight.iter_mut().zip(part) {
            *total += part;
        }
    }
    let dbias = dweight.split_off(width);
    NormalizeGrads {
        dx,
        weight: tensor(dweight, [width], DType::F32),
        bias: inputs.has_bias.then(|| tensor(dbias, [width], DType::F32)),
    }
}

/// Inputs of the backward pass.
struct RowsBack<'a> {
    hat: &'a [f32],
    rstd: &'a [f32],
    weight: &'a [f32],
    dy: &'a [f32],
    kind: NormKind,
}

/// Adds the gradient of one tile's rows to `dx`; returns the tile's gradients of the weight, then
/// of the bias.
#[multiversion(targets = "simd")]
fn backward_tile(rows: &RowsBack<'_>, tile: usize, dx: &mut [f32]) -> Vec<f32> {
    let weight = rows.weight;
    let width = weight.len();
    let mut part = vec![0.0; 2 * width];
    let (dweight, dbias) = part.split_at_mut(width);
    for (i, dx) in dx.chunks_exact_mut(width).enumerate() {
        let row = tile * TILE + i;
        let hat = &rows.hat[row * width..(row + 1) * width];
        let dy = &rows.dy[row * width..(row + 1) * width];
        let level = match rows.kind {
            NormKind::Rms => 0.0,
            NormKind::Layer => row_sum(width, |j| dy[j] * weight[j]) / width as f32,
        };
        let along = row_sum(width, |j| dy[j] * weight[j] * hat[j]) / width as f32;
        for j in 0..width {
            dx[j] += rows.rstd[row] * (dy[j] * weight[j] - level - hat[j] * along);
            dweight[j] = dy[j].mul_add(hat[j], dweight[j]);
            dbias[j] += dy[j];
        }
    }
    part
}
