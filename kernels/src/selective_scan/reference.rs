//! The scan as the formula reads: one position at a time, in plain tensor operations.
//!
//! Differentiable by Burn's autodiff, which makes it the oracle for values and gradients. It
//! materialises every state: for tests and small experiments only.

use burn::tensor::activation::{silu, softplus};
use burn::tensor::{DType, Tensor};

use super::Scan;

/// Same contract as [`selective_scan`](super::selective_scan).
pub fn selective_scan(scan: Scan) -> (Tensor<3>, Tensor<3>) {
    scan.check();
    let dtype = scan.u.dtype();
    let [batch, length, inner] = scan.u.dims();
    let [_, state] = scan.a.dims();
    let device = scan.u.device();

    let u = scan.u.cast(DType::F32);
    let b = scan.b.cast(DType::F32);
    let c = scan.c.cast(DType::F32);
    let mut delta = scan.delta.cast(DType::F32);
    if let Some(bias) = scan.delta_bias {
        delta = delta + bias.reshape([1, 1, inner]);
    }
    if scan.delta_softplus {
        delta = softplus(delta, 1.0);
    }
    let a = scan.a.reshape([1, inner, state]);
    let mut h = match scan.initial_state {
        // The gradient stops here, as in the fast paths.
        Some(h) => h.detach(),
        None => Tensor::zeros([batch, inner, state], &device),
    };

    let mut ys = Vec::with_capacity(length);
    for t in 0..length {
        if let Some(resets) = &scan.resets {
            let keep = resets.clone().slice([0..batch, t..t + 1]).neg() + 1.0;
            h = h * keep.reshape([batch, 1, 1]);
        }
        let at = |x: &Tensor<3>| x.clone().slice([0..batch, t..t + 1]);
        let delta_t = at(&delta).reshape([batch, inner, 1]);
        let u_t = at(&u).reshape([batch, inner, 1]);
        let b_t = at(&b).reshape([batch, 1, state]);
        let c_t = at(&c).reshape([batch, 1, state]);
        h = (delta_t.clone() * a.clone()).exp() * h + delta_t * u_t * b_t;
        ys.push((h.clone() * c_t).sum_dim(2).reshape([batch, 1, inner]));
    }
    let mut y = Tensor::cat(ys, 1);
    if let Some(d) = scan.d {
        y = y + u * d.reshape([1, 1, inner]);
    }
    if let Some(z) = scan.z {
        y = y * silu(z.cast(DType::F32));
    }
    (y.cast(dtype), h.detach())
}
