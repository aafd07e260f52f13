//! Pairs the convolution's forward with its hand-written backward.

use burn::backend::tensor::FloatTensor;
use burn_autodiff::Autodiff;
use burn_autodiff::checkpoint::base::Checkpointer;
use burn_autodiff::checkpoint::strategy::CheckpointStrategy;
use burn_autodiff::grads::Gradients;
use burn_autodiff::ops::{Backward, Ops, OpsKind};

use super::ConvInputs;
use crate::MambaKernels;
use crate::backend::{Pair, from_inner};

#[derive(Debug)]
struct ConvBackward;

impl<B: MambaKernels> Backward<B, 3> for ConvBackward {
    type State = ConvInputs<FloatTensor<B>>;

    fn backward(
        self,
        ops: Ops<Self::State, 3>,
        grads: &mut Gradients,
        _checkpointer: &mut Checkpointer,
    ) {
        let dy = grads.consume::<B>(&ops.node);
        let out = B::causal_conv1d_backward(ops.state, dy, None);
        let by_parent = [Some(out.x), Some(out.weight), out.bias];
        for (parent, grad) in ops.parents.iter().zip(by_parent) {
            if let (Some(node), Some(grad)) = (parent, grad) {
                grads.register::<B>(node.id, grad);
            }
        }
    }
}

/// Runs the forward pass of `B` and records its backward; returns `(y, last_window)`.
pub(crate) fn conv<B: MambaKernels, C: CheckpointStrategy>(
    inputs: ConvInputs<FloatTensor<Autodiff<B, C>>>,
) -> Pair<Autodiff<B, C>> {
    // An absent bias borrows the place of the weight: its gradient is never registered.
    let nodes = [
        inputs.x.node(),
        inputs.weight.node(),
        inputs.bias.as_ref().unwrap_or(&inputs.weight).node(),
    ];
    let inner = ConvInputs {
        x: inputs.x.into_primitive(),
        weight: inputs.weight.into_primitive(),
        bias: inputs.bias.map(|t| t.into_primitive()),
        initial_window: inputs.initial_window.map(|t| t.into_primitive()),
        resets: inputs.resets.map(|t| t.into_primitive()),
        silu: inputs.silu,
    };
    match ConvBackward.prepare::<C>(nodes).compute_bound().stateful() {
        OpsKind::Tracked(prep) => {
            let out = B::causal_conv1d(inner.clone());
            (
                prep.finish(inner, out.y),
                from_inner::<B, C>(out.last_window),
            )
        }
        OpsKind::UnTracked(prep) => {
            let out = B::causal_conv1d(inner);
            (prep.finish(out.y), from_inner::<B, C>(out.last_window))
        }
    }
}
