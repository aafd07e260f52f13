//! Depthwise causal convolution over the positions, with bias and SiLU.
//!
//! For every sequence and channel e:
//!
//! ```text
//! y_t = silu(bias + Σ_j weight[j] · x_{t-K+1+j}),   j = 0 … K-1
//! ```
//!
//! Positions before the first come from `initial_window`, the last `K - 1` inputs of the piece
//! before; the last `K - 1` inputs of this piece are returned. Where `resets` is 1, inputs before
//! that position count as zero, so packed documents do not see each other. No gradient flows into
//! `initial_window`.

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

/// Inputs of the convolution; `T` is a raw tensor of some backend.
#[derive(Clone, Debug)]
pub struct ConvInputs<T> {
    /// `[B, L, E]`; may be some columns of a wider tensor.
    pub x: T,
    /// `[E, K]`, f32; column K-1 meets the current position.
    pub weight: T,
    /// `[E]`, f32.
    pub bias: Option<T>,
    /// The K-1 inputs before the first position, oldest first, `[B, E, K-1]`, f32; zero if absent.
    pub initial_window: Option<T>,
    /// `[B, L]`, f32: 1 where inputs before the position are forgotten, else 0.
    pub resets: Option<T>,
    /// Whether SiLU follows.
    pub silu: bool,
}

/// Outputs of the forward convolution.
#[derive(Clone, Debug)]
pub struct ConvOutputs<T> {
    /// `[B, L, E]`, the data type of `x`.
    pub y: T,
    /// The last K-1 inputs, `[B, E, K-1]`, f32, with inputs before the last reset as zero.
    pub last_window: T,
}

/// Gradients of the convolution.
#[derive(Clone, Debug)]
pub struct ConvGrads<T> {
    /// `[B, L, E]`.
    pub x: T,
    /// `[E, K]`, f32.
    pub weight: T,
    /// `[E]`, f32.
    pub bias: Option<T>,
}

/// Arguments of [`causal_conv1d`].
#[derive(Clone, Debug)]
pub struct Conv {
    /// `[B, L, E]`.
    pub x: Tensor<3>,
    /// `[E, K]`; column K-1 meets the current position.
    pub weight: Tensor<2>,
    /// `[E]`.
    pub bias: Option<Tensor<1>>,
    /// The K-1 inputs before the first position, oldest first, `[B, E, K-1]`; zero if absent.
    pub initial_window: Option<Tensor<3>>,
    /// `[B, L]`: 1 where a document begins, else 0.
    pub resets: Option<Tensor<2>>,
    /// Apply SiLU to the result.
    pub silu: bool,
}

impl Conv {
    /// A convolution with neither bias nor carried window, followed by SiLU.
    pub fn new(x: Tensor<3>, weight: Tensor<2>) -> Self {
        Self {
            x,
            weight,
            bias: None,
            initial_window: None,
            resets: None,
            silu: true,
        }
    }

    /// Panics, naming the axis, unless all shapes agree.
    fn check(&self) {
        let [batch, length, inner] = self.x.dims();
        let [rows, width] = self.weight.dims();
        assert!(
            batch > 0 && length > 0,
            "causal_conv1d: x must have at least one position, got [B, L, E] = {:?}",
            self.x.dims()
        );
        assert!(width > 0, "causal_conv1d: width K must be at least 1");
        let same = |name: &str, got: &[usize], expected: &[usize]| {
            assert_eq!(got, expected, "causal_conv1d: shape of {name}");
        };
        same("weight [E, K]", &[rows, width], &[inner, width]);
        if let Some(bias) = &self.bias {
            same("bias [E]", &bias.dims(), &[inner]);
        }
        if let Some(window) = &self.initial_window {
            same(
                "initial_window [B, E, K-1]",
                &window.dims(),
                &[batch, inner, width - 1],
            );
        }
        if let Some(resets) = &self.resets {
            same("resets [B, L]", &resets.dims(), &[batch, length]);
        }
    }
}

/// Runs the convolution: `(y, last_window)`.
///
/// # Shapes
///
/// - y: `[B, L, E]`
/// - last_window: `[B, E, K-1]`, untracked by autodiff; K = 1 gives an empty last axis
///
/// # Panics
///
/// If shapes disagree.
pub fn causal_conv1d(conv: Conv) -> (Tensor<3>, Tensor<3>) {
    conv.check();
    let (y, window) = <Dispatch as MambaOps>::conv_op(
        conv.x.into_dispatch(),
        conv.weight.into_dispatch(),
        optional(conv.bias),
        optional(conv.initial_window),
        optional(conv.resets),
        conv.silu,
    );
    (Tensor::from_dispatch(y), Tensor::from_dispatch(window))
}
