//! Normalisation on a GPU.
//!
//! A cube owns a row: its units hold the row in registers as vectors (neighbouring units
//! neighbouring vectors), so inputs are read once, with wide loads, and the row's sums go over the
//! planes and then over the cube. The variance is taken around the mean.
//!
//! Backward gives a cube a tile of rows in turn, so that the partials of dweight and dbias stay in
//! registers over the tile; small sum kernels add the tiles up.

// In the kernel language an `if` on a compile-time value decides what is compiled: it cannot be
// merged with one on a run-time value.
#![allow(clippy::collapsible_if)]

use burn::tensor::DType;
use burn_cubecl::tensor::CubeTensor;
use cubecl::ir::ElemType;
use cubecl::prelude::*;

use super::{NormKind, NormalizeBackward, NormalizeGrads, NormalizeInputs, Normalized};
use crate::cube::reduce::{cube_sum, total};
use crate::cube::{
    DeviceTraits, address_type, buffer, columns, contiguous, contiguous_f32, cube_dim, dims, elem,
    empty, grid, optional, sum_rows, vector_width,
};

/// Most columns of a vector.
const VECTOR: usize = 4;
/// Vectors of a unit that the size of a cube aims at.
const HELD: usize = 2;
/// Units of a cube of the element-wise kernel, and the vectors of each.
const UNITS: usize = 256;
const PER_UNIT: usize = 4;

/// `[D]` numbers as vectors, where they are given.
type OptionalVectors<N> = ComptimeOption<Box<[Vector<f32, N>]>>;

/// Compile-time sizes and switches.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct NormConfig {
    units: usize,
    plane: usize,
    /// Vectors of a row.
    vectors: usize,
    /// Whether the mean is subtracted.
    centred: bool,
    /// Whether `hat` and `rstd` are wanted (forward).
    keep: bool,
    /// Whether dbias is wanted (backward).
    bias: bool,
}

impl NormConfig {
    fn new(width: usize, vector: usize, kind: NormKind, device: &DeviceTraits) -> Self {
        let vectors = width / vector;
        // As few units as hold the row with the vectors each then has to hold.
        let held = vectors.div_ceil(device.max_units).max(HELD);
        let units = vectors.div_ceil(held).next_multiple_of(device.plane);
        Self {
            units: units.min(device.max_units / device.plane * device.plane),
            plane: device.plane,
            vectors,
            centred: kind == NormKind::Layer,
            keep: true,
            bias: false,
        }
    }

    /// Vectors of a unit.
    const fn held(&self) -> usize {
        self.vectors.div_ceil(self.units)
    }
}

/// See [`MambaKernels::normalize`](crate::MambaKernels::normalize).
pub(crate) fn normalize(inputs: NormalizeInputs<CubeTensor>) -> Normalized<CubeTensor> {
    let (normalized, _) = launch_forward(inputs, None, true);
    normalized.expect("kept")
}

/// See [`MambaKernels::normalize_affine`](crate::MambaKernels::normalize_affine).
pub(crate) fn normalize_affine(
    inputs: NormalizeInputs<CubeTensor>,
    weight: CubeTensor,
    bias: Option<CubeTensor>,
) -> (Normalized<CubeTensor>, CubeTensor) {
    let (normalized, normed) = launch_forward(inputs, Some((weight, bias)), true);
    (normalized.expect("kept"), normed.expect("given a weight"))
}

/// See [`MambaKernels::normed`](crate::MambaKernels::normed).
pub(crate) fn normed(
    inputs: NormalizeInputs<CubeTensor>,
    weight: CubeTensor,
    bias: Option<CubeTensor>,
) -> CubeTensor {
    let (_, normed) = launch_forward(inputs, Some((weight, bias)), false);
    normed.expect("given a weight")
}

/// Normalised rows if they are to be kept and, with a weight, their affine form.
fn launch_forward(
    inputs: NormalizeInputs<CubeTensor>,
    affine: Option<(CubeTensor, Option<CubeTensor>)>,
    keep: bool,
) -> (Option<Normalized<CubeTensor>>, Option<CubeTensor>) {
    let x = contiguous_f32(inputs.x);
    let (weight, bias) = affine.unzip();
    let weight = weight.map(contiguous_f32);
    let bias = bias.flatten().map(contiguous_f32);
    let [rows, width] = dims(&x);
    let device = DeviceTraits::of(&x);
    let normalized = keep.then(|| Normalized {
        hat: empty(&x, [rows, width], inputs.dtype),
        rstd: empty(&x, [rows], DType::F32),
    });
    let normed = weight
        .as_ref()
        .map(|_| empty(&x, [rows, width], inputs.dtype));
    let parameters = weight.iter().chain(&bias);
    let vector = vector_of(width, [&x].into_iter().chain(parameters));
    let mut config = NormConfig::new(width, vector, inputs.kind, &device);
    config.keep = keep;
    let hat = normalized.as_ref().map(|it| &it.hat);
    let rstd = normalized.as_ref().map(|it| &it.rstd);
    // SAFETY: every position is derived from the shapes passed along, whose buffers are contiguous
    // and of just these sizes; cubes beyond the last row do nothing, and the stand-ins of what is not
    // wanted are not written.
    unsafe {
        normalize_rows::launch_unchecked(
            &x.client,
            grid(rows),
            cube_dim(config.units),
            address_type(&[&x]),
            vector,
            buffer(&x),
            optional(&weight),
            optional(&bias),
            buffer(hat.or(normed.as_ref()).unwrap_or(&x)),
            buffer(normed.as_ref().or(hat).unwrap_or(&x)),
            buffer(rstd.unwrap_or(&x)),
            rows,
            inputs.eps,
            config,
            elem(inputs.dtype),
        );
    }
    (normalized, normed)
}

/// The widest vectors that read rows of `width` columns of all `tensors`.
fn vector_of<'a>(width: usize, tensors: impl Iterator<Item = &'a CubeTensor>) -> usize {
    let rows: Vec<_> = tensors.map(|tensor| (tensor, width)).collect();
    vector_width(VECTOR, width, &rows)
}

/// See [`MambaKernels::affine`](crate::MambaKernels::affine).
pub(crate) fn affine(hat: CubeTensor, weight: CubeTensor, bias: Option<CubeTensor>) -> CubeTensor {
    let hat = contiguous(hat);
    let weight = contiguous_f32(weight);
    let bias = bias.map(contiguous_f32);
    let [rows, width] = dims(&hat);
    let y = empty(&hat, [rows, width], hat.dtype);
    let vector = vector_of(width, [&hat, &weight].into_iter().chain(&bias));
    let vectors = rows * width / vector;
    // SAFETY: as in `launch_forward`; units beyond the last vector write nothing.
    unsafe {
        affine_rows::launch_unchecked(
            &hat.client,
            grid(vectors.div_ceil(UNITS * PER_UNIT)),
            cube_dim(UNITS),
            address_type(&[&hat]),
            vector,
            buffer(&hat),
            buffer(&weight),
            optional(&bias),
            buffer(&y),
            vectors,
            width / vector,
            elem(hat.dtype),
        );
    }
    y
}

/// See [`MambaKernels::normalize_backward`](crate::MambaKernels::normalize_backward).
pub(crate) fn backward(inputs: NormalizeBackward<CubeTensor>) -> NormalizeGrads<CubeTensor> {
    let hat = contiguous(inputs.hat);
    let dy = contiguous(inputs.dy);
    let rstd = contiguous_f32(inputs.rstd);
    let weight = contiguous_f32(inputs.weight);
    let dout = contiguous_f32(inputs.dout);
    let [rows, width] = dims(&hat);
    let device = DeviceTraits::of(&hat);
    let vector = vector_of(width, [&hat, &dy, &weight, &dout].into_iter());
    let mut config = NormConfig::new(width, vector, inputs.kind, &device);
    config.bias = inputs.has_bias;
    // One cube for every place on the device: fewer tiles leave fewer partials to add up.
    let tiles = (device.busy_units / config.units).clamp(1, rows.max(1));
    let tile_rows = rows.div_ceil(tiles);
    let tiles = rows.div_ceil(tile_rows);

    let in_place = dout.can_mut();
    let (dx, dout) = if in_place {
        (dout, None)
    } else {
        (empty(&hat, [rows, width], DType::F32), Some(dout))
    };
    let kinds = if config.bias { 2 } else { 1 };
    let sums = empty(&hat, [tiles, kinds * width], DType::F32);
    // SAFETY: as in `launch_forward`; `dx` belongs to this call alone.
    unsafe {
        normalize_gradient::launch_unchecked(
            &hat.client,
            grid(tiles),
            cube_dim(config.units),
            address_type(&[&hat]),
            vector,
            buffer(&hat),
            buffer(&rstd),
            buffer(&weight),
            buffer(&dy),
            optional(&dout),
            buffer(&dx),
            buffer(&sums),
            rows,
            tile_rows,
            config,
            [elem(hat.dtype), elem(dy.dtype)],
        );
    }
    let sums = sum_rows(sums);
    NormalizeGrads {
        dx,
        weight: columns(&sums, 0, width),
        bias: inputs.has_bias.then(|| columns(&sums, width, 2 * width)),
    }
}

/// `hat · weight + bias`, rounded to the data type of `hat`.
#[cube]
fn affine_of<H: Float, N: Size>(
    hat: Vector<H, N>,
    weight: Vector<f32, N>,
    bias: &OptionalVectors<N>,
    column: usize,
) -> Vector<H, N> {
    let mut shift = Vector::<f32, N>::new(0.0f32);
    #[comptime]
    match bias {
        ComptimeOption::Some(bias) => shift = bias[column],
        ComptimeOption::None => {}
    }
    Vector::cast_from(fma(Vector::cast_from(hat), weight, shift))
}

/// One row a cube.
#[cube(launch_unchecked, address_type = "dynamic")]
fn normalize_rows<H: Float, N: Size>(
    x: &[Vector<f32, N>],
    weight: &OptionalVectors<N>,
    bias: &OptionalVectors<N>,
    hat: &mut [Vector<H, N>],
    normed: &mut [Vector<H, N>],
    rstd: &mut [f32],
    rows: usize,
    eps: f32,
    #[comptime] config: NormConfig,
    #[define(H)] _type: ElemType,
) {
    let row = CUBE_POS;
    if row >= rows {
        terminate!();
    }
    let vectors = comptime!(config.vectors);
    let held = comptime!(config.held());
    let width = vectors * N::value();
    let unit = UNIT_POS as usize;
    let mut scratch = Shared::<[f32]>::new_slice(comptime!(config.units / config.plane));
    let mut values = Array::<Vector<f32, N>>::new(held);
    #[unroll]
    for i in 0..held {
        let column = unit + comptime!(i * config.units);
        values[i] = Vector::new(0.0f32);
        if column < vectors {
            values[i] = x[row * vectors + column];
        }
    }
    let mut centre = 0.0f32;
    if config.centred {
        let mut own = Vector::<f32, N>::new(0.0f32);
        #[unroll]
        for i in 0..held {
            own += values[i];
        }
        centre = cube_sum(total(own), &mut scratch, config.units, config.plane) / (width as f32);
    }
    let mut squares = Vector::<f32, N>::new(0.0f32);
    #[unroll]
    for i in 0..held {
        if unit + comptime!(i * config.units) < vectors {
            values[i] -= Vector::new(centre);
            squares = fma(values[i], values[i], squares);
        }
    }
    let mean = cube_sum(total(squares), &mut scratch, config.units, config.plane) / (width as f32);
    let scale = 1.0f32 / (mean + eps).sqrt();
    #[unroll]
    for i in 0..held {
        let column = unit + comptime!(i * config.units);
        if column < vectors {
            let at = row * vectors + column;
            let rounded = Vector::<H, N>::cast_from(values[i] * Vector::new(scale));
            if config.keep {
                hat[at] = rounded;
            }
            #[comptime]
            match weight {
                ComptimeOption::Some(weight) => {
                    normed[at] = affine_of(rounded, weight[column], bias, column);
                }
                ComptimeOption::None => {}
            }
        }
    }
    if config.keep {
        if unit == 0 {
            rstd[row] = scale;
        }
    }
}

/// A few vectors a unit, a cube's width apart; `columns` is the number of vectors in a row.
#[cube(launch_unchecked, address_type = "dynamic")]
fn affine_rows<H: Float, N: Size>(
    hat: &[Vector<H, N>],
    weight: &[Vector<f32, N>],
    bias: &OptionalVectors<N>,
    y: &mut [Vector<H, N>],
    vectors: usize,
    columns: usize,
    #[define(H)] _type: ElemType,
) {
    let first = CUBE_POS * comptime!(UNITS * PER_UNIT) + UNIT_POS as usize;
    let mut loaded = Array::<Vector<H, N>>::new(PER_UNIT);
    #[unroll]
    for i in 0..PER_UNIT {
        loaded[i] = hat[min(first + i * UNITS, vectors - 1)];
    }
    #[unroll]
    for i in 0..PER_UNIT {
        let at = first + i * UNITS;
        if at < vectors {
            let column = at % columns;
            y[at] = affine_of(loaded[i], weight[column], bias, column);
        }
    }
}

/// One tile of rows a cube; `sums` holds `[tiles, D]` (dweight) or `[tiles, 2 · D]` (then dbias).
/// Without `dout`, `dx` holds it.
#[cube(launch_unchecked, address_type = "dynamic")]
fn normalize_gradient<H: Float, Y: Float, N: Size>(
    hat: &[Vector<H, N>],
    rstd: &[f32],
    weight: &[Vector<f32, N>],
    dy: &[Vector<Y, N>],
    dout: &OptionalVectors<N>,
    dx: &mut [Vector<f32, N>],
    sums: &mut [Vector<f32, N>],
    rows: usize,
    tile_rows: usize,
    #[comptime] config: NormConfig,
    #[define(H, Y)] _types: [ElemType; 2],
) {
    let first = CUBE_POS * tile_rows;
    if first >= rows {
        terminate!();
    }
    let vectors = comptime!(config.vectors);
    let held = comptime!(config.held());
    let width = vectors * N::value();
    let unit = UNIT_POS as usize;
    let zero = Vector::<f32, N>::new(0.0f32);
    let mut scratch = Shared::<[f32]>::new_slice(comptime!(config.units / config.plane));
    let mut weights = Array::<Vector<f32, N>>::new(held);
    let mut dweight = Array::<Vector<f32, N>>::new(held);
    let mut dbias = Array::<Vector<f32, N>>::new(held);
    #[unroll]
    for i in 0..held {
        weights[i] = weight[min(unit + comptime!(i * config.units), vectors - 1)];
        dweight[i] = zero;
        dbias[i] = zero;
    }
    for turn in 0..min(tile_rows, rows - first) {
        let row = first + turn;
        // The normalised row, the gradient that reaches it, and the one that bypasses it.
        let mut hats = Array::<Vector<f32, N>>::new(held);
        let mut dhats = Array::<Vector<f32, N>>::new(held);
        let mut beside = Array::<Vector<f32, N>>::new(held);
        #[unroll]
        for i in 0..held {
            let column = unit + comptime!(i * config.units);
            hats[i] = zero;
            dhats[i] = zero;
            beside[i] = zero;
            if column < vectors {
                let at = row * vectors + column;
                hats[i] = Vector::cast_from(hat[at]);
                dhats[i] = Vector::cast_from(dy[at]);
                #[comptime]
                match dout {
                    ComptimeOption::Some(dout) => beside[i] = dout[at],
                    ComptimeOption::None => beside[i] = dx[at],
                }
            }
        }
        let scale = rstd[row];
        let mut along = zero;
        let mut level = zero;
        #[unroll]
        for i in 0..held {
            let grad = dhats[i];
            dweight[i] = fma(grad, hats[i], dweight[i]);
            dbias[i] += grad;
            dhats[i] = grad * weights[i];
            along = fma(dhats[i], hats[i], along);
            level += dhats[i];
        }
        let along = cube_sum(total(along), &mut scratch, config.units, config.plane);
        let along = along / (width as f32);
        let mut shift = 0.0f32;
        if config.centred {
            let sum = cube_sum(total(level), &mut scratch, config.units, config.plane);
            shift = sum / (width as f32);
        }
        #[unroll]
        for i in 0..held {
            let column = unit + comptime!(i * config.units);
            if column < vectors {
                let at = row * vectors + column;
                let inner = dhats[i] - Vector::new(shift) - hats[i] * Vector::new(along);
                dx[at] = fma(inner, Vector::new(scale), beside[i]);
            }
        }
    }
    let stride = if config.bias { 2 * vectors } else { vectors };
    #[unroll]
    for i in 0..held {
        let column = unit + comptime!(i * config.units);
        if column < vectors {
            sums[CUBE_POS * stride + column] = dweight[i];
            if config.bias {
                sums[CUBE_POS * stride + vectors + column] = dbias[i];
            }
        }
    }
}
