//! Residual addition and normalisation in one pass over the rows.
//!
//! ```text
//! sum = x + residual
//! RMSNorm:    y = sum / √(mean(sum²) + eps) · weight + bias
//! LayerNorm:  y = (sum - mean(sum)) / √(var(sum) + eps) · weight + bias
//! ```
//!
//! `sum` is the residual stream that the next block adds to: it keeps the residual's data type
//! (f32 under reduced precision), while `y` has the type of `x`.

pub(crate) mod autodiff;
#[cfg(feature = "cube")]
pub(crate) mod cube;
#[cfg(feature = "flex")]
pub(crate) mod flex;
pub mod reference;
#[cfg(test)]
mod tests;

use burn::backend::Dispatch;
use burn::tensor::Tensor;

use crate::backend::{MambaOps, optional};

/// Which normalisation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NormKind {
    /// Root mean square (arXiv 1910.07467).
    Rms,
    /// Mean and variance (arXiv 1607.06450).
    Layer,
}

/// Inputs of the operation; `T` is a raw tensor of some backend. M is the number of rows, B · L.
#[derive(Clone, Debug)]
pub struct NormInputs<T> {
    /// `[M, D]`.
    pub x: T,
    /// `[M, D]`; without it `sum` is `x` itself (in f32).
    pub residual: Option<T>,
    /// `[D]`, f32.
    pub weight: T,
    /// `[D]`, f32.
    pub bias: Option<T>,
    /// Added to the mean square or the variance.
    pub eps: f32,
    /// Which normalisation.
    pub kind: NormKind,
}

/// Outputs of the forward pass.
#[derive(Clone, Debug)]
pub struct NormOutputs<T> {
    /// `[M, D]`, the data type of `x`.
    pub y: T,
    /// `[M, D]`, the data type of `residual` (f32 without one).
    pub sum: T,
    /// Mean of every row, `[M]`, f32 (zero for RMSNorm).
    pub mean: T,
    /// 1 / √(… + eps) of every row, `[M]`, f32.
    pub rstd: T,
}

/// What backward needs of the forward pass.
#[derive(Clone, Debug)]
pub struct NormSaved<T> {
    /// `[M, D]`.
    pub sum: T,
    /// `[M]`, f32.
    pub mean: T,
    /// `[M]`, f32.
    pub rstd: T,
    /// `[D]`, f32.
    pub weight: T,
    /// Whether a bias gradient is wanted.
    pub has_bias: bool,
    /// Which normalisation.
    pub kind: NormKind,
}

/// Gradients of the normalisation.
#[derive(Clone, Debug)]
pub struct NormGrads<T> {
    /// With respect to `sum`, `[M, D]`, the data type of `sum`.
    pub sum: T,
    /// `[D]`, f32.
    pub weight: T,
    /// `[D]`, f32.
    pub bias: Option<T>,
}

/// Arguments of [`add_norm`].
#[derive(Clone, Debug)]
pub struct AddNorm {
    /// `[B, L, D]`.
    pub x: Tensor<3>,
    /// The residual stream, `[B, L, D]`.
    pub residual: Option<Tensor<3>>,
    /// `[D]`.
    pub weight: Tensor<1>,
    /// `[D]`.
    pub bias: Option<Tensor<1>>,
    /// Added to the mean square or the variance.
    pub eps: f32,
    /// Which normalisation.
    pub kind: NormKind,
}

impl AddNorm {
    /// Panics, naming the tensor, unless there are positions and all shapes agree.
    fn check(&self) {
        let [batch, length, width] = self.x.dims();
        assert!(
            batch > 0 && length > 0,
            "add_norm: x must have at least one position, got {:?}",
            self.x.dims()
        );
        let same = |name: &str, got: &[usize], expected: &[usize]| {
            assert_eq!(got, expected, "add_norm: shape of {name}");
        };
        if let Some(residual) = &self.residual {
            same(
                "residual [B, L, D]",
                &residual.dims(),
                &[batch, length, width],
            );
        }
        same("weight [D]", &self.weight.dims(), &[width]);
        if let Some(bias) = &self.bias {
            same("bias [D]", &bias.dims(), &[width]);
        }
    }
}

/// Runs the operation: `(y, sum)`, both tracked.
///
/// # Shapes
///
/// - y: `[B, L, D]`
/// - sum: `[B, L, D]`
///
/// # Panics
///
/// If shapes disagree, or there are no positions.
pub fn add_norm(args: AddNorm) -> (Tensor<3>, Tensor<3>) {
    args.check();
    let dims = args.x.dims();
    let rows = [dims[0] * dims[1], dims[2]];
    let (y, sum) = <Dispatch as MambaOps>::norm_op(
        args.x.reshape(rows).into_dispatch(),
        optional(args.residual.map(|r| r.reshape(rows))),
        args.weight.into_dispatch(),
        optional(args.bias),
        args.eps,
        args.kind,
    );
    (
        Tensor::<2>::from_dispatch(y).reshape(dims),
        Tensor::<2>::from_dispatch(sum).reshape(dims),
    )
}
