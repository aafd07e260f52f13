//! Writing bytes: the prompt in one parallel pass, then one byte at a time in constant memory.

mod sampling;

use burn::module::Module;
use burn::tensor::{Device, Int, Tensor, TensorData};

pub use sampling::{SampleOptions, Sampler};

use crate::model::{MambaLm, State};

/// A prompt is read in pieces of so many bytes, so that a long one does not need more memory.
const PREFILL: usize = 8192;

/// What generation starts from without a prompt: the byte after which a text most often begins.
const START: u8 = b'\n';

/// Goes on from a prompt, one byte at a call.
pub struct Generator<'a> {
    model: MambaLm,
    device: &'a Device,
    sampler: Sampler,
    /// Before the next byte is chosen: its logits, and the memory they came from.
    logits: Vec<f32>,
    /// Taken while a byte is read.
    state: Option<State>,
}

impl<'a> Generator<'a> {
    /// Reads the prompt. `model` is without gradients, on `device`.
    pub fn new(model: &MambaLm, device: &'a Device, prompt: &[u8], options: SampleOptions) -> Self {
        debug_assert!(model.devices().iter().all(|d| !d.is_autodiff()));
        let model = model.clone().frozen();
        let start = [START];
        let prompt = if prompt.is_empty() { &start } else { prompt };
        let mut state = None;
        let mut last = None;
        for piece in prompt.chunks(PREFILL) {
            let values: Vec<i32> = piece.iter().map(|b| i32::from(*b)).collect();
            let data = TensorData::new(values, [1, piece.len()]);
            let (logits, next) = model.forward_last(Tensor::from_data(data, device), state, 1);
            state = Some(next);
            last = Some(logits);
        }
        let (Some(logits), Some(state)) = (last, state) else {
            unreachable!("a prompt of at least one byte has at least one piece");
        };
        Self {
            model,
            device,
            sampler: Sampler::new(options),
            logits: logits.into_data().iter::<f32>().collect(),
            state: Some(state),
        }
    }

    /// Chooses the next byte and reads it.
    pub fn next_byte(&mut self) -> u8 {
        let byte = self.sampler.choose(&self.logits);
        let input = Tensor::<1, Int>::from_data([i32::from(byte)], self.device);
        if let Some(state) = self.state.take() {
            let (logits, state) = self.model.step(input, state);
            self.logits = logits.into_data().iter::<f32>().collect();
            self.state = Some(state);
        }
        byte
    }
}
