//! Matrix products: the projections of the model and their gradients.
//!
//! ```text
//! y = x · weight
//! ```
//!
//! Reduced precision happens here: the weight is f32, is rounded to the data type of `x`, and the
//! product adds up in f32; the gradient of the weight is f32.
//!
//! On CUDA a product is one call of cuBLASLt (750 TFLOP/s on an H200 where the portable kernels
//! reach a tenth of it); elsewhere, and where that library is missing, it is Burn's own.

pub(crate) mod autodiff;
#[cfg(feature = "cube")]
pub(crate) mod cube;
#[cfg(feature = "cuda")]
pub(crate) mod cublaslt;
#[cfg(feature = "flex")]
pub(crate) mod flex;
pub mod reference;
#[cfg(test)]
mod tests;

use burn::backend::Dispatch;
use burn::tensor::{DType, Tensor};

use crate::backend::MambaOps;

/// How [`MambaKernels::product`](crate::MambaKernels::product) multiplies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Product {
    /// Whether each operand is transposed first.
    pub transposed: [bool; 2],
    /// Data type of the result.
    pub dtype: DType,
    /// Whether f32 operands may be rounded to TF32 (19 bits), where the device has it.
    pub tf32: bool,
    /// Whether it may take memory beside its operands. What a graph replays may not: that memory is
    /// shared, and another product's numbers may be in it then.
    pub workspace: bool,
}

impl Product {
    /// `a · b`.
    pub fn plain(dtype: DType, tf32: bool) -> Self {
        Self {
            transposed: [false, false],
            dtype,
            tf32,
            workspace: true,
        }
    }

    /// `aᵀ · b`.
    pub fn left_transposed(dtype: DType, tf32: bool) -> Self {
        Self {
            transposed: [true, false],
            ..Self::plain(dtype, tf32)
        }
    }

    /// `a · bᵀ`.
    pub fn right_transposed(dtype: DType, tf32: bool) -> Self {
        Self {
            transposed: [false, true],
            ..Self::plain(dtype, tf32)
        }
    }
}

/// Where the result of a product goes.
#[derive(Clone, Debug)]
pub enum Target<T> {
    /// A new tensor.
    New,
    /// A new tensor that is the sum of this one and the product; its buffer is reused where nothing
    /// else holds it.
    Add(T),
    /// This view, on backends that can write in place; others return a new tensor.
    Into(T),
}

/// Whether products on CUDA go to cuBLASLt: whether it and a driver that can order it against
/// CubeCL's work were found. Without, CubeCL's own kernels compute them, several times slower.
#[cfg(feature = "cuda")]
pub fn has_cublaslt() -> bool {
    cublaslt::available()
}

/// Arguments of [`linear`].
#[derive(Clone, Debug)]
pub struct Linear {
    /// `[M, in]`, f32, f16 or bf16.
    pub x: Tensor<2>,
    /// `[in, out]`, or `[out, in]` if `transposed`; f32.
    pub weight: Tensor<2>,
    /// Whether the weight is stored transposed, as a head that shares the embedding's.
    pub transposed: bool,
    /// Data type of the result: that of `x`, or f32.
    pub dtype: DType,
    /// Whether f32 operands may be rounded to TF32.
    pub tf32: bool,
}

/// `x · weight` (or `x · weightᵀ`), `[M, out]`.
///
/// # Panics
///
/// If the inner sizes disagree.
pub fn linear(args: Linear) -> Tensor<2> {
    let [_, input] = args.x.dims();
    let inner = args.weight.dims()[usize::from(args.transposed)];
    assert_eq!(
        input,
        inner,
        "linear: x is [M, {input}] and the weight {:?} (transposed: {})",
        args.weight.dims(),
        args.transposed
    );
    Tensor::from_dispatch(<Dispatch as MambaOps>::linear_op(
        args.x.into_dispatch(),
        args.weight.into_dispatch(),
        Product {
            transposed: [false, args.transposed],
            ..Product::plain(args.dtype, args.tf32)
        },
    ))
}

/// `op(a) · op(b)` of two matrices of one data type, without gradient: what [`linear`] and its
/// backward pass are made of.
///
/// # Panics
///
/// If the inner sizes disagree.
pub fn product(a: Tensor<2>, b: Tensor<2>, how: Product) -> Tensor<2> {
    let [a_dims, b_dims] = [a.dims(), b.dims()];
    let inner = [
        a_dims[usize::from(!how.transposed[0])],
        b_dims[usize::from(how.transposed[1])],
    ];
    assert_eq!(
        inner[0], inner[1],
        "product: inner sizes of {a_dims:?} and {b_dims:?}, transposed {:?}",
        how.transposed
    );
    Tensor::from_dispatch(<Dispatch as MambaOps>::product_op(
        a.into_dispatch(),
        b.into_dispatch(),
        how,
    ))
}
