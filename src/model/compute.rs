//! The number format that a model computes in.

use burn::tensor::DType;

use crate::config::Precision;

/// Format of activations and of the operands of matrix products. Parameters, the residual stream,
/// the state-space recurrence's rates and states, and all sums are f32 whatever it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Compute {
    /// Data type of activations.
    pub dtype: DType,
    /// Whether products of f32 operands may round them to TF32.
    pub tf32: bool,
}

impl From<Precision> for Compute {
    fn from(precision: Precision) -> Self {
        Self {
            dtype: match precision {
                Precision::Fp32 | Precision::Tf32 => DType::F32,
                Precision::Bf16 => DType::BF16,
            },
            tf32: precision == Precision::Tf32,
        }
    }
}

impl Default for Compute {
    fn default() -> Self {
        Precision::Fp32.into()
    }
}
