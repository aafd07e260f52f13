//! What a model remembers between pieces of a sequence: constant in size, whatever was read.

use burn::tensor::{Device, Tensor};

use crate::config::MambaConfig;

/// Memory of one layer.
#[derive(Clone, Debug)]
pub struct LayerState {
    /// State of the scan, `[B, E, N]`, f32.
    pub h: Tensor<3>,
    /// The last K-1 inputs of the convolution, oldest first, `[B, E, K-1]`, f32.
    pub window: Tensor<3>,
}

/// Memory of a whole model. Carried in training, evaluation and generation alike.
#[derive(Clone, Debug)]
pub struct State {
    /// One for each layer.
    pub layers: Vec<LayerState>,
}

impl State {
    /// The state before the first byte of `batch` sequences.
    pub fn zeros(config: &MambaConfig, batch: usize, device: &Device) -> Self {
        let (inner, state, window) = (config.d_inner(), config.d_state, config.d_conv - 1);
        let layer = LayerState {
            h: Tensor::zeros([batch, inner, state], device),
            window: Tensor::zeros([batch, inner, window], device),
        };
        Self {
            layers: vec![layer; config.depth],
        }
    }

    /// Number of sequences.
    pub fn batch(&self) -> usize {
        self.layers.first().map_or(0, |layer| layer.h.dims()[0])
    }

    /// The same memory as plain tensors, without ties to a gradient graph.
    pub fn inner(self) -> Self {
        self.map(Tensor::inner)
    }

    /// The same memory as constants of a gradient graph: the input of a training step.
    pub fn lift(self) -> Self {
        self.map(Tensor::from_inner)
    }

    fn map(self, f: impl Fn(Tensor<3>) -> Tensor<3>) -> Self {
        let layers = self.layers.into_iter().map(|layer| LayerState {
            h: f(layer.h),
            window: f(layer.window),
        });
        Self {
            layers: layers.collect(),
        }
    }
}
