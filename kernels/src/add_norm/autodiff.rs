//! Pairs the fused forward with two gradient nodes.
//!
//! Burn's autodiff gives an operation one tracked output, and this one has two. So the sum is
//! recorded as the addition it is, and the normalised rows as a function of that sum: one kernel
//! forward, the gradients of a plain `norm(x + residual)` backward.

use burn::backend::TensorMetadata;
use burn::backend::tensor::FloatTensor;
use burn::tensor::{DType, FloatDType};
use burn_autodiff::Autodiff;
use burn_autodiff::checkpoint::base::Checkpointer;
use burn_autodiff::checkpoint::strategy::CheckpointStrategy;
use burn_autodiff::grads::Gradients;
use burn_autodiff::ops::{Backward, Ops, OpsKind};

use super::{NormInputs, NormOutputs, NormSaved};
use crate::MambaKernels;
use crate::backend::Pair;

/// Backward of the addition: the gradient passes to both sides, each in its own data type.
#[derive(Debug)]
struct SumBackward;

impl<B: MambaKernels> Backward<B, 2> for SumBackward {
    type State = [DType; 2];

    fn backward(
        self,
        ops: Ops<Self::State, 2>,
        grads: &mut Gradients,
        _checkpointer: &mut Checkpointer,
    ) {
        let dsum = grads.consume::<B>(&ops.node);
        let [x, residual] = ops.parents;
        // Without a residual both parents are the same node: it counts once.
        let same = matches!((&x, &residual), (Some(x), Some(r)) if x.id == r.id);
        let residual = if same { None } else { residual };
        for (parent, dtype) in [x, residual].into_iter().zip(ops.state) {
            if let Some(node) = parent {
                let grad = dsum.clone();
                let grad = if grad.dtype() == dtype {
                    grad
                } else {
                    B::float_cast(grad, FloatDType::from(dtype))
                };
                grads.register::<B>(node.id, grad);
            }
        }
    }
}

/// Backward of the normalisation, as a function of the sum.
#[derive(Debug)]
struct NormBackward;

impl<B: MambaKernels> Backward<B, 3> for NormBackward {
    type State = NormSaved<FloatTensor<B>>;

    fn backward(
        self,
        ops: Ops<Self::State, 3>,
        grads: &mut Gradients,
        _checkpointer: &mut Checkpointer,
    ) {
        let dy = grads.consume::<B>(&ops.node);
        let out = B::add_norm_backward(ops.state, dy);
        let by_parent = [Some(out.sum), Some(out.weight), out.bias];
        for (parent, grad) in ops.parents.iter().zip(by_parent) {
            if let (Some(node), Some(grad)) = (parent, grad) {
                grads.register::<B>(node.id, grad);
            }
        }
    }
}

/// Runs the fused forward pass of `B` and records both gradients; returns `(y, sum)`.
pub(crate) fn norm<B: MambaKernels, C: CheckpointStrategy>(
    inputs: NormInputs<FloatTensor<Autodiff<B, C>>>,
) -> Pair<Autodiff<B, C>> {
    let sum_nodes = [
        inputs.x.node(),
        inputs.residual.as_ref().unwrap_or(&inputs.x).node(),
    ];
    let weight_node = inputs.weight.node();
    let bias_node = inputs.bias.as_ref().unwrap_or(&inputs.weight).node();
    let x_dtype = inputs.x.dtype();
    let residual_dtype = inputs.residual.as_ref().map_or(x_dtype, |r| r.dtype());
    let has_bias = inputs.bias.is_some();
    let kind = inputs.kind;

    let weight = inputs.weight.into_primitive();
    let NormOutputs { y, sum, mean, rstd } = B::add_norm(NormInputs {
        x: inputs.x.into_primitive(),
        residual: inputs.residual.map(|t| t.into_primitive()),
        weight: weight.clone(),
        bias: inputs.bias.map(|t| t.into_primitive()),
        eps: inputs.eps,
        kind,
    });

    let saved_sum = sum.clone();
    let sum = match SumBackward
        .prepare::<C>(sum_nodes)
        .compute_bound()
        .stateful()
    {
        OpsKind::Tracked(prep) => prep.finish([x_dtype, residual_dtype], sum),
        OpsKind::UnTracked(prep) => prep.finish(sum),
    };
    let norm_nodes = [sum.node(), weight_node, bias_node];
    let y = match NormBackward
        .prepare::<C>(norm_nodes)
        .compute_bound()
        .stateful()
    {
        OpsKind::Tracked(prep) => prep.finish(
            NormSaved {
                sum: saved_sum,
                mean,
                rstd,
                weight,
                has_bias,
                kind,
            },
            y,
        ),
        OpsKind::UnTracked(prep) => prep.finish(y),
    };
    (y, sum)
}
