//! AdamW over a whole model, with the gradient clipped by its global norm.

use std::collections::{BTreeMap, HashMap};

use burn::module::{Module, ModuleMapper, ModuleVisitor, Param, ParamId};
use burn::optim::GradientsParams;
use burn::tensor::{Device, Int, Tensor, TensorData};
use mambabyte_kernels::adamw::int8::{BLOCK, Int8Moments, adamw_int8_step};
use mambabyte_kernels::adamw::{AdamwState, AdamwStep, adamw_steps};
use mambabyte_kernels::sum_squares::sum_squares;
use safetensors::tensor::Dtype;

use super::parameters::{Named, Path, named};
use crate::config::{OptimizerConfig, OptimizerState};

/// Mean of the gradients and of their squares, flat.
#[derive(Clone, Debug)]
#[expect(
    clippy::large_enum_variant,
    reason = "a few hundred of them: a box would save nothing"
)]
enum Moments {
    Fp32 { first: Tensor<1>, second: Tensor<1> },
    Int8(Int8Moments),
}

/// A tensor of a checkpoint by its name, length and data type; none where there is no such tensor.
type Read<'a> = dyn FnMut(&str, usize, Dtype) -> Option<TensorData> + 'a;

impl Moments {
    /// The moments of `count` numbers before the first update.
    fn zeros(count: usize, state: OptimizerState, device: &Device) -> Self {
        match state {
            OptimizerState::Fp32 => {
                let zeros = || lasting(device, |device| Tensor::zeros([count], device));
                Self::Fp32 {
                    first: zeros(),
                    second: zeros(),
                }
            }
            OptimizerState::Int8 => {
                Self::Int8(lasting(device, |device| Int8Moments::zeros(count, device)))
            }
        }
    }

    /// The moments of the parameter `name` as a checkpoint has them.
    fn tensors(&self, name: &str) -> Vec<Named> {
        let [first, second] = moment_names(name);
        match self.clone() {
            Self::Fp32 {
                first: mean,
                second: squares,
            } => vec![named(first, mean), named(second, squares)],
            Self::Int8(moments) => vec![
                codes(&first, Dtype::I8, moments.first),
                scales(&first, moments.first_scale),
                codes(&second, Dtype::U8, moments.second),
                scales(&second, moments.second_scale),
            ],
        }
    }

    /// The inverse of [`tensors`](Self::tensors); none where one is missing.
    fn read(
        name: &str,
        count: usize,
        state: OptimizerState,
        device: &Device,
        read: &mut Read<'_>,
    ) -> Option<Self> {
        let [first, second] = moment_names(name);
        if state == OptimizerState::Fp32 {
            // Both are read before one is missed: an error names all there are.
            let first = read(&first, count, Dtype::F32);
            let second = read(&second, count, Dtype::F32);
            return Some(Self::Fp32 {
                first: floats(first?, device),
                second: floats(second?, device),
            });
        }
        let blocks = count.div_ceil(BLOCK);
        let mut moment = |moment: &str, dtype: Dtype| {
            (
                read(&format!("{moment}.codes"), blocks * BLOCK, dtype),
                read(&format!("{moment}.scales"), blocks, Dtype::F32),
            )
        };
        let (first, first_scale) = moment(&first, Dtype::I8);
        let (second, second_scale) = moment(&second, Dtype::U8);
        let words =
            |data: TensorData| lasting(device, |device| Tensor::from_data(data.clone(), device));
        Some(Self::Int8(Int8Moments {
            first: words(first?),
            first_scale: floats(first_scale?, device),
            second: words(second?),
            second_scale: floats(second_scale?, device),
        }))
    }
}

/// Names of both moments of the parameter `name`.
fn moment_names(name: &str) -> [String; 2] {
    [1, 2].map(|i| format!("moment{i}.{name}"))
}

fn floats(data: TensorData, device: &Device) -> Tensor<1> {
    lasting(device, |device| Tensor::from_data(data.clone(), device))
}

fn scales(moment: &str, tensor: Tensor<1>) -> Named {
    named(format!("{moment}.scales"), tensor)
}

/// The codes of a moment, of which a word has four, as bytes.
fn codes(moment: &str, dtype: Dtype, words: Tensor<1, Int>) -> Named {
    Named {
        name: format!("{moment}.codes"),
        shape: vec![4 * words.dims()[0]],
        dtype,
        read: Box::new(move || words.to_data()),
    }
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

    /// Forgets all moments, as before the first update.
    pub(super) fn restart(&mut self) {
        *self = Self::new(&self.config);
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
        let mut taker = Taker {
            path: Path::default(),
            optimizer: self,
            grads,
            grad_scale,
            lr,
            waiting: [Vec::new(), Vec::new()],
            updated: HashMap::new(),
        };
        let model = model.map(&mut taker);
        let updated = taker.update_waiting();
        model.map(&mut Giver { updated })
    }

    /// The numbers of this update for parameters that decay or do not.
    fn numbers(&self, decays: bool, lr: f64) -> AdamwStep {
        let betas = (self.config.beta1, self.config.beta2);
        let decay = if decays {
            self.config.weight_decay
        } else {
            0.0
        };
        AdamwStep::new(self.updates, lr, betas, self.config.eps, decay)
    }

    /// All moments, for a checkpoint: `moment1.NAME` and `moment2.NAME`, f32, or in 8 bits
    /// `moment1.NAME.codes` (I8), `moment2.NAME.codes` (U8), and `.scales` of both (F32), one for
    /// 256 codes.
    pub(super) fn tensors(&self) -> Vec<Named> {
        self.moments
            .iter()
            .flat_map(|(name, moments)| moments.tensors(name))
            .collect()
    }

    /// Puts the moments of a parameter of `count` numbers back. Where `read` has not all of them
    /// they stay what they are: the caller reports it.
    pub(super) fn restore(
        &mut self,
        name: &str,
        count: usize,
        device: &Device,
        read: &mut Read<'_>,
    ) {
        let state = self.config.state_of(count as u64);
        if let Some(moments) = Moments::read(name, count, state, device, read) {
            self.moments.insert(name.to_owned(), moments);
        }
    }
}

/// Makes tensors that live as long as the run where they take no room between those that come
/// and go with every step.
pub(super) fn lasting<T: Send>(device: &Device, make: impl Fn(&Device) -> T + Send + Sync) -> T {
    device.memory_persistent_allocations((), |()| make(device))
}

/// Whether weight decay applies: to matrices, but not to the rates of the recurrence. Norms, biases
/// and `d` are vectors.
fn decays(name: &str, rank: usize) -> bool {
    rank >= 2 && !name.ends_with("a_log")
}

/// A parameter that waits for its update, flat.
struct Waiting {
    id: ParamId,
    name: String,
    state: AdamwState<1>,
    grad: Tensor<1>,
}

/// Takes the parameters out of a model: many small ones are updated together, and in place if
/// nothing else holds them.
struct Taker<'a> {
    path: Path,
    optimizer: &'a mut AdamW,
    grads: GradientsParams,
    grad_scale: Tensor<1>,
    lr: f64,
    /// Those that do not decay, and those that do.
    waiting: [Vec<Waiting>; 2],
    /// Parameters after their update, flat.
    updated: HashMap<ParamId, Tensor<1>>,
}

impl Taker<'_> {
    /// Updates what waits; returns all parameters, flat.
    fn update_waiting(self) -> HashMap<ParamId, Tensor<1>> {
        let Self {
            optimizer,
            grad_scale,
            lr,
            waiting,
            mut updated,
            ..
        } = self;
        for (decays, waiting) in [false, true].into_iter().zip(waiting) {
            let mut names = Vec::with_capacity(waiting.len());
            let mut updates = Vec::with_capacity(waiting.len());
            for it in waiting {
                names.push((it.id, it.name));
                updates.push((it.state, it.grad));
            }
            let numbers = optimizer.numbers(decays, lr);
            let states = adamw_steps(updates, grad_scale.clone(), numbers);
            for ((id, name), state) in names.into_iter().zip(states) {
                let moments = Moments::Fp32 {
                    first: state.moment1,
                    second: state.moment2,
                };
                optimizer.moments.insert(name, moments);
                updated.insert(id, state.param);
            }
        }
        updated
    }
}

impl ModuleMapper for Taker<'_> {
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
            let state = self.optimizer.config.state_of(count as u64);
            Moments::zeros(count, state, &param.device())
        });
        let decays = decays(&name, D);
        let grad = grad.reshape([count]);
        match moments {
            Moments::Fp32 { first, second } => self.waiting[usize::from(decays)].push(Waiting {
                id,
                name,
                state: AdamwState {
                    param,
                    moment1: first,
                    moment2: second,
                },
                grad,
            }),
            Moments::Int8(moments) => {
                let numbers = self.optimizer.numbers(decays, self.lr);
                let scale = self.grad_scale.clone();
                let (param, moments) = adamw_int8_step(param, moments, grad, scale, numbers);
                self.optimizer.moments.insert(name, Moments::Int8(moments));
                self.updated.insert(id, param);
            }
        }
        // What stays in its place is one number, seen in its shape.
        let place = self.grad_scale.clone().reshape([1; D]).expand(dims);
        Param::from_mapped_value(id, Tensor::from_inner(place), mapper)
    }
}

/// Gives the updated parameters back to their model.
struct Giver {
    updated: HashMap<ParamId, Tensor<1>>,
}

impl ModuleMapper for Giver {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let (id, tensor, mapper) = param.consume();
        let Some(updated) = self.updated.remove(&id) else {
            return Param::from_mapped_value(id, tensor, mapper);
        };
        let updated = updated.reshape(tensor.dims());
        Param::from_mapped_value(id, Tensor::from_inner(updated).require_grad(), mapper)
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
    use crate::config::{Config, MambaConfig};

    #[test]
    fn only_matrices_decay_and_never_the_rates() {
        assert!(decays("backbone.layers.3.mixer.in_proj.weight", 2));
        assert!(decays("backbone.layers.3.mixer.conv1d.weight", 2));
        assert!(!decays("backbone.layers.3.mixer.a_log", 2));
        for vector in ["mixer.d", "norm.weight", "mixer.dt_proj.bias"] {
            assert!(!decays(vector, 1), "{vector}");
        }
    }

    /// What the memory estimate counts is what is there.
    #[test]
    fn moments_take_the_bytes_that_the_config_says() {
        let model = MambaConfig::new(50, 1);
        let device = Device::flex();
        for state in ["fp32", "int8"] {
            let setting = format!("optimizer.state={state}");
            let text = "model.dim = 50\nmodel.depth = 1\ntrain.steps = 1\ndata.path = \"x\"";
            let config = Config::parse("config", text, &[setting]).expect("valid");
            let optimizer = &config.optimizer;
            let bytes = |count: u64| -> usize {
                let moments = Moments::zeros(count as usize, optimizer.state_of(count), &device);
                let tensors = moments.tensors("x").into_iter();
                tensors.map(|it| (it.read)().as_bytes().len()).sum()
            };
            let table = model.parameter_table();
            let total: usize = table.iter().map(|it| bytes(it.count)).sum();
            assert_eq!(total as u64, optimizer.moment_bytes(&model), "{state}");
        }
    }

    #[test]
    fn small_parameters_have_no_moments_in_8_bits() {
        let names = |count: usize, state| -> Vec<String> {
            let text = "model.preset = \"tiny\"\ntrain.steps = 1\ndata.path = \"x\"";
            let setting = format!("optimizer.state={state}");
            let config = Config::parse("config", text, &[setting]).expect("valid");
            let state = config.optimizer.state_of(count as u64);
            let tensors = Moments::zeros(count, state, &Device::flex()).tensors("w");
            tensors.into_iter().map(|it| it.name).collect()
        };
        let plain = ["moment1.w", "moment2.w"];
        assert_eq!(names(4095, "int8"), plain);
        assert_eq!(names(4096, "fp32"), plain);
        assert_eq!(
            names(4096, "int8"),
            [
                "moment1.w.codes",
                "moment1.w.scales",
                "moment2.w.codes",
                "moment2.w.scales",
            ]
        );
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
