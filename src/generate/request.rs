//! What is asked of generation, and what comes back.

use std::time::Duration;

pub use mambabyte_kernels::sampling::Choice;

use super::sampling::SamplingConfig;
use crate::error::{Error, Result};

/// One text to go on with.
#[derive(Clone, Debug, PartialEq)]
pub struct Request {
    /// What comes before. Without anything the model starts behind a line's end.
    pub prompt: Vec<u8>,
    /// Bytes to write at most.
    pub max_new_bytes: usize,
    /// How they are chosen.
    pub sampling: SamplingConfig,
    /// Seed of the draws.
    pub seed: u64,
    /// Number of this sequence among those of one seed: each draws numbers of its own.
    pub stream: u64,
    /// The text ends before the first of these.
    pub stop: Vec<Vec<u8>>,
    /// The first bytes written are these, whatever the model thinks of them.
    pub forced: Vec<u8>,
}

impl Request {
    /// A request with the defaults of the command line.
    pub fn new(prompt: impl Into<Vec<u8>>) -> Self {
        Self {
            prompt: prompt.into(),
            max_new_bytes: 256,
            sampling: SamplingConfig::default(),
            seed: 4740,
            stream: 0,
            stop: Vec::new(),
            forced: Vec::new(),
        }
    }

    /// The same request `count` times, each with draws of its own.
    pub fn samples(&self, count: usize) -> Vec<Self> {
        let sample = |index| Self {
            stream: self.stream + index,
            ..self.clone()
        };
        (0..count as u64).map(sample).collect()
    }

    pub(super) fn check(&self) -> Result<()> {
        let problem = match self.sampling.check() {
            Err(problem) => problem,
            Ok(()) if self.stop.iter().any(Vec::is_empty) => "a stop string is empty".to_owned(),
            Ok(()) => return Ok(()),
        };
        Err(Error::Usage {
            message: format!("generation: {problem}"),
            hint: "`mambabyte generate --help` lists the settings".to_owned(),
        })
    }
}

/// Why a text ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finish {
    /// It has as many bytes as were asked for.
    Length,
    /// The stop string of this number came; it is not part of the text.
    Stop(usize),
    /// It was cancelled.
    Cancelled,
}

/// New bytes of one text.
#[derive(Clone, Debug, PartialEq)]
pub struct Piece {
    /// Number of the request.
    pub index: usize,
    /// The bytes; there may be none, where they could be the beginning of a stop string.
    pub bytes: Vec<u8>,
    /// How each of them was chosen.
    pub choices: Vec<Choice>,
    /// Set on the last piece.
    pub finish: Option<Finish>,
}

/// A whole text.
#[derive(Clone, Debug, PartialEq)]
pub struct Completion {
    /// The bytes after the prompt.
    pub bytes: Vec<u8>,
    /// How each of them was chosen.
    pub choices: Vec<Choice>,
    /// Why there are no more.
    pub finish: Finish,
}

/// How long generation took.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Timing {
    /// Bytes of all prompts.
    pub prompt_bytes: usize,
    /// Reading them.
    pub prefill: Duration,
    /// Bytes chosen for all sequences, those behind a stop string included.
    pub new_bytes: usize,
    /// Choosing and reading them.
    pub decode: Duration,
}
