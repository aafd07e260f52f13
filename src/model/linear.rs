//! Matrix products of the model: projections, and the embedding of bytes.

use burn::module::{Module, Param};
use burn::tensor::{DType, Int, Tensor};

use super::init::Init;

/// `y = x · weight + bias` over the last axis.
///
/// Rows of all sequences are one matrix, so that a product is one call of the matrix library.
#[derive(Module, Debug)]
pub struct Linear {
    /// `[in, out]`.
    pub weight: Param<Tensor<2>>,
    /// `[out]`.
    pub bias: Option<Param<Tensor<1>>>,
}

impl Linear {
    /// Weights uniform in ±1/√in (PyTorch's default) times `scale`; a bias starts at zero.
    pub(super) fn new(
        init: &mut Init,
        [input, output]: [usize; 2],
        bias: bool,
        scale: f64,
    ) -> Self {
        let bound = scale / (input as f64).sqrt();
        Self {
            weight: init.uniform(bound, [input, output]),
            bias: bias.then(|| init.constant(0.0, [output])),
        }
    }

    /// Applies the projection.
    ///
    /// # Shapes
    ///
    /// - x: `[B, L, in]`
    /// - output: `[B, L, out]`
    pub fn forward(&self, x: Tensor<3>) -> Tensor<3> {
        let y = self.project(x);
        match &self.bias {
            Some(bias) => {
                let width = bias.val().dims()[0];
                y + bias.val().reshape([1, 1, width])
            }
            None => y,
        }
    }

    /// The product alone, for a consumer that adds the bias itself.
    pub(super) fn project(&self, x: Tensor<3>) -> Tensor<3> {
        let [batch, length, input] = x.dims();
        let weight = self.weight.val();
        let [_, output] = weight.dims();
        x.reshape([batch * length, input])
            .matmul(weight)
            .reshape([batch, length, output])
    }
}

/// One row of `weight` for every byte.
///
/// Computed as a product with the one-hot matrix of the bytes: its gradient is then a product too,
/// where a gather's would be an atomic scatter whose sums change from run to run. With 256 rows
/// that costs less than a tenth of one layer.
#[derive(Module, Debug)]
pub struct Embedding {
    /// `[V, D]`.
    pub weight: Param<Tensor<2>>,
}

impl Embedding {
    pub(super) fn new(init: &mut Init, [rows, width]: [usize; 2], deviation: f64) -> Self {
        Self {
            weight: init.normal(deviation, [rows, width]),
        }
    }

    /// Looks the bytes up.
    ///
    /// # Shapes
    ///
    /// - bytes: `[B, L]`
    /// - output: `[B, L, D]`
    pub fn forward(&self, bytes: Tensor<2, Int>) -> Tensor<3> {
        let [batch, length] = bytes.dims();
        let weight = self.weight.val();
        let [rows, width] = weight.dims();
        let all = Tensor::<1, Int>::arange(0..rows as i64, &bytes.device()).reshape([1, rows]);
        let one_hot = bytes
            .reshape([batch * length, 1])
            .equal(all)
            .float()
            .cast(DType::F32);
        one_hot.matmul(weight).reshape([batch, length, width])
    }

    /// Logits of a head that shares this weight: `x · weightᵀ`.
    ///
    /// # Shapes
    ///
    /// - x: `[B, L, D]`
    /// - output: `[B, L, V]`
    pub fn attend(&self, x: Tensor<3>) -> Tensor<3> {
        let [batch, length, width] = x.dims();
        let weight = self.weight.val();
        let [rows, _] = weight.dims();
        x.reshape([batch * length, width])
            .matmul(weight.transpose())
            .reshape([batch, length, rows])
    }
}
