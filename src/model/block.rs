//! Residual blocks and their stack.

use burn::module::Module;
use burn::tensor::{Device, Tensor};

use super::init::Init;
use super::mixer::MambaBlock;
use super::norm::Norm;
use super::state::{LayerState, State};
use crate::config::MambaConfig;

/// A block with its norm in the residual stream: `r ← r + mixer(norm(r))`.
///
/// The addition waits for the next block, whose norm does it in the same pass ("add, norm, mix").
#[derive(Module, Debug)]
pub struct ResidualBlock {
    /// Norm before the mixer.
    pub norm: Norm,
    /// The state-space layer.
    pub mixer: MambaBlock,
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
        }
    }

    /// `x + mixer(norm(x))` and the memory after it.
    ///
    /// # Shapes
    ///
    /// - x, output: `[B, L, D]`
    pub fn forward(
        &self,
        x: Tensor<3>,
        state: Option<LayerState>,
        resets: Option<Tensor<2>>,
    ) -> (Tensor<3>, LayerState) {
        let (x, residual, state) = self.forward_deferred(x, None, state, resets);
        (x + residual, state)
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

    /// The block with its addition left to the consumer: `(mixer output, residual, memory)`, whose
    /// first two add up to the block's result.
    pub(crate) fn forward_deferred(
        &self,
        x: Tensor<3>,
        residual: Option<Tensor<3>>,
        state: Option<LayerState>,
        resets: Option<Tensor<2>>,
    ) -> (Tensor<3>, Tensor<3>, LayerState) {
        let (normalised, residual) = self.norm.forward(x, residual);
        let (mixed, state) = self.mixer.forward(normalised, state, resets);
        (mixed, residual, state)
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

    /// Runs the stack; without a state it starts from zero.
    ///
    /// # Shapes
    ///
    /// - x, output: `[B, L, D]`
    /// - resets: `[B, L]`, 1 where a document begins
    pub fn forward(
        &self,
        x: Tensor<3>,
        state: Option<State>,
        resets: Option<Tensor<2>>,
    ) -> (Tensor<3>, State) {
        let before = state.map_or_else(Vec::new, |state| state.layers);
        let (x, residual, layers) = self.forward_from(0, x, before, resets);
        (self.finish(x, residual), State { layers })
    }

    /// Runs the layers from `first` on, from the residual stream `x` before it and their memories
    /// (none: zeros): `(mixer output, residual, memories)`, whose first two add up.
    pub(crate) fn forward_from(
        &self,
        first: usize,
        x: Tensor<3>,
        before: Vec<LayerState>,
        resets: Option<Tensor<2>>,
    ) -> (Tensor<3>, Option<Tensor<3>>, Vec<LayerState>) {
        let layers = &self.layers[first..];
        assert!(
            before.is_empty() || before.len() == layers.len(),
            "Mamba: the state has {} layers and the model {}",
            before.len(),
            layers.len()
        );
        let mut before = before.into_iter();
        let mut after = Vec::with_capacity(layers.len());
        let (mut x, mut residual) = (x, None);
        for layer in layers {
            let (mixed, sum, state) =
                layer.forward_deferred(x, residual, before.next(), resets.clone());
            (x, residual) = (mixed, Some(sum));
            after.push(state);
        }
        (x, residual, after)
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

    /// The last addition, and the final norm.
    pub(crate) fn finish(&self, x: Tensor<3>, residual: Option<Tensor<3>>) -> Tensor<3> {
        match (&self.norm_f, residual) {
            (Some(norm), residual) => norm.forward(x, residual).0,
            (None, Some(residual)) => x + residual,
            (None, None) => x,
        }
    }
}
