//! Gradients with little memory, for very long sequences: layers in groups, of which one at a time
//! has its graph.
//!
//! Kept from the forward pass is the residual stream (`[B, L, D]`, f32) before every group of
//! `train.checkpoint_every` layers, and nothing of what is inside a layer. The last group has its
//! graph from the start, with the head behind it; backward then takes the groups before it, last to
//! first: each is run again from its stream, now with its graph, and its backward pass follows.
//! Inside, every layer's own `recompute` holds.
//!
//! ```text
//! streams kept     depth / n                   n layers a group
//! inside layers    those of n layers           instead of all
//! gradients        those of n layers           besides the sum over micro-batches
//! time             one more forward pass       of all groups but the last
//! ```
//!
//! Given the gradient g of a group's output r, the gradients of `Σ r · g` with respect to all that r
//! was made of are those of the loss, and 1 · g is g to the bit. So every group is an ordinary
//! backward pass of its own, its sums are those of the plain one in the same order, and the results
//! have the same bits.

use std::ops::Range;

use burn::module::Module;
use burn::optim::{GradientsAccumulator, GradientsParams};
use burn::tensor::{Gradients, Tensor};

use super::learner::{Inputs, mean};
use super::sum::GradientSum;
use super::telemetry::{Phase, Phases};
use crate::model::{LayerState, MambaLm, State};

/// Adds the gradients of one micro-batch to `sum`; returns its share of the mean loss, and the
/// memory after it. There are `every` layers in a group, fewer in the last one.
pub(super) fn gradients(
    model: &MambaLm,
    every: usize,
    inputs: Inputs,
    before: Option<State>,
    share: f64,
    sum: &mut GradientSum,
    phases: &mut Phases,
) -> (Tensor<1>, State) {
    let groups = Groups {
        model,
        ranges: groups(model.backbone.layers.len(), every),
        before: before.map_or_else(Vec::new, |state| state.layers),
        resets: inputs.resets.clone(),
    };
    let (mut streams, mut after) = groups.forward(&inputs);
    // Of embedding and head: where the two share their weight, both parts of its gradient come
    // together before they are added to those of earlier micro-batches, as without groups.
    let mut ends = GradientsAccumulator::new();

    let last = groups.ranges.len() - 1;
    let stream = leaf(streams.pop().expect("a stream for every group"));
    let (out, last_after) = groups.run(last, stream.clone());
    let loss = mean(model.losses_behind(out, inputs.targets.clone())).mul_scalar(share);
    phases.end(Phase::Forward);
    let mut grads = loss.backward();
    let mut gradient = add_layers(model, &mut grads, &stream, sum);
    ends.accumulate(model, GradientsParams::from_module(&mut grads, model));
    after.extend(State { layers: last_after }.inner().layers);

    for (group, stream) in streams.into_iter().enumerate().rev() {
        let stream = leaf(stream);
        let (out, _) = groups.run(group, stream.clone());
        let mut grads = sums(out * Tensor::from_inner(gradient)).backward();
        gradient = add_layers(model, &mut grads, &stream, sum);
    }

    let embedded = model.embedding.forward(inputs.bytes);
    let mut grads = sums(embedded * Tensor::from_inner(gradient)).backward();
    ends.accumulate(model, GradientsParams::from_module(&mut grads, model));
    sum.add(model, ends.grads());
    phases.end(Phase::Backward);
    (loss.inner(), State { layers: after })
}

/// The layers of each group.
fn groups(depth: usize, every: usize) -> Vec<Range<usize>> {
    let starts = (0..depth).step_by(every);
    starts
        .map(|start| start..depth.min(start + every))
        .collect()
}

/// The layers in groups, and what they are given besides the stream.
struct Groups<'a> {
    model: &'a MambaLm,
    ranges: Vec<Range<usize>>,
    /// Memories before the micro-batch: one for each layer, or none.
    before: Vec<LayerState>,
    resets: Option<Tensor<2>>,
}

impl Groups<'_> {
    /// The stream before every group, without a graph, and the memories after all but the last.
    fn forward(&self, inputs: &Inputs) -> (Vec<Tensor<3>>, Vec<LayerState>) {
        let model = self.model.valid();
        let resets = self.resets.clone().map(Tensor::inner);
        let mut streams = vec![model.embedding.forward(inputs.bytes.clone().inner())];
        let mut after = Vec::with_capacity(self.model.backbone.layers.len());
        for group in 0..self.ranges.len() - 1 {
            let (stream, states) = model.backbone.forward_layers(
                self.ranges[group].clone(),
                streams[group].clone(),
                self.memories(group),
                resets.clone(),
            );
            streams.push(stream);
            after.extend(states);
        }
        (streams, after)
    }

    /// One group with its graph.
    fn run(&self, group: usize, stream: Tensor<3>) -> (Tensor<3>, Vec<LayerState>) {
        let before = State {
            layers: self.memories(group),
        };
        self.model.backbone.forward_layers(
            self.ranges[group].clone(),
            stream,
            before.lift().layers,
            self.resets.clone(),
        )
    }

    /// The memories before a group's layers.
    fn memories(&self, group: usize) -> Vec<LayerState> {
        let of_group = self.before.get(self.ranges[group].clone());
        of_group.map_or_else(Vec::new, <[LayerState]>::to_vec)
    }
}

/// The start of a graph of its own.
fn leaf(stream: Tensor<3>) -> Tensor<3> {
    Tensor::from_inner(stream).require_grad()
}

/// The sum of every row, from which a backward pass starts as it does from the sum of all: with ones.
/// The product itself would stay in memory through that pass, and one sum would keep one plane of a
/// GPU busy.
fn sums(product: Tensor<3>) -> Tensor<3> {
    product.sum_dim(2)
}

/// Moves the gradients of layers and final norm to `sum`; returns that of `stream`.
fn add_layers(
    model: &MambaLm,
    grads: &mut Gradients,
    stream: &Tensor<3>,
    sum: &mut GradientSum,
) -> Tensor<3> {
    let of_layers = GradientsParams::from_module(grads, &model.backbone);
    sum.add(model, of_layers);
    stream
        .grad_remove(grads)
        .expect("what is behind depends on the stream")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_cover_all_layers_once() {
        assert_eq!(groups(5, 2), [0..2, 2..4, 4..5]);
        assert_eq!(groups(4, 2), [0..2, 2..4]);
        for every in [4, 9] {
            assert_eq!(groups(4, every), std::slice::from_ref(&(0..4)));
        }
    }
}
