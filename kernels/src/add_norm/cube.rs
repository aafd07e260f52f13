//! Addition and normalisation on a GPU.
//!
//! A cube owns a row: its units hold the row in registers (neighbouring units neighbouring
//! columns), so inputs are read once, and the row's sums go over the planes and then over the cube.
//! The variance is taken around the mean, not as a difference of squares.
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

use super::{NormGrads, NormInputs, NormKind, NormOutputs, NormSaved};
use crate::cube::reduce::{cube_sum, sum_strided};
use crate::cube::{
    DeviceTraits, OptionalInput, address_type, buffer, contiguous, contiguous_f32, cube_dim, dims,
    elem, empty, fold_rows, grid, optional,
};

/// Columns of a unit that the size of a cube aims at.
const COLUMNS: usize = 4;
/// Units of a cube in the sum kernel.
const SUM_UNITS: usize = 128;

/// Compile-time sizes and switches.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct NormConfig {
    units: usize,
    plane: usize,
    /// D.
    width: usize,
    /// Whether the mean is subtracted.
    centred: bool,
    /// Whether x is not the sum already (forward).
    sum: bool,
    /// Whether dbias is wanted (backward).
    bias: bool,
}

impl NormConfig {
    fn new(width: usize, kind: NormKind, device: &DeviceTraits) -> Self {
        let units = width
            .div_ceil(COLUMNS)
            .next_power_of_two()
            .clamp(device.plane, device.max_units);
        Self {
            units,
            plane: device.plane,
            width,
            centred: kind == NormKind::Layer,
            sum: true,
            bias: false,
        }
    }

    /// Columns of a unit.
    const fn held(&self) -> usize {
        self.width.div_ceil(self.units)
    }
}

/// See [`MambaKernels::add_norm`](crate::MambaKernels::add_norm).
pub(crate) fn forward(inputs: NormInputs<CubeTensor>) -> NormOutputs<CubeTensor> {
    let x = contiguous(inputs.x);
    let residual = inputs.residual.map(contiguous);
    let weight = contiguous_f32(inputs.weight);
    let bias = inputs.bias.map(contiguous_f32);
    let [rows, width] = dims(&x);
    let device = DeviceTraits::of(&x);
    let mut config = NormConfig::new(width, inputs.kind, &device);
    let sum_dtype = residual.as_ref().map_or(DType::F32, |r| r.dtype);
    config.sum = residual.is_some() || x.dtype != sum_dtype;
    let y = empty(&x, [rows, width], x.dtype);
    let mean = empty(&x, [rows], DType::F32);
    let sum = match config.sum {
        true => empty(&x, [rows, width], sum_dtype),
        false => x.clone(),
    };
    let rstd = empty(&x, [rows], DType::F32);
    // SAFETY: every position is derived from the shapes passed along, whose buffers are contiguous
    // and of just these sizes; cubes beyond the last row do nothing. The stand-in of a sum that is not
    // wanted is not written.
    unsafe {
        norm_forward::launch_unchecked(
            &x.client,
            grid(rows),
            cube_dim(config.units),
            address_type(&[&x]),
            buffer(&x),
            optional(&residual),
            buffer(&weight),
            optional(&bias),
            buffer(&y),
            buffer(if config.sum { &sum } else { &mean }),
            buffer(&mean),
            buffer(&rstd),
            rows,
            inputs.eps,
            config,
            [elem(x.dtype), elem(sum_dtype)],
        );
    }
    NormOutputs { y, sum, mean, rstd }
}

/// See [`MambaKernels::add_norm_backward`](crate::MambaKernels::add_norm_backward).
pub(crate) fn backward(saved: NormSaved<CubeTensor>, dy: CubeTensor) -> NormGrads<CubeTensor> {
    let sum = contiguous(saved.sum);
    let dy = contiguous(dy);
    let weight = contiguous_f32(saved.weight);
    let [rows, width] = dims(&sum);
    let device = DeviceTraits::of(&sum);
    let mut config = NormConfig::new(width, saved.kind, &device);
    config.bias = saved.has_bias;
    // Two cubes' worth of units for every place on the device even out the last wave.
    let tiles = (2 * device.busy_units / config.units).clamp(1, rows.max(1));
    let tile_rows = rows.div_ceil(tiles);
    let tiles = rows.div_ceil(tile_rows);

    let (dsum, sum) = match sum.can_mut() {
        true => (sum, None),
        false => (empty(&sum, [rows, width], sum.dtype), Some(sum)),
    };
    let kinds = if config.bias { 2 } else { 1 };
    let sums = empty(&dsum, [tiles, kinds * width], DType::F32);
    let dweight = empty(&dsum, [width], DType::F32);
    let dbias = saved.has_bias.then(|| empty(&dsum, [width], DType::F32));
    // SAFETY: as in `forward`; `dsum` belongs to this call alone.
    unsafe {
        norm_backward::launch_unchecked(
            &dsum.client,
            grid(tiles),
            cube_dim(config.units),
            address_type(&[&dsum]),
            optional(&sum),
            buffer(&dy),
            buffer(&contiguous_f32(saved.mean)),
            buffer(&contiguous_f32(saved.rstd)),
            buffer(&weight),
            buffer(&dsum),
            buffer(&sums),
            rows,
            tile_rows,
            config,
            [elem(dsum.dtype), elem(dy.dtype)],
        );
    }
    let sums = fold_rows(sums);
    let [rows, _] = dims(&sums);
    // SAFETY: as in `forward`; without a bias its stand-in is not written.
    unsafe {
        sum_tiles::launch_unchecked(
            &sums.client,
            grid((kinds * width).div_ceil(SUM_UNITS)),
            cube_dim(SUM_UNITS),
            address_type(&[&sums]),
            buffer(&sums),
            buffer(&dweight),
            buffer(dbias.as_ref().unwrap_or(&dweight)),
            rows,
            config,
        );
    }
    NormGrads {
        sum: dsum,
        weight: dweight,
        bias: dbias,
    }
}

/// One row a cube.
#[cube(launch_unchecked, address_type = "dynamic")]
fn norm_forward<X: Float, S: Float>(
    x: &[X],
    residual: &ComptimeOption<Box<[S]>>,
    weight: &[f32],
    bias: &OptionalInput,
    y: &mut [X],
    sum: &mut [S],
    mean: &mut [f32],
    rstd: &mut [f32],
    rows: usize,
    eps: f32,
    #[comptime] config: NormConfig,
    #[define(X, S)] _types: [ElemType; 2],
) {
    let row = CUBE_POS;
    if row >= rows {
        terminate!();
    }
    let width = comptime!(config.width);
    let held = comptime!(config.held());
    let unit = UNIT_POS as usize;
    let mut scratch = Shared::<[f32]>::new_slice(comptime!(config.units / config.plane));
    let mut values = Array::<f32>::new(held);
    let mut own = 0.0f32;
    #[unroll]
    for i in 0..held {
        let column = unit + comptime!(i * config.units);
        values[i] = 0.0f32;
        if column < width {
            let at = row * width + column;
            let mut value = f32::cast_from(x[at]);
            #[comptime]
            match residual {
                ComptimeOption::Some(residual) => value += f32::cast_from(residual[at]),
                ComptimeOption::None => {}
            }
            values[i] = value;
            if config.sum {
                sum[at] = S::cast_from(value);
            }
            own += value;
        }
    }
    let mut centre = 0.0f32;
    if config.centred {
        centre = cube_sum(own, &mut scratch, config.units, config.plane) / (width as f32);
    }
    let mut squares = 0.0f32;
    #[unroll]
    for i in 0..held {
        if unit + comptime!(i * config.units) < width {
            let value = values[i] - centre;
            values[i] = value;
            squares = fma(value, value, squares);
        }
    }
    let total = cube_sum(squares, &mut scratch, config.units, config.plane);
    let scale = 1.0f32 / (total / (width as f32) + eps).sqrt();
    #[unroll]
    for i in 0..held {
        let column = unit + comptime!(i * config.units);
        if column < width {
            let mut shift = 0.0f32;
            #[comptime]
            match bias {
                ComptimeOption::Some(bias) => shift = bias[column],
                ComptimeOption::None => {}
            }
            let value = fma(values[i] * scale, weight[column], shift);
            y[row * width + column] = X::cast_from(value);
        }
    }
    if unit == 0 {
        mean[row] = centre;
        rstd[row] = scale;
    }
}

/// One tile of rows a cube; `sums` holds `[tiles, D]` (dweight) or `[tiles, 2 · D]` (then dbias).
/// Without `sum`, `dsum` holds it.
#[cube(launch_unchecked, address_type = "dynamic")]
fn norm_backward<S: Float, Y: Float>(
    sum: &ComptimeOption<Box<[S]>>,
    dy: &[Y],
    mean: &[f32],
    rstd: &[f32],
    weight: &[f32],
    dsum: &mut [S],
    sums: &mut [f32],
    rows: usize,
    tile_rows: usize,
    #[comptime] config: NormConfig,
    #[define(S, Y)] _types: [ElemType; 2],
) {
    let first = CUBE_POS * tile_rows;
    if first >= rows {
        terminate!();
    }
    let width = comptime!(config.width);
    let held = comptime!(config.held());
    let unit = UNIT_POS as usize;
    let mut scratch = Shared::<[f32]>::new_slice(comptime!(config.units / config.plane));
    let mut weights = Array::<f32>::new(held);
    let mut dweight = Array::<f32>::new(held);
    let mut dbias = Array::<f32>::new(held);
    #[unroll]
    for i in 0..held {
        weights[i] = weight[min(unit + comptime!(i * config.units), width - 1)];
        dweight[i] = 0.0f32;
        dbias[i] = 0.0f32;
    }
    for row in first..min(first + tile_rows, rows) {
        let centre = mean[row];
        let scale = rstd[row];
        // The normalised row and the gradient that reaches it.
        let mut hats = Array::<f32>::new(held);
        let mut dhats = Array::<f32>::new(held);
        let mut along = 0.0f32;
        let mut total = 0.0f32;
        #[unroll]
        for i in 0..held {
            let column = unit + comptime!(i * config.units);
            hats[i] = 0.0f32;
            dhats[i] = 0.0f32;
            if column < width {
                let at = row * width + column;
                let value = #[comptime]
                match sum {
                    ComptimeOption::Some(sum) => sum[at],
                    ComptimeOption::None => dsum[at],
                };
                let hat = (f32::cast_from(value) - centre) * scale;
                let grad = f32::cast_from(dy[at]);
                let dhat = grad * weights[i];
                hats[i] = hat;
                dhats[i] = dhat;
                dweight[i] = fma(grad, hat, dweight[i]);
                if config.bias {
                    dbias[i] += grad;
                }
                along = fma(dhat, hat, along);
                total += dhat;
            }
        }
        let along = cube_sum(along, &mut scratch, config.units, config.plane) / (width as f32);
        let mut level = 0.0f32;
        if config.centred {
            level = cube_sum(total, &mut scratch, config.units, config.plane) / (width as f32);
        }
        #[unroll]
        for i in 0..held {
            let column = unit + comptime!(i * config.units);
            if column < width {
                let value = scale * (dhats[i] - level - hats[i] * along);
                dsum[row * width + column] = S::cast_from(value);
            }
        }
    }
    let stride = if config.bias { 2 * width } else { width };
    #[unroll]
    for i in 0..held {
        let column = unit + comptime!(i * config.units);
        if column < width {
            sums[CUBE_POS * stride + column] = dweight[i];
            if config.bias {
                sums[CUBE_POS * stride + width + column] = dbias[i];
            }
        }
    }
}

/// Adds up the tiles' partials; one unit a number.
#[cube(launch_unchecked, address_type = "dynamic")]
fn sum_tiles(
    sums: &[f32],
    dweight: &mut [f32],
    dbias: &mut [f32],
    rows: usize,
    #[comptime] config: NormConfig,
) {
    let width = comptime!(config.width);
    let stride = if config.bias { 2 * width } else { width };
    let unit = CUBE_POS * CUBE_DIM as usize + UNIT_POS as usize;
    if unit < width {
        dweight[unit] = sum_strided(sums, unit, rows, stride);
    }
    if config.bias {
        if unit >= width && unit < 2 * width {
            dbias[unit - width] = sum_strided(sums, unit, rows, stride);
        }
    }
}
