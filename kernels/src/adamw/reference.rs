//! The update as the formulas read, in plain tensor operations.

use burn::tensor::Tensor;

use super::{AdamwState, AdamwStep};

/// Same contract as [`adamw_step`](super::adamw_step).
pub fn adamw_step<const D: usize>(
    state: AdamwState<D>,
    grad: Tensor<D>,
    grad_scale: Tensor<1>,
    step: AdamwStep,
) -> AdamwState<D> {
    let g = grad * grad_scale.reshape([1; D]);
    let moment1 = state.moment1 * step.beta1 + g.clone() * (1.0 - step.beta1);
    let moment2 = state.moment2 * step.beta2 + g.clone() * g * (1.0 - step.beta2);
    let update = moment1.clone().div_scalar(step.correction1)
        / (moment2.clone().div_scalar(step.correction2).sqrt() + step.eps);
    let param = state.param * (1.0 - step.lr * step.weight_decay) - update * step.lr;
    AdamwState {
        param,
        moment1,
        moment2,
    }
}
