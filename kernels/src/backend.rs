//! What a backend provides ([`MambaKernels`]) and how Burn's run-time devices reach it
//! ([`MambaOps`]).
//!
//! `MambaKernels` is the one trait to implement for a new backend: forward and backward of every
//! operation on raw tensors, with no autodiff. `MambaOps` carries no computation: Burn's macro
//! makes it dispatch on a tensor's device, and its autodiff implementation pairs each forward with
//! its backward.

use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::backend::{
    AutodiffBackend, Backend, BackendTensor, Dispatch, DispatchAutodiffContext, DispatchTensor,
    DispatchTensorKind, ExtensionType, TensorMetadata, backend_extension,
};
use burn::tensor::{DType, Slice, Tensor};
use burn_autodiff::Autodiff;
use burn_autodiff::checkpoint::strategy::CheckpointStrategy;

use crate::adamw::int8::RawMoments;
use crate::adamw::{AdamwStep, RawUpdate};
use crate::add_norm::{NormGrads, NormInputs, NormKind, NormOutputs, NormSaved};
use crate::causal_conv1d::{ConvGrads, ConvInputs, ConvOutputs};
use crate::linear::{self, Product, Target};
use crate::mamba_layer::{self, LayerSettings, LayerTensors};
use crate::norm::{NormalizeBackward, NormalizeGrads, NormalizeInputs, Normalized};
use crate::selective_scan::{ScanGrads, ScanInputs, ScanOutputs, ScanRequest};

/// Forward and backward of every operation on one backend's raw tensors.
///
/// Activations are `[B, L, E]`, channel-last. Activation tensors may be f32, f16 or bf16; states,
/// `a`, `d`, `delta_bias`, norm and convolution parameters and all sums are f32. Implementations
/// are deterministic: the same inputs give the same bits.
pub trait MambaKernels: Backend {
    /// See [`selective_scan`](crate::selective_scan::selective_scan).
    fn selective_scan(inputs: ScanInputs<FloatTensor<Self>>) -> ScanOutputs<FloatTensor<Self>>;

    /// Gradients of [`selective_scan`](Self::selective_scan) with respect to its inputs.
    ///
    /// `saved` is the `saved` output of the forward pass (its layout is the backend's own), `dy`
    /// the gradient of `y`, `[B, L, E]`. The buffers of `inputs.delta` and `dy` may become those of the
    /// gradients of delta and u, where nothing else holds them.
    fn selective_scan_backward(
        inputs: ScanInputs<FloatTensor<Self>>,
        saved: FloatTensor<Self>,
        dy: FloatTensor<Self>,
        request: ScanRequest<FloatTensor<Self>>,
    ) -> ScanGrads<FloatTensor<Self>>;

    /// See [`causal_conv1d`](crate::causal_conv1d::causal_conv1d).
    fn causal_conv1d(inputs: ConvInputs<FloatTensor<Self>>) -> ConvOutputs<FloatTensor<Self>>;

    /// Gradients of [`causal_conv1d`](Self::causal_conv1d) for the output gradient `dy`, `[B, L, E]`.
    ///
    /// `dx_into`, `[B, L, E]` in the data type of `x`, is where the gradient of `x` goes on backends
    /// that write in place; others return a new tensor. It may be some columns of a wider tensor.
    fn causal_conv1d_backward(
        inputs: ConvInputs<FloatTensor<Self>>,
        dy: FloatTensor<Self>,
        dx_into: Option<FloatTensor<Self>>,
    ) -> ConvGrads<FloatTensor<Self>>;

    /// See [`add_norm`](crate::add_norm::add_norm).
    fn add_norm(inputs: NormInputs<FloatTensor<Self>>) -> NormOutputs<FloatTensor<Self>>;

    /// Gradients of the normalisation half of [`add_norm`](Self::add_norm) for the gradient `dy`,
    /// `[M, D]`, of its normalised output. The addition's own gradient is the identity.
    fn add_norm_backward(
        saved: NormSaved<FloatTensor<Self>>,
        dy: FloatTensor<Self>,
    ) -> NormGrads<FloatTensor<Self>>;

    /// Normalised rows without weight and bias; see [`norm`](crate::norm).
    fn normalize(inputs: NormalizeInputs<FloatTensor<Self>>) -> Normalized<FloatTensor<Self>>;

    /// `hat · weight + bias` over `[M, D]` rows, computed in f32, in the data type of `hat`; weight
    /// and bias are `[D]`, f32.
    fn affine(
        hat: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        bias: Option<FloatTensor<Self>>,
    ) -> FloatTensor<Self>;

    /// [`normalize`](Self::normalize) and [`affine`](Self::affine) in one pass, with the bits of
    /// the two.
    fn normalize_affine(
        inputs: NormalizeInputs<FloatTensor<Self>>,
        weight: FloatTensor<Self>,
        bias: Option<FloatTensor<Self>>,
    ) -> (Normalized<FloatTensor<Self>>, FloatTensor<Self>);

    /// What [`normalize_affine`](Self::normalize_affine) returns second, where nothing is kept for
    /// backward.
    fn normed(
        inputs: NormalizeInputs<FloatTensor<Self>>,
        weight: FloatTensor<Self>,
        bias: Option<FloatTensor<Self>>,
    ) -> FloatTensor<Self> {
        Self::normalize_affine(inputs, weight, bias).1
    }

    /// Gradients of [`normalize_affine`](Self::normalize_affine), with the gradient that bypasses
    /// the normalisation added.
    fn normalize_backward(
        inputs: NormalizeBackward<FloatTensor<Self>>,
    ) -> NormalizeGrads<FloatTensor<Self>>;

    /// Rows of `weight` `[V, D]` (f32) that `bytes` `[M]` name, `[M, D]`, f32.
    fn byte_embedding(weight: FloatTensor<Self>, bytes: IntTensor<Self>) -> FloatTensor<Self>;

    /// Gradient of the `rows` = V rows of [`byte_embedding`](Self::byte_embedding)'s weight, `[V, D]`, for
    /// the gradient `dy`, `[M, D]` (f32), of its output.
    fn byte_embedding_backward(
        bytes: IntTensor<Self>,
        dy: FloatTensor<Self>,
        rows: usize,
    ) -> FloatTensor<Self>;

    /// Per-row loss and log-sum-exp, both `[M]` f32, of `logits` `[M, V]` and `targets` `[M]`.
    fn cross_entropy(
        logits: FloatTensor<Self>,
        targets: IntTensor<Self>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>);

    /// Gradient of the logits, `[M, V]` in `dtype`, for per-row loss gradients `dloss` `[M]`.
    fn cross_entropy_backward(
        logits: FloatTensor<Self>,
        targets: IntTensor<Self>,
        log_sum_exp: FloatTensor<Self>,
        dloss: FloatTensor<Self>,
        dtype: DType,
    ) -> FloatTensor<Self>;

    /// The matrix product `op(a) · op(b)`, where every axis of an operand before its last counts as
    /// rows. The rows of an `a` that is not transposed keep their axes in the result.
    ///
    /// Operands have one data type; sums are f32.
    fn product(
        a: FloatTensor<Self>,
        b: FloatTensor<Self>,
        how: Product,
        target: Target<FloatTensor<Self>>,
    ) -> FloatTensor<Self>;

    /// The tensors in `dtype`, those of another type rounded. For weights that products take.
    fn rounded<const N: usize>(
        tensors: [FloatTensor<Self>; N],
        dtype: DType,
    ) -> [FloatTensor<Self>; N] {
        tensors.map(|tensor| match tensor.dtype() {
            same if same == dtype => tensor,
            _ => Self::float_cast(tensor, dtype.into()),
        })
    }

    /// Decay rates of the recurrence, `-exp(a_log)`, for `a_log` `[E, N]`, f32.
    fn decay_rates(a_log: FloatTensor<Self>) -> FloatTensor<Self> {
        Self::float_neg(Self::float_exp(a_log))
    }

    /// Columns `from..to` of the last axis: a view where the backend has views, else a copy.
    fn columns(tensor: &FloatTensor<Self>, from: usize, to: usize) -> FloatTensor<Self> {
        let shape = tensor.shape();
        let last = shape.num_dims() - 1;
        let slices: Vec<Slice> = (0..=last)
            .map(|axis| {
                if axis == last {
                    Slice::from(from..to)
                } else {
                    Slice::from(0..shape[axis])
                }
            })
            .collect();
        Self::float_slice(tensor.clone(), &slices)
    }

    /// An uninitialised tensor like `like` whose parts that begin at the columns `parts` can be
    /// written through [`columns`](Self::columns); `None` where the backend cannot.
    fn with_parts(like: &FloatTensor<Self>, parts: &[usize]) -> Option<FloatTensor<Self>> {
        let _ = (like, parts);
        None
    }

    /// See [`adamw_steps`](crate::adamw::adamw_steps): returns each parameter and its two moments,
    /// updated.
    fn adamw_steps(
        updates: Vec<RawUpdate<FloatTensor<Self>>>,
        grad_scale: FloatTensor<Self>,
        step: AdamwStep,
    ) -> Vec<[FloatTensor<Self>; 3]>;

    /// See [`adamw_int8_step`](crate::adamw::int8::adamw_int8_step): returns the parameter and its
    /// moments, updated.
    fn adamw_int8_step(
        param: FloatTensor<Self>,
        grad: FloatTensor<Self>,
        moments: RawMoments<Self>,
        grad_scale: FloatTensor<Self>,
        step: AdamwStep,
    ) -> (FloatTensor<Self>, RawMoments<Self>);

    /// See [`sum_squares`](crate::sum_squares::sum_squares): at least one tensor, of any shapes;
    /// returns `[1]`, f32.
    fn sum_squares(tensors: Vec<FloatTensor<Self>>) -> FloatTensor<Self>;
}

/// An optional tensor that Burn's dispatch macro can route (it does not take `Option` arguments).
#[derive(Clone, Debug, ExtensionType)]
pub enum OptionalTensor<B: Backend> {
    /// The tensor is given.
    Present(FloatTensor<B>),
    /// The tensor is not given.
    Absent,
}

impl<B: Backend> OptionalTensor<B> {
    /// The tensor, if it is given.
    pub fn into_option(self) -> Option<FloatTensor<B>> {
        match self {
            Self::Present(tensor) => Some(tensor),
            Self::Absent => None,
        }
    }
}

/// Any number of tensors that Burn's dispatch macro can route (it does not take `Vec` arguments).
#[derive(Clone, Debug)]
pub struct TensorList<B: Backend>(pub Vec<FloatTensor<B>>);

impl<B: Backend> TensorList<B> {
    /// The tensors in groups of `N`, of which there are whole ones only.
    pub(crate) fn into_groups<const N: usize>(self) -> Vec<[FloatTensor<B>; N]> {
        assert!(self.0.len().is_multiple_of(N), "groups of {N} tensors");
        let groups = self.0.len() / N;
        let mut tensors = self.0.into_iter();
        let mut next = |_| tensors.next().expect("counted");
        (0..groups)
            .map(|_| std::array::from_fn(&mut next))
            .collect()
    }
}

impl<B: Backend> ExtensionType<B> for TensorList<B> {
    type Target = TensorList<Dispatch>;

    fn map_to_dispatch<F>(self, map_kind: F, autodiff: DispatchAutodiffContext) -> Self::Target
    where
        F: Fn(BackendTensor<B>) -> DispatchTensorKind,
    {
        let wrap = |tensor| DispatchTensor {
            kind: map_kind(BackendTensor::Float(tensor)),
            autodiff,
        };
        TensorList(self.0.into_iter().map(wrap).collect())
    }

    fn map_from_dispatch<F>(target: Self::Target, unwrap_kind: F) -> Self
    where
        F: Fn(DispatchTensor) -> BackendTensor<B>,
    {
        let unwrap = |tensor| unwrap_kind(tensor).float();
        Self(target.0.into_iter().map(unwrap).collect())
    }

    fn routing_tensor(target: &Self::Target) -> Option<&DispatchTensor> {
        target.0.first()
    }

    fn routing_float_tensor(target: &Self::Target) -> Option<&DispatchTensor> {
        target.0.first()
    }

    fn autodiff_context(target: &Self::Target) -> DispatchAutodiffContext {
        let contexts = target.0.iter().map(|tensor| tensor.autodiff);
        contexts.fold(
            DispatchAutodiffContext::Disabled,
            DispatchAutodiffContext::merge,
        )
    }
}

/// A tensor of Burn's user-facing API as an optional argument of an operation.
pub(crate) fn optional<const D: usize>(tensor: Option<Tensor<D>>) -> OptionalTensor<Dispatch> {
    match tensor {
        Some(tensor) => OptionalTensor::Present(tensor.into_dispatch()),
        None => OptionalTensor::Absent,
    }
}

/// Run-time dispatch of the operations over Burn's devices. Not for direct use: call the functions
/// of the operations' modules.
#[backend_extension(
    Flex: cfg(feature = "flex"),
    Cube: cfg(feature = "cube"),
    Autodiff,
)]
pub trait MambaOps: Backend {
    /// Returns `(y, last_state)`.
    fn scan_op(
        u: FloatTensor<Self>,
        delta: FloatTensor<Self>,
        a: FloatTensor<Self>,
        b: FloatTensor<Self>,
        c: FloatTensor<Self>,
        #[extension_type] d: OptionalTensor<Self>,
        #[extension_type] z: OptionalTensor<Self>,
        #[extension_type] delta_bias: OptionalTensor<Self>,
        #[extension_type] initial_state: OptionalTensor<Self>,
        #[extension_type] resets: OptionalTensor<Self>,
        delta_softplus: bool,
    ) -> (FloatTensor<Self>, FloatTensor<Self>);

    /// Returns `(y, last_window)`.
    fn conv_op(
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        #[extension_type] bias: OptionalTensor<Self>,
        #[extension_type] initial_window: OptionalTensor<Self>,
        #[extension_type] resets: OptionalTensor<Self>,
        silu: bool,
    ) -> (FloatTensor<Self>, FloatTensor<Self>);

    /// Returns `(y, sum)`.
    fn norm_op(
        x: FloatTensor<Self>,
        #[extension_type] residual: OptionalTensor<Self>,
        weight: FloatTensor<Self>,
        #[extension_type] bias: OptionalTensor<Self>,
        eps: f32,
        kind: NormKind,
    ) -> (FloatTensor<Self>, FloatTensor<Self>);

    /// Returns the rows of all bytes.
    fn embedding_op(weight: FloatTensor<Self>, bytes: IntTensor<Self>) -> FloatTensor<Self>;

    /// Returns the loss of every row.
    fn cross_entropy_op(logits: FloatTensor<Self>, targets: IntTensor<Self>) -> FloatTensor<Self>;

    /// The product of two matrices, without gradient.
    fn product_op(a: FloatTensor<Self>, b: FloatTensor<Self>, how: Product) -> FloatTensor<Self>;

    /// See [`linear`](crate::linear::linear).
    fn linear_op(
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        how: Product,
    ) -> FloatTensor<Self>;

    /// See [`mamba_layer`](crate::mamba_layer::mamba_layer): returns `(stream, h, window)`.
    fn layer_op(
        stream: FloatTensor<Self>,
        #[extension_type] tensors: LayerTensors<Self>,
        settings: LayerSettings,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>);

    /// Takes four tensors of each parameter, those of [`RawUpdate`], and returns three: itself and
    /// its moments.
    fn adamw_op(
        #[extension_type] tensors: TensorList<Self>,
        grad_scale: FloatTensor<Self>,
        step: AdamwStep,
    ) -> TensorList<Self>;

    /// Returns the parameter and its moments.
    fn adamw_int8_op(
        param: FloatTensor<Self>,
        grad: FloatTensor<Self>,
        #[extension_type] moments: RawMoments<Self>,
        grad_scale: FloatTensor<Self>,
        step: AdamwStep,
    ) -> (FloatTensor<Self>, RawMoments<Self>);

    /// Returns the sum, `[1]`.
    fn sum_squares_op(#[extension_type] tensors: TensorList<Self>) -> FloatTensor<Self>;
}

/// On a backend without autodiff an operation is its kernel's forward pass.
macro_rules! forward_to_kernels {
    ($backend:ty) => {
        impl MambaOps for $backend {
            fn scan_op(
                u: FloatTensor<Self>,
                delta: FloatTensor<Self>,
                a: FloatTensor<Self>,
                b: FloatTensor<Self>,
                c: FloatTensor<Self>,
                d: OptionalTensor<Self>,
                z: OptionalTensor<Self>,
                delta_bias: OptionalTensor<Self>,
                initial_state: OptionalTensor<Self>,
                resets: OptionalTensor<Self>,
                delta_softplus: bool,
            ) -> (FloatTensor<Self>, FloatTensor<Self>) {
                let out = <Self as MambaKernels>::selective_scan(ScanInputs {
                    u,
                    delta,
                    a,
                    b,
                    c,
                    d: d.into_option(),
                    z: z.into_option(),
                    delta_bias: delta_bias.into_option(),
                    initial_state: initial_state.into_option(),
                    resets: resets.into_option(),
                    delta_softplus,
                });
                (out.y, out.last_state)
            }

            fn conv_op(
                x: FloatTensor<Self>,
                weight: FloatTensor<Self>,
                bias: OptionalTensor<Self>,
                initial_window: OptionalTensor<Self>,
                resets: OptionalTensor<Self>,
                silu: bool,
            ) -> (FloatTensor<Self>, FloatTensor<Self>) {
                let out = <Self as MambaKernels>::causal_conv1d(ConvInputs {
                    x,
                    weight,
                    bias: bias.into_option(),
                    initial_window: initial_window.into_option(),
                    resets: resets.into_option(),
                    silu,
                });
                (out.y, out.last_window)
            }

            fn norm_op(
                x: FloatTensor<Self>,
                residual: OptionalTensor<Self>,
                weight: FloatTensor<Self>,
                bias: OptionalTensor<Self>,
                eps: f32,
                kind: NormKind,
            ) -> (FloatTensor<Self>, FloatTensor<Self>) {
                let out = <Self as MambaKernels>::add_norm(NormInputs {
                    x,
                    residual: residual.into_option(),
                    weight,
                    bias: bias.into_option(),
                    eps,
                    kind,
                });
                (out.y, out.sum)
            }

            fn embedding_op(
                weight: FloatTensor<Self>,
                bytes: IntTensor<Self>,
            ) -> FloatTensor<Self> {
                <Self as MambaKernels>::byte_embedding(weight, bytes)
            }

            fn cross_entropy_op(
                logits: FloatTensor<Self>,
                targets: IntTensor<Self>,
            ) -> FloatTensor<Self> {
                <Self as MambaKernels>::cross_entropy(logits, targets).0
            }

            fn product_op(
                a: FloatTensor<Self>,
                b: FloatTensor<Self>,
                how: Product,
            ) -> FloatTensor<Self> {
                <Self as MambaKernels>::product(a, b, how, Target::New)
            }

            fn linear_op(
                x: FloatTensor<Self>,
                weight: FloatTensor<Self>,
                how: Product,
            ) -> FloatTensor<Self> {
                linear::autodiff::forward::<Self>(x, weight, how)
            }

            fn layer_op(
                stream: FloatTensor<Self>,
                tensors: LayerTensors<Self>,
                settings: LayerSettings,
            ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>) {
                let (weights, memory) = tensors.split();
                let layer = mamba_layer::fused::Layer {
                    weights,
                    memory,
                    settings,
                };
                let out = mamba_layer::fused::infer::<Self>(&layer, stream);
                (out.stream, out.h, out.window)
            }

            fn adamw_op(
                tensors: TensorList<Self>,
                grad_scale: FloatTensor<Self>,
                step: AdamwStep,
            ) -> TensorList<Self> {
                let updates = tensors.into_updates();
                let results = <Self as MambaKernels>::adamw_steps(updates, grad_scale, step);
                TensorList(results.into_iter().flatten().collect())
            }

            fn adamw_int8_op(
                param: FloatTensor<Self>,
                grad: FloatTensor<Self>,
                moments: RawMoments<Self>,
                grad_scale: FloatTensor<Self>,
                step: AdamwStep,
            ) -> (FloatTensor<Self>, RawMoments<Self>) {
                <Self as MambaKernels>::adamw_int8_step(param, grad, moments, grad_scale, step)
            }

            fn sum_squares_op(tensors: TensorList<Self>) -> FloatTensor<Self> {
                <Self as MambaKernels>::sum_squares(tensors.0)
            }
        }
    };
}

#[cfg(feature = "flex")]
forward_to_kernels!(burn::backend::Flex);

#[cfg(feature = "cube")]
forward_to_kernels!(burn_cubecl::CubeBackend);

/// Two outputs of an operation.
pub(crate) type Pair<B> = (FloatTensor<B>, FloatTensor<B>);

/// Wraps a raw tensor as a constant of the autodiff backend.
pub(crate) fn from_inner<B: Backend, C: CheckpointStrategy>(
    tensor: FloatTensor<B>,
) -> FloatTensor<Autodiff<B, C>> {
    <Autodiff<B, C> as AutodiffBackend>::from_inner(tensor)
}
