//! One row of a table for every byte, `y[m] = weight[bytes[m]]`, and its gradient
//! `dweight[v] = Σ dy[m]` over the m with `bytes[m] = v`, added up in a fixed order: a scatter by
//! atomic additions would give other bits every run.

pub(crate) mod autodiff;
#[cfg(feature = "cube")]
pub(crate) mod cube;
#[cfg(feature = "flex")]
pub(crate) mod flex;
pub mod reference;
#[cfg(test)]
mod tests;

use burn::backend::Dispatch;
use burn::tensor::{Int, Tensor};

use crate::backend::MambaOps;

/// The rows of `weight` that `bytes` name.
///
/// # Shapes
///
/// - weight: `[V, D]`, f32
/// - bytes: `[B, L]`, each in `0..V`
/// - output: `[B, L, D]`, f32
pub fn embedding(weight: Tensor<2>, bytes: Tensor<2, Int>) -> Tensor<3> {
    let [batch, length] = bytes.dims();
    let [_, width] = weight.dims();
    let rows = <Dispatch as MambaOps>::embedding_op(
        weight.into_dispatch(),
        bytes.reshape([batch * length]).into_dispatch(),
    );
    Tensor::<2>::from_dispatch(rows).reshape([batch, length, width])
}
