//! Initial values of the parameters, as mamba_ssm draws them.
//!
//! Source: `mamba_simple.py` and `mixer_seq_simple.py` of state-spaces/mamba.
//!
//! Numbers are drawn on the host, one stream a model, in the order of the module tree: a seed gives
//! the same model on every device.

use burn::module::Param;
use burn::tensor::{Device, Tensor, TensorData};
use rand::rngs::ChaCha8Rng;
use rand::{RngExt, SeedableRng};
use rand_distr::StandardNormal;

/// A source of initial parameters for one device.
pub(super) struct Init<'a> {
    rng: ChaCha8Rng,
    device: &'a Device,
}

impl<'a> Init<'a> {
    pub(super) fn new(seed: u64, device: &'a Device) -> Self {
        Self {
            rng: ChaCha8Rng::seed_from_u64(seed),
            device,
        }
    }

    fn param<const D: usize>(&self, values: Vec<f32>, dims: [usize; D]) -> Param<Tensor<D>> {
        Param::from_data(TensorData::new(values, dims), self.device)
    }

    /// Every element `value`.
    pub(super) fn constant<const D: usize>(
        &self,
        value: f32,
        dims: [usize; D],
    ) -> Param<Tensor<D>> {
        self.param(vec![value; dims.iter().product()], dims)
    }

    /// Uniform in ±`bound`.
    pub(super) fn uniform<const D: usize>(
        &mut self,
        bound: f64,
        dims: [usize; D],
    ) -> Param<Tensor<D>> {
        let values = (0..dims.iter().product())
            .map(|_| ((2.0 * self.rng.random::<f64>() - 1.0) * bound) as f32)
            .collect();
        self.param(values, dims)
    }

    /// Normal with deviation `deviation`.
    pub(super) fn normal<const D: usize>(
        &mut self,
        deviation: f64,
        dims: [usize; D],
    ) -> Param<Tensor<D>> {
        let values = (0..dims.iter().product())
            .map(|_| (self.rng.sample::<f64, _>(StandardNormal) * deviation) as f32)
            .collect();
        self.param(values, dims)
    }

    /// `log(1 … N)` in every channel, `[E, N]`: the real part of S4D's initial rates.
    pub(super) fn a_log(&self, inner: usize, state: usize) -> Param<Tensor<2>> {
        let row: Vec<f32> = (1..=state).map(|n| (n as f64).ln() as f32).collect();
        self.param(row.repeat(inner), [inner, state])
    }

    /// Inverse softplus of step sizes drawn log-uniformly from `min..max`, not below `floor`.
    pub(super) fn delta_bias(
        &mut self,
        inner: usize,
        min: f64,
        max: f64,
        floor: f64,
    ) -> Param<Tensor<1>> {
        let values = (0..inner)
            .map(|_| {
                let (low, high) = (min.ln(), max.ln());
                let step = (self.rng.random::<f64>() * (high - low) + low)
                    .exp()
                    .max(floor);
                // softplus⁻¹(step) = step + ln(1 - e^-step)
                (step + (-(-step).exp_m1()).ln()) as f32
            })
            .collect();
        self.param(values, [inner])
    }
}
