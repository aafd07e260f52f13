//! The embedding on a GPU.
//!
//! Forward copies one vector a unit. Backward gives a cube a few columns of a tile of the gradient's
//! rows: each unit owns a column, and adds its numbers, in order, to that column of a table in
//! shared memory with a row for every byte value. No two units touch the same number, so there are
//! neither atomics nor barriers. The tiles' tables are added up by the common sum kernels.

use burn::backend::ops::FloatTensorOps;
use burn::tensor::{DType, Shape};
use burn_cubecl::CubeBackend;
use burn_cubecl::tensor::CubeTensor;
use cubecl::ir::ElemType;
use cubecl::prelude::*;

use crate::cube::{
    DeviceTraits, address_type, buffer, contiguous_f32, cube_dim, dims, elem, empty, grid,
    integers, sum_rows, vector_width,
};

/// Units of a cube, forward.
const UNITS: usize = 256;
/// Most columns of a vector, forward.
const VECTOR: usize = 4;
/// Columns of a cube, backward: one a unit.
const COLUMNS: usize = 32;
/// Rows of the table in shared memory: 32 KiB, what every runtime offers a cube.
const TABLE: usize = 32 * 1024 / (4 * COLUMNS);
/// Rows of the gradient whose loads are in flight together.
const AHEAD: usize = 16;
/// Cubes, backward, for every thousand units that the device can keep busy: as many tables as the
/// smallest shared memories hold.
const CUBES: usize = 4;

/// See [`MambaKernels::byte_embedding`](crate::MambaKernels::byte_embedding).
pub(crate) fn forward(weight: CubeTensor, bytes: CubeTensor) -> CubeTensor {
    let weight = contiguous_f32(weight);
    let bytes = integers(bytes);
    let [rows, width] = dims(&weight);
    let [count] = dims(&bytes);
    let y = empty(&weight, [count, width], DType::F32);
    let vector = vector_width(VECTOR, width, &[(&weight, width)]);
    let columns = width / vector;
    // SAFETY: every position is derived from the shapes passed along, whose buffers are contiguous
    // and of just these sizes; bytes are bounded by the kernel; units beyond the last vector do
    // nothing.
    unsafe {
        gather::launch_unchecked(
            &weight.client,
            grid((count * columns).div_ceil(UNITS)),
            cube_dim(UNITS),
            address_type(&[&weight, &y]),
            vector,
            buffer(&weight),
            buffer(&bytes),
            buffer(&y),
            rows,
            count,
            columns,
            elem(bytes.dtype),
        );
    }
    y
}

/// See [`MambaKernels::byte_embedding_backward`](crate::MambaKernels::byte_embedding_backward).
pub(crate) fn backward(bytes: CubeTensor, dy: CubeTensor, rows: usize) -> CubeTensor {
    let bytes = integers(bytes);
    let dy = contiguous_f32(dy);
    let [count, width] = dims(&dy);
    let device = DeviceTraits::of(&dy);
    // Cubes side by side: slices of the columns, and of the byte values where there are many.
    let slices = [width.div_ceil(COLUMNS), rows.div_ceil(TABLE)];
    let beside = slices[0] * slices[1];
    let tiles = (CUBES * device.busy_units / 1024 / beside).clamp(1, count.div_ceil(AHEAD).max(1));
    let tile_rows = count.div_ceil(tiles);
    let sums = empty(&dy, [tiles, rows * width], DType::F32);
    // SAFETY: as in `forward`; every number of `sums` belongs to one unit, which writes it.
    unsafe {
        scatter::launch_unchecked(
            &dy.client,
            grid(tiles * beside),
            cube_dim(COLUMNS),
            address_type(&[&dy, &sums]),
            buffer(&bytes),
            buffer(&dy),
            buffer(&sums),
            count,
            width,
            rows,
            tiles,
            tile_rows,
            elem(bytes.dtype),
        );
    }
    CubeBackend::float_reshape(sum_rows(sums), Shape::new([rows, width]))
}

/// One vector a unit; `columns` is the number of vectors in a row.
#[cube(launch_unchecked, address_type = "dynamic")]
fn gather<I: Int, N: Size>(
    weight: &[Vector<f32, N>],
    bytes: &[I],
    y: &mut [Vector<f32, N>],
    rows: usize,
    count: usize,
    columns: usize,
    #[define(I)] _type: ElemType,
) {
    let at = CUBE_POS * CUBE_DIM as usize + UNIT_POS as usize;
    let place = at / columns;
    if place < count {
        // A byte out of range is the caller's mistake; it must not become a wild read.
        let row = min(usize::cast_from(bytes[place]), rows - 1);
        y[at] = weight[row * columns + at % columns];
    }
}

/// One column of a tile a unit; `sums` holds `[tiles, V, D]`.
#[cube(launch_unchecked, address_type = "dynamic")]
fn scatter<I: Int>(
    bytes: &[I],
    dy: &[f32],
    sums: &mut [f32],
    count: usize,
    width: usize,
    rows: usize,
    tiles: usize,
    tile_rows: usize,
    #[define(I)] _type: ElemType,
) {
    let slices = width.div_ceil(COLUMNS);
    let column = CUBE_POS % slices * COLUMNS + UNIT_POS as usize;
    let tile = CUBE_POS / slices % tiles;
    // The byte values whose rows are in the table.
    let first = CUBE_POS / slices / tiles * TABLE;
    if first >= rows || column >= width {
        terminate!();
    }
    let held = min(rows - first, TABLE);
    let lane = UNIT_POS as usize;
    let mut table = Shared::<[f32]>::new_slice(comptime!(TABLE * COLUMNS));
    for row in 0..held {
        table[row * COLUMNS + lane] = 0.0f32;
    }
    let start = tile * tile_rows;
    let end = min(start + tile_rows, count);
    for group in 0..(max(end, start) - start).div_ceil(AHEAD) {
        let from = start + group * AHEAD;
        let mut values = Array::<f32>::new(AHEAD);
        let mut places = Array::<usize>::new(AHEAD);
        #[unroll]
        for i in 0..AHEAD {
            let place = min(from + i, end - 1);
            values[i] = dy[place * width + column];
            places[i] = min(usize::cast_from(bytes[place]), rows - 1);
        }
        #[unroll]
        for i in 0..AHEAD {
            if from + i < end && places[i] >= first && places[i] < first + held {
                table[(places[i] - first) * COLUMNS + lane] += values[i];
            }
        }
    }
    for row in 0..held {
        sums[(tile * rows + first + row) * width + column] = table[row * COLUMNS + lane];
    }
}
