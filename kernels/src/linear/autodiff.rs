//! Pairs the product with its gradients: `dx = dy · weightᵀ`, `dweight = xᵀ · dy`.

use burn::backend::TensorMetadata;
use burn::backend::tensor::FloatTensor;
use burn::tensor::DType;
use burn_autodiff::Autodiff;
use burn_autodiff::checkpoint::base::Checkpointer;
use burn_autodiff::checkpoint::strategy::CheckpointStrategy;
use burn_autodiff::grads::Gradients;
use burn_autodiff::ops::{Backward, Ops, OpsKind, binary};

use super::{Product, Target};
use crate::MambaKernels;

/// `x · weight` on raw tensors: the weight is rounded to the data type of `x`.
pub(crate) fn forward<B: MambaKernels>(
    x: FloatTensor<B>,
    weight: FloatTensor<B>,
    how: Product,
) -> FloatTensor<B> {
    let weight = rounded::<B>(weight, x.dtype());
    B::product(x, weight, how, Target::New)
}

/// The tensor in `dtype`.
pub(crate) fn rounded<B: MambaKernels>(tensor: FloatTensor<B>, dtype: DType) -> FloatTensor<B> {
    let [tensor] = B::rounded([tensor], dtype);
    tensor
}

#[derive(Debug)]
struct LinearBackward;

impl<B: MambaKernels> Backward<B, 2> for LinearBackward {
    /// x, weight, how.
    type State = (FloatTensor<B>, FloatTensor<B>, Product);

    fn backward(
        self,
        ops: Ops<Self::State, 2>,
        grads: &mut Gradients,
        _checkpointer: &mut Checkpointer,
    ) {
        let (x, weight, how) = ops.state;
        let dtype = x.dtype();
        let transposed = how.transposed[1];
        let left = x.clone();
        binary::<B, _, _>(
            ops.parents,
            ops.node,
            grads,
            move |dy| {
                let dy = rounded::<B>(dy, dtype);
                let how = Product {
                    transposed: [false, !transposed],
                    dtype,
                    ..how
                };
                B::product(dy, rounded::<B>(weight, dtype), how, Target::New)
            },
            move |dy| {
                let dy = rounded::<B>(dy, dtype);
                let how = Product::left_transposed(DType::F32, how.tf32);
                let (first, second) = if transposed { (dy, left) } else { (left, dy) };
                B::product(first, second, how, Target::New)
            },
        );
    }
}

/// Runs the forward pass of `B` and records its backward.
pub(crate) fn linear<B: MambaKernels, C: CheckpointStrategy>(
    x: FloatTensor<Autodiff<B, C>>,
    weight: FloatTensor<Autodiff<B, C>>,
    how: Product,
) -> FloatTensor<Autodiff<B, C>> {
    let nodes = [x.node(), weight.node()];
    let (x, weight) = (x.into_primitive(), weight.into_primitive());
    let y = forward::<B>(x.clone(), weight.clone(), how);
    match LinearBackward
        .prepare::<C>(nodes)
        .compute_bound()
        .stateful()
    {
        OpsKind::Tracked(prep) => prep.finish((x, weight, how), y),
        OpsKind::UnTracked(prep) => prep.finish(y),
    }
}
