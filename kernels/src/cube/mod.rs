//! What the GPU forms of the operations share: elementary functions ([`math`]), sums over planes
//! and cubes ([`reduce`]), numbers read as words ([`words`]) and as wider vectors ([`wide`]), and the
//! launch side: buffers, grids, device limits.
//!
//! Kernels index flat buffers, contiguous or of rows a stride apart ([`rows`]). Positions are
//! `usize`, which compiles to 32 bits, or to 64 where a buffer of the launch has more than 2³²
//! elements ([`address_type`]).

// Integers have no `is_multiple_of` in the kernel language.
#![allow(clippy::manual_is_multiple_of)]

pub(crate) mod math;
pub(crate) mod reduce;
pub(crate) mod timing;
pub(crate) mod wide;
pub(crate) mod words;

use burn::tensor::{DType, Shape};
use burn_cubecl::CubeDevice;
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::ops::numeric::empty_device_contiguous_dtype;
use burn_cubecl::tensor::CubeTensor;
use cubecl::RuntimeId;
use cubecl::ir::features::Plane;
use cubecl::ir::{ElemType, FloatKind, IntKind};
use cubecl::prelude::*;

/// Blocks along one axis of a grid: the least that every runtime allows for each axis.
const MAX_BLOCKS_PER_AXIS: usize = 65_535;

/// An optional f32 kernel input; absent, its code is not compiled.
pub(crate) type OptionalInput = ComptimeOption<Box<[f32]>>;

/// What a launch has to know of the device.
#[derive(Clone, Copy, Debug)]
pub(crate) struct DeviceTraits {
    /// Kernels may hold PTX assembly.
    pub ptx: bool,
    /// Units that can exchange registers: the smallest plane the device may choose, 1 without
    /// plane operations.
    pub plane: usize,
    /// Most units of a cube.
    pub max_units: usize,
    /// Units that keep the whole device busy.
    pub busy_units: usize,
    /// Shared memory that a cube may use, in bytes.
    pub shared_bytes: usize,
    /// The most that any cube could have, in bytes: about what a processor has for all of its cubes.
    pub processor_shared_bytes: usize,
}

impl DeviceTraits {
    /// Reads the traits of the tensor's device.
    pub fn of(tensor: &CubeTensor) -> Self {
        let properties = tensor.client.properties();
        let hardware = &properties.hardware;
        // Software Vulkan has working planes, but the runtime does not list the feature for CPU
        // adapters; a device without planes reports a range of sizes, not one.
        let planes = properties.features.plane.contains(Plane::Ops)
            || hardware.plane_size_min == hardware.plane_size_max;
        // A multiprocessor hides its latencies with about a thousand units; runtimes that do not
        // state their number are taken for a small device.
        let processors = hardware.num_streaming_multiprocessors.unwrap_or(16) as usize;
        Self {
            ptx: tensor.device.runtime() == RuntimeId::Cuda,
            plane: if planes {
                hardware.plane_size_min.max(1) as usize
            } else {
                1
            },
            max_units: (hardware.max_units_per_cube as usize)
                .min(hardware.max_cube_dim.0 as usize)
                .min(1024),
            busy_units: processors * 1024,
            shared_bytes: hardware.max_shared_memory_size.clamp(16 << 10, 48 << 10),
            processor_shared_bytes: hardware.max_shared_memory_size,
        }
    }
}

/// The tensor with its elements in row-major order without gaps.
pub(crate) fn contiguous(tensor: CubeTensor) -> CubeTensor {
    into_contiguous(tensor)
}

/// The tensor as rows of its last axis, a fixed number of elements apart, and that number. Views of
/// some columns of a wider tensor stay where they are.
pub(crate) fn rows(tensor: CubeTensor) -> (CubeTensor, usize) {
    if let Some(stride) = row_stride(&tensor) {
        return (tensor, stride);
    }
    let tensor = contiguous(tensor);
    let width = *tensor.meta.shape().last().unwrap_or(&1);
    (tensor, width)
}

/// Elements from one row to the next, if the last axis is contiguous and the others step evenly.
pub(crate) fn row_stride(tensor: &CubeTensor) -> Option<usize> {
    let (shape, strides) = (tensor.meta.shape(), tensor.meta.strides());
    let (width, leading) = shape.split_last()?;
    let (last, strides) = strides.split_last()?;
    if tensor.meta.is_tiled() || (*last != 1 && *width != 1) {
        return None;
    }
    // From the innermost axis outwards, axes of one element aside.
    let mut steps = leading
        .iter()
        .zip(strides)
        .rev()
        .filter(|(size, _)| **size != 1);
    let Some((size, stride)) = steps.next() else {
        return Some(*width);
    };
    let mut expected = size * stride;
    for (size, outer) in steps {
        if *outer != expected {
            return None;
        }
        expected *= size;
    }
    (stride >= width).then_some(*stride)
}

/// Columns `from..to` of the last axis: a view that shares the buffer where [`shares_columns`]
/// says so, else a copy.
pub(crate) fn columns(tensor: &CubeTensor, from: usize, to: usize) -> CubeTensor {
    let shape = tensor.meta.shape();
    let width = *shape.last().unwrap_or(&1);
    assert!(from < to && to <= width, "columns {from}..{to} of {width}");
    if !shares_columns(tensor, from) {
        let leading = shape[..shape.len() - 1].iter().map(|size| 0..*size);
        let ranges: Vec<_> = leading.chain(std::iter::once(from..to)).collect();
        return burn_cubecl::kernel::slice(tensor.clone(), &ranges);
    }
    let mut view = tensor.clone();
    let size = tensor.dtype.size();
    let last = shape.len() - 1;
    view.handle = view.handle.offset_start((from * size) as u64);
    view.handle = view.handle.offset_end(((width - to) * size) as u64);
    view.meta.shape_mut()[last] = to - from;
    view
}

/// Whether [`columns`] from number `from` on shares the buffer: some devices bind buffers at
/// coarse offsets only.
pub(crate) fn shares_columns(tensor: &CubeTensor, from: usize) -> bool {
    let alignment = match tensor.device.runtime() {
        RuntimeId::Cuda => 1,
        _ => tensor.client.properties().memory.alignment as usize,
    };
    row_stride(tensor).is_some() && (from * tensor.dtype.size()).is_multiple_of(alignment)
}

/// The widest vectors, of at most `most` elements (a power of two), that read `width` columns of
/// rows `(tensor, stride)` at aligned places.
pub(crate) fn vector_width(most: usize, width: usize, rows: &[(&CubeTensor, usize)]) -> usize {
    let fits = |vector: &usize| {
        width.is_multiple_of(*vector)
            && rows.iter().all(|(tensor, stride)| {
                let start = tensor.handle.offset_start.unwrap_or(0);
                stride.is_multiple_of(*vector)
                    && start.is_multiple_of((vector * tensor.dtype.size()) as u64)
            })
    };
    std::iter::successors(Some(most), |vector| (*vector > 1).then_some(vector / 2))
        .find(fits)
        .unwrap_or(1)
}

/// Cuts tensors into those of one launch each: neighbours of one form, as many as the device binds
/// buffers for, `buffers` of each. Where it binds very many there is a bound too: more of them cost
/// each unit more time to find its own than launches do.
pub(crate) fn launches<'a, T, F: PartialEq>(
    tensors: &'a [T],
    form: impl Fn(&T) -> F + 'a,
    like: &CubeTensor,
    buffers: usize,
) -> impl Iterator<Item = &'a [T]> {
    const MOST: usize = 16;
    // Those that all tensors share: one or two of the kernel's own, its scalars, its sizes.
    const SHARED: usize = 4;
    let bindings = like.client.properties().hardware.max_bindings as usize;
    let most = (bindings.saturating_sub(SHARED) / buffers).clamp(1, MOST);
    tensors
        .chunk_by(move |a, b| form(a) == form(b))
        .flat_map(move |alike| alike.chunks(most))
}

/// Where each of some parts begins, given how long they are, and where the last one ends.
pub(crate) fn starts(lengths: impl Iterator<Item = usize>) -> Vec<usize> {
    let ends = lengths.scan(0, |end, length| {
        *end += length;
        Some(*end)
    });
    std::iter::once(0).chain(ends).collect()
}

/// The tensor as contiguous f32.
pub(crate) fn contiguous_f32(tensor: CubeTensor) -> CubeTensor {
    contiguous(burn_cubecl::kernel::cast(tensor, DType::F32))
}

/// The integer tensor, contiguous and of a type that the kernels read.
pub(crate) fn integers(tensor: CubeTensor) -> CubeTensor {
    contiguous(match tensor.dtype {
        DType::I32 | DType::I64 => tensor,
        _ => burn_cubecl::kernel::cast(tensor, DType::I32),
    })
}

/// An uninitialised contiguous tensor on the device of `like`.
pub(crate) fn empty<const N: usize>(
    like: &CubeTensor,
    shape: [usize; N],
    dtype: DType,
) -> CubeTensor {
    let device: CubeDevice = like.device.clone();
    empty_device_contiguous_dtype(like.client.clone(), device, Shape::new(shape), dtype)
}

/// As [`empty`], for a shape whose rank is known at run time only.
pub(crate) fn empty_shape(like: &CubeTensor, shape: Shape, dtype: DType) -> CubeTensor {
    empty_device_contiguous_dtype(like.client.clone(), like.device.clone(), shape, dtype)
}

/// The tensor's buffer as a kernel argument.
pub(crate) fn buffer(tensor: &CubeTensor) -> BufferArg {
    // SAFETY: the buffer reaches from the tensor's first element to its last.
    unsafe { BufferArg::from_raw_parts(tensor.handle.clone(), extent(tensor)) }
}

/// The tensor's buffer as a kernel argument of words ([`words`]). Its elements fill whole words.
pub(crate) fn word_buffer(tensor: &CubeTensor) -> BufferArg {
    let count = (extent(tensor) * tensor.dtype.size()).div_ceil(4);
    // SAFETY: the buffer reaches from the tensor's first element to its last, whose word is whole.
    unsafe { BufferArg::from_raw_parts(tensor.handle.clone(), count) }
}

/// Elements of the buffer from the tensor's first to its last; more than it has where it is a view
/// of columns.
fn extent(tensor: &CubeTensor) -> usize {
    let (shape, strides) = (tensor.meta.shape(), tensor.meta.strides());
    if shape.contains(&0) {
        return 0;
    }
    let steps = shape.iter().zip(strides.iter());
    1 + steps
        .map(|(size, stride)| (size - 1) * stride)
        .sum::<usize>()
}

/// An optional tensor's buffer as a kernel argument.
pub(crate) fn optional<T: CubePrimitive>(
    tensor: &Option<CubeTensor>,
) -> ComptimeOptionArgs<Box<[T]>> {
    tensor.as_ref().map(buffer).into()
}

/// The sizes of a tensor that has `N` axes.
pub(crate) fn dims<const N: usize>(tensor: &CubeTensor) -> [usize; N] {
    tensor.meta.shape().dims()
}

/// The kernel language's name of a data type.
///
/// # Panics
///
/// If the kernels have no form for the type.
pub(crate) fn elem(dtype: DType) -> ElemType {
    match dtype {
        DType::F32 | DType::Flex32 => ElemType::Float(FloatKind::F32),
        DType::F16 => ElemType::Float(FloatKind::F16),
        DType::BF16 => ElemType::Float(FloatKind::BF16),
        DType::I32 => ElemType::Int(IntKind::I32),
        DType::I64 => ElemType::Int(IntKind::I64),
        other => panic!("mambabyte-kernels: no GPU form for data type {other:?}"),
    }
}

/// A grid of at least `blocks` cubes; kernels leave the surplus idle.
pub(crate) fn grid(blocks: usize) -> CubeCount {
    let x = blocks.clamp(1, MAX_BLOCKS_PER_AXIS);
    let rows = blocks.div_ceil(x);
    let y = rows.clamp(1, MAX_BLOCKS_PER_AXIS);
    let z = rows.div_ceil(y).max(1);
    // Each factor is at most 65,535, so the casts are exact.
    CubeCount::Static(x as u32, y as u32, z as u32)
}

/// A one-dimensional cube.
pub(crate) fn cube_dim(units: usize) -> CubeDim {
    CubeDim::new_1d(units as u32)
}

/// The width of positions that reaches every element of all `tensors`.
pub(crate) fn address_type(tensors: &[&CubeTensor]) -> AddressType {
    tensors
        .iter()
        .map(|tensor| AddressType::from_len(extent(tensor)))
        .max()
        .unwrap_or_default()
}

/// The largest power of two that is at most `x` (1 for 0).
pub(crate) fn power_of_two_below(x: usize) -> usize {
    if x < 2 { 1 } else { 1 << x.ilog2() }
}

/// Rows that a final sum adds up in one go; more are first folded by [`fold_rows`].
const FOLD: usize = 32;

/// Units of a cube in [`fold_rows`].
const FOLD_UNITS: usize = 128;

/// Adds up groups of rows of a `[rows, width]` buffer until few are left: `[fewer rows, width]`.
///
/// The last sum over the rows belongs to the operation, which knows the layout of its gradients
/// ([`sum_rows`] where it is one row).
pub(crate) fn fold_rows(mut sums: CubeTensor) -> CubeTensor {
    let [mut rows, width] = dims(&sums);
    while rows > 2 * FOLD {
        let fewer = rows.div_ceil(FOLD);
        let folded = empty(&sums, [fewer, width], DType::F32);
        // SAFETY: both buffers are contiguous and of the shapes passed along; units beyond the last
        // number write nothing.
        unsafe {
            reduce::fold_kernel::launch_unchecked(
                &sums.client,
                grid((fewer * width).div_ceil(FOLD_UNITS)),
                cube_dim(FOLD_UNITS),
                address_type(&[&sums]),
                buffer(&sums),
                buffer(&folded),
                rows,
                width,
                FOLD,
            );
        }
        (sums, rows) = (folded, fewer);
    }
    sums
}

/// `[rows, width]`, added up over the rows: `[width]`.
pub(crate) fn sum_rows(sums: CubeTensor) -> CubeTensor {
    let sums = fold_rows(sums);
    let [rows, width] = dims(&sums);
    let total = empty(&sums, [width], DType::F32);
    // SAFETY: both buffers are contiguous and of the shapes passed along; units beyond the last
    // column write nothing.
    unsafe {
        reduce::sum_rows_kernel::launch_unchecked(
            &sums.client,
            grid(width.div_ceil(FOLD_UNITS)),
            cube_dim(FOLD_UNITS),
            address_type(&[&sums]),
            buffer(&sums),
            buffer(&total),
            rows,
            width,
        );
    }
    total
}
