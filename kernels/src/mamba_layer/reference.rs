//! The layer from the references of its operations.

use burn::tensor::Tensor;

use super::MambaLayer;
use crate::add_norm::{self, AddNorm};
use crate::causal_conv1d::{self, Conv};
use crate::selective_scan::{self, Scan};

/// See [`mamba_layer`](super::mamba_layer); in f32 whatever the settings' data type.
pub fn mamba_layer(args: MambaLayer) -> (Tensor<3>, Tensor<3>, Tensor<3>) {
    let [batch, length, width] = args.stream.dims();
    let [inner, states] = args.a_log.dims();
    let [rank, _] = args.dt_proj.dims();
    let product = |x: Tensor<3>, weight: Tensor<2>, bias: Option<Tensor<1>>| {
        let [input, output] = weight.dims();
        let y = x.reshape([batch * length, input]).matmul(weight);
        let y = y.reshape([batch, length, output]);
        match bias {
            Some(bias) => y + bias.reshape([1, 1, output]),
            None => y,
        }
    };
    let part =
        |t: &Tensor<3>, from: usize, to: usize| t.clone().slice([0..batch, 0..length, from..to]);
    let (normed, _) = add_norm::reference::add_norm(AddNorm {
        x: args.stream.clone(),
        residual: None,
        weight: args.norm,
        bias: args.norm_bias,
        eps: args.settings.eps,
        kind: args.settings.norm,
    });
    let xz = product(normed, args.in_proj, args.in_bias);
    let (u, window) = causal_conv1d::reference::causal_conv1d(Conv {
        bias: args.conv_bias,
        initial_window: args.window,
        resets: args.resets.clone(),
        ..Conv::new(part(&xz, 0, inner), args.conv)
    });
    let low = product(u.clone(), args.x_proj, None);
    let delta = product(part(&low, 0, rank), args.dt_proj, None);
    let (y, h) = selective_scan::reference::selective_scan(Scan {
        d: Some(args.d),
        z: Some(part(&xz, inner, 2 * inner)),
        delta_bias: args.dt_bias,
        initial_state: args.h,
        resets: args.resets,
        ..Scan::new(
            u,
            delta,
            args.a_log.exp().neg(),
            part(&low, rank, rank + states),
            part(&low, rank + states, rank + 2 * states),
        )
    });
    let out = product(y, args.out_proj, args.out_bias);
    debug_assert_eq!(out.dims(), [batch, length, width]);
    (args.stream + out, h, window)
}
