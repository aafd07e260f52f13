//! The Mamba language model: three levels, each usable alone.
//!
//! | level | type | maps |
//! | --- | --- | --- |
//! | operation | [`selective_scan`](mambabyte_kernels::selective_scan) | `[B, L, E]` to `[B, L, E]` |
//! | block | [`MambaBlock`], [`ResidualBlock`], the stack [`Mamba`] | `[B, L, D]` to `[B, L, D]` |
//! | language model | [`MambaLm`] | bytes `[B, L]` to logits `[B, L, V]` |
//!
//! Everything carries its [`State`]: a sequence may be cut anywhere and the pieces run one after
//! the other, with the result of the whole.
//!
//! Letters: B batch, L length, D model width, E inner width, N state, R Δ-rank, K conv width,
//! V vocabulary.

mod activation;
mod block;
mod compute;
mod init;
mod linear;
mod lm;
mod mixer;
mod norm;
mod state;
#[cfg(test)]
mod tests;

pub use activation::{ActivatedLinear, Activation};
pub use block::{Mamba, ResidualBlock};
pub use compute::Compute;
pub use linear::{Embedding, Linear};
pub use lm::MambaLm;
pub use mixer::MambaBlock;
pub use norm::Norm;
pub use state::{LayerState, State};
