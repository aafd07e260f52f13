//! Choosing the next byte of a sequence from its logits.
//!
//! In this order, that of mamba_ssm's `generation.py` except min-p, which that applies only where
//! there is no top-k, in place of top-p, and before the division by the temperature:
//!
//! 1. repetition penalty p (CTRL, arXiv 1909.05858): the logit of every byte that the sequence
//!    has so far becomes `logit / p` if positive, else `logit · p`;
//! 2. `top_k = 1` or temperature 0 takes the likeliest byte;
//! 3. top-k: the k likeliest bytes stay;
//! 4. logits are divided by the temperature;
//! 5. top-p: of what stays, the likeliest bytes up to and with the one that makes their sum p;
//! 6. min-p: of what stays, bytes at least `min_p` times as likely as the likeliest;
//! 7. a draw.
//!
//! Of equal logits the smaller byte counts as the likelier. The likeliest byte always stays.

#[cfg(feature = "cube")]
pub(crate) mod cube;
mod reference;
#[cfg(test)]
mod tests;

pub use reference::choose;

/// Byte values: what is chosen among, whatever the rows of a model's head.
pub const BYTES: usize = 256;

/// How the bytes of one sequence are chosen.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sampling {
    /// Divides the logits; 0 takes the likeliest byte.
    pub temperature: f32,
    /// Number of likeliest bytes to choose among: 0 is no limit, 1 takes the likeliest.
    pub top_k: u32,
    /// Probability that the bytes to choose among have together; 0 and 1 are no limit.
    pub top_p: f32,
    /// Least probability of a byte, as a fraction of the likeliest one's; 0 is no limit.
    pub min_p: f32,
    /// Penalty of bytes that the sequence has already; 1 is none.
    pub repetition_penalty: f32,
}

/// A byte that was chosen.
///
/// Probabilities are the model's own, before penalty, temperature and limits, as natural
/// logarithms. Where `byte` is `top` both have the same bits.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Choice {
    /// The byte.
    pub byte: u8,
    /// Its log-probability.
    pub logprob: f32,
    /// The byte that the model holds for the likeliest.
    pub top: u8,
    /// Its log-probability.
    pub top_logprob: f32,
}

/// What the choices of one sequence are made with.
#[derive(Clone, Debug, PartialEq)]
pub struct Lane {
    /// How its bytes are chosen.
    pub sampling: Sampling,
    /// For each byte whether the sequence has it.
    pub seen: [bool; BYTES],
}

/// What one choice is made with.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Draw {
    /// A number in [0, 1), equally likely anywhere there.
    pub number: f32,
    /// The byte to take whatever its logit.
    pub forced: Option<u8>,
}

impl Draw {
    /// A draw that forces nothing.
    pub fn free(number: f32) -> Self {
        Self {
            number,
            forced: None,
        }
    }
}

impl Lane {
    /// [`choose`] for this sequence.
    pub fn choose(&mut self, logits: &[f32], draw: Draw) -> Choice {
        choose(
            logits,
            &mut self.seen,
            &self.sampling,
            draw.number,
            draw.forced,
        )
    }
}
