//! Pairs the scan's forward with its hand-written backward.

use burn::backend::tensor::FloatTensor;
use burn_autodiff::Autodiff;
use burn_autodiff::checkpoint::base::Checkpointer;
use burn_autodiff::checkpoint::strategy::CheckpointStrategy;
use burn_autodiff::grads::Gradients;
use burn_autodiff::ops::{Backward, Ops, OpsKind};

use super::{ScanGrads, ScanInputs, ScanRequest};
use crate::MambaKernels;
use crate::backend::{Pair, from_inner};

/// Positions of the tracked inputs among the parents.
const U: usize = 0;
const DELTA: usize = 1;
const A: usize = 2;
const B_: usize = 3;
const C_: usize = 4;
const D: usize = 5;
const Z: usize = 6;
const BIAS: usize = 7;

#[derive(Debug)]
struct ScanBackward;

impl<B: MambaKernels> Backward<B, 8> for ScanBackward {
    /// The inputs and the forward pass's saved states.
    type State = (ScanInputs<FloatTensor<B>>, FloatTensor<B>);

    fn backward(
        self,
        ops: Ops<Self::State, 8>,
        grads: &mut Gradients,
        _checkpointer: &mut Checkpointer,
    ) {
        let dy = grads.consume::<B>(&ops.node);
        let (inputs, saved) = ops.state;
        let ScanGrads {
            u,
            delta,
            a,
            b,
            c,
            d,
            z,
            delta_bias,
            y: _,
        } = B::selective_scan_backward(inputs, saved, dy, ScanRequest::none());
        let mut by_parent = [const { None }; 8];
        by_parent[U] = Some(u);
        by_parent[DELTA] = Some(delta);
        by_parent[A] = Some(a);
        by_parent[B_] = Some(b);
        by_parent[C_] = Some(c);
        by_parent[D] = d;
        by_parent[Z] = z;
        by_parent[BIAS] = delta_bias;
        for (parent, grad) in ops.parents.iter().zip(by_parent) {
            if let (Some(node), Some(grad)) = (parent, grad) {
                grads.register::<B>(node.id, grad);
            }
        }
    }
}

/// Runs the forward pass of `B` and records its backward; returns `(y, last_state)`.
pub(crate) fn scan<B: MambaKernels, C: CheckpointStrategy>(
    inputs: ScanInputs<FloatTensor<Autodiff<B, C>>>,
) -> Pair<Autodiff<B, C>> {
    // An absent optional input borrows the place of `a`: its gradient is never registered.
    let node_or = |t: &Option<FloatTensor<Autodiff<B, C>>>| t.as_ref().unwrap_or(&inputs.a).node();
    let nodes = [
        inputs.u.node(),
        inputs.delta.node(),
        inputs.a.node(),
        inputs.b.node(),
        inputs.c.node(),
        node_or(&inputs.d),
        node_or(&inputs.z),
        node_or(&inputs.delta_bias),
    ];
    let inner = ScanInputs {
        u: inputs.u.into_primitive(),
        delta: inputs.delta.into_primitive(),
        a: inputs.a.into_primitive(),
        b: inputs.b.into_primitive(),
        c: inputs.c.into_primitive(),
        d: inputs.d.map(|t| t.into_primitive()),
        z: inputs.z.map(|t| t.into_primitive()),
        delta_bias: inputs.delta_bias.map(|t| t.into_primitive()),
        initial_state: inputs.initial_state.map(|t| t.into_primitive()),
        resets: inputs.resets.map(|t| t.into_primitive()),
        delta_softplus: inputs.delta_softplus,
    };
    match ScanBackward.prepare::<C>(nodes).compute_bound().stateful() {
        OpsKind::Tracked(prep) => {
            let out = B::selective_scan(inner.clone());
            let y = prep.finish((inner, out.saved), out.y);
            (y, from_inner::<B, C>(out.last_state))
        }
        OpsKind::UnTracked(prep) => {
            let out = B::selective_scan(inner);
            (prep.finish(out.y), from_inner::<B, C>(out.last_state))
        }
    }
}
