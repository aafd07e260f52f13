//! Gradients with little memory: layers whose inner values are computed a second time.
//!
//! A forward pass without gradient graph keeps only the residual stream before each of the first k
//! layers. Backward then rebuilds the graph of one layer at a time. Given the gradient `g` of a
//! layer's output `r'`, the scalar `Σ r' · g` has the same gradients as the whole network, so each
//! layer is an ordinary backward pass of its own; the sums are those of the plain backward pass, in
//! the same order, and the results have the same bits.

use burn::module::Module;
use burn::optim::{GradientsAccumulator, GradientsParams};
use burn::tensor::Tensor;

use super::learner::Inputs;
use crate::model::{LayerState, MambaLm, State};

/// As a plain backward pass: `(share of the mean loss, gradients, memory after)`. The first `layers`
/// layers are recomputed.
pub(super) fn gradients(
    model: &MambaLm,
    layers: usize,
    inputs: Inputs,
    state: Option<State>,
    share: f64,
) -> (Tensor<1>, GradientsParams, State) {
    let resets = inputs.resets.clone();
    let inner_resets = resets.clone().map(Tensor::inner);
    let mut before = state.map_or_else(Vec::new, |state| state.layers);
    let rest_before = before.split_off(layers.min(before.len()));
    let (streams, mut after) = {
        let model = model.valid();
        let bytes = inputs.bytes.clone().inner();
        let stream = model.embedding.forward(bytes);
        forward_without_graph(&model, layers, stream, &before, inner_resets)
    };
    let mut streams = streams.into_iter().rev();
    let mut accumulator = GradientsAccumulator::new();

    // What is not recomputed: the remaining layers and the head.
    let stream = leaf(streams.next().expect("one stream more than layers"));
    let lift = |state: LayerState| LayerState {
        h: Tensor::from_inner(state.h),
        window: Tensor::from_inner(state.window),
    };
    let rest_before = rest_before.into_iter().map(lift).collect();
    let (x, residual, rest_after) =
        model
            .backbone
            .forward_from(layers, stream.clone(), rest_before, resets.clone());
    let logits = model.head(model.backbone.finish(x, residual));
    let loss = MambaLm::cross_entropy(logits, inputs.targets.clone())
        .mean()
        .mul_scalar(share);
    let mut gradient = backward(model, &loss, &stream, &mut accumulator);
    after.extend(State { layers: rest_after }.inner().layers);

    for i in (0..layers).rev() {
        let stream = leaf(streams.next().expect("one stream a layer"));
        let state = before.get(i).cloned().map(lift);
        let (mixed, residual, _) =
            model.backbone.layers[i].forward_deferred(stream.clone(), None, state, resets.clone());
        let output = mixed + residual;
        let scalar = (output * Tensor::from_inner(gradient)).sum();
        gradient = backward(model, &scalar, &stream, &mut accumulator);
    }

    let embedded = model.embedding.forward(inputs.bytes);
    let scalar = (embedded * Tensor::from_inner(gradient)).sum();
    let mut grads = scalar.backward();
    accumulator.accumulate(model, GradientsParams::from_module(&mut grads, model));
    (loss.inner(), accumulator.grads(), State { layers: after })
}

/// The residual stream before each of the first `layers` layers and after the last of them, and the
/// layers' memories.
fn forward_without_graph(
    model: &MambaLm,
    layers: usize,
    stream: Tensor<3>,
    before: &[LayerState],
    resets: Option<Tensor<2>>,
) -> (Vec<Tensor<3>>, Vec<LayerState>) {
    let mut streams = vec![stream.clone()];
    let mut after = Vec::with_capacity(layers);
    let mut stream = stream;
    for i in 0..layers {
        let layer = &model.backbone.layers[i];
        let (mixed, residual, state) =
            layer.forward_deferred(stream, None, before.get(i).cloned(), resets.clone());
        stream = mixed + residual;
        streams.push(stream.clone());
        after.push(state);
    }
    (streams, after)
}

/// The start of a graph of its own.
fn leaf(stream: Tensor<3>) -> Tensor<3> {
    Tensor::from_inner(stream).require_grad()
}

/// Adds the gradients of the parameters to `accumulator`; returns that of `stream`.
fn backward(
    model: &MambaLm,
    scalar: &Tensor<1>,
    stream: &Tensor<3>,
    accumulator: &mut GradientsAccumulator<MambaLm>,
) -> Tensor<3> {
    let mut grads = scalar.backward();
    let gradient = stream
        .grad_remove(&mut grads)
        .expect("the scalar depends on the stream");
    accumulator.accumulate(model, GradientsParams::from_module(&mut grads, model));
    gradient
}
