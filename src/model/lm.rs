//! The language model over bytes.

use burn::module::{Module, Param};
use burn::tensor::{DType, Device, Int, Tensor};
use mambabyte_kernels::cross_entropy::cross_entropy;
use mambabyte_kernels::decode::DecodeModel;

use super::block::{Mamba, ResidualBlock};
use super::compute::Compute;
use super::init::Init;
use super::linear::{Embedding, Linear};
use super::state::State;
use crate::config::MambaConfig;

/// Embedding, stack, head: `logits = head(norm(blocks(embedding(bytes))))`.
#[derive(Module, Debug)]
pub struct MambaLm {
    /// `[V, D]`.
    pub embedding: Embedding,
    /// The blocks and the final norm.
    pub backbone: Mamba,
    /// `[D, V]`; without one the embedding's weight serves as the head.
    pub lm_head: Option<Linear>,
    #[module(skip)]
    vocabulary: usize,
}

impl MambaConfig {
    /// A language model, initialised from `seed`: the same weights on every device.
    pub fn init_lm(&self, seed: u64, device: &Device) -> MambaLm {
        self.lm(&mut Init::new(seed, device))
    }

    /// A language model whose weights are still to be loaded: until then its parameters take no
    /// memory.
    pub(crate) fn empty_lm(&self, device: &Device) -> MambaLm {
        self.lm(&mut Init::empty(device))
    }

    fn lm(&self, init: &mut Init) -> MambaLm {
        let rows = self.padded_vocab();
        MambaLm {
            embedding: Embedding::new(init, [rows, self.dim], self.initializer_range),
            backbone: Mamba::with_init(init, self),
            lm_head: (!self.tie_embeddings)
                .then(|| Linear::new(init, [self.dim, rows], false, 1.0)),
            vocabulary: self.vocab_size,
        }
    }
}

impl MambaLm {
    /// Logits of the byte after each position, and the memory after the last.
    ///
    /// # Shapes
    ///
    /// - bytes: `[B, L]`
    /// - resets: `[B, L]`, 1 where a document begins
    /// - logits: `[B, L, V]`
    pub fn forward(
        &self,
        bytes: Tensor<2, Int>,
        state: Option<State>,
        resets: Option<Tensor<2>>,
    ) -> (Tensor<3>, State) {
        let (x, state) = self
            .backbone
            .forward(self.embedding.forward(bytes), state, resets);
        (self.head(x), state)
    }

    /// Logits of the last `count` positions alone: a prompt needs only the one after its end.
    ///
    /// # Shapes
    ///
    /// - bytes: `[B, L]`
    /// - logits: `[B, count, V]`
    pub fn forward_last(
        &self,
        bytes: Tensor<2, Int>,
        state: Option<State>,
        count: usize,
    ) -> (Tensor<3>, State) {
        let stream = self.embedding.forward(bytes);
        let [batch, length, width] = stream.dims();
        let (stream, state) = self.backbone.forward_stream(stream, state, None);
        let from = length.saturating_sub(count);
        let last = stream.slice([0..batch, from..length, 0..width]);
        (self.head(self.backbone.finish(last)), state)
    }

    /// Logits after one more byte of every sequence, and the new memory.
    ///
    /// # Shapes
    ///
    /// - bytes: `[B]`
    /// - logits: `[B, V]`
    pub fn step(&self, bytes: Tensor<1, Int>, state: State) -> (Tensor<2>, State) {
        let [batch] = bytes.dims();
        let (logits, state) = self.forward(bytes.reshape([batch, 1]), Some(state), None);
        let [_, _, vocabulary] = logits.dims();
        (logits.reshape([batch, vocabulary]), state)
    }

    /// The model with everything precomputed that follows from the weights alone: for weights that
    /// no longer change, as in generation.
    pub fn frozen(mut self) -> Self {
        for layer in &mut self.backbone.layers {
            layer.mixer = layer.mixer.clone().frozen();
        }
        self
    }

    /// The model, computing in the given format.
    pub fn with_compute(mut self, compute: Compute) -> Self {
        self.embedding.compute = compute;
        if let Some(head) = &mut self.lm_head {
            head.compute = compute;
        }
        self.backbone = self.backbone.with_compute(compute);
        self
    }

    /// The parameters for decoding byte by byte; `None` where the blocks are not those of the
    /// kernels, but the oracles of tests.
    pub fn decode_model(&self) -> Option<DecodeModel> {
        let bias = |bias: &Option<Param<Tensor<1>>>| bias.as_ref().map(Param::val);
        let norm = match &self.backbone.norm_f {
            Some(norm) => norm,
            None => &self.backbone.layers.first()?.norm,
        };
        Some(DecodeModel {
            embedding: self.embedding.weight.val(),
            layers: self
                .backbone
                .layers
                .iter()
                .map(ResidualBlock::decode_layer)
                .collect::<Option<Vec<_>>>()?,
            norm_f: self
                .backbone
                .norm_f
                .as_ref()
                .map(|norm| (norm.weight.val(), bias(&norm.bias))),
            head: self.lm_head.as_ref().map(|head| head.weight.val()),
            vocabulary: self.vocabulary,
            norm: norm.kind,
            eps: norm.eps,
        })
    }

    /// The model with the weights of its blocks' products and of a head of its own in `dtype`: what
    /// products would round anyway is then rounded once. No longer for training.
    pub fn with_rounded_weights(mut self, dtype: DType) -> Self {
        let round = |linear: &mut Linear| {
            let weight = linear.weight.val().cast(dtype);
            linear.weight = Param::from_tensor(weight);
        };
        for layer in &mut self.backbone.layers {
            let mixer = &mut layer.mixer;
            let products = [
                &mut mixer.in_proj,
                &mut mixer.x_proj,
                &mut mixer.dt_proj,
                &mut mixer.out_proj,
            ];
            products.into_iter().for_each(round);
        }
        self.lm_head.iter_mut().for_each(round);
        self
    }

    /// See [`Mamba::with_recompute`].
    pub fn with_recompute(mut self, layers: usize) -> Self {
        self.backbone = self.backbone.with_recompute(layers);
        self
    }

    /// Mean and largest step size Δ of every layer on `bytes`, each a tensor of one element.
    ///
    /// # Shapes
    ///
    /// - bytes: `[B, L]`
    pub(crate) fn step_sizes(&self, bytes: Tensor<2, Int>) -> Vec<(Tensor<1>, Tensor<1>)> {
        let mut stream = self.embedding.forward(bytes);
        let mut sizes = Vec::with_capacity(self.backbone.layers.len());
        for layer in &self.backbone.layers {
            let delta = layer.mixer.step_sizes(layer.norm.forward(stream.clone()));
            sizes.push((delta.clone().mean(), delta.max()));
            (stream, _) = layer.forward(stream, None, None);
        }
        sizes
    }

    /// Loss of every position in nats, and the memory after the last.
    ///
    /// # Shapes
    ///
    /// - bytes, targets: `[B, L]`
    /// - losses: `[B · L]`
    pub fn losses(
        &self,
        bytes: Tensor<2, Int>,
        targets: Tensor<2, Int>,
        state: Option<State>,
        resets: Option<Tensor<2>>,
    ) -> (Tensor<1>, State) {
        let (logits, state) = self.forward(bytes, state, resets);
        (Self::cross_entropy(logits, targets), state)
    }

    /// Loss of every position from the residual stream behind the last block.
    ///
    /// # Shapes
    ///
    /// - stream: `[B, L, D]`
    /// - targets: `[B, L]`
    /// - losses: `[B · L]`
    pub(crate) fn losses_behind(&self, stream: Tensor<3>, targets: Tensor<2, Int>) -> Tensor<1> {
        Self::cross_entropy(self.head(self.backbone.finish(stream)), targets)
    }

    /// Logits from the stack's output.
    fn head(&self, x: Tensor<3>) -> Tensor<3> {
        let logits = match &self.lm_head {
            Some(head) => head.forward(x),
            None => self.embedding.attend(x),
        };
        // Rows that pad the vocabulary are not bytes: nothing may be predicted there.
        let [batch, length, rows] = logits.dims();
        if rows == self.vocabulary {
            logits
        } else {
            logits.slice([0..batch, 0..length, 0..self.vocabulary])
        }
    }

    /// Loss of every position, `[B · L]`, of `logits` `[B, L, V]`.
    fn cross_entropy(logits: Tensor<3>, targets: Tensor<2, Int>) -> Tensor<1> {
        let [batch, length, vocabulary] = logits.dims();
        cross_entropy(
            logits.reshape([batch * length, vocabulary]),
            targets.reshape([batch * length]),
        )
    }
}
