//! Normalisation in pieces, for operations that fuse a whole layer: what is saved between forward
//! and backward is the normalised row in the activations' data type, not the f32 stream.
//!
//! ```text
//! hat    = x · rstd              RMSNorm     rstd = 1 / √(mean(x²) + eps)
//! hat    = (x - mean(x)) · rstd  LayerNorm   rstd = 1 / √(var(x) + eps)
//! normed = hat · weight + bias
//! ```
//!
//! `hat` is rounded to its data type before `normed` is computed from it, so `normed` can be
//! computed again from a saved `hat`, bit for bit.
//!
//! These are methods of [`MambaKernels`](crate::MambaKernels) on raw tensors, without autodiff;
//! [`add_norm`](crate::add_norm) is the differentiable operation. M is the number of rows, B · L.

#[cfg(feature = "cube")]
pub(crate) mod cube;
#[cfg(feature = "flex")]
pub(crate) mod flex;
#[cfg(test)]
mod tests;

use burn::tensor::DType;

pub use crate::add_norm::NormKind;

/// Inputs of the normalisation; `T` is a raw tensor of some backend.
#[derive(Clone, Debug)]
pub struct NormalizeInputs<T> {
    /// `[M, D]`, f32.
    pub x: T,
    /// Added to the mean square or the variance.
    pub eps: f32,
    /// Which normalisation.
    pub kind: NormKind,
    /// Data type of `hat`.
    pub dtype: DType,
}

/// Normalised rows.
#[derive(Clone, Debug)]
pub struct Normalized<T> {
    /// `[M, D]`.
    pub hat: T,
    /// `[M]`, f32.
    pub rstd: T,
}

/// Inputs of the backward pass.
#[derive(Clone, Debug)]
pub struct NormalizeBackward<T> {
    /// `[M, D]`, as forward returned it.
    pub hat: T,
    /// `[M]`, f32, as forward returned it.
    pub rstd: T,
    /// `[D]`, f32.
    pub weight: T,
    /// Whether a bias gradient is wanted.
    pub has_bias: bool,
    /// Which normalisation.
    pub kind: NormKind,
    /// Gradient of `normed`, `[M, D]`.
    pub dy: T,
    /// Gradient that reaches `x` beside the normalisation (the residual stream), `[M, D]`, f32.
    pub dout: T,
}

/// Gradients of the normalisation.
#[derive(Clone, Debug)]
pub struct NormalizeGrads<T> {
    /// Gradient of `x` with `dout` added, `[M, D]`, f32: the buffer of `dout` where nothing else
    /// holds it.
    pub dx: T,
    /// `[D]`, f32.
    pub weight: T,
    /// `[D]`, f32.
    pub bias: Option<T>,
}
