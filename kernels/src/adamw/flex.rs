//! The update on the CPU: one pass, in place where nothing else holds the buffers.

use burn_flex::FlexTensor;
use multiversion::multiversion;
use rayon::prelude::*;

use super::{AdamwStep, RawUpdate};
use crate::flex::tensor::{contiguous, values, values_mut};

/// Elements a task handles.
const TILE: usize = 16 * 1024;

/// See [`MambaKernels::adamw_steps`](crate::MambaKernels::adamw_steps).
pub(crate) fn steps(
    updates: Vec<RawUpdate<FlexTensor>>,
    grad_scale: FlexTensor,
    step: AdamwStep,
) -> Vec<[FlexTensor; 3]> {
    let scale = values(&contiguous(grad_scale))[0];
    let one = |it| update_one(it, scale, step);
    updates.into_iter().map(one).collect()
}

/// Returns the parameter and its moments, updated.
fn update_one(update: RawUpdate<FlexTensor>, scale: f32, step: AdamwStep) -> [FlexTensor; 3] {
    let RawUpdate {
        param,
        grad,
        moment1,
        moment2,
    } = update;
    let (mut param, grad) = (contiguous(param), contiguous(grad));
    let (mut moment1, mut moment2) = (contiguous(moment1), contiguous(moment2));
    if !scale.is_finite() {
        return [param, moment1, moment2];
    }
    values_mut(&mut param)
        .par_chunks_mut(TILE)
        .zip(values_mut(&mut moment1).par_chunks_mut(TILE))
        .zip(values_mut(&mut moment2).par_chunks_mut(TILE))
        .zip(values(&grad).par_chunks(TILE))
        .for_each(|(((p, m), v), g)| update_tile(p, m, v, g, scale, step));
    [param, moment1, moment2]
}

/// Updates one tile.
#[multiversion(targets = "simd")]
fn update_tile(
    p: &mut [f32],
    m: &mut [f32],
    v: &mut [f32],
    g: &[f32],
    scale: f32,
    step: AdamwStep,
) {
    let keep = 1.0 - step.lr * step.weight_decay;
    for (((p, m), v), g) in p.iter_mut().zip(m).zip(v).zip(g) {
        let g = g * scale;
        *m = step.beta1 * *m + (1.0 - step.beta1) * g;
        *v = step.beta2 * *v + (1.0 - step.beta2) * g * g;
        let update = (*m / step.correction1) / ((*v / step.correction2).sqrt() + step.eps);
        *p = keep * *p - step.lr * update;
    }
}
