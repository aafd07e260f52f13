//! The CPU: native Rust over all cores.

use burn::backend::Flex;
use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::tensor::DType;

use crate::MambaKernels;
use crate::adamw::int8::RawMoments;
use crate::adamw::{self, AdamwStep, RawUpdate};
use crate::add_norm::{self, NormGrads, NormInputs, NormOutputs, NormSaved};
use crate::causal_conv1d::{self, ConvGrads, ConvInputs, ConvOutputs};
use crate::cross_entropy;
use crate::embedding;
use crate::linear::{self, Product, Target};
use crate::norm::{self, NormalizeBackward, NormalizeGrads, NormalizeInputs, Normalized};
use crate::selective_scan::{self, ScanGrads, ScanInputs, ScanOutputs, ScanRequest};
use crate::sum_squares;

impl MambaKernels for Flex {
    fn selective_scan(inputs: ScanInputs<FloatTensor<Self>>) -> ScanOutputs<FloatTensor<Self>> {
        selective_scan::flex::forward(inputs)
    }

    fn selective_scan_backward(
        inputs: ScanInputs<FloatTensor<Self>>,
        saved: FloatTensor<Self>,
        dy: FloatTensor<Self>,
        request: ScanRequest<FloatTensor<Self>>,
    ) -> ScanGrads<FloatTensor<Self>> {
        selective_scan::flex::backward(inputs, saved, dy, request)
    }

    fn causal_conv1d(inputs: ConvInputs<FloatTensor<Self>>) -> ConvOutputs<FloatTensor<Self>> {
        causal_conv1d::flex::forward(inputs)
    }

    fn causal_conv1d_backward(
        inputs: ConvInputs<FloatTensor<Self>>,
        dy: FloatTensor<Self>,
        _dx_into: Option<FloatTensor<Self>>,
    ) -> ConvGrads<FloatTensor<Self>> {
        causal_conv1d::flex::backward(inputs, dy)
    }

    fn add_norm(inputs: NormInputs<FloatTensor<Self>>) -> NormOutputs<FloatTensor<Self>> {
        add_norm::flex::forward(inputs)
    }

    fn add_norm_backward(
        saved: NormSaved<FloatTensor<Self>>,
        dy: FloatTensor<Self>,
    ) -> NormGrads<FloatTensor<Self>> {
        add_norm::flex::backward(saved, dy)
    }

    fn normalize(inputs: NormalizeInputs<FloatTensor<Self>>) -> Normalized<FloatTensor<Self>> {
        norm::flex::normalize(inputs)
    }

    fn affine(
        hat: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        bias: Option<FloatTensor<Self>>,
    ) -> FloatTensor<Self> {
        norm::flex::affine(hat, weight, bias)
    }

    fn normalize_affine(
        inputs: NormalizeInputs<FloatTensor<Self>>,
        weight: FloatTensor<Self>,
        bias: Option<FloatTensor<Self>>,
    ) -> (Normalized<FloatTensor<Self>>, FloatTensor<Self>) {
        norm::flex::normalize_affine(inputs, weight, bias)
    }

    fn normalize_backward(
        inputs: NormalizeBackward<FloatTensor<Self>>,
    ) -> NormalizeGrads<FloatTensor<Self>> {
        norm::flex::backward(inputs)
    }

    fn byte_embedding(weight: FloatTensor<Self>, bytes: IntTensor<Self>) -> FloatTensor<Self> {
        embedding::flex::forward(weight, bytes)
    }

    fn byte_embedding_backward(
        bytes: IntTensor<Self>,
        dy: FloatTensor<Self>,
        rows: usize,
    ) -> FloatTensor<Self> {
        embedding::flex::backward(bytes, dy, rows)
    }

    fn cross_entropy(
        logits: FloatTensor<Self>,
        targets: IntTensor<Self>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        cross_entropy::flex::forward(logits, targets)
    }

    fn cross_entropy_backward(
        logits: FloatTensor<Self>,
        targets: IntTensor<Self>,
        log_sum_exp: FloatTensor<Self>,
        dloss: FloatTensor<Self>,
        dtype: DType,
    ) -> FloatTensor<Self> {
        cross_entropy::flex::backward(logits, targets, log_sum_exp, dloss, dtype)
    }

    fn product(
        a: FloatTensor<Self>,
        b: FloatTensor<Self>,
        how: Product,
        target: Target<FloatTensor<Self>>,
    ) -> FloatTensor<Self> {
        linear::flex::product(a, b, how, target)
    }

    fn adamw_steps(
        updates: Vec<RawUpdate<FloatTensor<Self>>>,
        grad_scale: FloatTensor<Self>,
        step: AdamwStep,
    ) -> Vec<[FloatTensor<Self>; 3]> {
        adamw::flex::steps(updates, grad_scale, step)
    }

    fn adamw_int8_step(
        param: FloatTensor<Self>,
        grad: FloatTensor<Self>,
        moments: RawMoments<Self>,
        grad_scale: FloatTensor<Self>,
        step: AdamwStep,
    ) -> (FloatTensor<Self>, RawMoments<Self>) {
        adamw::int8::flex::step(param, grad, moments, grad_scale, step)
    }

    fn sum_squares(tensors: Vec<FloatTensor<Self>>) -> FloatTensor<Self> {
        sum_squares::flex::sum_squares(tensors)
    }
}
