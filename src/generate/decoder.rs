//! The loop over bytes: choose, read, choose.

use std::collections::VecDeque;

use burn::tensor::{DType, Int, Tensor};
use mambabyte_kernels::decode::{self, Start};
use mambabyte_kernels::sampling::{Choice, Draw, Lane};

use super::GeneratorOptions;
use crate::config::Precision;
use crate::model::{MambaLm, State};

/// Runs sequences side by side.
#[derive(Debug)]
pub(super) enum Decoder {
    /// Kernels made for single bytes.
    Kernels(decode::Decoder),
    /// Steps of the model itself.
    Plain(Box<Plain>),
}

impl Decoder {
    pub fn new(model: &MambaLm, options: GeneratorOptions) -> Self {
        let dtype = match options.precision {
            Precision::Bf16 => DType::BF16,
            Precision::Fp32 | Precision::Tf32 => DType::F32,
        };
        let kernels = match options.plain {
            true => None,
            false => model
                .decode_model()
                .and_then(|model| decode::Decoder::new(&model, dtype)),
        };
        match kernels {
            Some(kernels) => Self::Kernels(kernels),
            None => Self::Plain(Box::new(Plain {
                model: model.clone(),
                state: None,
                logits: Vec::new(),
                lanes: Vec::new(),
                queued: VecDeque::new(),
            })),
        }
    }

    /// Begins with sequences that have been read up to `state` and have the logits `[B, V]` there.
    pub fn begin(&mut self, logits: Tensor<2>, state: State, lanes: Vec<Lane>) {
        match self {
            Self::Kernels(kernels) => {
                let layers = state.layers.into_iter();
                kernels.begin(Start {
                    logits,
                    memory: layers.map(|layer| (layer.h, layer.window)).collect(),
                    lanes,
                });
            }
            Self::Plain(plain) => {
                plain.queued.clear();
                plain.logits = values(logits);
                plain.state = Some(state);
                plain.lanes = lanes;
            }
        }
    }

    /// Has `draws.len() / B` bytes of every sequence chosen and read. Draws and choices are in the order
    /// `[steps, B]`.
    pub fn queue(&mut self, draws: Vec<Draw>) {
        match self {
            Self::Kernels(kernels) => kernels.queue(&draws),
            Self::Plain(plain) => plain.queued.push_back(draws),
        }
    }

    /// What was chosen in the piece that was queued first.
    pub fn take(&mut self) -> Vec<Choice> {
        match self {
            Self::Kernels(kernels) => kernels.take(),
            Self::Plain(plain) => plain.take(),
        }
    }

    /// What the bytes behind all pieces are chosen from, `[B, V]`.
    pub fn logits(&self) -> Vec<f32> {
        match self {
            Self::Kernels(kernels) => kernels.logits(),
            Self::Plain(plain) => plain.logits.clone(),
        }
    }

    /// A few words on how bytes are decoded.
    pub fn describe(&self) -> &'static str {
        match self {
            Self::Kernels(kernels) => kernels.describe(),
            Self::Plain(_) => "the model's own step",
        }
    }
}

/// Steps of the model itself.
#[derive(Debug)]
pub(super) struct Plain {
    model: MambaLm,
    /// Taken while a byte is read.
    state: Option<State>,
    /// `[B, V]`.
    logits: Vec<f32>,
    lanes: Vec<Lane>,
    /// Draws of the pieces to come.
    queued: VecDeque<Vec<Draw>>,
}

impl Plain {
    fn take(&mut self) -> Vec<Choice> {
        let Some(draws) = self.queued.pop_front() else {
            unreachable!("queue() comes first");
        };
        let mut all = Vec::with_capacity(draws.len());
        for draws in draws.chunks(self.lanes.len()) {
            let vocabulary = self.logits.len() / self.lanes.len();
            let rows = self.logits.chunks(vocabulary);
            let lanes = self.lanes.iter_mut().zip(rows).zip(draws);
            let choices: Vec<Choice> = lanes
                .map(|((lane, logits), draw)| lane.choose(logits, *draw))
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
