//! Cross-entropy as the formula reads, in plain tensor operations.

use burn::tensor::activation::log_softmax;
use burn::tensor::{DType, Int, Tensor};

/// Same contract as [`cross_entropy`](super::cross_entropy).
pub fn cross_entropy(logits: Tensor<2>, targets: Tensor<1, Int>) -> Tensor<1> {
    let [rows, _] = logits.dims();
    log_softmax(logits.cast(DType::F32), 1)
        .gather(1, targets.reshape([rows, 1]))
        .neg()
        .reshape([rows])
}
