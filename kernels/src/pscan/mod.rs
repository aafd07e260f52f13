//! First-order linear recurrence by a parallel scan, in plain tensor operations.
//!
//! `h_t = a_t · h_{t-1} + x_t` for every `[E, N]` element. Blelloch's work-efficient scan (up-sweep,
//! down-sweep) over the associative operator `(a, x) ∘ (a', x') = (a·a', a'·x + x')`, for any L:
//! an odd last element rides along. Differentiable by autodiff on every backend.
//!
//! It materialises `[B, L, E, N]`: use [`selective_scan`](crate::selective_scan) to train. It is
//! here as the readable form of the algorithm and an oracle independent of the sequential one.

use burn::tensor::activation::{silu, softplus};
use burn::tensor::{DType, Tensor, s};

use crate::selective_scan::Scan;

#[cfg(test)]
mod tests;

/// All states of the recurrence from zero. Inputs are unchanged; the result is a new tensor.
///
/// # Shapes
///
/// - a, x, output: `[B, L, E, N]`
pub fn pscan(a: Tensor<4>, x: Tensor<4>) -> Tensor<4> {
    assert_eq!(a.dims(), x.dims(), "pscan: shapes of a and x [B, L, E, N]");
    let [batch, length, inner, state] = a.dims();
    if length == 1 {
        return x;
    }
    // Up: combine neighbours (2i, 2i+1); scan the half as long sequence of pairs.
    let pairs = length / 2;
    let even = |t: &Tensor<4>| t.clone().slice(s![.., 0..2 * pairs;2, .., ..]);
    let odd = |t: &Tensor<4>| t.clone().slice(s![.., 1..2 * pairs;2, .., ..]);
    let pair_a = odd(&a) * even(&a);
    let pair_x = odd(&a) * even(&x) + odd(&x);
    // The scan over pairs is the answer at odd positions.
    let at_odd = pscan(pair_a, pair_x);
    // Down: an even position follows from the odd one before it.
    let first = x.clone().slice(s![.., 0..1, .., ..]);
    let evens = length - pairs;
    let at_even = if evens == 1 {
        first
    } else {
        let later = |t: &Tensor<4>| t.clone().slice(s![.., 2..length;2, .., ..]);
        let before = at_odd.clone().slice(s![.., 0..evens - 1, .., ..]);
        Tensor::cat(vec![first, later(&a) * before + later(&x)], 1)
    };
    interleave(at_even, at_odd, [batch, length, inner, state])
}

/// Even positions from `even`, odd from `odd`.
fn interleave(even: Tensor<4>, odd: Tensor<4>, dims: [usize; 4]) -> Tensor<4> {
    let [batch, length, inner, state] = dims;
    let pairs = odd.dims()[1];
    let paired = Tensor::stack::<5>(vec![even.clone().slice(s![.., 0..pairs, .., ..]), odd], 2)
        .reshape([batch, 2 * pairs, inner, state]);
    if length == 2 * pairs {
        paired
    } else {
        Tensor::cat(
            vec![paired, even.slice(s![.., pairs..pairs + 1, .., ..])],
            1,
        )
    }
}

/// The selective scan by [`pscan`]: same contract as
/// [`selective_scan`](crate::selective_scan::selective_scan), memory O(B·L·E·N).
pub fn selective_scan(scan: Scan) -> (Tensor<3>, Tensor<3>) {
    scan.check();
    let dtype = scan.u.dtype();
    let [batch, length, inner] = scan.u.dims();
    let [_, state] = scan.a.dims();
    let u = scan.u.cast(DType::F32);
    let mut delta = scan.delta.cast(DType::F32);
    if let Some(bias) = scan.delta_bias {
        delta = delta + bias.reshape([1, 1, inner]);
    }
    if scan.delta_softplus {
        delta = softplus(delta, 1.0);
    }
    let over_state = |t: Tensor<3>| t.reshape([batch, length, inner, 1]);
    let over_inner = |t: Tensor<3>| t.cast(DType::F32).reshape([batch, length, 1, state]);
    let mut decay = (over_state(delta.clone()) * scan.a.reshape([1, 1, inner, state])).exp();
    let mut input = over_state(delta * u.clone()) * over_inner(scan.b);
    if let Some(resets) = scan.resets {
        decay = decay * resets.neg().add_scalar(1.0).reshape([batch, length, 1, 1]);
    }
    if let Some(initial) = scan.initial_state {
        // The carried state is one more input at the first position.
        let first = decay.clone().slice(s![.., 0..1, .., ..])
            * initial.detach().reshape([batch, 1, inner, state])
            + input.clone().slice(s![.., 0..1, .., ..]);
        input = if length == 1 {
            first
        } else {
            Tensor::cat(vec![first, input.slice(s![.., 1..length, .., ..])], 1)
        };
    }
    let h = pscan(decay, input);
    let last = h
        .clone()
        .slice(s![.., length - 1..length, .., ..])
        .reshape([batch, inner, state])
        .detach();
    let mut y = (h * over_inner(scan.c))
        .sum_dim(3)
        .reshape([batch, length, inner]);
    if let Some(d) = scan.d {
        y = y + u * d.reshape([1, 1, inner]);
    }
    if let Some(z) = scan.z {
        y = y * silu(z.cast(DType::F32));
    }
    (y.cast(dtype), last)
}
