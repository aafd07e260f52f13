//! The Mamba-1 block (arXiv 2312.00752, section 3.4), as `mamba_simple.py` of state-spaces/mamba.

use burn::module::{Module, Param};
use burn::tensor::{Device, Tensor};
use mambabyte_kernels::causal_conv1d::{self, Conv};
use mambabyte_kernels::pscan;
use mambabyte_kernels::selective_scan::{self, Scan};

use super::compute::Compute;
use super::init::Init;
use super::linear::Linear;
use super::state::LayerState;
use crate::config::{DtInit, MambaConfig};

/// Depthwise convolution of a block.
#[derive(Module, Debug)]
pub struct Conv1d {
    /// `[E, K]`.
    pub weight: Param<Tensor<2>>,
    /// `[E]`.
    pub bias: Option<Param<Tensor<1>>>,
}

/// Which implementation of the recurrence a block runs; all give the same numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ScanPath {
    /// Kernels that never materialise the states.
    Fused,
    /// Blelloch's scan in tensor operations.
    Parallel,
    /// One position at a time in tensor operations.
    Sequential,
}

/// A selective state-space layer.
///
/// ```text
/// x, z     = split(in_proj(input))
/// u        = silu(conv1d(x))
/// Δ, B, C  = split(x_proj(u));   Δ = softplus(dt_proj(Δ))
/// y        = (scan(u, Δ, -exp(a_log), B, C) + d · u) · silu(z)
/// output   = out_proj(y)
/// ```
#[derive(Module, Debug)]
pub struct MambaBlock {
    /// `[D, 2E]`: x, then z.
    pub in_proj: Linear,
    /// Convolution over the positions.
    pub conv1d: Conv1d,
    /// `[E, R + 2N]`: Δ, B, C.
    pub x_proj: Linear,
    /// `[R, E]`; its bias is added inside the scan.
    pub dt_proj: Linear,
    /// `[E, N]`; the decay rates are `-exp(a_log)`.
    pub a_log: Param<Tensor<2>>,
    /// `[E]`.
    pub d: Param<Tensor<1>>,
    /// `[E, D]`.
    pub out_proj: Linear,
    /// `-exp(a_log)`, where weights no longer change.
    #[module(skip)]
    pub(super) rates: Option<Tensor<2>>,
    #[module(skip)]
    fused_conv: bool,
    #[module(skip)]
    path: ScanPath,
}

impl MambaBlock {
    /// A block on its own, initialised from `seed`.
    pub fn new(config: &MambaConfig, seed: u64, device: &Device) -> Self {
        Self::with_init(&mut Init::new(seed, device), config)
    }

    pub(super) fn with_init(init: &mut Init, config: &MambaConfig) -> Self {
        let (width, inner) = (config.dim, config.d_inner());
        let (rank, state) = (config.dt_rank(), config.d_state);
        let conv_bound = 1.0 / (config.d_conv as f64).sqrt();
        let rescale = if config.rescale_prenorm_residual {
            1.0 / (config.depth as f64).sqrt()
        } else {
            1.0
        };
        Self {
            in_proj: Linear::new(init, [width, 2 * inner], config.bias, 1.0),
            conv1d: Conv1d {
                weight: init.uniform(conv_bound, [inner, config.d_conv]),
                bias: config.conv_bias.then(|| init.uniform(conv_bound, [inner])),
            },
            x_proj: Linear::new(init, [inner, rank + 2 * state], false, 1.0),
            dt_proj: dt_proj(init, config),
            a_log: init.a_log(inner, state),
            d: init.constant(1.0, [inner]),
            out_proj: Linear::new(init, [inner, width], config.bias, rescale),
            rates: None,
            fused_conv: config.use_fast_path,
            path: match (config.pscan, config.use_fast_path) {
                (true, true) => ScanPath::Fused,
                (true, false) => ScanPath::Parallel,
                (false, _) => ScanPath::Sequential,
            },
        }
    }

    /// Runs the block; returns its output and its memory after the last position.
    ///
    /// # Shapes
    ///
    /// - x, output: `[B, L, D]`
    /// - resets: `[B, L]`, 1 where a document begins
    pub fn forward(
        &self,
        x: Tensor<3>,
        state: Option<LayerState>,
        resets: Option<Tensor<2>>,
    ) -> (Tensor<3>, LayerState) {
        let [batch, length, _] = x.dims();
        let [inner, states] = self.a_log.val().dims();
        let rank = self.dt_proj.weight.val().dims()[0];
        let (h, window) = match state {
            Some(state) => (Some(state.h), Some(state.window)),
            None => (None, None),
        };

        let xz = self.in_proj.forward(x);
        let part = |from: usize, to: usize| xz.clone().slice([0..batch, 0..length, from..to]);
        let (x, z) = (part(0, inner), part(inner, 2 * inner));
        let (u, window) = self.conv(x, window, resets.clone());

        let dbc = self.x_proj.forward(u.clone());
        let part = |from: usize, to: usize| dbc.clone().slice([0..batch, 0..length, from..to]);
        let delta = self.dt_proj.project(part(0, rank));
        let (y, h) = self.scan(Scan {
            d: Some(self.d.val()),
            z: Some(z),
            delta_bias: self.dt_proj.bias.as_ref().map(Param::val),
            initial_state: h,
            resets,
            ..Scan::new(
                u,
                delta,
                self.rates(),
                part(rank, rank + states),
                part(rank + states, rank + 2 * states),
            )
        });
        (self.out_proj.forward(y), LayerState { h, window })
    }

    /// One position: `(output [B, D], memory)`. Equals [`forward`](Self::forward) at that position.
    pub fn step(&self, x: Tensor<2>, state: LayerState) -> (Tensor<2>, LayerState) {
        let [batch, width] = x.dims();
        let (y, state) = self.forward(x.reshape([batch, 1, width]), Some(state), None);
        (y.reshape([batch, width]), state)
    }

    /// Step sizes Δ at every position, `[B, L, E]`, of a sequence that begins here.
    ///
    /// # Shapes
    ///
    /// - x: `[B, L, D]`, normalised
    pub(crate) fn step_sizes(&self, x: Tensor<3>) -> Tensor<3> {
        let [batch, length, _] = x.dims();
        let rank = self.dt_proj.weight.val().dims()[0];
        let inner = self.d.val().dims()[0];
        let x = self
            .in_proj
            .forward(x)
            .slice([0..batch, 0..length, 0..inner]);
        let (u, _) = self.conv(x, None, None);
        let dbc = self.x_proj.forward(u);
        let delta = self
            .dt_proj
            .forward(dbc.slice([0..batch, 0..length, 0..rank]));
        burn::tensor::activation::softplus(delta, 1.0)
    }

    /// The block with its decay rates computed once instead of at every call: for weights that
    /// no longer change, as in generation.
    pub fn frozen(mut self) -> Self {
        self.rates = Some(self.rates());
        self
    }

    /// Decay rates of the recurrence, `[E, N]`.
    pub(super) fn rates(&self) -> Tensor<2> {
        self.rates
            .clone()
            .unwrap_or_else(|| self.a_log.val().exp().neg())
    }

    fn conv(
        &self,
        x: Tensor<3>,
        initial_window: Option<Tensor<3>>,
        resets: Option<Tensor<2>>,
    ) -> (Tensor<3>, Tensor<3>) {
        let args = Conv {
            bias: self.conv1d.bias.as_ref().map(Param::val),
            initial_window,
            resets,
            ..Conv::new(x, self.conv1d.weight.val())
        };
        if self.fused_conv {
            causal_conv1d::causal_conv1d(args)
        } else {
            causal_conv1d::reference::causal_conv1d(args)
        }
    }

    fn scan(&self, args: Scan) -> (Tensor<3>, Tensor<3>) {
        match self.path {
            ScanPath::Fused => selective_scan::selective_scan(args),
            ScanPath::Parallel => pscan::selective_scan(args),
            ScanPath::Sequential => selective_scan::reference::selective_scan(args),
        }
    }
}

/// Δ's projection: weights within ±`dt_scale`/√R, and a bias that makes the first step sizes
/// log-uniform between `dt_min` and `dt_max`.
fn dt_proj(init: &mut Init, config: &MambaConfig) -> Linear {
    let dims = [config.dt_rank(), config.d_inner()];
    let bound = config.dt_scale / (dims[0] as f64).sqrt();
    Linear {
        weight: match config.dt_init {
            DtInit::Random => init.uniform(bound, dims),
            DtInit::Constant => init.constant(bound as f32, dims),
        },
        bias: Some(init.delta_bias(dims[1], config.dt_min, config.dt_max, config.dt_init_floor)),
        compute: Compute::default(),
    }
}
