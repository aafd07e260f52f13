//! The loop over bytes: choose, read, choose.

use burn::tensor::{Int, Tensor};
use mambabyte_kernels::sampling::{BYTES, Choice, Sampling, choose};

use super::GeneratorOptions;
use crate::model::{MambaLm, State};

/// How a sequence's bytes are chosen.
#[derive(Clone, Debug)]
pub(super) struct Lane {
    pub sampling: Sampling,
    /// For each byte whether the sequence has it.
    pub seen: [bool; BYTES],
}

/// What one step of one sequence is made with.
#[derive(Clone, Copy, Debug)]
pub(super) struct Draw {
    /// A number in [0, 1).
    pub number: f32,
    /// The byte to take in place of one chosen.
    pub forced: Option<u8>,
}

/// Runs sequences side by side.
#[derive(Debug)]
pub(super) struct Decoder {
    plain: Plain,
}

impl Decoder {
    pub fn new(model: &MambaLm, _options: GeneratorOptions) -> Self {
        Self {
            plain: Plain {
                model: model.clone(),
                state: None,
                logits: Vec::new(),
                lanes: Vec::new(),
            },
        }
    }

    /// Begins with sequences that have been read up to `state` and have the logits `[B, V]` there.
    pub fn begin(&mut self, logits: Tensor<2>, state: State, lanes: Vec<Lane>) {
        self.plain.begin(logits, state, lanes);
    }

    /// Chooses and reads `draws.len() / B` bytes of every sequence. Draws and choices are in the
    /// order `[steps, B]`.
    pub fn run(&mut self, draws: &[Draw]) -> Vec<Choice> {
        self.plain.run(draws)
    }

    /// What the next bytes are chosen from, `[B, V]`.
    pub fn logits(&self) -> Vec<f32> {
        self.plain.logits.clone()
    }
}

/// Steps of the model itself.
#[derive(Debug)]
struct Plain {
    model: MambaLm,
    /// Taken while a byte is read.
    state: Option<State>,
    /// `[B, V]`.
    logits: Vec<f32>,
    lanes: Vec<Lane>,
}

impl Plain {
    fn begin(&mut self, logits: Tensor<2>, state: State, lanes: Vec<Lane>) {
        self.logits = values(logits);
        self.state = Some(state);
        self.lanes = lanes;
    }

    fn run(&mut self, draws: &[Draw]) -> Vec<Choice> {
        let mut all = Vec::with_capacity(draws.len());
        for draws in draws.chunks(self.lanes.len()) {
            let vocabulary = self.logits.len() / self.lanes.len();
            let rows = self.logits.chunks(vocabulary);
            let choices = self.lanes.iter_mut().zip(rows).zip(draws);
            let choices: Vec<Choice> = choices
                .map(|((lane, logits), draw)| {
                    choose(
                        logits,
                        &mut lane.seen,
                        &lane.sampling,
                        draw.number,
                        draw.forced,
                    )
                })
                .collect();
            self.read(&choices);
            all.extend(choices);
        }
        all
    }

    fn read(&mut self, choices: &[Choice]) {
        let Some(state) = self.state.take() else {
            unreachable!("begin() comes first");
        };
        let bytes: Vec<i32> = choices.iter().map(|it| i32::from(it.byte)).collect();
        let device = state.layers[0].h.device();
        let bytes = Tensor::<1, Int>::from_data(bytes.as_slice(), &device);
        let (logits, state) = self.model.step(bytes, state);
        self.logits = values(logits);
        self.state = Some(state);
    }
}

fn values(logits: Tensor<2>) -> Vec<f32> {
    logits.into_data().iter::<f32>().collect()
}
