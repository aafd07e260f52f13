//! Matrix products of the model: projections, and the embedding of bytes.

use burn::module::{Module, Param};
use burn::tensor::{DType, Int, Tensor};
use mambabyte_kernels::embedding::embedding;
use mambabyte_kernels::linear;

use super::compute::Compute;
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
    #[module(skip)]
    pub(super) compute: Compute,
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
            compute: Compute::default(),
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
        product(x, self.weight.val(), false, self.compute)
    }
}

/// `x · weight` (or `x · weightᵀ`) over the last axis, in f32, of operands in the compute type.
fn product(x: Tensor<3>, weight: Tensor<2>, transposed: bool, compute: Compute) -> Tensor<3> {
    let [batch, length, input] = x.dims();
    let output = weight.dims()[usize::from(!transposed)];
    linear::linear(linear::Linear {
        x: x.reshape([batch * length, input]).cast(compute.dtype),
        weight,
        transposed,
        dtype: DType::F32,
        tf32: compute.tf32,
    })
    .reshape([batch, length, output])
}

/// One row of `weight` for every byte.
#[derive(Module, Debug)]
pub struct Embedding {
    /// `[V, D]`.
    pub weight: Param<Tensor<2>>,
    #[module(skip)]
    pub(super) compute: Compute,
}

impl Embedding {
    pub(super) fn new(init: &mut Init, [rows, width]: [usize; 2], deviation: f64) -> Self {
        Self {
            weight: init.normal(deviation, [rows, width]),
            compute: Compute::default(),
        }
    }

    /// Looks the bytes up.
    ///
    /// # Shapes
    ///
    /// - bytes: `[B, L]`
    /// - output: `[B, L, D]`
    pub fn forward(&self, bytes: Tensor<2, Int>) -> Tensor<3> {
        embedding(self.weight.val(), bytes)
    }

    /// Logits of a head that shares this weight: `x · weightᵀ`.
    ///
    /// # Shapes
    ///
    /// - x: `[B, L, D]`
    /// - output: `[B, L, V]`
    pub fn attend(&self, x: Tensor<3>) -> Tensor<3> {
        product(x, self.weight.val(), true, self.compute)
    }
}
