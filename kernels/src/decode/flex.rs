//! Decoding on the CPU, bound by reading the weights: every product goes through its matrix once,
//! a few rows and some columns at a time, for all sequences.
//!
//! The weights are those of the model, where they are; nothing is copied. A result does not depend
//! on the number of threads, nor a sequence's on the sequences beside it.

use std::collections::VecDeque;

use burn::backend::DispatchTensorKind;
use burn::tensor::Tensor;
use burn_flex::FlexTensor;
use multiversion::multiversion;
use rayon::prelude::*;

use super::{DecodeLayer, DecodeModel, Start};
use crate::add_norm::NormKind;
use crate::add_norm::flex::row_sum;
use crate::flex::math::{exp, sigmoid, softplus};
use crate::flex::tensor::{contiguous, dims, values};
use crate::flex::{LANES, fma, load, map, mul, sum};
use crate::sampling::{Choice, Draw, Lane};

/// Rows of a matrix that are added at once.
const ROWS: usize = 4;
/// Parts that the columns of a matrix are divided into, and the most columns of a part.
const PARTS: usize = 4;
const COLUMNS: usize = 1024;
/// Channels of a task.
const CHANNELS: usize = 128;

/// See [`super::Decoder`].
#[derive(Debug)]
pub struct Decoder {
    embedding: FlexTensor,
    layers: Vec<Layer>,
    norm_f: Option<[FlexTensor; 2]>,
    head: Option<FlexTensor>,
    vocabulary: usize,
    norm: NormKind,
    eps: f32,
    lanes: Vec<Lane>,
    /// `[B, V]`.
    logits: Vec<f32>,
    /// Draws of the pieces to come.
    queued: VecDeque<Vec<Draw>>,
}

/// A layer's parameters, absent biases as zeros, and its memory.
#[derive(Debug)]
struct Layer {
    /// Weight and bias.
    norm: [FlexTensor; 2],
    in_proj: FlexTensor,
    in_bias: FlexTensor,
    conv: FlexTensor,
    conv_bias: FlexTensor,
    x_proj: FlexTensor,
    dt_proj: FlexTensor,
    dt_bias: FlexTensor,
    rates: FlexTensor,
    d: FlexTensor,
    out_proj: FlexTensor,
    out_bias: FlexTensor,
    /// `[B, E, N]`.
    h: Vec<f32>,
    /// `[B, E, K-1]`.
    window: Vec<f32>,
}

/// The raw tensor of a tensor on the CPU, contiguous f32.
fn raw<const D: usize>(tensor: &Tensor<D>) -> FlexTensor {
    match tensor.clone().into_dispatch().kind {
        DispatchTensorKind::Flex(tensor) => contiguous(tensor.float()),
        other => panic!("decode: a tensor of another backend: {other:?}"),
    }
}

fn or_zero(bias: &Option<Tensor<1>>, size: usize, like: &Tensor<1>) -> FlexTensor {
    match bias {
        Some(bias) => raw(bias),
        None => raw(&Tensor::<1>::zeros([size], &like.device())),
    }
}

impl Layer {
    fn new(layer: &DecodeLayer) -> Self {
        let [width, both] = layer.in_proj.dims();
        let zero = |bias, size| or_zero(bias, size, &layer.d);
        Self {
            norm: [raw(&layer.norm), zero(&layer.norm_bias, width)],
            in_proj: raw(&layer.in_proj),
            in_bias: zero(&layer.in_bias, both),
            conv: raw(&layer.conv),
            conv_bias: zero(&layer.conv_bias, both / 2),
            x_proj: raw(&layer.x_proj),
            dt_proj: raw(&layer.dt_proj),
            dt_bias: zero(&layer.dt_bias, both / 2),
            rates: raw(&layer.rates),
            d: raw(&layer.d),
            out_proj: raw(&layer.out_proj),
            out_bias: zero(&layer.out_bias, width),
            h: Vec::new(),
            window: Vec::new(),
        }
    }

    /// One step: adds to the stream `[B, D]`.
    fn step(&mut self, stream: &mut [f32], batch: usize, norm: NormKind, eps: f32) {
        let [inner, states] = dims(&self.rates);
        let [_, taps] = dims(&self.conv);
        let [rank, _] = dims(&self.dt_proj);
        let hat = normalise(stream, &self.norm, norm, eps);
        let xz = product(&hat, batch, &self.in_proj, values(&self.in_bias));
        let mut u = vec![0.0; batch * inner];
        let (weight, bias) = (values(&self.conv), values(&self.conv_bias));
        let past = inner * (taps - 1);
        for b in 0..batch {
            let x = &xz[2 * b * inner..][..inner];
            let window = &mut self.window[b * past..][..past];
            conv_step(&mut u[b * inner..][..inner], x, window, weight, bias, taps);
        }
        let low = product(&u, batch, &self.x_proj, &[]);
        let width = rank + 2 * states;
        let ranks: Vec<f32> = low
            .chunks_exact(width)
            .flat_map(|low| &low[..rank])
            .copied()
            .collect();
        let delta = product(&ranks, batch, &self.dt_proj, values(&self.dt_bias));
        let mut y = vec![0.0; batch * inner];
        let blocks = inner.div_ceil(CHANNELS);
        let (rates, d) = (values(&self.rates), values(&self.d));
        let tasks: Vec<_> = y
            .chunks_mut(inner)
            .zip(self.h.chunks_mut(inner * states))
            .enumerate()
            .flat_map(|(b, (y, h))| {
                let pieces = y.chunks_mut(CHANNELS).zip(h.chunks_mut(CHANNELS * states));
                pieces
                    .enumerate()
                    .map(move |(i, (y, h))| (b, i * CHANNELS, y, h))
            })
            .collect();
        debug_assert_eq!(tasks.len(), batch * blocks);
        tasks.into_par_iter().for_each(|(b, from, y, h)| {
            let channels = from..from + y.len();
            let row = b * inner;
            advance(
                &Channels {
                    u: &u[row..][channels.clone()],
                    z: &xz[2 * row + inner..][channels.clone()],
                    delta: &delta[row..][channels.clone()],
                    rates: &rates[from * states..],
                    d: &d[channels],
                    b: &low[b * width + rank..][..states],
                    c: &low[b * width + rank + states..][..states],
                },
                h,
                y,
            );
        });
        let out = product(&y, batch, &self.out_proj, values(&self.out_bias));
        stream
            .iter_mut()
            .zip(&out)
            .for_each(|(stream, out)| *stream += out);
    }
}

impl Decoder {
    pub(super) fn new(model: &DecodeModel) -> Self {
        let norm_f = model.norm_f.as_ref().map(|(weight, bias)| {
            let [width] = weight.dims();
            [raw(weight), or_zero(bias, width, weight)]
        });
        Self {
            embedding: raw(&model.embedding),
            layers: model.layers.iter().map(Layer::new).collect(),
            norm_f,
            head: model.head.as_ref().map(raw),
            vocabulary: model.vocabulary,
            norm: model.norm,
            eps: model.eps,
            lanes: Vec::new(),
            logits: Vec::new(),
            queued: VecDeque::new(),
        }
    }

    pub(super) fn begin(&mut self, start: Start) {
        self.queued.clear();
        self.logits = values(&raw(&start.logits)).to_vec();
        self.lanes = start.lanes;
        for (layer, (h, window)) in self.layers.iter_mut().zip(start.memory) {
            layer.h = values(&raw(&h)).to_vec();
            layer.window = values(&raw(&window)).to_vec();
        }
    }

    /// See [`super::Decoder::queue`].
    pub(super) fn queue(&mut self, draws: &[Draw]) {
        assert!(!self.lanes.is_empty(), "decode: begin() comes first");
        self.queued.push_back(draws.to_vec());
    }

    /// See [`super::Decoder::take`].
    pub(super) fn take(&mut self) -> Vec<Choice> {
        let Some(draws) = self.queued.pop_front() else {
            panic!("decode: queue() comes first");
        };
        let mut all = Vec::with_capacity(draws.len());
        for draws in draws.chunks(self.lanes.len()) {
            let rows = self.logits.chunks(self.vocabulary);
            let lanes = self.lanes.iter_mut().zip(rows).zip(draws);
            let choices: Vec<Choice> = lanes
                .map(|((lane, logits), draw)| lane.choose(logits, *draw))
                .collect();
            self.read(&choices);
            all.extend(choices);
        }
        all
    }

    pub(super) fn logits(&self) -> Vec<f32> {
        self.logits.clone()
    }

    /// Reads a byte of every sequence.
    fn read(&mut self, choices: &[Choice]) {
        let batch = choices.len();
        let [rows, width] = dims(&self.embedding);
        let table = values(&self.embedding);
        let mut stream = Vec::with_capacity(batch * width);
        for choice in choices {
            let row = usize::from(choice.byte).min(rows - 1);
            stream.extend_from_slice(&table[row * width..][..width]);
        }
        for layer in &mut self.layers {
            layer.step(&mut stream, batch, self.norm, self.eps);
        }
        if let Some(norm) = &self.norm_f {
            stream = normalise(&stream, norm, self.norm, self.eps);
        }
        let rows = match &self.head {
            Some(head) => product(&stream, batch, head, &[]),
            None => product_by_rows(&stream, &self.embedding),
        };
        let padded = rows.len() / batch;
        let used = rows
            .chunks_exact(padded)
            .flat_map(|row| &row[..self.vocabulary]);
        self.logits = used.copied().collect();
    }
}

/// Every sequence of the stream `[B, D]`, normalised.
fn normalise(
    stream: &[f32],
    [weight, bias]: &[FlexTensor; 2],
    kind: NormKind,
    eps: f32,
) -> Vec<f32> {
    let (weight, bias) = (values(weight), values(bias));
    let mut hat = stream.to_vec();
    hat.chunks_exact_mut(weight.len())
        .for_each(|row| normalise_row(row, weight, bias, kind, eps));
    hat
}

#[multiversion(targets = "simd")]
fn normalise_row(row: &mut [f32], weight: &[f32], bias: &[f32], kind: NormKind, eps: f32) {
    let width = row.len();
    let mean = match kind {
        NormKind::Rms => 0.0,
        NormKind::Layer => row_sum(width, |i| row[i]) / width as f32,
    };
    let squares = row_sum(width, |i| (row[i] - mean) * (row[i] - mean));
    let scale = 1.0 / (squares / width as f32 + eps).sqrt();
    for i in 0..width {
        row[i] = ((row[i] - mean) * scale).mul_add(weight[i], bias[i]);
    }
}

/// `x · weight + bias` for `x` `[B, in]` and `weight` `[in, out]`; an empty bias is none.
fn product(x: &[f32], batch: usize, weight: &FlexTensor, bias: &[f32]) -> Vec<f32> {
    let [inputs, outputs] = dims(weight);
    let weight = values(weight);
    let part = outputs.div_ceil(PARTS).next_multiple_of(LANES).min(COLUMNS);
    let parts: Vec<Vec<f32>> = (0..outputs.div_ceil(part))
        .into_par_iter()
        .map(|i| {
            let from = i * part;
            let columns = part.min(outputs - from);
            let mut sums = vec![0.0; batch * columns];
            add_columns(x, inputs, weight, outputs, from, columns, &mut sums);
            sums
        })
        .collect();
    let mut y = vec![0.0; batch * outputs];
    for (i, sums) in parts.iter().enumerate() {
        let columns = sums.len() / batch;
        for (b, sums) in sums.chunks_exact(columns).enumerate() {
            y[b * outputs + i * part..][..columns].copy_from_slice(sums);
        }
    }
    if !bias.is_empty() {
        let biases = bias.iter().cycle();
        y.iter_mut().zip(biases).for_each(|(y, bias)| *y += bias);
    }
    y
}

/// Adds the columns `from ..` of `x · weight` to `sums`, `[B, columns]`.
#[multiversion(targets = "simd")]
fn add_columns(
    x: &[f32],
    inputs: usize,
    weight: &[f32],
    outputs: usize,
    from: usize,
    columns: usize,
    sums: &mut [f32],
) {
    let row = |i: usize| &weight[i * outputs + from..][..columns];
    let whole = inputs / ROWS * ROWS;
    for i in (0..whole).step_by(ROWS) {
        let [w0, w1, w2, w3] = [row(i), row(i + 1), row(i + 2), row(i + 3)];
        for (sums, x) in sums.chunks_exact_mut(columns).zip(x.chunks_exact(inputs)) {
            let [x0, x1, x2, x3] = [x[i], x[i + 1], x[i + 2], x[i + 3]];
            for k in 0..columns {
                let sum = w0[k].mul_add(x0, sums[k]);
                let sum = w1[k].mul_add(x1, sum);
                let sum = w2[k].mul_add(x2, sum);
                sums[k] = w3[k].mul_add(x3, sum);
            }
        }
    }
    for i in whole..inputs {
        let w = row(i);
        for (sums, x) in sums.chunks_exact_mut(columns).zip(x.chunks_exact(inputs)) {
            for k in 0..columns {
                sums[k] = w[k].mul_add(x[i], sums[k]);
            }
        }
    }
}

/// `x · weightᵀ` for `x` `[B, in]` and `weight` `[out, in]`.
fn product_by_rows(x: &[f32], weight: &FlexTensor) -> Vec<f32> {
    let [_, inputs] = dims(weight);
    let rows = values(weight);
    x.chunks_exact(inputs)
        .flat_map(|x| rows.chunks_exact(inputs).map(move |row| dot(x, row)))
        .collect()
}

#[multiversion(targets = "simd")]
fn dot(a: &[f32], b: &[f32]) -> f32 {
    row_sum(a.len(), |i| a[i] * b[i])
}

/// The convolution of one sequence at one position, and SiLU; x goes into the window.
#[multiversion(targets = "simd")]
fn conv_step(
    u: &mut [f32],
    x: &[f32],
    window: &mut [f32],
    weight: &[f32],
    bias: &[f32],
    taps: usize,
) {
    let past = taps - 1;
    for e in 0..u.len() {
        let window = &mut window[e * past..][..past];
        let weight = &weight[e * taps..][..taps];
        let mut value = bias[e];
        for (w, x) in weight.iter().zip(window.iter()) {
            value = w.mul_add(*x, value);
        }
        value = weight[past].mul_add(x[e], value);
        if past > 0 {
            window.rotate_left(1);
            window[past - 1] = x[e];
        }
        u[e] = value * sigmoid(value);
    }
}

/// Neighbouring channels of one sequence.
struct Channels<'a> {
    u: &'a [f32],
    z: &'a [f32],
    /// Before softplus.
    delta: &'a [f32],
    rates: &'a [f32],
    d: &'a [f32],
    b: &'a [f32],
    c: &'a [f32],
}

/// One step of the recurrence, and the gate.
#[multiversion(targets = "simd")]
fn advance(channels: &Channels<'_>, h: &mut [f32], y: &mut [f32]) {
    let states = channels.b.len();
    for (e, y) in y.iter_mut().enumerate() {
        let delta = softplus(channels.delta[e]);
        let u = channels.u[e];
        let mut total = 0.0;
        for n in (0..states).step_by(LANES) {
            let count = LANES.min(states - n);
            let at = e * states + n;
            let decay = map(load(channels.rates, at, count), |rate| exp(rate * delta));
            let input = mul(load(channels.b, n, count), [delta * u; LANES]);
            let next = fma(decay, load(h, at, count), input);
            h[at..at + count].copy_from_slice(&next[..count]);
            total += sum(mul(next, load(channels.c, n, count)));
        }
        let value = channels.d[e].mul_add(u, total);
        let z = channels.z[e];
        *y = value * z * sigmoid(z);
    }
}
