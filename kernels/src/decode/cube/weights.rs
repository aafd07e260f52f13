//! The weights as the kernels read them.

use burn::backend::DispatchTensorKind;
use burn::tensor::{DType, Tensor};
use burn_cubecl::tensor::CubeTensor;

use super::super::{DecodeLayer, DecodeModel};
use crate::cube::contiguous;
use crate::cube::math::LOG2E;

/// The weights of all layers, each kind in one buffer.
#[derive(Clone, Debug)]
pub(super) struct Weights {
    /// `[rows, D]`, f32.
    pub embedding: CubeTensor,
    /// `[layers, 2E, D]`.
    pub in_proj: CubeTensor,
    /// `[layers, E, R + 2N]`; R is that of whole words, here and below.
    pub x_proj: CubeTensor,
    /// `[layers, E, R]`.
    pub dt_proj: CubeTensor,
    /// `[layers, D, E]`.
    pub out_proj: CubeTensor,
    /// `[V, D]`.
    pub head: CubeTensor,
    /// `[2, D]`, f32: weight and bias of the last norm.
    pub norm_f: CubeTensor,
    /// `[layers, 3, D]`, f32: weight and bias of the norm, bias of `out_proj`.
    pub widths: CubeTensor,
    /// `[layers, E, K + 5]`, f32: taps and bias of the convolution, biases of x and z, of Δ, d.
    pub channels: CubeTensor,
    /// `[layers, E, N]`, f32: decay rates times log₂ e.
    pub rates: CubeTensor,
    pub layers: usize,
    /// Whether `out_proj` has a bias.
    pub biased: bool,
    pub eps: f32,
}

/// The raw tensor of a tensor on a GPU, without gaps.
pub(super) fn raw<const D: usize>(tensor: Tensor<D>) -> CubeTensor {
    match tensor.into_dispatch().kind {
        DispatchTensorKind::Cube(tensor) => contiguous(tensor.float()),
        other => panic!("decode: a tensor of another backend: {other:?}"),
    }
}

/// The rank, rounded up to whole words of weights of the type.
pub(super) fn whole_words(rank: usize, dtype: DType) -> usize {
    rank.next_multiple_of((4 / dtype.size()).max(1))
}

impl Weights {
    pub(super) fn new(model: &DecodeModel, dtype: DType) -> Self {
        let layers = &model.layers;
        let device = model.embedding.device();
        let [_, width] = model.embedding.dims();
        let [inner, _] = layers[0].rates.dims();
        let zeros = |size: usize| Tensor::<1>::zeros([size], &device);
        // The rank is rounded up to whole words of weights.
        let rank = layers[0].dt_proj.dims()[0];
        let more = whole_words(rank, dtype) - rank;
        let x_proj = |layer: &DecodeLayer| {
            let columns = layer.x_proj.clone();
            if more == 0 {
                return columns;
            }
            let own = columns.clone().narrow(1, 0, rank);
            let others = columns.dims()[1] - rank;
            let rest = columns.narrow(1, rank, others);
            Tensor::cat(vec![own, Tensor::zeros([inner, more], &device), rest], 1)
        };
        let dt_proj = |layer: &DecodeLayer| {
            let rows = layer.dt_proj.clone();
            if more == 0 {
                return rows;
            }
            Tensor::cat(vec![rows, Tensor::zeros([more, inner], &device)], 0)
        };
        let or_zero =
            |bias: &Option<Tensor<1>>, size: usize| bias.clone().unwrap_or_else(|| zeros(size));
        // Layer by layer, so that no more than one of them is there twice.
        let all = |part: &dyn Fn(&DecodeLayer) -> Tensor<2>| {
            raw(Tensor::stack::<3>(layers.iter().map(part).collect(), 0))
        };
        let widths = |layer: &DecodeLayer| {
            let rows = vec![
                layer.norm.clone(),
                or_zero(&layer.norm_bias, width),
                or_zero(&layer.out_bias, width),
            ];
            Tensor::stack::<2>(rows, 0)
        };
        let channels = |layer: &DecodeLayer| {
            let in_bias = or_zero(&layer.in_bias, 2 * inner);
            let columns = vec![
                or_zero(&layer.conv_bias, inner),
                in_bias.clone().narrow(0, 0, inner),
                in_bias.narrow(0, inner, inner),
                or_zero(&layer.dt_bias, inner),
                layer.d.clone(),
            ];
            Tensor::cat(vec![layer.conv.clone(), Tensor::stack::<2>(columns, 1)], 1)
        };
        let head = match &model.head {
            Some(head) => head.clone().transpose(),
            None => model.embedding.clone(),
        };
        let norm_f = match &model.norm_f {
            Some((weight, bias)) => vec![weight.clone(), or_zero(bias, width)],
            None => vec![zeros(width), zeros(width)],
        };
        Self {
            embedding: raw(model.embedding.clone()),
            in_proj: all(&|layer| layer.in_proj.clone().cast(dtype).transpose()),
            x_proj: all(&|layer| x_proj(layer).cast(dtype)),
            dt_proj: all(&|layer| dt_proj(layer).cast(dtype).transpose()),
            out_proj: all(&|layer| layer.out_proj.clone().cast(dtype).transpose()),
            head: raw(head.slice([0..model.vocabulary, 0..width]).cast(dtype)),
            norm_f: raw(Tensor::stack::<2>(norm_f, 0)),
            widths: all(&widths),
            channels: all(&channels),
            rates: all(&|layer| layer.rates.clone() * LOG2E),
            layers: layers.len(),
            biased: layers.iter().any(|layer| layer.out_bias.is_some()),
            eps: model.eps,
        }
    }

    /// Bytes of the largest buffer.
    pub(super) fn largest(&self) -> usize {
        let tensors = [&self.in_proj, &self.out_proj, &self.rates, &self.embedding];
        let bytes = |tensor: &&CubeTensor| tensor.meta.num_elements() * tensor.dtype.size();
        tensors.iter().map(bytes).max().unwrap_or(0)
    }
}
