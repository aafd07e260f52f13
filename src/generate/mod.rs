//! Writing bytes: the prompt in one parallel pass, then one byte at a time, in constant memory and
//! time a byte whatever was read or written before.
//!
//! ```text
//! Generator      a model, made ready once
//!   .start()     reads the prompts of some requests: a Session, one sequence each
//!     .advance() some more bytes of every sequence
//! ```

mod decoder;
mod prefill;
mod request;
mod sampling;
mod session;
mod stop;
#[cfg(test)]
mod tests;

use std::ops::ControlFlow;

use burn::module::Module;
use burn::tensor::{DType, Device};
pub use mambabyte_datasets::text::Utf8Stream;

use crate::config::Precision;
use crate::error::{Error, Result};
use crate::model::{Compute, MambaLm};
use decoder::Decoder;
pub use request::{Choice, Completion, Finish, Piece, Request, Timing};
pub use sampling::SamplingConfig;
pub use session::Session;

/// Bytes that [`Generator::generate`] writes before it hands them on.
const PIECE: usize = 16;

/// How a [`Generator`] computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GeneratorOptions {
    /// Format of weights and of the operands of products.
    pub precision: Precision,
    /// Use the model's own step instead of kernels made for single bytes: slower, without another
    /// copy of the weights.
    pub plain: bool,
}

impl Default for GeneratorOptions {
    fn default() -> Self {
        Self {
            precision: Precision::Fp32,
            plain: false,
        }
    }
}

/// A model that is ready to write.
///
/// It stays on the thread that made it: GPU work is ordered within a thread.
#[derive(Debug)]
pub struct Generator {
    model: MambaLm,
    device: Device,
    decoder: Decoder,
}

impl Generator {
    /// Makes a model ready: `model` is without gradients, on `device`.
    pub fn new(model: MambaLm, device: &Device, options: GeneratorOptions) -> Self {
        debug_assert!(model.devices().iter().all(|d| !d.is_autodiff()));
        let model = model
            .frozen()
            .with_compute(Compute::from(options.precision));
        let decoder = Decoder::new(&model, options);
        // Training goes on with the model's own weights; only what writes may round them.
        let rounds = options.precision == Precision::Bf16 && !options.plain;
        Self {
            model: match rounds {
                true => model.with_rounded_weights(DType::BF16),
                false => model,
            },
            decoder,
            device: device.clone(),
        }
    }

    /// A few words on how bytes are decoded.
    pub fn describe(&self) -> &'static str {
        self.decoder.describe()
    }

    /// Waits for the device.
    fn sync(&self) -> Result<()> {
        self.device.sync().map_err(|error| Error::Device {
            device: format!("{:?}", self.device),
            reason: error.to_string(),
            hint: "`mambabyte doctor` says what this machine has".to_owned(),
        })
    }

    /// Reads the prompts: afterwards every request is a sequence of its own, side by side.
    ///
    /// # Errors
    ///
    /// [`Error::Usage`] if a setting is outside its range.
    pub fn start(&mut self, requests: &[Request]) -> Result<Session<'_>> {
        Session::start(self, requests)
    }

    /// Writes the texts of all requests side by side, and hands every piece to `sink` as it comes;
    /// [`ControlFlow::Break`] cancels what is not finished.
    ///
    /// # Errors
    ///
    /// As [`start`](Self::start).
    pub fn generate(
        &mut self,
        requests: &[Request],
        sink: &mut dyn FnMut(&Piece) -> ControlFlow<()>,
    ) -> Result<Vec<Completion>> {
        let mut session = self.start(requests)?;
        let empty = Completion {
            bytes: Vec::new(),
            choices: Vec::new(),
            finish: Finish::Cancelled,
        };
        let mut texts = vec![empty; requests.len()];
        'writing: while !session.is_finished() {
            for piece in session.advance_ahead(PIECE)? {
                let flow = sink(&piece);
                let text = &mut texts[piece.index];
                text.bytes.extend(piece.bytes);
                text.choices.extend(piece.choices);
                if let Some(finish) = piece.finish {
                    text.finish = finish;
                }
                if flow.is_break() {
                    break 'writing;
                }
            }
        }
        Ok(texts)
    }
}
