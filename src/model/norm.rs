//! RMSNorm or LayerNorm.

use burn::module::{Module, Param};
use burn::tensor::{Device, Tensor};
use mambabyte_kernels::add_norm::{self, AddNorm, NormKind};

use super::init::Init;
use crate::config::{MambaConfig, Norm as NormChoice};

/// Normalisation over the model width.
///
/// ```text
/// RMSNorm:    y = x / √(mean(x²) + eps) · weight [+ bias]
/// LayerNorm:  y = (x - mean(x)) / √(var(x) + eps) · weight + bias
/// ```
#[derive(Module, Debug)]
pub struct Norm {
    /// `[D]`.
    pub weight: Param<Tensor<1>>,
    /// `[D]`; in a model of LayerNorm only.
    pub bias: Option<Param<Tensor<1>>>,
    #[module(skip)]
    pub(super) eps: f32,
    #[module(skip)]
    pub(super) kind: NormKind,
    #[module(skip)]
    fused: bool,
}

impl Norm {
    pub(super) fn new(init: &mut Init, config: &MambaConfig) -> Self {
        let layer = config.norm == NormChoice::Layer;
        Self {
            weight: init.constant(1.0, [config.dim]),
            bias: layer.then(|| init.constant(0.0, [config.dim])),
            eps: config.norm_eps as f32,
            kind: if layer {
                NormKind::Layer
            } else {
                NormKind::Rms
            },
            fused: config.fused_add_norm && config.use_fast_path,
        }
    }

    /// An RMSNorm of rows of `width`, with a bias or, as usual, without.
    pub fn rms(width: usize, eps: f32, bias: bool, device: &Device) -> Self {
        Self::alone(NormKind::Rms, width, eps, bias, device)
    }

    /// A LayerNorm of rows of `width`, with a bias.
    pub fn layer(width: usize, eps: f32, device: &Device) -> Self {
        Self::alone(NormKind::Layer, width, eps, true, device)
    }

    fn alone(kind: NormKind, width: usize, eps: f32, bias: bool, device: &Device) -> Self {
        let init = &mut Init::new(0, device);
        Self {
            weight: init.constant(1.0, [width]),
            bias: bias.then(|| init.constant(0.0, [width])),
            eps,
            kind,
            fused: true,
        }
    }

    /// Normalises every position.
    ///
    /// # Shapes
    ///
    /// - x, output: `[B, L, D]`
    pub fn forward(&self, x: Tensor<3>) -> Tensor<3> {
        let args = AddNorm {
            x,
            residual: None,
            weight: self.weight.val(),
            bias: self.bias.as_ref().map(Param::val),
            eps: self.eps,
            kind: self.kind,
        };
        if self.fused {
            add_norm::add_norm(args).0
        } else {
            add_norm::reference::add_norm(args).0
        }
    }
}
