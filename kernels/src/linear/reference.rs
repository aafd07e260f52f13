//! The product in plain tensor operations.

use burn::tensor::Tensor;

use super::Linear;

/// See [`linear`](super::linear): computed in f32 from the rounded operands.
pub fn linear(args: Linear) -> Tensor<2> {
    let dtype = args.x.dtype();
    let weight = args.weight.cast(dtype).cast(burn::tensor::DType::F32);
    let weight = if args.transposed {
        weight.transpose()
    } else {
        weight
    };
    args.x
        .cast(burn::tensor::DType::F32)
        .matmul(weight)
        .cast(args.dtype)
}
