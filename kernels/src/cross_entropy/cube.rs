//! Cross-entropy on a GPU.
//!
//! A row's classes are spread over the lanes of one plane as vectors (bytes: 256 classes, 8 a lane
//! of 32), so its maximum and its sum are shuffles, with no barrier. The row is read twice, the
//! second time from cache. Backward is one element-wise pass from the saved log-sum-exp.

use burn::tensor::DType;
use burn_cubecl::tensor::CubeTensor;
use cubecl::ir::ElemType;
use cubecl::prelude::*;

use crate::cube::math::{LN2, LOG2E, exp2, log2};
use crate::cube::reduce::{lane_max, lane_sum};
use crate::cube::{
    DeviceTraits, address_type, buffer, contiguous, contiguous_f32, cube_dim, dims, elem, empty,
    grid, integers, vector_width,
};

/// Units of a cube.
const UNITS: usize = 128;
/// Most classes of a vector.
const VECTOR: usize = 4;

/// See [`MambaKernels::cross_entropy`](crate::MambaKernels::cross_entropy).
pub(crate) fn forward(logits: CubeTensor, targets: CubeTensor) -> (CubeTensor, CubeTensor) {
    let logits = contiguous(logits);
    let targets = integers(targets);
    let [rows, classes] = dims(&logits);
    let device = DeviceTraits::of(&logits);
    let losses = empty(&logits, [rows], DType::F32);
    let log_sum_exp = empty(&logits, [rows], DType::F32);
    let units = UNITS.max(device.plane);
    let vector = vector_width(VECTOR, classes, &[(&logits, classes)]);
    // SAFETY: every position is derived from the shapes passed along, whose buffers are contiguous
    // and of just these sizes; targets are bounded by the kernel; rows beyond the last write nothing.
    unsafe {
        loss_forward::launch_unchecked(
            &logits.client,
            grid(rows.div_ceil(units / device.plane)),
            cube_dim(units),
            address_type(&[&logits]),
            vector,
            buffer(&logits),
            buffer(&targets),
            buffer(&losses),
            buffer(&log_sum_exp),
            rows,
            classes / vector,
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
    dtype: DType,
) -> CubeTensor {
    let logits = contiguous(logits);
    let targets = integers(targets);
    let [rows, classes] = dims(&logits);
    let device = DeviceTraits::of(&logits);
    let dlogits = empty(&logits, [rows, classes], dtype);
    let vector = vector_width(VECTOR, classes, &[(&logits, classes)]);
    let columns = classes / vector;
    // SAFETY: as in `forward`.
    unsafe {
        loss_backward::launch_unchecked(
            &logits.client,
            grid((rows * columns).div_ceil(UNITS)),
            cube_dim(UNITS),
            address_type(&[&logits]),
            vector,
            buffer(&logits),
            buffer(&targets),
            buffer(&contiguous_f32(log_sum_exp)),
            buffer(&contiguous_f32(dloss)),
            buffer(&dlogits),
            rows,
            columns,
            device.ptx,
            [elem(logits.dtype), elem(targets.dtype), elem(dtype)],
        );
    }
    dlogits
}

/// Loss and log-sum-exp, one row a plane; `columns` is the number of vectors in a row.
#[cube(launch_unchecked, address_type = "dynamic")]
fn loss_forward<X: Float, I: Int, N: Size>(
    logits: &[Vector<X, N>],
    targets: &[I],
    losses: &mut [f32],
    log_sum_exp: &mut [f32],
    rows: usize,
    columns: usize,
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
    let first = row * columns;
    // A target out of range is the caller's mistake; it must not become a wild read.
    let target = min(usize::cast_from(targets[row]), columns * N::value() - 1);
    let turns = columns.div_ceil(plane);
    let mut largest = f32::cast_from(logits[first].extract(0usize));
    // The target's logit, in the lane that meets it.
    let mut hit = 0.0f32;
    for turn in 0..turns {
        let column = turn * plane + lane;
        let values = logits[first + min(column, columns - 1)];
        #[unroll]
        for i in 0..N::value() {
            let value = f32::cast_from(values.extract(i));
            largest = max(largest, value);
            hit += select(column * N::value() + i == target, value, 0.0f32);
        }
    }
    let largest = lane_max(largest, plane);
    let mut sum = 0.0f32;
    for turn in 0..turns {
        let column = turn * plane + lane;
        if column < columns {
            let values = logits[first + column];
            #[unroll]
            for i in 0..N::value() {
                sum += exp2((f32::cast_from(values.extract(i)) - largest) * LOG2E, ptx);
            }
        }
    }
    let sum = lane_sum(sum, plane, 1usize);
    let hit = lane_sum(hit, plane, 1usize);
    if own < rows && lane == 0 {
        // The largest logit alone adds 1. A maximum with 1 would make 1 of what is not a number.
        let total = largest + log2(select(sum < 1.0f32, 1.0f32, sum), ptx) * LN2;
        log_sum_exp[row] = total;
        losses[row] = total - hit;
    }
}

/// `(softmax - one-hot) · dloss`, one unit a vector; `columns` is the number of vectors in a row.
#[cube(launch_unchecked, address_type = "dynamic")]
fn loss_backward<X: Float, I: Int, O: Float, N: Size>(
    logits: &[Vector<X, N>],
    targets: &[I],
    log_sum_exp: &[f32],
    dloss: &[f32],
    dlogits: &mut [Vector<O, N>],
    rows: usize,
    columns: usize,
    #[comptime] ptx: bool,
    #[define(X, I, O)] _types: [ElemType; 3],
) {
    let at = CUBE_POS * CUBE_DIM as usize + UNIT_POS as usize;
    let row = at / columns;
    if row < rows {
        let class = at % columns * N::value();
        let values = logits[at];
        let target = min(usize::cast_from(targets[row]), columns * N::value() - 1);
        let total = log_sum_exp[row];
        let scale = dloss[row];
        let mut grads = Vector::<f32, N>::new(0.0f32);
        #[unroll]
        for i in 0..N::value() {
            let share = exp2((f32::cast_from(values.extract(i)) - total) * LOG2E, ptx);
            let hit = select(class + i == target, 1.0f32, 0.0f32);
            grads.insert(i, (share - hit) * scale);
        }
        dlogits[at] = Vector::cast_from(grads);
    }
}
