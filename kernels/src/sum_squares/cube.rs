//! The sum on a GPU.
//!
//! The cubes of a tensor's launch take turns over it in steps of the whole grid, each unit adding
//! up one vector a step with several loads in flight; every cube leaves one number. A last cube
//! adds up the numbers of all tensors.

use burn::tensor::DType;
use burn_cubecl::tensor::CubeTensor;
use cubecl::ir::ElemType;
use cubecl::prelude::*;

use crate::cube::reduce::{cube_sum, sum_strided, total};
use crate::cube::{
    DeviceTraits, address_type, buffer, contiguous, cube_dim, elem, empty, grid, vector_width,
};

/// Most elements of a vector.
const VECTOR: usize = 4;
/// Vectors of a unit in flight together.
const AHEAD: usize = 4;
/// Units that the size of a cube aims at.
const UNITS: usize = 256;

/// See [`MambaKernels::sum_squares`](crate::MambaKernels::sum_squares).
pub(crate) fn sum_squares(tensors: Vec<CubeTensor>) -> CubeTensor {
    let mut tensors: Vec<_> = tensors.into_iter().map(contiguous).collect();
    let first = tensors[0].clone();
    // An empty buffer cannot be bound.
    tensors.retain(|x| x.meta.num_elements() > 0);
    let device = DeviceTraits::of(&first);
    let units = UNITS.next_multiple_of(device.plane).min(device.max_units);
    let cubes: Vec<usize> = tensors
        .iter()
        .map(|x| cubes_of(x, units, &device))
        .collect();
    let count: usize = cubes.iter().sum();
    let partials = empty(&first, [count.max(1)], DType::F32);
    let mut at = 0;
    for (x, cubes) in tensors.iter().zip(cubes) {
        launch_partials(x, &partials, at, cubes, [units, device.plane]);
        at += cubes;
    }
    let sum = empty(&first, [1], DType::F32);
    // SAFETY: the kernel reads the first `count` numbers, all of which were written, and writes one.
    unsafe {
        sum_partials::launch_unchecked(
            &first.client,
            grid(1),
            cube_dim(units),
            address_type(&[&partials]),
            buffer(&partials),
            buffer(&sum),
            count,
            units,
            device.plane,
        );
    }
    sum
}

/// Cubes that read a tensor: enough to keep the device busy, each with something to do.
fn cubes_of(x: &CubeTensor, units: usize, device: &DeviceTraits) -> usize {
    let useful = x.meta.num_elements().div_ceil(units * VECTOR * AHEAD);
    useful.clamp(1, (device.busy_units / units).max(1))
}

/// Writes the sums of the squares of `x` to `cubes` places of `partials`, from `at` on.
fn launch_partials(
    x: &CubeTensor,
    partials: &CubeTensor,
    at: usize,
    cubes: usize,
    [units, plane]: [usize; 2],
) {
    let elements = x.meta.num_elements();
    let vector = vector_width(VECTOR, elements, &[(x, elements)]);
    // SAFETY: positions in `x` are bounded by its number of vectors; there is a place of `partials`
    // for every cube, and cubes beyond them do nothing.
    unsafe {
        square_sums::launch_unchecked(
            &x.client,
            grid(cubes),
            cube_dim(units),
            address_type(&[x, partials]),
            vector,
            buffer(x),
            buffer(partials),
            elements / vector,
            at,
            cubes,
            units,
            plane,
            elem(x.dtype),
        );
    }
}

/// One partial sum a cube.
#[cube(launch_unchecked, address_type = "dynamic")]
fn square_sums<X: Float, N: Size>(
    x: &[Vector<X, N>],
    partials: &mut [f32],
    vectors: usize,
    at: usize,
    cubes: usize,
    #[comptime] units: usize,
    #[comptime] plane: usize,
    #[define(X)] _type: ElemType,
) {
    if CUBE_POS >= cubes {
        terminate!();
    }
    let mut scratch = Shared::<[f32]>::new_slice(comptime!(units / plane));
    let stride = cubes * units;
    let mut sums = Vector::<f32, N>::new(0.0f32);
    for turn in 0..vectors.div_ceil(stride * AHEAD) {
        let first = turn * AHEAD * stride + CUBE_POS * units + UNIT_POS as usize;
        let mut loaded = Array::<Vector<X, N>>::new(AHEAD);
        #[unroll]
        for i in 0..AHEAD {
            loaded[i] = x[min(first + i * stride, vectors - 1)];
        }
        #[unroll]
        for i in 0..AHEAD {
            if first + i * stride < vectors {
                let value = Vector::<f32, N>::cast_from(loaded[i]);
                sums = fma(value, value, sums);
            }
        }
    }
    let sum = cube_sum(total(sums), &mut scratch, units, plane);
    if UNIT_POS == 0 {
        partials[at + CUBE_POS] = sum;
    }
}

/// The sum of all partials, by one cube.
#[cube(launch_unchecked, address_type = "dynamic")]
fn sum_partials(
    partials: &[f32],
    sum: &mut [f32],
    count: usize,
    #[comptime] units: usize,
    #[comptime] plane: usize,
) {
    if CUBE_POS > 0 {
        terminate!();
    }
    let mut scratch = Shared::<[f32]>::new_slice(comptime!(units / plane));
    let unit = UNIT_POS as usize;
    let mut own = 0.0f32;
    if unit < count {
        own = sum_strided(partials, unit, (count - unit).div_ceil(units), units);
    }
    let all = cube_sum(own, &mut scratch, units, plane);
    if unit == 0 {
        sum[0] = all;
    }
}
