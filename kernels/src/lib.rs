//! Mamba-1 operations for [Burn](https://burn.dev): what a byte-level state-space model needs and
//! a tensor library does not have.
//!
//! | operation | what it computes |
//! | --- | --- |
//! | [`selective_scan`] | the state-space recurrence of Mamba (arXiv 2312.00752, Algorithm 2) |
//! | [`causal_conv1d`] | depthwise causal convolution, with bias and SiLU |
//! | [`add_norm`] | residual addition followed by RMSNorm or LayerNorm |
//! | [`norm`] | normalisation in pieces, for operations that fuse a whole layer |
//! | [`embedding`] | one row of a table for every byte |
//! | [`cross_entropy`] | softmax cross-entropy, one loss a row |
//! | [`linear`] | matrix products of reduced precision and their gradients |
//! | [`mamba_layer`] | a residual Mamba layer, norm to addition, in one operation |
//! | [`adamw`] | one AdamW update of the parameters, their moments in f32 or in 8 bits |
//! | [`sum_squares`] | sum of the squares of many tensors, for the norm of a gradient |
//! | [`decode`] | a whole language model, one byte at a time |
//! | [`sampling`] | the choice of a byte from its logits |
//! | [`pscan`] | first-order linear recurrence by a parallel (Blelloch) scan, in tensor operations |
//!
//! Every operation is one folder: `mod.rs` has the contract and the shape checks, `reference.rs`
//! the obvious form in plain tensor operations (differentiable, slow, the oracle of all tests),
//! `flex.rs` the CPU form, `cube.rs` the GPU form, `autodiff.rs` the gradient, `tests.rs` the
//! promises.
//!
//! # Letters
//!
//! | letter | meaning |
//! | --- | --- |
//! | B | batch: sequences |
//! | L | length: positions of a sequence |
//! | D | model width |
//! | E | inner width (channels of the scan), `expand_factor · D` |
//! | N | state: numbers a channel |
//! | R | rank of the step-size (Δ) projection |
//! | K | width of the convolution |
//! | V | vocabulary |
//!
//! All activations are channel-last: `[B, L, E]`.

pub mod adamw;
pub mod add_norm;
pub mod backend;
mod backends;
pub mod causal_conv1d;
pub mod cross_entropy;
#[cfg(feature = "cube")]
mod cube;
pub mod decode;
pub mod embedding;
#[cfg(feature = "flex")]
mod flex;
pub mod linear;
pub mod mamba_layer;
pub mod norm;
pub mod pscan;
pub mod sampling;
pub mod selective_scan;
pub mod sum_squares;

pub use backend::MambaKernels;
#[cfg(feature = "cube")]
pub use cube::timing::kernel_times;

#[cfg(test)]
mod testing;
