//! AdamW on a GPU: one element-wise pass over parameters and their moments, four numbers a unit where
//! the sizes allow, in place where nothing else holds a buffer.
//!
//! A model has hundreds of parameters of which most are small: one launch takes as many as the
//! device binds buffers.

use burn::tensor::DType;
use burn_cubecl::tensor::CubeTensor;
use cubecl::ir::ElemType;
use cubecl::prelude::*;

use super::{AdamwStep, RawUpdate};
use crate::cube::{
    address_type, buffer, contiguous, contiguous_f32, cube_dim, elem, grid, launches, starts,
    vector_width,
};

/// Units of a cube.
const UNITS: usize = 256;
/// Most numbers of a unit.
const VECTOR: usize = 4;

/// See [`MambaKernels::adamw_steps`](crate::MambaKernels::adamw_steps).
pub(crate) fn steps(
    updates: Vec<RawUpdate<CubeTensor>>,
    grad_scale: CubeTensor,
    step: AdamwStep,
) -> Vec<[CubeTensor; 3]> {
    let grad_scale = contiguous_f32(grad_scale);
    let updates: Vec<_> = updates
        .into_iter()
        .map(|update| RawUpdate {
            param: writable(contiguous_f32(update.param)),
            grad: contiguous(update.grad),
            moment1: writable(contiguous_f32(update.moment1)),
            moment2: writable(contiguous_f32(update.moment2)),
        })
        .collect();
    for some in launches(&updates, form, &grad_scale, 4) {
        launch(some, &grad_scale, step);
    }
    let results = |it: RawUpdate<_>| [it.param, it.moment1, it.moment2];
    updates.into_iter().map(results).collect()
}

/// Numbers of a unit, and the data type of the gradient.
fn form(update: &RawUpdate<CubeTensor>) -> (usize, DType) {
    let elements = update.param.meta.num_elements();
    let buffers = [
        &update.param,
        &update.moment1,
        &update.moment2,
        &update.grad,
    ];
    let rows = buffers.map(|tensor| (tensor, elements));
    (vector_width(VECTOR, elements, &rows), update.grad.dtype)
}

/// Updates the parameters, which are of one form.
fn launch(updates: &[RawUpdate<CubeTensor>], grad_scale: &CubeTensor, step: AdamwStep) {
    let (vector, dtype) = form(&updates[0]);
    let vectors = |it: &RawUpdate<CubeTensor>| it.param.meta.num_elements() / vector;
    // The first cube of each parameter, and the one after the last.
    let cubes = starts(updates.iter().map(|it| vectors(it).div_ceil(UNITS)));
    let params: Vec<_> = updates.iter().map(|it| &it.param).collect();
    // SAFETY: the four buffers of a parameter are contiguous and as long as it is, and the three
    // that are written belong to this call alone; units beyond the last vector write nothing.
    unsafe {
        update::launch_unchecked(
            &grad_scale.client,
            grid(cubes[updates.len()]),
            cube_dim(UNITS),
            address_type(&params),
            vector,
            updates.iter().map(|it| buffer(&it.param)).collect(),
            updates.iter().map(|it| buffer(&it.moment1)).collect(),
            updates.iter().map(|it| buffer(&it.moment2)).collect(),
            updates.iter().map(|it| buffer(&it.grad)).collect(),
            buffer(grad_scale),
            updates.iter().map(vectors).collect(),
            cubes.into_iter().collect(),
            step.beta1,
            step.beta2,
            step.eps,
            1.0 - step.lr * step.weight_decay,
            step.lr,
            step.correction1,
            step.correction2,
            elem(dtype),
        );
    }
}

/// A tensor whose buffer nothing else holds: the tensor itself or a copy.
pub(super) fn writable(tensor: CubeTensor) -> CubeTensor {
    if tensor.can_mut() {
        tensor
    } else {
        tensor.copy()
    }
}

/// Whether a number is neither infinite nor NaN, by its bits: not every target defines comparisons
/// with those.
#[cube]
pub(super) fn is_finite(x: f32) -> bool {
    u32::reinterpret(x) & 0x7f80_0000u32 != 0x7f80_0000u32
}

/// The update; the formulas are in the [module's documentation](super). Parameter `i` has
/// `vectors[i]` vectors, and the cubes from `cubes[i]` up to `cubes[i + 1]`.
#[cube(launch_unchecked, address_type = "dynamic")]
fn update<G: Float, N: Size>(
    params: &mut Sequence<Box<[Vector<f32, N>]>>,
    moments1: &mut Sequence<Box<[Vector<f32, N>]>>,
    moments2: &mut Sequence<Box<[Vector<f32, N>]>>,
    grads: &Sequence<Box<[Vector<G, N>]>>,
    grad_scale: &[f32],
    vectors: &Sequence<usize>,
    cubes: &Sequence<usize>,
    beta1: f32,
    beta2: f32,
    eps: f32,
    keep: f32,
    lr: f32,
    correction1: f32,
    correction2: f32,
    #[define(G)] _type: ElemType,
) {
    let scale = grad_scale[0];
    // A buffer is known when a kernel is compiled: each parameter has code of its own. Loads that
    // choose among buffers and meet in one register would wait for each other.
    #[unroll]
    for i in 0..comptime!(params.len()) {
        let own = CUBE_POS >= cubes[i] && CUBE_POS < cubes[comptime!(i + 1)];
        let at = (CUBE_POS - cubes[i]) * UNITS + UNIT_POS as usize;
        if own && at < vectors[i] && is_finite(scale) {
            let g = Vector::<f32, N>::cast_from(grads.index(i)[at]) * Vector::new(scale);
            let m = moments1.index(i)[at] * Vector::new(beta1) + g * Vector::new(1.0f32 - beta1);
            let v =
                moments2.index(i)[at] * Vector::new(beta2) + g * g * Vector::new(1.0f32 - beta2);
            let root = (v / Vector::new(correction2)).sqrt() + Vector::new(eps);
            let update = m / Vector::new(correction1) / root;
            params.index_mut(i)[at] =
                params.index(i)[at] * Vector::new(keep) - update * Vector::new(lr);
            moments1.index_mut(i)[at] = m;
            moments2.index_mut(i)[at] = v;
        }
    }
}
