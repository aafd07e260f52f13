//! What a layer's kernels take in the place of its parameters, on a GPU: the small passes over weights
//! alone, of which a training step has hundreds.

use burn::tensor::DType;
use burn_cubecl::tensor::CubeTensor;
use cubecl::ir::ElemType;
use cubecl::prelude::*;

use crate::cube::{
    address_type, buffer, contiguous, contiguous_f32, cube_dim, dims, elem, empty, empty_shape,
    grid, launches, starts, vector_width,
};

/// Units of a cube.
const UNITS: usize = 256;
/// Most numbers of a vector.
const VECTOR: usize = 4;
/// Vectors of a unit, whose loads are in flight together.
const PER_UNIT: usize = 4;

/// See [`MambaKernels::rounded`](crate::MambaKernels::rounded).
pub(crate) fn rounded<const N: usize>(tensors: [CubeTensor; N], dtype: DType) -> [CubeTensor; N] {
    let pairs = tensors.map(|tensor| {
        if tensor.dtype == dtype {
            return (None, tensor);
        }
        let from = contiguous(tensor);
        let into = empty_shape(&from, from.meta.shape().clone(), dtype);
        (Some(from), into)
    });
    let work: Vec<_> = pairs
        .iter()
        .filter_map(|(from, into)| Some((from.as_ref()?, into)))
        .collect();
    if let Some((like, _)) = work.first() {
        for some in launches(&work, form, like, 2) {
            launch_round(some);
        }
    }
    pairs.map(|(_, into)| into)
}

/// Numbers of a vector, and the data type before.
fn form((from, into): &(&CubeTensor, &CubeTensor)) -> (usize, DType) {
    let elements = from.meta.num_elements();
    let rows = [(*from, elements), (*into, elements)];
    (vector_width(VECTOR, elements, &rows), from.dtype)
}

/// Rounds the tensors, which are of one form.
fn launch_round(work: &[(&CubeTensor, &CubeTensor)]) {
    let (vector, dtype) = form(&work[0]);
    let (first, rounded) = work[0];
    let vectors = |(from, _): &(&CubeTensor, _)| from.meta.num_elements() / vector;
    let cubes = starts(
        work.iter()
            .map(|pair| vectors(pair).div_ceil(UNITS * PER_UNIT)),
    );
    let sources: Vec<_> = work.iter().map(|(from, _)| *from).collect();
    // SAFETY: both buffers of a pair are contiguous and of the same number of vectors, the second is this
    // call's own, and units read and write no vector beyond the last.
    unsafe {
        round::launch_unchecked(
            &first.client,
            grid(cubes[work.len()]),
            cube_dim(UNITS),
            address_type(&sources),
            vector,
            work.iter().map(|(from, _)| buffer(from)).collect(),
            work.iter().map(|(_, into)| buffer(into)).collect(),
            work.iter().map(vectors).collect(),
            cubes.into_iter().collect(),
            [elem(dtype), elem(rounded.dtype)],
        );
    }
}

/// Tensor `i` has `vectors[i]` vectors, and the cubes from `cubes[i]` up to `cubes[i + 1]`.
#[cube(launch_unchecked, address_type = "dynamic")]
fn round<F: Float, I: Float, N: Size>(
    from: &Sequence<Box<[Vector<F, N>]>>,
    into: &mut Sequence<Box<[Vector<I, N>]>>,
    vectors: &Sequence<usize>,
    cubes: &Sequence<usize>,
    #[define(F, I)] _types: [ElemType; 2],
) {
    #[unroll]
    for i in 0..comptime!(from.len()) {
        if CUBE_POS >= cubes[i] && CUBE_POS < cubes[comptime!(i + 1)] {
            let first = (CUBE_POS - cubes[i]) * comptime!(UNITS * PER_UNIT) + UNIT_POS as usize;
            let mut loaded = Array::<Vector<F, N>>::new(PER_UNIT);
            #[unroll]
            for j in 0..PER_UNIT {
                loaded[j] = from.index(i)[min(first + j * UNITS, vectors[i] - 1)];
            }
            #[unroll]
            for j in 0..PER_UNIT {
                let at = first + j * UNITS;
                if at < vectors[i] {
                    into.index_mut(i)[at] = Vector::cast_from(loaded[j]);
                }
            }
        }
    }
}

/// See [`MambaKernels::decay_rates`](crate::MambaKernels::decay_rates).
pub(crate) fn decay_rates(a_log: CubeTensor) -> CubeTensor {
    let a_log = contiguous_f32(a_log);
    let rates = empty(&a_log, dims::<2>(&a_log), DType::F32);
    let count = a_log.meta.num_elements();
    // SAFETY: both buffers have `count` numbers, the second is this call's own, and units beyond the last
    // write nothing.
    unsafe {
        rates_kernel::launch_unchecked(
            &a_log.client,
            grid(count.div_ceil(UNITS)),
            cube_dim(UNITS),
            address_type(&[&a_log]),
            buffer(&a_log),
            buffer(&rates),
            count,
        );
    }
    rates
}

#[cube(launch_unchecked, address_type = "dynamic")]
fn rates_kernel(a_log: &[f32], rates: &mut [f32], count: usize) {
    let at = CUBE_POS * CUBE_DIM as usize + UNIT_POS as usize;
    if at < count {
        rates[at] = -a_log[at].exp();
    }
}
