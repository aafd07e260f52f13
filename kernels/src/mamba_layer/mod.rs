//! A residual Mamba layer as one operation: norm, mixer and residual addition.
//!
//! ```text
//! x, z     = split(in_proj(norm(stream)))
//! u        = silu(conv1d(x))
//! Δ, B, C  = split(x_proj(u));   Δ = softplus(dt_proj(Δ))
//! y        = (scan(u, Δ, -exp(a_log), B, C) + d · u) · silu(z)
//! stream'  = stream + out_proj(y)
//! ```
//!
//! One operation instead of ten, for memory: backward keeps the normalised input, `xz`, the
//! low-rank step sizes with B and C, and a few states of the scan; it recomputes the convolution
//! and the step sizes, and takes `y` from the scan's own backward pass. In bf16 that is 10.8 kB a
//! position at D = 1024; without `xz` ([`LayerSettings::keep`]), which one product rebuilds, 2.7 kB.
//!
//! The stream, parameters, states and all sums are f32; activations are of
//! [`LayerSettings::dtype`]. The addition to the stream is part of the last product, in f32.

pub(crate) mod autodiff;
#[cfg(feature = "cube")]
pub(crate) mod cube;
pub(crate) mod fused;
pub mod reference;
#[cfg(test)]
mod tests;

use burn::backend::tensor::FloatTensor;
use burn::backend::{Backend, Dispatch, ExtensionType};
use burn::tensor::{DType, Tensor};

use crate::add_norm::NormKind;
use crate::backend::{MambaOps, OptionalTensor, optional};

/// What is not a tensor.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LayerSettings {
    /// Which normalisation.
    pub norm: NormKind,
    /// Added to the norm's mean square or variance.
    pub eps: f32,
    /// Data type of activations and of the products' operands.
    pub dtype: DType,
    /// Whether products of f32 operands may round them to TF32.
    pub tf32: bool,
    /// Whether backward finds `xz` saved, 4 · E numbers a position saved against one product.
    pub keep: bool,
}

/// Parameters, f32; `T` is a raw tensor of some backend.
#[derive(Clone, Debug)]
pub struct LayerWeights<T> {
    /// `[D]`.
    pub norm: T,
    /// `[D]`.
    pub norm_bias: Option<T>,
    /// `[D, 2E]`: x, then z.
    pub in_proj: T,
    /// `[2E]`.
    pub in_bias: Option<T>,
    /// `[E, K]`.
    pub conv: T,
    /// `[E]`.
    pub conv_bias: Option<T>,
    /// `[E, R + 2N]`: Δ, B, C.
    pub x_proj: T,
    /// `[R, E]`.
    pub dt_proj: T,
    /// `[E]`.
    pub dt_bias: Option<T>,
    /// `[E, N]`.
    pub a_log: T,
    /// `[E]`.
    pub d: T,
    /// `[E, D]`.
    pub out_proj: T,
    /// `[D]`.
    pub out_bias: Option<T>,
}

/// What a layer remembers and is told, beside its input.
#[derive(Clone, Debug)]
pub struct LayerMemory<T> {
    /// State of the scan before the first position, `[B, E, N]`, f32; zero if absent.
    pub h: Option<T>,
    /// The last K-1 inputs of the convolution, `[B, E, K-1]`, f32; zero if absent.
    pub window: Option<T>,
    /// `[B, L]`, f32: 1 where a document begins.
    pub resets: Option<T>,
    /// `-exp(a_log)`, `[E, N]`, f32, where it was computed before.
    pub rates: Option<T>,
}

/// Arguments of [`mamba_layer`].
#[derive(Clone, Debug)]
pub struct MambaLayer {
    /// The residual stream, `[B, L, D]`, f32.
    pub stream: Tensor<3>,
    /// `[D]`.
    pub norm: Tensor<1>,
    /// `[D]`.
    pub norm_bias: Option<Tensor<1>>,
    /// `[D, 2E]`: x, then z.
    pub in_proj: Tensor<2>,
    /// `[2E]`.
    pub in_bias: Option<Tensor<1>>,
    /// `[E, K]`.
    pub conv: Tensor<2>,
    /// `[E]`.
    pub conv_bias: Option<Tensor<1>>,
    /// `[E, R + 2N]`: Δ, B, C.
    pub x_proj: Tensor<2>,
    /// `[R, E]`.
    pub dt_proj: Tensor<2>,
    /// `[E]`.
    pub dt_bias: Option<Tensor<1>>,
    /// `[E, N]`.
    pub a_log: Tensor<2>,
    /// `-exp(a_log)`, where it was computed before: for weights that no longer change, since no
    /// gradient flows through it.
    pub rates: Option<Tensor<2>>,
    /// `[E]`.
    pub d: Tensor<1>,
    /// `[E, D]`.
    pub out_proj: Tensor<2>,
    /// `[D]`.
    pub out_bias: Option<Tensor<1>>,
    /// State of the scan before the first position, `[B, E, N]`; zero if absent.
    pub h: Option<Tensor<3>>,
    /// The last K-1 inputs of the convolution, `[B, E, K-1]`; zero if absent.
    pub window: Option<Tensor<3>>,
    /// `[B, L]`: 1 where a document begins, else 0.
    pub resets: Option<Tensor<2>>,
    /// What is not a tensor.
    pub settings: LayerSettings,
}

impl MambaLayer {
    /// Panics, naming the tensor, unless all shapes agree.
    fn check(&self) {
        let [batch, length, width] = self.stream.dims();
        let [inner, states] = self.a_log.dims();
        let [rank, _] = self.dt_proj.dims();
        let [_, taps] = self.conv.dims();
        assert!(
            batch > 0 && length > 0,
            "mamba_layer: the stream must have at least one position, got {:?}",
            self.stream.dims()
        );
        let same = |name: &str, got: &[usize], expected: &[usize]| {
            assert_eq!(got, expected, "mamba_layer: shape of {name}");
        };
        let row = |name: &str, tensor: &Option<Tensor<1>>, expected: usize| {
            if let Some(tensor) = tensor {
                same(name, &tensor.dims(), &[expected]);
            }
        };
        same("norm [D]", &self.norm.dims(), &[width]);
        same("in_proj [D, 2E]", &self.in_proj.dims(), &[width, 2 * inner]);
        same("conv [E, K]", &self.conv.dims(), &[inner, taps]);
        let low = rank + 2 * states;
        same("x_proj [E, R + 2N]", &self.x_proj.dims(), &[inner, low]);
        same("dt_proj [R, E]", &self.dt_proj.dims(), &[rank, inner]);
        same("d [E]", &self.d.dims(), &[inner]);
        same("out_proj [E, D]", &self.out_proj.dims(), &[inner, width]);
        row("norm_bias [D]", &self.norm_bias, width);
        row("in_bias [2E]", &self.in_bias, 2 * inner);
        row("conv_bias [E]", &self.conv_bias, inner);
        row("dt_bias [E]", &self.dt_bias, inner);
        row("out_bias [D]", &self.out_bias, width);
        if let Some(h) = &self.h {
            same("h [B, E, N]", &h.dims(), &[batch, inner, states]);
        }
        if let Some(window) = &self.window {
            let expected = [batch, inner, taps - 1];
            same("window [B, E, K-1]", &window.dims(), &expected);
        }
        if let Some(resets) = &self.resets {
            same("resets [B, L]", &resets.dims(), &[batch, length]);
        }
    }
}

/// Runs the layer: `(stream', h, window)`, the last two untracked by autodiff.
///
/// # Shapes
///
/// - stream': `[B, L, D]`, f32
/// - h: `[B, E, N]`
/// - window: `[B, E, K-1]`
///
/// # Panics
///
/// If shapes disagree.
pub fn mamba_layer(args: MambaLayer) -> (Tensor<3>, Tensor<3>, Tensor<3>) {
    args.check();
    let (stream, h, window) = <Dispatch as MambaOps>::layer_op(
        args.stream.into_dispatch(),
        LayerTensors {
            norm: args.norm.into_dispatch(),
            norm_bias: optional(args.norm_bias),
            in_proj: args.in_proj.into_dispatch(),
            in_bias: optional(args.in_bias),
            conv: args.conv.into_dispatch(),
            conv_bias: optional(args.conv_bias),
            x_proj: args.x_proj.into_dispatch(),
            dt_proj: args.dt_proj.into_dispatch(),
            dt_bias: optional(args.dt_bias),
            a_log: args.a_log.into_dispatch(),
            rates: optional(args.rates),
            d: args.d.into_dispatch(),
            out_proj: args.out_proj.into_dispatch(),
            out_bias: optional(args.out_bias),
            h: optional(args.h),
            window: optional(args.window),
            resets: optional(args.resets),
        },
        args.settings,
    );
    (
        Tensor::from_dispatch(stream),
        Tensor::from_dispatch(h),
        Tensor::from_dispatch(window),
    )
}

/// [`LayerWeights`] and [`LayerMemory`] in the form that Burn's dispatch macro can route.
#[derive(Clone, Debug, ExtensionType)]
#[allow(missing_docs)] // The fields are those of the two.
pub struct LayerTensors<B: Backend> {
    pub norm: FloatTensor<B>,
    #[extension_type]
    pub norm_bias: OptionalTensor<B>,
    pub in_proj: FloatTensor<B>,
    #[extension_type]
    pub in_bias: OptionalTensor<B>,
    pub conv: FloatTensor<B>,
    #[extension_type]
    pub conv_bias: OptionalTensor<B>,
    pub x_proj: FloatTensor<B>,
    pub dt_proj: FloatTensor<B>,
    #[extension_type]
    pub dt_bias: OptionalTensor<B>,
    pub a_log: FloatTensor<B>,
    #[extension_type]
    pub rates: OptionalTensor<B>,
    pub d: FloatTensor<B>,
    pub out_proj: FloatTensor<B>,
    #[extension_type]
    pub out_bias: OptionalTensor<B>,
    #[extension_type]
    pub h: OptionalTensor<B>,
    #[extension_type]
    pub window: OptionalTensor<B>,
    #[extension_type]
    pub resets: OptionalTensor<B>,
}

impl<B: Backend> LayerTensors<B> {
    /// Parameters, and the rest.
    pub(crate) fn split(self) -> (LayerWeights<FloatTensor<B>>, LayerMemory<FloatTensor<B>>) {
        let weights = LayerWeights {
            norm: self.norm,
            norm_bias: self.norm_bias.into_option(),
            in_proj: self.in_proj,
            in_bias: self.in_bias.into_option(),
            conv: self.conv,
            conv_bias: self.conv_bias.into_option(),
            x_proj: self.x_proj,
            dt_proj: self.dt_proj,
            dt_bias: self.dt_bias.into_option(),
            a_log: self.a_log,
            d: self.d,
            out_proj: self.out_proj,
            out_bias: self.out_bias.into_option(),
        };
        let memory = LayerMemory {
            h: self.h.into_option(),
            window: self.window.into_option(),
            resets: self.resets.into_option(),
            rates: self.rates.into_option(),
        };
        (weights, memory)
    }
}

impl<T> LayerWeights<T> {
    /// Every parameter in turn, in a fixed order: absent ones keep their place.
    pub(crate) fn map<U>(self, mut f: impl FnMut(T) -> U) -> LayerWeights<U> {
        LayerWeights {
            norm: f(self.norm),
            norm_bias: self.norm_bias.map(&mut f),
            in_proj: f(self.in_proj),
            in_bias: self.in_bias.map(&mut f),
            conv: f(self.conv),
            conv_bias: self.conv_bias.map(&mut f),
            x_proj: f(self.x_proj),
            dt_proj: f(self.dt_proj),
            dt_bias: self.dt_bias.map(&mut f),
            a_log: f(self.a_log),
            d: f(self.d),
            out_proj: f(self.out_proj),
            out_bias: self.out_bias.map(&mut f),
        }
    }

    /// The parameters as a list with a place for each.
    pub(crate) fn into_list(self) -> [Option<T>; 13] {
        [
            Some(self.norm),
            self.norm_bias,
            Some(self.in_proj),
            self.in_bias,
            Some(self.conv),
            self.conv_bias,
            Some(self.x_proj),
            Some(self.dt_proj),
            self.dt_bias,
            Some(self.a_log),
            Some(self.d),
            Some(self.out_proj),
            self.out_bias,
        ]
    }
}
