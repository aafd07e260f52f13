//! The table's rows as a product with the one-hot matrix of the bytes, in plain tensor operations.

use burn::tensor::{DType, Int, Tensor};

/// Same contract as [`embedding`](super::embedding).
pub fn embedding(weight: Tensor<2>, bytes: Tensor<2, Int>) -> Tensor<3> {
    let [batch, length] = bytes.dims();
    let [rows, width] = weight.dims();
    let all = Tensor::<1, Int>::arange(0..rows as i64, &bytes.device()).reshape([1, rows]);
    let one_hot = bytes.reshape([batch * length, 1]).equal(all).float();
    one_hot
        .cast(DType::F32)
        .matmul(weight)
        .reshape([batch, length, width])
}
