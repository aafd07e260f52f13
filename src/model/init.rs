//! Initial values of the parameters, as mamba_ssm draws them.
//!
//! Source: `mamba_simple.py` and `mixer_seq_simple.py` of state-spaces/mamba.
//!
//! Numbers are drawn on the host, one stream a model, in the order of the module tree: a seed gives
//! the same model on every device.

use burn::module::{Param, ParamId};
use burn::tensor::{Device, Tensor, TensorData};
use rand::rngs::ChaCha8Rng;
use rand::{RngExt, SeedableRng};
use rand_distr::StandardNormal;

/// A source of initial parameters for one device.
pub(super) struct Init<'a> {
    /// None: parameters have no values yet, and are zero where they are used without any.
    rng: Option<ChaCha8Rng>,
    device: &'a Device,
}

impl<'a> Init<'a> {
    pub(super) fn new(seed: u64, device: &'a Device) -> Self {
        Self {
            rng: Some(ChaCha8Rng::seed_from_u64(seed)),
            device,
        }
    }

    /// Parameters that take no memory and no time, for weights that are loaded into them.
    pub(super) fn empty(device: &'a Device) -> Self {
        Self { rng: None, device }
    }

    /// A parameter whose elements `values` draws.
    fn param<const D: usize>(
        &mut self,
        dims: [usize; D],
        values: impl FnOnce(&mut ChaCha8Rng, usize) -> Vec<f32>,
    ) -> Param<Tensor<D>> {
        match &mut self.rng {
            Some(rng) => {
                let values = values(rng, dims.iter().product());
                Param::from_data(TensorData::new(values, dims), self.device)
            }
            None => Param::uninitialized(
                ParamId::new(),
                move |device, tracked| Tensor::zeros(dims, device).set_require_grad(tracked),
                self.device.clone(),
                true,
                dims.into(),
            ),
        }
    }

    /// Every element `value`.
    pub(super) fn constant<const D: usize>(
        &mut self,
        value: f32,
        dims: [usize; D],
    ) -> Param<Tensor<D>> {
        self.param(dims, |_, count| vec![value; count])
    }

    /// Uniform in ±`bound`.
    pub(super) fn uniform<const D: usize>(
        &mut self,
        bound: f64,
        dims: [usize; D],
    ) -> Param<Tensor<D>> {
        self.param(dims, |rng, count| {
            (0..count)
                .map(|_| ((2.0 * rng.random::<f64>() - 1.0) * bound) as f32)
                .collect()
        })
    }

    /// Normal with deviation `deviation`.
    pub(super) fn normal<const D: usize>(
        &mut self,
        deviation: f64,
        dims: [usize; D],
    ) -> Param<Tensor<D>> {
        self.param(dims, |rng, count| {
            (0..count)
                .map(|_| (rng.sample::<f64, _>(StandardNormal) * deviation) as f32)
                .collect()
        })
    }

    /// `log(1 … N)` in every channel, `[E, N]`: the real part of S4D's initial rates.
    pub(super) fn a_log(&mut self, inner: usize, state: usize) -> Param<Tensor<2>> {
        let row: Vec<f32> = (1..=state).map(|n| (n as f64).ln() as f32).collect();
        self.param([inner, state], |_, _| row.repeat(inner))
    }

    /// Inverse softplus of step sizes drawn log-uniformly from `min..max`, not below `floor`.
    pub(super) fn delta_bias(
        &mut self,
        inner: usize,
        min: f64,
        max: f64,
        floor: f64,
    ) -> Param<Tensor<1>> {
        self.param([inner], |rng, count| {
            let draw = |_| {
                let (low, high) = (min.ln(), max.ln());
                let step = (rng.random::<f64>() * (high - low) + low).exp().max(floor);
                // softplus⁻¹(step) = step + ln(1 - e^-step)
                (step + (-(-step).exp_m1()).ln()) as f32
            };
            (0..count).map(draw).collect()
        })
    }
}
