//! The sum on a GPU.
//!
//! The cubes of a tensor take turns over it in steps of all of them, each unit adding up one vector
//! a step with several loads in flight; every cube leaves one number. A last cube adds up the numbers
//! of all tensors. One launch takes as many tensors as the device binds buffers.

use burn::tensor::DType;
use burn_cubecl::tensor::CubeTensor;
use cubecl::ir::ElemType;
use cubecl::prelude::*;

use crate::cube::reduce::{cube_sum, sum_strided, total};
use crate::cube::{
    DeviceTraits, address_type, buffer, contiguous, cube_dim, elem, empty, grid, launches, starts,
    vector_width,
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
    let cubes = |x: &CubeTensor| cubes_of(x, units, &device);
    let count: usize = tensors.iter().map(cubes).sum();
    let partials = empty(&first, [count.max(1)], DType::F32);
    let mut at = 0;
    for some in launches(&tensors, form, &first, 1) {
        let starts = starts(some.iter().map(cubes));
        let all = starts[some.len()];
        launch_partials(some, starts, &partials, at, [units, device.plane]);
        at += all;
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

/// Numbers of a vector, and the data type.
fn form(x: &CubeTensor) -> (usize, DType) {
    let elements = x.meta.num_elements();
    (vector_width(VECTOR, elements, &[(x, elements)]), x.dtype)
}

/// Writes the sums of the squares of the tensors, which are of one form, to `partials`, from `at` on:
/// those of tensor `i` to the places `starts[i] .. starts[i + 1]` after that, by as many cubes.
fn launch_partials(
    tensors: &[CubeTensor],
    starts: Vec<usize>,
    partials: &CubeTensor,
    at: usize,
    [units, plane]: [usize; 2],
) {
    let (vector, dtype) = form(&tensors[0]);
    let vectors = |x: &CubeTensor| x.meta.num_elements() / vector;
    let buffers: Vec<_> = tensors.iter().chain([partials]).collect();
    // SAFETY: positions in a tensor are bounded by its number of vectors; there is a place of
    // `partials` for every cube, and cubes beyond them do nothing.
    unsafe {
        square_sums::launch_unchecked(
            &partials.client,
            grid(starts[tensors.len()]),
            cube_dim(units),
            address_type(&buffers),
            vector,
            tensors.iter().map(buffer).collect(),
            buffer(partials),
            tensors.iter().map(vectors).collect(),
            starts.into_iter().collect(),
            at,
            units,
            plane,
            elem(dtype),
        );
    }
}

/// One partial sum a cube.
#[cube(launch_unchecked, address_type = "dynamic")]
fn square_sums<X: Float, N: Size>(
    tensors: &Sequence<Box<[Vector<X, N>]>>,
    partials: &mut [f32],
    vectors: &Sequence<usize>,
    starts: &Sequence<usize>,
    at: usize,
    #[comptime] units: usize,
    #[comptime] plane: usize,
    #[define(X)] _type: ElemType,
) {
    let count = comptime!(tensors.len());
    if CUBE_POS >= starts[count] {
        terminate!();
    }
    let mut scratch = Shared::<[f32]>::new_slice(comptime!(units / plane));
    let mut sums = Vector::<f32, N>::new(0.0f32);
    #[unroll]
    for i in 0..count {
        if CUBE_POS >= starts[i] && CUBE_POS < starts[comptime!(i + 1)] {
            let cube = CUBE_POS - starts[i];
            let cubes = starts[comptime!(i + 1)] - starts[i];
            sums = own_squares::<X, N>(&tensors[i], vectors[i], cube, cubes, units);
        }
    }
    let sum = cube_sum(total(sums), &mut scratch, units, plane);
    if UNIT_POS == 0 {
        partials[at + CUBE_POS] = sum;
    }
}

/// The unit's share of a tensor's squares; its cube is number `cube` of `cubes`.
#[cube]
fn own_squares<X: Float, N: Size>(
    x: &[Vector<X, N>],
    vectors: usize,
    cube: usize,
    cubes: usize,
    #[comptime] units: usize,
) -> Vector<f32, N> {
    let stride = cubes * units;
    let mut sums = Vector::<f32, N>::new(0.0f32);
    for turn in 0..vectors.div_ceil(stride * AHEAD) {
        let first = turn * AHEAD * stride + cube * units + UNIT_POS as usize;
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
    sums
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
