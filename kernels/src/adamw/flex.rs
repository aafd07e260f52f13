//! The update on the CPU: one pass, in place where nothing else holds the buffers.

use burn_flex::FlexTensor;
use multiversion::multiversion;
use rayon::prelude::*;

use super::AdamwStep;
use crate::flex::tensor::{contiguous, values, values_mut};

/// Elements a task handles.
const TILE: usize = 16 * 1024;

/// Returns `(param, moment1, moment2)`, updated.
pub(crate) fn step(
    param: FlexTensor,
    grad: FlexTensor,
    moment1: FlexTensor,
    moment2: FlexTensor,
    grad_scale: FlexTensor,
    step: AdamwStep,
) -> (FlexTensor, FlexTensor, FlexTensor) {
    let (mut param, grad) = (contiguous(param), contiguous(grad));
    let (mut moment1, mut moment2) = (contiguous(moment1), contiguous(moment2));
    let scale = values(&contiguous(grad_scale))[0];
    if !scale.is_finite() {
        return (param, moment1, moment2);
    }
    values_mut(&mut param)
        .par_chunks_mut(TILE)
        .zip(values_mut(&mut moment1).par_chunks_mut(TILE))
        .zip(values_mut(&mut moment2).par_chunks_mut(TILE))
        .zip(values(&grad).par_chunks(TILE))
        .for_each(|(((p, m), v), g)| update(p, m, v, g, scale, step));
    (param, moment1, moment2)
}

/// Updates one tile.
#[multiversion(targets = "simd")]
fn update(p: &mut [f32], m: &mut [f32], v: &mut [f32], g: &[f32], scale: f32, step: AdamwStep) {
    let keep = 1.0 - step.lr * step.weight_decay;
    for (((p, m), v), g) in p.iter_mut().zip(m).zip(v).zip(g) {
        let g = g * scale;
        *m = step.beta1 * *m + (1.0 - step.beta1) * g;
        *v = step.beta2 * *v + (1.0 - step.beta2) * g * g;
        let update = (*m / step.correction1) / ((*v / step.correction2).sqrt() + step.eps);
        *p = keep * *p - step.lr * update;
    }
}
