//! One AdamW update (arXiv 1711.05101), gradient scaling included, in one pass over the parameters.
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

use burn::backend::tensor::FloatTensor;
use burn::backend::{Backend, Dispatch};
use burn::tensor::Tensor;

use crate::backend::{MambaOps, TensorList};

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

/// The raw tensors of one parameter's update.
#[derive(Clone, Debug)]
pub struct RawUpdate<T> {
    /// The parameter, f32.
    pub param: T,
    /// Its gradient.
    pub grad: T,
    /// Mean of the gradients, f32.
    pub moment1: T,
    /// Mean of their squares, f32.
    pub moment2: T,
}

impl<B: Backend> TensorList<B> {
    /// The updates of which these are the tensors, in the order of the fields.
    pub(crate) fn into_updates(self) -> Vec<RawUpdate<FloatTensor<B>>> {
        let update = |[param, grad, moment1, moment2]: [_; 4]| RawUpdate {
            param,
            grad,
            moment1,
            moment2,
        };
        self.into_groups().into_iter().map(update).collect()
    }
}

/// Updates one parameter; see [`adamw_steps`].
pub fn adamw_step<const D: usize>(
    state: AdamwState<D>,
    grad: Tensor<D>,
    grad_scale: Tensor<1>,
    step: AdamwStep,
) -> AdamwState<D> {
    let mut states = adamw_steps(vec![(state, grad)], grad_scale, step);
    states.pop().expect("as many as there were")
}

/// Updates parameters, given with their gradients; none of the tensors is tracked by autodiff.
///
/// Buffers that nothing else holds are updated in place. A GPU updates many small parameters of one
/// call together.
///
/// # Shapes
///
/// - state, grad: any, all the same for each parameter
/// - grad_scale: `[1]`
///
/// # Panics
///
/// If shapes disagree.
pub fn adamw_steps<const D: usize>(
    updates: Vec<(AdamwState<D>, Tensor<D>)>,
    grad_scale: Tensor<1>,
    step: AdamwStep,
) -> Vec<AdamwState<D>> {
    let mut tensors = Vec::with_capacity(4 * updates.len());
    for (state, grad) in updates {
        let dims = state.param.dims();
        assert_eq!(
            [dims; 3],
            [grad.dims(), state.moment1.dims(), state.moment2.dims()],
            "adamw_steps: shapes of gradient and moments of a parameter"
        );
        let list = [state.param, grad, state.moment1, state.moment2];
        tensors.extend(list.map(Tensor::into_dispatch));
    }
    if tensors.is_empty() {
        return Vec::new();
    }
    let tensors = TensorList(tensors);
    let scale = grad_scale.into_dispatch();
    let results = <Dispatch as MambaOps>::adamw_op(tensors, scale, step);
    let state = |tensors: [_; 3]| {
        let [param, moment1, moment2] = tensors.map(Tensor::from_dispatch);
        AdamwState {
            param,
            moment1,
            moment2,
        }
    };
    results.into_groups().into_iter().map(state).collect()
}
