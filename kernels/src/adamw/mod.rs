//! One AdamW update (arXiv 1711.05101), gradient scaling included, in one pass over a parameter.
//!
//! ```text
//! g  = grad · grad_scale
//! m  = beta1 · m + (1 - beta1) · g
//! v  = beta2 · v + (1 - beta2) · g²
//! p  = p · (1 - lr · weight_decay) - lr · (m / (1 - beta1^t)) / (√(v / (1 - beta2^t)) + eps)
//! ```
//!
//! `grad_scale` is a one-element tensor on the device: the clip factor of the global gradient norm
//! reaches the update without a round trip to the host. Where it is not a finite number the update
//! leaves everything as it is: a bad step is stopped on the device, and the host hears of it later.

#[cfg(feature = "cube")]
pub(crate) mod cube;
#[cfg(feature = "flex")]
pub(crate) mod flex;
pub mod int8;
pub mod reference;
#[cfg(test)]
mod tests;

use burn::backend::Dispatch;
use burn::tensor::Tensor;

use crate::backend::MambaOps;

/// The numbers of one update.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamwStep {
    /// Learning rate of this step.
    pub lr: f32,
    /// Decay of the first moment.
    pub beta1: f32,
    /// Decay of the second moment.
    pub beta2: f32,
    /// Added to the root of the second moment.
    pub eps: f32,
    /// Decoupled weight decay, multiplied by the learning rate.
    pub weight_decay: f32,
    /// `1 - beta1^t`, t counted from 1.
    pub correction1: f32,
    /// `1 - beta2^t`.
    pub correction2: f32,
}

impl AdamwStep {
    /// The numbers of update `t`, counted from 1.
    pub fn new(t: u64, lr: f64, betas: (f64, f64), eps: f64, weight_decay: f64) -> Self {
        // f64 powers: beta2^t would lose half its digits in f32 at small t.
        let correction = |beta: f64| (1.0 - beta.powf(t as f64)) as f32;
        Self {
            lr: lr as f32,
            beta1: betas.0 as f32,
            beta2: betas.1 as f32,
            eps: eps as f32,
            weight_decay: weight_decay as f32,
            correction1: correction(betas.0),
            correction2: correction(betas.1),
        }
    }
}

/// A parameter with its two moments.
#[derive(Clone, Debug)]
pub struct AdamwState<const D: usize> {
    /// The parameter, f32.
    pub param: Tensor<D>,
    /// Mean of the gradients.
    pub moment1: Tensor<D>,
    /// Mean of their squares.
    pub moment2: Tensor<D>,
}

/// Updates one parameter; none of the tensors is tracked by autodiff.
///
/// Buffers that nothing else holds are updated in place.
///
/// # Shapes
///
/// - state, grad: any, all the same
/// - grad_scale: `[1]`
pub fn adamw_step<const D: usize>(
    state: AdamwState<D>,
    grad: Tensor<D>,
    grad_scale: Tensor<1>,
    step: AdamwStep,
) -> AdamwState<D> {
    assert_eq!(
        state.param.dims(),
        grad.dims(),
        "adamw_step: shapes of parameter and gradient"
    );
    let (param, moment1, moment2) = <Dispatch as MambaOps>::adamw_op(
        state.param.into_dispatch(),
        grad.into_dispatch(),
        state.moment1.into_dispatch(),
        state.moment2.into_dispatch(),
        grad_scale.into_dispatch(),
        step,
    );
    AdamwState {
        param: Tensor::from_dispatch(param),
        moment1: Tensor::from_dispatch(moment1),
        moment2: Tensor::from_dispatch(moment2),
    }
}
