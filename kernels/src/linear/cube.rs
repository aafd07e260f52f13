//! Products on a GPU. [`product`] is the one place that decides which library multiplies.

use burn::tensor::{DType, Shape};
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::kernel::matmul::{MatmulStrategy, matmul};
use burn_cubecl::tensor::CubeTensor;
use cubecl::ir::ElemType;
use cubecl::prelude::*;
use cubecl::zspace::metadata::Metadata;

use super::{Product, Target};
use crate::cube::{address_type, buffer, cube_dim, elem, empty_shape, grid, rows};

/// Units of a cube in the store kernel.
const UNITS: usize = 256;

/// An operand as the libraries take it: a row-major matrix whose rows may lie apart.
pub(super) struct Matrix {
    pub tensor: CubeTensor,
    pub rows: usize,
    pub columns: usize,
}

impl Matrix {
    pub fn of(tensor: CubeTensor) -> Self {
        let (tensor, _) = rows(tensor);
        let shape = tensor.meta.shape();
        let columns = shape[shape.num_dims() - 1];
        Self {
            rows: shape.num_elements() / columns.max(1),
            columns,
            tensor,
        }
    }

    /// Rows and columns after an optional transposition.
    pub fn turned(&self, transposed: bool) -> [usize; 2] {
        if transposed {
            [self.columns, self.rows]
        } else {
            [self.rows, self.columns]
        }
    }
}

/// See [`MambaKernels::product`](crate::MambaKernels::product).
///
/// # Panics
///
/// If the inner sizes disagree.
pub(crate) fn product(
    a: CubeTensor,
    b: CubeTensor,
    how: Product,
    target: Target<CubeTensor>,
) -> CubeTensor {
    let shape = result_shape(&a, &b, how);
    let (a, b) = (Matrix::of(a), Matrix::of(b));
    assert_eq!(
        a.turned(how.transposed[0])[1],
        b.turned(how.transposed[1])[0],
        "product: inner sizes of {:?} and {:?}, transposed {:?}",
        a.tensor.meta.shape(),
        b.tensor.meta.shape(),
        how.transposed
    );
    let (add, out) = match target {
        Target::New => (None, empty_shape(&a.tensor, shape, how.dtype)),
        Target::Into(view) => (None, view),
        Target::Add(add) => {
            let add = into_contiguous(add);
            let reusable = add.can_mut() && add.dtype == how.dtype;
            let out = if reusable {
                add.clone()
            } else {
                empty_shape(&a.tensor, shape, how.dtype)
            };
            (Some(add), out)
        }
    };
    #[cfg(feature = "cuda")]
    if super::cublaslt::product(&a, &b, how, add.as_ref(), &out) {
        return out;
    }
    portable(a, b, how, add, &out);
    out
}

/// Whether graphs can have products on the device of `like`.
pub(crate) fn replayable(like: &CubeTensor) -> bool {
    #[cfg(feature = "cuda")]
    return super::cublaslt::serves(like);
    #[cfg(not(feature = "cuda"))]
    return {
        let _ = like;
        false
    };
}

/// `op(a) · op(b)`, or that added to what is there, into a matrix whose place does not change. Whether a
/// graph may replay it: kernels that needed other memory for it would find that taken.
///
/// # Panics
///
/// If no kernel fits.
pub(crate) fn product_into(
    a: CubeTensor,
    b: CubeTensor,
    how: Product,
    adds: bool,
    out: &CubeTensor,
) -> bool {
    let (a, b) = (Matrix::of(a), Matrix::of(b));
    let add = adds.then(|| out.clone());
    #[cfg(feature = "cuda")]
    if super::cublaslt::product(&a, &b, how, add.as_ref(), out) {
        return !how.workspace;
    }
    portable(a, b, how, add, out);
    false
}

/// The rows of `a` keep their axes; a transposed `a` gives a matrix.
fn result_shape(a: &CubeTensor, b: &CubeTensor, how: Product) -> Shape {
    let last = |t: &CubeTensor| t.meta.shape().num_dims() - 1;
    let columns = |t: &CubeTensor| t.meta.shape()[last(t)];
    let rows = |t: &CubeTensor| t.meta.shape().num_elements() / columns(t).max(1);
    let width = if how.transposed[1] {
        rows(b)
    } else {
        columns(b)
    };
    if how.transposed[0] {
        return Shape::new([columns(a), width]);
    }
    let mut dims = a.meta.shape().to_vec();
    dims[last(a)] = width;
    Shape::from(dims)
}

/// The product by CubeCL's own kernels, then a pass that adds and moves where that is asked for.
pub(super) fn portable(
    a: Matrix,
    b: Matrix,
    how: Product,
    add: Option<CubeTensor>,
    out: &CubeTensor,
) {
    let operand = |m: Matrix, transposed: bool| {
        let mut tensor = into_contiguous(m.tensor);
        *tensor.meta = if transposed {
            Metadata::new([m.columns, m.rows], [1, m.columns])
        } else {
            Metadata::new([m.rows, m.columns], [m.columns, 1])
        };
        tensor
    };
    let a = operand(a, how.transposed[0]);
    let b = operand(b, how.transposed[1]);
    let result = matmul(a, b, None, MatmulStrategy::Cube, how.dtype)
        .unwrap_or_else(|error| panic!("product: no kernel of CubeCL's fits: {error:?}"));
    store(&into_contiguous(result), add.as_ref(), out);
}

/// Writes `result (+ add)` to `out`, whose rows may lie apart.
fn store(result: &CubeTensor, add: Option<&CubeTensor>, out: &CubeTensor) {
    let elements = result.meta.num_elements();
    let shape = result.meta.shape();
    let columns = shape[shape.num_dims() - 1];
    let (out, stride) = rows(out.clone());
    let add = add.cloned();
    let add_dtype = add.as_ref().map_or(DType::F32, |add| add.dtype);
    // SAFETY: `result` and `add` are contiguous with `elements` numbers, `out` has as many in rows
    // `stride` apart; units beyond the last number write nothing.
    unsafe {
        store_rows::launch_unchecked(
            &result.client,
            grid(elements.div_ceil(UNITS)),
            cube_dim(UNITS),
            address_type(&[result, &out]),
            buffer(result),
            crate::cube::optional(&add),
            buffer(&out),
            elements,
            columns,
            stride,
            [elem(result.dtype), elem(add_dtype), elem(out.dtype)],
        );
    }
}

#[cube(launch_unchecked, address_type = "dynamic")]
fn store_rows<R: Float, A: Float, O: Float>(
    result: &[R],
    add: &ComptimeOption<Box<[A]>>,
    out: &mut [O],
    elements: usize,
    columns: usize,
    stride: usize,
    #[define(R, A, O)] _types: [ElemType; 3],
) {
    let unit = CUBE_POS * CUBE_DIM as usize + UNIT_POS as usize;
    if unit < elements {
        let mut value = f32::cast_from(result[unit]);
        #[comptime]
        match add {
            ComptimeOption::Some(add) => value += f32::cast_from(add[unit]),
            ComptimeOption::None => {}
        }
        out[unit / columns * stride + unit % columns] = O::cast_from(value);
    }
}
