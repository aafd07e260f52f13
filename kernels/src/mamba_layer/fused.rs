//! The layer from the backends' kernels, forward and backward, on raw tensors.

use burn::backend::TensorMetadata;
use burn::backend::tensor::FloatTensor;
use burn::tensor::{DType, Shape};

use super::{LayerMemory, LayerSettings, LayerWeights};
use crate::MambaKernels;
use crate::causal_conv1d::{ConvInputs, ConvOutputs};
use crate::linear::autodiff::rounded;
use crate::linear::{Product, Target};
use crate::norm::{NormalizeBackward, NormalizeInputs, Normalized};
use crate::selective_scan::{ScanInputs, ScanRequest};

/// Everything that forward and backward are given alike; `T` is a raw tensor.
#[derive(Clone, Debug)]
pub(crate) struct Layer<T> {
    pub weights: LayerWeights<T>,
    pub memory: LayerMemory<T>,
    pub settings: LayerSettings,
}

/// Results of the forward pass.
#[derive(Clone, Debug)]
pub(crate) struct LayerOutputs<T> {
    /// `[B, L, D]`, f32.
    pub stream: T,
    /// `[B, E, N]`.
    pub h: T,
    /// `[B, E, K-1]`.
    pub window: T,
}

/// What backward needs of the forward pass.
#[derive(Clone, Debug)]
pub(crate) struct LayerSaved<T> {
    normalized: Normalized<T>,
    /// `[B, L, 2E]`, if [`LayerSettings::keep`].
    xz: Option<T>,
    /// `[B, L, R + 2N]`: low-rank step sizes, B, C.
    low: T,
    /// The scan's own.
    states: T,
    /// Decay rates, `[E, N]`.
    rates: T,
}

/// Gradients.
#[derive(Clone, Debug)]
pub(crate) struct LayerGrads<T> {
    pub stream: T,
    pub weights: LayerWeights<T>,
}

/// Sizes of the layer.
#[derive(Clone, Copy)]
struct Sizes {
    batch: usize,
    length: usize,
    inner: usize,
    states: usize,
    rank: usize,
}

type Raw<B> = FloatTensor<B>;

fn dims<const N: usize>(tensor: &impl TensorMetadata) -> [usize; N] {
    tensor.shape().dims()
}

/// A `[B, L, D]` tensor as `[B · L, D]`.
fn matrix<B: MambaKernels>(tensor: Raw<B>) -> Raw<B> {
    let [batch, length, width] = dims(&tensor);
    B::float_reshape(tensor, Shape::new([batch * length, width]))
}

impl<T: TensorMetadata + Clone> Layer<T> {
    /// The layer with the weights of its products in its data type.
    fn rounded<B>(&self) -> Self
    where
        B: MambaKernels<FloatTensorPrimitive = T>,
    {
        let mut layer = self.clone();
        let it = &mut layer.weights;
        let products = [&it.in_proj, &it.x_proj, &it.dt_proj, &it.out_proj].map(T::clone);
        [it.in_proj, it.x_proj, it.dt_proj, it.out_proj] =
            B::rounded(products, self.settings.dtype);
        layer
    }

    fn sizes(&self, stream: &T) -> Sizes {
        let [batch, length, _] = dims(stream);
        let [inner, states] = dims(&self.weights.a_log);
        let [rank, _] = dims(&self.weights.dt_proj);
        Sizes {
            batch,
            length,
            inner,
            states,
            rank,
        }
    }

    /// `x · weight` in the layer's data type.
    fn project<B>(&self, x: Raw<B>, weight: &Raw<B>) -> Raw<B>
    where
        B: MambaKernels<FloatTensorPrimitive = T>,
    {
        let LayerSettings { dtype, tf32, .. } = self.settings;
        B::product(x, weight.clone(), Product::plain(dtype, tf32), Target::New)
    }

    /// `dy · weightᵀ` in the layer's data type.
    fn project_back<B>(&self, dy: Raw<B>, weight: &Raw<B>, target: Target<Raw<B>>) -> Raw<B>
    where
        B: MambaKernels<FloatTensorPrimitive = T>,
    {
        let LayerSettings { dtype, tf32, .. } = self.settings;
        let how = Product::right_transposed(dtype, tf32);
        B::product(dy, weight.clone(), how, target)
    }

    /// `xᵀ · dy`: a weight's gradient, f32.
    fn weight_gradient<B>(&self, x: Raw<B>, dy: Raw<B>) -> Raw<B>
    where
        B: MambaKernels<FloatTensorPrimitive = T>,
    {
        let how = Product::left_transposed(DType::F32, self.settings.tf32);
        B::product(x, dy, how, Target::New)
    }

    fn in_proj<B>(&self, normed: Raw<B>) -> Raw<B>
    where
        B: MambaKernels<FloatTensorPrimitive = T>,
    {
        let xz = self.project::<B>(normed, &self.weights.in_proj);
        match &self.weights.in_bias {
            Some(bias) => add_row::<B>(xz, bias.clone()),
            None => xz,
        }
    }

    /// The convolution's inputs; `x` is a view of `xz`.
    fn conv<B>(&self, xz: &Raw<B>, inner: usize) -> ConvInputs<Raw<B>>
    where
        B: MambaKernels<FloatTensorPrimitive = T>,
    {
        ConvInputs {
            x: B::columns(xz, 0, inner),
            weight: self.weights.conv.clone(),
            bias: self.weights.conv_bias.clone(),
            initial_window: self.memory.window.clone(),
            resets: self.memory.resets.clone(),
            silu: true,
        }
    }

    /// Decay rates of the recurrence, `[E, N]`.
    fn rates<B>(&self) -> Raw<B>
    where
        B: MambaKernels<FloatTensorPrimitive = T>,
    {
        match &self.memory.rates {
            Some(rates) => rates.clone(),
            None => B::decay_rates(self.weights.a_log.clone()),
        }
    }

    /// The scan's inputs; B, C and the gate are views.
    fn scan<B>(
        &self,
        sizes: Sizes,
        rates: Raw<B>,
        u: Raw<B>,
        low: &Raw<B>,
        xz: &Raw<B>,
    ) -> ScanInputs<Raw<B>>
    where
        B: MambaKernels<FloatTensorPrimitive = T>,
    {
        let Sizes {
            inner,
            states,
            rank,
            ..
        } = sizes;
        let delta = self.project::<B>(B::columns(low, 0, rank), &self.weights.dt_proj);
        ScanInputs {
            u,
            delta,
            a: rates,
            b: B::columns(low, rank, rank + states),
            c: B::columns(low, rank + states, rank + 2 * states),
            d: Some(self.weights.d.clone()),
            z: Some(B::columns(xz, inner, 2 * inner)),
            delta_bias: self.weights.dt_bias.clone(),
            initial_state: self.memory.h.clone(),
            resets: self.memory.resets.clone(),
            delta_softplus: true,
        }
    }
}

/// `x + row` for every row of `x`, in the data type of `x`.
fn add_row<B: MambaKernels>(x: Raw<B>, row: Raw<B>) -> Raw<B> {
    let [width] = dims(&row);
    let row = B::float_reshape(rounded::<B>(row, x.dtype()), Shape::new([1, 1, width]));
    B::float_add(x, row)
}

/// Sum over the rows, f32.
fn sum_rows<B: MambaKernels>(x: Raw<B>) -> Raw<B> {
    let x = matrix::<B>(rounded::<B>(x, DType::F32));
    let [_, width] = dims(&x);
    B::float_reshape(B::float_sum_dim(x, 0), Shape::new([width]))
}

impl<T: TensorMetadata + Clone> Layer<T> {
    /// The inputs of its norm.
    fn norm<B>(&self, stream: &Raw<B>) -> NormalizeInputs<Raw<B>>
    where
        B: MambaKernels<FloatTensorPrimitive = T>,
    {
        NormalizeInputs {
            x: matrix::<B>(stream.clone()),
            eps: self.settings.eps,
            kind: self.settings.norm,
            dtype: self.settings.dtype,
        }
    }
}

/// The forward pass, and what backward needs of it.
pub(crate) fn forward<B: MambaKernels>(
    layer: &Layer<Raw<B>>,
    stream: Raw<B>,
) -> (LayerOutputs<Raw<B>>, LayerSaved<Raw<B>>) {
    let (weight, bias) = (&layer.weights.norm, &layer.weights.norm_bias);
    let inputs = layer.norm::<B>(&stream);
    let (normalized, normed) = B::normalize_affine(inputs, weight.clone(), bias.clone());
    let (outputs, mixed) = forward_mixer::<B>(layer, stream, normed);
    let saved = LayerSaved {
        normalized,
        xz: layer.settings.keep.then_some(mixed.xz),
        low: mixed.low,
        states: mixed.states,
        rates: mixed.rates,
    };
    (outputs, saved)
}

/// The forward pass alone, with the same bits.
pub(crate) fn infer<B: MambaKernels>(
    layer: &Layer<Raw<B>>,
    stream: Raw<B>,
) -> LayerOutputs<Raw<B>> {
    let (weight, bias) = (&layer.weights.norm, &layer.weights.norm_bias);
    let normed = B::normed(layer.norm::<B>(&stream), weight.clone(), bias.clone());
    forward_mixer::<B>(layer, stream, normed).0
}

/// What the forward pass computes on its way behind the norm; see [`LayerSaved`].
struct Mixed<T> {
    xz: T,
    low: T,
    states: T,
    rates: T,
}

/// The layer behind its norm, for `normed` `[B · L, D]`.
fn forward_mixer<B: MambaKernels>(
    layer: &Layer<Raw<B>>,
    stream: Raw<B>,
    normed: Raw<B>,
) -> (LayerOutputs<Raw<B>>, Mixed<Raw<B>>) {
    let sizes = layer.sizes(&stream);
    let layer = layer.rounded::<B>();
    let weights = &layer.weights;
    let xz = layer.in_proj::<B>(rows_of::<B>(normed, sizes));
    let ConvOutputs { y: u, last_window } = B::causal_conv1d(layer.conv::<B>(&xz, sizes.inner));
    let low = layer.project::<B>(u.clone(), &weights.x_proj);
    let rates = layer.rates::<B>();
    let scan = B::selective_scan(layer.scan::<B>(sizes, rates.clone(), u, &low, &xz));
    let out = B::product(
        scan.y,
        weights.out_proj.clone(),
        Product::plain(DType::F32, layer.settings.tf32),
        Target::Add(stream),
    );
    let outputs = LayerOutputs {
        stream: match &weights.out_bias {
            Some(bias) => add_row::<B>(out, bias.clone()),
            None => out,
        },
        h: scan.last_state,
        window: last_window,
    };
    let mixed = Mixed {
        xz,
        low,
        states: scan.saved,
        rates,
    };
    (outputs, mixed)
}

/// A `[B · L, D]` tensor as `[B, L, D]`.
fn rows_of<B: MambaKernels>(tensor: Raw<B>, sizes: Sizes) -> Raw<B> {
    let [_, width] = dims(&tensor);
    B::float_reshape(tensor, Shape::new([sizes.batch, sizes.length, width]))
}

/// Gradients for the gradient `dout` of the layer's output stream, `[B, L, D]`, f32.
pub(crate) fn backward<B: MambaKernels>(
    layer: &Layer<Raw<B>>,
    saved: LayerSaved<Raw<B>>,
    dout: Raw<B>,
) -> LayerGrads<Raw<B>> {
    let sizes = layer.sizes(&dout);
    let layer = &layer.rounded::<B>();
    let weights = &layer.weights;
    let LayerSaved {
        normalized,
        xz,
        low,
        states,
        rates,
    } = saved;
    // Computed where it is needed, twice if `xz` was not kept: memory peaks between the two places.
    let normed = || {
        let normed = B::affine(
            normalized.hat.clone(),
            weights.norm.clone(),
            weights.norm_bias.clone(),
        );
        rows_of::<B>(normed, sizes)
    };
    let xz = xz.unwrap_or_else(|| layer.in_proj::<B>(normed()));

    let mixed = backward_mixer::<B>(layer, sizes, &xz, [low, states, rates], &dout);
    let in_bias = weights
        .in_bias
        .as_ref()
        .map(|_| sum_rows::<B>(mixed.xz.clone()));
    drop(xz);
    let in_proj = layer.weight_gradient::<B>(normed(), mixed.xz.clone());
    let dnormed = layer.project_back::<B>(mixed.xz, &weights.in_proj, Target::New);
    let out_bias = weights
        .out_bias
        .as_ref()
        .map(|_| sum_rows::<B>(dout.clone()));
    let norm = B::normalize_backward(NormalizeBackward {
        hat: normalized.hat,
        rstd: normalized.rstd,
        weight: weights.norm.clone(),
        has_bias: weights.norm_bias.is_some(),
        kind: layer.settings.norm,
        dy: matrix::<B>(dnormed),
        dout: matrix::<B>(dout),
    });
    LayerGrads {
        stream: rows_of::<B>(norm.dx, sizes),
        weights: LayerWeights {
            norm: norm.weight,
            norm_bias: norm.bias,
            in_proj,
            in_bias,
            out_bias,
            ..mixed.weights
        },
    }
}

/// Gradients of what lies between `xz` and the output stream. The places of the other parameters'
/// gradients hold placeholders.
struct MixerGrads<T> {
    /// `[B, L, 2E]`.
    xz: T,
    weights: LayerWeights<T>,
}

fn backward_mixer<B: MambaKernels>(
    layer: &Layer<Raw<B>>,
    sizes: Sizes,
    xz: &Raw<B>,
    [low, states, rates]: [Raw<B>; 3],
    dout: &Raw<B>,
) -> MixerGrads<Raw<B>> {
    let Sizes {
        inner,
        states: n,
        rank,
        ..
    } = sizes;
    let dout = rounded::<B>(dout.clone(), layer.settings.dtype);
    let weights = &layer.weights;
    let u = B::causal_conv1d(layer.conv::<B>(xz, inner)).y;
    let scan = layer.scan::<B>(sizes, rates.clone(), u.clone(), &low, xz);
    let dy = layer.project_back::<B>(dout.clone(), &weights.out_proj, Target::New);

    // Gradients of parts of one tensor are written into its place where the backend can.
    let dxz = B::with_parts(xz, &[0, inner]);
    let dlow = B::with_parts(&low, &[0, rank, rank + n]);
    let part = |whole: &Option<Raw<B>>, from, to| whole.as_ref().map(|t| B::columns(t, from, to));
    let request = ScanRequest {
        z: part(&dxz, inner, 2 * inner),
        b: part(&dlow, rank, rank + n),
        c: part(&dlow, rank + n, rank + 2 * n),
        y: true,
        // Free until the convolution's gradient goes there.
        y_into: part(&dxz, 0, inner),
    };
    let grads = B::selective_scan_backward(scan, states, dy, request);
    let y = grads.y.expect("asked for");
    let out_proj = layer.weight_gradient::<B>(y, dout);

    let low_rank = B::columns(&low, 0, rank);
    let dt_proj = layer.weight_gradient::<B>(low_rank, grads.delta.clone());
    let target = part(&dlow, 0, rank).map_or(Target::New, Target::Into);
    let dlow_rank = layer.project_back::<B>(grads.delta, &weights.dt_proj, target);
    let dlow = dlow.unwrap_or_else(|| B::float_cat(vec![dlow_rank, grads.b, grads.c], 2));
    let x_proj = layer.weight_gradient::<B>(u, dlow.clone());
    let du = layer.project_back::<B>(dlow, &weights.x_proj, Target::Add(grads.u));

    let conv = B::causal_conv1d_backward(layer.conv::<B>(xz, inner), du, part(&dxz, 0, inner));
    let dz = grads.z.expect("the scan has a gate");
    let dxz = dxz.unwrap_or_else(|| B::float_cat(vec![conv.x, dz], 2));
    MixerGrads {
        weights: LayerWeights {
            conv: conv.weight,
            conv_bias: conv.bias,
            x_proj,
            dt_proj,
            dt_bias: grads.delta_bias,
            // The rates are -exp(a_log): their derivative is themselves.
            a_log: B::float_mul(grads.a, rates),
            d: grads.d.expect("the scan has a skip"),
            out_proj,
            ..weights.clone()
        },
        xz: dxz,
    }
}
