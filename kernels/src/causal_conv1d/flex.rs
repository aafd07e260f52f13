//! The convolution on the CPU: channels in vector lanes, tiles of positions in parallel.

use burn::tensor::DType;
use burn_flex::FlexTensor;
use multiversion::multiversion;
use rayon::prelude::*;

use super::{ConvGrads, ConvInputs, ConvOutputs};
use crate::flex::math::sigmoid;
use crate::flex::tensor::{contiguous, dims, tensor, values};

/// Positions a task handles: a fixed number, so sums over tiles do not depend on the threads.
const TILE: usize = 64;

struct Slices<'a> {
    x: &'a [f32],
    /// `[K, E]`: one tap's weights of all channels side by side.
    weight: Vec<f32>,
    bias: Option<&'a [f32]>,
    /// `[B, K-1, E]`, oldest first.
    window: Option<Vec<f32>>,
    /// How many positions back each position may look, `[B, L]`, at most K-1.
    reach: Vec<u16>,
    batch: usize,
    length: usize,
    inner: usize,
    width: usize,
    silu: bool,
}

impl<'a> Slices<'a> {
    fn of(inputs: &'a ConvInputs<FlexTensor>) -> Self {
        let [batch, length, inner] = dims(&inputs.x);
        let [_, width] = dims(&inputs.weight);
        let raw = values(&inputs.weight);
        let mut weight = vec![0.0; raw.len()];
        for e in 0..inner {
            for k in 0..width {
                weight[k * inner + e] = raw[e * width + k];
            }
        }
        Self {
            x: values(&inputs.x),
            weight,
            bias: inputs.bias.as_ref().map(values),
            window: inputs
                .initial_window
                .as_ref()
                .map(|w| swap_last(values(w), batch, inner, width - 1)),
            reach: reach(inputs.resets.as_ref().map(values), batch, length, width),
            batch,
            length,
            inner,
            width,
            silu: inputs.silu,
        }
    }

    /// The input `back` positions before row (b, t); `None` where it counts as zero.
    #[inline(always)]
    fn tap(&self, b: usize, t: usize, back: usize) -> Option<&[f32]> {
        if back > self.reach[b * self.length + t] as usize {
            return None;
        }
        if back <= t {
            let at = (b * self.length + t - back) * self.inner;
            return Some(&self.x[at..at + self.inner]);
        }
        let window = self.window.as_ref()?;
        let slot = self.width - 1 + t - back;
        let at = (b * (self.width - 1) + slot) * self.inner;
        Some(&window[at..at + self.inner])
    }

    /// The result before SiLU of one row.
    #[inline(always)]
    fn row(&self, b: usize, t: usize, out: &mut [f32]) {
        match self.bias {
            Some(bias) => out.copy_from_slice(bias),
            None => out.fill(0.0),
        }
        for back in 0..self.width {
            if let Some(x) = self.tap(b, t, back) {
                let at = (self.width - 1 - back) * self.inner;
                let weight = &self.weight[at..at + self.inner];
                for ((o, x), w) in out.iter_mut().zip(x).zip(weight) {
                    *o = x.mul_add(*w, *o);
                }
            }
        }
    }
}

/// `[outer, rows, columns]` to `[outer, columns, rows]`.
fn swap_last(x: &[f32], outer: usize, rows: usize, columns: usize) -> Vec<f32> {
    let mut out = vec![0.0; x.len()];
    for o in 0..outer {
        for r in 0..rows {
            for c in 0..columns {
                out[(o * columns + c) * rows + r] = x[(o * rows + r) * columns + c];
            }
        }
    }
    out
}

/// How many positions back each position may look before it meets a reset.
fn reach(resets: Option<&[f32]>, batch: usize, length: usize, width: usize) -> Vec<u16> {
    let most = (width - 1) as u16;
    let Some(resets) = resets else {
        return vec![most; batch * length];
    };
    let mut out = Vec::with_capacity(batch * length);
    for row in resets.chunks_exact(length) {
        let mut current = most;
        for reset in row {
            current = if *reset > 0.5 {
                0
            } else {
                (current + 1).min(most)
            };
            out.push(current);
        }
    }
    out
}

fn all_contiguous(inputs: ConvInputs<FlexTensor>) -> ConvInputs<FlexTensor> {
    ConvInputs {
        x: contiguous(inputs.x),
        weight: contiguous(inputs.weight),
        bias: inputs.bias.map(contiguous),
        initial_window: inputs.initial_window.map(contiguous),
        resets: inputs.resets.map(contiguous),
        silu: inputs.silu,
    }
}

/// Forward pass.
pub(crate) fn forward(inputs: ConvInputs<FlexTensor>) -> ConvOutputs<FlexTensor> {
    let dtype = inputs.x.dtype();
    let inputs = all_contiguous(inputs);
    let s = Slices::of(&inputs);
    let mut y = vec![0.0; s.batch * s.length * s.inner];
    y.par_chunks_mut(TILE * s.inner)
        .enumerate()
        .for_each(|(tile, out)| {
            forward_tile(&s, tile, out);
        });
    ConvOutputs {
        y: tensor(y, [s.batch, s.length, s.inner], dtype),
        last_window: last_window(&s),
    }
}

/// The rows of one tile.
#[multiversion(targets = "simd")]
fn forward_tile(s: &Slices<'_>, tile: usize, out: &mut [f32]) {
    for (i, out) in out.chunks_exact_mut(s.inner).enumerate() {
        let row = tile * TILE + i;
        s.row(row / s.length, row % s.length, out);
        if s.silu {
            for y in out {
                *y *= sigmoid(*y);
            }
        }
    }
}

/// The last K-1 inputs, `[B, E, K-1]`, oldest first; those before the last reset are zero.
fn last_window(s: &Slices) -> FlexTensor {
    let history = s.width - 1;
    let mut window = vec![0.0; s.batch * s.inner * history];
    for b in 0..s.batch {
        // Counted from the position after the last, which no reset precedes.
        let reach = s.reach[(b + 1) * s.length - 1] as usize;
        for back in 0..history {
            if back > reach {
                break;
            }
            if let Some(x) = s.tap(b, s.length - 1, back) {
                for (e, x) in x.iter().enumerate() {
                    window[(b * s.inner + e) * history + history - 1 - back] = *x;
                }
            }
        }
    }
    tensor(window, [s.batch, s.inner, history], DType::F32)
}

/// Backward pass; the result before SiLU is computed again.
pub(crate) fn backward(inputs: ConvInputs<FlexTensor>, dy: FlexTensor) -> ConvGrads<FlexTensor> {
    let dtype = inputs.x.dtype();
    let inputs = all_contiguous(inputs);
    let dy = contiguous(dy);
    let s = Slices::of(&inputs);
    let dpre = gradient_before_silu(&s, values(&dy));
    let dx = input_gradient(&s, &dpre);
    let (dweight, dbias) = parameter_gradients(&s, &dpre);
    ConvGrads {
        x: tensor(dx, [s.batch, s.length, s.inner], dtype),
        weight: tensor(dweight, [s.inner, s.width], DType::F32),
        bias: s.bias.map(|_| tensor(dbias, [s.inner], DType::F32)),
    }
}

fn gradient_before_silu(s: &Slices, dy: &[f32]) -> Vec<f32> {
    if !s.silu {
        return dy.to_vec();
    }
    let mut dpre = vec![0.0; dy.len()];
    dpre.par_chunks_mut(TILE * s.inner)
        .enumerate()
        .for_each(|(tile, out)| {
            before_silu_tile(s, tile, dy, out);
        });
    dpre
}

/// The gradient before SiLU of one tile.
#[multiversion(targets = "simd")]
fn before_silu_tile(s: &Slices<'_>, tile: usize, dy: &[f32], out: &mut [f32]) {
    for (i, out) in out.chunks_exact_mut(s.inner).enumerate() {
        let row = tile * TILE + i;
        s.row(row / s.length, row % s.length, out);
        let dy = &dy[row * s.inner..(row + 1) * s.inner];
        for (o, dy) in out.iter_mut().zip(dy) {
            let gate = sigmoid(*o);
            *o = dy * gate * o.mul_add(1.0 - gate, 1.0);
        }
    }
}

fn input_gradient(s: &Slices, dpre: &[f32]) -> Vec<f32> {
    let mut dx = vec![0.0; dpre.len()];
    dx.par_chunks_mut(TILE * s.inner)
        .enumerate()
        .for_each(|(tile, out)| {
            input_tile(s, tile, dpre, out);
        });
    dx
}

/// Gradients of the inputs of one tile.
#[multiversion(targets = "simd")]
fn input_tile(s: &Slices<'_>, tile: usize, dpre: &[f32], out: &mut [f32]) {
    for (i, out) in out.chunks_exact_mut(s.inner).enumerate() {
        let row = tile * TILE + i;
        let t = row % s.length;
        for back in 0..s.width.min(s.length - t) {
            if back > s.reach[row + back] as usize {
                break;
            }
            let weight_at = (s.width - 1 - back) * s.inner;
            let weight = &s.weight[weight_at..weight_at + s.inner];
            let from = (row + back) * s.inner;
            let grad = &dpre[from..from + s.inner];
            for ((o, g), w) in out.iter_mut().zip(grad).zip(weight) {
                *o = g.mul_add(*w, *o);
            }
        }
    }
}

/// dweight `[E, K]` and dbias `[E]`: a partial sum a tile, then the tiles in order.
fn parameter_gradients(s: &Slices, dpre: &[f32]) -> (Vec<f32>, Vec<f32>) {
    let size = (s.width + 1) * s.inner;
    let parts: Vec<Vec<f32>> = dpre
        .par_chunks(TILE * s.inner)
        .enumerate()
        .map(|(tile, dpre)| tile_gradients(s, tile, dpre, size))
        .collect();
    let mut total = vec![0.0; size];
    for part in parts {
        for (t, p) in total.iter_mut().zip(part) {
            *t += p;
        }
    }
    let mut dweight = vec![0.0; s.inner * s.width];
    for k in 0..s.width {
        for e in 0..s.inner {
            dweight[e * s.width + k] = total[k * s.inner + e];
        }
    }
    (dweight, total[s.width * s.inner..].to_vec())
}

/// One tile's part: K rows of weight gradients, then one of bias gradients.
#[multiversion(targets = "simd")]
fn tile_gradients(s: &Slices<'_>, tile: usize, dpre: &[f32], size: usize) -> Vec<f32> {
    let mut part = vec![0.0; size];
    for (i, grad) in dpre.chunks_exact(s.inner).enumerate() {
        let row = tile * TILE + i;
        for back in 0..s.width {
            if let Some(x) = s.tap(row / s.length, row % s.length, back) {
                let at = (s.width - 1 - back) * s.inner;
                for ((p, g), x) in part[at..at + s.inner].iter_mut().zip(grad).zip(x) {
                    *p = g.mul_add(*x, *p);
                }
            }
        }
        for (p, g) in part[s.width * s.inner..].iter_mut().zip(grad) {
            *p += g;
        }
    }
    part
}
