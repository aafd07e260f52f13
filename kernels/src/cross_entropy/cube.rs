//! Cross-entropy on a GPU.
//!
//! A row's classes are spread over the lanes of one plane (bytes: 256 classes, 8 a lane of 32), so
//! its maximum and its sum are shuffles, with no barrier. The row is read twice, the second time
//! from cache. Backward is one element-wise pass from the saved log-sum-exp.

use burn::tensor::DType;
use burn_cubecl::kernel::cast;
use burn_cubecl::tensor::CubeTensor;
use cubecl::ir::ElemType;
use cubecl::prelude::*;

use crate::cube::math::{LN2, LOG2E, exp2, log2};
use crate::cube::reduce::{lane_max, lane_sum};
use crate::cube::{
    DeviceTraits, address_type, buffer, contiguous, contiguous_f32, cube_dim, dims, elem, empty,
    grid,
};

/// Units of a cube.
const UNITS: usize = 128;

/// See [`MambaKernels::cross_entropy`](crate::MambaKernels::cross_entropy).
pub(crate) fn forward(logits: CubeTensor, targets: CubeTensor) -> (CubeTensor, CubeTensor) {
    let logits = contiguous(logits);
    let targets = integers(targets);
    let [rows, classes] = dims(&logits);
    let device = DeviceTraits::of(&logits);
    let losses = empty(&logits, [rows], DType::F32);
    let log_sum_exp = empty(&logits, [rows], DType::F32);
    let units = UNITS.max(device.plane);
    // SAFETY: every position is derived from the shapes passed along, whose buffers are contiguous
    // and of just these sizes; targets are bounded by the kernel; rows beyond the last write nothing.
    unsafe {
        loss_forward::launch_unchecked(
            &logits.client,
            grid(rows.div_ceil(units / device.plane)),
            cube_dim(units),
            address_type(&[&logits]),
            buffer(&logits),
            buffer(&targets),
            buffer(&losses),
            buffer(&log_sum_exp),
            rows,
            classes,
            units,
            device.plane,
            device.ptx,
            [elem(logits.dtype), elem(targets.dtype)],
        );
    }
    (losses, log_sum_exp)
}

/// See [`MambaKernels::cross_entropy_backward`](crate::MambaKernels::cross_entropy_backward).
pub(crate) fn backward(
    logits: CubeTensor,
    targets: CubeTensor,
    log_sum_exp: CubeTensor,
    dloss: CubeTensor,
) -> CubeTensor {
    let logits = contiguous(logits);
    let targets = integers(targets);
    let [rows, classes] = dims(&logits);
    let device = DeviceTraits::of(&logits);
    let dlogits = empty(&logits, [rows, classes], logits.dtype);
    // SAFETY: as in `forward`.
    unsafe {
        loss_backward::launch_unchecked(
            &logits.client,
            grid((rows * classes).div_ceil(UNITS)),
            cube_dim(UNITS),
            address_type(&[&logits]),
            buffer(&logits),
            buffer(&targets),
            buffer(&contiguous_f32(log_sum_exp)),
            buffer(&contiguous_f32(dloss)),
            buffer(&dlogits),
            rows,
            classes,
            device.ptx,
            [elem(logits.dtype), elem(targets.dtype)],
        );
    }
    dlogits
}

/// Contiguous targets of a type that the kernels read.
fn integers(targets: CubeTensor) -> CubeTensor {
    contiguous(match targets.dtype {
        DType::I32 | DType::I64 => targets,
        _ => cast(targets, DType::I32),
    })
}

/// Loss and log-sum-exp, one row a plane.
#[cube(launch_unchecked, address_type = "dynamic")]
fn loss_forward<X: Float, I: Int>(
    logits: &[X],
    targets: &[I],
    losses: &mut [f32],
    log_sum_exp: &mut [f32],
    rows: usize,
    classes: usize,
    #[comptime] units: usize,
    #[comptime] plane: usize,
    #[comptime] ptx: bool,
    #[define(X, I)] _types: [ElemType; 2],
) {
    let unit = UNIT_POS as usize;
    let lane = unit % plane;
    let own = CUBE_POS * comptime!(units / plane) + unit / plane;
    // Planes beyond the last row repeat it: shuffles want every lane.
    let row = min(own, rows - 1);
    let first = row * classes;
    let turns = classes.div_ceil(plane);
    let mut largest = f32::cast_from(logits[first]);
    for turn in 0..turns {
        let class = min(turn * plane + lane, classes - 1);
        largest = max(largest, f32::cast_from(logits[first + class]));
    }
    let largest = lane_max(largest, plane);
    let mut sum = 0.0f32;
    for turn in 0..turns {
        let class = turn * plane + lane;
        if class < classes {
            sum += exp2(
                (f32::cast_from(logits[first + class]) - largest) * LOG2E,
                ptx,
            );
        }
    }
    let sum = lane_sum(sum, plane, 1usize);
    if own < rows && lane == 0 {
        // The largest logit alone adds 1.
        let total = largest + log2(max(sum, 1.0f32), ptx) * LN2;
        // A target out of range is the caller's mistake; it must not become a wild read.
        let target = min(usize::cast_from(targets[row]), classes - 1);
        log_sum_exp[row] = total;
        losses[row] = total - f32::cast_from(logits[first + target]);
    }
}

/// `(softmax - one-hot) · dloss`, one unit an element.
#[cube(launch_unchecked, address_type = "dynamic")]
fn loss_backward<X: Float, I: Int>(
    logits: &[X],
    targets: &[I],
    log_sum_exp: &[f32],
    dloss: &[f32],
    dlogits: &mut [X],
    rows: usize,
    classes: usize,
    #[comptime] ptx: bool,
    #[define(X, I)] _types: [ElemType; 2],
) {
    let at = CUBE_POS * CUBE_DIM as usize + UNIT_POS as usize;
    let row = at / classes;
    if row < rows {
        let class = at % classes;
        let share = exp2((f32::cast_from(logits[at]) - log_sum_exp[row]) * LOG2E, ptx);
        let target = min(usize::cast_from(targets[row]), classes - 1);
        let hit = select(class == target, 1.0f32, 0.0f32);
        dlogits[at] = X::cast_from((share - hit) * dloss[row]);
    }
}
