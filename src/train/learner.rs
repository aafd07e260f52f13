//! One training step: from a batch to an updated model.

use burn::module::Module;
use burn::optim::GradientsParams;
use burn::tensor::{Device, Int, Tensor, TensorData};
use mambabyte_datasets::Batch;

use super::inspect::Sketch;
use super::optimizer::{AdamW, clip_factor, global_norm};
use super::recompute;
use super::sum::GradientSum;
use super::telemetry::{Phase, Phases, StepTimes};
use crate::config::{Config, Mode};
use crate::device::budget::device_memory;
use crate::model::{MambaLm, State};

/// Bytes, targets and resets of one micro-batch, on the device.
#[derive(Clone)]
pub(super) struct Inputs {
    /// `[B, L]`
    pub(super) bytes: Tensor<2, Int>,
    /// `[B, L]`
    pub(super) targets: Tensor<2, Int>,
    /// `[B, L]`; none where no document begins inside the sequences.
    pub(super) resets: Option<Tensor<2>>,
}

impl Inputs {
    /// Lanes `from..to` of `batch`.
    fn of(batch: &Batch, from: usize, to: usize, carried: bool, device: &Device) -> Self {
        let rows = batch.row(from).start..batch.row(to - 1).end;
        let dims = [to - from, batch.length];
        let int = |bytes: &[u8]| {
            let values: Vec<i32> = bytes.iter().map(|b| i32::from(*b)).collect();
            Tensor::from_data(TensorData::new(values, dims), device)
        };
        let resets = &batch.resets[rows.clone()];
        // A reset at the first position of a state of zeros changes nothing.
        let matters = |(i, reset): (usize, &bool)| *reset && (carried || i % batch.length != 0);
        let resets = resets.iter().enumerate().any(matters).then(|| {
            let values: Vec<f32> = resets.iter().map(|r| f32::from(u8::from(*r))).collect();
            Tensor::from_data(TensorData::new(values, dims), device)
        });
        Self {
            bytes: int(&batch.inputs[rows.clone()]),
            targets: int(&batch.targets[rows]),
            resets,
        }
    }
}

/// What one step reports.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepReport {
    /// Mean loss over all bytes of the step, in nats, before the update.
    pub loss_nats: f32,
    /// Norm of all gradients together, before clipping.
    pub grad_norm: f32,
    /// Whether the weights were updated.
    pub applied: bool,
}

impl StepReport {
    /// Whether loss and norm are finite numbers.
    pub fn is_finite(&self) -> bool {
        self.loss_nats.is_finite() && self.grad_norm.is_finite()
    }
}

/// A model being trained: weights, optimizer, and the states its lanes carry.
pub struct Learner {
    config: Config,
    device: Device,
    /// Absent only inside an update, which takes the weights so that they change in place.
    model: Option<MambaLm>,
    pub(super) optimizer: AdamW,
    /// One for each micro-batch, in contiguous mode.
    pub(super) carried: Vec<Option<State>>,
    /// Whether operations are done when they return, as on the CPU.
    synchronous: bool,
    /// Whether the next step is looked into.
    look: bool,
    /// Gradients of the last step, if it was.
    sketch: Option<Sketch>,
    /// Where the time of the last step went.
    times: StepTimes,
}

impl Learner {
    /// A new model with the seed's initial weights on `device`.
    pub fn new(config: &Config, device: &Device) -> Self {
        let device = device.clone().autodiff();
        Self {
            config: config.clone(),
            model: Some(
                config
                    .model
                    .init_lm(config.train.seed, &device)
                    .with_compute(config.train.precision.into())
                    .with_recompute(config.train.recompute.layers(config.model.depth)),
            ),
            optimizer: AdamW::new(&config.optimizer),
            carried: vec![None; config.train.accumulation],
            synchronous: device_memory(&device.clone().inner()).is_none(),
            look: false,
            sketch: None,
            times: StepTimes::default(),
            device,
        }
    }

    /// The model, without gradients.
    pub fn model(&self) -> MambaLm {
        self.weights().valid()
    }

    /// The device without gradients.
    pub fn inner_device(&self) -> Device {
        self.device.clone().inner()
    }

    /// The device of the weights, with gradients.
    pub(super) fn device(&self) -> &Device {
        &self.device
    }

    fn weights(&self) -> &MambaLm {
        self.model
            .as_ref()
            .expect("put back at the end of every update")
    }

    /// The configuration.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Whether the steps that come are looked into: their parts are timed, which a GPU has to be
    /// waited for, and their gradients sketched.
    pub(super) fn look(&mut self, look: bool) {
        self.look = look;
    }

    /// Gradients of the last step, if it was looked into.
    pub(super) fn sketch(&mut self) -> Option<Sketch> {
        self.sketch.take()
    }

    /// Where the time of the last step went. On the CPU that costs nothing and is always known.
    pub(super) fn times(&self) -> StepTimes {
        self.times
    }

    /// Applies `f` to the weights, as a checkpoint does.
    pub(super) fn map_model(&mut self, f: impl FnOnce(MambaLm) -> MambaLm) {
        self.model = self.model.take().map(f);
    }

    /// Drops what the lanes remember: they go on as at the start of a document.
    pub(super) fn forget(&mut self) {
        self.carried.fill(None);
    }

    /// One optimizer step on `batch`, whose lanes are those of all micro-batches.
    ///
    /// Where loss or gradient norm is not a finite number, or the loss in nats is above `limit`,
    /// weights and moments stay what they are. That is decided on the device, which need not be
    /// waited for before the update. Carried states go on, or from zero if there is no finite loss.
    pub fn step(&mut self, batch: &Batch, lr: f64, limit: Option<f32>) -> StepReport {
        let micro = self.config.train.batch;
        let count = self.config.train.accumulation;
        let carried = self.config.train.mode == Mode::Contiguous;
        let timed = self.look || self.synchronous;
        let mut phases = Phases::start(timed.then(|| self.inner_device()));
        let mut sum = GradientSum::new(count, &self.inner_device());
        let mut losses = Vec::with_capacity(count);
        for i in 0..count {
            let inputs = Inputs::of(batch, i * micro, (i + 1) * micro, carried, &self.device);
            let before = self.carried[i].take();
            let share = 1.0 / count as f64;
            let (loss, after) = match self.config.train.checkpoint_every {
                0 => self.gradients(inputs, before, share, &mut sum, &mut phases),
                every => recompute::gradients(
                    self.weights(),
                    every,
                    inputs,
                    before,
                    share,
                    &mut sum,
                    &mut phases,
                ),
            };
            losses.push(loss);
            self.carried[i] = carried.then_some(after);
        }
        let grads = sum.into_grads();
        self.sketch = (self.look).then(|| Sketch::gradients(self.weights(), &grads));
        let norm = global_norm(self.weights(), &grads);
        let loss = Tensor::cat(losses, 0).sum();
        // Zero, or no number where one of the two is none: the update then changes nothing.
        let mut veto = (loss.clone() + norm.clone()).mul_scalar(0.0);
        if let Some(limit) = limit {
            veto = veto.mask_fill(loss.clone().greater_elem(limit), f32::NAN);
        }
        let factor = clip_factor(norm.clone(), self.config.optimizer.clip) + veto;
        let optimizer = &mut self.optimizer;
        self.model = self
            .model
            .take()
            .map(|model| optimizer.step(model, grads, factor, lr));

        // The one wait for the device in a step, when all of its work has been handed over.
        let numbers = Tensor::cat(vec![loss, norm], 0).into_data();
        let numbers: Vec<f32> = numbers.iter().collect();
        phases.end(Phase::Optimizer);
        self.times = phases.times(0.0);
        let mut report = StepReport {
            loss_nats: numbers[0],
            grad_norm: numbers[1],
            applied: true,
        };
        report.applied = report.is_finite() && limit.is_none_or(|it| report.loss_nats <= it);
        if !report.applied {
            self.optimizer.updates -= 1;
        }
        if !report.is_finite() {
            // Memories are no numbers either: the lanes begin anew. Keeping those before the step
            // would hold all of them twice.
            self.forget();
        }
        report
    }

    /// Adds the gradients of one micro-batch to `sum`; returns its share of the mean loss, and the
    /// memory after it.
    fn gradients(
        &self,
        inputs: Inputs,
        state: Option<State>,
        share: f64,
        sum: &mut GradientSum,
        phases: &mut Phases,
    ) -> (Tensor<1>, State) {
        let Inputs {
            bytes,
            targets,
            resets,
        } = inputs;
        let state = state.map(State::lift);
        let (losses, state) = self.weights().losses(bytes, targets, state, resets);
        let loss = mean(losses).mul_scalar(share);
        phases.end(Phase::Forward);
        let mut grads = loss.backward();
        let grads = GradientsParams::from_module(&mut grads, self.weights());
        sum.add(self.weights(), grads);
        phases.end(Phase::Backward);
        (loss.inner(), state.inner())
    }
}

/// The mean, in two stages: a sum over one long axis keeps one plane of a GPU busy.
pub(super) fn mean(losses: Tensor<1>) -> Tensor<1> {
    let [count] = losses.dims();
    let width = 1 << count.trailing_zeros().min(8);
    losses.reshape([count / width, width]).mean_dim(1).mean()
}
