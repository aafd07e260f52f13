//! AdamW over a whole model, with the gradient clipped by its global norm.

use std::collections::BTreeMap;

use burn::module::{Module, ModuleMapper, ModuleVisitor, Param};
use burn::optim::GradientsParams;
use burn::tensor::{Device, Tensor, TensorData};
use mambabyte_kernels::adamw::{AdamwState, AdamwStep, adamw_step};
use mambabyte_kernels::sum_squares::sum_squares;

use super::parameters::{Named, Path, named};
use crate::config::OptimizerConfig;

/// Mean of the gradients and of their squares, flat.
#[derive(Clone, Debug)]
struct Moments {
    first: Tensor<1>,
    second: Tensor<1>,
}

/// AdamW (arXiv 1711.05101): state by parameter name, so a checkpoint can be read without the
/// program that wrote it.
#[derive(Debug)]
pub(super) struct AdamW {
    config: OptimizerConfig,
    moments: BTreeMap<String, Moments>,
    /// Updates made.
    pub(super) updates: u64,
}

impl AdamW {
    pub(super) fn new(config: &OptimizerConfig) -> Self {
        Self {
            config: config.clone(),
            moments: BTreeMap::new(),
            updates: 0,
        }
    }

    /// One update of every parameter that has a gradient, which is first scaled by `grad_scale`, a
    /// tensor of one element.
    pub(super) fn step<M: Module>(
        &mut self,
        model: M,
        grads: GradientsParams,
        grad_scale: Tensor<1>,
        lr: f64,
    ) -> M {
        self.updates += 1;
        model.map(&mut Updater {
            path: Path::default(),
            optimizer: self,
            grads,
            grad_scale,
            lr,
        })
    }

    fn numbers(&self, name: &str, rank: usize, lr: f64) -> AdamwStep {
        let betas = (self.config.beta1, self.config.beta2);
        let decay = if decays(name, rank) {
            self.config.weight_decay
        } else {
            0.0
        };
        AdamwStep::new(self.updates, lr, betas, self.config.eps, decay)
    }

    /// All moments, for a checkpoint: `moment1.NAME` and `moment2.NAME`.
    pub(super) fn tensors(&self) -> Vec<Named> {
        self.moments
            .iter()
            .flat_map(|(name, moments)| {
                [
                    named(format!("moment1.{name}"), moments.first.clone()),
                    named(format!("moment2.{name}"), moments.second.clone()),
                ]
            })
            .collect()
    }

    /// Puts the moments of a parameter back; `None` where one is missing.
    pub(super) fn restore(
        &mut self,
        name: &str,
        first: TensorData,
        second: TensorData,
        device: &Device,
    ) {
        let moments = Moments {
            first: lasting(device, |device| Tensor::from_data(first.clone(), device)),
            second: lasting(device, |device| Tensor::from_data(second.clone(), device)),
        };
        self.moments.insert(name.to_owned(), moments);
    }
}

/// Makes a tensor that lives as long as the run where it takes no room between those that come and
/// go with every step.
fn lasting(device: &Device, make: impl Fn(&Device) -> Tensor<1> + Send + Sync) -> Tensor<1> {
    device.memory_persistent_allocations((), |()| make(device))
}

/// Whether weight decay applies: to matrices, but not to the rates of the recurrence. Norms, biases
/// and `d` are vectors.
fn decays(name: &str, rank: usize) -> bool {
    rank >= 2 && !name.ends_with("a_log")
}

struct Updater<'a> {
    path: Path,
    optimizer: &'a mut AdamW,
    grads: GradientsParams,
    grad_scale: Tensor<1>,
    lr: f64,
}

impl ModuleMapper for Updater<'_> {
    fn enter_module(&mut self, name: &str, _container: &str) {
        self.path.enter(name);
    }

    fn exit_module(&mut self, _name: &str, _container: &str) {
        self.path.exit();
    }

    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let (id, tensor, mapper) = param.consume();
        let Some(grad) = self.grads.remove::<D>(id) else {
            return Param::from_mapped_value(id, tensor, mapper);
        };
        let name = self.path.join();
        let dims = tensor.dims();
        let count: usize = dims.iter().product();
        let param: Tensor<1> = tensor.inner().reshape([count]);
        let moments = self.optimizer.moments.remove(&name).unwrap_or_else(|| {
            let device = param.device();
            let zeros = || lasting(&device, |device| Tensor::zeros([count], device));
            Moments {
                first: zeros(),
                second: zeros(),
            }
        });
        let state = AdamwState {
            param,
            moment1: moments.first,
            moment2: moments.second,
        };
        let numbers = self.optimizer.numbers(&name, D, self.lr);
        let state = adamw_step(
            state,
            grad.reshape([count]),
            self.grad_scale.clone(),
            numbers,
        );
        self.optimizer.moments.insert(
            name,
            Moments {
                first: state.moment1,
                second: state.moment2,
            },
        );
        let updated = Tensor::from_inner(state.param.reshape(dims)).require_grad();
        Param::from_mapped_value(id, updated, mapper)
    }
}

/// Euclidean norm of all gradients together, a tensor of one element.
pub(super) fn global_norm<M: Module>(model: &M, grads: &GradientsParams) -> Tensor<1> {
    struct Flat<'a> {
        grads: &'a GradientsParams,
        gradients: Vec<Tensor<1>>,
    }

    impl ModuleVisitor for Flat<'_> {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            if let Some(grad) = self.grads.get::<D>(param.id) {
                let count = grad.shape().num_elements();
                self.gradients.push(grad.reshape([count]));
            }
        }
    }

    let mut flat = Flat {
        grads,
        gradients: Vec::new(),
    };
    model.visit(&mut flat);
    sum_squares(flat.gradients).sqrt()
}

/// Factor that brings a gradient of norm `norm` down to `clip`; one below it, or without clipping.
pub(super) fn clip_factor(norm: Tensor<1>, clip: f64) -> Tensor<1> {
    if clip == 0.0 {
        return norm.ones_like();
    }
    // The small term, as in PyTorch, keeps a zero norm from dividing by zero.
    norm.add_scalar(1e-6)
        .recip()
        .mul_scalar(clip)
        .clamp_max(1.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_matrices_decay_and_never_the_rates() {
        assert!(decays("backbone.layers.3.mixer.in_proj.weight", 2));
        assert!(decays("backbone.layers.3.mixer.conv1d.weight", 2));
        assert!(!decays("backbone.layers.3.mixer.a_log", 2));
        for vector in ["mixer.d", "norm.weight", "mixer.dt_proj.bias"] {
            assert!(!decays(vector, 1), "{vector}");
        }
    }

    #[test]
    fn the_clip_factor_limits_the_norm() {
        let device = Device::flex();
        let factor = |norm: f32, clip| {
            let norm = Tensor::<1>::from_data([norm], &device);
            clip_factor(norm, clip).into_scalar::<f32>()
        };
        assert!((factor(2.0, 0.1) - 0.05).abs() < 1e-6);
        assert_eq!(factor(0.05, 0.1), 1.0);
        assert_eq!(factor(0.0, 0.1), 1.0);
        assert_eq!(factor(1e9, 0.0), 1.0);
    }
}
