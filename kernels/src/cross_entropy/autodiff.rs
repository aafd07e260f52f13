//! Pairs the cross-entropy's forward with its hand-written backward.

use burn::backend::TensorMetadata;
use burn::backend::tensor::{FloatTensor, IntTensor};
use burn_autodiff::Autodiff;
use burn_autodiff::checkpoint::base::Checkpointer;
use burn_autodiff::checkpoint::strategy::CheckpointStrategy;
use burn_autodiff::grads::Gradients;
use burn_autodiff::ops::{Backward, Ops, OpsKind, unary};

use crate::MambaKernels;

#[derive(Debug)]
struct CrossEntropyBackward;

impl<B: MambaKernels> Backward<B, 1> for CrossEntropyBackward {
    /// Logits, targets, log-sum-exp.
    type State = (FloatTensor<B>, IntTensor<B>, FloatTensor<B>);

    fn backward(
        self,
        ops: Ops<Self::State, 1>,
        grads: &mut Gradients,
        _checkpointer: &mut Checkpointer,
    ) {
        let (logits, targets, log_sum_exp) = ops.state;
        let dtype = logits.dtype();
        unary::<B, _>(ops.parents, ops.node, grads, |dloss| {
            B::cross_entropy_backward(logits, targets, log_sum_exp, dloss, dtype)
        });
    }
}

/// Runs the forward pass of `B` and records its backward; returns the loss of every row.
pub(crate) fn cross_entropy<B: MambaKernels, C: CheckpointStrategy>(
    logits: FloatTensor<Autodiff<B, C>>,
    targets: IntTensor<Autodiff<B, C>>,
) -> FloatTensor<Autodiff<B, C>> {
    let node = logits.node();
    let logits = logits.into_primitive();
    let (losses, log_sum_exp) = B::cross_entropy(logits.clone(), targets.clone());
    match CrossEntropyBackward
        .prepare::<C>([node])
        .compute_bound()
        .stateful()
    {
        OpsKind::Tracked(prep) => prep.finish((logits, targets, log_sum_exp), losses),
        OpsKind::UnTracked(prep) => prep.finish(losses),
    }
}
