//! Pairs the layer's forward with its backward.

use burn::backend::tensor::FloatTensor;
use burn_autodiff::Autodiff;
use burn_autodiff::checkpoint::base::Checkpointer;
use burn_autodiff::checkpoint::strategy::CheckpointStrategy;
use burn_autodiff::grads::Gradients;
use burn_autodiff::ops::{Backward, Ops, OpsKind};

use super::fused::{Layer, LayerSaved, backward, forward};
use super::{LayerMemory, LayerSettings, LayerTensors};
use crate::MambaKernels;
use crate::backend::from_inner;

/// The stream and the places of [`LayerWeights::into_list`](super::LayerWeights::into_list).
const PARENTS: usize = 14;

#[derive(Debug)]
struct LayerBackward;

impl<B: MambaKernels> Backward<B, PARENTS> for LayerBackward {
    type State = (Layer<FloatTensor<B>>, LayerSaved<FloatTensor<B>>);

    fn backward(
        self,
        ops: Ops<Self::State, PARENTS>,
        grads: &mut Gradients,
        _checkpointer: &mut Checkpointer,
    ) {
        let dout = grads.consume::<B>(&ops.node);
        let (layer, saved) = ops.state;
        let found = backward::<B>(&layer, saved, dout);
        let list = [Some(found.stream)]
            .into_iter()
            .chain(found.weights.into_list());
        for (parent, grad) in ops.parents.iter().zip(list) {
            if let (Some(node), Some(grad)) = (parent, grad) {
                grads.register::<B>(node.id, grad);
            }
        }
    }
}

/// Stream, state and window after the layer.
type Triple<B> = (FloatTensor<B>, FloatTensor<B>, FloatTensor<B>);

/// Runs the forward pass of `B` and records its backward.
pub(crate) fn layer<B: MambaKernels, C: CheckpointStrategy>(
    stream: FloatTensor<Autodiff<B, C>>,
    tensors: LayerTensors<Autodiff<B, C>>,
    settings: LayerSettings,
) -> Triple<Autodiff<B, C>> {
    let (weights, memory) = tensors.split();
    // An absent parameter borrows the stream's place: its gradient is never registered.
    let mut nodes = vec![stream.node()];
    let list = weights.clone().into_list();
    nodes.extend(list.iter().map(|w| w.as_ref().unwrap_or(&stream).node()));
    let nodes: [_; PARENTS] = nodes.try_into().expect("one node a place");
    drop(list);
    let inner = Layer {
        weights: weights.map(|w| w.into_primitive()),
        memory: LayerMemory {
            h: memory.h.map(|t| t.into_primitive()),
            window: memory.window.map(|t| t.into_primitive()),
            resets: memory.resets.map(|t| t.into_primitive()),
            rates: memory.rates.map(|t| t.into_primitive()),
        },
        settings,
    };
    let (out, saved) = forward::<B>(&inner, stream.into_primitive());
    let stream = match LayerBackward.prepare::<C>(nodes).compute_bound().stateful() {
        OpsKind::Tracked(prep) => prep.finish((inner, saved), out.stream),
        OpsKind::UnTracked(prep) => prep.finish(out.stream),
    };
    (
        stream,
        from_inner::<B, C>(out.h),
        from_inner::<B, C>(out.window),
    )
}
