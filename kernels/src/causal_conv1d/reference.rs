//! The convolution as the formula reads, in plain tensor operations: the oracle of the tests.

use burn::tensor::activation::silu;
use burn::tensor::{DType, Tensor};

use super::Conv;

/// Same contract as [`causal_conv1d`](super::causal_conv1d).
pub fn causal_conv1d(conv: Conv) -> (Tensor<3>, Tensor<3>) {
    conv.check();
    let dtype = conv.x.dtype();
    let [batch, length, inner] = conv.x.dims();
    let [_, width] = conv.weight.dims();
    let device = conv.x.device();
    let history = width - 1;

    // Channel-last input with the carried window in front: [B, K-1+L, E].
    let x = conv.x.cast(DType::F32);
    let padded = if history == 0 {
        x
    } else {
        let window = match conv.initial_window {
            Some(window) => window.detach().swap_dims(1, 2),
            None => Tensor::zeros([batch, history, inner], &device),
        };
        Tensor::cat(vec![window, x], 1)
    };
    let resets = conv
        .resets
        .unwrap_or_else(|| Tensor::zeros([batch, length], &device));

    // Tap `back` positions ago survives if no reset lies in the positions after it.
    let mut y = Tensor::zeros([batch, length, inner], &device);
    let mut alive = Tensor::<2>::ones([batch, length], &device);
    for back in 0..width {
        let tap = padded
            .clone()
            .slice([0..batch, history - back..history - back + length]);
        let weight = conv
            .weight
            .clone()
            .slice([0..inner, width - 1 - back..width - back])
            .reshape([1, 1, inner]);
        y = y + tap * weight * alive.clone().reshape([batch, length, 1]);
        alive = alive * shifted(&resets, back).neg().add_scalar(1.0);
    }
    if let Some(bias) = conv.bias {
        y = y + bias.reshape([1, 1, inner]);
    }
    if conv.silu {
        y = silu(y);
    }
    let window = last_window(padded.detach(), &resets, history);
    (y.cast(dtype), window)
}

/// `out[t] = resets[t - back]`, zero before the first position.
fn shifted(resets: &Tensor<2>, back: usize) -> Tensor<2> {
    let [batch, length] = resets.dims();
    let device = resets.device();
    if back == 0 {
        return resets.clone();
    }
    if back >= length {
        return Tensor::zeros([batch, length], &device);
    }
    let head = Tensor::zeros([batch, back], &device);
    let tail = resets.clone().slice([0..batch, 0..length - back]);
    Tensor::cat(vec![head, tail], 1)
}

/// The last K-1 inputs, `[B, E, K-1]`, with those before the last reset as zero.
fn last_window(padded: Tensor<3>, resets: &Tensor<2>, history: usize) -> Tensor<3> {
    let [batch, total, inner] = padded.dims();
    let device = padded.device();
    if history == 0 {
        return Tensor::empty([batch, inner, 0], &device);
    }
    let length = total - history;
    let mut alive = Tensor::<2>::ones([batch, 1], &device);
    let mut columns = Vec::with_capacity(history);
    for back in 0..history {
        let at = total - 1 - back;
        let column = padded.clone().slice([0..batch, at..at + 1]);
        columns.push(column * alive.clone().reshape([batch, 1, 1]));
        if back < length {
            let reset = resets
                .clone()
                .slice([0..batch, length - 1 - back..length - back]);
            alive = alive * reset.neg().add_scalar(1.0);
        }
    }
    columns.reverse();
    Tensor::cat(columns, 1).swap_dims(1, 2)
}
