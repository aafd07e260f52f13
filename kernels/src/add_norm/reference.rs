//! Addition and normalisation as the formulas read, in plain tensor operations.

use burn::tensor::{DType, Tensor};

use super::{AddNorm, NormKind};

/// Same contract as [`add_norm`](super::add_norm).
pub fn add_norm(args: AddNorm) -> (Tensor<3>, Tensor<3>) {
    args.check();
    let width = args.x.dims()[2];
    let dtype = args.x.dtype();
    let x = args.x.cast(DType::F32);
    let (sum, sum_dtype) = match args.residual {
        Some(residual) => {
            let dtype = residual.dtype();
            (x + residual.cast(DType::F32), dtype)
        }
        None => (x, DType::F32),
    };
    let centred = match args.kind {
        NormKind::Rms => sum.clone(),
        NormKind::Layer => sum.clone() - sum.clone().mean_dim(2),
    };
    let variance = (centred.clone() * centred.clone()).mean_dim(2);
    let mut y = centred / variance.add_scalar(args.eps).sqrt() * args.weight.reshape([1, 1, width]);
    if let Some(bias) = args.bias {
        y = y + bias.reshape([1, 1, width]);
    }
    (y.cast(dtype), sum.cast(sum_dtype))
}
