//! Autodiff over any backend with kernels: each forward is recorded with its backward.

use burn::backend::tensor::{FloatTensor, IntTensor};
use burn_autodiff::Autodiff;
use burn_autodiff::checkpoint::strategy::CheckpointStrategy;

use crate::adamw::AdamwStep;
use crate::adamw::int8::RawMoments;
use crate::add_norm::{NormInputs, NormKind};
use crate::backend::{MambaKernels, MambaOps, OptionalTensor, TensorList, from_inner};
use crate::causal_conv1d::ConvInputs;
use crate::linear::{Product, Target};
use crate::mamba_layer::{self, LayerSettings, LayerTensors};
use crate::selective_scan::ScanInputs;
use crate::{add_norm, causal_conv1d, cross_entropy, embedding, linear, selective_scan};

impl<B: MambaKernels, C: CheckpointStrategy> MambaOps for Autodiff<B, C> {
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
        selective_scan::autodiff::scan::<B, C>(ScanInputs {
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
        })
    }

    fn conv_op(
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        bias: OptionalTensor<Self>,
        initial_window: OptionalTensor<Self>,
        resets: OptionalTensor<Self>,
        silu: bool,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        causal_conv1d::autodiff::conv::<B, C>(ConvInputs {
            x,
            weight,
            bias: bias.into_option(),
            initial_window: initial_window.into_option(),
            resets: resets.into_option(),
            silu,
        })
    }

    fn norm_op(
        x: FloatTensor<Self>,
        residual: OptionalTensor<Self>,
        weight: FloatTensor<Self>,
        bias: OptionalTensor<Self>,
        eps: f32,
        kind: NormKind,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        add_norm::autodiff::norm::<B, C>(NormInputs {
            x,
            residual: residual.into_option(),
            weight,
            bias: bias.into_option(),
            eps,
            kind,
        })
    }

    fn embedding_op(weight: FloatTensor<Self>, bytes: IntTensor<Self>) -> FloatTensor<Self> {
        embedding::autodiff::embedding::<B, C>(weight, bytes)
    }

    fn cross_entropy_op(logits: FloatTensor<Self>, targets: IntTensor<Self>) -> FloatTensor<Self> {
        cross_entropy::autodiff::cross_entropy::<B, C>(logits, targets)
    }

    /// Not differentiated: for measuring.
    fn product_op(a: FloatTensor<Self>, b: FloatTensor<Self>, how: Product) -> FloatTensor<Self> {
        from_inner::<B, C>(B::product(
            a.into_primitive(),
            b.into_primitive(),
            how,
            Target::New,
        ))
    }

    fn linear_op(
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        how: Product,
    ) -> FloatTensor<Self> {
        linear::autodiff::linear::<B, C>(x, weight, how)
    }

    fn layer_op(
        stream: FloatTensor<Self>,
        tensors: LayerTensors<Self>,
        settings: LayerSettings,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>) {
        mamba_layer::autodiff::layer::<B, C>(stream, tensors, settings)
    }

    /// An update is not differentiated: it runs on the raw tensors.
    fn adamw_op(
        tensors: TensorList<Self>,
        grad_scale: FloatTensor<Self>,
        step: AdamwStep,
    ) -> TensorList<Self> {
        let tensors = tensors.0.into_iter().map(|t| t.into_primitive()).collect();
        let updates = TensorList::<B>(tensors).into_updates();
        let results = B::adamw_steps(updates, grad_scale.into_primitive(), step);
        let results = results.into_iter().flatten();
        TensorList(results.map(from_inner::<B, C>).collect())
    }

    fn adamw_int8_op(
        param: FloatTensor<Self>,
        grad: FloatTensor<Self>,
        moments: RawMoments<Self>,
        grad_scale: FloatTensor<Self>,
        step: AdamwStep,
    ) -> (FloatTensor<Self>, RawMoments<Self>) {
        let inner = RawMoments {
            first: moments.first,
            first_scale: moments.first_scale.into_primitive(),
            second: moments.second,
            second_scale: moments.second_scale.into_primitive(),
        };
        let (param, inner) = B::adamw_int8_step(
            param.into_primitive(),
            grad.into_primitive(),
            inner,
            grad_scale.into_primitive(),
            step,
        );
        let moments = RawMoments {
            first: inner.first,
            first_scale: from_inner::<B, C>(inner.first_scale),
            second: inner.second,
            second_scale: from_inner::<B, C>(inner.second_scale),
        };
        (from_inner::<B, C>(param), moments)
    }

    /// The sum is not differentiated either.
    fn sum_squares_op(tensors: TensorList<Self>) -> FloatTensor<Self> {
        let tensors = tensors.0.into_iter().map(|t| t.into_primitive()).collect();
        from_inner::<B, C>(B::sum_squares(tensors))
    }
}
