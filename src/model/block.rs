//! Residual blocks and their stack.

use std::ops::Range;

use burn::module::{Module, Param};
use burn::tensor::{Device, Tensor};
use mambabyte_kernels::decode::DecodeLayer;
use mambabyte_kernels::mamba_layer::{LayerSettings, MambaLayer, mamba_layer};

use super::compute::Compute;
use super::init::Init;
use super::mixer::MambaBlock;
use super::norm::Norm;
use super::state::{LayerState, State};
use crate::config::MambaConfig;

/// A block with its norm in the residual stream: `r ← r + mixer(norm(r))`.
#[derive(Module, Debug)]
pub struct ResidualBlock {
    /// Norm before the mixer.
    pub norm: Norm,
    /// The state-space layer.
    pub mixer: MambaBlock,
    /// One operation for all of it, or one after the other.
    #[module(skip)]
    fused: bool,
    #[module(skip)]
    compute: Compute,
    #[module(skip)]
    recompute: bool,
}

impl ResidualBlock {
    /// A block on its own, initialised from `seed`.
    pub fn new(config: &MambaConfig, seed: u64, device: &Device) -> Self {
        Self::with_init(&mut Init::new(seed, device), config)
    }

    fn with_init(init: &mut Init, config: &MambaConfig) -> Self {
        Self {
            norm: Norm::new(init, config),
            mixer: MambaBlock::with_init(init, config),
            fused: config.is_fused(),
            compute: Compute::default(),
            recompute: false,
        }
    }

    /// `x + mixer(norm(x))` and the memory after it.
    ///
    /// # Shapes
    ///
    /// - x, output: `[B, L, D]`
    /// - resets: `[B, L]`, 1 where a document begins
    pub fn forward(
        &self,
        x: Tensor<3>,
        state: Option<LayerState>,
        resets: Option<Tensor<2>>,
    ) -> (Tensor<3>, LayerState) {
        if self.fused {
            return self.forward_fused(x, state, resets);
        }
        let normalised = self.norm.forward(x.clone());
        let (mixed, state) = self.mixer.forward(normalised, state, resets);
        (x + mixed, state)
    }

    fn forward_fused(
        &self,
        stream: Tensor<3>,
        state: Option<LayerState>,
        resets: Option<Tensor<2>>,
    ) -> (Tensor<3>, LayerState) {
        let bias = |bias: &Option<Param<Tensor<1>>>| bias.as_ref().map(Param::val);
        let (h, window) = state.map(|state| (state.h, state.window)).unzip();
        let mixer = &self.mixer;
        let (stream, h, window) = mamba_layer(MambaLayer {
            stream,
            norm: self.norm.weight.val(),
            norm_bias: bias(&self.norm.bias),
            in_proj: mixer.in_proj.weight.val(),
            in_bias: bias(&mixer.in_proj.bias),
            conv: mixer.conv1d.weight.val(),
            conv_bias: bias(&mixer.conv1d.bias),
            x_proj: mixer.x_proj.weight.val(),
            dt_proj: mixer.dt_proj.weight.val(),
            dt_bias: bias(&mixer.dt_proj.bias),
            a_log: mixer.a_log.val(),
            rates: mixer.rates.clone(),
            d: mixer.d.val(),
            out_proj: mixer.out_proj.weight.val(),
            out_bias: bias(&mixer.out_proj.bias),
            h,
            window,
            resets,
            settings: LayerSettings {
                norm: self.norm.kind,
                eps: self.norm.eps,
                dtype: self.compute.dtype,
                tf32: self.compute.tf32,
                keep: !self.recompute,
            },
        });
        (stream, LayerState { h, window })
    }

    /// The parameters for decoding, if the block is one operation.
    pub(super) fn decode_layer(&self) -> Option<DecodeLayer> {
        let bias = |bias: &Option<Param<Tensor<1>>>| bias.as_ref().map(Param::val);
        let mixer = &self.mixer;
        self.fused.then(|| DecodeLayer {
            norm: self.norm.weight.val(),
            norm_bias: bias(&self.norm.bias),
            in_proj: mixer.in_proj.weight.val(),
            in_bias: bias(&mixer.in_proj.bias),
            conv: mixer.conv1d.weight.val(),
            conv_bias: bias(&mixer.conv1d.bias),
            x_proj: mixer.x_proj.weight.val(),
            dt_proj: mixer.dt_proj.weight.val(),
            dt_bias: bias(&mixer.dt_proj.bias),
            rates: mixer.rates(),
            d: mixer.d.val(),
            out_proj: mixer.out_proj.weight.val(),
            out_bias: bias(&mixer.out_proj.bias),
        })
    }

    /// One position of [`forward`](Self::forward).
    ///
    /// # Shapes
    ///
    /// - x, output: `[B, D]`
    pub fn step(&self, x: Tensor<2>, state: LayerState) -> (Tensor<2>, LayerState) {
        let [batch, width] = x.dims();
        let (y, state) = self.forward(x.reshape([batch, 1, width]), Some(state), None);
        (y.reshape([batch, width]), state)
    }
}

/// A stack of residual blocks, with an optional norm at its end. Maps vectors to vectors.
#[derive(Module, Debug)]
pub struct Mamba {
    /// The blocks, first to last.
    pub layers: Vec<ResidualBlock>,
    /// Norm after the last block.
    pub norm_f: Option<Norm>,
}

impl MambaConfig {
    /// A stack on its own, initialised from `seed`.
    pub fn init(&self, seed: u64, device: &Device) -> Mamba {
        Mamba::with_init(&mut Init::new(seed, device), self)
    }
}

impl Mamba {
    pub(super) fn with_init(init: &mut Init, config: &MambaConfig) -> Self {
        Self {
            layers: (0..config.depth)
                .map(|_| ResidualBlock::with_init(init, config))
                .collect(),
            norm_f: config.final_norm.then(|| Norm::new(init, config)),
        }
    }

    /// The stack, computing in the given format. Only fused blocks have formats other than f32.
    pub fn with_compute(mut self, compute: Compute) -> Self {
        for layer in &mut self.layers {
            layer.compute = compute;
        }
        self
    }

    /// The stack, of whose first `layers` blocks the backward pass keeps little and recomputes the
    /// rest. The results have the same bits.
    pub fn with_recompute(mut self, layers: usize) -> Self {
        for (i, layer) in self.layers.iter_mut().enumerate() {
            layer.recompute = i < layers;
        }
        self
    }

    /// Runs the stack; without a state it starts from zero.
    ///
    /// # Shapes
    ///
    /// - x, output: `[B, L, D]`
    /// - resets: `[B, L]`, 1 where a document begins
    ///
    /// # Panics
    ///
    /// If the state is of another number of layers.
    pub fn forward(
        &self,
        x: Tensor<3>,
        state: Option<State>,
        resets: Option<Tensor<2>>,
    ) -> (Tensor<3>, State) {
        let (stream, state) = self.forward_stream(x, state, resets);
        (self.finish(stream), state)
    }

    /// [`forward`](Self::forward) up to the stream behind the last block, which
    /// [`finish`](Self::finish) makes the output of.
    ///
    /// # Panics
    ///
    /// If the state is of another number of layers.
    pub(crate) fn forward_stream(
        &self,
        x: Tensor<3>,
        state: Option<State>,
        resets: Option<Tensor<2>>,
    ) -> (Tensor<3>, State) {
        let before = state.map_or_else(Vec::new, |state| state.layers);
        assert!(
            before.is_empty() || before.len() == self.layers.len(),
            "Mamba: the state has {} layers and the model {}",
            before.len(),
            self.layers.len()
        );
        let (stream, after) = self.forward_layers(0..self.layers.len(), x, before, resets);
        (stream, State { layers: after })
    }

    /// Runs the blocks `range`: from the stream before them to the stream behind, with the memories
    /// before and after each. Without memories before they start from zero.
    pub(crate) fn forward_layers(
        &self,
        range: Range<usize>,
        mut stream: Tensor<3>,
        before: Vec<LayerState>,
        resets: Option<Tensor<2>>,
    ) -> (Tensor<3>, Vec<LayerState>) {
        let mut before = before.into_iter();
        let mut after = Vec::with_capacity(range.len());
        for layer in &self.layers[range] {
            let (next, state) = layer.forward(stream, before.next(), resets.clone());
            stream = next;
            after.push(state);
        }
        (stream, after)
    }

    /// The stack's output from the stream behind the last block.
    pub(crate) fn finish(&self, stream: Tensor<3>) -> Tensor<3> {
        match &self.norm_f {
            Some(norm) => norm.forward(stream),
            None => stream,
        }
    }

    /// One position of [`forward`](Self::forward).
    ///
    /// # Shapes
    ///
    /// - x, output: `[B, D]`
    pub fn step(&self, x: Tensor<2>, state: State) -> (Tensor<2>, State) {
        let [batch, width] = x.dims();
        let (y, state) = self.forward(x.reshape([batch, 1, width]), Some(state), None);
        (y.reshape([batch, width]), state)
    }
}
