//! Softmax cross-entropy, one loss a row: `loss = log Σ_v exp(logit_v) - logit_target`, in nats.

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

/// Loss of every row, in nats.
///
/// # Shapes
///
/// - logits: `[M, V]`
/// - targets: `[M]`, each in `0..V`
/// - output: `[M]`, f32
///
/// # Panics
///
/// If shapes disagree, or there are no rows or columns.
pub fn cross_entropy(logits: Tensor<2>, targets: Tensor<1, Int>) -> Tensor<1> {
    let [rows, columns] = logits.dims();
    assert_eq!(
        rows,
        targets.dims()[0],
        "cross_entropy: rows of logits [M, V] and targets [M]"
    );
    assert!(
        rows > 0 && columns > 0,
        "cross_entropy: logits must have at least one number, got [{rows}, {columns}]"
    );
    Tensor::from_dispatch(<Dispatch as MambaOps>::cross_entropy_op(
        logits.into_dispatch(),
        targets.into_dispatch(),
    ))
}
