//! Decoding in plain tensor operations and plain choices.

use burn::tensor::activation::{sigmoid, softplus};
use burn::tensor::{Int, Tensor};

use super::{DecodeLayer, DecodeModel, LayerMemory, Start};
use crate::add_norm::NormKind;
use crate::sampling::{Choice, Draw, Lane};

/// Sequences side by side.
#[derive(Debug)]
pub struct Reference {
    model: DecodeModel,
    start: Start,
}

impl Reference {
    /// Takes up sequences where they stand.
    pub fn new(model: &DecodeModel, start: Start) -> Self {
        Self {
            model: model.clone(),
            start,
        }
    }

    /// See [`Decoder::run`](super::Decoder::run).
    pub fn run(&mut self, draws: &[Draw]) -> Vec<Choice> {
        let mut all = Vec::with_capacity(draws.len());
        for draws in draws.chunks(self.start.lanes.len()) {
            let logits = self.logits();
            let rows = logits.chunks(self.model.vocabulary);
            let lanes = self.start.lanes.iter_mut();
            let choose =
                |((lane, row), draw): ((&mut Lane, &[f32]), &Draw)| lane.choose(row, *draw);
            let choices: Vec<Choice> = lanes.zip(rows).zip(draws).map(choose).collect();
            let bytes: Vec<i32> = choices
                .iter()
                .map(|choice| i32::from(choice.byte))
                .collect();
            let device = self.start.logits.device();
            let bytes = Tensor::<1, Int>::from_data(bytes.as_slice(), &device);
            self.start.logits = step(&self.model, bytes, &mut self.start.memory);
            all.extend(choices);
        }
        all
    }

    /// What the next bytes are chosen from, `[B, V]`.
    pub fn logits(&self) -> Vec<f32> {
        self.start.logits.to_data().iter::<f32>().collect()
    }
}

/// Reads a byte of every sequence, `[B]`; returns the logits after it, `[B, V]`.
pub fn step(model: &DecodeModel, bytes: Tensor<1, Int>, memory: &mut [LayerMemory]) -> Tensor<2> {
    let [batch] = bytes.dims();
    let mut stream = model.embedding.clone().select(0, bytes);
    for (layer, memory) in model.layers.iter().zip(memory) {
        stream = layer_step(model, layer, stream, memory);
    }
    if let Some((weight, bias)) = &model.norm_f {
        stream = norm(model, stream, weight, bias.as_ref());
    }
    let head = match &model.head {
        Some(head) => head.clone(),
        None => model.embedding.clone().transpose(),
    };
    stream.matmul(head).slice([0..batch, 0..model.vocabulary])
}

fn layer_step(
    model: &DecodeModel,
    layer: &DecodeLayer,
    stream: Tensor<2>,
    (h, window): &mut LayerMemory,
) -> Tensor<2> {
    let [batch, inner, states] = h.dims();
    let [rank, _] = layer.dt_proj.dims();
    let hat = norm(model, stream.clone(), &layer.norm, layer.norm_bias.as_ref());
    let xz = biased(hat.matmul(layer.in_proj.clone()), layer.in_bias.as_ref());
    let [x, z] = [0, inner].map(|from| xz.clone().slice([0..batch, from..from + inner]));

    let inputs = Tensor::cat(vec![window.clone(), x.reshape([batch, inner, 1])], 2);
    let taps = layer.conv.dims()[1];
    *window = inputs.clone().slice([0..batch, 0..inner, 1..taps]);
    let sum = (inputs * layer.conv.clone().unsqueeze())
        .sum_dim(2)
        .reshape([batch, inner]);
    let sum = biased(sum, layer.conv_bias.as_ref());
    let u = sum.clone() * sigmoid(sum);

    let low = u.clone().matmul(layer.x_proj.clone());
    let part = |from: usize, to: usize| low.clone().slice([0..batch, from..to]);
    let delta = part(0, rank).matmul(layer.dt_proj.clone());
    let delta = softplus(biased(delta, layer.dt_bias.as_ref()), 1.0).reshape([batch, inner, 1]);
    let b = part(rank, rank + states).reshape([batch, 1, states]);
    let c = part(rank + states, rank + 2 * states).reshape([batch, 1, states]);
    let decay = (delta.clone() * layer.rates.clone().unsqueeze()).exp();
    *h = decay * h.clone() + delta * u.clone().reshape([batch, inner, 1]) * b;
    let y = (h.clone() * c).sum_dim(2).reshape([batch, inner]);
    let y = (y + u * layer.d.clone().unsqueeze()) * z.clone() * sigmoid(z);
    stream + biased(y.matmul(layer.out_proj.clone()), layer.out_bias.as_ref())
}

fn biased(x: Tensor<2>, bias: Option<&Tensor<1>>) -> Tensor<2> {
    match bias {
        Some(bias) => x + bias.clone().unsqueeze(),
        None => x,
    }
}

fn norm(
    model: &DecodeModel,
    x: Tensor<2>,
    weight: &Tensor<1>,
    bias: Option<&Tensor<1>>,
) -> Tensor<2> {
    let x = match model.norm {
        NormKind::Layer => x.clone() - x.mean_dim(1),
        NormKind::Rms => x,
    };
    let scale = (x.clone().powi_scalar(2).mean_dim(1) + model.eps).sqrt();
    biased(x / scale * weight.clone().unsqueeze(), bias)
}
