//! AdamW on a GPU: one element-wise pass over the parameter and its moments, four numbers a unit
//! where the size allows, in place where nothing else holds the buffer.

use burn_cubecl::tensor::CubeTensor;
use cubecl::ir::ElemType;
use cubecl::prelude::*;

use super::AdamwStep;
use crate::cube::{
    address_type, buffer, contiguous, contiguous_f32, cube_dim, elem, grid, vector_width,
};

/// Units of a cube.
const UNITS: usize = 256;
/// Most numbers of a unit.
const VECTOR: usize = 4;

/// See [`MambaKernels::adamw_step`](crate::MambaKernels::adamw_step).
pub(crate) fn step(
    param: CubeTensor,
    grad: CubeTensor,
    moment1: CubeTensor,
    moment2: CubeTensor,
    grad_scale: CubeTensor,
    step: AdamwStep,
) -> (CubeTensor, CubeTensor, CubeTensor) {
    let param = writable(contiguous_f32(param));
    let moment1 = writable(contiguous_f32(moment1));
    let moment2 = writable(contiguous_f32(moment2));
    let grad = contiguous(grad);
    let elements = param.meta.num_elements();
    let rows = [&param, &moment1, &moment2, &grad].map(|tensor| (tensor, elements));
    let vector = vector_width(VECTOR, elements, &rows);
    let vectors = elements / vector;
    // SAFETY: all four buffers are contiguous, of `elements` numbers, and the three that are
    // written belong to this call alone; units beyond the last vector write nothing.
    unsafe {
        update::launch_unchecked(
            &param.client,
            grid(vectors.div_ceil(UNITS)),
            cube_dim(UNITS),
            address_type(&[&param]),
            vector,
            buffer(&param),
            buffer(&moment1),
            buffer(&moment2),
            buffer(&grad),
            buffer(&contiguous_f32(grad_scale)),
            vectors,
            step.beta1,
            step.beta2,
            step.eps,
            1.0 - step.lr * step.weight_decay,
            step.lr,
            step.correction1,
            step.correction2,
            elem(grad.dtype),
        );
    }
    (param, moment1, moment2)
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

/// The update; the formulas are in the [module's documentation](super).
#[cube(launch_unchecked, address_type = "dynamic")]
fn update<G: Float, N: Size>(
    param: &mut [Vector<f32, N>],
    moment1: &mut [Vector<f32, N>],
    moment2: &mut [Vector<f32, N>],
    grad: &[Vector<G, N>],
    grad_scale: &[f32],
    vectors: usize,
    beta1: f32,
    beta2: f32,
    eps: f32,
    keep: f32,
    lr: f32,
    correction1: f32,
    correction2: f32,
    #[define(G)] _type: ElemType,
) {
    let at = CUBE_POS * CUBE_DIM as usize + UNIT_POS as usize;
    let scale = grad_scale[0];
    if at < vectors && is_finite(scale) {
        let g = Vector::<f32, N>::cast_from(grad[at]) * Vector::new(scale);
        let m = moment1[at] * Vector::new(beta1) + g * Vector::new(1.0f32 - beta1);
        let v = moment2[at] * Vector::new(beta2) + g * g * Vector::new(1.0f32 - beta2);
        let root = (v / Vector::new(correction2)).sqrt() + Vector::new(eps);
        let update = m / Vector::new(correction1) / root;
        param[at] = param[at] * Vector::new(keep) - update * Vector::new(lr);
        moment1[at] = m;
        moment2[at] = v;
    }
}
