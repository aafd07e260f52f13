//! Pairs the embedding's forward with its hand-written backward.

use burn::backend::TensorMetadata;
use burn::backend::tensor::{FloatTensor, IntTensor};
use burn_autodiff::Autodiff;
use burn_autodiff::checkpoint::base::Checkpointer;
use burn_autodiff::checkpoint::strategy::CheckpointStrategy;
use burn_autodiff::grads::Gradients;
use burn_autodiff::ops::{Backward, Ops, OpsKind, unary};

use crate::MambaKernels;

#[derive(Debug)]
struct EmbeddingBackward;

impl<B: MambaKernels> Backward<B, 1> for EmbeddingBackward {
    /// Bytes, and the number of rows V.
    type State = (IntTensor<B>, usize);

    fn backward(
        self,
        ops: Ops<Self::State, 1>,
        grads: &mut Gradients,
        _checkpointer: &mut Checkpointer,
    ) {
        let (bytes, rows) = ops.state;
        unary::<B, _>(ops.parents, ops.node, grads, |dy| {
            B::byte_embedding_backward(bytes, dy, rows)
        });
    }
}

/// Runs the forward pass of `B` and records its backward; returns the rows of all bytes.
pub(crate) fn embedding<B: MambaKernels, C: CheckpointStrategy>(
    weight: FloatTensor<Autodiff<B, C>>,
    bytes: IntTensor<Autodiff<B, C>>,
) -> FloatTensor<Autodiff<B, C>> {
    let node = weight.node();
    let weight = weight.into_primitive();
    let rows = weight.shape()[0];
    let y = B::byte_embedding(weight, bytes.clone());
    match EmbeddingBackward
        .prepare::<C>([node])
        .compute_bound()
        .stateful()
    {
        OpsKind::Tracked(prep) => prep.finish((bytes, rows), y),
        OpsKind::UnTracked(prep) => prep.finish(y),
    }
}
