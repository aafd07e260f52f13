//! The kernels of every CubeCL runtime: CUDA, and Vulkan, Metal or DX12 through wgpu.

use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::tensor::DType;
use burn_cubecl::CubeBackend;

use crate::adamw::int8::RawMoments;
use crate::adamw::{AdamwStep, RawUpdate};
use crate::add_norm::{NormGrads, NormInputs, NormOutputs, NormSaved};
use crate::backend::MambaKernels;
use crate::causal_conv1d::{ConvGrads, ConvInputs, ConvOutputs};
use crate::cube;
use crate::linear::{Product, Target};
use crate::norm::{NormalizeBackward, NormalizeGrads, NormalizeInputs, Normalized};
use crate::selective_scan::{ScanGrads, ScanInputs, ScanOutputs, ScanRequest};
use crate::{
    adamw, add_norm, causal_conv1d, cross_entropy, embedding, linear, mamba_layer, norm,
    selective_scan, sum_squares,
};

impl MambaKernels for CubeBackend {
    fn selective_scan(inputs: ScanInputs<FloatTensor<Self>>) -> ScanOutputs<FloatTensor<Self>> {
        selective_scan::cube::forward(inputs)
    }

    fn selective_scan_backward(
        inputs: ScanInputs<FloatTensor<Self>>,
        saved: FloatTensor<Self>,
        dy: FloatTensor<Self>,
        request: ScanRequest<FloatTensor<Self>>,
    ) -> ScanGrads<FloatTensor<Self>> {
        selective_scan::cube::backward(inputs, saved, dy, request)
    }

    fn causal_conv1d(inputs: ConvInputs<FloatTensor<Self>>) -> ConvOutputs<FloatTensor<Self>> {
        causal_conv1d::cube::forward(inputs)
    }

    fn causal_conv1d_backward(
        inputs: ConvInputs<FloatTensor<Self>>,
        dy: FloatTensor<Self>,
        dx_into: Option<FloatTensor<Self>>,
    ) -> ConvGrads<FloatTensor<Self>> {
        causal_conv1d::cube::backward(inputs, dy, dx_into)
    }

    fn add_norm(inputs: NormInputs<FloatTensor<Self>>) -> NormOutputs<FloatTensor<Self>> {
        add_norm::cube::forward(inputs)
    }

    fn add_norm_backward(
        saved: NormSaved<FloatTensor<Self>>,
        dy: FloatTensor<Self>,
    ) -> NormGrads<FloatTensor<Self>> {
        add_norm::cube::backward(saved, dy)
    }

    fn normalize(inputs: NormalizeInputs<FloatTensor<Self>>) -> Normalized<FloatTensor<Self>> {
        norm::cube::normalize(inputs)
    }

    fn affine(
        hat: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        bias: Option<FloatTensor<Self>>,
    ) -> FloatTensor<Self> {
        norm::cube::affine(hat, weight, bias)
    }

    fn normalize_affine(
        inputs: NormalizeInputs<FloatTensor<Self>>,
        weight: FloatTensor<Self>,
        bias: Option<FloatTensor<Self>>,
    ) -> (Normalized<FloatTensor<Self>>, FloatTensor<Self>) {
        norm::cube::normalize_affine(inputs, weight, bias)
    }

    fn normed(
        inputs: NormalizeInputs<FloatTensor<Self>>,
        weight: FloatTensor<Self>,
        bias: Option<FloatTensor<Self>>,
    ) -> FloatTensor<Self> {
        norm::cube::normed(inputs, weight, bias)
    }

    fn normalize_backward(
        inputs: NormalizeBackward<FloatTensor<Self>>,
    ) -> NormalizeGrads<FloatTensor<Self>> {
        norm::cube::backward(inputs)
    }

    fn byte_embedding(weight: FloatTensor<Self>, bytes: IntTensor<Self>) -> FloatTensor<Self> {
        embedding::cube::forward(weight, bytes)
    }

    fn byte_embedding_backward(
        bytes: IntTensor<Self>,
        dy: FloatTensor<Self>,
        rows: usize,
    ) -> FloatTensor<Self> {
        embedding::cube::backward(bytes, dy, rows)
    }

    fn cross_entropy(
        logits: FloatTensor<Self>,
        targets: IntTensor<Self>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        cross_entropy::cube::forward(logits, targets)
    }

    fn cross_entropy_backward(
        logits: FloatTensor<Self>,
        targets: IntTensor<Self>,
        log_sum_exp: FloatTensor<Self>,
        dloss: FloatTensor<Self>,
        dtype: DType,
    ) -> FloatTensor<Self> {
        cross_entropy::cube::backward(logits, targets, log_sum_exp, dloss, dtype)
    }

    fn product(
        a: FloatTensor<Self>,
        b: FloatTensor<Self>,
        how: Product,
        target: Target<FloatTensor<Self>>,
    ) -> FloatTensor<Self> {
        linear::cube::product(a, b, how, target)
    }

    fn rounded<const N: usize>(
        tensors: [FloatTensor<Self>; N],
        dtype: DType,
    ) -> [FloatTensor<Self>; N] {
        mamba_layer::cube::rounded(tensors, dtype)
    }

    fn decay_rates(a_log: FloatTensor<Self>) -> FloatTensor<Self> {
        mamba_layer::cube::decay_rates(a_log)
    }

    fn columns(tensor: &FloatTensor<Self>, from: usize, to: usize) -> FloatTensor<Self> {
        cube::columns(tensor, from, to)
    }

    fn with_parts(like: &FloatTensor<Self>, parts: &[usize]) -> Option<FloatTensor<Self>> {
        let whole = cube::empty_shape(like, like.meta.shape().clone(), like.dtype);
        parts
            .iter()
            .all(|from| cube::shares_columns(&whole, *from))
            .then_some(whole)
    }

    fn adamw_steps(
        updates: Vec<RawUpdate<FloatTensor<Self>>>,
        grad_scale: FloatTensor<Self>,
        step: AdamwStep,
    ) -> Vec<[FloatTensor<Self>; 3]> {
        adamw::cube::steps(updates, grad_scale, step)
    }

    fn adamw_int8_step(
        param: FloatTensor<Self>,
        grad: FloatTensor<Self>,
        moments: RawMoments<Self>,
        grad_scale: FloatTensor<Self>,
        step: AdamwStep,
    ) -> (FloatTensor<Self>, RawMoments<Self>) {
        adamw::int8::cube::step(param, grad, moments, grad_scale, step)
    }

    fn sum_squares(tensors: Vec<FloatTensor<Self>>) -> FloatTensor<Self> {
        sum_squares::cube::sum_squares(tensors)
    }
}
