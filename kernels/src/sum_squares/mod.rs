//! Sum of the squares of many tensors' elements: the square of a gradient's global norm.
//!
//! Every tensor is read once and leaves partial sums; one more kernel adds up those of all tensors.
//! The order of the additions is fixed: the same bits every run.

#[cfg(feature = "cube")]
pub(crate) mod cube;
#[cfg(feature = "flex")]
pub(crate) mod flex;
#[cfg(test)]
mod tests;

use burn::backend::Dispatch;
use burn::tensor::Tensor;

use crate::backend::{MambaOps, TensorList};

/// Σ x² over all elements of all tensors, untracked by autodiff.
///
/// # Shapes
///
/// - tensors: at least one, each of any length and data type
/// - output: `[1]`, f32
///
/// # Panics
///
/// If there is no tensor.
pub fn sum_squares(tensors: Vec<Tensor<1>>) -> Tensor<1> {
    assert!(!tensors.is_empty(), "sum_squares: no tensors");
    let list = TensorList(tensors.into_iter().map(Tensor::into_dispatch).collect());
    Tensor::from_dispatch(<Dispatch as MambaOps>::sum_squares_op(list))
}
