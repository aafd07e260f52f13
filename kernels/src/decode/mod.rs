//! One byte after the other: a whole language model at a time, for weights that no longer change.
//!
//! What a [`Decoder`] computes for every sequence and byte:
//!
//! ```text
//! byte    = choose(logits)                       see sampling
//! r       = embedding[byte]
//! every layer (arXiv 2312.00752, section 3.4, at one position):
//!   x, z    = split(in_proj(norm(r)))
//!   u       = silu(conv(window, x));  window ← its last K-1 inputs and x
//!   Δ, B, C = split(x_proj(u));       Δ = softplus(dt_proj(Δ))
//!   h       ← exp(Δ · rates) · h + Δ · u · B
//!   r       ← r + out_proj((h · C + d · u) · silu(z))
//! logits  = head(norm_f(r))
//! ```
//!
//! Weights of products are read once a byte in the data type they were given; everything else is f32.
//! Memory and time a byte do not depend on how many bytes there were.

#[cfg(feature = "cube")]
pub(crate) mod cube;
#[cfg(feature = "flex")]
pub(crate) mod flex;
pub mod reference;
#[cfg(test)]
mod tests;

use burn::backend::DispatchTensorKind;
use burn::tensor::{DType, Tensor};

use crate::add_norm::NormKind;
use crate::sampling::{Choice, Draw, Lane};

/// Parameters of one residual layer; the letters are the crate's.
#[derive(Clone, Debug)]
pub struct DecodeLayer {
    /// `[D]`.
    pub norm: Tensor<1>,
    /// `[D]`.
    pub norm_bias: Option<Tensor<1>>,
    /// `[D, 2E]`.
    pub in_proj: Tensor<2>,
    /// `[2E]`.
    pub in_bias: Option<Tensor<1>>,
    /// `[E, K]`.
    pub conv: Tensor<2>,
    /// `[E]`.
    pub conv_bias: Option<Tensor<1>>,
    /// `[E, R + 2N]`.
    pub x_proj: Tensor<2>,
    /// `[R, E]`.
    pub dt_proj: Tensor<2>,
    /// `[E]`.
    pub dt_bias: Option<Tensor<1>>,
    /// `[E, N]`: `-exp(a_log)`.
    pub rates: Tensor<2>,
    /// `[E]`.
    pub d: Tensor<1>,
    /// `[E, D]`.
    pub out_proj: Tensor<2>,
    /// `[D]`.
    pub out_bias: Option<Tensor<1>>,
}

/// Parameters of a language model.
#[derive(Clone, Debug)]
pub struct DecodeModel {
    /// `[rows, D]`.
    pub embedding: Tensor<2>,
    /// First to last; at least one, all of the same shapes.
    pub layers: Vec<DecodeLayer>,
    /// Weight and bias of the last norm, `[D]`.
    pub norm_f: Option<(Tensor<1>, Option<Tensor<1>>)>,
    /// `[D, rows]`; the embedding serves where there is none.
    pub head: Option<Tensor<2>>,
    /// V: the rows of the head beyond it only pad it.
    pub vocabulary: usize,
    /// What the norms are.
    pub norm: NormKind,
    /// What they add under the root.
    pub eps: f32,
}

/// Memory of one layer: h `[B, E, N]`, and the convolution's last inputs `[B, E, K-1]`.
pub type LayerMemory = (Tensor<3>, Tensor<3>);

/// Where sequences stand when decoding begins.
#[derive(Clone, Debug)]
pub struct Start {
    /// What the first bytes are chosen from, `[B, V]`.
    pub logits: Tensor<2>,
    /// One for each layer.
    pub memory: Vec<LayerMemory>,
    /// One for each sequence.
    pub lanes: Vec<Lane>,
}

/// Sequences side by side on one device.
#[derive(Debug)]
pub enum Decoder {
    /// On the CPU.
    #[cfg(feature = "flex")]
    Flex(Box<flex::Decoder>),
    /// On a GPU.
    #[cfg(feature = "cube")]
    Cube(Box<cube::Decoder>),
}

impl Decoder {
    /// Makes the weights ready, those of products in `dtype`; `None` where there are no kernels for
    /// the device or the shapes.
    #[cfg_attr(
        not(feature = "cube"),
        expect(unused_variables, reason = "the CPU computes in fp32")
    )]
    pub fn new(model: &DecodeModel, dtype: DType) -> Option<Self> {
        match model.embedding.clone().into_dispatch().kind {
            #[cfg(feature = "flex")]
            DispatchTensorKind::Flex(_) => Some(Self::Flex(Box::new(flex::Decoder::new(model)))),
            #[cfg(feature = "cube")]
            DispatchTensorKind::Cube(_) => {
                let decoder = cube::Decoder::new(model, dtype)?;
                Some(Self::Cube(Box::new(decoder)))
            }
            #[allow(unreachable_patterns)] // Without other backends.
            _ => None,
        }
    }

    /// Takes up sequences where they stand; whatever was at work or queued before is dropped.
    pub fn begin(&mut self, start: Start) {
        match self {
            #[cfg(feature = "flex")]
            Self::Flex(decoder) => decoder.begin(start),
            #[cfg(feature = "cube")]
            Self::Cube(decoder) => decoder.begin(start),
        }
    }

    /// Chooses and reads `draws.len() / B` bytes of every sequence. Draws and choices are in the
    /// order `[steps, B]`.
    ///
    /// # Panics
    ///
    /// Before [`begin`](Self::begin).
    pub fn run(&mut self, draws: &[Draw]) -> Vec<Choice> {
        self.queue(draws);
        self.take()
    }

    /// Has a piece worked on, as [`run`](Self::run) does, without waiting for it: a GPU goes on to it from
    /// the one before without a pause. The CPU begins when it is taken.
    ///
    /// # Panics
    ///
    /// Before [`begin`](Self::begin).
    pub fn queue(&mut self, draws: &[Draw]) {
        match self {
            #[cfg(feature = "flex")]
            Self::Flex(decoder) => decoder.queue(draws),
            #[cfg(feature = "cube")]
            Self::Cube(decoder) => decoder.queue(draws),
        }
    }

    /// What was chosen in the piece that was queued first of those not taken yet.
    ///
    /// # Panics
    ///
    /// If there is none.
    pub fn take(&mut self) -> Vec<Choice> {
        match self {
            #[cfg(feature = "flex")]
            Self::Flex(decoder) => decoder.take(),
            #[cfg(feature = "cube")]
            Self::Cube(decoder) => decoder.take(),
        }
    }

    /// What the bytes behind all pieces are chosen from, `[B, V]`.
    pub fn logits(&self) -> Vec<f32> {
        match self {
            #[cfg(feature = "flex")]
            Self::Flex(decoder) => decoder.logits(),
            #[cfg(feature = "cube")]
            Self::Cube(decoder) => decoder.logits(),
        }
    }

    /// One line on how bytes are decoded.
    pub fn describe(&self) -> &'static str {
        match self {
            #[cfg(feature = "flex")]
            Self::Flex(_) => "CPU kernels",
            #[cfg(feature = "cube")]
            Self::Cube(decoder) => decoder.describe(),
        }
    }
}
